"""One page of HTML with everything in it: it can be mailed, and opens without a network.

Text is escaped here, data is JSON that the page's script writes with textContent, and the page forbids itself every
request by its Content-Security-Policy. Plotly draws curves and shapes; its script is in the page once.
"""

import base64
import html
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from vision3dgen import __version__
from vision3dgen.files import atomic_write
from vision3dgen.viz.gallery import Picture, as_pixels, curve_keys
from vision3dgen.viz.report import comparison, geometry
from vision3dgen.viz.report.comparison import Comparison, Table, compare, extremes, item_metrics, principal
from vision3dgen.viz.report.record import Evaluation, Record
from vision3dgen.viz.scene import PALETTE, Color, Job, Sample, distance_to_surface

POINTS_OF_A_CURVE = 600
CASES = 10  # worst and best items listed
DASHES = ("solid", "dash", "dot", "dashdot")
_HERE = Path(__file__).parent


def write_page(
    path: str | os.PathLike[str],
    records: Sequence[Record],
    samples: Sequence[Sample] = (),
    drawn: Sequence[Mapping[str, Picture]] = (),
    *,
    names: Mapping[str, str] | None = None,
) -> None:
    """Write the report of these runs as one HTML file; it needs plotly here, and nothing where it is read.

    samples: items to look at, with the predictions of the runs by their names; drawn: as many mappings of pictures of
    them by column, in the order shown. names: titles of categories. Raises ImportError naming the pip line where plotly
    is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise ImportError('reports need plotly: pip install "vision3dgen[viz]"') from error
    if len(samples) != len(drawn):
        raise ValueError(f"drawn must be {len(samples)} mappings, one for each sample, got {len(drawn)}")
    names = names or {}
    found = compare(records)
    colors = {name: _rgb(color) for name, color in run_colors(records).items()}
    style = [(colors[r.name], DASHES[i // len(PALETTE) % len(DASHES)]) for i, r in enumerate(records)]
    curves = _curves(records, style)
    cases = _cases(found.tables, names)
    data = {
        "curves": curves,
        "cases": cases,
        "samples": [_sample(sample) for sample in samples],
        "colors": colors,
        "limits": {"faces": geometry.FACES, "points": geometry.POINTS},
    }
    title = ", ".join(record.name for record in records[:4]) + (" ..." if len(records) > 4 else "")
    sections = [
        ("problems", "Problems", _problems(records)),
        ("scores", "Scores", _scores(found, names)),
        ("curves", "Curves", "".join(f'<div class="chart" id="{chart["place"]}"></div>' for chart in curves)),
        ("shapes", "Shapes", _shapes(records, samples, drawn)),
        ("cases", "Worst and best items", _case_tables(cases)),
        ("samples", "Samples", _pictures(records)),
        ("configuration", "Configuration", _configuration(records)),
        ("environment", "Environment", _environment(records)),
    ]
    sections = [section for section in sections if section[2]]
    bodies = {
        "curves": '<div class="charts">{}</div>',
        "cases": "{}",
    }
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    parts = [
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>",
        "<meta http-equiv='Content-Security-Policy' content=\"default-src 'none'; script-src 'unsafe-inline' "
        "'unsafe-eval'; style-src 'unsafe-inline'; img-src data: blob:; worker-src blob:\">",
        "<meta name='viewport' content='width=device-width, initial-scale=1'><link rel='icon' href='data:,'>",
        f"<title>{_text(title)}</title><style>{(_HERE / 'page.css').read_text(encoding='utf-8')}</style></head><body>",
        f"<header><h1>{_text(title)}</h1><p class='pale'>{len(records)} runs, read {now} by vision3dgen "
        f"{__version__}</p><nav>",
        *(f"<a href='#{place}'>{name}</a>" for place, name, _ in sections),
        "</nav></header><main>",
        *(
            f"<section id='{place}'><h2>{name}</h2>{bodies.get(place, '{}').format(body)}</section>"
            for place, name, body in sections
        ),
        "</main><footer>Shapes: drag to turn, wheel or pinch to come nearer. This page makes no request.</footer>",
        f"<script type='application/json' id='data'>{_script_json(data)}</script>",
        f"<script>{_script(get_plotlyjs())}</script>",
        f"<script>{_script((_HERE / 'page.js').read_text(encoding='utf-8'))}</script></body></html>\n",
    ]
    with atomic_write(path) as file:
        file.write("\n".join(parts).encode("utf-8"))


def run_colors(records: Sequence[Record]) -> dict[str, Color]:
    """The color that each run has in curves and shapes."""
    return {record.name: PALETTE[i % len(PALETTE)] for i, record in enumerate(records)}


# ---------------------------------------------------------------------------------------------- pieces of HTML


def _text(value: Any) -> str:
    return html.escape(str(value), quote=True)


def _script_json(data: Any) -> str:
    """JSON that no content can end early or turn into markup."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _script(source: str) -> str:
    return source.replace("</script", "<\\/script")


