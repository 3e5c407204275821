"""One evaluation by several processes: the same lines, in the same order, with the same summary as by one."""

import json
import os
from pathlib import Path

import pytest

from tests.test_detection_metrics import batches as detection_batches
from tests.test_detection_metrics import random_records
from tests.test_evaluation import QUICK, make_items, perfect, run, to_batches
from tests.test_parallel import spawn
from vision3dgen.metrics import DetectionEvaluator, evaluate, evaluate_distributed
from vision3dgen.structures import Frame


def batches():
    """Seven items in four batches, of which two processes have two each, three of them two, one and one."""
    return to_batches(make_items(7))


def lines(path: Path) -> list[dict]:
    """A results file without the only entry that may differ."""
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def score(out: Path, predict=perfect, **changes):
    arguments = {"out": out, "seed": 0, "repeats": 2}
    return evaluate_distributed(batches(), predict, QUICK, **arguments | changes).to_dict()


def detect(out: Path) -> dict:
    """Twelve images in three batches: one process has two of them, the other one."""
    images, _ = random_records()

    def predict(batch):
        return [images[int(name)][0] for name in batch["id"]]

    scores = DetectionEvaluator().score("coco_boxes", detection_batches(images), predict, out, seed=0, about={})
    return scores.to_dict()


def broken(batch):
    """The last batch's predictions are in a frame nobody knows, which is an error of the run."""
    predictions = perfect(batch)
    if batch["id"] == batches()[3]["id"]:
        return [prediction._replace(frame=Frame("camera", scale=2.0)) for prediction in predictions]
    return predictions


def as_one_of_two(folder: Path) -> None:
    rank = os.environ["RANK"]
    found: dict = {"fresh": score(folder / "fresh.jsonl"), "detection": detect(folder / "detection.jsonl")}
    try:
        score(folder / "cut.jsonl", broken)
    except (ValueError, RuntimeError) as error:
        found["error"] = f"{type(error).__name__}: {error}"
    found["left"] = sorted(path.name for path in folder.glob("cut*"))
    found["resumed"] = score(folder / "started_by_one.jsonl")
    for name, changes in {"other": {"seed": 1}, "repeats": {"repeats": 0}}.items():
        try:
            score(folder / "fresh.jsonl", **changes)
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(found))


@pytest.mark.slow
def test_two_processes_leave_what_one_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    reference = run(make_items(7), perfect, out=tmp_path / "one.jsonl", repeats=2).to_dict()
    expected = lines(tmp_path / "one.jsonl")
    part = (tmp_path / "one.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "started_by_one.jsonl").write_bytes(b"".join([*part[:3], part[3][:50]]))  # killed in its third item

    detected = detect(tmp_path / "detection_by_one.jsonl")

    spawn(as_one_of_two, 2, tmp_path)
    assert (tmp_path / "detection.jsonl").read_bytes() == (tmp_path / "detection_by_one.jsonl").read_bytes()
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found["fresh"] == found["resumed"] == reference
        assert found["detection"] == json.loads(json.dumps(detected))
        assert "another run: ['seed'] differ" in found["other"]
        assert "repeats must be at least 1" in found["repeats"]
        assert ("ValueError" if rank else "RuntimeError: process 1 failed: ValueError") in found["error"]
        assert "different frames" in found["error"]
        assert found["left"] == ["cut.jsonl", "cut.part0.jsonl", "cut.part1.jsonl"]
    for name in ("fresh", "started_by_one"):
        assert lines(tmp_path / f"{name}.jsonl") == expected
        assert not list(tmp_path.glob(f"{name}.part*"))

    asked = []

    def predict(batch):
        asked.extend(batch["id"])
        return perfect(batch)

    # what the two had finished when one of them failed is not done again by one
    summary = evaluate(batches(), predict, QUICK, out=tmp_path / "cut.jsonl", seed=0, repeats=2)
    assert asked == batches()[3]["id"]
    assert summary.to_dict() == reference
    assert lines(tmp_path / "cut.jsonl") == expected
    assert not list(tmp_path.glob("cut.part*"))


def test_a_group_of_one_is_one_process(tmp_path: Path):
    reference = run(make_items(7), perfect, out=tmp_path / "one.jsonl", repeats=2).to_dict()
    assert score(tmp_path / "alone.jsonl") == reference
    assert lines(tmp_path / "alone.jsonl") == lines(tmp_path / "one.jsonl")
    again = to_batches(make_items(3)) + to_batches(make_items(1))
    with pytest.raises(ValueError, match="comes twice"):
        evaluate_distributed(again, perfect, QUICK, out=tmp_path / "twice.jsonl", seed=0, repeats=1)


def test_parts_of_another_run_are_not_taken_in(tmp_path: Path):
    run(make_items(2), perfect, out=tmp_path / "rows.part0.jsonl", seed=1)
    with pytest.raises(ValueError, match=r"rows.part0.jsonl holds results of another run: \['seed'\] differ"):
        run(make_items(2), perfect, out=tmp_path / "rows.jsonl")
