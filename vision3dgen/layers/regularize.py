"""Random layers by name: torch's dropouts and fractional pooling, stochastic depth, dropped blocks.

torch's draw from the global random state; ours take a `generator`. All are the identity in evaluation except fractional
pooling, which torch draws anew in evaluation too (Graham 2014 averages several of them).
"""

from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice


class StochasticDepth(nn.Module):
    """Zeroes a residual branch with `probability` and divides it by 1 - probability otherwise; for training only.

    mode "row" draws for each sample, "batch" once for all. Source: Huang et al. 2016 (arXiv:1603.09382).
    Differs: the paper scales in evaluation; dividing in training makes evaluation the identity, as everywhere today.
    """

    def __init__(self, probability: float, mode: str = "row"):
        super().__init__()
        _check_probability(probability)
        check_choice("mode", mode, ("row", "batch"))
        self.probability, self.mode = probability, mode

    def forward(self, x: Float[Tensor, "B *S"], generator: torch.Generator | None = None) -> Float[Tensor, "B *S"]:
        if not self.training or self.probability == 0:
            return x
        shape = (len(x) if self.mode == "row" else 1,) + (1,) * (x.ndim - 1)
        keep = torch.rand(shape, generator=generator, device=x.device) >= self.probability
        return torch.where(keep, x / (1 - self.probability), 0.0)

    def extra_repr(self) -> str:
        return f"{self.probability}, mode={self.mode!r}"


class DropBlock(nn.Module):
    """Zeroes cubes of side `size` (odd) in maps (B, C, *S), about a share `probability` of all values.

    Each channel is drawn alone. The rest is multiplied by what keeps the number of values the same. On maps smaller
    than a block, blocks have the map's odd side. Source: Ghiasi et al. 2018 (arXiv:1810.12890), algorithm 1.
    """

    def __init__(self, probability: float, size: int = 7):
        super().__init__()
        _check_probability(probability)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and at least 1, got {size}")
        self.probability, self.size = probability, size

    def forward(self, x: Float[Tensor, "B C *S"], generator: torch.Generator | None = None) -> Float[Tensor, "B C *S"]:
        if not self.training or self.probability == 0:
            return x
        sides = x.shape[2:]
        size = min(self.size, *(side - 1 + side % 2 for side in sides))
        inner = [side - size + 1 for side in sides]  # centers whose block fits
        rate = self.probability
        for side, count in zip(sides, inner):
            rate *= side / (size * count)
        centers = torch.rand(*x.shape[:2], *inner, generator=generator, device=x.device) < rate
        padded = F.pad(centers.float(), [size // 2] * (2 * len(sides)))  # (B, C, *S)
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(sides) - 1]
        keep = pool(padded, size, 1, size // 2) == 0
        return torch.where(keep, x * (keep.numel() / keep.sum().clamp_min(1)), 0.0)

    def extra_repr(self) -> str:
        return f"{self.probability}, size={self.size}"


def _check_probability(probability: float) -> None:
    if not 0 <= probability < 1:
        raise ValueError(f"probability must be in [0, 1), got {probability}")


REGULARIZERS: Mapping[str, Callable[..., nn.Module]] = {
    "dropout": nn.Dropout,
    "dropout1d": nn.Dropout1d,  # whole channels
    "dropout2d": nn.Dropout2d,
    "dropout3d": nn.Dropout3d,
    "alpha_dropout": nn.AlphaDropout,  # keeps the moments that SELU needs
    "stochastic_depth": StochasticDepth,
    "drop_block": DropBlock,
    "fractional_max_pool2d": nn.FractionalMaxPool2d,  # Graham 2014 (arXiv:1412.6071)
    "fractional_max_pool3d": nn.FractionalMaxPool3d,
}
