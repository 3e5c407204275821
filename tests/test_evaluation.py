import dataclasses
import json
import math
import multiprocessing
import os
import time

import pytest
import torch
import trimesh

from vision3dgen.config import construct
from vision3dgen.experiment import Batches
from vision3dgen.metrics import PROTOCOLS, Prediction, ShapeEvaluator, evaluate, read_results, summarize
from vision3dgen.metrics.protocols import PointIoU, VoxelIoU
from vision3dgen.metrics.shape import generator
from vision3dgen.ops import sample_points_from_meshes
from vision3dgen.structures import Camera, Frame, GridSpec, Meshes, Pointclouds, join_meshes_as_batch

CHAIR, TABLE = "03001627", "04379243"
QUICK = dataclasses.replace(
    PROTOCOLS["default"],
    name="quick",
    samples=(211, 211),
    iou=(
        VoxelIoU(5, threshold=0.5, comparator=">="),
        PointIoU(101, box=0.55, source="mesh", threshold=None, comparator=None),
        PointIoU(101, box=0.55, source="network", threshold=0.2, comparator=">="),
    ),
)


def box(*size) -> Meshes:
    mesh = trimesh.creation.box(size)
    return Meshes([torch.tensor(mesh.vertices, dtype=torch.float32)], [torch.tensor(mesh.faces)])


def inside(points, size):
    return (points.abs() < torch.as_tensor(size) / 2).all(-1)


def make_items(count=6):
    """One dict per item: boxes in two classes, with all that a protocol may ask for."""
    items = []
    for index in range(count):
        size = (1.0, 0.5 + 0.05 * index, 0.7)
        points = torch.rand(127, 3, generator=torch.Generator().manual_seed(index)) * 1.1 - 0.55
        mesh = box(*size)
        surface, normals = sample_points_from_meshes(
            mesh, 700, return_normals=True, generator=torch.Generator().manual_seed(index)
        )
        items.append(
            {
                "id": f"{(CHAIR, TABLE)[index % 3 == 0]}/model{index}/00",
                "category": (CHAIR, TABLE)[index % 3 == 0],
                "frame": Frame("object", (0.1, 0.2, 0.3), 2.0),
                "mesh": mesh,
                "surface": Pointclouds(surface, normals),
                "voxels": inside(GridSpec.cube(5).points(), size).float(),
                "points": points,
                "occupancies": inside(points, size).float(),
                "camera": Camera.from_r2n2(30.0 * index, 25.0, 0.8),
            }
        )
    return items


def to_batches(items, size=2):
    batches = []
    for start in range(0, len(items), size):
        part = items[start : start + size]
        batch = {key: [item[key] for item in part] for key in ("id", "category", "frame")}
        batch |= {key: torch.stack([item[key] for item in part]) for key in ("voxels", "points", "occupancies")}
        batch["mesh"] = join_meshes_as_batch([item["mesh"] for item in part])
        batch["surface"] = Pointclouds(
            [item["surface"].points_packed() for item in part], [item["surface"].normals_packed() for item in part]
        )
        batch["camera"] = Camera.stack([item["camera"] for item in part])
        batches.append(batch)
    return batches


def perfect(batch):
    return [
        Prediction(
            shape=batch["mesh"][index],
            voxels=batch["voxels"][index],
            occupancy=lambda points, mesh=batch["mesh"][index]: inside(points, 2 * mesh.verts_packed().amax(0)).float(),
            frame=batch["frame"][index],
        )
        for index in range(len(batch["id"]))
    ]


def unit_cube(batch):
    return [Prediction(shape=box(1, 1, 1), frame=frame) for frame in batch["frame"]]


def run(items=None, predict=unit_cube, protocol=QUICK, size=2, **changes):
    arguments = {"out": None, "seed": 0, "repeats": 1}
    return evaluate(to_batches(items or make_items(), size), predict, protocol, **arguments | changes)


def without(predict, broken):
    """`predict` with other predictions for some ids."""
    return lambda batch: [broken.get(name, p) for name, p in zip(batch["id"], predict(batch))]


IDS = [item["id"] for item in make_items()]

# ------------------------------------------------------------------------------------------------- what it says


