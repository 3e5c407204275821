import inspect
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from tests.published import OUTPUTS, filled, layout, shapes_of, uniform
from tests.test_docs import ROOT, python_blocks
from vision3dgen.backbones import (
    BACKBONES,
    FPN,
    FPNS,
    HYBRIDS,
    RESNETS,
    VITS,
    Backbone,
    Hybrid,
    LeNet5,
    ResNet,
    VisionTransformer,
    alexnet,
    load_weights,
    resnet18,
    resnet20,
    resnet50,
    vgg11_bn,
)
from vision3dgen.backbones.resnet import BasicBlock, Bottleneck, PreActBlock, PreActBottleneck
from vision3dgen.config import build

CLASSIFIERS = (
    "alexnet", "vgg11", "vgg13", "vgg16", "vgg19", "vgg11_bn", "vgg16_bn", "vgg19_bn",
    "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d", "resnext101_32x8d",
    "wide_resnet50_2", "vit_b_16", "vit_b_32", "vit_l_16",
)  # fmt: skip
BLOCKS = (BasicBlock, Bottleneck, PreActBlock, PreActBottleneck)


def near(ours, theirs, tolerance=1e-4):
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * np.abs(theirs).max())


# ------------------------------------------------------------------------------------------------- published weights


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_layout_is_torchvisions(name, shared_data):
    with torch.device("meta"):
        network = BACKBONES[name](num_classes=1000)
    assert shapes_of(network) == layout(shared_data, name)


@pytest.mark.parametrize("name", ["alexnet", "vgg11_bn", "resnet18", "resnet50", "resnext50_32x4d", "vit_b_16"])
def test_outputs_are_torchvisions(name, shared_data):
    with torch.device("meta"):
        network = BACKBONES[name](num_classes=1000).eval()
    network.load_state_dict(filled(shapes_of(network)), strict=True, assign=True)
    with torch.no_grad():
        ours = network.logits(uniform(2, 3, 224, 224, seed=0)).numpy()
    near(ours, np.load(shared_data / OUTPUTS / "forward.npz")[f"{name}/logits"])


def test_feature_pyramid_layout_and_outputs_are_torchvisions(shared_data):
    network = BACKBONES["resnet50_fpn"]().eval()
    assert shapes_of(network) == layout(shared_data, "resnet_fpn_backbone_resnet50")
    network.load_state_dict(filled(shapes_of(network)), strict=True)
    with torch.no_grad():
        maps = network(uniform(1, 3, 96, 128, seed=0))
    reference = np.load(shared_data / OUTPUTS / "forward.npz")
    for ours, level in zip(maps, (0, 1, 2, 3, "pool"), strict=True):
        key = f"resnet_fpn_backbone_resnet50/map_{level}"
        assert list(ours.shape) == list(reference[f"{key}_shape"])
        near(ours[:, :4].numpy(), reference[f"{key}_first4"])


def test_feature_pyramid_with_batch_norm_has_the_layout_of_torchvisions_second_detector(shared_data):
    with torch.device("meta"):
        network = FPN(resnet50(), norm=nn.BatchNorm2d)
    published = layout(shared_data, "fasterrcnn_resnet50_fpn_v2")
    prefix = "backbone."
    assert shapes_of(network) == {k.removeprefix(prefix): v for k, v in published.items() if k.startswith(prefix)}


@pytest.mark.parametrize(
    "name, millions",
    [("lenet5", 0.061706), ("vgg13_bn", 133.053736), ("vit_l_32", 306.5354), ("resnet20", 0.272474)],
)
def test_parameter_counts_are_the_published_ones(name, millions):
    """61,706 is LeNet-5's with a full C3; torchvision states the next two; He et al. give 0.27M for 20 layers."""
    with torch.device("meta"):
        network = BACKBONES[name](num_classes=10 if millions < 1 else 1000)
    count = sum(parameter.numel() for parameter in network.parameters())
    if name == "resnet20":  # two projections more than the paper's padded shortcuts
        count -= 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
        assert round(count / 1e6, 2) == 0.27
    else:
        assert count == round(millions * 1e6)


# ------------------------------------------------------------------------------------------- every name of the table


