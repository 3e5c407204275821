"""What was found in photographs: boxes, masks, names and meshes over the images, class maps and segments.

Colors are those of `scene.PALETTE`, which color-blind readers can tell apart; beyond its seven they repeat darker and
paler. Everything is drawn with Pillow.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from PIL import Image, ImageDraw
from torch import Tensor

from vision3dgen.ops.render import raycast
from vision3dgen.structures import Camera, Detections, PanopticSegments
from vision3dgen.viz.gallery import PathLike, gallery
from vision3dgen.viz.scene import PALETTE, font

VOID = 255  # of class maps
_SHADES = (1.0, 0.6, 1.5)  # of the palette, the second and third time around


def number_color(number: int) -> np.ndarray:
    """The color (3,) in [0, 1] of a class or an object, from 0."""
    color = np.array(PALETTE[number % len(PALETTE)])
    shade = _SHADES[number // len(PALETTE) % len(_SHADES)]
    return color * shade if shade <= 1 else 1 - (1 - color) / shade


def draw_detections(
    image: Float[Tensor, "3 H W"],
    found: Detections,
    *,
    names: Sequence[str] = (),
    threshold: float = 0.5,
    by: Literal["class", "object"] = "class",
    scores: bool = True,
    camera: Camera | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """The image under the detections with a score of at least `threshold`, the best on top.

    names: of the categories from 1. by: what has a color of its own. scores: whether they are written beside the names.
    camera: shows the silhouettes of `found.meshes`, which are in its frame; its size must be the image's.
    """
    kept = [i for i in found.scores.argsort().tolist() if float(found.scores[i]) >= threshold]
    canvas = _bytes(image)
    colors = {i: number_color(int(found.labels[i]) - 1 if by == "class" else i) for i in kept}
    for i in kept:
        for mask in _masks_of(found, i, camera, (image.shape[1], image.shape[2])):
            canvas = _tinted(canvas, mask, colors[i])
    sheet = Image.fromarray(canvas)
    draw = ImageDraw.Draw(sheet)
    height = max(round(min(canvas.shape[:2]) / 28), 9)
    width = max(round(min(canvas.shape[:2]) / 160), 1)
    for i in kept:
        x1, y1, x2, y2 = found.boxes[i].tolist()
        ink = tuple((255 * colors[i]).round().astype(int).tolist())
        if x2 > x1 and y2 > y1:
            draw.rectangle([x1, y1, max(x2 - 1, x1), max(y2 - 1, y1)], outline=ink, width=width)
        label = int(found.labels[i])
        words = names[label - 1] if label <= len(names) else str(label)
        words += f" {float(found.scores[i]):.2f}" if scores else ""
        _write(draw, (x1, y1), words, ink, height, canvas.shape[:2])
    return np.array(sheet)


def _bytes(image: Tensor) -> np.ndarray:
    return (255 * image.detach().cpu().clamp(0, 1)).round().byte().permute(1, 2, 0).contiguous().numpy()


def _masks_of(found: Detections, index: int, camera: Camera | None, size: tuple[int, int]) -> list[np.ndarray]:
    """What of the picture an object covers: its mask, and the silhouette of its mesh."""
    covered = [] if found.masks is None else [found.masks[index].cpu().numpy()]
    if found.meshes is not None and camera is not None:
        if tuple(camera.image_size) != size:
            raise ValueError(f"the camera's image_size is {camera.image_size}, the image's {size}")
        eye = Camera(torch.eye(3), torch.zeros(3), camera.intrinsics.cpu().float(), camera.image_size)
        mesh = found.meshes[index]
        if not mesh.isempty():
            covered.append(raycast(mesh.detach().cpu(), eye, samples=1).rgba[..., 3].cpu().numpy() > 0.5)
    return covered


def _tinted(canvas: np.ndarray, mask: Bool[np.ndarray, "H W"], color: np.ndarray, strength: float = 0.45) -> np.ndarray:
    """The pixels of a mask mixed with a color, and its border in that color."""
    mixed = canvas.astype(np.float64)
    mixed[mask] += strength * (255 * color - mixed[mask])
    mixed[_border(mask)] = 255 * color
    return mixed.round().astype(np.uint8)


def _border(mask: Bool[np.ndarray, "H W"]) -> Bool[np.ndarray, "H W"]:
    """Pixels of a mask with a neighbor outside."""
    framed = np.pad(mask, 1)
    inner = framed[:-2, 1:-1] & framed[2:, 1:-1] & framed[1:-1, :-2] & framed[1:-1, 2:]
    return mask & ~inner


def _write(
    draw: ImageDraw.ImageDraw, corner: tuple[float, float], words: str, ink: tuple[int, ...], height: int,
    size: tuple[int, ...],
) -> None:  # fmt: skip
    """White words on a plate above a box, below its upper edge where there is no room."""
    face = font(height)
    across = face.getlength(words) + 4
    x = min(max(corner[0], 0), max(size[1] - across, 0))
    y = corner[1] - height - 4
    y = y if y >= 0 else max(corner[1], 0)
    draw.rectangle([x, y, x + across, y + height + 3], fill=ink)
    draw.text((x + 2, y + 1), words, fill=(255, 255, 255), font=face)


def detection_gallery(
    images: Sequence[Tensor],
    truths: Sequence[Detections],
    predictions: Mapping[str, Sequence[Detections]],
    path: PathLike | None = None,
    *,
    names: Sequence[str] = (),
    threshold: float = 0.5,
    by: Literal["class", "object"] = "class",
    cameras: Sequence[Camera] | None = None,
) -> np.ndarray:
    """A row for each image (3, H, W): the truth, then what each detector found with a score of at least `threshold`.

    truths: as detections, whose scores are not looked at. Writes the sheet to `path` as PNG if one is given.
    """
    for name, found in {"truths": truths, **predictions}.items():
        if len(found) != len(images):
            raise ValueError(f"{name} must be {len(images)}, one for each image, got {len(found)}")
    rows = []
    for index, image in enumerate(images):
        camera = None if cameras is None else cameras[index]
        truth = draw_detections(
            image, truths[index], names=names, threshold=-np.inf, by=by, scores=False, camera=camera
        )
        drawn = [
            draw_detections(image, found[index], names=names, threshold=threshold, by=by, camera=camera)
            for found in predictions.values()
        ]
        rows.append([truth, *drawn])
    return gallery(rows, ["truth", *predictions], path=path)


def class_picture(
    classes: Int64[Tensor, "H W"], image: Float[Tensor, "3 H W"] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """A class map in colors, over an image if one is given; white, or the image, where it is 255."""
    numbers = classes.cpu().numpy()
    height, width = numbers.shape
    canvas = np.full((height, width, 3), 255, dtype=np.uint8) if image is None else _bytes(image)
    mixed = canvas.astype(np.float64)
    for number in np.unique(numbers):
        if number != VOID:
            chosen = numbers == number
            mixed[chosen] += (1.0 if image is None else 0.6) * (255 * number_color(int(number)) - mixed[chosen])
    return mixed.round().astype(np.uint8)


def panoptic_picture(
    found: PanopticSegments, image: Float[Tensor, "3 H W"] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Segments in the colors of their classes, with dark lines between them."""
    picture = class_picture(found.semantic(VOID), image)
    numbers = np.pad(found.segments.cpu().numpy(), 1, mode="edge")
    edge = (numbers[1:-1, 1:-1] != numbers[2:, 1:-1]) | (numbers[1:-1, 1:-1] != numbers[1:-1, 2:])
    picture[edge] = 40
    return picture
