"""Convolutions first, attention over what they found.

Sources: a transformer encoder over the last map with sinusoidal positions, Carion et al. 2020 (arXiv:2005.12872), where
the sequence is short; self-attention as a layer between stages, Wang et al. 2018 (arXiv:1711.07971) and Zhang et al.
2019 (arXiv:1805.08318). See Srinivas et al. 2021 (arXiv:2101.11605) for the case for the last stage.
"""

from collections.abc import Callable
from functools import partial

from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.backbones.backbone import Backbone, pooled_logits
from vision3dgen.backbones.resnet import ResNet, resnet18, resnet50
from vision3dgen.layers import SelfAttention2d, TransformerBlock, sinusoidal_positions


class Hybrid(Backbone):
    """A trunk whose last map passes `depth` transformer blocks over all its places; the other maps are the trunk's.

    width: of the tokens and of the last map, a multiple of `heads` and of 4. The trunk is built without a classifier;
    with `num_classes`, one stands on the mean of the last map.
    """

    def __init__(
        self,
        trunk: Backbone,
        *,
        depth: int = 2,
        heads: int = 8,
        width: int = 256,
        dropout: float = 0.0,
        stochastic_depth: float = 0.0,
        num_classes: int | None = None,
    ):
        if trunk.num_classes is not None:
            raise ValueError("the trunk of a hybrid has no use for a classifier: give num_classes to the hybrid")
        super().__init__(trunk.in_channels, trunk.smallest, num_classes)
        self.body = trunk
        self.channels = [*trunk.channels[:-1], width]
        self.strides = list(trunk.strides)
        self.projection = nn.Conv2d(trunk.channels[-1], width, 1)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, dropout=dropout, stochastic_depth=stochastic_depth) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.fc = None if num_classes is None else nn.Linear(width, num_classes)

    def _tokens(self, last: Float[Tensor, "B C H W"]) -> Float[Tensor, "B N C2"]:
        x = self.projection(last)
        positions = sinusoidal_positions(x.shape[2:], x.shape[1]).to(x)  # (H, W, C2)
        return x.flatten(2).transpose(1, 2) + positions.flatten(0, 1)

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        *finer, last = self.body(images)
        x = self._tokens(last)
        for block in self.blocks:
            x = block(x)
        return [*finer, self.norm(x).transpose(1, 2).unflatten(2, last.shape[2:])]

    def weights(self, images: Float[Tensor, "B C H W"]) -> list[Float[Tensor, "B heads N N"]]:
        """Where each place of the last map looks, per block and head; rows sum to 1."""
        x = self._tokens(self.body(images)[-1])
        seen = []
        for block in self.blocks:
            assert isinstance(block, TransformerBlock)
            seen.append(block.weights(x))
            x = block(x)
        return seen

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class scores from the mean of the last map; needs `num_classes`."""
        return pooled_logits(self, self.fc, images)


def resnet_transformer(
    trunk: Callable[..., ResNet], num_classes: int | None = None, *, in_channels: int = 3, depth: int = 2,
    heads: int = 8, width: int = 256, dropout: float = 0.0,
) -> Hybrid:  # fmt: skip
    """Transformer blocks over the last map of a residual network."""
    body = trunk(in_channels=in_channels)
    return Hybrid(body, depth=depth, heads=heads, width=width, dropout=dropout, num_classes=num_classes)


def resnet_attention(
    trunk: Callable[..., ResNet], num_classes: int | None = None, *, in_channels: int = 3, stage: int = 3
) -> ResNet:
    """A residual network with one `SelfAttention2d` after the last block of a stage.

    The layer starts as the identity: with the trunk's published weights, loaded with strict=False, outputs are its.
    """
    network = trunk(num_classes=num_classes, in_channels=in_channels)
    if not 1 <= stage <= len(network.channels):
        raise ValueError(f"stage must be from 1 to {len(network.channels)}, got {stage}")
    blocks = network.get_submodule(f"layer{stage}")
    assert isinstance(blocks, nn.Sequential)
    blocks.append(SelfAttention2d(network.channels[stage - 1]))
    return network


HYBRIDS: dict[str, Callable[..., Backbone]] = {
    "resnet18_transformer": partial(resnet_transformer, resnet18),
    "resnet50_transformer": partial(resnet_transformer, resnet50),
    "resnet18_attention": partial(resnet_attention, resnet18),
    "resnet50_attention": partial(resnet_attention, resnet50),
}
