"""The features of an object from any number of views: one volume, seen view after view, or maps pooled over views.

Sources: Choy et al. 2016, 3D-R2N2 (arXiv:1604.00449), the residual network with a 3D convolutional GRU: each view
becomes a vector, each cell of a 4^3 grid of states decides what it keeps of its own state and what it takes from the
view; Su et al. 2015 (arXiv:1505.00880) for the maximum over views.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.backbones.backbone import Backbone
from vision3dgen.checks import check_choice, check_shape
from vision3dgen.layers import ConvGRU

SLOPE = 0.01  # of every leaky ReLU of the paper


class R2N2Encoder(Backbone):
    """The paper's view encoder: six stages of two convolutions and pooling, with shortcuts, at strides 2 to 64.

    Images (B, in_channels, H, W), 127 x 127 in the paper, where the last map is 256 x 3 x 3. Shortcuts are 1x1
    convolutions, except in stage 1 and stage 4 (none) and stage 6 (the identity).
    """

    def __init__(self, in_channels: int = 3):
        super().__init__(in_channels, 1)
        self.channels = [96, 128, 256, 256, 256, 256]
        self.strides = [2, 4, 8, 16, 32, 64]
        self.first, self.second, self.shortcuts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        inputs = in_channels
        for stage, width in enumerate(self.channels, start=1):
            kernel = 7 if stage == 1 else 3
            self.first.append(nn.Conv2d(inputs, width, kernel, padding=kernel // 2))
            self.second.append(nn.Conv2d(width, width, 3, padding=1))
            self.shortcuts.append(nn.Conv2d(inputs, width, 1) if stage in (2, 3, 5) else nn.Identity())
            inputs = width
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, a=SLOPE)
                assert module.bias is not None
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        self.check_images(images)
        maps, x = [], images
        for stage, (first, second, shortcut) in enumerate(zip(self.first, self.second, self.shortcuts), start=1):
            y = F.leaky_relu(second(F.leaky_relu(first(x), SLOPE)), SLOPE)
            x = F.max_pool2d(y if stage in (1, 4) else y + shortcut(x), 2, padding=1)
            maps.append(x)
        return maps


class ViewEncoder(nn.Module, ABC):
    """Views (B, V, C, H, W) of B objects to what a head takes: maps, fine to coarse, or a volume.

    `lengths` (B,), each from 1 to V, says how many views each object has; padding behind them changes nothing.
    `channels` and `strides` describe the maps; there are no strides where they do not lie over a picture.
    """

    channels: list[int]
    strides: list[int]

    def __init__(self, trunk: Backbone):
        super().__init__()
        if trunk.num_classes is not None:
            raise ValueError("the trunk of a multi-view encoder has no use for a classifier: build it without")
        self.trunk = trunk

    def forward(self, views: Float[Tensor, "B V C H W"], lengths: Int[Tensor, " B"] | None = None) -> list[Tensor]:
        size = check_shape(views=(views, "B V C H W"))
        if size["V"] < 1:
            raise ValueError(f"a multi-view encoder needs at least one view, got {tuple(views.shape)}")
        if lengths is None:
            return self.join(views, None)
        check_shape(lengths=(lengths, str(len(views))))
        if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= size["V"]:
            raise ValueError(f"each object needs from 1 to {size['V']} views, got {lengths.tolist()}")
        exists = torch.arange(size["V"], device=views.device) < lengths.to(views.device)[:, None]  # (B, V)
        return self.join(views, exists)

    @abstractmethod
    def join(self, views: Float[Tensor, "B V C H W"], exists: Bool[Tensor, "B V"] | None) -> list[Tensor]:
        """The features of each object from the views that exist, None for all."""


class MultiViewEncoder(ViewEncoder):
    """A recurrence over the views: one volume (B, state_channels, size, size, size).

    trunk: encodes each view; its last map, averaged to `grid` x `grid` cells, becomes a vector of `code_channels`. The
    volume depends on the order of the views, as in the paper.
    Differs: no dropout; for another image size than the paper's the last map is averaged to the same 3 x 3.
    """

    def __init__(
        self, trunk: Backbone, *, code_channels: int = 1024, state_channels: int = 128, size: int = 4, grid: int = 3
    ):
        super().__init__(trunk)
        self.channels, self.strides = [state_channels], []
        self.pool = nn.AdaptiveAvgPool2d(grid)
        self.fc = nn.Linear(trunk.channels[-1] * grid * grid, code_channels)
        to_maps = nn.Sequential(
            nn.Linear(code_channels, 3 * state_channels * size**3),
            nn.Unflatten(1, (3 * state_channels, size, size, size)),
        )
        self.gru = ConvGRU(to_maps, state_channels, kernel_size=3, dims=3)

    def codes(self, views: Float[Tensor, "B V C H W"]) -> Float[Tensor, "B V K"]:
        """The vector of each view on its own."""
        last = self.trunk(views.flatten(0, 1))[-1]
        return F.leaky_relu(self.fc(self.pool(last).flatten(1)), SLOPE).unflatten(0, views.shape[:2])

    def join(self, views: Float[Tensor, "B V C H W"], exists: Bool[Tensor, "B V"] | None) -> list[Tensor]:
        if exists is None:
            return [self.gru(self.codes(views)).state]
        # only the views that exist are encoded, so that padding stays out of batch statistics and costs nothing
        found = self.codes(views[exists][None])[0]  # (total, K)
        codes = found.new_zeros(*exists.shape, found.shape[1])
        codes[exists] = found
        return [self.gru(codes, lengths=exists.sum(1)).state]


class ViewPooling(ViewEncoder):
    """The trunk's maps, each the maximum or the mean over the views; their order does not matter.

    Maps of different views show different pixels at one place, so what stands behind should look at the whole map.
    """

    def __init__(self, trunk: Backbone, *, reduce: Literal["max", "mean"] = "max"):
        super().__init__(trunk)
        check_choice("reduce", reduce, ("max", "mean"))
        self.reduce = reduce
        self.channels, self.strides = trunk.channels, trunk.strides

    def join(self, views: Float[Tensor, "B V C H W"], exists: Bool[Tensor, "B V"] | None) -> list[Tensor]:
        present = views.new_ones(views.shape[:2], dtype=torch.bool) if exists is None else exists
        maps = []
        for found in self.trunk(views[present]):
            spread = found.new_full((*present.shape, *found.shape[1:]), 0 if self.reduce == "mean" else -torch.inf)
            spread[present] = found  # (B, V, C, H, W)
            if self.reduce == "max":
                maps.append(spread.amax(1))
            else:
                maps.append(spread.sum(1) / present.sum(1).view(-1, 1, 1, 1))
        return maps


VIEW_ENCODERS: dict[str, type[ViewEncoder]] = {"recurrent": MultiViewEncoder, "pooled": ViewPooling}
