"""Normalizations by name: torch's, and those it does not have.

Batch normalization cannot be trained on one value per channel (a batch of one vector, or of one 1x1 map): the variance
is zero, and torch raises a ValueError; so do the conditional ones here, saying what to do. A batch of one larger map is
normalized over its places, which is instance normalization whatever the name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

from vision3dgen.checks import check_choice

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_WEIGHTED = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Embedding
)  # fmt: skip


def _check_statistics(norm: nn.modules.batchnorm._BatchNorm, x: Tensor) -> None:
    if norm.training and x.numel() <= x.shape[1]:
        raise ValueError(
            f"batch normalization needs more than one value per channel in training, got {tuple(x.shape)}: use a batch "
            "of two or more (drop_last=True), eval(), or a norm that does not look at the batch"
        )


class ConditionalBatchNorm1d(nn.Module):
    """Batch normalization over points whose scale and shift are linear functions of a code.

    x (B, C, N), code (B, K, 1) -> (B, C, N): gamma(code) * batchnorm(x) + beta(code). gamma starts at 1, beta at 0.
    Training on a single value per channel is a ValueError.
    Source: de Vries et al. 2017; parameter names and initialization of Occupancy Networks (Mescheder et al. 2019).
    """

    def __init__(self, code_channels: int, channels: int):
        super().__init__()
        self.conv_gamma = nn.Conv1d(code_channels, channels, 1)
        self.conv_beta = nn.Conv1d(code_channels, channels, 1)
        self.bn = nn.BatchNorm1d(channels, affine=False)
        for layer, start in ((self.conv_gamma, 1.0), (self.conv_beta, 0.0)):
            nn.init.zeros_(layer.weight)
            assert layer.bias is not None
            nn.init.constant_(layer.bias, start)

    def forward(self, x: Float[Tensor, "B C N"], code: Float[Tensor, "B K 1"]) -> Float[Tensor, "B C N"]:
        _check_statistics(self.bn, x)
        return self.conv_gamma(code) * self.bn(x) + self.conv_beta(code)


class ConditionalBatchNorm2d(nn.Module):
    """Batch normalization of maps with a scale and a shift for each class: the generators of conditional GANs.

    x (B, C, H, W), labels (B,): gamma[label] * batchnorm(x) + beta[label]. gamma starts at 1, beta at 0.
    Training on a single value per channel is a ValueError.
    Source: Dumoulin et al. 2017 (arXiv:1610.07629), equation 5; Miyato & Koyama 2018 (arXiv:1802.05637).
    """

    def __init__(self, classes: int, channels: int):
        super().__init__()
        self.gamma = nn.Embedding(classes, channels)
        self.beta = nn.Embedding(classes, channels)
        self.bn = nn.BatchNorm2d(channels, affine=False)
        nn.init.ones_(self.gamma.weight)
        nn.init.zeros_(self.beta.weight)

    def forward(self, x: Float[Tensor, "B C H W"], labels: Int[Tensor, " B"]) -> Float[Tensor, "B C H W"]:
        _check_statistics(self.bn, x)
        gamma, beta = (table(labels)[..., None, None] for table in (self.gamma, self.beta))  # (B, C, 1, 1)
        return gamma * self.bn(x) + beta


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization of maps (B, C, *S) with everything fixed, as detectors use in small batches.

    weight, bias, running_mean and running_var are buffers: no optimizer, no update, in training as in evaluation. The
    names are torchvision's, and a state dict of ordinary batch normalization loads, its batch counter left out.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        for name, start in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), start))

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        each = (-1,) + (1,) * (x.ndim - 2)
        return x * scale.view(each).to(x.dtype) + shift.view(each).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


class ChannelLayerNorm(nn.Module):
    """Layer normalization over the channels of each place of maps (B, C, *S), with a weight and a bias per channel.

    What `nn.LayerNorm(C)` does to (B, *S, C). It is not `nn.GroupNorm(1, C)`, whose mean is over the places too.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "B C *S"]) -> Float[Tensor, "B C *S"]:
        return F.layer_norm(x.movedim(1, -1), self.weight.shape, self.weight, self.bias, self.eps).movedim(-1, 1)

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"


