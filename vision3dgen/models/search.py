"""Sentences from a model of the next token: beam search, of which greedy search is the case of one beam.

Each image keeps its best `beams` beginnings. Every step extends them by every token; of all the extensions the most
probable `beams` stay, and those among them that end are finished and leave. A finished sentence of T tokens, <end>
included, is worth

    log p / T ** length_penalty,

and the best one is returned: with 0 the most probable, with 1 the one of the best mean per token (Wu et al. 2016,
arXiv:1609.08144, equation 14, have ((5 + T) / 6) ** length_penalty instead of T ** length_penalty). What has not ended
after `max_length` tokens counts as it stands. With as many beams as there are beginnings nothing is lost and the result
is the optimum.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.language import END, MASK, PAD, START

NEVER = (PAD, START, MASK)  # tokens that no sentence has


class Step(NamedTuple):
    """What a model says after a token."""

    logits: Float[Tensor, "B K"]  # of the next token
    attention: Float[Tensor, "B h w"] | None  # where the next token is read from
    state: Any  # tensors with leading dimension B, in tuples


class Found(NamedTuple):
    """The best sentence for each member of a batch."""

    tokens: Int[Tensor, "B T"]  # without <start>; <pad> behind <end>
    log_probability: Float[Tensor, " B"]
    attention: Float[Tensor, "B T h w"] | None  # of each token, zeros for <pad>


def select(state: Any, index: Int[Tensor, " M"]) -> Any:
    """Rows of every tensor in (named) tuples."""
    if isinstance(state, Tensor):
        return state[index]
    parts = [select(part, index) for part in state]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def beam_search(
    step: Callable[[Int[Tensor, " B"], Any], Step], state: Any, batch: int, *, beams: int = 1, max_length: int,
    length_penalty: float = 0.0,
) -> Found:  # fmt: skip
    """The best sentences found. step(token (B,), state) -> `Step`; `state` is the one before <start>, `batch` its B.

    Raises ValueError for fewer than one beam or token, or a negative penalty.
    """
    if beams < 1 or max_length < 1 or length_penalty < 0:
        raise ValueError(
            f"beams and max_length must be at least 1 and length_penalty at least 0, got {beams}, {max_length} and "
            f"{length_penalty}"
        )
    device = _device(state)
    first = torch.full((batch,), START, device=device)
    said = step(first, state)
    ones = torch.arange(batch, device=device)
    size = said.logits.shape[1]
    attention = said.attention
    # Beginnings: (B, W) of them; step 0 has one for each member.
    total = said.logits.new_zeros(batch, 1)
    tokens = first.new_zeros(batch, 1, 0)
    looks = None if attention is None else attention.new_zeros(batch, 1, 0, *attention.shape[1:])  # (B, W, t, h, w)
    best = total.new_full((batch,), -math.inf)
    found = Found(
        first.new_full((batch, max_length), PAD),
        best.clone(),
        None if attention is None else attention.new_zeros(batch, max_length, *attention.shape[1:]),
    )
    for length in range(1, max_length + 1):
        width = tokens.shape[1]
        log_p = _log_probabilities(said.logits).view(batch, width, size)
        scores, flat = (total[..., None] + log_p).flatten(1).topk(min(beams, width * size), dim=1)  # (B, W')
        origin, token = flat // size, flat % size
        rows = (ones[:, None] * width + origin).flatten()  # of the step's batch
        tokens = torch.cat([tokens[ones[:, None], origin], token[..., None]], dim=2)
        if looks is not None:
            assert said.attention is not None
            now = said.attention[rows].view(*origin.shape, 1, *said.attention.shape[1:])
            looks = torch.cat([looks[ones[:, None], origin], now], dim=2)
        # Finished sentences leave; at the last step all do.
        ended = (token == END) if length < max_length else torch.ones_like(token, dtype=torch.bool)
        worth = torch.where(ended, scores / length**length_penalty, -math.inf)
        top, place = worth.max(1)
        better = top > best
        best = torch.where(better, top, best)
        found = _replace(found, better, tokens[ones, place], scores[ones, place], _at(looks, ones, place))
        total = torch.where(ended, -math.inf, scores)
        # A sentence only gets less probable; what it may be worth at most is its log p at the greatest length.
        if bool((total.amax(1) / max_length**length_penalty <= best).all()):
            break
        said = step(token.flatten(), select(said.state, rows))
    return found


def _log_probabilities(logits: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    never = torch.tensor(NEVER, device=logits.device)
    return logits.float().index_fill(1, never, -math.inf).log_softmax(1)


def _replace(found: Found, better: Tensor, tokens: Tensor, scores: Tensor, looks: Tensor | None) -> Found:
    """`found` with better sentences, which may be shorter, where there are."""
    length = tokens.shape[1]
    kept = found.tokens.clone()
    kept[better] = PAD
    kept[better, :length] = tokens[better]
    attention = found.attention
    if attention is not None:
        assert looks is not None
        attention = attention.clone()
        attention[better] = 0
        attention[better, :length] = looks[better]
    return Found(kept, torch.where(better, scores, found.log_probability), attention)


def _at(looks: Tensor | None, ones: Tensor, place: Tensor) -> Tensor | None:
    return None if looks is None else looks[ones, place]


def _device(state: Any) -> torch.device:
    return state.device if isinstance(state, Tensor) else _device(state[0])
