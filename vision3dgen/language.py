"""Numbers of the special tokens, on which datasets, models and metrics of language agree."""

SPECIALS = ("<pad>", "<start>", "<end>", "<unknown>", "<mask>")
PAD, START, END, UNKNOWN, MASK = range(len(SPECIALS))
