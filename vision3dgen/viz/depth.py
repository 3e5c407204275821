"""Pictures of depth and normals, and sheets that compare predictions with the truth."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from vision3dgen.viz.gallery import PathLike, Picture, gallery
from vision3dgen.viz.scene import colors_of

WHERE_NOTHING = 255  # white


def depth_picture(
    depth: Float[Tensor, "1 H W"], limits: tuple[float, float] | None = None, *, colormap: str = "viridis_r"
) -> UInt8[np.ndarray, "H W 3"]:
    """Depth in colors, near to far from yellow to violet; white where it is not positive and finite.

    limits: the depths at the ends of the colors, those of the picture by default. Needs matplotlib.
    """
    values = depth[0].detach().cpu().double().numpy()
    known = np.isfinite(values) & (values > 0)
    low, high = limits or ((values[known].min(), values[known].max()) if known.any() else (0.0, 1.0))
    share = np.where(known, (values - low) / max(high - low, 1e-12), 0).clip(0, 1)
    colors = colors_of(colormap, share)
    return np.where(known[..., None], (255 * colors).round(), WHERE_NOTHING).astype(np.uint8)


def depth_error_picture(depth: Float[Tensor, "1 H W"], truth: Float[Tensor, "1 H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """|predicted - true| / true from white (0, and where there is no truth) to red (0.2 and more). Needs matplotlib."""
    depth, truth = depth.detach().cpu().float(), truth.cpu().float()
    known = (truth > 0) & truth.isfinite()
    error = ((depth - truth).abs() / truth.where(known, 1)).where(known, 0)
    return (255 * colors_of("Reds", (error[0] / 0.2).clamp(0, 1).double().numpy())).round().astype(np.uint8)


def normals_picture(normals: Float[Tensor, "3 H W"]) -> UInt8[np.ndarray, "H W 3"]:
    """Normals in camera axes as colors: red is right, green up, blue towards the camera; white where there is none."""
    axes = torch.tensor([1.0, -1.0, -1.0]).view(3, 1, 1)
    values = normals.detach().cpu().float() * axes
    known = (values != 0).any(0) & values.isfinite().all(0)
    colors = (255 * (0.5 + 0.5 * values)).round().clamp(0, 255).where(known, WHERE_NOTHING)
    return colors.permute(1, 2, 0).byte().numpy()


def depth_gallery(
    images: Sequence[Picture],
    truths: Sequence[Float[Tensor, "1 H W"]],
    predictions: Mapping[str, Sequence[Float[Tensor, "1 H W"]]],
    path: PathLike | None = None,
    *,
    times: int = 2,
) -> np.ndarray:
    """A row for each image: itself, the truth, each method's depth where there is a truth, and its error there.

    All depths of a row share the colors of its truth; errors |predicted - true| / true go from white (0) to red (0.2
    and more). Pictures are enlarged by whole pixels, `times` as large.
    """
    rows: list[list[Picture]] = []
    for index, (image, truth) in enumerate(zip(images, truths)):
        known = (truth > 0) & truth.isfinite()
        limits = (float(truth[known].min()), float(truth[known].max())) if bool(known.any()) else (0.0, 1.0)
        row: list[Picture] = [image, depth_picture(truth, limits)]
        for pictures in predictions.values():
            found = pictures[index].cpu().where(known, 0)
            row += [depth_picture(found, limits), depth_error_picture(found, truth)]
        rows.append([_enlarged(picture, times) for picture in row])
    titles = ["image", "truth"] + [title for name in predictions for title in (name, "error")]
    return gallery(rows, titles, path=path)


def _enlarged(picture: Picture, times: int) -> Picture:
    if isinstance(picture, Tensor):
        return picture.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
    return picture.repeat(times, axis=0).repeat(times, axis=1)
