"""Sequence decoders: maps of an image in, the next word out.

Each reads one of the backbone's maps (`level`, the coarsest by default). `forward` is teacher forcing, all words at
once; `start` and `step` go word by word and give the same logits. Where a decoder attends, it says to which places of
the map; these weights sum to 1 for each word.
Letters: T words, K words of the vocabulary, N = h w places of the map, D width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.language import PAD, SPECIALS
from vision3dgen.layers import LearnedPositions, LSTMCell, LSTMState, TransformerDecoderBlock, sinusoidal_positions
from vision3dgen.layers.recurrent import GRUCell, RNNCell
from vision3dgen.models.search import Step

CELLS: dict[str, type[nn.Module]] = {"rnn": RNNCell, "lstm": LSTMCell, "gru": GRUCell}


class Decoded(NamedTuple):
    logits: Float[Tensor, "B T K"]  # of the word after each
    attention: Float[Tensor, "B T h w"] | None  # with which that word was read from the map


class SequenceDecoder(nn.Module, ABC):
    """Maps (B, C_i, H_i, W_i), fine to coarse, and the words so far to logits of the next word."""

    def __init__(self, channels: list[int], vocabulary_size: int, level: int):
        super().__init__()
        if not -len(channels) <= level < len(channels):
            raise ValueError(f"level must be one of the backbone's {len(channels)} maps, got {level}")
        if vocabulary_size <= len(SPECIALS):
            raise ValueError(f"vocabulary_size must be over {len(SPECIALS)}, the special tokens, got {vocabulary_size}")
        self.vocabulary_size, self.level = vocabulary_size, level
        self.in_channels = channels[level]

    def forward(self, features: list[Tensor], tokens: Int[Tensor, "B T"]) -> Decoded:
        """Logits of the next word after each of the tokens, the first of which is <start>."""
        state = self.start(features)
        steps = []
        for token in tokens.unbind(1):
            steps.append(self.step(token, state))
            state = steps[-1].state
        looks = [step.attention for step in steps if step.attention is not None]
        return Decoded(torch.stack([step.logits for step in steps], 1), torch.stack(looks, 1) if looks else None)

    @abstractmethod
    def start(self, features: list[Tensor]) -> Any:
        """The state before <start>."""

    @abstractmethod
    def step(self, token: Int[Tensor, " B"], state: Any) -> Step:
        """Logits of the next word, the attention it is read with, and the state after `token`."""


# ------------------------------------------------------------------------------------------------- without attention


class RecurrentDecoder(SequenceDecoder):
    """A recurrent cell whose first state is read from the image: CNN + RNN, CNN + LSTM, CNN + GRU.

    The map, after a linear layer and ReLU, is averaged over its places; a linear layer with tanh makes the first state
    of it. Source: Karpathy & Fei-Fei 2015 (arXiv:1412.2306) and Vinyals et al. 2015 (arXiv:1411.4555).
    Differs: the image enters as the first state, as in Xu et al. 2015, not as a word; sinusoidal positions are added to
    the places before the average, which would forget where things are.
    """

    def __init__(
        self, channels: list[int], vocabulary_size: int, *, cell: Literal["rnn", "lstm", "gru"] = "lstm",
        hidden: int = 256, embedding: int = 128, dropout: float = 0.0, level: int = -1,
    ):  # fmt: skip
        super().__init__(channels, vocabulary_size, level)
        self.annotate = Annotations(self.in_channels, hidden)
        self.embedding = nn.Embedding(vocabulary_size, embedding, padding_idx=PAD)
        self.cell = CELLS[cell](embedding, hidden)
        self.starts = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(2 if cell == "lstm" else 1))
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(hidden, vocabulary_size)

    def start(self, features: list[Tensor]) -> Any:
        code = self.annotate(features[self.level]).relu().mean(1)  # (B, hidden)
        first = [start(code).tanh() for start in self.starts]
        return LSTMState(*first) if len(first) == 2 else first[0]

    def step(self, token: Int[Tensor, " B"], state: Any) -> Step:
        state = self.cell(self.dropout(self.embedding(token)), state)
        hidden = state.hidden if isinstance(state, LSTMState) else state
        return Step(self.output(self.dropout(hidden)), None, state)


# --------------------------------------------------------------------------------------------------- soft attention


class Annotations(nn.Module):
    """A map (B, C, h, w) as places (B, h w, D): a linear layer, normalized, plus sinusoidal positions of row and
    column."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        if width % 4:
            raise ValueError(f"width must be a multiple of 4, for positions of rows and columns, got {width}")
        self.width = width
        self.linear = nn.Linear(channels, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "B C h w"]) -> Float[Tensor, "B N D"]:
        positions = sinusoidal_positions(tuple(x.shape[2:]), self.width).to(x)  # (h, w, D)
        return self.norm(self.linear(x.flatten(2).transpose(1, 2))) + positions.flatten(0, 1)


