"""The runtime type checker of the test run: beartype, where an int is accepted for a float as Python does."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
