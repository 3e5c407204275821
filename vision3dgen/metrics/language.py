"""Sentences against references, and what a language model makes of a text.

BLEU of a corpus (Papineni et al. 2002), for candidates c with references r:

    p_n = Σ_c Σ_gram min(count in c, max_r count in r) / Σ_c (number of n-grams of c)
    BLEU-N = BP exp(Σ_{n <= N} log p_n / N),   BP = 1 if |c| > |r| else exp(1 - |r| / |c|)

where |c| is the length of all candidates and |r| the sum of the lengths of the references closest to them, the shorter
of two that are equally close.
"""

import json
import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.files import atomic_write
from vision3dgen.language import words_of
from vision3dgen.metrics.evaluator import Batches, Evaluator, Predict

SMOOTHINGS = ("none", "add_one")


class Caption(NamedTuple):
    """What a captioning model says of an image."""

    tokens: Int[Tensor, " T"]  # without <start> and <end>
    log_probability: Float[Tensor, ""]  # <end> included
    attention: Float[Tensor, "T h w"] | None  # where each word was read; each map sums to 1


class Guesses(NamedTuple):
    """What a masked language model makes of sentences."""

    nats: Float[Tensor, " B"]  # sum of -log p over the words left out
    words: Int[Tensor, " B"]  # number of them
    right: Int[Tensor, " B"]  # of them guessed


@dataclass(frozen=True)
class Bleu:
    """BLEU-1 to BLEU-N of a corpus and what they are made of."""

    scores: tuple[float, ...]
    precisions: tuple[float, ...]
    brevity_penalty: float
    length: int  # of all candidates
    reference_length: int  # of the references closest to them


def bleu(
    candidates: Sequence[Sequence[Hashable]],
    references: Sequence[Sequence[Sequence[Hashable]]],
    *,
    order: int = 4,
    smoothing: str = "none",
) -> Bleu:
    """BLEU of candidates, sequences of words, each with one or several references.

    smoothing: "none" as published, a score is 0 where no n-gram of its order matches; "add_one" adds 1 to both counts
    of the orders above 1 (Lin & Och 2004). Raises ValueError for no candidate, or one without reference.
    """
    check_choice("smoothing", smoothing, SMOOTHINGS)
    if len(candidates) != len(references) or not candidates:
        raise ValueError(
            f"candidates must be at least one, with references for each; got {len(candidates)} candidates and "
            f"{len(references)} lists of references"
        )
    matched, total = [0] * order, [0] * order
    length = reference_length = 0
    for index, (candidate, known) in enumerate(zip(candidates, references)):
        if not known:
            raise ValueError(f"candidate {index} has no reference")
        length += len(candidate)
        reference_length += min((len(r) for r in known), key=lambda size: (abs(size - len(candidate)), size))
        for n in range(1, order + 1):
            counts = ngrams(candidate, n)
            most: Counter[tuple[Hashable, ...]] = Counter()
            for reference in known:
                most |= ngrams(reference, n)
            matched[n - 1] += sum((counts & most).values())
            total[n - 1] += sum(counts.values())
    if smoothing == "add_one":
        matched = [matched[0], *(count + 1 for count in matched[1:])]
        total = [total[0], *(count + 1 for count in total[1:])]
    precisions = [m / t if t else 0.0 for m, t in zip(matched, total)]
    penalty = 1.0 if length > reference_length else math.exp(1 - reference_length / length) if length else 0.0
    scores = []
    for n in range(1, order + 1):
        used = precisions[:n]
        scores.append(penalty * math.exp(sum(map(math.log, used)) / n) if min(used) > 0 else 0.0)
    return Bleu(tuple(scores), tuple(precisions), penalty, length, reference_length)


def ngrams(words: Sequence[Hashable], n: int) -> "Counter[tuple[Hashable, ...]]":
    """How often each run of `n` words occurs."""
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def perplexity(nats: Float[Tensor, "*B"], count: Int[Tensor, "*B"]) -> float:
    """exp of the mean over all words of -log p, from sums per sentence and numbers of words."""
    words = int(count.sum())
    if words == 0:
        raise ValueError("perplexity needs at least one word")
    return float(torch.exp(nats.double().sum() / words))


# ------------------------------------------------------------------------------------------------------- attention


def attention_inside(
    attention: Float[Tensor, "h w"], boxes: Float[Tensor, "N 4"], image_size: tuple[int, int]
) -> tuple[float, float]:
    """Share of an attention map inside the union of boxes (xyxy pixels), and the share of the image they cover.

    A cell of the map spreads its weight evenly over its part of the image; pixels count where their centers lie.
    """
    height, width = image_size
    v, u = torch.arange(height) + 0.5, torch.arange(width) + 0.5
    inside = torch.zeros(height, width, dtype=torch.bool)
    for x0, y0, x1, y1 in boxes.tolist():
        inside |= ((v >= y0) & (v < y1))[:, None] & ((u >= x0) & (u < x1))
    rows = (v * attention.shape[0] / height).long()
    columns = (u * attention.shape[1] / width).long()
    per_pixel = attention.double()[rows][:, columns]
    return float((per_pixel * inside).sum() / per_pixel.sum()), float(inside.double().mean())