class _Looking(NamedTuple):
    """State of `AttentionDecoder`."""

    places: Float[Tensor, "B N D"]
    keys: Float[Tensor, "B N D"]  # their part of the scores, which does not change from word to word
    shape: Float[Tensor, "B h w"]  # says how places lie in the map
    context: Float[Tensor, "B D"]  # what was seen last
    lstm: LSTMState


class AttentionDecoder(SequenceDecoder):
    """An LSTM that looks at the map for each word.

        e_i = v · tanh(W a_i + U h),   α = softmax(e),   z = sigmoid(B h) Σ_i α_i a_i
        h, c = LSTM([E y, z], h, c),   p(next) ∝ exp(L (E y + L_h h + L_z z))

    with y the word before. look: "before" the LSTM reads y, with the old h, as in Xu et al. 2015, Show, attend and tell
    (arXiv:1502.03044), soft attention, equations 4 to 7 and section 4.2; or "after", with the new h, as in Lu et al.
    2017 (arXiv:1612.01887), section 2.1, the LSTM being fed what was seen last. Only "after" does the look for a word
    know the word before it: which of two objects "red" has just named.
    Differs: sinusoidal positions are added to the annotations a_i, which are normalized; the gate is one number per
    channel, Xu's is one per image.
    """

    def __init__(
        self, channels: list[int], vocabulary_size: int, *, hidden: int = 256, embedding: int = 128, width: int = 128,
        look: Literal["before", "after"] = "before", dropout: float = 0.0, level: int = -1,
    ):  # fmt: skip
        super().__init__(channels, vocabulary_size, level)
        self.look = look
        self.annotate = Annotations(self.in_channels, width)
        self.embedding = nn.Embedding(vocabulary_size, embedding, padding_idx=PAD)
        self.start_hidden, self.start_cell = nn.Linear(width, hidden), nn.Linear(width, hidden)
        self.key = nn.Linear(width, width)
        self.query = nn.Linear(hidden, width, bias=False)
        self.score = nn.Linear(width, 1, bias=False)
        self.gate = nn.Linear(hidden, width)
        self.cell = LSTMCell(embedding + width, hidden)
        self.from_hidden, self.from_context = nn.Linear(hidden, embedding), nn.Linear(width, embedding)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(embedding, vocabulary_size)

    def start(self, features: list[Tensor]) -> _Looking:
        image = features[self.level]
        places = self.annotate(image)
        mean = places.mean(1)
        lstm = LSTMState(self.start_hidden(mean).tanh(), self.start_cell(mean).tanh())
        return _Looking(places, self.key(places), image.detach()[:, 0], mean, lstm)

    def step(self, token: Int[Tensor, " B"], state: Any) -> Step:
        word = self.embedding(token)
        if self.look == "before":
            context, weights = self._see(state, state.lstm.hidden)
            lstm = self.cell(torch.cat([self.dropout(word), context], 1), state.lstm)
        else:
            lstm = self.cell(torch.cat([self.dropout(word), state.context], 1), state.lstm)
            context, weights = self._see(state, lstm.hidden)
        summed = word + self.from_hidden(self.dropout(lstm.hidden)) + self.from_context(context)
        state = state._replace(context=context, lstm=lstm)
        return Step(self.output(summed), weights.view(state.shape.shape), state)

    def _see(self, state: _Looking, hidden: Float[Tensor, "B H"]) -> tuple[Float[Tensor, "B D"], Float[Tensor, "B N"]]:
        """What is seen from a state of the LSTM, and the weights it is seen with."""
        scores = self.score((state.keys + self.query(hidden)[:, None]).tanh())[..., 0]
        weights = scores.softmax(1)
        return self.gate(hidden).sigmoid() * (weights[..., None] * state.places).sum(1), weights