def test_a_perfect_prediction_reaches_its_ceiling_and_full_iou():
    summary = run(predict=perfect, repeats=2)
    assert (summary.n_ok, summary.n_empty, summary.n_failed) == (6, 0, 0)
    for name in ("IoU (voxels 5)", "IoU (points)", "IoU (points, network)"):
        assert summary.class_mean[name] == 1
        assert name not in summary.ceiling  # nothing is sampled
    for name, value in summary.ceiling.items():
        assert summary.headline[name] == pytest.approx(value, rel=0.15, abs=0.02)
    assert summary.points == {"prediction": [211, 211], "target": [211, 211], "ceiling": [211, 211]}


def test_averages_over_items_and_over_classes():
    summary = run()
    rows = {name: run([item]).per_instance["CD"] for name, item in zip(IDS, make_items())}
    by_class = {c: [v for name, v in rows.items() if name.startswith(c)] for c in (CHAIR, TABLE)}
    assert {c: len(v) for c, v in by_class.items()} == summary.class_sizes == {CHAIR: 4, TABLE: 2}
    means = {c: sum(v) / len(v) for c, v in by_class.items()}
    assert {c: summary.classes[c]["CD"] for c in means} == pytest.approx(means)
    assert summary.class_mean["CD"] == pytest.approx(sum(means.values()) / 2)
    assert summary.per_instance["CD"] == pytest.approx(sum(rows.values()) / 6)
    assert summary.headline is summary.class_mean
    assert run(protocol=dataclasses.replace(QUICK, aggregation=("per_instance",))).headline["CD"] == pytest.approx(
        summary.per_instance["CD"]
    )


def test_neither_order_nor_batch_size_matters():
    items = make_items()
    reference = run(items, repeats=2).to_dict()
    assert run(items[::-1], size=3, repeats=2).to_dict() == reference
    assert run(items, size=1, repeats=2, seed=1).to_dict() != reference


def test_the_spread_is_over_repeats_of_the_average(tmp_path):
    single = [run(repeats=1), run(repeats=3)]
    assert single[0].spread["CD"] is None
    assert 0 < single[1].spread["CD"] < 0.1 * single[1].class_mean["CD"]
    assert single[1].spread["IoU (points)"] == 0
    protocol = dataclasses.replace(QUICK, aggregation=("per_instance",))
    summary = run(protocol=protocol, repeats=3, out=tmp_path / "rows.jsonl")
    rows = read_results(tmp_path / "rows.jsonl")[1]
    averages = [sum(row["metrics"][repeat]["CD"] for row in rows) / 6 for repeat in range(3)]
    assert summary.per_instance["CD"] == pytest.approx(sum(averages) / 3)
    assert summary.spread["CD"] == pytest.approx(float(torch.tensor(averages, dtype=torch.float64).std()))


def test_ious_are_what_they_should_be():
    summary = run(make_items(1))
    item = make_items(1)[0]
    order = torch.randperm(127, generator=generator(0, item["id"], 0, "points"))[:101]
    truth = item["occupancies"][order].bool()
    cube = inside(item["points"][order], (1.0, 1.0, 1.0))
    assert summary.per_instance["IoU (points)"] == pytest.approx(float((truth & cube).sum() / (truth | cube).sum()))
    assert "IoU (voxels 5)" not in summary.scored  # the prediction has neither voxels nor an occupancy function


def test_voxels_come_from_the_occupancy_function_at_cell_centers():
    def predict(batch):
        return [p._replace(voxels=None) for p in perfect(batch)]

    assert run(predict=predict).class_mean["IoU (voxels 5)"] == 1


def test_clouds_have_no_inside():
    def predict(batch):
        return [Prediction(shape=batch["surface"][i], frame=f) for i, f in enumerate(batch["frame"])]

    summary = run(predict=predict)
    assert not [name for name in summary.scored if name.startswith("IoU")]
    assert summary.class_mean["|NC|"] > 0.5


def test_tables_and_dicts():
    summary = run(protocol=dataclasses.replace(QUICK, name="mine"), repeats=2)
    text = summary.to_markdown()
    for part in (
        CHAIR,
        "**class mean**",
        "per instance",
        "ceiling",
        "std of 2 repeats",
        "F1@0.02",
        "n_failed 0",
        "seed 0",
    ):
        assert part in text
    assert "Precision" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.replace("\\|", "").count("|") for line in rows}) == 1
    assert json.loads(json.dumps(summary.to_dict(), allow_nan=False))["protocol"]["name"] == "mine"


