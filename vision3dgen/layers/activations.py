"""Activations by name: torch's, and the two it does not have."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.checks import check_choice


class Maxout(nn.Module):
    """The largest of `pieces` affine functions per output feature: x (..., inputs) -> (..., outputs).

    Source: Goodfellow et al. 2013 (arXiv:1302.4389), section 3; the pieces of an output are neighbors in `linear`.
    """

    def __init__(self, inputs: int, outputs: int, pieces: int = 2):
        super().__init__()
        if pieces < 1:
            raise ValueError(f"pieces must be at least 1, got {pieces}")
        self.pieces = pieces
        self.linear = nn.Linear(inputs, outputs * pieces)

    def forward(self, x: Float[Tensor, "*B C"]) -> Float[Tensor, "*B C2"]:
        return self.linear(x).unflatten(-1, (-1, self.pieces)).amax(-1)  # (..., outputs, pieces)


def gated_tanh(x: Tensor, dim: int = 1) -> Tensor:
    """tanh of the first half of an axis times the sigmoid of the second: 2C channels in, C out.

    Source: van den Oord et al. 2016, Conditional PixelCNN (arXiv:1606.05328), equation 2.
    """
    if x.shape[dim] % 2:
        raise ValueError(
            f"a gate needs an even number of channels, got {x.shape[dim]} on axis {dim} of {tuple(x.shape)}"
        )
    signal, gate = x.chunk(2, dim)
    return signal.tanh() * gate.sigmoid()


class GatedTanh(nn.Module):
    """`gated_tanh` over the axis `dim` as a module."""

    def __init__(self, dim: int = 1):
        super().__init__()
        self.dim = dim

    def forward(self, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        return gated_tanh(x, self.dim)

    def extra_repr(self) -> str:
        return f"dim={self.dim}"


class GatedConvolution(nn.Module):
    """A convolution to 2C channels, halved by its own gate: tanh(W_f x + V_f h) * sigmoid(W_g x + V_g h).

    `convolution` is any built module (masked, dilated, 1D to 3D) with 2C output channels; `condition` (B, K) or
    (B, K, *S), with `condition_channels` = K, is the h, mapped without a bias.
    Source: van den Oord et al. 2016 (arXiv:1606.05328), equations 2, 4 and 5.
    """

    def __init__(self, convolution: nn.Module, outputs: int, condition_channels: int | None = None):
        super().__init__()
        self.convolution = convolution
        self.condition = None if condition_channels is None else nn.Linear(condition_channels, 2 * outputs, bias=False)

    def forward(
        self, x: Float[Tensor, "B C *S"], condition: Float[Tensor, "B K *_"] | None = None
    ) -> Float[Tensor, "B C2 *S2"]:
        if (condition is None) != (self.condition is None):
            raise ValueError(
                "a gated convolution takes a condition if and only if it was built with condition_channels, got "
                f"condition_channels={None if self.condition is None else self.condition.in_features} and "
                f"condition={None if condition is None else tuple(condition.shape)}"
            )
        x = self.convolution(x)
        if condition is not None and self.condition is not None:
            bias = self.condition(condition.movedim(1, -1)).movedim(-1, 1)
            x = x + bias.reshape(bias.shape + (1,) * (x.ndim - bias.ndim))
        return gated_tanh(x)


ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "leaky_relu": nn.LeakyReLU,
    "prelu": nn.PReLU,
    "elu": nn.ELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "glu": nn.GLU,  # these two halve the channels
    "gated_tanh": GatedTanh,
    "maxout": Maxout,  # has weights of its own and takes (inputs, outputs)
    "identity": nn.Identity,
}


def activation(name: str) -> nn.Module:
    """A new module of the named activation with torch's own settings; an unknown name is a ValueError."""
    check_choice("activation", name, [key for key in ACTIVATIONS if key != "maxout"])
    return ACTIVATIONS[name]()