def small(name):
    """The network of a name, thinner where its arguments allow, with a classifier where that is cheap."""
    settings = {}
    if name in VITS:
        settings = {"depth": 2, "heads": 3, "width": 24, "mlp_width": 31, "image_size": 96}
    elif name.startswith("vgg"):
        settings = {"widths": (8, 12, 16, 24, 28)}
    elif name in RESNETS and name not in ("resnet8", "resnet20", "resnet56", "preact_resnet20"):
        settings = {"widths": (8, 16, 24, 40)} | ({"groups": 2, "base_width": 32} if "x" in name else {})
    elif name in {**FPNS, **HYBRIDS} and name != "fpn":  # a residual network inside another
        thin = partial(BACKBONES[name].args[0], widths=(8, 16, 24, 40))
        torch.manual_seed(0)
        return BACKBONES[name].func(thin, **({"channels": 11} if name in FPNS else {"num_classes": 5}))
    if "num_classes" in inspect.signature(BACKBONES[name]).parameters and not name.startswith(("vgg", "alex")):
        settings["num_classes"] = 5
    elif name == "fpn":
        settings = {"trunk": resnet18(widths=(8, 16, 24, 40)), "channels": 11}
    torch.manual_seed(0)
    return BACKBONES[name](**settings)


def images(network, count=2, more=0):
    side = max(network.smallest, 37) + more
    return torch.rand(count, network.in_channels, side, side + 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=sorted(BACKBONES))
def network(request):
    return small(request.param)


@torch.no_grad()
def test_channels_and_strides_are_what_the_network_says(network):
    network.eval()
    largest = max(network.strides)
    assert len(network.channels) == len(network.strides)
    assert network.strides == sorted(network.strides)
    some, more = network(images(network)), network(images(network, more=largest))
    for x, y, channels, stride in zip(some, more, network.channels, network.strides, strict=True):
        assert x.shape[:2] == (2, channels)
        assert tuple(y.shape[2:]) == tuple(side + largest // stride for side in x.shape[2:])


def test_every_parameter_gets_a_gradient(network):
    if not any(True for _ in network.parameters()):
        return  # the picture itself
    network.train()
    network.zero_grad()
    maps = network(images(network))
    total = sum(x.sum() for x in maps)
    if network.num_classes is not None:
        total = total + network.logits(images(network)).sum()
    total.backward()
    assert [key for key, parameter in network.named_parameters() if parameter.grad is None] == []


@torch.no_grad()
def test_evaluation_is_deterministic_and_does_not_mix_the_batch(network):
    network.eval()
    batch = images(network, count=3)
    first, second, permuted = network(batch), network(batch), network(batch[[2, 0, 1]])
    for x, y, z in zip(first, second, permuted, strict=True):
        assert torch.equal(x, y)
        near(z.numpy(), x[[2, 0, 1]].numpy(), tolerance=1e-5)


@torch.no_grad()
def test_state_dicts_make_the_round_trip(network, request):
    twin = small(request.node.callspec.params["network"])
    with torch.random.fork_rng():
        torch.manual_seed(7)
        for tensor in twin.state_dict().values():
            tensor.copy_(torch.rand_like(tensor) if tensor.is_floating_point() else tensor + 1)
    twin.load_state_dict(network.state_dict(), strict=True)
    network.eval(), twin.eval()
    for x, y in zip(network(images(network)), twin(images(network)), strict=True):
        assert torch.equal(x, y)


@torch.no_grad()
def test_autocast_stays_finite_and_close(network):
    network.eval()
    exact = network(images(network))
    with torch.autocast("cpu", torch.bfloat16):
        rough = network(images(network))
    for x, y in zip(exact, rough, strict=True):
        assert torch.isfinite(y).all()
        assert float((x - y.float()).norm() / x.norm()) < 0.3


@torch.no_grad()
def test_images_it_cannot_take_are_refused(network):
    network.eval()
    wrong = network.in_channels + 1
    with pytest.raises(ValueError, match=rf"of {network.in_channels} channels, got \(2, {wrong}, 37, 41\)"):
        network(torch.rand(2, wrong, 37, 41))
    side = network.smallest
    assert len(network(torch.rand(1, network.in_channels, side, side))) == len(network.channels)
    with pytest.raises(ValueError, match=rf"at least {side} x {side} pixels, got {side} x {side - 1}"):
        network(torch.rand(1, network.in_channels, side, side - 1))


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "resnet20", "vit_ti_16", "lenet5"])
def test_without_classes_there_is_no_classifier(name):
    network = BACKBONES[name]()
    with_classes = BACKBONES[name](num_classes=3)
    assert len(network.state_dict()) < len(with_classes.state_dict())
    batch = images(network)
    with pytest.raises(ValueError, match="num_classes"):
        network.logits(batch)
    assert with_classes.logits(batch).shape == (2, 3)


@pytest.mark.parametrize("name, smallest", [("alexnet", 63), ("vgg11", 32)])
def test_the_smallest_image_leaves_one_cell(name, smallest):
    network = BACKBONES[name]()
    assert network.smallest == smallest
    assert network(torch.rand(1, 3, smallest, smallest))[-1].shape[2:] == (1, 1)


