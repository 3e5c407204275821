"""Non-maximum suppression: of boxes that overlap, the one with the highest score.

`nms` and `batched_nms` follow torchvision.ops. On a CPU the boxes are decided in blocks, highest scores first: a block
against itself, then all that come later against what the block keeps, so that no N x N overlaps are held. On CUDA a
Triton kernel marks who would suppress whom, another goes through the marks once.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vision3dgen.checks import check_choice, check_numbers, check_shape
from vision3dgen.ops.backends import full_precision, import_backend, resolve_backend, triton_runs_on
from vision3dgen.ops.boxes2d import box_iou

BLOCK = 256  # boxes decided at once
OFFERED = ("torch", "torchvision")
LEAST_SCORE = 1e-3  # at which soft suppression stops, as published


@full_precision
def nms(
    boxes: Float[Tensor, "N 4"], scores: Float[Tensor, " N"], iou_threshold: float, *, backend: str | None = None
) -> Int[Tensor, " K"]:
    """Indices of the boxes kept, highest score first; of equal scores the first box.

    A box is left out if it overlaps one that is kept, and has a higher score, by more than `iou_threshold`. NaN scores
    are ValueErrors. Differs: empty boxes overlap nothing.
    """
    check_shape(boxes=(boxes, "N 4"), scores=(scores, "N"))
    check_numbers(scores=scores, boxes=boxes)
    if resolve_backend(backend, offered=OFFERED) == "torchvision":
        return import_backend("torchvision", "torchvision.ops").nms(boxes, scores, iou_threshold)
    order = scores.argsort(descending=True, stable=True)
    return order[_kept(boxes.detach()[order], torch.zeros_like(order), iou_threshold)]


@full_precision
def batched_nms(
    boxes: Float[Tensor, "N 4"],
    scores: Float[Tensor, " N"],
    idxs: Int[Tensor, " N"],
    iou_threshold: float,
    *,
    backend: str | None = None,
) -> Int[Tensor, " K"]:
    """`nms` among the boxes of each group `idxs` (categories, levels, images); the kept of all groups, highest first.

    Differs: groups are kept apart by their numbers; torchvision moves their boxes apart, which rounds coordinates.
    """
    check_shape(boxes=(boxes, "N 4"), scores=(scores, "N"), idxs=(idxs, "N"))
    check_numbers(scores=scores, boxes=boxes)
    if resolve_backend(backend, offered=OFFERED) == "torchvision":
        return import_backend("torchvision", "torchvision.ops").batched_nms(boxes, scores, idxs, iou_threshold)
    order = scores.argsort(descending=True, stable=True)
    return order[_kept(boxes.detach()[order], idxs[order], iou_threshold)]


def _kept(boxes: Float[Tensor, "N 4"], groups: Int[Tensor, " N"], threshold: float) -> Int[Tensor, " K"]:
    """Indices, ascending, of the kept among boxes sorted by descending score."""
    if triton_runs_on(boxes.device.type):
        from vision3dgen.ops import kernels

        if len(boxes) <= kernels.NMS_BOXES:
            return kernels.nms_mask(boxes, groups, threshold).nonzero()[:, 0]
    by_group = groups.argsort(stable=True)
    sizes = groups[by_group].unique_consecutive(return_counts=True)[1].tolist()
    kept = [rows[_kept_of_group(boxes[rows], threshold)] for rows in by_group.split(sizes)] if sizes else [by_group]
    return torch.cat(kept).sort().values


def _kept_of_group(boxes: Float[Tensor, "N 4"], threshold: float) -> Int[Tensor, " K"]:
    rows = torch.arange(len(boxes), device=boxes.device)
    kept = []
    while len(rows):
        block, rows = rows[:BLOCK], rows[BLOCK:]
        own = block[_decided(box_iou(boxes[block], boxes[block]) > threshold)]
        kept.append(own)
        if len(rows):
            rows = rows[~(box_iou(boxes[own], boxes[rows]) > threshold).any(0)]
    return torch.cat(kept)


def _decided(overlaps: Tensor) -> Tensor:
    """Who of a block is kept, given who overlaps whom (N, N).

    Guess that all are kept; who is overlapped by one thought kept before it is not. Each repetition makes the guess
    right for at least one box more, and two like guesses are the answer.
    """
    overlaps = overlaps.triu(1).float()
    kept = overlaps.new_ones(len(overlaps))
    while True:
        again = (kept @ overlaps == 0).float()
        if bool((again == kept).all()):
            return kept.bool()
        kept = again


class Softened(NamedTuple):
    """What soft suppression leaves."""

    indices: Int[Tensor, " K"]
    scores: Float[Tensor, " K"]  # lowered


def soft_nms(
    boxes: Float[Tensor, "N 4"],
    scores: Float[Tensor, " N"],
    iou_threshold: float = 0.3,
    *,
    method: Literal["linear", "gaussian"] = "linear",
    sigma: float = 0.5,
    least: float = LEAST_SCORE,
) -> Softened:
    """The boxes whose score stays at least `least`, highest first.

    The box with the highest score is taken, and the scores of the others are lowered by their overlap u with it, again
    and again: "linear" times 1 - u where u > `iou_threshold`, "gaussian" times exp(-u^2 / sigma). Runs on the CPU.
    Source: Bodla et al. 2017 (arXiv:1704.04503), equations 2 and 3.
    """
    check_shape(boxes=(boxes, "N 4"), scores=(scores, "N"))
    check_numbers(scores=scores, boxes=boxes)
    check_choice("method", method, ("linear", "gaussian"))
    if sigma <= 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    left = scores.detach().cpu().double().clone()
    corners = boxes.detach().cpu().double()
    left[left < least] = -torch.inf
    taken: list[int] = []
    final: list[float] = []
    while len(taken) < len(left):
        best = int(left.argmax())
        if left[best] == -torch.inf:
            break
        taken.append(best)
        final.append(float(left[best]))
        overlap = box_iou(corners[best : best + 1], corners)[0]
        if method == "linear":
            left = left * (1 - overlap).where(overlap > iou_threshold, 1)
        else:
            left = left * (-overlap.square() / sigma).exp()
        left[left < least] = -torch.inf
        left[best] = -torch.inf
    kept = torch.tensor(taken, dtype=torch.int64, device=boxes.device)
    return Softened(kept, torch.tensor(final, dtype=scores.dtype, device=scores.device))
