"""Figures of classifiers: learned templates, confusion matrix, accuracy per class, mistakes.

Matplotlib draws them; a path ending in .pdf or .svg gives vectors. Colors can be told apart by color-blind readers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from vision3dgen.viz.gallery import PathLike, Picture, empty_figure, gallery, save_figure
from vision3dgen.viz.scene import PALETTE


def class_templates(templates: Float[Tensor, "K C H W"], names: Sequence[str], path: PathLike) -> None:
    """The weights of a linear classifier, a panel per class, all on one scale.

    One channel is drawn from orange (against the class) over white to violet (for it); three channels as a color
    picture in which gray is zero.
    """
    count, channels = templates.shape[:2]
    if len(names) != count or channels not in (1, 3):
        raise ValueError(
            f"templates must be (K, 1 or 3, H, W) with a name for each of K, got {tuple(templates.shape)} and "
            f"{len(names)} names"
        )
    values = templates.detach().cpu().float().numpy()
    limit = float(np.abs(values).max()) or 1.0
    columns = min(count, 5)
    rows = math.ceil(count / columns)
    figure = empty_figure(1.35 * columns + 0.9 * (channels == 1), 1.55 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    drawn = None
    for axis, name, weights in zip(axes, names, values):
        if channels == 1:
            drawn = axis.imshow(weights[0], cmap="PuOr", vmin=-limit, vmax=limit, interpolation="nearest")
        else:
            axis.imshow((weights.transpose(1, 2, 0) / limit + 1) / 2, interpolation="nearest")
        axis.set_title(name, fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=25)
        bar.set_label("weight", fontsize=8)
        bar.ax.tick_params(labelsize=7)
        bar.outline.set_visible(False)
    save_figure(figure, path)


def confusion_figure(
    confusion: Sequence[Sequence[int]], names: Sequence[str], path: PathLike, *, title: str = ""
) -> None:
    """A confusion matrix: truth by row, prediction by column; shade is the share of the row, numbers are counts.

    Numbers are left out above 25 classes, names above 50.
    """
    matrix = np.asarray(confusion)
    if matrix.shape != (len(names), len(names)):
        raise ValueError(f"confusion must be ({len(names)}, {len(names)}) like names, got {matrix.shape}")
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    side = min(max(0.42 * len(names) + 1.2, 3.2), 9.0)
    figure = empty_figure(side + 0.7, side)
    axis = figure.subplots()
    # Errors are rare: a root makes one in a hundred visible beside the diagonal.
    drawn = axis.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 25:
        for (row, column), count in np.ndenumerate(matrix):
            if count:
                color = "white" if shares[row, column] > 0.4 else "0.15"
                axis.text(column, row, str(count), ha="center", va="center", fontsize=7, color=color)
    if len(names) <= 50:
        longest = max(len(name) for name in names)
        axis.set_xticks(range(len(names)), names, rotation=90 if longest > 3 else 0, fontsize=8)
        axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    axis.set_xlabel("prediction", fontsize=9)
    axis.set_ylabel("truth", fontsize=9)
    axis.set_title(title, fontsize=10)
    bar = figure.colorbar(drawn, ax=axis, shrink=0.8, aspect=25, ticks=[0, 0.1, math.sqrt(0.1), math.sqrt(0.5), 1])
    bar.ax.set_yticklabels(["0", "1 %", "10 %", "50 %", "100 %"], fontsize=7)
    bar.set_label("share of the true class", fontsize=8)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def class_accuracy_figure(accuracies: Mapping[str, Mapping[str, float | None]], path: PathLike) -> None:
    """Accuracy per class, a dot per classifier: `accuracies[classifier][class]`; None is left out."""
    if not accuracies:
        raise ValueError("accuracies must hold at least one classifier")
    classes = list(next(iter(accuracies.values())))
    for name, values in accuracies.items():
        if list(values) != classes:
            raise ValueError(f"the classes of {name!r} are {list(values)}, of the first classifier {classes}")
    known = [v for values in accuracies.values() for v in values.values() if v is not None]
    figure = empty_figure(max(0.5 * len(classes) + 2.6, 4.5), 3.2)
    axis = figure.subplots()
    markers = "osD^vPX*<>"
    for index, (name, values) in enumerate(accuracies.items()):
        aside = 0.7 * ((index + 0.5) / len(accuracies) - 0.5)  # so that no dot hides another
        found = [(place + aside, 100 * v) for place, label in enumerate(classes) if (v := values[label]) is not None]
        places, heights = zip(*found) if found else ((), ())
        axis.plot(
            places, heights, markers[index % len(markers)], color=PALETTE[index % len(PALETTE)], markersize=5,
            label=name, alpha=0.9,
        )  # fmt: skip
    axis.set_xticks(range(len(classes)), classes, rotation=90 if max(map(len, classes)) > 3 else 0, fontsize=8)
    axis.set_ylim(max(100 * min(known, default=0) - 2, 0), 100.5)
    axis.set_ylabel("accuracy, %", fontsize=9)
    axis.set_xlabel("class", fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", alpha=0.25, linewidth=0.6)
    for place in range(1, len(classes)):
        axis.axvline(place - 0.5, color="0.85", linewidth=0.6)
    axis.set_xlim(-0.5, len(classes) - 0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)
    save_figure(figure, path)


def precision_recall_curve(
    curves: Mapping[str, tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]], path: PathLike
) -> None:
    """Precision over recall, a line per class or detector, as steps; curves[name] is (recall, precision), both (T,).

    The legend has the area under each line of steps, the average precision over all points. Recall must not fall.
    """
    if not curves:
        raise ValueError("curves must hold at least one")
    figure = empty_figure(5.2, 3.4)
    axis = figure.subplots()
    styles = ("-", "--", ":", "-.")
    for index, (name, pair) in enumerate(curves.items()):
        recall, precision = (np.asarray(values, dtype=float) for values in pair)
        if recall.shape != precision.shape or recall.ndim != 1 or not len(recall):
            raise ValueError(
                f"recall and precision of {name!r} must be (T,), at least one, got {recall.shape} and {precision.shape}"
            )
        if (np.diff(recall) < 0).any():
            raise ValueError(f"recall of {name!r} must not fall: sort detections by falling score")
        area = float((np.diff(recall, prepend=0) * precision).sum())
        axis.step(
            np.concatenate([[0], recall]), np.concatenate([precision[:1], precision]), where="pre",
            color=PALETTE[index % len(PALETTE)], linestyle=styles[index // len(PALETTE) % len(styles)],
            label=f"{name}  {area:.3f}",
        )  # fmt: skip
    axis.set(xlabel="recall", ylabel="precision", xlim=(-0.01, 1.01), ylim=(-0.02, 1.02))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.tick_params(labelsize=8)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, title="average precision")
    save_figure(figure, path)


def mistakes(
    images: Sequence[Picture], truths: Sequence[str], predictions: Sequence[str], path: PathLike, *, columns: int = 8,
    size: int = 168,
) -> np.ndarray:  # fmt: skip
    """Pictures that were taken for something else, each with "truth > prediction" under it."""
    if not len(images) == len(truths) == len(predictions) or not images:
        raise ValueError(
            "images, truths and predictions must be as many, at least one, got "
            f"{len(images)}, {len(truths)} and {len(predictions)}"
        )
    enlarged: list[Any] = [_enlarged(image, size) for image in images]
    words = [f"{truth} > {prediction}" for truth, prediction in zip(truths, predictions)]
    starts = range(0, len(images), columns)
    return gallery(
        [enlarged[start : start + columns] for start in starts],
        path=path,
        captions=[words[start : start + columns] for start in starts],
    )


def _enlarged(image: Picture, size: int) -> Picture:
    """Small pictures by whole pixels, so that they stay sharp."""
    if not isinstance(image, Tensor):
        return image
    times = max(size // max(image.shape[1:]), 1)
    return image.repeat_interleave(times, dim=1).repeat_interleave(times, dim=2)