@pytest.mark.parametrize("name", ["resnet18", "preact_resnet18", "resnet18_transformer", "vgg11_bn"])
def test_one_image_with_a_map_of_one_cell_cannot_train_batch_norm(name):
    network = BACKBONES[name]()
    one = torch.rand(1, 3, 32, 32)
    if name == "vgg11_bn":  # its last norm sees 2 x 2
        assert network.train()(one)[-1].shape == (1, 512, 1, 1)
        return
    with pytest.raises(ValueError, match="1 x 1, one value per channel"):
        network.train()(one)
    network.train()(torch.rand(1, 3, 32, 33))
    network.train()(torch.rand(2, 3, 32, 32))
    assert torch.isfinite(network.eval()(one)[-1]).all()


def test_frozen_norms_train_on_one_image_of_one_cell():
    network = BACKBONES["resnet18_fpn"]().train()
    assert network(torch.rand(1, 3, 32, 32))[-1].shape == (1, 256, 1, 1)


def test_a_configuration_builds_every_kind():
    network = build({"name": "resnet18", "stem": "small", "in_channels": 1, "num_classes": 10}, BACKBONES)
    assert network.strides == [1, 2, 4, 8]
    assert build({"name": "vit_ti_16", "depth": 3, "depths": [1, 3]}, BACKBONES).channels == [192, 192]
    with pytest.raises(ValueError, match="'imagenet', 'small'"):
        build({"name": "resnet18", "stem": "big"}, BACKBONES)


# ---------------------------------------------------------------------------------------------------------- convnets


@pytest.mark.parametrize("size", [28, 32])
def test_lenet_ends_in_one_cell_at_its_own_size(size):
    network = LeNet5(10, size=size)
    shapes = [tuple(x.shape[1:]) for x in network(torch.rand(2, 1, size, size))]
    assert shapes == [(6, 14, 14), (16, 5, 5), (120, 1, 1)]
    with pytest.raises(ValueError, match="28 or 32, got 30"):
        LeNet5(size=30)


def test_classifier_of_a_convnet_reads_its_last_map():
    network = alexnet(num_classes=3).eval()
    x = torch.rand(1, 3, 67, 71)
    with torch.no_grad():
        last = nn.functional.adaptive_avg_pool2d(network(x)[-1], 6).flatten(1)
        assert torch.equal(network.logits(x), network.classifier(last))


# ---------------------------------------------------------------------------------------------------- residual networks


@pytest.mark.parametrize("block", BLOCKS)
def test_zero_init_makes_each_block_start_as_its_shortcut(block):
    network = ResNet(block, (2, 1), widths=(8, 12), zero_init_residual=True).eval()
    x = torch.rand(2, 8 * block.expansion, 7, 11)
    assert torch.equal(network.layer1[1](x), x)
    assert not torch.equal(ResNet(block, (2, 1), widths=(8, 12)).eval().layer1[1](x), x)


@torch.no_grad()
@pytest.mark.parametrize("stride, width", [(1, 4), (2, 6)])
def test_preactivation_blocks_are_the_papers_formula(stride, width):
    """y = x + W2 relu(n(W1 relu(n(x)))), the shortcut a convolution of relu(n(x)) where shapes differ (figure 4e)."""
    block = PreActBlock(4, width, stride, 1, 64)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(), module.running_var.uniform_(0.5, 2), module.weight.normal_()
    block.eval()
    x = torch.randn(2, 4, 7, 11)

    def active(norm, value):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        return ((value - norm.running_mean[:, None, None]) * scale[:, None, None] + norm.bias[:, None, None]).clamp(0)

    a = active(block.bn1, x)
    shortcut = x if stride == 1 else nn.functional.conv2d(a, block.downsample[0].weight, stride=stride)
    hidden = nn.functional.conv2d(a, block.conv1.weight, stride=stride, padding=1)
    expected = shortcut + nn.functional.conv2d(active(block.bn2, hidden), block.conv2.weight, padding=1)
    torch.testing.assert_close(block(x), expected)


def test_only_the_last_map_of_a_preactivation_network_is_rectified():
    maps = BACKBONES["preact_resnet18"]()(torch.rand(2, 3, 37, 41))
    assert all((x < 0).any() for x in maps[:-1])
    assert (maps[-1] >= 0).all()


def test_small_stem_keeps_small_images():
    network = resnet18(stem="small", in_channels=1)
    assert [tuple(x.shape[2:]) for x in network(torch.rand(2, 1, 28, 28))] == [(28, 28), (14, 14), (7, 7), (4, 4)]


