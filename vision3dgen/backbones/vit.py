"""The vision transformer: patches of the image and a class token through a transformer encoder.

Source: Dosovitskiy et al. 2021 (arXiv:2010.11929). Parameter names and shapes are torchvision's, so its published
weights load with strict=True when `num_classes` is 1000; `timm_to_vision3dgen` translates timm's names.
Differs: images of any size. What does not fill a patch is padded with zeros on the right and below, and for a grid
other than the trained one the position embedding is resized (bicubic, between cell centers, not antialiased).
"""

import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.backbones.backbone import Backbone, present
from vision3dgen.layers import MultiHeadAttention


class EncoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), on tokens (B, N, C)."""

    def __init__(self, width: int, heads: int, mlp_width: int, dropout: float):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention = MultiHeadAttention(width, heads, dropout=dropout)
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_width), nn.GELU(), nn.Dropout(dropout), nn.Linear(mlp_width, width),
            nn.Dropout(dropout),
        )  # fmt: skip
        for index in (0, 3):
            nn.init.xavier_uniform_(self.mlp[index].get_parameter("weight"))
            nn.init.normal_(self.mlp[index].get_parameter("bias"), std=1e-6)

    def forward(self, x: Float[Tensor, "B N C"]) -> Float[Tensor, "B N C"]:
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Position embedding (1, 1 + cells, C), `depth` blocks, and the norm of the result."""

    def __init__(self, cells: int, depth: int, heads: int, width: int, mlp_width: int, dropout: float):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, 1 + cells, width).normal_(std=0.02))
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.Sequential(
            OrderedDict(
                (f"encoder_layer_{index}", EncoderBlock(width, heads, mlp_width, dropout)) for index in range(depth)
            )
        )
        self.ln = nn.LayerNorm(width, eps=1e-6)

    def forward(self, tokens: Float[Tensor, "B N C"], grid: tuple[int, int]) -> list[Float[Tensor, "B N C"]]:
        """The tokens, class token first, after each block, not normed."""
        x = self.dropout(tokens + resize_positions(self.pos_embedding, grid))
        states = []
        for layer in self.layers:
            x = layer(x)
            states.append(x)
        return states


class VisionTransformer(Backbone):
    """Images (B, in_channels, H, W) to the tokens as maps (B, width, ceil(H / patch), ceil(W / patch)).

    image_size: of the images the position embedding is for, a multiple of `patch_size`. depths: after which blocks,
    counted from 1, a map is taken; the last is among them, and by default alone. Every map passes the final norm.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        *,
        depth: int = 12,
        heads: int = 12,
        width: int = 768,
        mlp_width: int = 3072,
        num_classes: int | None = None,
        in_channels: int = 3,
        dropout: float = 0.0,
        depths: tuple[int, ...] | None = None,
    ):
        super().__init__(in_channels, 1, num_classes)
        if image_size % patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size {patch_size}, got {image_size}")
        if width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        self.depths = (depth,) if depths is None else tuple(depths)
        if list(self.depths) != sorted({*self.depths, depth} & set(range(1, depth + 1))):
            raise ValueError(f"depths must ascend from at least 1 to {depth}, the number of blocks, got {depths}")
        self.channels = [width] * len(self.depths)
        self.strides = [patch_size] * len(self.depths)
        self.patch_size = patch_size
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.conv_proj = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.encoder = Encoder((image_size // patch_size) ** 2, depth, heads, width, mlp_width, dropout)
        self.heads = None if num_classes is None else nn.Sequential(OrderedDict(head=nn.Linear(width, num_classes)))
        nn.init.trunc_normal_(self.conv_proj.weight, std=(in_channels * patch_size**2) ** -0.5)
        assert self.conv_proj.bias is not None
        nn.init.zeros_(self.conv_proj.bias)
        if self.heads is not None:
            nn.init.zeros_(self.heads.get_parameter("head.weight"))
            nn.init.zeros_(self.heads.get_parameter("head.bias"))

    def _states(self, images: Float[Tensor, "B C H W"]) -> tuple[list[Tensor], tuple[int, int]]:
        """The tokens after each block, and the grid of patches."""
        self.check_images(images)
        height, width = images.shape[2:]
        patches = self.conv_proj(F.pad(images, (0, -width % self.patch_size, 0, -height % self.patch_size)))
        grid = (patches.shape[2], patches.shape[3])
        tokens = patches.flatten(2).transpose(1, 2)  # (B, cells, C)
        class_token = self.class_token.to(tokens.dtype).expand(len(images), -1, -1)
        return self.encoder(torch.cat([class_token, tokens], dim=1), grid), grid

    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        states, grid = self._states(images)
        return [self.encoder.ln(states[depth - 1])[:, 1:].transpose(1, 2).unflatten(2, grid) for depth in self.depths]

    def logits(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class scores from the class token after the last block; needs `num_classes`."""
        head = present(self.heads)
        states, _ = self._states(images)
        return head(self.encoder.ln(states[-1][:, 0]))