def _rgb(color: Sequence[float]) -> str:
    return "#" + "".join(f"{round(255 * value):02x}" for value in color)


def _number(value: float | None, digits: int = 4) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.{digits - 1}e}"


def _cell(shown: str, value: float | None = None, kind: str = "") -> str:
    known = "" if value is None or not math.isfinite(value) else f" data-value='{value!r}'"
    classes = f" class='{kind}'" if kind else ""
    return f"<td{classes}{known}>{shown}</td>"


def _table(heads: Sequence[str], rows: Iterable[str], foot: str = "", *, numbers_from: int = 1) -> str:
    """A table that sorts; heads are text, rows are cells of HTML."""
    cells = "".join(
        f"<th scope='col'{' class=number' if i >= numbers_from else ''}><button type='button'>{_text(h)}</button></th>"
        for i, h in enumerate(heads)
    )
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    foot = f"<tfoot><tr>{foot}</tr></tfoot>" if foot else ""
    table = f"<table class='sortable'><thead><tr>{cells}</tr></thead><tbody>{body}</tbody>{foot}</table>"
    return f"<div class='scroll'>{table}</div>"


def _problems(records: Sequence[Record]) -> str:
    parts = []
    for record in records:
        if record.faults:
            faults = "".join(f"<li>{_text(fault)}</li>" for fault in record.faults)
            parts.append(f"<div class='note'><b>{_text(record.name)}</b><ul>{faults}</ul></div>")
    return "".join(parts)


def _scores(found: Comparison, names: Mapping[str, str]) -> str:
    parts = []
    for table in found.tables:
        parts.append(f"<h3>{_text(table.title)}</h3>")
        evaluation = table.scored[0].evaluation
        cited = evaluation.protocol.get("citation")
        about = f"{len(evaluation.items)} items each" + (f"; protocol {_text(cited)}" if cited else "")
        parts.append(f"<p class='pale'>{about}</p>{_score_table(table)}")
        parts.append(_class_table(table, names))
        protocol = _text(json.dumps(evaluation.protocol, indent=2))
        parts.append(f"<details><summary>The protocol in full</summary><pre>{protocol}</pre></details>")
    if found.refusals:
        entries = "".join(
            f"<li><b>{_text(r.one)}</b> and <b>{_text(r.other)}</b>: {_text('; '.join(r.reasons))}</li>"
            for r in found.refusals
        )
        parts.append(
            "<div class='note' id='refusals'><b>Not compared</b>: these were scored under different protocols or on "
            f"different items, so their numbers stand in different tables.<ul>{entries}</ul></div>"
        )
    return "".join(parts)


def _score_table(table: Table) -> str:
    counts = list(dict.fromkeys(key for scored in table.scored for key in scored.evaluation.counts))
    best = {column: _best(column, [s.evaluation.values.get(column) for s in table.scored]) for column in table.columns}
    rows = []
    for record, evaluation in table.scored:
        cells = [f"<td>{_text(record.name)}</td>"]
        for column in table.columns:
            value, spread = evaluation.values.get(column), evaluation.spread.get(column)
            shown = _number(value) + (f" ± {spread:.1g}" if spread else "")
            kind = "number best" if value is not None and value == best[column] else "number"
            cells.append(_cell(shown, value, kind))
        cells += [_cell(str(n := evaluation.counts.get(key, 0)), n, "number") for key in counts]
        rows.append("".join(cells))
    ceiling = table.scored[0].evaluation.ceiling
    foot = ""
    if ceiling:
        values = [_cell(_number(ceiling.get(column)), None, "number") for column in table.columns]
        foot = "<td>truth against truth</td>" + "".join(values) + "<td></td>" * len(counts)
    return _table(["run", *table.columns, *(key.removeprefix("n_") for key in counts)], rows, foot)