def test_settings_that_do_not_fit_a_residual_network():
    with pytest.raises(ValueError, match="groups 1 and base_width 64, got 2 and 64"):
        resnet18(groups=2)
    with pytest.raises(ValueError, match="as many as stages"):
        resnet20(widths=(8, 16))
    with pytest.raises(ValueError, match="num_classes must be at least 1, got 0"):
        resnet20(num_classes=0)


# ---------------------------------------------------------------------------------------------- pyramids and hybrids


@pytest.mark.parametrize(
    "trunk",
    [
        lambda: resnet20(),
        lambda: vgg11_bn(),
        lambda: VisionTransformer(32, 8, depth=3, heads=2, width=8, mlp_width=16, depths=(1, 3)),
        lambda: Hybrid(resnet20(), depth=1, heads=2, width=16),
        lambda: FPN(resnet20(), 8, extra_level=False),
    ],
    ids=["resnet", "vgg", "vit", "hybrid", "fpn"],
)
def test_a_pyramid_stands_on_any_trunk(trunk):
    body = trunk()
    network = FPN(body, 10)
    assert network.strides == [*body.strides, 2 * body.strides[-1]]
    assert network.channels == [10] * len(network.strides)
    maps = network(torch.rand(2, 3, 37, 53))
    assert [x.shape[1] for x in maps] == network.channels
    assert [x.shape[2:] for x in maps[:-1]] == [x.shape[2:] for x in body(torch.rand(2, 3, 37, 53))]
    sum(x.sum() for x in maps).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_coarse_maps_reach_every_finer_level_of_a_pyramid_and_not_the_reverse():
    network = FPN(resnet20(), 6).eval()
    maps = [torch.rand(1, c, 12 // s, 20 // s, requires_grad=True) for c, s in zip((16, 32, 64), (1, 2, 4))]
    out = network.fpn(maps)
    (gradients,) = [torch.autograd.grad(out[0].sum(), maps)]
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    reached = torch.autograd.grad(network.fpn(maps)[2].sum(), maps, allow_unused=True)
    assert reached[0] is None
    assert reached[1] is None


@pytest.mark.parametrize("wrapper", [FPN, Hybrid])
def test_a_trunk_with_a_classifier_is_refused(wrapper):
    with pytest.raises(ValueError, match="num_classes"):
        wrapper(resnet20(num_classes=3))


class Pixels(Backbone):
    """The image as the only map."""

    channels, strides = [3], [1]

    def __init__(self):
        super().__init__(3, 1)

    def forward(self, images):
        return [images]


@torch.no_grad()
def test_hybrid_attention_sees_every_place_and_knows_where_it_is():
    torch.manual_seed(0)
    network = Hybrid(resnet20(), depth=2, heads=4, width=16).eval()
    x = torch.rand(2, 3, 13, 18)
    weights = network.weights(x)
    assert [tuple(w.shape) for w in weights] == [(2, 4, 20, 20)] * 2  # 4 x 5 places
    torch.testing.assert_close(weights[1].sum(-1), torch.ones(2, 4, 20))
    places = Hybrid(Pixels(), depth=1, heads=2, width=8)(torch.ones(1, 3, 4, 5))[-1]
    assert not torch.allclose(places[..., 0, 0], places[..., 0, 1], atol=1e-3)  # of a constant map
    assert not torch.allclose(places[..., 0, 0], places[..., 1, 0], atol=1e-3)


@torch.no_grad()
def test_self_attention_between_stages_starts_as_the_published_network(tmp_path):
    trunk = resnet18(num_classes=7).eval()
    torch.save(trunk.state_dict(), tmp_path / "trunk.pth")
    network = BACKBONES["resnet18_attention"](num_classes=7).eval()
    report = load_weights(network, tmp_path / "trunk.pth", strict=False)
    assert report.unexpected == []
    assert all(key.startswith("layer3.2.") for key in report.missing)
    x = torch.rand(2, 3, 37, 53)
    torch.testing.assert_close(network.logits(x), trunk.logits(x))
    network.layer3[2].gamma.fill_(1.0)
    assert not torch.allclose(network.logits(x), trunk.logits(x))
    with pytest.raises(ValueError, match="from 1 to 4, got 5"):
        BACKBONES["resnet18_attention"](stage=5)


@pytest.mark.parametrize("index, block", list(enumerate(python_blocks(ROOT / "docs" / "backbones.md"))))
def test_the_examples_of_the_page_run_and_print_what_it_says(index, block, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(index)
    exec(compile(block, f"docs/backbones.md, example {index}", "exec"), {})
    page = (ROOT / "docs" / "backbones.md").read_text()
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("step ")]  # the trainer's
    assert [line for line in printed if f"\n{line}\n" not in page] == []
