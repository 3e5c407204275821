"""From a backbone's maps back to one map of the picture's size: the decoder of heads that predict pictures."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.layers import Upsampling, upsampling


class SkipDecoder(nn.Module):
    """Maps (B, C_i, H_i, W_i), fine to coarse, to (B, width, H, W): up from the coarsest, each finer one joined.

    channels, strides: the backbone's; each stride a multiple of the one before. A level has half the channels of its
    map, but at least `width`. name: of `layers.UPSAMPLINGS`. "max_unpooling" puts each value where the map it joins is
    largest in its cell (Badrinarayanan et al. 2017, SegNet, arXiv:1511.00561), so it needs strides 1, 2, 4 ...
    Source: U-Net (Ronneberger et al. 2015, arXiv:1505.04597). Differs: batch normalization, padded convolutions, and
    one convolution after each join.
    """

    def __init__(self, channels: Sequence[int], strides: Sequence[int], *, width: int = 32, name: str = "bilinear"):
        super().__init__()
        if len(channels) != len(strides) or not channels:
            raise ValueError(f"channels and strides must be one each for every map, got {channels} and {strides}")
        steps = [*strides[:1], *(b // a for a, b in pairwise(strides))]
        if any(b % a for a, b in pairwise(strides)) or min(steps) < 1:
            raise ValueError(f"each stride must be a multiple of the one before, got {list(strides)}")
        outputs = [max(width, count // 2) for count in channels[:-1]]
        self.rises = nn.ModuleList()
        self.joins = nn.ModuleList()
        inputs = channels[-1]
        for own, skipped, step in zip(outputs[::-1], channels[-2::-1], steps[:0:-1]):
            self.rises.append(_rise(inputs, own, step, name, skipped))
            self.joins.append(_convolution(own + skipped, own, 3))
            inputs = own
        self.rises.append(_rise(inputs, width, steps[0], name, 0))
        self.joins.append(_convolution(width, width, 3))

    def forward(self, features: list[Tensor], size: tuple[int, int]) -> Float[Tensor, "B C H W"]:
        x = features[-1]
        for rise, join, skipped in zip(self.rises, self.joins, [*features[-2::-1], None]):
            x = rise(x, size if skipped is None else tuple(skipped.shape[-2:]), skipped)
            x = join(x if skipped is None else torch.cat([x, skipped], dim=1))
        return x


def _rise(inputs: int, outputs: int, factor: int, name: str, skipped: int) -> nn.Module:
    if name != "max_unpooling" or factor == 1:
        return _Rise(inputs, outputs, factor, name)
    if factor != 2 or not skipped:
        raise ValueError(
            "upsampling 'max_unpooling' needs a map at every scale from the picture's on, strides 1, 2, 4 ..., such as "
            f"those of a backbone with a small stem; here one step is by {factor}"
        )
    return _Unpool(inputs, outputs, skipped)


class _Unpool(nn.Module):
    """Max unpooling by 2, at the places of the maxima of the finer map."""

    def __init__(self, inputs: int, outputs: int, skipped: int):
        super().__init__()
        self.match = nn.Conv2d(inputs, skipped, 1)
        self.block = upsampling("max_unpooling", skipped, outputs, 2)
        self.after = nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(
        self, x: Float[Tensor, "B C H W"], size: tuple[int, int], skipped: Float[Tensor, "B C2 H2 W2"]
    ) -> Float[Tensor, "B C3 H2 W2"]:
        indices = F.max_pool2d(skipped, 2, ceil_mode=True, return_indices=True)[1]
        return self.after(self.block(self.match(x), size, indices))


class _Rise(nn.Module):
    """Upsampling by `factor`, one block for each of its prime factors, the largest first; a 1x1 convolution for 1."""

    def __init__(self, inputs: int, outputs: int, factor: int, name: str):
        super().__init__()
        self.factors = _primes(factor)
        blocks: list[nn.Module] = []
        for prime in self.factors:
            block = upsampling(name, inputs, outputs, prime)
            blocks.append(nn.ModuleList([block, nn.Sequential(nn.BatchNorm2d(outputs), nn.ReLU())]))
            inputs = outputs
        self.blocks = nn.ModuleList(blocks)
        self.level = None if self.factors else _convolution(inputs, outputs, 1)

    def forward(
        self, x: Float[Tensor, "B C H W"], size: tuple[int, int], skipped: Tensor | None = None
    ) -> Float[Tensor, "B C2 H2 W2"]:
        if self.level is not None:
            return _resized(self.level(x), size)
        left = 1
        for prime in self.factors:
            left *= prime
        for pair in self.blocks:
            assert isinstance(pair, nn.ModuleList)
            block, after = pair
            assert isinstance(block, Upsampling)
            left //= block.factor
            wanted = [-(-side // left) for side in size]
            # a block gives less than a cell more or less than its factor times the map; a backbone may lose more
            near = [
                min(max(want, block.factor * side - block.factor + 1), block.factor * side + block.factor - 1)
                for want, side in zip(wanted, x.shape[-2:])
            ]
            x = after(block(x, near))
        return _resized(x, size)


def _resized(x: Float[Tensor, "B C H W"], size: tuple[int, int]) -> Float[Tensor, "B C H2 W2"]:
    return x if x.shape[-2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def _primes(number: int) -> list[int]:
    """Prime factors, the largest first."""
    found, divisor = [], 2
    while number > 1:
        while number % divisor == 0:
            found.append(divisor)
            number //= divisor
        divisor += 1
    return found[::-1]
