"""A masked language model: words left out of a sentence are guessed from all the others."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.language import PAD
from vision3dgen.layers import LearnedPositions, TransformerBlock
from vision3dgen.metrics import Guesses


class MaskedLanguageModel(nn.Module):
    """A transformer encoder over words; input and output words share a table.

    max_length: words there are positions for; longer input is a ValueError.
    Source: Devlin et al. 2019, BERT (arXiv:1810.04805). Differs: pre-normalization; one sentence, no task of its next.
    """

    parts = ("model",)

    def __init__(
        self, vocabulary_size: int, *, width: int = 128, heads: int = 4, layers: int = 2, max_length: int = 32,
        dropout: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.vocabulary_size = vocabulary_size
        self.embedding = nn.Embedding(vocabulary_size, width)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.positions = LearnedPositions(max_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, dropout=dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary_size))

    def forward(self, tokens: Int[Tensor, "B T"]) -> Tensor:
        """Logits (B, T, K) of the word at each place; padding is not looked at."""
        x = self.dropout(self.positions(self.embedding(tokens)))
        seen = (tokens != PAD)[:, None]  # (B, 1, T)
        for block in self.blocks:
            x = block(x, seen)
        return self.norm(x) @ self.embedding.weight.T + self.bias

    def loss(self, batch: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Mean over the words left out of -log p(word)."""
        nats, known, _ = self._nats(batch)
        return {"loss": nats.sum() / known.sum()}

    @torch.no_grad()
    def validation_metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): mean nats per word left out, and the share of them that is guessed."""
        nats, known, right = self._nats(batch)
        count = known.sum(1)
        return {"loss": nats.sum(1) / count, "accuracy": right.sum(1) / count}

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> Guesses:
        """Sums over the words left out of each sentence, for the perplexity of a text."""
        nats, known, right = self._nats(batch)
        return Guesses(nats.sum(1), known.sum(1), right.sum(1))

    def _nats(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """(B, T): -log p of the word left out, whether there is one, whether the most probable word is it."""
        targets = batch["targets"]
        largest = int(batch["tokens"].max())
        if largest >= self.vocabulary_size:
            raise ValueError(f"the model knows {self.vocabulary_size} words, the data has a word number {largest}")
        logits = self(batch["masked"]).float()
        nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="none")
        known = targets != PAD
        return nats, known, (logits.argmax(2) == targets) & known