def resize_positions(embedding: Float[Tensor, "1 N C"], grid: tuple[int, int]) -> Float[Tensor, "1 M C"]:
    """A position embedding of a class token and a square grid, for another grid (rows, columns).

    Bicubic between the cells' centers; the class token's row stays. ValueError if the cells are not a square.
    """
    cells = embedding.shape[1] - 1
    side = round(cells**0.5)
    if cells < 1 or side * side != cells:
        raise ValueError(
            f"a position embedding must have 1 + n^2 rows (class token, square grid), got {tuple(embedding.shape)}"
        )
    if grid == (side, side):
        return embedding
    square = embedding[:, 1:].transpose(1, 2).unflatten(2, (side, side))  # (1, C, side, side)
    resized = F.interpolate(square.float(), size=grid, mode="bicubic", align_corners=False).to(embedding.dtype)
    return torch.cat([embedding[:, :1], resized.flatten(2).transpose(1, 2)], dim=1)


# The names of timm's VisionTransformer, by pattern, and ours; `_BLOCKS` within a block.
_TOP = {
    "cls_token": "class_token",
    "pos_embed": "encoder.pos_embedding",
    "patch_embed.proj.weight": "conv_proj.weight",
    "patch_embed.proj.bias": "conv_proj.bias",
    "norm.weight": "encoder.ln.weight",
    "norm.bias": "encoder.ln.bias",
    "head.weight": "heads.head.weight",
    "head.bias": "heads.head.bias",
}
_BLOCKS = {
    "norm1.weight": "ln_1.weight",
    "norm1.bias": "ln_1.bias",
    "attn.qkv.weight": "self_attention.in_proj_weight",
    "attn.qkv.bias": "self_attention.in_proj_bias",
    "attn.proj.weight": "self_attention.out_proj.weight",
    "attn.proj.bias": "self_attention.out_proj.bias",
    "norm2.weight": "ln_2.weight",
    "norm2.bias": "ln_2.bias",
    "mlp.fc1.weight": "mlp.0.weight",
    "mlp.fc1.bias": "mlp.0.bias",
    "mlp.fc2.weight": "mlp.3.weight",
    "mlp.fc2.bias": "mlp.3.bias",
}
_BLOCK_HERE = "encoder.layers.encoder_layer_"


def timm_to_vision3dgen(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of timm's vision transformer under our names; a ValueError names keys that have no counterpart."""
    return _renamed(state, _TOP, _BLOCKS, r"blocks\.(\d+)\.(.+)", _BLOCK_HERE, "timm")


def vision3dgen_to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `timm_to_vision3dgen`."""
    top = {ours: theirs for theirs, ours in _TOP.items()}
    blocks = {ours: theirs for theirs, ours in _BLOCKS.items()}
    return _renamed(state, top, blocks, re.escape(_BLOCK_HERE) + r"(\d+)\.(.+)", "blocks.", "vision3dgen")


def _renamed(
    state: Mapping[str, Tensor], top: dict[str, str], blocks: dict[str, str], pattern: str, prefix: str, of: str
) -> dict[str, Tensor]:
    renamed, unknown = {}, []
    for name, tensor in state.items():
        match = re.fullmatch(pattern, name)
        if name in top:
            renamed[top[name]] = tensor
        elif match and match[2] in blocks:
            renamed[f"{prefix}{match[1]}.{blocks[match[2]]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"no vision transformer of {of} in these names: {unknown}")
    return renamed


# S and Ti are the sizes of Touvron et al. 2021 (arXiv:2012.12877).
vit_ti_16 = partial(VisionTransformer, patch_size=16, depth=12, heads=3, width=192, mlp_width=768)
vit_s_16 = partial(VisionTransformer, patch_size=16, depth=12, heads=6, width=384, mlp_width=1536)
vit_b_16 = partial(VisionTransformer, patch_size=16)
vit_b_32 = partial(VisionTransformer, patch_size=32)
vit_l_16 = partial(VisionTransformer, patch_size=16, depth=24, heads=16, width=1024, mlp_width=4096)
vit_l_32 = partial(VisionTransformer, patch_size=32, depth=24, heads=16, width=1024, mlp_width=4096)

VITS: dict[str, Callable[..., VisionTransformer]] = {
    "vit_ti_16": vit_ti_16, "vit_s_16": vit_s_16, "vit_b_16": vit_b_16, "vit_b_32": vit_b_32, "vit_l_16": vit_l_16,
    "vit_l_32": vit_l_32,
}  # fmt: skip