@pytest.mark.parametrize(
    "name, columns",
    [
        ("meshrcnn", ["CD", "F1@0.3 (%)", "|NC|"]),
        ("pixel2mesh", ["CD (x1000)", "F1@d2<0.0001 (%)"]),
        ("onet", ["CD (x10)", "|NC|", "IoU (points)"]),
        ("convonet", ["F1@0.01"]),
        ("atlasnet", ["CD (x1000)", "F1@d2<0.001"]),
        ("r2n2", ["IoU (voxels 32)"]),
    ],
)
def test_units_are_in_the_names(name, columns):
    protocol = PROTOCOLS[name]
    samples = None if protocol.samples is None else (101, 101)
    iou = tuple(dataclasses.replace(i, points=101) if isinstance(i, PointIoU) else i for i in protocol.iou)
    items = make_items(2)
    for item in items:
        item["voxels"] = torch.zeros(32, 32, 32)
    summary = run(items, perfect, dataclasses.replace(protocol, samples=samples, iou=iou))
    assert summary.n_ok == (0 if name == "r2n2" else 2)
    assert summary.n_empty == (2 if name == "r2n2" else 0)  # nothing occupied
    assert set(columns) <= set(summary.headline)
    assert "%" not in "".join(summary.headline) or protocol.f_score.unit == "percent"


# ----------------------------------------------------------------------------------------------- empty, failed

EMPTY = Meshes([torch.zeros(0, 3)], [torch.zeros(0, 3, dtype=torch.int64)])
NAN = Meshes([torch.full((3, 3), math.nan)], [torch.tensor([[0, 1, 2]])])


def test_empty_and_failed_predictions_are_counted_and_score_zero():
    frame = make_items(1)[0]["frame"]
    broken = {
        IDS[0]: Prediction(frame=frame),
        IDS[1]: Prediction(shape=EMPTY, frame=frame),
        IDS[2]: Prediction(shape=NAN, frame=frame),
        IDS[3]: Prediction(failure="time-out after 5 s"),
    }
    summary = run(predict=without(unit_cube, broken))
    full = run()
    assert (summary.n_ok, summary.n_empty, summary.n_failed) == (2, 2, 2)
    assert summary.empty == sorted(IDS[:2])
    assert summary.failures == {
        IDS[2]: "prediction: vertex 0 is [nan, nan, nan]",
        IDS[3]: "time-out after 5 s",
    }
    assert summary.scored["CD"] == 2
    assert summary.scored["F1@0.05"] == summary.scored["IoU (points)"] == 6
    kept = [run([item]).per_instance for item in make_items()[4:]]
    for name in ("F1@0.05", "IoU (points)"):
        assert summary.per_instance[name] == pytest.approx(sum(k[name] for k in kept) / 6)
        assert summary.per_instance[name] < full.per_instance[name]
    assert summary.per_instance["CD"] == pytest.approx(sum(k["CD"] for k in kept) / 2)
    text = summary.to_markdown()
    assert "n_ok 2, n_empty 2, n_failed 2" in text
    assert f"Failed: {IDS[3]}: time-out after 5 s" in text


def test_what_an_empty_prediction_lacks_counts_as_zero():
    summary = run(predict=without(perfect, {IDS[0]: Prediction()}))
    assert summary.scored["IoU (voxels 5)"] == summary.scored["IoU (points, network)"] == 6
    assert summary.per_instance["IoU (voxels 5)"] == summary.per_instance["IoU (points, network)"] == 5 / 6


def test_an_exception_in_predict_fails_its_batch_with_the_reason():
    def predict(batch):
        if IDS[2] in batch["id"]:
            raise RuntimeError("out of luck")
        return unit_cube(batch)

    summary = run(predict=predict)
    assert summary.n_failed == 2
    assert summary.failures[IDS[3]] == "predict: RuntimeError: out of luck"


def test_nan_probabilities_fail():
    def predict(batch):
        return [p._replace(voxels=p.voxels * math.nan) for p in perfect(batch)]

    summary = run(predict=predict)
    assert summary.n_failed == 6
    assert "voxels must be finite" in next(iter(summary.failures.values()))


def test_when_all_fail_the_table_says_so():
    summary = run(predict=lambda batch: [Prediction(failure="no")] * len(batch["id"]))
    assert (summary.n_failed, summary.class_mean["F1@0.01"]) == (6, 0)
    assert "CD" not in summary.scored
    assert "n_failed 6" in summary.to_markdown()


