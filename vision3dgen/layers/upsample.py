"""Upsampling by name: one block from `inputs` channels to `outputs` channels at `factor` times the resolution.

Every block is called `block(x, size=None, indices=None)`: maps (B, inputs, *S) -> (B, outputs, *size), with `size`
factor * S unless given, for a map whose finer twin has an odd side. Sources: Long et al. 2015, FCN (arXiv:1411.4038);
Noh et al. 2015 (arXiv:1505.04366) for unpooling; "bed of nails" is that without indices.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_choice

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_UNPOOLINGS = (F.max_unpool1d, F.max_unpool2d, F.max_unpool3d)
_LINEAR = ("linear", "bilinear", "trilinear")


def bed_of_nails(x: Float[Tensor, "B C *S"], factor: int = 2) -> Float[Tensor, "B C *S2"]:
    """Each value at the first corner of a cell of side `factor`, zeros elsewhere."""
    out = x.new_zeros(*x.shape[:2], *(factor * side for side in x.shape[2:]))
    cells: tuple[Any, ...] = (..., *(slice(None, None, factor) for _ in x.shape[2:]))
    out[cells] = x
    return out


class Upsampling(nn.Module, ABC):
    """What every upsampling offers: the call of this module's first lines, and whether it needs pooling indices."""

    needs_indices = False

    def __init__(self, inputs: int, outputs: int, factor: int = 2, *, dims: int = 2):
        super().__init__()
        check_choice("dims", dims, (1, 2, 3))
        if factor < 1:
            raise ValueError(f"factor must be at least 1, got {factor}")
        self.inputs, self.outputs, self.factor, self.dims = inputs, outputs, factor, dims

    def forward(
        self,
        x: Float[Tensor, "B C *S"],
        size: Sequence[int] | None = None,
        indices: Int[Tensor, "B C *S"] | None = None,
    ) -> Float[Tensor, "B C2 *S2"]:
        if x.ndim != self.dims + 2 or x.shape[1] != self.inputs:
            raise ValueError(f"maps must be (B, {self.inputs}) and {self.dims} axes, got {tuple(x.shape)}")
        sides = x.shape[2:]
        if size is not None and not all(
            abs(a - self.factor * b) < self.factor for a, b in zip(size, sides, strict=True)
        ):
            raise ValueError(
                f"size must be less than {self.factor} from {self.factor} times {tuple(sides)}, got {size}"
            )
        return self.upsample(x, tuple(self.factor * side for side in sides) if size is None else tuple(size), indices)

    @abstractmethod
    def upsample(self, x: Tensor, size: tuple[int, ...], indices: Tensor | None) -> Tensor:
        """Maps of the `outputs` channels and the size given."""

    def extra_repr(self) -> str:
        return f"{self.inputs}, {self.outputs}, factor={self.factor}"


class Interpolation(Upsampling):
    """Interpolate (pixel centers aligned, not corners), then a 3x3 convolution; bicubic is for two axes only."""

    def __init__(self, inputs: int, outputs: int, factor: int = 2, *, dims: int = 2, mode: str = "linear"):
        super().__init__(inputs, outputs, factor, dims=dims)
        check_choice("mode", mode, ("nearest", "linear", "cubic"))
        if mode == "cubic" and dims != 2:
            raise ValueError(f"bicubic interpolation is for 2 axes, got dims={dims}")
        self.mode = {"nearest": "nearest", "linear": _LINEAR[dims - 1], "cubic": "bicubic"}[mode]
        self.convolution = _CONVOLUTIONS[dims - 1](inputs, outputs, 3, padding=1)

    def upsample(self, x: Tensor, size: tuple[int, ...], indices: Tensor | None) -> Tensor:
        corners = None if self.mode == "nearest" else False
        return self.convolution(F.interpolate(x, size, mode=self.mode, align_corners=corners))


class BedOfNails(Upsampling):
    """`bed_of_nails`, then a 3x3 convolution."""

    def __init__(self, inputs: int, outputs: int, factor: int = 2, *, dims: int = 2):
        super().__init__(inputs, outputs, factor, dims=dims)
        self.convolution = _CONVOLUTIONS[dims - 1](inputs, outputs, 3, padding=1)

    def upsample(self, x: Tensor, size: tuple[int, ...], indices: Tensor | None) -> Tensor:
        return self.convolution(_fit(bed_of_nails(x, self.factor), size))


