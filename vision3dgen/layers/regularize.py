"""Layers that are random in training and the identity, or fixed, in evaluation."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.checks import check_choice


class StochasticDepth(nn.Module):
    """Zeroes a residual branch with `probability` and divides it by 1 - probability otherwise; for training only.

    mode "row" draws for each sample, "batch" once for all. Source: Huang et al. 2016 (arXiv:1603.09382).
    Differs: the paper scales in evaluation; dividing in training makes evaluation the identity, as everywhere today.
    """

    def __init__(self, probability: float, mode: str = "row"):
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"probability must be in [0, 1), got {probability}")
        check_choice("mode", mode, ("row", "batch"))
        self.probability, self.mode = probability, mode

    def forward(self, x: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Float[Tensor, "B *S"]:
        if not self.training or self.probability == 0:
            return x
        count = len(x) if self.mode == "row" else 1
        keep = torch.rand((count,) + (1,) * (x.ndim - 1), generator=generator, device=x.device) >= self.probability
        return torch.where(keep, x / (1 - self.probability), 0.0)

    def extra_repr(self) -> str:
        return f"{self.probability}, mode={self.mode!r}"