def test_a_broken_target_is_counted_and_averaged_nowhere():
    items = make_items()
    items[1]["mesh"] = NAN
    summary = run(items)
    assert summary.n_failed == 1
    assert summary.failures[IDS[1]].startswith("target: vertex 0")
    assert summary.scored["F1@0.05"] == 5
    items[1]["mesh"] = make_items()[1]["mesh"].scale_verts(3.0)
    strict = dataclasses.replace(QUICK, scale=PROTOCOLS["onet"].scale)
    assert "longest edge" in run(items, protocol=strict).failures[IDS[1]]


def test_no_items_at_all():
    summary = evaluate([], unit_cube, QUICK, out=None, seed=0, repeats=1)
    assert (summary.n_ok, summary.class_mean) == (0, {})
    assert "n_ok 0" in summary.to_markdown()


# -------------------------------------------------------------------------------------------------- resuming


def test_a_run_cut_anywhere_resumes_to_the_same_result(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    reference = run(out=path, repeats=2).to_dict()
    whole = path.read_bytes()
    assert len(whole.splitlines()) == 7
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    for cut in (0, 10, ends[0], ends[0] + 5, ends[2], ends[2] + 40, ends[5] - 1, ends[6]):
        path.write_bytes(whole[:cut])
        calls = []

        def predict(batch, calls=calls):
            calls.extend(batch["id"])
            return unit_cube(batch)

        assert run(predict=predict, out=path, repeats=2).to_dict() == reference
        kept = max(whole[:cut].count(b"\n") - 1, 0)
        assert len(calls) == (6 - kept + 1) // 2 * 2  # whole batches that have something left
        again = [
            {k: v for k, v in json.loads(line).items() if k != "seconds"} for line in path.read_bytes().splitlines()
        ]
        first = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in whole.splitlines()]
        assert again == first


def test_rows_hold_what_they_should(tmp_path):
    run(out=tmp_path / "rows.jsonl", repeats=2, about={"checkpoint": "abc"})
    header, rows = read_results(tmp_path / "rows.jsonl")
    assert header["about"] == {"checkpoint": "abc"}
    assert header["protocol"] == QUICK.to_dict()
    assert [row["id"] for row in rows] == IDS
    assert set(rows[0]) == {
        "id",
        "category",
        "status",
        "reason",
        "fault",
        "metrics",
        "ceiling",
        "points",
        "unmeasured",
        "seconds",
    }
    assert len(rows[0]["metrics"]) == 2
    assert rows[0]["seconds"] >= 0


def test_shards_written_apart_are_summarized_together(tmp_path):
    items = make_items()
    for shard in range(2):
        run(items[shard::2], out=tmp_path / f"{shard}.jsonl")
    parts = [read_results(tmp_path / f"{shard}.jsonl") for shard in range(2)]
    assert parts[0][0] == parts[1][0]
    assert summarize(parts[0][0], parts[0][1] + parts[1][1]).to_dict() == run(items).to_dict()


@pytest.mark.parametrize("changes", [{"seed": 1}, {"repeats": 2}, {"about": {"checkpoint": "new"}}])
def test_results_of_another_run_are_never_mixed_in(tmp_path, changes):
    path = tmp_path / "rows.jsonl"
    run(out=path)
    content = path.read_bytes()
    with pytest.raises(ValueError, match=f"another run: \\['{next(iter(changes))}'\\] differ"):
        run(out=path, **changes)
    with pytest.raises(ValueError, match="protocol"):
        run(out=path, protocol=dataclasses.replace(QUICK, samples=(100, 100)))
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"not json\n", b"[1]\n", b'{"a": 1}\n', b"a file of somebody else"])
def test_other_files_are_left_alone(tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.txt"):
        run(out=path)
    assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    run(out=path)
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([*lines[:3], lines[3][:20], *lines[4:], b""]))
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 4: not JSON"):
        run(out=path)
    with pytest.raises(ValueError, match="line 4"):
        read_results(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="no header"):
        read_results(path)


# ----------------------------------------------------------------------------------------------------- frames


