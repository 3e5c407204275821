"""Figures of generators: what each latent does, and what a sample costs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from vision3dgen.viz.gallery import PathLike, figure_of, gallery, save_figure
from vision3dgen.viz.scene import PALETTE

MARKERS = "osD^vPX"  # beside the colors, for those who cannot tell them apart


def latent_traversals(
    moved: Float[Tensor, "L V C H W"],
    values: Sequence[float],
    names: Sequence[str] = (),
    path: PathLike | None = None,
    *,
    times: int = 1,
) -> np.ndarray:
    """One picture (H, W, 3): a row per latent and a column per value it was given, of what `VAE.traverse` gives.

    moved: pictures in [0, 1] of 1 or 3 channels. names: of the latents, their numbers by default. Pictures are enlarged
    by whole pixels, `times` as large.
    """
    latents, steps, channels = moved.shape[:3]
    names = list(names) or [str(index) for index in range(latents)]
    if len(values) != steps or len(names) != latents or channels not in (1, 3):
        raise ValueError(
            f"moved must be (L, V, 1 or 3, H, W) with a name for each of L and a value for each of V, got "
            f"{tuple(moved.shape)}, {len(names)} names and {len(values)} values"
        )
    large = moved.detach().cpu().float().repeat_interleave(times, 3).repeat_interleave(times, 4)
    return gallery([list(row) for row in large], [f"{value:g}" for value in values], names, path, gap=2)


def speed_curves(
    measured: Mapping[str, Mapping[float, float]],
    path: PathLike,
    *,
    size: str = "images in a batch",
    cost: str = "seconds per image",
) -> None:
    """What sampling costs over its size, on logarithmic axes, a line with a mark of its own per method.

    measured: cost by size, by method; both above 0. A path ending in .pdf or .svg gives vectors.
    """
    if not measured or not all(measured.values()):
        raise ValueError("measured must hold at least one method, and each at least one cost")
    bad = {name: dict(found) for name, found in measured.items() if min([*found, *found.values()]) <= 0}
    if bad:
        raise ValueError(f"sizes and costs must be above 0 to stand on logarithmic axes, got {bad}")
    figure, (axis,) = figure_of(1)
    for index, (name, found) in enumerate(measured.items()):
        sizes = sorted(found)
        axis.loglog(
            sizes, [found[each] for each in sizes], marker=MARKERS[index % len(MARKERS)], markersize=4,
            color=PALETTE[index % len(PALETTE)], label=name,
        )  # fmt: skip
    axis.set(xlabel=size, ylabel=cost)
    axis.yaxis.label.set_fontsize(8)
    _legend_right(figure, axis)
    save_figure(figure, path)


def _legend_right(figure: Any, axis: Any) -> None:
    figure.set_size_inches(5.2, 3.0)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
