"""Differentiable augmentation: real and generated pictures change at random before the discriminator sees them.

Source: Zhao et al. 2020, DiffAugment (arXiv:2006.10738), with the strengths of its section 3.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.generators.noise import uniform

Images = Float[Tensor, "B C H W"]
Generator = torch.Generator | None


def random_color(images: Images, generator: Generator = None) -> Images:
    """Brightness by up to 0.5 either way, saturation by 0 to 2, contrast by 0.5 to 1.5, for pictures in [-1, 1]."""
    brightness, saturation, contrast = uniform((3, len(images), 1, 1, 1), images, generator)
    images = images + (brightness - 0.5)
    grey = images.mean(1, keepdim=True)
    images = grey + 2 * saturation * (images - grey)
    mean = images.mean((1, 2, 3), keepdim=True)
    return mean + (contrast + 0.5) * (images - mean)


def random_translation(images: Images, generator: Generator = None) -> Images:
    """Each picture by a whole number of pixels, up to an eighth of its side either way; 0 comes in."""
    count, _, height, width = images.shape
    places = []
    for side, draws in zip((height, width), uniform((2, count), images, generator)):
        reach = int(side / 8 + 0.5)
        shift = (draws * (2 * reach + 1)).floor().long().clamp_max(2 * reach) - reach
        places.append(torch.arange(side, device=images.device) - shift[:, None])  # (B, side), where each came from
    rows, columns = places[0][:, :, None], places[1][:, None, :]
    inside = (rows >= 0) & (rows < height) & (columns >= 0) & (columns < width)
    batch = torch.arange(count, device=images.device)[:, None, None]
    moved = images.movedim(1, -1)[batch, rows.clamp(0, height - 1), columns.clamp(0, width - 1)]  # (B, H, W, C)
    return (moved * inside[..., None]).movedim(-1, 1)


def random_cutout(images: Images, generator: Generator = None) -> Images:
    """0 in a rectangle of half the sides around a random place; it may reach over the border."""
    count, _, height, width = images.shape
    near = []
    for side, draws in zip((height, width), uniform((2, count), images, generator)):
        cut = int(side / 2 + 0.5)
        start = (draws * (side + 1 - cut % 2)).floor().long() - cut // 2
        place = torch.arange(side, device=images.device) - start[:, None]
        near.append((place >= 0) & (place < cut))
    return images * ~(near[0][:, None, :, None] & near[1][:, None, None, :])


POLICIES: dict[str, Callable[..., Tensor]] = {
    "color": random_color,
    "translation": random_translation,
    "cutout": random_cutout,
}


class DiffAugment:
    """`policies` one after the other, with draws of their own for each picture."""

    def __init__(self, policies: Sequence[str] = ("color", "translation", "cutout")):
        for name in policies:
            check_choice("policy", name, POLICIES)
        if not policies:
            raise ValueError(f"policies must not be empty; choose from {sorted(POLICIES)}")
        self.policies = tuple(policies)

    def __call__(self, images: Images, generator: Generator = None) -> Images:
        for name in self.policies:
            images = POLICIES[name](images, generator)
        return images