def _best(column: str, values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    better = comparison.direction(column)
    if len(known) < 2 or better is None:
        return None
    return min(known) if better == "smaller" else max(known)


def _class_table(table: Table, names: Mapping[str, str]) -> str:
    """The principal number of each category."""
    metric = principal(table.scored[0].evaluation)
    classes = list(dict.fromkeys(name for s in table.scored for name in s.evaluation.classes))
    if metric is None or len(classes) < 2:
        return ""
    rows = []
    for name in classes:
        values = [s.evaluation.classes.get(name, {}).get(metric) for s in table.scored]
        cells = [_cell(_number(value), value, "number") for value in values]
        rows.append(f"<td>{_text(names.get(name, name) or '-')}</td>{''.join(cells)}")
    body = _table(["category", *(s.record.name for s in table.scored)], rows)
    return f"<details><summary>{_text(metric)} by category</summary>{body}</details>"


def _configuration(records: Sequence[Record]) -> str:
    configured = [record for record in records if record.config]
    if not configured:
        return ""
    parts = []
    differing = comparison.differing_settings(records)
    if len(configured) > 1 and differing:
        rows = [
            f"<td>{_text(key)}</td>" + "".join(f"<td>{'' if v is None else _text(json.dumps(v))}</td>" for v in values)
            for key, values in differing.items()
        ]
        heads = ["what differs", *(record.name for record in configured)]
        parts.append(_table(heads, rows, numbers_from=len(heads)))
    parts += [
        f"<details><summary>{_text(record.name)}</summary><pre>{_text(record.config)}</pre></details>"
        for record in configured
    ]
    return "".join(parts)


def _environment(records: Sequence[Record]) -> str:
    known = [record for record in records if record.environment or record.checkpoints]
    if not known:
        return ""
    keys = list(dict.fromkeys(key for record in known for key in record.environment))
    rows = []
    for record in known:
        values = [record.environment.get(key, "") for key in keys]
        shown = [" ".join(map(str, v)) if isinstance(v, list) else v for v in values]
        last = record.checkpoints[-1].get("step") if record.checkpoints else None
        rows.append(
            f"<td>{_text(record.name)}</td>"
            + "".join(f"<td>{_text(value)}</td>" for value in shown)
            + _cell("-" if last is None else _text(last), last if isinstance(last, int) else None)
        )
    heads = ["run", *keys, "checkpoint of step"]
    return _table(heads, rows, numbers_from=len(heads))


def _pictures(records: Sequence[Record]) -> str:
    """Pictures that runs left in their folders."""
    parts = []
    for record in records:
        for path in record.pictures:
            with Image.open(path) as image:
                source = _image(np.asarray(image.convert("RGB")))
            parts.append(f"<h3>{_text(record.name)}</h3><p class='gallery'><img src='{source}' alt='samples'></p>")
    return "".join(parts)


# ------------------------------------------------------------------------------------------------------- curves


def _curves(records: Sequence[Record], style: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    charts: list[dict[str, Any]] = []
    for key in curve_keys([record.metrics for record in records]):
        lines, smallest, largest = [], math.inf, -math.inf
        for record, (color, dash) in zip(records, style):
            series = [
                (e["step"], e[key]) for e in record.metrics if _is_number(e.get(key)) and _is_number(e.get("step"))
            ]
            if not series:
                continue
            values = [value for _, value in series]
            smallest, largest = min(smallest, *values), max(largest, *values)
            kept = series[:: math.ceil(len(series) / POINTS_OF_A_CURVE)]
            kept += [series[-1]] if kept[-1] != series[-1] else []
            steps, heights = zip(*kept)
            lines.append({"name": record.name, "color": color, "dash": dash, "steps": steps, "values": heights})
        if lines:
            logarithmic = key.endswith("loss") and smallest > 0 and largest > 10 * smallest
            charts.append({"place": f"curve-{len(charts)}", "title": key, "log": logarithmic, "lines": lines})
    return charts


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# -------------------------------------------------------------------------------------------------------- items


def _cases(tables: Sequence[Table], names: Mapping[str, str]) -> list[dict[str, Any]]:
    return [
        {
            "run": record.name,
            "title": f"{record.name}: {table.title}",
            "principal": item_metrics(evaluation).index(principal(evaluation) or ""),
            "metrics": [_metric_cases(evaluation, metric, names) for metric in item_metrics(evaluation)],
        }
        for table in tables
        for record, evaluation in table.scored
        if item_metrics(evaluation)
    ]


def _metric_cases(evaluation: Evaluation, metric: str, names: Mapping[str, str]) -> dict[str, Any]:
    worst, best, labels = extremes(evaluation, metric, CASES)

    def rows(entries: Sequence[comparison.Extreme]) -> list[dict[str, Any]]:
        return [{"id": e.id, "title": _item_title(e.id, e.category, names), "value": e.value} for e in entries]

    return {"name": metric, "worst": rows(worst), "best": rows(best), "labels": labels}


def _item_title(item: str, category: str, names: Mapping[str, str]) -> str:
    named = names.get(category)
    return item if named is None else f"{named} {item.removeprefix(category).lstrip('/')}"


def _case_tables(cases: Sequence[Mapping[str, Any]]) -> str:
    if not cases:
        return ""
    runs = "".join(f"<option value='{i}'>{_text(case['title'])}</option>" for i, case in enumerate(cases))
    halves = "".join(
        f"<div><h3 id='{side}-title'></h3><div class='scroll'><table id='{side}'><tbody></tbody></table></div></div>"
        for side in ("worst", "best")
    )
    return (
        "<div class='controls' id='case-controls'><label>run and protocol<select id='case-run'>"
        f"{runs}</select></label><label>metric<select id='case-metric'></select></label></div>"
        f"<div class='halves'>{halves}</div>"
    )


def _shapes(records: Sequence[Record], samples: Sequence[Sample], drawn: Sequence[Mapping[str, Picture]]) -> str:
    if not samples:
        return ""
    columns = list(dict.fromkeys(column for pictures in drawn for column in pictures))
    known = {record.name for record in records}
    rows = []
    for index, (sample, pictures) in enumerate(zip(samples, drawn)):
        cells = [f"<td>{_text(sample.title)}</td>"]
        for column in columns:
            if column not in pictures:
                cells.append("<td></td>")
                continue
            image = f"<img src='{_image(as_pixels(pictures[column], (index, 0)))}' alt='{_text(column)}'>"
            caption = f"<div>{_text(sample.captions[column])}</div>" if column in sample.captions else ""
            if column in sample.predictions and (column in known or column == "input"):
                places = f"data-sample='{index}' data-head='{_text(column)}'"
                image = f"<button type='button' {places} title='turn this shape'>{image}</button>"
            cells.append(f"<td>{image}{caption}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    heads = "".join(f"<th scope='col'>{_text(head)}</th>" for head in ["item", *columns])
    table = f"<table class='pictures'><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    options = "".join(f"<option value='{i}'>{_text(sample.title)}</option>" for i, sample in enumerate(samples))
    viewer = f"""<div id='viewer' tabindex='0'><div class='controls'>
<label>item<select id='sample'>{options}</select></label><label>run<select id='head'></select></label>
<label>color<select id='color'><option value='plain'>plain</option>
<option value='error'>distance to the truth</option></select></label>
<button type='button' id='previous'>previous</button><button type='button' id='next'>next</button>
<span class='pale'>keys here: n, p item, h run, e color</span></div>
<div class='scenes'><div class='scene'><h3 id='left-title'></h3><div class='view' id='left'></div></div>
<div class='scene'><h3 id='right-title'></h3><div class='view' id='right'></div></div></div></div>"""
    return f"<div class='scroll'>{table}</div>{viewer}"


def _image(picture: np.ndarray) -> str:
    content = io.BytesIO()
    Image.fromarray(picture).save(content, format="WEBP", quality=88)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def _sample(sample: Sample) -> dict[str, Any]:
    """The shapes of an item for the script; distances are to the truth where there is one, in units of its frame."""
    truth = Job(sample.truth).drawn
    shapes: dict[str, Any] = {}
    largest = 0.0
    for name, shape in sample.predictions.items():
        known = Job(shape).drawn
        if known is None:
            shapes[name] = None
            continue
        coarse = geometry.coarsened(known)
        error = None if truth is None else distance_to_surface(coarse, truth)
        if error is not None and len(error):
            largest = max(largest, float(torch.quantile(error.float(), 0.9)))
        shapes[name] = geometry.packed(coarse, error, of=geometry.size(known))
    return {
        "id": sample.id or sample.title,
        "shapes": shapes,
        "truth": None if truth is None else geometry.packed(geometry.coarsened(truth), of=geometry.size(truth)),
        "largest": largest or 1.0,
        **dict(_directions(sample)),
    }


def _directions(sample: Sample) -> Iterator[tuple[str, dict[str, float]]]:
    for name, axis, length in (("up", sample.up, 1.0), ("eye", sample.eye, 1.4)):
        x, y, z = (length * value for value in axis)
        yield name, {"x": x, "y": y, "z": z}
