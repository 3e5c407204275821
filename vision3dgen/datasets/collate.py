"""Items joined into a batch: ragged where they are, no item left out."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vision3dgen.structures import (
    Camera,
    Meshes,
    Pointclouds,
    join_meshes_as_batch,
    join_pointclouds_as_batch,
)

# What an image has any number of: as many rows as objects.
RAGGED = (
    "areas", "boxes", "boxes_visible", "crowd", "difficult", "keypoints", "keypoints_visible", "labels", "masks",
    "proposals", "segment_crowd", "segment_labels",
)  # fmt: skip


def collate(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One batch from items with the same keys.

    Tensors are stacked, `Meshes` and `Pointclouds` joined (their members may differ in size), `Camera`s stacked;
    what an image has any number of (`RAGGED`) and anything else (frames, ids, categories) becomes a list, and so do the
    images and maps of items with boxes where their sizes differ. Raises ValueError, naming the key and the item,
    when keys or the shapes of tensors differ.
    """
    if not items:
        raise ValueError("a batch needs at least one item")
    first = items[0]
    for item in items:
        if set(item) != set(first):
            differ = sorted(set(item) ^ set(first))
            raise ValueError(f"items {_name(item)} and {_name(first)} do not have the same keys: {differ}")
    return {key: _join(key, [item[key] for item in items], items) for key in first}


def _join(key: str, values: list[Any], items: Sequence[Mapping[str, Any]]) -> Any:
    kind = type(values[0])
    if kind is Meshes:
        return join_meshes_as_batch(values)
    if kind is Pointclouds:
        return join_pointclouds_as_batch(values)
    if kind is Camera:
        return Camera.stack(values)
    if key in RAGGED or not isinstance(values[0], Tensor):
        return values
    if "boxes" in items[0] and values[0].ndim >= 2 and len({value.shape[-2:] for value in values}) > 1:
        return values  # a detector takes photographs as they are
    for value, item in zip(values, items):
        if value.shape != values[0].shape:
            raise ValueError(
                f"{key} of {_name(item)} is {tuple(value.shape)}, of {_name(items[0])} {tuple(values[0].shape)}; "
                "ask the dataset for one size, or keep ragged data in Meshes or Pointclouds"
            )
    return torch.stack(values)


def _name(item: Mapping[str, Any]) -> str:
    return repr(item.get("id", "without id"))
