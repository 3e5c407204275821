"""Initialization of linear and convolution layers by name; what a paper asks for beyond that stands in its model.

    name              weight                               keeps
    small_random      N(0, 0.01^2)                         nothing: a deep network's signal vanishes
    xavier_normal     N(0, 2 / (in + out))                 variances, forward and backward, of linear or tanh layers
    xavier_uniform    the same variance, uniform
    kaiming_normal    N(0, 2 / in)                         the forward variance of ReLU layers
    kaiming_uniform   the same variance, uniform
    kaiming_fan_out   N(0, 2 / out)                        the backward variance of ReLU layers (ResNet)
    lecun_normal      N(0, 1 / in)                         mean 0 and variance 1 of SELU layers
    orthogonal        rows or columns orthonormal          norms of linear layers
    dcgan             N(0, 0.02^2)
    truncated_normal  N(0, 0.02^2) cut at two deviations   (BERT, ViT)

Sources: Glorot & Bengio 2010, equation 16; He et al. 2015 (arXiv:1502.01852), equations 10 and 14; Klambauer et al.
2017 (arXiv:1706.02515); Saxe et al. 2014 (arXiv:1312.6120); Radford et al. 2016 (arXiv:1511.06434).
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from vision3dgen.checks import check_choice


class Fans(NamedTuple):
    """How many values meet in a weight, which scales its first value."""

    inputs: float  # values that are summed into one output
    outputs: float  # outputs that one value takes part in


Draw = Callable[[Tensor, Fans, torch.Generator | None], Tensor]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def fans(layer: nn.Module) -> Fans:
    """How many values a linear, convolution or transposed convolution layer sums, and each value takes part in.

    Differs: torch's rule for weights gives transposed convolutions the two numbers exchanged and ignores strides; here
    a stride of s divides the inputs of a transposed convolution, and the outputs of a convolution, by s per axis.
    """
    if isinstance(layer, nn.Linear):
        return Fans(layer.in_features, layer.out_features)
    if not isinstance(layer, _CONVOLUTIONS + _TRANSPOSED):
        raise ValueError(f"only linear and convolution layers have fans, got {type(layer).__name__}")
    taps, stride = math.prod(layer.kernel_size), math.prod(layer.stride)
    inputs, outputs = layer.in_channels // layer.groups * taps, layer.out_channels // layer.groups * taps
    return Fans(inputs / stride, outputs) if isinstance(layer, _TRANSPOSED) else Fans(inputs, outputs / stride)


def _normal(variance: Callable[[Fans], float]) -> Draw:
    return lambda weight, fan, generator: nn.init.normal_(weight, 0.0, math.sqrt(variance(fan)), generator=generator)


def _uniform(variance: Callable[[Fans], float]) -> Draw:
    def draw(weight: Tensor, fan: Fans, generator: torch.Generator | None) -> Tensor:
        bound = math.sqrt(3 * variance(fan))
        return nn.init.uniform_(weight, -bound, bound, generator=generator)

    return draw


def _truncated(weight: Tensor, fan: Fans, generator: torch.Generator | None) -> Tensor:
    return nn.init.trunc_normal_(weight, std=0.02, a=-0.04, b=0.04, generator=generator)


def _orthogonal(weight: Tensor, fan: Fans, generator: torch.Generator | None) -> Tensor:
    return nn.init.orthogonal_(weight, generator=generator)


INITIALIZATIONS: Mapping[str, Draw] = {
    "small_random": _normal(lambda fan: 0.01**2),
    "xavier_normal": _normal(lambda fan: 2 / (fan.inputs + fan.outputs)),
    "xavier_uniform": _uniform(lambda fan: 2 / (fan.inputs + fan.outputs)),
    "kaiming_normal": _normal(lambda fan: 2 / fan.inputs),
    "kaiming_uniform": _uniform(lambda fan: 2 / fan.inputs),
    "kaiming_fan_out": _normal(lambda fan: 2 / fan.outputs),
    "lecun_normal": _normal(lambda fan: 1 / fan.inputs),
    "orthogonal": _orthogonal,
    "dcgan": _normal(lambda fan: 0.02**2),
    "truncated_normal": _truncated,
}


@torch.no_grad()
def initialize(network: nn.Module, name: str, *, generator: torch.Generator | None = None) -> nn.Module:
    """Draw the weights of every linear and convolution layer of `network` by the named rule; biases become zero.

    Norms, embeddings, recurrent and packed attention matrices keep what they have. A spectral norm's original weight is
    drawn. With a generator the result is the same on every device. Returns the network; one without such a layer, and
    an unknown name, are ValueErrors.
    """
    check_choice("initialization", name, INITIALIZATIONS)
    layers = {
        path: layer for path, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.modules.conv._ConvNd)
    }
    if not layers:
        raise ValueError(f"{type(network).__name__} has no linear or convolution layer to initialize")
    for path, layer in layers.items():
        weight = _trained_weight(layer, path)
        drawn = torch.empty(weight.shape, device="cpu" if generator is None else generator.device)
        weight.copy_(INITIALIZATIONS[name](drawn, fans(layer), generator))
        if layer.bias is not None:
            layer.bias.zero_()
    return network


def _trained_weight(layer: nn.Module, path: str) -> Tensor:
    if not parametrize.is_parametrized(layer, "weight"):
        assert isinstance(layer.weight, Tensor)
        return layer.weight
    original = getattr(layer.parametrizations["weight"], "original", None)  # type: ignore[index]
    if original is None:
        raise ValueError(f"{path}: a weight made of several parts (weight norm) cannot be drawn: initialize first")
    return original
