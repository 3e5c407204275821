"""Triple-loop twins of the operators: slow, obvious, and written from the formulas alone."""
