"""Several models whose probabilities are averaged."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.engine.checkpoint import load_weights


def softmax(logits: Float[Tensor, "B *K"]) -> Float[Tensor, "B *K"]:
    """Probabilities over dimension 1, that of classes."""
    return logits.softmax(1)


class Ensemble(nn.Module):
    """The mean of the members' probabilities, as in a mixture: its negative log-likelihood is never above the members'.

    `probabilities` maps what a member's `forward` returns to probabilities; by default it is softmax over dimension 1.
    Members are kept in evaluation mode: an ensemble predicts, it is not trained.
    Source: Lakshminarayanan et al. 2017 (independent members), Huang et al. 2017 (snapshots of one run).
    """

    def __init__(self, models: Sequence[nn.Module], probabilities: Callable[[Any], Tensor] = softmax):
        super().__init__()
        if not models:
            raise ValueError("an ensemble needs at least one model")
        self.models = nn.ModuleList(models).eval().requires_grad_(False)
        self.probabilities = probabilities

    @classmethod
    def load(
        cls, model: nn.Module, checkpoints: Sequence[Path], probabilities: Callable[[Any], Tensor] = softmax
    ) -> "Ensemble":
        """One copy of `model` for each checkpoint folder, such as `snapshots(run_dir)` or the best of several runs."""
        members = [copy.deepcopy(model) for _ in checkpoints]
        for member, folder in zip(members, checkpoints):
            load_weights(member, folder)
        return cls(members, probabilities)

    def members(self, inputs: Any) -> Float[Tensor, "M B *K"]:
        """The probabilities of each member, for scoring the ensemble against them."""
        return torch.stack([self.probabilities(model(inputs)) for model in self.models])

    def forward(self, inputs: Any) -> Float[Tensor, "B *K"]:
        """The mean probabilities."""
        return self.members(inputs).mean(0)

    def train(self, mode: bool = True) -> "Ensemble":
        """Remembers the mode, as every module does; the members stay in evaluation mode."""
        self.training = mode
        return self