def freeze_batch_norm(network: nn.Module) -> nn.Module:
    """Replace every batch normalization with running statistics in `network`, in place, by its frozen twin.

    Outputs are those of evaluation. Returns the network, or the twin if it is itself a batch normalization.
    """
    if isinstance(network, _BATCH):
        if network.running_mean is None or network.running_var is None:
            raise ValueError("batch normalization without running statistics cannot be frozen")
        frozen = FrozenBatchNorm2d(network.num_features, network.eps)
        for name, value in network.state_dict().items():
            if name != "num_batches_tracked":
                getattr(frozen, name).copy_(value)
        return frozen.to(network.running_mean)
    for name, child in network.named_children():
        setattr(network, name, freeze_batch_norm(child))
    return network


def add_spectral_norm(network: nn.Module, iterations: int = 1) -> nn.Module:
    """Divide, in place, each weight of linear, convolution and embedding layers by its largest singular value.

    torch's parametrization: `iterations` of the power method at each training forward, and what is trained is
    `parametrizations.weight.original`. Source: Miyato et al. 2018, SNGAN (arXiv:1802.05957). Returns the network.
    """
    layers = [layer for layer in network.modules() if isinstance(layer, _WEIGHTED)]
    if not layers:
        raise ValueError(f"{type(network).__name__} has no linear, convolution or embedding layer to normalize")
    for layer in layers:
        spectral_norm(layer, n_power_iterations=iterations)
    return network


def batch_norm(channels: int, *, dims: int = 2, eps: float = 1e-5, momentum: float | None = 0.1) -> nn.Module:
    """torch's batch normalization of maps with `dims` axes."""
    return _of_dims(_BATCH, dims)(channels, eps=eps, momentum=momentum)


def instance_norm(channels: int, *, dims: int = 2, eps: float = 1e-5, affine: bool = True) -> nn.Module:
    """torch's instance normalization of maps with `dims` axes; affine, unlike torch's default."""
    return _of_dims(_INSTANCE, dims)(channels, eps=eps, affine=affine)


def group_norm(channels: int, *, dims: int = 2, groups: int = 32, eps: float = 1e-5) -> nn.Module:
    """torch's group normalization; 32 groups as in Wu & He 2018 (arXiv:1803.08494)."""
    if channels % groups:
        raise ValueError(f"channels must be a multiple of groups, got {channels} and {groups}")
    return nn.GroupNorm(groups, channels, eps)


def layer_norm(channels: int, *, dims: int = 2, eps: float = 1e-5) -> nn.Module:
    """`ChannelLayerNorm`."""
    return ChannelLayerNorm(channels, eps)


def frozen_batch_norm(channels: int, *, dims: int = 2, eps: float = 1e-5) -> nn.Module:
    """`FrozenBatchNorm2d`, for maps with any number of axes."""
    return FrozenBatchNorm2d(channels, eps)


def no_norm(channels: int, *, dims: int = 2) -> nn.Module:
    """The identity."""
    return nn.Identity()


def _of_dims(classes: tuple[Callable[..., nn.Module], ...], dims: int) -> Callable[..., nn.Module]:
    check_choice("dims", dims, (1, 2, 3))
    return classes[dims - 1]


NORMS: Mapping[str, Callable[..., nn.Module]] = {
    "batch": batch_norm,
    "layer": layer_norm,
    "instance": instance_norm,
    "group": group_norm,
    "frozen_batch": frozen_batch_norm,
    "none": no_norm,
    "conditional_batch_1d": ConditionalBatchNorm1d,  # these two take a code or labels beside the maps
    "conditional_batch_2d": ConditionalBatchNorm2d,
}


def norm(name: str, channels: int, *, dims: int = 2, **options: Any) -> nn.Module:
    """A normalization of maps (B, channels, ...) by name, `dims` axes, `options` of its own; or a ValueError."""
    check_choice("norm", name, [key for key in NORMS if not key.startswith("conditional")])
    return NORMS[name](channels, dims=dims, **options)