def test_frames_that_differ_stop_the_run():
    def predict(frame):
        return lambda batch: [Prediction(shape=box(1, 1, 1), frame=frame)] * len(batch["id"])

    for frame, message in (
        (None, "no frame"),
        (Frame("object"), "different frames"),
        (Frame("object", (0.1, 0.2, 0.3), 1.0), "different frames"),
        (Frame("camera", scale=2.0), "different frames"),
    ):
        with pytest.raises(ValueError, match=message):
            run(predict=predict(frame))
    voxels = torch.zeros(5, 5, 5)
    with pytest.raises(ValueError, match="different frames"):
        run(predict=lambda batch: [Prediction(voxels=voxels, frame=Frame("camera"))] * len(batch["id"]))


def in_camera(batch):
    """The truth as a viewer-centered network would predict it."""
    predictions = []
    for index, frame in enumerate(batch["frame"]):
        camera = batch["camera"][index].to(torch.float32)
        verts = camera.world_to_camera(frame.denormalize(batch["mesh"][index]).verts_packed())
        predictions.append(Prediction(shape=Meshes([verts], batch["mesh"][index].faces_list()), frame=Frame("camera")))
    return predictions


@pytest.mark.parametrize("name", ["meshrcnn", "quick"])
def test_predictions_of_either_frame_score_the_same(name):
    protocol = QUICK if name == "quick" else dataclasses.replace(PROTOCOLS[name], samples=(211, 211))
    viewer, canonical = run(predict=in_camera, protocol=protocol), run(predict=perfect, protocol=protocol)
    assert viewer.n_ok == canonical.n_ok == 6
    for column, value in viewer.headline.items():
        assert value == pytest.approx(canonical.headline[column], abs=0.02, rel=0.02)


def test_clouds_turn_with_their_normals():
    protocol = dataclasses.replace(PROTOCOLS["meshrcnn"], target="surface", samples=(None, None), empty="exclude")

    def predict(batch):
        return [Prediction(shape=batch["surface"][i], frame=f) for i, f in enumerate(batch["frame"])]

    summary = run(predict=predict, protocol=protocol)
    assert summary.per_instance["CD"] == 0
    assert summary.per_instance["|NC|"] == pytest.approx(1)
    against_mesh = dataclasses.replace(PROTOCOLS["meshrcnn"], samples=(None, 500), empty="exclude")
    assert run(predict=predict, protocol=against_mesh).per_instance["|NC|"] > 0.9


# -------------------------------------------------------------------------------------------------- bad input


def test_bad_input_stops_the_run():
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        run(repeats=0)
    with pytest.raises(ValueError, match="comes twice"):
        run(make_items(2) * 2)
    with pytest.raises(ValueError, match="one Prediction per item, got 1 for 2"):
        run(predict=lambda batch: unit_cube(batch)[:1])
    with pytest.raises(ValueError, match=r"needs the batch keys \['mesh'\]"):
        evaluate([{"id": [], "category": [], "frame": []}], unit_cube, QUICK, out=None, seed=0, repeats=1)
    with pytest.raises(ValueError, match="needs 100000 points"):
        run(protocol=PROTOCOLS["onet"])
    with pytest.raises(ValueError, match=r"needs voxels of 32\^3"):
        run(protocol=PROTOCOLS["r2n2"])
    with pytest.raises(ValueError, match="the prediction is a mesh"):
        run(protocol=PROTOCOLS["what3d"])
    items = make_items()
    items[4]["points"] = items[4]["points"] * 2
    with pytest.raises(ValueError, match=r"needs points in \[-0.55, 0.55\]\^3"):
        run(items)
    items = make_items()
    items[3]["id"] = f"{TABLE}/model3/01"
    with pytest.raises(ValueError, match="scores view 0 of each model"):
        run(items, protocol=PROTOCOLS["atlasnet"])


def test_wrong_voxels_fail_their_item():
    def predict(batch):
        return [Prediction(voxels=torch.zeros(3, 3, 3), frame=f) for f in batch["frame"]]

    assert "voxels must be (5, 5, 5)" in run(predict=predict).failures[IDS[0]]


# ------------------------------------------------------------------------------------------------- bad input, per item


def test_a_prediction_that_is_all_inside_has_the_truths_share():
    def predict(batch):
        box_of_all = box(1.1, 1.1, 1.1)
        full = [torch.ones(5, 5, 5)] * len(batch["id"])
        return [
            Prediction(box_of_all, voxels, lambda points: torch.ones(len(points)), frame)
            for voxels, frame in zip(full, batch["frame"])
        ]

    summary = run(make_items(1), predict)
    item = make_items(1)[0]
    order = torch.randperm(127, generator=generator(0, item["id"], 0, "points"))[:101]
    share = float(item["occupancies"][order].mean())
    assert summary.per_instance["IoU (points)"] == pytest.approx(share)
    assert summary.per_instance["IoU (points, network)"] == pytest.approx(share)
    assert summary.per_instance["IoU (voxels 5)"] == pytest.approx(float(item["voxels"].mean()))