class MaxUnpooling(Upsampling):
    """Each value back at the place its maximum came from, zeros elsewhere, then a 3x3 convolution.

    `indices` are those of `nn.MaxPool2d(factor, return_indices=True)` on maps of `inputs` channels, `size` their size.
    """

    needs_indices = True

    def __init__(self, inputs: int, outputs: int, factor: int = 2, *, dims: int = 2):
        super().__init__(inputs, outputs, factor, dims=dims)
        self.convolution = _CONVOLUTIONS[dims - 1](inputs, outputs, 3, padding=1)

    def upsample(self, x: Tensor, size: tuple[int, ...], indices: Tensor | None) -> Tensor:
        if indices is None or indices.shape != x.shape:
            raise ValueError(
                f"max unpooling needs the pooling's indices, one for each value of the maps {tuple(x.shape)}, "
                f"got {None if indices is None else tuple(indices.shape)}"
            )
        unpool = _UNPOOLINGS[self.dims - 1]
        return self.convolution(unpool(x, indices, [self.factor] * self.dims, output_size=list(size)))


class TransposedConvolution(Upsampling):
    """A transposed convolution whose kernel covers two cells (4x4 for a factor of 2) and starts as interpolation.

    Kernel 2 f - f mod 2, stride f. The kernel starts as bilinear interpolation (FCN, section 3.3) where inputs equal
    outputs, at torch's own initialization otherwise.
    """

    def __init__(self, inputs: int, outputs: int, factor: int = 2, *, dims: int = 2):
        super().__init__(inputs, outputs, factor, dims=dims)
        kernel = 2 * factor - factor % 2
        self.convolution = _TRANSPOSED[dims - 1](inputs, outputs, kernel, factor, (kernel - factor) // 2)
        if inputs == outputs:
            initialize_interpolation(self.convolution)

    def upsample(self, x: Tensor, size: tuple[int, ...], indices: Tensor | None) -> Tensor:
        return _fit(self.convolution(x), size)


@torch.no_grad()
def initialize_interpolation(convolution: nn.Module) -> None:
    """Fill a transposed convolution between equal channels with the kernel of linear interpolation, bias zero."""
    if not isinstance(convolution, _TRANSPOSED) or convolution.in_channels != convolution.out_channels:
        raise ValueError(f"only a transposed convolution between equal channels can interpolate, got {convolution}")
    if convolution.groups != 1:
        raise ValueError(f"interpolation weights need one group, got {convolution}")
    kernel = torch.ones(())
    for side, stride in zip(convolution.kernel_size, convolution.stride):
        tent = 1 - (torch.arange(side) - (side - 1) / 2).abs() / stride
        kernel = kernel[..., None] * tent.clamp_min(0)
    convolution.weight.zero_()
    for channel in range(convolution.in_channels):
        convolution.weight[channel, channel] = kernel
    if convolution.bias is not None:
        convolution.bias.zero_()


def _fit(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Cut or pad with zeros at the ends of the axes."""
    padding = [amount for side, want in zip(x.shape[:1:-1], size[::-1]) for amount in (0, want - side)]
    return F.pad(x, padding) if any(padding) else x


UPSAMPLINGS: Mapping[str, Callable[..., Upsampling]] = {
    "bed_of_nails": BedOfNails,
    "nearest": partial(Interpolation, mode="nearest"),
    "bilinear": partial(Interpolation, mode="linear"),
    "bicubic": partial(Interpolation, mode="cubic"),
    "max_unpooling": MaxUnpooling,
    "transposed": TransposedConvolution,
}


def upsampling(name: str, inputs: int, outputs: int, factor: int = 2, *, dims: int = 2) -> Upsampling:
    """The named block from (B, inputs, *S) to (B, outputs, *(factor * S)); an unknown name is a ValueError."""
    check_choice("upsampling", name, UPSAMPLINGS)
    return UPSAMPLINGS[name](inputs, outputs, factor, dims=dims)
