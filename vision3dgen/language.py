"""Special tokens and the cutting of text into words: what datasets, models and metrics of language agree on."""

import re

SPECIALS = ("<pad>", "<start>", "<end>", "<unknown>", "<mask>")
PAD, START, END, UNKNOWN, MASK = range(len(SPECIALS))


def words_of(text: str) -> list[str]:
    """Lower-case words and single punctuation marks: "A car, parked." -> a | car | , | parked | ."""
    return re.findall(r"\w+(?:['-]\w+)*|[^\w\s]", text.lower())
