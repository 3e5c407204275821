"""Where each word of a caption was read: attention maps over the image."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import interpolate

from vision3dgen.viz.gallery import PathLike, gallery


def attention_overlay(
    image: Float[Tensor, "3 H W"], attention: Float[Tensor, "h w"], size: int = 128
) -> Float[Tensor, "3 S S"]:
    """The image in [0, 1], dark and gray but where the attention is, relative to its maximum.

    Attention is interpolated between the middles of cells; one that is the same everywhere leaves the image as it is.
    """
    picture = interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0].clamp(0, 1)
    weight = interpolate(attention[None, None].float(), (size, size), mode="bilinear")[0]  # (1, S, S)
    weight = weight / weight.amax().clamp(min=1e-12)
    gray = 0.35 * picture.mean(0, keepdim=True)
    return gray + weight * (picture - gray)


def attention_gallery(
    images: Sequence[Float[Tensor, "3 H W"]],
    captions: Sequence[tuple[Sequence[str], Float[Tensor, "T h w"]]],
    path: PathLike | None = None,
    *,
    size: int = 128,
) -> np.ndarray:
    """A row per image: the image, then `attention_overlay` for each word of its caption; one picture (H, W, 3).

    captions: words and as many attention maps for each image. Raises ValueError where their numbers differ.
    """
    if len(images) != len(captions):
        raise ValueError(f"captions must be {len(images)}, one for each image, got {len(captions)}")
    rows, names = [], []
    for index, (image, (words, attention)) in enumerate(zip(images, captions)):
        if len(words) != len(attention):
            raise ValueError(f"caption {index} has {len(words)} words, but {len(attention)} attention maps")
        plain = torch.full(attention.shape[1:], 1.0) if len(attention) else torch.ones(1, 1)
        rows.append([attention_overlay(image, look, size) for look in (plain, *attention)])
        names.append(["", *words])
    return gallery(rows, path=path, captions=names)