# ------------------------------------------------------------------------------------------------------ transformer


class _Read(NamedTuple):
    """State of `TransformerDecoder`."""

    memory: Float[Tensor, "B N D"]
    shape: Float[Tensor, "B h w"]
    tokens: Int[Tensor, "B t"]  # so far


class TransformerDecoder(SequenceDecoder):
    """Blocks of causal self-attention and attention to the places of the map; input and output words share a table.

    max_length: words there are positions for; longer input is a ValueError. The attention told is the mean over the
    heads of the last block. Source: Vaswani et al. 2017 (arXiv:1706.03762), with pre-normalization.
    Names of parameters are those of `MaskedLanguageModel`, where both have them, so that its weights can be loaded.
    Differs: step by step, the words so far are read again; captions are too short for a cache to matter.
    """

    def __init__(
        self, channels: list[int], vocabulary_size: int, *, width: int = 128, heads: int = 4, layers: int = 2,
        max_length: int = 32, dropout: float = 0.0, level: int = -1,
    ):  # fmt: skip
        super().__init__(channels, vocabulary_size, level)
        if layers < 1:
            raise ValueError(f"layers must be at least 1, got {layers}")
        self.annotate = Annotations(self.in_channels, width)
        self.embedding = nn.Embedding(vocabulary_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = LearnedPositions(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerDecoderBlock(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, features: list[Tensor], tokens: Int[Tensor, "B T"]) -> Decoded:
        image = features[self.level]
        return self._decode(self.annotate(image), tuple(image.shape[2:]), tokens)

    def _decode(self, memory: Tensor, shape: tuple[int, ...], tokens: Tensor) -> Decoded:
        x = self.dropout(self.positions(self.embedding(tokens)))  # (B, T, D)
        for block in self.blocks[:-1]:
            x = block(x, memory)
        last = self.blocks[-1]
        assert isinstance(last, TransformerDecoderBlock)
        weights = last.memory_weights(x, memory).mean(1)  # (B, T, N)
        x = self.norm(last(x, memory))
        logits = x @ self.embedding.weight.T + self.bias
        return Decoded(logits, weights.unflatten(2, shape))

    def start(self, features: list[Tensor]) -> _Read:
        image = features[self.level]
        none = torch.zeros(len(image), 0, dtype=torch.int64, device=image.device)
        return _Read(self.annotate(image), image.detach()[:, 0], none)

    def step(self, token: Int[Tensor, " B"], state: Any) -> Step:
        tokens = torch.cat([state.tokens, token[:, None]], 1)
        decoded = self._decode(state.memory, tuple(state.shape.shape[1:]), tokens)
        assert decoded.attention is not None
        return Step(decoded.logits[:, -1], decoded.attention[:, -1], state._replace(tokens=tokens))


DECODERS: dict[str, Callable[..., SequenceDecoder]] = {
    "recurrent": RecurrentDecoder,
    "attention": AttentionDecoder,
    "transformer": TransformerDecoder,
}