def test_a_surface_that_cuts_itself_has_the_inside_of_its_parts():
    def halves(batch):
        predictions = []
        for mesh, frame in zip(batch["mesh"], batch["frame"]):
            verts, faces = mesh.get_mesh_verts_faces(0)
            low, high = (verts * torch.tensor([0.7, 1, 1]) + torch.tensor([s * 0.15, 0, 0]) for s in (-1, 1))
            both = Meshes([torch.cat([low, high])], [torch.cat([faces, faces + len(verts)])])
            predictions.append(Prediction(both, frame=frame))
        return predictions

    assert run(predict=halves).per_instance["IoU (points)"] == 1


def test_missing_truth_is_said_and_never_scored():
    def only(batch, *keys):
        return {key: value for key, value in batch.items() if key not in keys}

    summary = run(predict=perfect)
    assert summary.unmeasured == {}
    batches = [only(batch, "voxels", "occupancies") for batch in to_batches(make_items())]
    known = {name: p for batch in to_batches(make_items()) for name, p in zip(batch["id"], perfect(batch))}

    def predict(batch):
        return [known[name] for name in batch["id"]]

    partial = evaluate(batches, predict, QUICK, out=None, seed=0, repeats=1)
    assert partial.n_ok == 6
    assert partial.headline["CD"] == summary.headline["CD"]
    assert partial.unmeasured["IoU (voxels 5)"] == {"the truth has no voxels": 6}
    assert partial.unmeasured["IoU (points)"] == {"the truth has no occupancies": 6}
    assert "Not measured: IoU (voxels 5): the truth has no voxels (6 items)" in partial.to_markdown()
    volumes = dataclasses.replace(PROTOCOLS["r2n2"], iou=QUICK.iou[:1])
    nothing = evaluate(batches, predict, volumes, out=None, seed=0, repeats=1)
    assert (nothing.n_failed, set(nothing.failures.values())) == (6, {"target: the truth has no voxels"})


def test_what_a_prediction_lacks_is_said():
    summary = run()
    assert summary.unmeasured["IoU (voxels 5)"] == {"the prediction has no voxels": 6}
    assert summary.unmeasured["IoU (points, network)"] == {"the prediction is no function": 6}
    assert "IoU (points)" not in summary.unmeasured
    volumes = dataclasses.replace(PROTOCOLS["r2n2"], iou=QUICK.iou[:1])
    assert set(run(protocol=volumes).failures.values()) == {"prediction: the prediction has no voxels"}
    assert run(protocol=volumes, predict=lambda batch: [Prediction()] * len(batch["id"])).n_empty == 6


MESHRCNN = dataclasses.replace(PROTOCOLS["meshrcnn"], name="meshrcnn_quick", samples=(211, 211))


@pytest.mark.parametrize("fault", ["behind", "left", "below", "nan"])
def test_cameras_that_do_not_see_the_object_fail_their_item(fault):
    items = make_items()
    camera = items[2]["camera"]
    shift = {"behind": (0, 0, -9), "left": (-50, 0, 0), "below": (0, 50, 0), "nan": (0, math.nan, 0)}[fault]
    moved = camera.translation + torch.tensor(shift, dtype=camera.translation.dtype)
    items[2]["camera"] = Camera(camera.rotation, moved, camera.intrinsics, camera.image_size)
    summary = run(items, protocol=MESHRCNN)
    assert (summary.n_ok, list(summary.failures)) == (5, [IDS[2]])
    assert ("is [" if fault == "nan" else "the camera does not see it") in summary.failures[IDS[2]]
    assert run(items).n_ok == 6  # a protocol of the object frame asks no camera


def test_an_occupancy_that_raises_fails_its_item():
    def predict(batch):
        def occupancy(points):
            raise RuntimeError("too many points")

        return [p._replace(occupancy=occupancy) if n == IDS[1] else p for n, p in zip(batch["id"], perfect(batch))]

    summary = run(predict=predict)
    assert summary.failures == {IDS[1]: "occupancy: RuntimeError: too many points"}