@dataclass(frozen=True)
class Pointing:
    """How much more attention words pay to the objects they name than looking everywhere alike would."""

    ratio: float  # mean over words of (attention inside the boxes) / (share of the image they cover)
    inside: float  # mean attention inside
    covered: float  # mean share of the image
    count: int  # of words


def pointing(
    captions: Sequence[tuple[Sequence[str], Float[Tensor, "T h w"]]],
    objects: Sequence[Mapping[str, Float[Tensor, "N 4"]]],
    image_size: tuple[int, int],
) -> Pointing | None:
    """The pointing of all words that name something: objects[i] has the boxes of what each word may mean in image i.

    None where no word names anything.
    """
    shares = []
    for (words, attention), boxes in zip(captions, objects):
        for word, look in zip(words, attention):
            if word in boxes:
                inside, covered = attention_inside(look, boxes[word], image_size)
                shares.append((inside / covered, inside, covered))
    if not shares:
        return None
    ratio, inside, covered = (sum(column) / len(shares) for column in zip(*shares))
    return Pointing(ratio, inside, covered, len(shares))


# ------------------------------------------------------------------------------------------------------- evaluators


@dataclass(frozen=True)
class CaptionScores:
    """BLEU of a split, the share of captions that are a reference word for word, and a few of them."""

    bleu: Bleu
    exact: float
    count: int
    examples: list[dict[str, Any]] = field(default_factory=list)
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        named = {f"BLEU-{n}": score for n, score in enumerate(self.bleu.scores, start=1)}
        return {
            **named,
            "exact": self.exact,
            "brevity_penalty": self.bleu.brevity_penalty,
            "n": self.count,
            "n_failed": 0,
            "examples": self.examples,
            "about": dict(self.about),
        }

    def to_markdown(self) -> str:
        names = [f"BLEU-{n}" for n in range(1, len(self.bleu.scores) + 1)]
        values = [*self.bleu.scores, self.exact]
        head = "| " + " | ".join([*names, "exact", "images"]) + " |\n|" + "---:|" * (len(names) + 2)
        row = "| " + " | ".join([*(f"{value:.4f}" for value in values), str(self.count)]) + " |"
        shown = [f"- {e['id']}: {e['caption']} *({'; '.join(e['references'][:2])})*" for e in self.examples]
        return "\n".join([head, row, "", *shown])


@dataclass(frozen=True, kw_only=True)
class CaptionEvaluator(Evaluator):
    """BLEU against all captions of each image; `examples` are shown in the summary."""

    examples: int = 5

    @property
    def names(self) -> Sequence[str]:
        return ["bleu"]

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> CaptionScores:
        rows: list[dict[str, Any]] = []
        for batch in batches:
            for index, caption in enumerate(predict(batch)):
                said = batch["vocabulary"][index].decode(caption.tokens)
                row = {"id": batch["id"][index], "caption": said, "log_probability": float(caption.log_probability)}
                rows.append({**row, "references": batch["captions"][index]})
        if not rows:
            raise ValueError("there is no image to score captions of")
        with atomic_write(out) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        candidates = [row["caption"].split() for row in rows]
        references = [[words_of(text) for text in row["references"]] for row in rows]
        exact = sum(c in r for c, r in zip(candidates, references)) / len(rows)
        step = max(len(rows) // max(self.examples, 1), 1)
        shown = rows[::step][: self.examples]
        return CaptionScores(bleu(candidates, references), exact, len(rows), shown, about)


@dataclass(frozen=True)
class LanguageScores:
    """What a masked language model makes of a text."""

    perplexity: float  # over the words left out
    accuracy: float
    words: int
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        named = {"perplexity": self.perplexity, "accuracy": self.accuracy, "words": self.words}
        return {**named, "n_failed": 0, "about": dict(self.about)}

    def to_markdown(self) -> str:
        row = f"| {self.perplexity:.4f} | {self.accuracy:.4f} | {self.words} |"
        return f"| perplexity | accuracy | words left out |\n|---:|---:|---:|\n{row}"


@dataclass(frozen=True, kw_only=True)
class LanguageEvaluator(Evaluator):
    """Perplexity and accuracy over the words left out of a text; which ones depends on the dataset's seed."""

    @property
    def names(self) -> Sequence[str]:
        return ["perplexity"]

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> LanguageScores:
        rows: list[dict[str, Any]] = []
        for batch in batches:
            guesses = predict(batch)
            for index, identity in enumerate(batch["id"]):
                values = {key: value[index].item() for key, value in guesses._asdict().items()}
                rows.append({"id": identity, **values})
        if not rows:
            raise ValueError("there is no text to score")
        with atomic_write(out) as file:
            file.writelines(json.dumps(row).encode() + b"\n" for row in rows)
        words = torch.tensor([row["words"] for row in rows])
        nats = torch.tensor([row["nats"] for row in rows])
        right = sum(row["right"] for row in rows)
        return LanguageScores(perplexity(nats, words), right / int(words.sum()), int(words.sum()), about)
