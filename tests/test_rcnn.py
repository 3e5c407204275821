"""Detectors of regions: published outputs, each part against its definition, images without objects, faulty labels."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.published import OUTPUTS, filled, layout, shapes_of, uniform
from vision3dgen.backbones import BACKBONES, FPN, resnet50, resnet_fpn
from vision3dgen.heads import RPN, Anchors, Assigner, BalancedSampler, BoxHead, MaskHead, Pooling, RoIMeshHead
from vision3dgen.heads.assigner import BACKGROUND, IGNORED
from vision3dgen.heads.box import Selection
from vision3dgen.heads.roi import Canvas, Samples, Truth
from vision3dgen.heads.rpn import Proposals
from vision3dgen.models import RCNN, Resizing, fast_rcnn, faster_rcnn, mask_rcnn, mesh_rcnn
from vision3dgen.models.rcnn import f1
from vision3dgen.ops import box_iou, decode_boxes, encode_boxes, ico_sphere
from vision3dgen.structures import Camera, Detections, Meshes


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------------------------------------------- published


def published(name: str) -> RCNN:
    backbone = resnet_fpn(resnet50, frozen_norm=False)
    resizing = Resizing(160, 224)
    rpn, box = RPN(backbone.channels, backbone.strides), BoxHead(backbone.channels, backbone.strides, 90)
    if name.startswith("faster"):
        return faster_rcnn(backbone, rpn, box, resizing=resizing)
    return mask_rcnn(backbone, rpn, box, MaskHead(backbone.channels, backbone.strides, 90), resizing=resizing)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn"])
def test_layout_and_outputs_are_those_of_torchvision(shared_data, name):
    model = published(name).eval()
    shapes = layout(shared_data, name)
    assert shapes_of(model) == shapes
    model.load_state_dict(filled(shapes))
    reference = np.load(shared_data / OUTPUTS / "forward.npz")
    with torch.no_grad():
        (found,) = model([uniform(3, 120, 150, seed=0)])
    expected = {key: torch.from_numpy(reference[f"{name}/{key}"]) for key in ("boxes", "labels", "scores")}
    assert torch.equal(found.labels, expected["labels"])
    assert (found.boxes - expected["boxes"]).abs().max() < 1e-2
    assert (found.scores - expected["scores"]).abs().max() < 1e-4
    if name.startswith("mask"):
        masks = torch.from_numpy(reference[f"{name}/masks"])[:, 0] > 0.5
        assert found.masks is not None
        assert (found.masks[:, ::4, ::4] == masks).float().mean() > 0.9999


# ----------------------------------------------------------------------------------------------------------- parts


def test_anchors_by_hand():
    anchors = Anchors(sizes=((8.0,), (16.0,)), ratios=(1.0, 4.0))
    maps = [torch.zeros(1, 2, 3, 5), torch.zeros(1, 2, 2, 3)]
    found = anchors(maps, (12, 20), [4, 8])
    assert [len(own) for own in found] == [3 * 5 * 2, 2 * 3 * 2]
    # cell by cell, row by row; a ratio of 4 is 4 by 16 with the area of 8 by 8
    assert found[0][:4].tolist() == [[-4, -4, 4, 4], [-2, -8, 2, 8], [0, -4, 8, 4], [2, -8, 6, 8]]
    assert found[0][10].tolist() == [-4, 0, 4, 8]
    assert found[1][2].tolist() == [6 - 8, -8, 6 + 8, 8]  # 20 // 3 pixels a cell
    with pytest.raises(ValueError, match="given for 2 levels, the backbone has 3"):
        anchors.of_levels([4, 8, 16])
    with pytest.raises(ValueError, match="each must have as many sizes"):
        Anchors(sizes=((1.0,), (1.0, 2.0))).of_levels([4, 8])
    with pytest.raises(ValueError, match="ratios must be above 0"):
        Anchors(ratios=(0.0,))


def boxes_of(count: int, seed: int, side: float = 30.0) -> Tensor:
    corner = torch.rand(count, 2, generator=generator(seed)) * side
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator(seed + 1)) * side / 2], dim=1)


def assigned_naively(boxes: Tensor, objects: Tensor, positive: float, negative: float, nearest: bool) -> list[int]:
    overlap = box_iou(boxes, objects)
    found = []
    for row in overlap:
        best = float(row.max())
        number = BACKGROUND if best < negative else IGNORED if best < positive else int(row.argmax())
        if nearest and any(float(row[m]) == float(overlap[:, m].max()) > 0 for m in range(len(objects))):
            number = int(row.argmax())
        found.append(number)
    return found


@pytest.mark.parametrize("nearest", [False, True])
@pytest.mark.parametrize("pairs", [7, 1 << 22])
def test_assigner_equals_the_definition(nearest, pairs, monkeypatch):
    monkeypatch.setattr("vision3dgen.heads.assigner.PAIRS", pairs)
    for seed in range(3):
        boxes, objects = boxes_of(61, seed), boxes_of(5, seed + 100)
        objects = torch.cat([objects, torch.tensor([[900.0, 900.0, 910.0, 910.0]])])  # which no box touches
        expected = assigned_naively(boxes, objects, 0.4, 0.2, nearest)
        assert Assigner(0.4, 0.2, nearest)(boxes, objects).tolist() == expected
        assert len({BACKGROUND, IGNORED, 5}.intersection(expected)) >= 1
        assert 5 not in expected
    assert Assigner()(boxes, objects[:0]).tolist() == [BACKGROUND] * len(boxes)
    assert Assigner()(boxes[:0], objects).tolist() == []
    with pytest.raises(ValueError, match="needs 0 < negative <= positive <= 1"):
        Assigner(0.3, 0.5)


def test_sampler_keeps_the_shares():
    assigned = torch.tensor([BACKGROUND] * 50 + [IGNORED] * 20 + [0] * 9 + [3])
    sampled = BalancedSampler(16, 0.25)(assigned, generator())
    assert len(sampled.positive) == 4
    assert len(sampled.negative) == 12
    assert (assigned[sampled.positive] >= 0).all()
    assert (assigned[sampled.negative] == BACKGROUND).all()
    assert len(sampled.all.unique()) == 16
    few = BalancedSampler(16, 0.25)(assigned[-12:], generator())  # no background to fill with
    assert len(few.all) == 4
    assert torch.equal(BalancedSampler(16)(assigned, generator(1)).all, BalancedSampler(16)(assigned, generator(1)).all)
    drawn = torch.cat([BalancedSampler(16, 0.25)(assigned, generator(seed)).positive for seed in range(60)])
    assert len(drawn.unique()) == 10  # every object is drawn some time


def small_canvas(sizes: list[tuple[int, int]], seed: int = 0) -> Canvas:
    height, width = (max(size[axis] for size in sizes) for axis in (0, 1))
    images = torch.rand(len(sizes), 3, height, width, generator=generator(seed))
    return Canvas(images, sizes, sizes)


def test_losses_of_proposals_equal_their_definition():
    torch.manual_seed(0)
    rpn = RPN([4, 4], [4, 8], anchors=Anchors(sizes=((8,), (16,))), sampler=BalancedSampler(10**6, 1.0))
    nn.init.normal_(rpn.head.cls_logits.weight, std=0.5)
    nn.init.normal_(rpn.head.bbox_pred.weight, std=0.1)
    canvas = small_canvas([(32, 48), (24, 40)])
    maps = [torch.randn(2, 4, 8, 12), torch.randn(2, 4, 4, 6)]
    answers = rpn(maps, canvas)
    truths = [
        Truth(torch.tensor([[4.0, 4.0, 13.0, 12.0], [20.0, 8.0, 40.0, 26.0]]), torch.tensor([1, 2])),
        Truth(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)),
    ]
    got = rpn.loss(answers, truths, generator())
    anchors = torch.cat(answers.anchors)
    entropy, distance, count = 0.0, 0.0, 0
    for image, truth in enumerate(truths):
        logits = torch.cat(answers.objectness, 1)[image].tolist()
        moved = torch.cat(answers.transforms, 1)[image]
        assigned = Assigner(0.7, 0.3, nearest=True)(anchors, truth.boxes).tolist()
        for row, number in enumerate(assigned):
            if number == IGNORED:
                continue
            count += 1
            probability = 1 / (1 + math.exp(-logits[row]))
            entropy -= math.log(probability if number >= 0 else 1 - probability)
            if number >= 0:
                target = encode_boxes(truth.boxes[number][None], anchors[row][None])[0]
                for error in (moved[row] - target).abs().tolist():
                    distance += error - 1 / 18 if error > 1 / 9 else error**2 / (2 / 9)
    assert float(got["objectness"].detach()) == pytest.approx(entropy / count, rel=1e-4)
    assert float(got["rpn_box"].detach()) == pytest.approx(distance / count, rel=1e-4)


def test_proposals_are_the_best_of_each_level_suppressed():
    torch.manual_seed(0)
    limits = Proposals(before=(9, 7), after=(5, 4), overlap=0.5)
    rpn = RPN([4, 4], [4, 8], anchors=Anchors(sizes=((8,), (16,))), proposals=limits)
    nn.init.normal_(rpn.head.cls_logits.weight, std=1.0)
    canvas = small_canvas([(32, 48), (17, 23)])
    answers = rpn([torch.randn(2, 4, 8, 12), torch.randn(2, 4, 4, 6)], canvas)
    for training, most in ((True, 5), (False, 4)):
        for own, (height, width) in zip(rpn.train(training).propose(answers, canvas), canvas.sizes):
            assert 0 < len(own.boxes) <= most
            assert (own.scores.diff() <= 0).all()
            assert (own.boxes >= 0).all()
            assert (own.boxes[:, 0::2] <= width).all()
            assert (own.boxes[:, 1::2] <= height).all()
            assert (own.labels == 0).all()
    best = torch.cat(answers.objectness, 1)[0].argmax()
    moved = decode_boxes(torch.cat(answers.transforms, 1)[0, best][None], torch.cat(answers.anchors)[best][None])
    first = rpn.propose(answers, canvas)[0].boxes[0]
    assert torch.allclose(first, torch.stack([moved[0, 0::2].clamp(0, 48), moved[0, 1::2].clamp(0, 32)], 1).flatten())
    with pytest.raises(ValueError, match="the maps must have one width"):
        RPN([4, 8], [4, 8])


@pytest.mark.parametrize("soft", [None, "linear", "gaussian"])
def test_selection_keeps_one_of_two_on_one_place_but_not_of_another_class(soft):
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 11], [30.0, 30, 40, 40], [5.0, 5, 5.001, 5.001]])
    scores = torch.tensor([[0.9, 0.02], [0.8, 0.7], [0.04, 0.3], [0.99, 0.99]])
    found = Selection(soft=soft, count=3)(boxes[:, None].expand(-1, 2, -1), scores)
    assert found.labels.tolist()[:2] == [1, 2]
    assert found.scores[:2].tolist() == pytest.approx([0.9, 0.7])
    if soft is None:
        assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.3])
        assert torch.equal(found.boxes, boxes[[0, 1, 2]])
    else:
        assert len(found.scores) == 3
        assert (found.scores.diff() <= 0).all()
    nothing = Selection(soft=soft)(boxes[:0, None].expand(-1, 2, -1), scores[:0])
    assert nothing.boxes.shape == (0, 4)


def test_losses_of_boxes_equal_their_definition():
    torch.manual_seed(0)
    head = BoxHead([4], [8], 2, width=16, pooling=Pooling(2))
    nn.init.normal_(head.box_predictor.cls_score.weight, std=0.5)
    nn.init.normal_(head.box_predictor.bbox_pred.weight, std=0.5)
    maps, canvas = [torch.randn(1, 4, 4, 6)], small_canvas([(32, 48)])
    truth = Truth(torch.tensor([[4.0, 4, 20, 20], [20, 8, 40, 26]]), torch.tensor([2, 1]))
    boxes = torch.tensor([[5.0, 5, 19, 22], [1, 1, 9, 9], [21, 9, 44, 27]])
    samples = [Samples(boxes, torch.tensor([2, 0, 1]), torch.tensor([0, BACKGROUND, 1]))]
    got = head.loss(maps, samples, [truth], canvas)
    answers = head(maps, [boxes])
    entropy = -sum(float(answers.logits[row].detach().log_softmax(0)[label]) for row, label in enumerate((2, 0, 1)))
    distance = 0.0
    for row, label, number in ((0, 2, 0), (2, 1, 1)):
        own, true = boxes[row], truth.boxes[number]
        size, center = own[2:] - own[:2], (own[:2] + own[2:]) / 2
        wanted = torch.cat([10 * ((true[:2] + true[2:]) / 2 - center) / size, 5 * ((true[2:] - true[:2]) / size).log()])
        for error in (answers.transforms[row, label].detach() - wanted).abs().tolist():
            distance += error - 1 / 18 if error > 1 / 9 else error**2 / (2 / 9)
    assert float(got["classifier"].detach()) == pytest.approx(entropy / 3, rel=1e-5)
    assert float(got["box"].detach()) == pytest.approx(distance / 3, rel=1e-5)


def test_levels_are_those_of_the_formula():
    pooling, strides = Pooling(3), [4, 8, 16, 32, 64]
    sides = [1, 55, 111, 113, 223, 225, 449, 5000]
    boxes = torch.tensor([[0.0, 0, side, side] for side in sides])
    expected = [min(max(math.floor(4 + math.log2(side / 224)) - 2, 0), 3) for side in sides]
    assert pooling.level_of(boxes, strides[:4]).tolist() == expected
    maps = [torch.full((1, 2, 2048 // stride, 2048 // stride), float(index)) for index, stride in enumerate(strides)]
    pooled = pooling(maps, [boxes[:-1]], strides)
    assert pooled[:, 0, 1, 1].tolist() == expected[:-1]  # in their order, not that of the levels


# ---------------------------------------------------------------------------------------------------------- models


def detector(kind: str, classes: int = 3) -> RCNN:
    torch.manual_seed(0)
    backbone = FPN(BACKBONES["resnet8"](widths=(4, 8, 16)), 8, extra_level=False)
    channels, strides = backbone.channels, backbone.strides
    rpn = RPN(channels, strides, anchors=Anchors(sizes=((8,), (16,), (32,))), proposals=Proposals((50, 50), (20, 20)))
    box = BoxHead(channels, strides, classes, width=16, pooling=Pooling(3))
    mask = MaskHead(channels, strides, classes, width=8, convolutions=1, pooling=Pooling(4))
    given = {"resizing": Resizing(64, 96), "sampler": BalancedSampler(16, 0.5)}
    if kind == "fast":
        return fast_rcnn(backbone, box, **given)
    if kind == "faster":
        return faster_rcnn(backbone, rpn, box, **given)
    if kind == "mask":
        return mask_rcnn(backbone, rpn, box, mask, **given)
    mesh = RoIMeshHead(channels, strides, resolution=8, width=8, stages=1, hidden=8)
    return mesh_rcnn(backbone, rpn, box, mask, mesh, **given)


def scene(*, objects: tuple[int, ...] = (2, 1), sizes: tuple[tuple[int, int], ...] = ((64, 80), (70, 61))) -> dict:
    """Bright rectangles on dark ground, and a sphere in front of the camera for each."""
    batch: dict = {key: [] for key in ("image", "boxes", "labels", "masks", "id")}
    spheres, cameras = [], []
    for index, (count, (height, width)) in enumerate(zip(objects, sizes)):
        image = 0.1 * torch.rand(3, height, width, generator=generator(index))
        boxes = torch.tensor([[6.0, 8.0, 26.0, 30.0], [34.0, 24.0, 56.0, 58.0]])[:count]
        masks = torch.zeros(count, height, width, dtype=torch.bool)
        for number, (x0, y0, x1, y1) in enumerate(boxes.int().tolist()):
            masks[number, y0:y1, x0:x1] = True
            image[number % 3, y0:y1, x0:x1] = 0.9
            spheres.append(ico_sphere(1).scale_verts(0.3).offset_verts(torch.tensor([0.0, 0.0, 2.0 + number])))
        batch["image"].append(image)
        batch["boxes"].append(boxes)
        batch["labels"].append(torch.arange(1, count + 1))
        batch["masks"].append(masks)
        batch["id"].append(f"room {index}")
        cameras.append(Camera.look_at((0.0, 0.0, 2.0), field_of_view=50, image_size=(height, width)).to(torch.float32))
    none = ico_sphere(0)
    verts = [own.verts_packed() for own in spheres or [none]]
    batch["mesh"] = Meshes(verts, [own.faces_packed() for own in spheres or [none]])[: len(spheres)]
    if len(set(sizes)) == 1:
        batch["camera"] = Camera.stack(cameras)
    return batch


@pytest.mark.parametrize("kind", ["faster", "mask", "mesh"])
def test_loss_has_its_terms_and_reaches_every_parameter(kind):
    model = detector(kind)
    batch = scene(sizes=((64, 80), (64, 80)))
    terms = model.loss(batch, generator=generator())
    expected = {"loss", "objectness", "rpn_box", "classifier", "box"}
    assert expected <= set(terms)
    assert ("mask" in terms) == (kind != "faster")
    own = [float(value.detach()) for name, value in terms.items() if name != "loss"]
    assert float(terms["loss"].detach()) == pytest.approx(sum(own))
    terms["loss"].backward()
    unused = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert unused == []


@pytest.mark.parametrize("kind", ["fast", "faster", "mask"])
def test_photographs_of_several_sizes_keep_to_their_own(kind):
    model = detector(kind).eval()
    batch = scene()
    batch["proposals"] = [torch.tensor([[5.0, 5.0, 30.0, 30.0], [30.0, 20.0, 60.0, 60.0]])] * 2
    for own, image in zip(model.predict(batch), batch["image"]):
        height, width = image.shape[-2:]
        assert 0 < len(own.boxes) == len(own.scores) == len(own.labels)
        assert (own.boxes[:, 0::2] <= width + 1e-3).all()
        assert (own.boxes[:, 1::2] <= height + 1e-3).all()
        assert kind != "mask" or own.masks.shape == (len(own.boxes), height, width)
    same = [image[:, :60, :60] for image in batch["image"]]  # of one size, so that the canvas is that of one alone
    for index, own in enumerate(model.predict({**batch, "image": same})):
        alone = model.predict({key: [value[index]] for key, value in {**batch, "image": same}.items() if key != "mesh"})
        assert torch.equal(own.labels, alone[0].labels)
        torch.testing.assert_close(own.boxes, alone[0].boxes, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(own.scores, alone[0].scores, rtol=1e-4, atol=1e-5)


def test_an_image_without_objects_has_zero_losses_that_keep_the_graph():
    model = detector("mesh")
    batch = scene(objects=(0, 0), sizes=((64, 80), (64, 80)))
    terms = model.loss(batch, generator=generator())
    for name in ("rpn_box", "box", "mask"):
        assert float(terms[name].detach()) == 0
        assert terms[name].requires_grad
    terms["loss"].backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_crowds_and_difficult_objects_are_not_learned():
    batch = scene(sizes=((64, 80), (64, 80)))
    model = detector("mask")
    batch["crowd"] = [torch.tensor([False, True]), torch.tensor([False])]
    canvas = model.resizing(batch["image"])
    truths = model.resizing.truths(batch, canvas, model.needs, model.classes)
    assert [len(truth.boxes) for truth in truths] == [1, 1]
    assert truths[0].labels.tolist() == [1]
    assert truths[0].masks.shape == (1, *canvas.sizes[0])


FAULTS = {
    "inverted": (lambda b: b["boxes"][0].__setitem__((1, 2), 30.0), "room 0.*annotation 1"),
    "outside": (lambda b: b["boxes"][1].add_(500.0), "room 1.*annotation 0.*outside"),
    "no boxes of it": (lambda b: b["labels"].__setitem__(0, b["labels"][0][:1]), "room 0.*2 boxes and 1 labels"),
    "not a number": (lambda b: b["boxes"][0].__setitem__((0, 0), float("nan")), "room 0.*annotation 0"),
    "category": (lambda b: b["labels"][0].__setitem__(1, 4), "room 0.*annotation 1"),
    "background": (lambda b: b["labels"][0].__setitem__(0, 0), "room 0.*annotation 0"),
    "mask elsewhere": (lambda b: b["masks"][0][0].zero_().__setitem__((60, 70), True), "room 0.*annotation 0"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_annotations_at_fault_are_named(fault):
    batch = scene(sizes=((64, 80), (64, 80)))
    damage, words = FAULTS[fault]
    damage(batch)
    with pytest.raises(ValueError, match=words):
        detector("mask").loss(batch)


def test_what_a_batch_lacks_is_named():
    batch = scene(sizes=((64, 80), (64, 80)))
    with pytest.raises(ValueError, match=r"the loss needs \['masks'\]"):
        detector("mask").loss({key: batch[key] for key in ("image", "boxes", "labels")})
    with pytest.raises(ValueError, match="image 1 must be"):
        detector("faster").predict({"image": [batch["image"][0], torch.rand(1, 20, 20)]})
    with pytest.raises(ValueError, match="the batch must have proposals"):
        detector("fast").loss(batch)
    backbone = FPN(BACKBONES["resnet8"](widths=(4, 8, 16)), 8, extra_level=False)
    given = (backbone.channels, backbone.strides)
    rpn, box, mask = RPN(*given, anchors=Anchors(sizes=((8,),) * 3)), BoxHead(*given, 3), MaskHead(*given, 4)
    with pytest.raises(ValueError, match="do not speak of as many categories"):
        mask_rcnn(backbone, rpn, box, mask)


def test_one_pixel_and_many_objects():
    model = detector("faster")
    corner = torch.stack(torch.meshgrid(torch.arange(0.0, 64), torch.arange(0.0, 64), indexing="xy"), -1).reshape(-1, 2)
    boxes = torch.cat([corner, corner + 1], dim=1)  # 4,096 of a pixel each
    batch = {"image": torch.rand(1, 3, 64, 64), "boxes": [boxes], "labels": [torch.ones(len(boxes), dtype=torch.int64)]}
    terms = model.loss(batch, generator=generator())
    assert all(value.isfinite() for value in terms.values())
    terms["loss"].backward()


@pytest.mark.slow
def test_a_picture_is_learned_by_heart():
    model = detector("mask")
    batch = scene(sizes=((64, 80), (64, 80)))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, total_iters=180)
    model.train()
    for step in range(180):
        optimizer.zero_grad()
        model.loss(batch, generator=generator(step))["loss"].backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        schedule.step()
    model.eval()
    assert model.validation_metrics(batch)["f1"].tolist() == [1.0, 1.0]
    for own, boxes, masks in zip(model.predict(batch), batch["boxes"], batch["masks"]):
        best = box_iou(own.boxes, boxes).max(0)
        assert (best.values > 0.7).all()
        for number, row in enumerate(best.indices.tolist()):
            overlap = (own.masks[row] & masks[number]).sum() / (own.masks[row] | masks[number]).sum()
            assert overlap > 0.6


def test_f1_by_hand():
    boxes, labels = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([1, 2])
    found = Detections(torch.cat([boxes, boxes[:1]]), torch.tensor([0.9, 0.8, 0.7]), torch.tensor([1, 1, 1]))
    assert f1(found, boxes, labels) == pytest.approx(2 * 1 / 5)  # wrong category, and twice the same object
    assert f1(Detections(boxes[:0], torch.zeros(0), labels[:0]), boxes[:0], labels[:0]) == 1
    assert f1(found, boxes[:0], labels[:0]) == 0
