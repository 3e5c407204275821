"""Classes of pixels: published outputs, U-Net by every upsampling, losses by hand, things and stuff in one map."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.published import OUTPUTS, filled, layout, shapes_of, uniform
from vision3dgen.backbones import BACKBONES, FPN, resnet50
from vision3dgen.heads import RPN, Anchors, BalancedSampler, BoxHead, MaskHead, PanopticMerging, Pooling
from vision3dgen.heads.segmentation import VOID, FCNHead, PyramidHead
from vision3dgen.layers import UPSAMPLINGS
from vision3dgen.models import Resizing, fcn, panoptic_fpn, unet
from vision3dgen.models.segmentation import image_miou
from vision3dgen.structures import Detections


@pytest.mark.slow
def test_layout_and_outputs_are_those_of_torchvision(shared_data):
    # Without published normalization: the recorded outputs are of the network alone.
    given = {"auxiliary": 0.0, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    model = fcn(resnet50(dilated=(False, True, True)), 21, **given).eval()
    shapes = layout(shared_data, "fcn_resnet50")
    assert shapes_of(model) == shapes
    model.load_state_dict(filled(shapes))
    with torch.no_grad():
        found = model(uniform(1, 3, 64, 80, seed=0))
    expected = torch.from_numpy(np.load(shared_data / OUTPUTS / "forward.npz")["fcn_resnet50/out"])
    assert (found[:, :, ::4, ::4] - expected).abs().max() < 1e-4 * expected.abs().max()


def small(upsampling: str = "bilinear", classes: int = 5):
    torch.manual_seed(0)
    return unet(BACKBONES["resnet8"](stem="small", widths=(4, 8, 16)), classes, upsampling=upsampling, width=4)


def pictures(count: int = 2, size: tuple[int, int] = (32, 40), classes: int = 5) -> dict:
    draw = torch.Generator().manual_seed(1)
    semantic = torch.randint(0, classes, (count, *size), generator=draw)
    semantic[:, :3] = VOID
    return {
        "image": torch.rand(count, 3, *size, generator=draw),
        "semantic": semantic,
        "id": [f"p{i}" for i in range(count)],
    }


@pytest.mark.parametrize("upsampling", UPSAMPLINGS)
def test_a_u_net_by_every_upsampling(upsampling):
    model = small(upsampling)
    batch = pictures()
    terms = model.loss(batch)
    logits = model(batch["image"])
    assert logits.shape == (2, 5, 32, 40)
    terms["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert torch.equal(model.eval().predict(batch), model(batch["image"]).argmax(1))


@pytest.mark.parametrize("size", [(31, 37), (33, 64), (17, 23)])
@pytest.mark.parametrize("make", ["fcn", "unet"])
def test_sizes_that_strides_do_not_divide(make, size):
    torch.manual_seed(0)
    backbone = BACKBONES["resnet8"](stem="small", widths=(4, 8, 16))
    model = (fcn(backbone, 5, hidden=4) if make == "fcn" else unet(backbone, 5, width=4)).eval()
    assert model(torch.rand(2, 3, *size)).shape == (2, 5, *size)


def test_the_loss_is_the_mean_over_pixels_that_are_asked():
    model, batch = small().eval(), pictures()
    logits, total, count = model(batch["image"]).detach(), 0.0, 0
    for image in range(2):
        for y in range(3, 32):
            for x in range(40):
                total -= float(logits[image, :, y, x].log_softmax(0)[batch["semantic"][image, y, x]])
                count += 1
    terms = {name: float(value.detach()) for name, value in model.loss(batch).items()}
    assert terms["semantic"] == pytest.approx(total / count, rel=1e-4)
    right = (logits.argmax(1) == batch["semantic"])[:, 3:].float().mean()
    assert terms["accuracy"] == pytest.approx(float(right))
    gradient = torch.autograd.grad(model.loss(batch)["loss"], model.classifier.last.bias)[0]
    shifted = {**batch, "semantic": torch.where(batch["semantic"] == VOID, VOID, batch["semantic"])}
    assert torch.equal(gradient, torch.autograd.grad(model.loss(shifted)["loss"], model.classifier.last.bias)[0])


def test_nothing_asked_is_zero_and_keeps_the_graph():
    model, batch = small(), pictures()
    batch["semantic"] = torch.full_like(batch["semantic"], VOID)
    terms = model.loss(batch)
    assert float(terms["loss"].detach()) == 0
    terms["loss"].backward()
    assert all(p.grad is not None and (p.grad == 0).all() for p in model.parameters())
    assert model.eval().validation_metrics(batch)["miou"].tolist() == [1.0, 1.0]


def test_pictures_of_several_sizes_weigh_by_their_pixels():
    model = small().eval()
    one, other = pictures(1, (32, 40)), pictures(1, (24, 16))
    both = {key: [one[key][0], other[key][0]] for key in ("image", "semantic", "id")}
    losses = [float(model.loss(each)["semantic"].detach()) for each in (one, other)]
    counts = [29 * 40, 21 * 16]
    expected = sum(loss * count for loss, count in zip(losses, counts)) / sum(counts)
    assert float(model.loss(both)["semantic"].detach()) == pytest.approx(expected, rel=1e-5)
    assert [tuple(own.shape) for own in model.predict(both)] == [(32, 40), (24, 16)]


def test_the_auxiliary_head_counts_half():
    torch.manual_seed(0)
    model = fcn(BACKBONES["resnet8"](stem="small", widths=(4, 8, 16)), 5, hidden=4, dropout=0.0).eval()
    terms = {name: float(value.detach()) for name, value in model.loss(pictures()).items()}
    assert terms["loss"] == pytest.approx(terms["semantic"] + 0.5 * terms["auxiliary"], rel=1e-6)
    assert terms["loss"] == pytest.approx(model.expected_initial_loss({}), rel=0.1)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda b: b["semantic"][1].fill_(5), "'p1'.*5"),
        (lambda b: b.__setitem__("semantic", b["semantic"][:, :-1]), "'p0'"),
        (lambda b: b.pop("semantic"), "the loss needs 'semantic'"),
    ],
)
def test_maps_at_fault_are_named(damage, words):
    batch = pictures()
    damage(batch)
    with pytest.raises(ValueError, match=words):
        small().loss(batch)


def test_miou_by_hand():
    found, true = torch.tensor([0, 0, 1, 2]), torch.tensor([0, 1, 1, 1])
    assert float(image_miou(found, true)) == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert float(image_miou(found[:0], true[:0])) == 1


def test_heads_that_cannot_be():
    with pytest.raises(ValueError, match="each stride must be twice the one before"):
        PyramidHead([8, 8], [4, 16], 3)
    with pytest.raises(ValueError, match="levels must be from 1 to 2"):
        PyramidHead([8, 8], [4, 8], 3, levels=3)
    with pytest.raises(ValueError, match="classes"):
        FCNHead([8], 0)


# ---------------------------------------------------------------------------------------------------- things, stuff


def merged_naively(found: Detections, stuff: Tensor, score: float, overlap: float, least: int) -> list[list[int]]:
    height, width = stuff.shape
    segments, labels = [[0] * width for _ in range(height)], []
    for index in sorted(range(len(found.scores)), key=lambda i: -float(found.scores[i])):
        pixels = [(y, x) for y in range(height) for x in range(width) if found.masks[index, y, x]]
        free = [(y, x) for y, x in pixels if segments[y][x] == 0]
        if float(found.scores[index]) < score or not free or len(pixels) - len(free) > overlap * len(pixels):
            continue
        labels.append(int(found.labels[index]))
        for y, x in free:
            segments[y][x] = len(labels)
    for label in sorted({int(v) for v in stuff.flatten()} - {0}):
        pixels = [(y, x) for y in range(height) for x in range(width) if stuff[y, x] == label and not segments[y][x]]
        if pixels and len(pixels) >= least:
            labels.append(label)
            for y, x in pixels:
                segments[y][x] = len(labels)
    return [[labels[s - 1] * 100 + s if s else 0 for s in row] for row in segments]


@pytest.mark.parametrize(("score", "overlap", "least"), [(0.5, 0.5, 0), (0.3, 0.2, 9), (0.0, 1.0, 30)])
def test_merging_equals_its_definition(score, overlap, least):
    for seed in range(4):
        draw = torch.Generator().manual_seed(seed)
        masks = torch.zeros(6, 11, 13, dtype=torch.bool)
        for mask in masks:
            y, x = torch.randint(0, 8, (2,), generator=draw).tolist()
            mask[y : y + 5, x : x + 6] = True
        scores, labels = torch.rand(6, generator=draw), torch.randint(1, 4, (6,), generator=draw)
        found = Detections(torch.zeros(6, 4), scores, labels, masks)
        stuff = F.interpolate(torch.randint(0, 3, (1, 1, 3, 3), generator=draw).float(), (11, 13))[0, 0].long()
        stuff = torch.where(stuff > 0, stuff + 3, 0)
        merged = PanopticMerging(score, overlap, least)(found, stuff)
        numbers = torch.cat(
            [torch.zeros(1, dtype=torch.int64), merged.labels * 100 + torch.arange(1, len(merged.labels) + 1)]
        )
        assert numbers[merged.segments].tolist() == merged_naively(found, stuff, score, overlap, least)


def test_merging_needs_masks_of_the_picture():
    found = Detections(torch.zeros(1, 4), torch.ones(1), torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"merging needs masks \(N, 4, 5\), got None"):
        PanopticMerging()(found, torch.zeros(4, 5, dtype=torch.int64))
    with pytest.raises(ValueError, match="needs 0 <= overlap <= 1"):
        PanopticMerging(overlap=2.0)


def panoptic():
    torch.manual_seed(0)
    backbone = FPN(BACKBONES["resnet8"](widths=(4, 8, 16)), 8, extra_level=False)
    channels, strides = backbone.channels, backbone.strides
    return panoptic_fpn(
        backbone,
        RPN(channels, strides, anchors=Anchors(sizes=((8,), (16,), (32,)))),
        BoxHead(channels, strides, 2, width=8, pooling=Pooling(3)),
        MaskHead(channels, strides, 2, width=4, convolutions=1, pooling=Pooling(4)),
        PyramidHead(channels, strides, 3, width=8),
        resizing=Resizing(48, 64), sampler=BalancedSampler(16, 0.5),
    )  # fmt: skip


def rooms() -> dict:
    batch = {"image": torch.rand(2, 3, 48, 60, generator=torch.Generator().manual_seed(0)), "id": ["a", "b"]}
    batch["boxes"] = [torch.tensor([[5.0, 6.0, 25.0, 30.0]]), torch.zeros(0, 4)]
    batch["labels"] = [torch.tensor([2]), torch.zeros(0, dtype=torch.int64)]
    masks = torch.zeros(1, 48, 60, dtype=torch.bool)
    masks[0, 6:30, 5:25] = True
    batch["masks"] = [masks, masks[:0]]
    batch["semantic"] = torch.full((2, 48, 60), 3)  # two things, then stuff 3 and 4
    batch["semantic"][:, 30:] = 4
    batch["semantic"][0][masks[0]] = 2
    return batch


def test_panoptic_losses_and_segments():
    model, batch = panoptic(), rooms()
    terms = model.loss(batch, generator=torch.Generator().manual_seed(0))
    own = {name: float(value.detach()) for name, value in terms.items()}
    expected = sum(own[name] for name in ("objectness", "rpn_box", "classifier", "box", "mask")) + 0.5 * own["semantic"]
    assert own["loss"] == pytest.approx(expected, rel=1e-5)
    terms["loss"].backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    nn.init.constant_(model.semantic.last.bias, 0.0)
    with torch.no_grad():
        model.semantic.last.bias[2] = 50.0  # stuff 4 everywhere
    model.merging = PanopticMerging(score=1.0, stuff=0)
    for found in model.eval().predict(batch):
        assert found.labels.tolist() == [4]
        assert (found.segments == 1).all()
    metrics = model.validation_metrics(batch)
    assert metrics["miou"][1] == pytest.approx(18 / 48 / 2)  # 18 of 48 rows of stuff 4, nothing of stuff 3


def test_panoptic_maps_at_fault_are_named():
    batch = rooms()
    batch["semantic"][1, 0, 0] = 5
    with pytest.raises(ValueError, match=r"'b'.*5"):
        panoptic().loss(batch)