def test_a_mesh_of_the_cameras_frame_is_asked_for_points_of_the_object_frame():
    points_only = dataclasses.replace(PROTOCOLS["r2n2"], name="points", iou=QUICK.iou[1:2])
    for protocol in (QUICK, points_only):
        assert run(predict=in_camera, protocol=protocol).per_instance["IoU (points)"] == pytest.approx(1, abs=0.01)


def test_without_the_ceiling_all_else_is_the_same(tmp_path):
    full, bare = run(repeats=2), run(repeats=2, ceiling=False, out=tmp_path / "rows.jsonl")
    assert bare.ceiling == {}
    assert bare.points == {name: full.points[name] for name in ("prediction", "target")}
    same = {"ceiling": full.ceiling, "points": full.points}
    assert bare.to_dict() | same == full.to_dict()
    with pytest.raises(ValueError, match=r"another run: \['ceiling'\] differ"):
        run(repeats=2, out=tmp_path / "rows.jsonl")


# --------------------------------------------------------------------------------------------------------- workers


class Deadly(Frame):
    """A frame that ends the process that receives it."""

    def __reduce__(self):
        return os._exit, (9,)


class Endless(Frame):
    def __reduce__(self):
        return time.sleep, (600,)


@pytest.mark.slow
def test_workers_leave_the_same_lines_and_lose_no_more_than_they_must(tmp_path):
    def without_seconds(path):
        rows = [json.loads(line) for line in path.read_bytes().splitlines()]
        return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]

    reference = run(predict=perfect, repeats=2, out=tmp_path / "one.jsonl").to_dict()
    frame = make_items(1)[0]["frame"]
    broken = {
        IDS[1]: Prediction(box(1, 1, 1), frame=Endless(frame.name, frame.center, frame.scale)),
        IDS[4]: Prediction(box(1, 1, 1), frame=Deadly(frame.name, frame.center, frame.scale)),
    }
    settings = {"repeats": 2, "workers": 2, "timeout": 5}
    lossy = run(predict=without(perfect, broken), out=tmp_path / "lossy.jsonl", **settings)
    assert lossy.n_ok == 4
    assert lossy.failures == {
        IDS[1]: "scoring: it took more than 5 s",
        IDS[4]: "scoring: its process died (out of memory, or a crash)",
    }
    kept, expected = without_seconds(tmp_path / "lossy.jsonl"), without_seconds(tmp_path / "one.jsonl")
    assert [row["id"] for row in kept[1:]] == IDS
    same = [index for index, row in enumerate(expected) if row.get("id") not in broken]
    assert [kept[i] for i in same] == [expected[i] for i in same]

    summary = run(predict=perfect, out=tmp_path / "two.jsonl", **settings)
    assert summary.to_dict() == reference
    assert without_seconds(tmp_path / "two.jsonl") == expected

    wrong = {IDS[0]: Prediction(box(1, 1, 1), frame=Frame("object"))}
    with pytest.raises(ValueError, match="different frames"):  # in a worker, and still an error of the run
        run(predict=without(perfect, wrong), workers=1)
    assert not multiprocessing.active_children()


def test_settings_of_a_configuration_are_checked():
    for settings, message in (
        ({"workers": -1}, "workers must be at least 0, got -1"),
        ({"timeout": 5.0}, "timeout must be above 0 and needs workers"),
        ({"timeout": 0.0, "workers": 1}, "timeout must be above 0"),
    ):
        with pytest.raises(ValueError, match=message):
            ShapeEvaluator(**settings)
    assert construct(ShapeEvaluator, {"workers": 3, "timeout": 60, "ceiling": False}) == ShapeEvaluator(
        workers=3, timeout=60, ceiling=False
    )


def test_batches_are_made_when_they_are_asked_for():
    asked = []

    class Items:
        def __len__(self):
            return 7

        def __getitem__(self, index):
            asked.append(index)
            return {"id": str(index)}

    batches = Batches(Items(), 3)
    assert len(batches) == 3
    assert batches[2] == {"id": ["6"]}
    assert asked == [6]
    assert [batch["id"] for batch in batches] == [["0", "1", "2"], ["3", "4", "5"], ["6"]]
    with pytest.raises(IndexError, match="there are 3 batches, got 3"):
        batches[3]
