"""Words as numbers: a word-level tokenizer, its file, and lines of a text file for language models.

The first five tokens of every vocabulary are `SPECIALS`; models know their numbers and no other word.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.datasets.drawn import DrawnItems
from vision3dgen.files import atomic_write
from vision3dgen.language import END, MASK, PAD, SPECIALS, START, UNKNOWN, words_of

_FORMAT = "vision3dgen vocabulary"
_VERSION = 1  # a change of how text becomes tokens raises it


class Vocabulary:
    """Words numbered from 5 on, after `<pad> <start> <end> <unknown> <mask>`.

    Raises ValueError for a word that is given twice, is special, or is not one token.
    """

    def __init__(self, words: Sequence[str]):
        self.words = (*SPECIALS, *words)
        self._index = {word: index for index, word in enumerate(self.words)}
        if len(self._index) != len(self.words):
            twice = sorted(word for word, count in Counter(self.words).items() if count > 1)
            raise ValueError(f"words of a vocabulary must differ from one another and from {SPECIALS}, twice: {twice}")
        for word in words:
            if words_of(word) != [word]:
                raise ValueError(f"{word!r} is not one lower-case word: text would never be cut so")

    @staticmethod
    def of(texts: Iterable[str], *, min_count: int = 1) -> "Vocabulary":
        """The words that occur at least `min_count` times, the most frequent first, ties in alphabetical order."""
        counts = Counter(word for text in texts for word in words_of(text))
        kept = sorted((word for word, count in counts.items() if count >= min_count), key=lambda w: (-counts[w], w))
        if not kept:
            raise ValueError(f"no word occurs {min_count} times or more: there is nothing to make a vocabulary of")
        return Vocabulary(kept)

    def __len__(self) -> int:
        return len(self.words)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.words == other.words

    __hash__ = None  # type: ignore[assignment]

    def encode(self, text: str, *, unknown: Literal["token", "raise"] = "token") -> list[int]:
        """Numbers of a text's words, between <start> and <end>.

        unknown: whether words that are not known become <unknown>, or a ValueError that names them.
        """
        check_choice("unknown", unknown, ("token", "raise"))
        words = words_of(text)
        if unknown == "raise" and (strange := sorted({word for word in words if word not in self._index})):
            raise ValueError(f"{text!r} has words that the vocabulary of {len(self)} does not know: {strange}")
        return [START, *(self._index.get(word, UNKNOWN) for word in words), END]

    def decode(self, tokens: Sequence[int] | Int[Tensor, " T"]) -> str:
        """The words up to <end>, without <start> and <pad>; ValueError for a number that no word has."""
        words = []
        for token in tokens.tolist() if isinstance(tokens, Tensor) else tokens:
            if not 0 <= token < len(self.words):
                raise ValueError(f"token {token} is not in a vocabulary of {len(self)}")
            if token == END:
                break
            if token not in (START, PAD):
                words.append(self.words[token])
        return " ".join(words)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, atomically."""
        content = {"format": _FORMAT, "version": _VERSION, "words": list(self.words[len(SPECIALS) :])}
        with atomic_write(path) as file:
            file.write(json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")

    @staticmethod
    def load(path: str | os.PathLike[str]) -> "Vocabulary":
        """Read what `save` wrote; a ValueError names the file and what is wrong with it."""
        try:
            content = json.loads(Path(path).read_bytes())
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise ValueError(f"{path}: not a vocabulary: it must be an object with format {_FORMAT!r}")
        if content.get("version") != _VERSION:
            raise ValueError(f"{path}: vocabulary of version {content.get('version')!r}, this program reads {_VERSION}")
        words = content.get("words")
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise ValueError(f"{path}: words must be a list of strings")
        try:
            return Vocabulary(words)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def padded(tokens: Sequence[int], length: int) -> Int[Tensor, " T"]:
    """The tokens and as much padding as makes `length`; ValueError if they are more."""
    if len(tokens) > length:
        raise ValueError(f"{len(tokens)} tokens with <start> and <end> do not fit into {length}")
    return torch.tensor([*tokens, *[PAD] * (length - len(tokens))])


class TextLines(DrawnItems):
    """Lines of a text file as tokens, some of them masked for a masked language model.

    path: UTF-8 text, a sentence a line, empty lines left out; "{split}" in it stands for the split. vocabulary: a file
    of `Vocabulary.save`. max_length: tokens of every item, <start> and <end> included; the longest line's by default.
    mask: share of words to predict, at least one of each line: 80 % become <mask>, 10 % a random word, 10 % stay
    (Devlin et al. 2019, arXiv:1810.04805, section 3.1). Which ones depends on seed, epoch and index.

    Items: `tokens` (T,) as they stand, `masked` (T,) as the model sees them, `targets` (T,) the token where one is to
    be predicted and <pad> elsewhere, `text`, `id` (file and line). Raises ValueError naming file and line.
    """

    def __init__(
        self, path: str, split: str, *, vocabulary: str, max_length: int | None = None, mask: float = 0.15,
        unknown: Literal["token", "raise"] = "raise", seed: int = 0,
    ):  # fmt: skip
        if not 0 < mask < 1:
            raise ValueError(f"mask must be a share between 0 and 1, got {mask}")
        self.path = Path(path.replace("{split}", split))
        self.vocabulary, self.mask, self.seed = Vocabulary.load(vocabulary), mask, seed
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: not UTF-8 text (byte {error.start})") from error
        self.lines: list[tuple[int, str]] = []
        encoded: list[list[int]] = []
        for number, line in enumerate(text.splitlines(), start=1):
            if not words_of(line):
                continue
            try:
                encoded.append(self.vocabulary.encode(line, unknown=unknown))
                if max_length is not None:
                    padded(encoded[-1], max_length)
            except ValueError as error:
                raise ValueError(f"{self.path}, line {number}: {error}") from error
            self.lines.append((number, line))
        if not encoded:
            raise ValueError(f"{self.path}: no line with a word in it")
        self.max_length = max_length or max(map(len, encoded))
        self._tokens = torch.stack([padded(tokens, self.max_length) for tokens in encoded])

    def __len__(self) -> int:
        return len(self.lines)

    def _item(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        tokens = self._tokens[index]
        masked, targets = mask_tokens(tokens.numpy(), len(self.vocabulary), self.mask, rng)
        number, line = self.lines[index]
        return {
            "tokens": tokens,
            "masked": torch.from_numpy(masked),
            "targets": torch.from_numpy(targets),
            "text": line,
            "id": f"{self.path.name}, line {number}",
        }


def mask_tokens(
    tokens: np.ndarray, vocabulary_size: int, share: float, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with some replaced, and what stood there (<pad> where nothing is to be predicted).

    Each word is chosen with probability `share`, one if none was; of the chosen, 80 % become <mask>, 10 % any word,
    10 % stay. Special tokens are never chosen, but for <unknown>. Source: Devlin et al. 2019, section 3.1.
    """
    words = (tokens >= len(SPECIALS)) | (tokens == UNKNOWN)
    if not words.any():
        raise ValueError(f"there is no word to mask among the tokens {tokens.tolist()}")
    chosen = words & (rng.random(tokens.shape) < share)
    if not chosen.any():
        chosen[rng.choice(np.flatnonzero(words))] = True
    how = rng.random(tokens.shape)
    masked = np.where(chosen & (how < 0.8), MASK, tokens)
    drawn = rng.integers(len(SPECIALS), vocabulary_size, tokens.shape)
    masked = np.where(chosen & (how >= 0.8) & (how < 0.9), drawn, masked)
    return masked, np.where(chosen, tokens, PAD)
