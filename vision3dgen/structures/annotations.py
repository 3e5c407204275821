"""What is said of the objects of one image, and what cannot be meant."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def check_annotations(
    image: str, size: tuple[int, int], boxes: Float[Tensor, "N 4"], labels: Int[Tensor, " M"],
    masks: Bool[Tensor, "K H W"] | None = None, *, classes: int | None = None,
) -> None:  # fmt: skip
    """Raise a ValueError naming the image and the annotation that no detector can be trained with, and why.

    size: (height, width) of the image. Boxes (xyxy pixels) must be finite, have an inside, and have some of it in the
    image; labels be from 1 to `classes`; masks be as many as boxes, of the image's size, and have a pixel in their box.
    A box that reaches beyond the image is meant as the part inside it, and an object of one pixel is an object.
    """
    height, width = size
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"image {image!r}: boxes must be (N, 4), got {tuple(boxes.shape)}")
    if len(labels) != len(boxes):
        raise ValueError(f"image {image!r}: there are {len(boxes)} boxes and {len(labels)} labels")
    if masks is not None and (len(masks) != len(boxes) or tuple(masks.shape[1:]) != (height, width)):
        raise ValueError(
            f"image {image!r}: masks must be {(len(boxes), height, width)}, one for each box, at the image's size, got "
            f"{tuple(masks.shape)}"
        )
    inside = [boxes[:, 0] < width, boxes[:, 1] < height, boxes[:, 2] > 0, boxes[:, 3] > 0]
    faults = {
        "is not finite": ~boxes.isfinite().all(1),
        "has no inside: xyxy needs x0 < x1 and y0 < y1": ~(boxes[:, 2:] > boxes[:, :2]).all(1),
        f"lies outside the image of {width} x {height} pixels": ~(inside[0] & inside[1] & inside[2] & inside[3]),
    }
    for fault, found in faults.items():
        if bool(found.any()):
            index = int(found.nonzero()[0])
            raise ValueError(f"image {image!r}, annotation {index}: box {boxes[index].tolist()} {fault}")
    if masks is not None and len(masks):
        apart = _apart(masks, boxes)
        if bool(apart.any()):
            index = int(apart.nonzero()[0])
            raise ValueError(
                f"image {image!r}, annotation {index}: its mask has no pixel in box {boxes[index].tolist()}"
            )
    unknown = labels < 1 if classes is None else (labels < 1) | (labels > classes)
    if bool(unknown.any()):
        index = int(unknown.nonzero()[0])
        raise ValueError(
            f"image {image!r}, annotation {index}: category {int(labels[index])}, but categories are numbered from 1 "
            f"(0 is background){'' if classes is None else f' to {classes}'}"
        )


def _apart(masks: Bool[Tensor, "N H W"], boxes: Float[Tensor, "N 4"]) -> Bool[Tensor, " N"]:
    """Whether no pixel of a mask is in its box."""
    height, width = masks.shape[1:]
    row, column = (torch.arange(count, device=masks.device) for count in (height, width))
    x0, y0, x1, y1 = boxes[:, :, None].unbind(1)
    rows, columns = (row + 1 > y0) & (row < y1), (column + 1 > x0) & (column < x1)  # (N, H), (N, W) that the box meets
    return ~torch.stack([mask[own][:, across].any() for mask, own, across in zip(masks, rows, columns)])
