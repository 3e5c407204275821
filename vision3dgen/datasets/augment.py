"""Augmentation that moves image, mask, depth, normals, boxes, keypoints and camera of a sample together.

Pixel (row 0, column 0) covers [0, 1), so a geometric step is a map of continuous pixel positions p' = A p, and all
else in a sample follows from A. The maps of steps next to one another are multiplied before anything is resampled: an
image is interpolated once, what a crop cut off comes back when a later step moves it in, and no change changes no bit.

| key | batch (a sample lacks the B) | what becomes of it |
|---|---|---|
| `image` | (B, 3, H, W) | bilinear; `fill` where it shows what was outside |
| `mask` `depth` `normals` | (B, C, H, W) | nearest, so that a depth of 0 or inf mixes with nothing; 0 outside |
| `masks` | list of (N, H, W), one per object | nearest; 0 outside |
| `semantic` `panoptic` | (B, H, W) | nearest; 255, 0 outside |
| `boxes` | list of (N, 4) xyxy | around the moved outline, clipped; `boxes_visible` (N,) tells which are left |
| `keypoints` | list of (..., 2) | moved, not clipped; `keypoints_visible` (...,) tells which are in the picture |
| `camera` | `Camera` | projects the same world points to the moved pixels |
| `mesh` beside `boxes` and `camera` | `Meshes` in the camera's frame | turns, or is mirrored, with the camera |

**Camera.** For every affine A, A K is an intrinsic matrix times a rotation about the optical axis (RQ decomposition).
The new K takes focal lengths, principal point and skew: all of crop, scale, translation and stretching, and the skew of
a shear. The extrinsics take the rotation. A flip makes it a reflection (determinant -1): focal lengths stay positive, x
points right in the picture, and the camera looks at the mirrored world. Depth along the axis does not change. Normals
are in the camera frame and turn with the extrinsics; without a camera, as for square pixels. A distorted picture has no
pinhole camera: see `Distort`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.datasets.collate import RAGGED
from vision3dgen.engine.loading import EpochAware
from vision3dgen.structures import Camera, Meshes

Size = tuple[int, int]  # (H, W)


class Moved(NamedTuple):
    """What a geometric step does to the pixel positions of each member of a batch."""

    matrix: Float[Tensor, "B 3 3"]  # float64; p' = matrix @ (u, v, 1)
    size: Size


class Geometric(ABC):
    """A step that is an affine map of the image plane."""

    @abstractmethod
    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        """The maps of `count` images of one size."""


class Photometric(ABC):
    """A step that changes colours and moves nothing."""

    @abstractmethod
    def paint(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None) -> Float[Tensor, "B C H W"]:
        """The changed images, in [0, 1]."""


# Steps that say where the picture ends


@dataclass(frozen=True)
class Crop(Geometric):
    """A window of `size` (H, W) at a random place; `center` takes the middle one."""

    size: Size
    center: bool = False

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        room = [have - want for have, want in zip(size, self.size)]
        if min(room) < 0 or min(self.size) < 1:
            raise ValueError(f"a crop of {self.size} does not fit into an image of {size} (height, width)")
        drawn = [torch.full((count,), r // 2) if self.center else _whole(count, r + 1, generator) for r in room]
        return Moved(_affine(torch.eye(2).expand(count, 2, 2), -torch.stack(drawn[::-1], 1)), self.size)


@dataclass(frozen=True)
class Resize(Geometric):
    """The whole picture at `size` (H, W), stretched if the shape differs."""

    size: Size

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        factors = torch.tensor([self.size[1] / size[1], self.size[0] / size[0]], dtype=torch.float64)
        return Moved(_affine(torch.diag(factors).expand(count, 2, 2), torch.zeros(count, 2)), self.size)


@dataclass(frozen=True)
class ResizedCrop(Geometric):
    """A random window with a fraction of the area and an aspect ratio from the ranges, resized to `size` (H, W).

    A window that does not fit is drawn again, ten times, then it is the largest centered one of the nearest allowed
    ratio. Source: Szegedy et al. 2015, section 6 ("Inception crop").
    """

    size: Size
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height

    def __post_init__(self) -> None:
        _check_range("area", self.area, 0, 1, above=True)
        _check_range("ratio", self.ratio, 0, math.inf, above=True)

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        height, width = size
        matrices = []
        for _ in range(count):
            window = self._window(height, width, generator)
            left, top, w, h = window
            factors = torch.tensor([self.size[1] / w, self.size[0] / h], dtype=torch.float64)
            matrices.append(
                _affine(torch.diag(factors)[None], -(factors * torch.tensor([left, top], dtype=torch.float64))[None])
            )
        return Moved(torch.cat(matrices), self.size)

    def _window(self, height: int, width: int, generator: torch.Generator | None) -> tuple[float, float, float, float]:
        low, high = self.ratio
        for _ in range(10):
            area = height * width * float(_uniform(1, self.area, generator))
            ratio = math.exp(float(_uniform(1, (math.log(low), math.log(high)), generator)))
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            if w <= width and h <= height:
                left, top = (float(_uniform(1, (0.0, room), generator)) for room in (width - w, height - h))
                return left, top, w, h
        ratio = min(max(width / height, low), high)
        w, h = min(width, height * ratio), min(height, width / ratio)
        return (width - w) / 2, (height - h) / 2, w, h


# Steps about the middle of the picture, which keep its size


@dataclass(frozen=True)
class Scale(Geometric):
    """Zoom by a factor from the range, drawn uniformly in its logarithm."""

    factor: tuple[float, float] = (0.8, 1.25)

    def __post_init__(self) -> None:
        _check_range("factor", self.factor, 0, math.inf, above=True)

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        factor = _log_uniform(count, self.factor, generator)
        return _about_middle(torch.diag_embed(torch.stack([factor, factor], 1)), size)


@dataclass(frozen=True)
class Translate(Geometric):
    """Shift by up to `fraction` of the width and of the height, to either side."""

    fraction: float = 0.1

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        shift = torch.stack([_uniform(count, (-self.fraction, self.fraction), generator) * s for s in size[::-1]], 1)
        return Moved(_affine(torch.eye(2).expand(count, 2, 2), shift), size)


@dataclass(frozen=True)
class Rotate(Geometric):
    """Turn by up to `degrees`, to either side."""

    degrees: float = 15.0

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        angle = torch.deg2rad(_uniform(count, (-self.degrees, self.degrees), generator))
        c, s = angle.cos(), angle.sin()
        return _about_middle(torch.stack([torch.stack([c, -s], 1), torch.stack([s, c], 1)], 1), size)


@dataclass(frozen=True)
class Stretch(Geometric):
    """Change the ratio of width to height by a factor from the range, log-uniform, at the same area."""

    factor: tuple[float, float] = (0.8, 1.25)

    def __post_init__(self) -> None:
        _check_range("factor", self.factor, 0, math.inf, above=True)

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        root = _log_uniform(count, self.factor, generator).sqrt()
        return _about_middle(torch.diag_embed(torch.stack([root, 1 / root], 1)), size)


@dataclass(frozen=True)
class Shear(Geometric):
    """Slant along x and along y by up to `degrees` each, to either side."""

    degrees: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.degrees < 45:
            raise ValueError(f"degrees must be in [0, 45) for the shear to be invertible, got {self.degrees}")

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        x, y = (torch.deg2rad(_uniform(count, (-self.degrees, self.degrees), generator)).tan() for _ in range(2))
        one = torch.ones_like(x)
        return _about_middle(torch.stack([torch.stack([one, x], 1), torch.stack([y, one], 1)], 1), size)


@dataclass(frozen=True)
class Flip(Geometric):
    """Mirror left and right with the given probability."""

    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def move(self, count: int, size: Size, generator: torch.Generator | None) -> Moved:
        sign = torch.where(_uniform(count, (0.0, 1.0), generator) < self.probability, -1.0, 1.0).double()
        return _about_middle(torch.diag_embed(torch.stack([sign, torch.ones_like(sign)], 1)), size)


@dataclass(frozen=True)
class Distort:
    """Radial lens distortion: a point at radius r from the middle goes to r (1 + k1 r^2 + k2 r^4).

    Radius 1 is that of the corners; k1 and k2 are drawn from their ranges. What results is not a pinhole camera's
    picture, so a sample with a `camera` is a ValueError unless `drop_camera` takes the key away, from every sample,
    and normals are left as they were seen. Ranges under which some point of the picture has no place to come from
    (k1 well below 0) are a ValueError. Source: Brown 1966, radial terms, as in OpenCV and kornia.
    """

    k1: tuple[float, float] = (-0.1, 0.1)
    k2: tuple[float, float] = (0.0, 0.0)
    drop_camera: bool = False

    def __post_init__(self) -> None:
        _check_range("k1", self.k1, -math.inf, math.inf)
        _check_range("k2", self.k2, -math.inf, math.inf)
        radius = torch.linspace(0, 10, 10_001, dtype=torch.float64)
        for k1, k2 in ((a, b) for a in self.k1 for b in self.k2):
            falls = (1 + 3 * k1 * radius**2 + 5 * k2 * radius**4 <= 0).nonzero()
            turn = radius[falls[0, 0]] if len(falls) else radius[-1]
            reach = float(turn * (1 + k1 * turn**2 + k2 * turn**4))
            if reach < 1:
                raise ValueError(
                    f"k1={k1}, k2={k2} bring no point further out than radius {reach:.2f}, so the corners, at 1, "
                    "would come from nowhere; with k2=0, k1 must be at least -4/27"
                )

    def bend(self, count: int, size: Size, generator: torch.Generator | None) -> "Bent":
        """The distortions of `count` images."""
        k1, k2 = (_uniform(count, limits, generator) for limits in (self.k1, self.k2))
        zero = torch.zeros_like(k1)
        half = math.hypot(*size) / 2
        k = torch.tensor([[half, 0, size[1] / 2], [0, half, size[0] / 2], [0, 0, 1]], dtype=torch.float64)
        return Bent(k.expand(count, 3, 3), torch.stack([k1, k2, zero, zero], 1))


class Bent(NamedTuple):
    """What `Distort` does to pixel positions."""

    k: Float[Tensor, "B 3 3"]
    coefficients: Float[Tensor, "B 4"]

    def forward(self, member: int, points: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
        from kornia.geometry.calibration import distort_points

        return distort_points(points[None], *self._of(member, points))[0]

    def backward(self, member: int, points: Float[Tensor, "N 2"]) -> Float[Tensor, "N 2"]:
        from kornia.geometry.calibration import undistort_points

        return undistort_points(points[None], *self._of(member, points), num_iters=30)[0]

    def _of(self, member: int, points: Tensor) -> tuple[Tensor, Tensor]:
        return self.k[None, member].to(points), self.coefficients[None, member].to(points)


# Steps of colour


@dataclass(frozen=True)
class ColorJitter(Photometric):
    """Brightness, contrast, saturation and hue, in this order, each by a random amount.

    Brightness, contrast and saturation are multiplied by a factor from [1 - x, 1 + x], contrast about the mean grey;
    hue turns by up to `hue` of a full circle, to either side. What leaves [0, 1] is clipped.
    """

    brightness: float = 0.2
    contrast: float = 0.2
    saturation: float = 0.2
    hue: float = 0.02

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if not 0 <= self.hue <= 0.5:
            raise ValueError(f"hue must be in [0, 0.5], got {self.hue}")

    def paint(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None) -> Float[Tensor, "B C H W"]:
        from kornia import enhance

        def draw(amount: float, middle: float) -> Tensor:
            return _uniform(len(images), (middle - amount, middle + amount), generator).to(images)

        factors = [draw(amount, 1.0) for amount in (self.brightness, self.contrast, self.saturation)]
        turn = draw(2 * math.pi * self.hue, 0.0)
        if self.brightness:
            images = (images * factors[0].view(-1, 1, 1, 1)).clamp(0, 1)
        if self.contrast:
            images = enhance.adjust_contrast_with_mean_subtraction(images, factors[1]).clamp(0, 1)
        if self.saturation:
            images = enhance.adjust_saturation(images, factors[2]).clamp(0, 1)
        return enhance.adjust_hue(images, turn).clamp(0, 1) if self.hue else images


@dataclass(frozen=True)
class Blur(Photometric):
    """Gaussian blur with a standard deviation in pixels from the range, cut off at three of the largest."""

    sigma: tuple[float, float] = (0.1, 2.0)
    probability: float = 0.5

    def __post_init__(self) -> None:
        _check_range("sigma", self.sigma, 0, math.inf, above=True)
        _check_probability(self.probability)

    def paint(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None) -> Float[Tensor, "B C H W"]:
        from kornia.filters import gaussian_blur2d

        sigma = _uniform(len(images), self.sigma, generator).to(images)
        chosen = (_uniform(len(images), (0.0, 1.0), generator) < self.probability).to(images.device)
        width = 2 * math.ceil(3 * self.sigma[1]) + 1
        blurred = gaussian_blur2d(images, (width, width), torch.stack([sigma, sigma], 1), border_type="replicate")
        return torch.where(chosen.view(-1, 1, 1, 1), blurred, images)


@dataclass(frozen=True)
class Greyscale(Photometric):
    """The luminance in all three channels, with the given probability."""

    probability: float = 0.1

    def __post_init__(self) -> None:
        _check_probability(self.probability)

    def paint(self, images: Float[Tensor, "B C H W"], generator: torch.Generator | None) -> Float[Tensor, "B C H W"]:
        from kornia.color import rgb_to_grayscale

        chosen = (_uniform(len(images), (0.0, 1.0), generator) < self.probability).to(images.device)
        return torch.where(chosen.view(-1, 1, 1, 1), rgb_to_grayscale(images).expand_as(images), images)


@dataclass(frozen=True)
class DropInvisible:
    """Take objects out of the sample whose boxes have left the picture, or have a side of less than `min_side` pixels.

    All that is said of each goes with its box (`PER_OBJECT`), its mesh too. With masks, an object none of whose pixels
    is in the picture is taken out as well. What stays is as it was; boxes are not drawn closer around masks.
    """

    min_side: float = 1.0

    def __post_init__(self) -> None:
        if not self.min_side >= 0:
            raise ValueError(f"min_side must be at least 0 pixels, got {self.min_side}")

    def drop(self, batch: dict[str, Any]) -> None:
        """Leave out rows of a batch, in place of its entries."""
        if "boxes" not in batch:
            raise ValueError(f"drop_invisible needs the key 'boxes', the sample has {sorted(batch)}")
        kept = []
        for member, boxes in enumerate(batch["boxes"]):
            stays = batch["boxes_visible"][member] & ((boxes[:, 2:] - boxes[:, :2]) >= self.min_side).all(1)
            if "masks" in batch:
                stays = stays & batch["masks"][member].flatten(1).any(1)
            kept.append(stays)
        if "mesh" in batch and len(batch["mesh"]) == sum(len(stays) for stays in kept):
            batch["mesh"] = batch["mesh"][torch.cat(kept).cpu()]
        for key in PER_OBJECT:
            if key in batch:
                batch[key] = [values[stays.to(values.device)] for values, stays in zip(batch[key], kept)]


PER_OBJECT = ("areas", "boxes", "boxes_visible", "crowd", "difficult", "labels", "masks")

Step = Geometric | Photometric | Distort | DropInvisible

AUGMENTATIONS: dict[str, Callable[..., Step]] = {
    "crop": Crop,
    "resize": Resize,
    "resized_crop": ResizedCrop,
    "scale": Scale,
    "translate": Translate,
    "rotate": Rotate,
    "stretch": Stretch,
    "shear": Shear,
    "flip": Flip,
    "distort": Distort,
    "color": ColorJitter,
    "blur": Blur,
    "greyscale": Greyscale,
    "drop_invisible": DropInvisible,
}


class Augment:
    """Steps applied in order to a sample, image (3, H, W), or to a batch, image (B, 3, H, W), on any device.

    Every member of a batch gets draws of its own, made on the CPU, so that devices agree. Without `generator` they come
    from torch's global one, which the trainer seeds for each sample by (seed, epoch, index). Keys the module's table
    does not list stay as they are. `fill` is the colour of what was outside the image: 1, white, as renderings have it.

    Differs: geometric steps interpolate without a low-pass filter; put `Blur` before a strong reduction.
    """

    def __init__(self, steps: Sequence[Step], fill: float = 1.0):
        self.steps, self.fill = tuple(steps), fill

    def __call__(self, sample: Mapping[str, Any], generator: torch.Generator | None = None) -> dict[str, Any]:
        if "image" not in sample:
            raise ValueError(f"augmentation needs the key 'image', the sample has {sorted(sample)}")
        if sample["image"].ndim == 3:
            return _single(self._batch(_as_batch(sample), generator))
        return self._batch(dict(sample), generator)

    def _batch(self, batch: dict[str, Any], generator: torch.Generator | None) -> dict[str, Any]:
        _mark(batch)
        count = len(batch["image"])
        size: Size = tuple(batch["image"].shape[-2:])
        pending = Moved(torch.eye(3, dtype=torch.float64).expand(count, 3, 3), size)
        for step in self.steps:
            if isinstance(step, Geometric):
                moved = step.move(count, pending.size, generator)
                pending = Moved(moved.matrix @ pending.matrix, moved.size)
                continue
            size = _move(batch, size, pending, self.fill)
            pending = Moved(torch.eye(3, dtype=torch.float64).expand(count, 3, 3), size)
            if isinstance(step, DropInvisible):
                step.drop(batch)
            elif isinstance(step, Distort):
                _bend(batch, step, step.bend(count, size, generator), self.fill)
            else:
                batch["image"] = step.paint(batch["image"], generator)
        _move(batch, size, pending, self.fill)
        return batch


class Augmented:
    """A dataset whose items pass through an augmentation each time they are read."""

    def __init__(self, dataset: Any, augment: Augment):
        self.dataset, self.augment = dataset, augment

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.augment(self.dataset[index])

    def set_epoch(self, epoch: int) -> None:
        if isinstance(self.dataset, EpochAware):
            self.dataset.set_epoch(epoch)


# Keys by what becomes of them

NEAREST = ("mask", "depth", "normals")
NUMBERED = {"semantic": 255, "panoptic": 0}  # maps of numbers, and the number of what was outside


def _as_batch(sample: Mapping[str, Any]) -> dict[str, Any]:
    batch = dict(sample)
    for key in ("image", *NEAREST, *NUMBERED):
        if key in batch:
            batch[key] = batch[key][None]
    for key in RAGGED:
        if key in batch:
            batch[key] = [batch[key]]
    if "camera" in batch:
        batch["camera"] = Camera.stack([batch["camera"]])
    return batch


def _single(batch: dict[str, Any]) -> dict[str, Any]:
    for key in ("image", *NEAREST, *NUMBERED, *RAGGED, "camera"):
        if key in batch:
            batch[key] = batch[key][0]
    return batch


def _mark(batch: dict[str, Any]) -> None:
    """Say of every box and keypoint whether it is in the picture; what was marked as absent stays so."""
    height, width = batch["image"].shape[-2:]
    if "camera" in batch and batch["camera"].image_size != (height, width):
        raise ValueError(f"the camera's image_size is {batch['camera'].image_size}, the image's {(height, width)}")
    for key, inside in (("boxes", _box_inside), ("keypoints", _point_inside)):
        if key in batch:
            known = batch.get(f"{key}_visible") or [True] * len(batch[key])
            batch[f"{key}_visible"] = [inside(value, (height, width)) & old for value, old in zip(batch[key], known)]


def _box_inside(boxes: Tensor, size: Size) -> Tensor:
    clipped = _clip(boxes, size)
    return (clipped[:, 2] > clipped[:, 0]) & (clipped[:, 3] > clipped[:, 1])


def _point_inside(points: Tensor, size: Size) -> Tensor:
    return ((points >= 0) & (points < points.new_tensor(size[::-1]))).all(-1)


def _clip(boxes: Tensor, size: Size) -> Tensor:
    limit = boxes.new_tensor([size[1], size[0]] * 2)
    return torch.minimum(boxes.clamp(min=0), limit)


def _move(batch: dict[str, Any], size: Size, moved: Moved, fill: float) -> Size:
    """Apply affine maps to everything in the batch, in place of its entries; returns the new size."""
    matrix, new_size = moved
    still = torch.eye(3, dtype=torch.float64).expand_as(matrix)
    if new_size == size and torch.equal(matrix, still):
        return size
    centers = _centers(new_size, batch["image"].device)
    inverse = torch.linalg.inv(matrix).to(centers)
    source = centers @ inverse[:, :2, :2].mT + inverse[:, None, :2, 2]  # (B, H' W', 2)
    _resample(batch, source.view(-1, *new_size, 2), fill)
    turn = _turns(matrix, batch["camera"].intrinsics.cpu().double() if "camera" in batch else still)
    if "normals" in batch:
        batch["normals"] = torch.einsum("bij,bjhw->bihw", turn.rotation.to(batch["normals"]), batch["normals"])
    if "camera" in batch:
        old = batch["camera"]
        rotation = turn.rotation.to(old.rotation.device)
        batch["camera"] = Camera(
            (rotation @ old.rotation.double()).to(old.rotation),
            (rotation @ old.translation.double()[..., None])[..., 0].to(old.translation),
            turn.intrinsics.to(old.intrinsics),
            new_size,
        )
        if "mesh" in batch and "boxes" in batch:
            batch["mesh"] = _turned(batch["mesh"], [len(boxes) for boxes in batch["boxes"]], turn.rotation)

    def place(member: int, points: Tensor) -> Tensor:
        map = matrix[member].to(points.device)
        return (points.double() @ map[:2, :2].T + map[:2, 2]).to(points)

    _place(batch, new_size, place, edge_points=2)
    return new_size


def _bend(batch: dict[str, Any], step: Distort, bent: Bent, fill: float) -> None:
    if "camera" in batch:
        if not step.drop_camera:
            raise ValueError(
                "a distorted picture has no pinhole camera: give distort drop_camera=True to take the key "
                "'camera' out of the samples, or read them without it"
            )
        del batch["camera"]
    size: Size = tuple(batch["image"].shape[-2:])
    if not bent.coefficients.any():
        return
    centers = _centers(size, batch["image"].device)
    source = torch.stack([bent.backward(member, centers) for member in range(len(batch["image"]))])
    _resample(batch, source.view(-1, *size, 2), fill)

    def place(member: int, points: Tensor) -> Tensor:
        return bent.forward(member, points.double().reshape(-1, 2)).reshape(points.shape).to(points)

    _place(batch, size, place, edge_points=65)


def _resample(batch: dict[str, Any], source: Float[Tensor, "B H W 2"], fill: float) -> None:
    """Look the pixels up at these positions of the old pictures."""
    batch["image"] = _look_up(batch["image"] - fill, source, "bilinear") + fill
    for key in NEAREST:
        if key in batch:
            batch[key] = _look_up(batch[key], source, "nearest")
    for key, outside in NUMBERED.items():
        if key in batch:
            batch[key] = _look_up(batch[key][:, None] - outside, source, "nearest")[:, 0] + outside
    if "masks" in batch:
        batch["masks"] = [_look_up(m[None], source[i : i + 1], "nearest")[0] for i, m in enumerate(batch["masks"])]


def _look_up(maps: Tensor, source: Float[Tensor, "B H W 2"], mode: str) -> Tensor:
    from kornia.geometry.transform import remap

    if not maps.numel():
        return maps.new_zeros(*maps.shape[:2], *source.shape[1:3])
    values = maps if maps.is_floating_point() else maps.double()
    if mode == "nearest":  # by index: an interpolation with weight 0 would make NaN of an infinite depth
        column, row = source.floor().long().unbind(-1)
        height, width = maps.shape[-2:]
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        flat = row.clamp(0, height - 1) * width + column.clamp(0, width - 1)
        found = maps.flatten(2).gather(2, flat.flatten(1)[:, None].expand(-1, maps.shape[1], -1))
        return torch.where(inside[:, None], found.view(*maps.shape[:2], *inside.shape[1:]), maps.new_zeros(()))
    source = source.to(values) - 0.5  # kornia counts from pixel centers
    return remap(values, source[..., 0], source[..., 1], mode=mode, padding_mode="zeros", align_corners=True)


def _place(batch: dict[str, Any], size: Size, place: Callable[[int, Tensor], Tensor], *, edge_points: int) -> None:
    """Move boxes and keypoints, and mark what left the picture."""
    for key, inside in (("boxes", _box_inside), ("keypoints", _point_inside)):
        if key not in batch:
            continue
        moved = []
        for member, value in enumerate(batch[key]):
            new = _around(place(member, _outline(value, edge_points))) if key == "boxes" else place(member, value)
            absent = ~batch[f"{key}_visible"][member]
            if key == "boxes":  # an empty box stays empty, at a corner of itself
                new = torch.where(absent[:, None], new[:, :2].repeat(1, 2), new)
            batch[f"{key}_visible"][member] = inside(new, size) & ~absent
            moved.append(_clip(new, size) if key == "boxes" else new)
        batch[key] = moved


def _outline(boxes: Float[Tensor, "N 4"], count: int) -> Float[Tensor, "N P 2"]:
    """Points on the four edges, `count` on each, corners among them."""
    t = torch.linspace(0, 1, count, dtype=boxes.dtype, device=boxes.device)
    x = boxes[:, 0, None] + (boxes[:, 2] - boxes[:, 0])[:, None] * t
    y = boxes[:, 1, None] + (boxes[:, 3] - boxes[:, 1])[:, None] * t
    horizontal = [torch.stack([x, boxes[:, side, None].expand_as(x)], -1) for side in (1, 3)]
    vertical = [torch.stack([boxes[:, side, None].expand_as(y), y], -1) for side in (0, 2)]
    return torch.cat([*horizontal, *vertical], 1)


def _around(points: Float[Tensor, "N P 2"]) -> Float[Tensor, "N 4"]:
    return torch.cat([points.amin(1), points.amax(1)], -1)


class _Turn(NamedTuple):
    intrinsics: Float[Tensor, "B 3 3"]
    rotation: Float[Tensor, "B 3 3"]  # about the optical axis; a reflection where the map is one


def _turns(matrix: Float[Tensor, "B 3 3"], intrinsics: Float[Tensor, "B 3 3"]) -> _Turn:
    """matrix @ intrinsics = new intrinsics @ rotation, with positive focal lengths: RQ decomposition in the plane."""
    product = matrix @ intrinsics
    (a, b), (c, d) = product[:, 0, :2].unbind(-1), product[:, 1, :2].unbind(-1)
    # The last row of an upper triangular matrix has one entry: the second row of the rotation is (c, d) at length 1.
    length = torch.hypot(c, d)
    sine, cosine = c / length, d / length
    sign = torch.sign(a * d - b * c)
    rotation = torch.eye(3, dtype=product.dtype).repeat(len(product), 1, 1)
    rotation[:, 0, 0], rotation[:, 0, 1] = sign * cosine, -sign * sine
    rotation[:, 1, 0], rotation[:, 1, 1] = sine, cosine
    return _Turn(torch.triu(product @ rotation.mT), rotation)


def _turned(meshes: Meshes, counts: Sequence[int], rotation: Float[Tensor, "B 3 3"]) -> Meshes:
    """The meshes of the objects of each image, turned about its camera; mirrored ones keep their outside outside."""
    if len(meshes) != sum(counts):
        raise ValueError(f"a batch with {sum(counts)} boxes must have as many meshes, got {len(meshes)}")
    if not len(meshes):
        return meshes
    verts, faces = [], []
    owners = [image for image, count in enumerate(counts) for _ in range(count)]
    for owner, v, f in zip(owners, meshes.verts_list(), meshes.faces_list()):
        turn = rotation[owner].to(v.device)
        verts.append((v.double() @ turn.mT).to(v))
        faces.append(f.flip(1) if torch.linalg.det(turn) < 0 else f)
    return Meshes(
        verts,
        faces,
        verts_attributes=meshes.verts_attributes_packed(),
        faces_attributes=meshes.faces_attributes_packed(),
    )


def _centers(size: Size, device: torch.device) -> Float[Tensor, "N 2"]:
    rows, columns = (torch.arange(s, dtype=torch.float64, device=device) + 0.5 for s in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")[::-1], -1).view(-1, 2)


def _affine(linear: Float[Tensor, "B 2 2"], shift: Tensor) -> Float[Tensor, "B 3 3"]:
    matrix = torch.eye(3, dtype=torch.float64).repeat(len(linear), 1, 1)
    matrix[:, :2, :2], matrix[:, :2, 2] = linear, shift
    return matrix


def _about_middle(linear: Float[Tensor, "B 2 2"], size: Size) -> Moved:
    middle = torch.tensor([size[1] / 2, size[0] / 2], dtype=torch.float64)
    return Moved(_affine(linear, middle - linear.double() @ middle), size)


def _uniform(count: int, limits: tuple[float, float], generator: torch.Generator | None) -> Float[Tensor, "B"]:
    return limits[0] + (limits[1] - limits[0]) * torch.rand(count, dtype=torch.float64, generator=generator)


def _log_uniform(count: int, limits: tuple[float, float], generator: torch.Generator | None) -> Float[Tensor, "B"]:
    drawn = torch.rand(count, dtype=torch.float64, generator=generator)
    return limits[0] * (limits[1] / limits[0]) ** drawn  # exactly 1 for (1, 1)


def _whole(count: int, limit: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(limit, (count,), generator=generator)


def _check_range(name: str, limits: tuple[float, float], low: float, high: float, *, above: bool = False) -> None:
    if not low <= limits[0] <= limits[1] <= high or (above and limits[0] == low):
        raise ValueError(
            f"{name} must be a range from {'above' if above else 'at least'} {low} to {high}, got {limits}"
        )


def _check_probability(probability: float) -> None:
    if not 0 <= probability <= 1:
        raise ValueError(f"probability must be in [0, 1], got {probability}")
