"""The page about runs: what may stand in one table, half-written folders, hostile names, and the page in a browser."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests.browser import Browser, chromium
from vision3dgen import cli
from vision3dgen.ops import ico_sphere
from vision3dgen.report import write_report
from vision3dgen.structures import Frame, Meshes, Pointclouds
from vision3dgen.viz import Sample, reconstruction_cells
from vision3dgen.viz.report import compare, geometry, read_run, read_runs, write_page
from vision3dgen.viz.report.comparison import LARGER_IS_BETTER, SMALLER_IS_BETTER, direction, extremes, principal

PROTOCOL = {
    "name": "default", "samples": [100, 100], "aggregation": ["class_mean", "per_instance"], "citation": "here",
}  # fmt: skip
CONFIG = {"seed": 0, "model": {"name": "single_view", "head": {"name": "voxels"}}}
ROWS = {"chair/a": 0.1, "chair/b": 0.4, "sofa/c": 0.9, "sofa/d": 0.6, "sofa/e": 0.6}


def make_run(folder: Path, rows: dict[str, float] | None = None, config: Any = None, **protocol: Any) -> Path:
    """A finished run as `train` and `evaluate` leave it, without weights."""
    rows = ROWS if rows is None else rows
    (folder / "evaluation").mkdir(parents=True)
    (folder / "checkpoints" / "step_00000040").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG if config is None else config))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "command": ["vision3dgen", "train"]}))
    lines = [{"step": i, "loss": 1 / i, "val/iou": i / 40 if i % 10 == 0 else None} for i in range(1, 41)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "checkpoints" / "step_00000040" / "meta.json").write_text(json.dumps({"step": 40, "files": {}}))
    header = {"protocol": PROTOCOL | protocol, "seed": 0, "repeats": 2, "about": {"weights": folder.name}}
    write_scores(folder, header, rows)
    return folder


def write_scores(folder: Path, header: dict[str, Any], rows: dict[str, float]) -> None:
    stem = folder / "evaluation" / f"{header['protocol']['name']}_test"
    items = [
        {"id": name, "category": name[:4], "status": "ok", "reason": "", "fault": "",
         "metrics": [{"CD": 1 - f1, "F1@0.05": f1 - 0.01}, {"CD": 1 - f1, "F1@0.05": f1 + 0.01}]}
        for name, f1 in rows.items()
    ]  # fmt: skip
    stem.with_suffix(".jsonl").write_text("".join(json.dumps(line) + "\n" for line in [header, *items]))
    mean = sum(rows.values()) / len(rows)
    classes = {name: {"CD": 1 - f1, "F1@0.05": f1} for name, f1 in {n[:4]: v for n, v in rows.items()}.items()}
    summary = {
        **header, "n_ok": len(rows), "n_empty": 0, "n_failed": 0, "classes": classes, "ceiling": {"CD": 0.0},
        "class_mean": {"CD": 1 - mean, "F1@0.05": mean}, "spread": {"CD": 0.0, "F1@0.05": 0.01},
    }  # fmt: skip
    stem.with_suffix(".json").write_text(json.dumps(summary))


def table_texts(page: str) -> list[list[list[str]]]:
    """The cells of each table that sorts, without markup."""
    tables = re.findall(r"<table class='sortable'>(.*?)</table>", page, re.DOTALL)
    rows = [re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL) for table in tables]
    return [[[re.sub("<.*?>", "", c) for c in re.findall(r"<t[dh].*?</t[dh]>", row)] for row in own] for own in rows]


# ----------------------------------------------------------------------------------------------------- comparing


def test_runs_under_one_protocol_stand_in_one_table(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other", dict.fromkeys(ROWS, 0.5))
    found = compare(read_runs([one, other]))
    assert not found.refusals
    (table,) = found.tables
    assert [scored.record.name for scored in table.scored] == ["one", "other"]
    write_report([one, other], tmp_path / "page.html")
    rows = table_texts((tmp_path / "page.html").read_text())[0]
    assert rows[0] == ["run", "CD", "F1@0.05", "ok", "empty", "failed"]
    assert rows[1] == ["one", "0.4800", "0.5200 ± 0.01", "5", "0", "0"]
    assert rows[2][2] == "0.5000 ± 0.01"
    assert rows[3][0] == "truth against truth"


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"samples": [200, 100]}, "samples: [100, 100] against [200, 100]"),
        ({"name": "meshrcnn"}, 'name: "default" against "meshrcnn"'),
        ({"rows": {"chair/a": 0.1, "lamp/x": 0.2}}, "items: 5 against 2, of which 1 are the same"),
    ],
)
def test_runs_under_different_protocols_are_not_compared_and_the_page_says_why(tmp_path, change, reason):
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "other", **change)]
    found = compare(read_runs(runs))
    assert len(found.tables) == 2
    ((one, other, reasons),) = found.refusals
    assert (one, other) == ("one", "other")
    assert reason in reasons
    write_report(runs, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "Not compared" in page
    assert reason.replace('"', "&quot;") in page
    scores = [table for table in table_texts(page) if table[0][0] == "run" and "CD" in table[0]]
    assert all(len(table) == 3 for table in scores)  # head, one run, ceiling


def test_another_seed_is_no_reason_to_refuse(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    for suffix in ("json", "jsonl"):
        path = other / "evaluation" / f"default_test.{suffix}"
        path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    assert len(compare(read_runs([one, other])).tables) == 1


def test_one_protocol_in_common_is_enough(tmp_path):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    write_scores(one, {"protocol": PROTOCOL | {"name": "onet"}, "seed": 0}, ROWS)
    found = compare(read_runs([one, other]))
    assert not found.refusals
    assert [len(table.scored) for table in found.tables] == [2, 1]


def test_worst_and_best_items(tmp_path):
    (evaluation,) = read_run(make_run(tmp_path / "one")).evaluations
    assert principal(evaluation) == "F1@0.05"
    worst, best, labels = extremes(evaluation, "F1@0.05", 2)
    assert [entry.id for entry in worst] == ["chair/a", "chair/b"]
    assert [entry.id for entry in best] == ["sofa/c", "sofa/e"]
    assert worst[0].value == pytest.approx(0.1)  # the mean of the repeats
    assert labels == ("worst", "best")
    worst, best, _ = extremes(evaluation, "CD", 1)  # smaller is better
    assert (worst[0].id, best[0].id) == ("chair/a", "sofa/c")
    assert [len(part) for part in extremes(evaluation, "CD", 99)[:2]] == [2, 2]  # no item at both ends


def test_every_direction_is_known_and_only_one():
    assert not SMALLER_IS_BETTER & LARGER_IS_BETTER
    assert [direction(name) for name in ("F1@0.1", "IoU (points)", "BLEU-4", "abs_rel", "CD", "made up")] == [
        "larger", "larger", "larger", "smaller", "smaller", None,
    ]  # fmt: skip


def test_every_metric_of_the_package_has_a_direction():
    from vision3dgen.metrics import PROTOCOLS
    from vision3dgen.metrics.depth import DepthErrors
    from vision3dgen.metrics.normals import NormalErrors
    from vision3dgen.metrics.shape import surface_metrics

    names = [name for protocol in PROTOCOLS.values() if protocol.samples for name in surface_metrics(None, protocol)]
    names += [*DepthErrors._fields, *NormalErrors._fields]
    assert {name for name in names if direction(name) is None} == set()


# -------------------------------------------------------------------------------------------------- half written


def _no_config(run: Path) -> None:
    for path in sorted(run.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    "damage, fault",
    [
        (_no_config, "neither a configuration nor a score"),
        (lambda run: (run / "config.yaml").write_bytes(b"a: [1\n"), "the configuration cannot be read"),
        (lambda run: (run / "config.yaml").write_bytes(b"\xff\xfe\x00"), "the configuration cannot be read"),
        (lambda run: (run / "environment.json").unlink(), "training was never started"),
        (lambda run: (run / "environment.json").write_text("[1]"), "environment.json must hold a JSON object"),
        (lambda run: (run / "metrics.jsonl").unlink(), "metrics.jsonl has no entry"),
        (
            lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "loss": 2}\n{"st'),
            "metrics.jsonl, line 2 is cut",
        ),
        (lambda run: (run / "metrics.jsonl").write_text('x\n{"step": 1}\n'), "it and the 1 after it are left out"),
        (lambda run: (run / "checkpoints/step_00000040/meta.json").unlink(), "step_00000040 is not whole"),
        (
            lambda run: (run / "evaluation/default_test.json").unlink(),
            "5 items are scored, the scoring is not finished",
        ),
        (lambda run: (run / "evaluation/default_test.json").write_text("{"), "default_test.json cannot be read"),
        (lambda run: (run / "evaluation/default_test.json").write_text('{"protocol": {"name": 1}}'), "cannot be shown"),
    ],
)
def test_a_half_written_run_is_reported(tmp_path, damage, fault):
    whole, broken = make_run(tmp_path / "whole"), make_run(tmp_path / "broken")
    damage(broken)
    assert any(fault in sentence for sentence in read_run(broken).faults)
    assert cli.main(["report", str(whole), str(broken), "--out", str(tmp_path / "page.html"), "--device", "cpu"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert fault in page
    assert table_texts(page)[0][1][:2] == ["whole", "0.4800"]


def test_a_run_without_data_or_weights_says_so(tmp_path):
    run = make_run(tmp_path / "run")
    write_report([run], tmp_path / "page.html")
    assert "nothing could be predicted" in (tmp_path / "page.html").read_text()


def test_what_is_no_folder_is_an_error(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none"), "--out", str(tmp_path / "page.html")]) == 2
    assert "is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_folder_of_runs_is_its_runs_and_names_stay_apart(tmp_path):
    for name in ("a/x", "a/y", "b/x"):
        make_run(tmp_path / name)
    (tmp_path / "a" / "meshes").mkdir()
    assert [record.name for record in read_runs([tmp_path / "a"])] == ["x", "y"]
    assert [record.name for record in read_runs([tmp_path / "a", tmp_path / "b"])] == ["a/x", "y", "b/x"]
    assert len(read_runs([tmp_path / "a", tmp_path / "a" / "x"])) == 2


def test_scores_without_a_protocol_of_their_own(tmp_path):
    run = make_run(tmp_path / "run")
    scores = {
        "fid": 12.5, "kid": {"mean": 0.01, "std": 0.001}, "seed": 0, "total": 100, "n_failed": 1, "features": 64,
        "manifold": {"precision": 0.5, "recall": 0.25}, "inception": None, "about": {"weights": "x", "extractor": "y"},
    }  # fmt: skip
    (run / "evaluation" / "generation_test.json").write_text(json.dumps(scores))
    generation = read_run(run).evaluations[1]
    assert generation.values == {"fid": 12.5, "kid": 0.01, "precision": 0.5, "recall": 0.25}
    assert generation.protocol == {"name": "generation", "features": 64, "extractor": "y"}
    assert generation.counts == {"n_failed": 1}


# ------------------------------------------------------------------------------------------------------- shapes


def unpacked(entry: dict[str, Any]) -> np.ndarray:
    whole = np.frombuffer(base64.b64decode(entry["points"]), "<u2").reshape(-1, 3)
    return whole * np.array(entry["step"]) + np.array(entry["low"])


def test_shapes_in_the_page_are_exact_to_a_step():
    ball = ico_sphere(2).scale_verts(3.0)
    entry = geometry.packed(ball, torch.arange(162) / 7)
    assert np.abs(unpacked(entry) - ball.verts_packed().numpy()).max() <= max(entry["step"])
    faces = np.frombuffer(base64.b64decode(entry["faces"]), "<u2").reshape(-1, 3)
    assert (faces == ball.faces_packed().numpy()).all()
    assert np.allclose(np.frombuffer(base64.b64decode(entry["error"]), "<f4"), np.arange(162) / 7)
    cloud = geometry.packed(Pointclouds([torch.rand(7, 3)], features=[torch.ones(7, 3)]))
    assert base64.b64decode(cloud["colors"]) == bytes([255] * 21)
    assert cloud["of"] == 7


@pytest.mark.slow
def test_two_million_faces_become_few_that_look_alike():
    side = torch.linspace(0, 1, 1002)
    x, y = torch.meshgrid(side, side, indexing="ij")
    height = 0.2 * torch.sin(7 * x) * torch.cos(5 * y)
    verts = torch.stack([x, height, y], dim=-1).reshape(-1, 3)
    index = torch.arange(1002 * 1002).view(1002, 1002)
    a, b, c, d = (part.reshape(-1) for part in (index[:-1, :-1], index[1:, :-1], index[1:, 1:], index[:-1, 1:]))
    mesh = Meshes([verts], [torch.cat([torch.stack([a, b, c], 1), torch.stack([a, c, d], 1)])])
    assert len(mesh.faces_packed()) > 2_000_000
    small = geometry.coarsened(mesh)
    assert geometry.FACES / 3 < len(small.faces_packed()) <= geometry.FACES
    assert len(geometry.packed(small)["points"]) < 200_000
    found = small.verts_packed()
    true = 0.2 * torch.sin(7 * found[:, 0]) * torch.cos(5 * found[:, 2])
    assert float((found[:, 1] - true).abs().max()) < 0.02
    assert float(small.faces_normals_packed()[:, 1].sign().mean()) == float(mesh.faces_normals_packed()[0, 1].sign())


def test_many_points_are_thinned_with_their_colors():
    points = torch.rand(geometry.POINTS + 1, 3)
    thinned = geometry.coarsened(Pointclouds([points], features=[points]))
    assert len(thinned.points_packed()) == geometry.POINTS
    torch.testing.assert_close(thinned.points_packed(), thinned.features_packed())


# ------------------------------------------------------------------------------------------------------ browser

HOSTILE = "<img src=x onerror=window.caught=1>\"'&</script><script>window.caught=2</script>"
needs_browser = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(chromium() is None, reason="no Chromium or Chrome on this machine (apt install chromium)"),
]


def write_example(folder: Path) -> Path:
    """A page with two runs, one of a hostile name, and shapes of every kind."""
    hostile = HOSTILE.replace("/", "")
    make_run(folder / "one")
    runs = [folder / "one", make_run(folder / hostile, dict.fromkeys(ROWS, 0.5), {"seed": HOSTILE, HOSTILE: 1})]
    records = read_runs(runs)
    ball = ico_sphere(3)
    cloud = Pointclouds([ball.verts_packed()])
    first = Sample(truth=ball, predictions={"one": ball.scale_verts(0.5), hostile: cloud}, title=HOSTILE, id="chair/a")
    second = Sample(truth=ball, predictions={"one": None, hostile: ball}, title="second", id="sofa/c")
    seen = Sample(predictions={"one": cloud}, frame=Frame("camera"), title="seen", id="seen")
    samples = [first, second, seen]
    cells = reconstruction_cells(samples, size=(40, 40), renderer="builtin")
    write_page(folder / "page.html", records, samples, cells.rows, names={"chair": HOSTILE})
    return folder / "page.html"


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    return write_example(tmp_path_factory.mktemp("page"))


def test_names_never_become_markup(example):
    page = example.read_text()
    assert "<img src=x" not in page
    assert "</script><script>window.caught" not in page
    assert page.count("<script") == 3


def test_the_page_asks_for_nothing(example):
    page = example.read_text()
    without_code = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=['\"](?!data:|#)", without_code)
    assert "default-src 'none'" in without_code


@pytest.fixture(scope="module")
def browsers(tmp_path_factory, example):
    opened = {}

    def at(width: int) -> Browser:
        if width not in opened:
            opened[width] = Browser(tmp_path_factory.mktemp("profile"))
            opened[width].open(example, width)
            opened[width].evaluate("document.getElementById('viewer').scrollIntoView({block: 'center'})")
            opened[width].wait("document.getElementById('viewer').dataset.ready === 'yes'")
        return opened[width]

    yield at
    for browser in opened.values():
        browser.close()


@pytest.mark.parametrize("width", [1400, 400])
class TestInTheBrowser:
    pytestmark = needs_browser

    def test_it_opens_without_errors_and_requests(self, browsers, example, width):
        browser = browsers(width)
        assert not [line for line in browser.console if "willReadFrequently" not in line]  # a hint to plotly's authors
        assert {url for url in browser.requests if not url.startswith(("data:", "blob:"))} == {example.as_uri()}
        assert browser.evaluate("window.caught === undefined")
        assert browser.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert browser.evaluate("document.querySelectorAll('.chart svg.main-svg').length") >= 2

    def test_tables_sort(self, browsers, width):
        browser = browsers(width)
        read = "[...document.querySelector('table.sortable').tBodies[0].rows].map(row => row.cells[2].textContent)"
        click = "document.querySelector('table.sortable').tHead.rows[0].cells[2].querySelector('button').click()"
        shown = []
        for _ in range(2):
            browser.evaluate(click)
            shown.append([float(text.split()[0]) for text in browser.evaluate(read)])
        assert shown == [[0.5, 0.52], [0.52, 0.5]]
        head = "document.querySelector('table.sortable').tHead.rows[0].cells[2].getAttribute('aria-sort')"
        assert browser.evaluate(head) == "descending"

    def test_a_shape_turns_and_the_truth_with_it(self, browsers, width):
        browser = browsers(width)
        browser.evaluate("document.getElementById('sample').value = 0")  # whatever other tests have chosen
        browser.evaluate("document.getElementById('sample').dispatchEvent(new Event('change'))")
        browser.wait("document.getElementById('viewer').dataset.shown === 'chair/a one'")
        browser.evaluate("document.getElementById('left').scrollIntoView({block: 'center'})")
        for side in ("left", "right"):
            browser.wait(f"(document.getElementById('{side}')._fullLayout.scene || {{}})._scene")
        eye = "document.getElementById('{}')._fullLayout.scene._scene.getCamera().eye"
        before = [browser.evaluate(eye.format(side)) for side in ("left", "right")]
        box = browser.evaluate(
            "(r => [r.x, r.y, r.width, r.height])(document.getElementById('left').getBoundingClientRect())"
        )
        browser.drag(box[0] + box[2] / 2, box[1] + box[3] / 2, 90, 20)
        browser.wait(f"Math.abs({eye.format('left')}.x - {before[0]['x']}) > 0.2")
        browser.wait(f"Math.abs({eye.format('left')}.x - {eye.format('right')}.x) < 0.01")
        assert before[0] == before[1]

    def test_keys_step_through_items_runs_and_colors(self, browsers, width):
        browser = browsers(width)
        shown = "document.getElementById('viewer').dataset.shown"
        press = "document.getElementById('viewer').dispatchEvent(new KeyboardEvent('keydown', {{key: '{}'}}))"
        browser.evaluate("document.getElementById('sample').value = 0")
        browser.evaluate("document.getElementById('sample').dispatchEvent(new Event('change'))")
        browser.wait(f"{shown} === 'chair/a one'")
        browser.evaluate(press.format("e"))
        browser.wait("document.getElementById('left').data[0].colorbar !== undefined")
        largest = browser.evaluate("Math.max(...document.getElementById('left').data[0].intensity)")
        assert largest == pytest.approx(0.5, abs=0.02)
        browser.evaluate(press.format("e"))
        browser.evaluate(press.format("n"))
        browser.wait(f"{shown} === 'sofa/c one'")
        assert "empty" in browser.evaluate("document.getElementById('left-title').textContent")
        browser.evaluate(press.format("h"))
        browser.wait(f"{shown}.startsWith('sofa/c <img')")
        browser.evaluate(press.format("n"))
        browser.wait(f"{shown} === 'seen one'")
        assert browser.evaluate("document.getElementById('left')._fullLayout.scene.camera.up.y") == -1
        browser.evaluate(press.format("p"))
        browser.wait(f"{shown}.startsWith('sofa/c')")

    def test_worst_items_lead_to_their_shapes(self, browsers, width):
        browser = browsers(width)
        rows = "[...document.getElementById('worst').tBodies[0].rows].map(row => row.textContent)"
        assert [float(text[-6:]) for text in browser.evaluate(rows)] == pytest.approx([0.1, 0.4])
        browser.evaluate("document.querySelector('#worst a').click()")
        browser.wait("document.getElementById('viewer').dataset.shown === 'chair/a one'")
        menu = "document.getElementById('case-metric')"
        browser.evaluate(f"{menu}.value = 0; {menu}.dispatchEvent(new Event('change'))")
        assert browser.evaluate("document.getElementById('worst-title').textContent") == "worst: CD"

    def test_a_shape_is_drawn(self, browsers, width):
        from io import BytesIO

        from PIL import Image

        browser = browsers(width)
        browser.evaluate("document.getElementById('right').scrollIntoView({block: 'center'})")
        browser.wait("document.getElementById('viewer').dataset.shown")
        box = browser.evaluate(
            "(r => [r.x, r.y, r.width, r.height])(document.getElementById('right').getBoundingClientRect())"
        )
        image = np.asarray(Image.open(BytesIO(browser.screenshot())).convert("RGB")).astype(int)
        x, y, w, h = (round(value) for value in box)
        part = image[max(y, 0) : y + h, x : x + w]
        gray = (part.max(-1) < 240) & (np.ptp(part, axis=-1) < 12)
        assert 0.05 < gray.mean() < 0.8  # the truth, a gray ball
