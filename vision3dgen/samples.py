"""Predictions beside truths, as the viewer and the report take them: of shapes, of depth, of normals."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vision3dgen.datasets import CATEGORIES, collate
from vision3dgen.metrics import Prediction
from vision3dgen.ops import depth_to_pointclouds
from vision3dgen.parallel import tracked
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds
from vision3dgen.viz import Sample, Voxels, depth_error_picture, depth_picture, normals_picture
from vision3dgen.viz.scene import Shape

MAP_PICTURES: dict[str, Callable[[Tensor], np.ndarray]] = {"depth": depth_picture, "normals": normals_picture}
Predict = Callable[[Mapping[str, Any]], Sequence[Prediction]]


def spread_over(count: int, size: int) -> list[int]:
    """At most `count` indices spread evenly over `size` items, ascending."""
    return sorted({round(i * (size - 1) / max(count - 1, 1)) for i in range(count)}) if size else []


def samples(dataset: Any, count: int, predictors: Mapping[str, Predict], *, takes: str = "image") -> list[Sample]:
    """What each predictor makes of `count` items spread evenly over a dataset, for the viewer, beside what it takes."""
    chosen = tracked(spread_over(count, len(dataset)), title="predicting")
    return [sample_of(dataset[index], predictors, takes=takes) for index in chosen]


def sample_of(item: Mapping[str, Any], predictors: Mapping[str, Predict], *, takes: str = "image") -> Sample:
    """One item and what each predictor makes of it.

    Predicted pictures stand beside the true ones; of depth the shape is the cloud of what its pixels see, colored as
    the image, and without a mesh in the item the truth is that of the true depth.
    """
    image, camera, frame = item.get("image"), item.get("camera"), item.get("frame", Frame("camera"))
    if image is not None and image.ndim == 4:  # of several views the first one is shown
        image, camera = image[0], None if camera is None else camera[0]
    batch = collate([item])
    shapes: dict[str, Shape | None] = {"input": _drawable(item[takes])} if takes != "image" else {}
    pictures: dict[str, np.ndarray] = {}
    truth = item.get("mesh")
    true_depth = item.get("depth")
    if true_depth is not None and truth is None and camera is not None:
        seen = Prediction(maps={"depth": true_depth}, frame=Frame("camera"))
        truth = _in_frame_of(visible_cloud(seen, image, camera), seen, item)
    for name, predict in predictors.items():
        prediction = predict(batch)[0]
        shape = prediction.shape
        if "depth" in prediction.maps:
            shape = None if camera is None else visible_cloud(prediction, image, camera)
        if "normals" not in prediction.maps:
            shapes[name] = _in_frame_of(shape, prediction, item)
        pictures |= _pictures(name, prediction, item)
    return Sample(
        image=image, truth=truth, predictions=shapes, camera=camera, frame=frame, title=title_of(str(item["id"])),
        pictures=pictures, id=str(item["id"]),
    )  # fmt: skip


def title_of(item: str) -> str:
    """An id to read: of "synset/model/view" the category's name, and the model's id in short."""
    synset, *rest = item.split("/")
    if synset not in CATEGORIES or not rest:
        return item
    return " ".join([CATEGORIES[synset], rest[0][:8], *rest[1:]])


def visible_cloud(
    prediction: Prediction, image: Float[Tensor, "3 H W"] | None, camera: Camera | None
) -> Pointclouds | None:
    """What the pixels of predicted depth see, in the camera's axes and the image's colors; None without a camera.

    With a predicted mask, the pixels that are more likely than not on the object.
    """
    depth = prediction.maps.get("depth")
    if depth is None or camera is None:
        return None
    mask = prediction.maps.get("mask")
    fits = image is not None and image.shape[1:] == depth.shape[1:]
    return depth_to_pointclouds(
        depth[None].float(),
        Camera.stack([camera.to(torch.float32)]),
        None if mask is None else mask[None] >= 0.5,
        features=image[None] if image is not None and fits else None,
    )


def _pictures(name: str, prediction: Prediction, item: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Predicted pictures in colors, with the true ones, and of depth with its error."""
    found: dict[str, np.ndarray] = {}
    for kind, draw in MAP_PICTURES.items():
        values, truth = prediction.maps.get(kind), item.get(kind)
        if values is None:
            continue
        if truth is not None:
            found[f"true {kind}"] = draw(truth)
        mask = prediction.maps.get("mask")
        shown = values if mask is None else values.where(mask >= 0.5, 0)
        if kind != "depth" or truth is None:
            found[f"{name} {kind}"] = draw(shown)
            continue
        known = truth[(truth > 0) & truth.isfinite()]
        limits = (float(known.min()), float(known.max())) if len(known) else None
        found[f"{name} depth"] = depth_picture(shown, limits)
        found[f"{name} error"] = depth_error_picture(values, truth)
    return found


def _drawable(given: Any) -> Shape:
    """What a model that takes shapes was given, for the viewer."""
    return Voxels(given > 0.5, GridSpec.cube(len(given))) if isinstance(given, Tensor) else given


def _in_frame_of(
    shape: Meshes | Pointclouds | None, prediction: Prediction, item: Mapping[str, Any]
) -> Meshes | Pointclouds | None:
    """The shape where the item's own mesh is, moved there from the frame of the item's camera."""
    if shape is None or prediction.frame is None or prediction.frame.name != "camera":
        return shape
    points = shape.points_padded() if isinstance(shape, Pointclouds) else shape.verts_padded()
    camera = item["camera"] if item["camera"].translation.ndim == 1 else item["camera"][0]
    world = camera.to(points.dtype).camera_to_world(points[0])
    return shape.update_padded(item.get("frame", Frame("camera")).normalize(world)[None])
