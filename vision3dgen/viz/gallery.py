"""Figures: grids of pictures with titles, comparisons of reconstructions, training and threshold curves.

Colors are those of `scene.PALETTE`, which color-blind readers can tell apart. Grids are drawn with Pillow alone; curves
need matplotlib, and a path ending in .pdf or .svg gives vectors.
"""

import io
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vision3dgen.files import atomic_write, read_jsonl
from vision3dgen.io import write_png
from vision3dgen.structures import Camera
from vision3dgen.viz.scene import (
    PALETTE,
    TRUTH_COLOR,
    Color,
    Job,
    Renderings,
    Sample,
    Shape,
    all_points,
    fit_camera,
    font,
    label,
    render_many,
)

Picture = np.ndarray | Tensor  # (H, W, 3) uint8, or a tensor (3, H, W) in [0, 1]
PathLike = str | os.PathLike[str]

_INK = (40, 40, 40)
_PALE = (110, 110, 110)


# -------------------------------------------------------------------------------------------------------- grids


def gallery(
    rows: Sequence[Sequence[Picture | None]],
    column_titles: Sequence[str] = (),
    row_titles: Sequence[str] = (),
    path: PathLike | None = None,
    *,
    captions: Sequence[Sequence[str]] = (),
    gap: int = 6,
) -> np.ndarray:
    """One picture (H, W, 3) of pictures in rows, written to `path` as PNG if one is given.

    rows: pictures (H, W, 3) uint8 or tensors (3, H, W) in [0, 1], None for an empty cell; rows may differ in length.
    Cells are as large as the largest picture, smaller ones are enlarged. captions: a line under each cell. Row titles
    stand upright at the left; titles too long for their cell end in an ellipsis.
    """
    pictures = [
        [None if cell is None else as_pixels(cell, (i, j)) for j, cell in enumerate(r)] for i, r in enumerate(rows)
    ]
    drawn = [cell for row in pictures for cell in row if cell is not None]
    if not drawn:
        raise ValueError("rows must hold at least one picture")
    columns = max(len(row) for row in pictures)
    for name, titles, count in (("column_titles", column_titles, columns), ("row_titles", row_titles, len(pictures))):
        if titles and len(titles) != count:
            raise ValueError(f"{name} must be {count}, one each, or none; got {len(titles)}")
    if captions and [len(line) for line in captions] != [len(row) for row in pictures]:
        raise ValueError(
            f"captions must be one per cell, {[len(r) for r in pictures]}, got {[len(c) for c in captions]}"
        )

    height, width = (max(cell.shape[axis] for cell in drawn) for axis in (0, 1))
    text = max(round(min(height, width) / 13), 10)  # height of letters
    line = round(text * 1.7)
    left, top, bottom = line * bool(row_titles), line * bool(column_titles), line * bool(captions)
    step_x, step_y = width + gap, height + bottom + gap
    sheet = Image.new("RGB", (left + columns * step_x + gap, top + len(pictures) * step_y + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for j, title in enumerate(column_titles):
        middle = (left + gap + j * step_x + width / 2, gap + top / 2)
        draw.text(middle, _shorten(title, width, text), fill=_INK, font=font(text), anchor="mm")
    for i, row in enumerate(pictures):
        y = top + gap + i * step_y
        if row_titles:
            strip = Image.new("RGB", (height, line), "white")
            words = _shorten(row_titles[i], height, text * 0.85)
            ImageDraw.Draw(strip).text((height / 2, line / 2), words, fill=_PALE, font=font(text * 0.85), anchor="mm")
            sheet.paste(strip.rotate(90, expand=True), (gap // 2, y))
        for j, cell in enumerate(row):
            x = left + gap + j * step_x
            if cell is not None:
                sheet.paste(_fitted(cell, (height, width)), (x, y))
            if captions and captions[i][j]:
                words = _shorten(captions[i][j], width, text * 0.85)
                middle = (x + width / 2, y + height + bottom / 2)
                draw.text(middle, words, fill=_PALE, font=font(text * 0.85), anchor="mm")
    pixels = np.array(sheet)
    if path is not None:
        write_png(path, pixels)
    return pixels


def image_grid(
    images: Sequence[Picture] | Tensor, path: PathLike | None = None, *, columns: int | None = None, gap: int = 2
) -> np.ndarray:
    """Pictures in a grid as near to square as they fill, or with so many `columns`."""
    images = list(images)
    if not images:
        raise ValueError("images must hold at least one picture")
    columns = columns or math.ceil(math.sqrt(len(images)))
    return gallery([images[i : i + columns] for i in range(0, len(images), columns)], path=path, gap=gap)


def reconstruction_gallery(
    samples: Sequence[Sample],
    path: PathLike | None = None,
    *,
    size: tuple[int, int] = (240, 240),
    renderer: str = "auto",
) -> Renderings:
    """A row per sample: its image, each head's shape, the truth; all through the image's camera, or one that fits.

    The image and what is drawn beside it are cut alike to the part where there are shapes. A head that made nothing of
    a sample gets a cell that says so. The result holds the sheet and the renderer used.
    """
    cells = reconstruction_cells(samples, size=size, renderer=renderer)
    columns = list(dict.fromkeys(name for row in cells.rows for name in row))
    last = ["truth"] if "truth" in columns else []
    columns = [name for name in columns if name not in last] + last
    titles = [sample.title for sample in samples]
    captions = [[sample.captions.get(name, "") for name in columns] for sample in samples]
    sheet = gallery(
        [[row.get(name, label("none", size)) for name in columns] for row in cells.rows],
        columns,
        titles if any(titles) else (),
        path,
        captions=captions if any(any(line) for line in captions) else (),
    )
    return Renderings([sheet], cells.renderer)


class Cells(NamedTuple):
    """Pictures of samples one by one, by column: "input", those of `Sample.pictures`, each head, "truth"."""

    rows: list[dict[str, np.ndarray]]  # (H, W, 3) uint8 each
    renderer: str


def reconstruction_cells(
    samples: Sequence[Sample],
    *,
    size: tuple[int, int] = (240, 240),
    colors: Mapping[str, Color] | None = None,
    renderer: str = "auto",
) -> Cells:
    """The cells of `reconstruction_gallery`, for other layouts. colors: of heads, else in the order they come."""
    samples = list(samples)
    if not samples:
        raise ValueError("samples must be at least one")
    heads = list(dict.fromkeys(name for sample in samples for name in sample.predictions))
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(heads)} | dict(colors or {})
    colors["truth"] = TRUTH_COLOR
    jobs: dict[tuple[int, str], Job] = {}
    rows: list[dict[str, np.ndarray]] = []
    for i, sample in enumerate(samples):
        shapes = sample.shapes()
        cut = _cut(sample.camera, sample.image, list(shapes.values()), size)
        given: dict[str, Picture] = {"input": cut.image} if cut.image is not None else {}
        given |= sample.pictures
        rows.append({name: np.array(_fitted(as_pixels(p, (i, j)), size)) for j, (name, p) in enumerate(given.items())})
        for name, shape in shapes.items():
            jobs[i, name] = Job(shape, cut.camera, colors[name])
    result = render_many(list(jobs.values()), size=size, renderer=renderer)
    for (i, name), image in zip(jobs, result.images):
        rows[i][name] = image
    return Cells(rows, result.renderer)


class _Cut(NamedTuple):
    camera: Camera
    image: Tensor | None


def _cut(camera: Camera | None, image: Tensor | None, shapes: Sequence[Shape | None], size: tuple[int, int]) -> _Cut:
    """The camera and the image of the part of a view, as wide to high as `size`, that shapes fill."""
    if camera is None:
        return _Cut(fit_camera(shapes, size), image)
    if not any(shape is not None for shape in shapes):
        return _Cut(camera, image)
    camera = camera.to(torch.float64).to("cpu")
    if image is not None:
        camera = camera.resize((image.shape[1], image.shape[2]))
    height, width = camera.image_size
    pixels, depth = camera.project(all_points(shapes))
    pixels = pixels[(depth > 0)[:, None].expand_as(pixels)].view(-1, 2)
    inside = ((pixels >= 0) & (pixels < torch.tensor([width, height]))).all(1)
    if not bool(inside.any()):
        return _Cut(camera, image)
    low = pixels.amin(0).clamp(min=0)
    high = pixels.amax(0).minimum(torch.tensor([width, height]))
    x, y = ((low + high) / 2).tolist()
    across, down = (1.1 * (high - low)).tolist()
    rows = min(max(down, across * size[0] / size[1]), height, width * size[0] / size[1])
    rows, columns = math.ceil(rows), min(math.ceil(rows * size[1] / size[0]), width)
    top = min(max(round(y - rows / 2), 0), height - rows)
    left = min(max(round(x - columns / 2), 0), width - columns)
    moved = camera.intrinsics.clone()
    moved[..., :2, 2] -= torch.tensor([left, top], dtype=moved.dtype)
    camera = Camera(camera.rotation, camera.translation, moved, (rows, columns))
    return _Cut(camera, None if image is None else image[:, top : top + rows, left : left + columns])


def as_pixels(picture: Picture, cell: tuple[int, int]) -> np.ndarray:
    """The picture as (H, W, 3) uint8; `cell`, its row and column, is named where it is none."""
    if isinstance(picture, Tensor):
        if picture.ndim == 3 and picture.shape[0] in (1, 3) and picture.is_floating_point():
            shown = picture.detach().cpu().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)
            return (shown * 255).round().to(torch.uint8).numpy()
    elif picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3:
        return picture
    raise ValueError(
        f"the picture in row {cell[0]}, column {cell[1]} must be an array (H, W, 3) uint8 or a tensor (3, H, W) "
        f"in [0, 1], got {tuple(picture.shape)} of {picture.dtype}"
    )


def _fitted(picture: np.ndarray, size: tuple[int, int]) -> Image.Image:
    """The picture enlarged to fill a cell, in the middle of it, its proportions kept."""
    image = Image.fromarray(picture)
    if (image.height, image.width) == size:
        return image
    scale = min(size[0] / image.height, size[1] / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    cell = Image.new("RGB", (size[1], size[0]), "white")
    cell.paste(image, ((size[1] - image.width) // 2, (size[0] - image.height) // 2))
    return cell


def _shorten(text: str, width: int, height: float) -> str:
    """The text, or its start and an ellipsis, in at most `width` pixels."""
    face = font(height)
    if face.getlength(text) <= width:
        return text
    while text and face.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."


# ------------------------------------------------------------------------------------------------------- curves


def curves(
    runs: Mapping[str, PathLike | Sequence[Mapping[str, Any]]],
    path: PathLike,
    *,
    keys: Sequence[str] | None = None,
) -> None:
    """Training curves, a panel per quantity and a line per run, against the step.

    runs: metrics.jsonl files (or their records, dicts with "step") by name. keys: what to draw; by default everything
    that ends in "loss" and everything measured on validation ("val/..."). Entries that are missing or null are skipped.
    Quantities that are measured often are drawn pale, with their running mean on top; losses on a logarithmic axis.
    """
    records = {
        name: read_jsonl(Path(run)) if isinstance(run, str | os.PathLike) else list(run) for name, run in runs.items()
    }
    found = list(dict.fromkeys(key for entries in records.values() for entry in entries for key in entry))
    chosen = list(keys) if keys is not None else curve_keys(list(records.values()))
    missing = [key for key in chosen if key not in found]
    if missing or not chosen:
        raise ValueError(f"no curve for {missing or 'any loss or val/ key'}; the records have {sorted(found)}")
    figure, axes = figure_of(len(chosen))
    for axis, key in zip(axes, chosen):
        smallest, largest = math.inf, -math.inf
        for index, (name, entries) in enumerate(records.items()):
            series = [(entry["step"], entry[key]) for entry in entries if entry.get(key) is not None]
            if not series:
                continue
            steps, values = (np.array(column, dtype=float) for column in zip(*series))
            smallest, largest = min(smallest, values.min()), max(largest, values.max())
            color = PALETTE[index % len(PALETTE)]
            dense = len(values) > 60
            if dense:
                axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
                values = _running_mean(values, len(values) // 30)
            axis.plot(steps, values, color=color, label=name, marker="" if dense else "o", markersize=3)
        if key.endswith("loss") and smallest > 0 and largest > 10 * smallest:
            axis.set_yscale("log")
        axis.set_title(key)
        axis.set_xlabel("step")
    _legend(figure, axes)
    save_figure(figure, path)


def curve_keys(runs: Sequence[Sequence[Mapping[str, Any]]]) -> list[str]:
    """What of the records of runs is drawn when nothing is asked for: losses, and what was measured on validation."""
    found = dict.fromkeys(key for entries in runs for entry in entries for key in entry)
    return [key for key in found if key.endswith("loss") or key.startswith("val/")]


def threshold_curve(
    thresholds: Sequence[float] | Tensor,
    scores: Mapping[str, tuple[Sequence[float] | Tensor, Sequence[float] | Tensor]],
    path: PathLike,
    *,
    label: str = "threshold",
) -> None:
    """Precision, recall and F1, their harmonic mean, over the threshold; a line per head.

    thresholds (T,); scores: (precision (T,), recall (T,)) by name, each in [0, 1].
    """
    x = np.asarray(thresholds, dtype=float)
    figure, axes = figure_of(3)
    for index, (name, pair) in enumerate(scores.items()):
        precision, recall = (np.asarray(values, dtype=float) for values in pair)
        if precision.shape != x.shape or recall.shape != x.shape:
            raise ValueError(
                f"precision and recall of {name!r} must be {x.shape} like thresholds, "
                f"got {precision.shape} and {recall.shape}"
            )
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-30)
        for axis, values in zip(axes, (precision, recall, f1)):
            axis.plot(x, values, color=PALETTE[index % len(PALETTE)], label=name)
    for axis, title in zip(axes, ("Precision", "Recall", "F1")):
        axis.set(title=title, xlabel=label, ylim=(-0.02, 1.02))
    _legend(figure, axes)
    save_figure(figure, path)


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Means of the last `window` values, of fewer at the start."""
    total = np.concatenate([[0.0], values.cumsum()])
    stop = np.arange(1, len(total))
    start = np.maximum(stop - max(window, 1), 0)
    return (total[stop] - total[start]) / (stop - start)


def empty_figure(width: float, height: float) -> Any:
    """A matplotlib figure of so many inches, without a window."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('figures need matplotlib: pip install "vision3dgen[viz]"') from error
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def figure_of(panels: int) -> tuple[Any, list[Any]]:
    """A figure without a window and its axes, at most four in a row."""
    columns = min(panels, 4)
    rows = math.ceil(panels / columns)
    figure = empty_figure(3.4 * columns, 2.7 * rows)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.remove()
    for axis in axes[:panels]:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25, linewidth=0.6)
        axis.tick_params(which="both", labelsize=8)
        axis.title.set_fontsize(10)
        axis.xaxis.label.set_fontsize(8)
    return figure, axes[:panels]


def _legend(figure: Any, axes: Sequence[Any]) -> None:
    lines = {text: line for axis in axes for line, text in zip(*axis.get_legend_handles_labels())}
    columns = max(1, min(len(lines), len(axes) * 2))
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=columns, frameon=False, fontsize=9)


def save_figure(figure: Any, path: PathLike) -> None:
    """Write a matplotlib figure as PNG, PDF or SVG, atomically."""
    suffix = Path(path).suffix.lower().lstrip(".") or "png"
    if suffix not in ("png", "pdf", "svg"):
        raise ValueError(f"{path}: figures are written as .png, .pdf or .svg, not .{suffix}")
    content = io.BytesIO()
    figure.savefig(content, format=suffix)
    with atomic_write(path) as file:
        file.write(content.getvalue())
