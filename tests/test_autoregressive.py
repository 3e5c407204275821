"""Autoregressive generators: probabilities that sum to 1, causality of every value, a cache that changes nothing."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from tests import naive
from vision3dgen.generators import (
    GENERATORS,
    Autoregressive,
    Cache,
    Categorical,
    CausalConv2d,
    DiagonalBiLSTMPixelRNN,
    GatedPixelCNN,
    ImageGPT,
    LogisticMixture,
    PixelCNN,
    PixelCNNpp,
    PixelSNAIL,
    RowLSTMPixelRNN,
)
from vision3dgen.generators.likelihoods import inverse_cdf, to_images, to_values
from vision3dgen.generators.masked import POINT, CausalUpsample2d, Reach, center_mask, square
from vision3dgen.generators.pixelcnnpp import GatedResNet, WeightNormalized
from vision3dgen.generators.pixelrnn import DiagonalBiLSTM, RowLSTM, skew, unskew

SMALL = {
    "pixelcnn": {"channels": 24, "layers": 2, "head_channels": 18},
    "gated_pixelcnn": {"channels": 12, "layers": 2, "head_channels": 18},
    "row_lstm": {"hidden": 6, "layers": 2, "head_channels": 18},
    "diagonal_bilstm": {"hidden": 6, "layers": 2, "head_channels": 18},
    "pixelcnnpp": {"channels": 5, "blocks": 1, "mixtures": 3},
    "pixelsnail": {
        "channels": 5, "blocks": 2, "repeats": 1, "key_channels": 2, "value_channels": 3, "mixtures": 3
    },
    "imagegpt": {"width": 8, "layers": 2},
}  # fmt: skip
FAMILIES = sorted(SMALL)
WITH_SOFTMAX = {"pixelcnnpp", "pixelsnail"}  # if there is one channel


def small(name: str, shape: tuple[int, int, int], levels: int = 2, **options) -> Autoregressive:
    """A model with random weights, large enough for its probabilities to be far from uniform."""
    torch.manual_seed(5)
    model = GENERATORS[name](shape, levels, **{**SMALL[name], **options})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    return model.eval()


def random_images(count: int, shape: tuple[int, int, int], levels: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return to_images(torch.randint(levels, (count, *shape), generator=generator), levels)


def every_image(shape: tuple[int, int, int], levels: int) -> torch.Tensor:
    values = list(itertools.product(range(levels), repeat=math.prod(shape)))
    return to_images(torch.tensor(values).view(-1, *shape), levels)


def test_every_family_is_tested():
    assert set(SMALL) == {name for name, kind in GENERATORS.items() if issubclass(kind, Autoregressive)}


# ---------------------------------------------------------------------------------------------------- likelihoods


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "shape, levels", [((1, 2, 2), 2), ((1, 3, 2), 2), ((1, 1, 1), 256), ((3, 1, 1), 5), ((3, 1, 2), 2), ((2, 2, 1), 3)]
)
def test_probabilities_of_all_images_sum_to_one(name, shape, levels):
    model = small(name, shape, levels, classes=2).double()
    images = every_image(shape, levels).double()
    for label in (0, 1):
        with torch.no_grad():
            log_prob = model.log_prob(images, torch.full((len(images),), label)).double()
        assert float(log_prob.exp().sum()) == pytest.approx(1, abs=2e-5)
        assert float(log_prob.max() - log_prob.min()) > 0.02  # it is not the uniform distribution


@pytest.mark.parametrize("name", sorted(WITH_SOFTMAX))
def test_a_softmax_instead_of_logistics(name):
    images = every_image((1, 2, 2), 3)
    with torch.no_grad():
        log_prob = small(name, (1, 2, 2), 3, mixtures=None).log_prob(images)
    assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-5)
    with pytest.raises(ValueError, match="images of 3 channels need mixtures"):
        small(name, (3, 2, 2), 3, mixtures=None)


@pytest.mark.parametrize("levels", [2, 7, 256])
def test_bins_of_the_mixture_sum_to_one_whatever_the_parameters(levels):
    """The published code's neighbors get this wrong at the second last level; narrow and far components included."""
    likelihood = LogisticMixture(1, levels, 2)
    values = torch.arange(levels).view(-1, 1, 1, 1)
    for means, log_scales in itertools.product([(0.9, 0.999), (-3, 5), (0, 0)], [(-7, -7), (-3, -4.5), (0, 2)]):
        parameters = torch.tensor([0.3, -0.4, *means, *log_scales], dtype=torch.float64)
        log_prob = likelihood.log_prob(parameters.view(1, -1, 1, 1).expand(levels, -1, 1, 1), values)
        assert torch.isfinite(log_prob).all()
        assert float(log_prob.exp().sum()) == pytest.approx(1, abs=1e-9)


def test_the_mixture_is_the_formula():
    levels, mixtures = 11, 2
    likelihood = LogisticMixture(3, levels, mixtures)
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(5, likelihood.outputs, 2, 3, generator=generator, dtype=torch.float64)
    values = torch.randint(levels, (5, 3, 2, 3), generator=generator)
    assert likelihood.outputs == 10 * mixtures
    result = likelihood.log_prob(parameters, values)
    for b, r, c in itertools.product(range(5), range(2), range(3)):
        expected = naive.logistic_mixture(
            parameters[b, :, r, c].tolist(), values[b, :, r, c].tolist(), levels, mixtures
        )
        assert float(result[b, r, c]) == pytest.approx(math.log(expected), abs=1e-9)


def test_gradients_of_the_mixture():
    likelihood = LogisticMixture(3, 256, 2)
    parameters = torch.randn(2, likelihood.outputs, 1, 1, dtype=torch.float64, requires_grad=True)
    values = torch.tensor([[0, 255, 100], [254, 1, 0]]).view(2, 3, 1, 1)
    assert torch.autograd.gradcheck(lambda p: likelihood.log_prob(p, values), parameters)


@pytest.mark.parametrize("likelihood", [Categorical(2, 3), LogisticMixture(2, 3, 2)], ids=["softmax", "logistics"])
def test_samples_have_the_probabilities(likelihood):
    count = 20_000
    generator = torch.Generator().manual_seed(3)
    parameters = torch.randn(1, likelihood.outputs, generator=generator).expand(count, -1)
    values = torch.zeros(count, 2, dtype=torch.int64)
    uniforms = torch.rand(count, likelihood.uniforms, generator=generator)
    for step in range(likelihood.steps):
        values = likelihood.sample(parameters, values, uniforms, step)
    everything = every_image((2, 1, 1), 3)
    expected = likelihood.log_prob(parameters[:9, :, None, None], to_values(everything, 3)).exp().flatten()
    found = torch.bincount(values[:, 0] * 3 + values[:, 1], minlength=9) / count
    assert float((found - expected).abs().max()) < 5 * math.sqrt(0.25 / count)


def test_temperature_of_the_likelihoods():
    uniforms = torch.rand(500, 3, generator=torch.Generator().manual_seed(0))
    logits = torch.tensor([[0.3, 0.2, 0.1]]).expand(500, -1)
    assert set(inverse_cdf(logits / 0.001, uniforms[:, 0]).tolist()) == {0}
    mixture = LogisticMixture(1, 256, 1)
    parameters = torch.tensor([[0.0, 0.2, -1.0]]).expand(500, -1)
    zeros = torch.zeros(500, 1, dtype=torch.int64)
    cold, warm, hot = (mixture.sample(parameters, zeros, uniforms, 0, t).double() for t in (0.01, 1.0, 3.0))
    assert cold.std() < 1.5
    assert abs(cold.mean() - 0.6 * 255) < 1
    assert warm.std() < hot.std()


def test_the_edges_of_the_uniform_numbers():
    logits = torch.tensor([[-50.0, 0.0, -50.0]]).expand(2, -1)
    assert inverse_cdf(logits, torch.tensor([0.0, 1 - 2**-24])).max() <= 2
    mixture = LogisticMixture(1, 256, 1)
    parameters = torch.tensor([[0.0, 0.2, -1.0]])
    assert int(mixture.sample(parameters, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 2), 0)) == 0


# ------------------------------------------------------------------------------------------------------ causality


def order(channel: int, row: int, column: int) -> tuple[int, int, int]:
    return row, column, channel


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "imagegpt"])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 7, 5)])
def test_no_parameter_has_a_gradient_at_what_comes_after(name, shape):
    levels = 2
    model = small(name, shape, levels).double()
    x = random_images(9, shape, levels).double().requires_grad_()  # several: a ReLU hides much of one
    parameters = model(x)
    softmax = isinstance(model.likelihood, Categorical)
    places = list(itertools.product(range(shape[0]), range(shape[1]), range(shape[2])))
    weights = torch.randn(parameters.shape, dtype=torch.float64)
    for place in places:
        channel, row, column = place
        if not softmax and channel:
            continue  # all parameters of a pixel come at once
        part = (weights * parameters)[:, :, row, column]
        part = part[:, channel * levels : (channel + 1) * levels] if softmax else part
        (gradient,) = torch.autograd.grad(part.sum(), x, retain_graph=True)
        gradient = gradient.abs().sum(0)
        for other in places:
            if order(*other) >= order(*place):
                assert float(gradient[other]) == 0, (place, other)
        before = [other for other in places if order(*other) < order(*place)]
        if before and not (column == 0 and channel == 0):
            nearest = max(before, key=lambda other: order(*other))
            assert float(gradient[nearest]) != 0, (place, nearest)


@pytest.mark.parametrize("name", FAMILIES)
def test_changing_a_value_changes_nothing_before_it(name):
    """The same by perturbation, which also sees through an embedding."""
    shape, levels = (3, 3, 5), 4
    model = small(name, shape, levels)
    images = random_images(1, shape, levels)
    values = to_values(images, levels)
    places = sorted(itertools.product(range(3), range(3), range(5)), key=lambda place: order(*place))
    changed = values.repeat(len(places), 1, 1, 1)
    for number, place in enumerate(places):
        changed[(number, *place)] = (changed[(number, *place)] + 2) % levels
    with torch.no_grad():
        plain, others = model(images), model(to_images(changed, levels))
    softmax = isinstance(model.likelihood, Categorical)
    touched = 0
    for number, place in enumerate(places):
        for other in places:
            channel, row, column = other
            part = slice(channel * levels, (channel + 1) * levels) if softmax else slice(None)
            distance = (others[number, part, row, column] - plain[0, part, row, column]).abs().max()
            if order(*other) <= order(*place) or (not softmax and (row, column) == place[1:]):
                assert float(distance) < 1e-5, (place, other)
            touched += float(distance) > 1e-4
    assert touched > len(places)


def seen_from(model: Autoregressive, row: int, column: int) -> torch.Tensor:
    x = random_images(30, model.image_shape, 2).double().requires_grad_()
    outputs = model.double()(x)
    weights = torch.randn(outputs.shape[1], dtype=torch.float64)
    (gradient,) = torch.autograd.grad((outputs[:, :, row, column] * weights).sum(), x)
    return (gradient != 0).any(0)[0]


def test_the_blind_spot_of_pixelcnn_and_who_has_none():
    before = torch.zeros(5, 7, dtype=torch.bool)
    before[:3], before[3, :2] = True, True  # all that comes before (3, 2)
    blind = seen_from(small("pixelcnn", (1, 5, 7), layers=6), 3, 2)
    assert not blind[2, 6]  # two steps up and to the right are three columns of the first layer at most
    assert not (blind & ~before).any()
    for name, options in {"gated_pixelcnn": {"layers": 4}, "pixelsnail": {}}.items():
        assert torch.equal(seen_from(small(name, (1, 5, 7), **options), 3, 2), before), name
    # No feature of the row above has its last pixel in it, and the first convolution reaches but three columns.
    before[2, 6] = False
    assert torch.equal(seen_from(small("diagonal_bilstm", (1, 5, 7)), 3, 2), before)
    assert seen_from(small("diagonal_bilstm", (1, 5, 7)), 3, 3)[2, 6]


# --------------------------------------------------------------------------------------------------------- layers


def test_masks_by_hand():
    assert center_mask("A", 3, 3, 3).tolist() == [[0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert center_mask("B", 3, 6, 3).tolist() == [[1, 0, 0]] * 2 + [[1, 1, 0]] * 2 + [[1, 1, 1]] * 2
    assert center_mask("B", 3, 6, 3, gates=2).tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]] * 2
    assert center_mask("A", 2, 5).tolist() == [[0, 0]] * 5
    with pytest.raises(ValueError, match="multiples of the image's 3 channels"):
        center_mask("A", 3, 4, 3)
    with pytest.raises(ValueError, match="unknown mask 'C'"):
        center_mask("C", 3, 3)


@pytest.mark.parametrize("kind, taps", [("A", 24), ("B", 25)])
def test_a_masked_convolution_is_torchs_with_zeros(kind, taps):
    layer = CausalConv2d(2, 3, square(7), kind)
    assert int(layer.visible[0, 0].sum()) == taps
    weight = torch.zeros(3, 2, 7, 7)
    weight[:, :, :4] = layer.masked_weight().detach()
    x = torch.randn(2, 2, 5, 11)
    torch.testing.assert_close(layer(x), F.conv2d(x, weight, layer.bias, padding=3))


def pixel_by_pixel(layer, x, first_rows: int = 0):
    """The outputs of a layer from its cache, the first rows at once."""
    cache, height, width = Cache(x.shape[3]), x.shape[2], x.shape[3]
    out = {}
    if first_rows:
        y = layer(x[:, :, :first_rows], cache)
        out |= {(r, c): y[:, :, r, c] for r in range(y.shape[2]) for c in range(y.shape[3])}
    for row, column in itertools.product(range(first_rows, height), range(width)):
        if isinstance(layer, CausalConv2d):
            y = layer(x[:, :, row : row + 1, column : column + 1], cache.at(row, column))
        else:
            step = layer.pixels(len(x), cache.at(row)) if column == 0 else step
            step(torch.full_like(x[:, :, row, column], 0.7), column)  # which another call for the pixel replaces
            y = step(x[:, :, row, column], column).clone()[:, :, None, None]
        if y is not None:
            stride = getattr(layer, "stride", 1)
            out[row // stride, column // stride] = y[:, :, 0, 0]
    return out


@pytest.mark.parametrize("first_rows", [0, 2, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda: CausalConv2d(2, 3, square(5)),
        lambda: CausalConv2d(2, 3, Reach(0, 2, 0)),
        lambda: CausalConv2d(2, 3, POINT),
        lambda: CausalConv2d(2, 3, Reach(1, 1, 0), stride=2),
        lambda: RowLSTM(2, 3),
        lambda: DiagonalBiLSTM(2, 3),
    ],
    ids=["5x5", "row", "1x1", "strided", "row_lstm", "diagonal_bilstm"],
)
def test_layers_give_the_same_pixel_by_pixel(make, first_rows):
    torch.manual_seed(0)
    layer, x = make(), torch.randn(2, 2, 7, 5)
    for name, parameter in layer.named_parameters():
        if name.endswith("start"):
            torch.nn.init.normal_(parameter)
    with torch.no_grad():
        whole = layer(x)
        parts = pixel_by_pixel(layer, x, first_rows)
    assert set(parts) == set(itertools.product(range(whole.shape[2]), range(whole.shape[3])))
    for (row, column), part in parts.items():
        torch.testing.assert_close(part, whole[:, :, row, column])


def test_skewed_rows_are_diagonals():
    x = torch.arange(1.0, 16).view(1, 1, 3, 5)
    moved = skew(x)
    assert moved[0, 0].tolist() == [
        [1, 2, 3, 4, 5, 0, 0],
        [0, 6, 7, 8, 9, 10, 0],
        [0, 0, 11, 12, 13, 14, 15],
    ]
    assert torch.equal(unskew(moved, 5), x)
    one = torch.randn(2, 3, 1, 4)
    assert torch.equal(unskew(skew(one), 4), one)


def test_recurrent_layers_are_the_loops():
    torch.manual_seed(1)
    x = torch.randn(1, 2, 5, 3, dtype=torch.float64)
    row = RowLSTM(2, 3, 5).double()
    torch.nn.init.normal_(row.hidden_start)
    torch.nn.init.normal_(row.cell_start)
    torch.testing.assert_close(row(x), naive.row_lstm(row, x))
    both = DiagonalBiLSTM(2, 3).double()
    torch.testing.assert_close(both(x), naive.diagonal_bilstm(both, x))


# -------------------------------------------------------------------------------------------------------- sampling


def cached_outputs(model: Autoregressive, images: torch.Tensor, cond, first_rows: int = 0) -> torch.Tensor:
    """What the network says of each value when the image comes in value by value, all later values being wrong."""
    x = 2 * images - 1
    cache = Cache(images.shape[3])
    out = torch.zeros_like(model(images, cond))
    shifted = F.pad(x, (0, 0, 1, 0))[:, :, :-1]
    if first_rows:
        top = model.vertical(shifted[:, :, :first_rows], cond, cache)
        out[:, :, :first_rows] = model.horizontal(x[:, :, :first_rows], top, cond, cache)
    for row in range(first_rows, images.shape[2]):
        rows = model.vertical(shifted[:, :, row : row + 1], cond, cache.at(row))
        pixels = model.begin_row(len(x), rows, cond, cache.at(row))
        for column in range(images.shape[3]):
            pixel = torch.full_like(x[:, :, 0, 0], 0.7)
            for step in range(model.likelihood.steps):
                outputs = pixels.step(pixel, column)
                if model.likelihood.steps > 1:
                    part = slice(step * model.likelihood.levels, (step + 1) * model.likelihood.levels)
                    out[:, part, row, column] = outputs[:, part]
                    pixel = pixel.clone()
                    pixel[:, step] = x[:, step, row, column]
                else:
                    out[:, :, row, column] = outputs
            pixels.observe(x[:, :, row, column], column)
    return out


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape, levels", [((1, 5, 7), 2), ((3, 6, 3), 3), ((1, 5, 6), 256)])
def test_cached_logits_are_those_of_the_full_forward(name, shape, levels):
    model = small(name, shape, levels, classes=3)
    images, cond = random_images(2, shape, levels), torch.tensor([2, 0])
    with torch.no_grad():
        expected = model(images, cond)
        for first_rows in (0, 4):
            torch.testing.assert_close(cached_outputs(model, images, cond, first_rows), expected, atol=1e-5, rtol=1e-5)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape, levels", [((1, 5, 4), 2), ((3, 2, 3), 4)])
def test_cached_samples_are_the_naive_ones(name, shape, levels):
    model = small(name, shape, levels, classes=3)
    cond = torch.tensor([1, 0, 2])
    cached = model.sample(3, cond=cond, generator=generator())
    assert cached.shape == (3, *shape)
    assert torch.equal(cached, model.sample(3, cond=cond, generator=generator(), method="naive"))
    assert torch.equal(to_images(to_values(cached, levels), levels), cached)
    # Not of the size of the batch: two and one, and one by one from the same generator.
    assert torch.equal(cached, model.sample(3, cond=cond, generator=generator(), batch_size=2))
    one = generator()
    alone = torch.cat([model.sample(1, cond=cond[i : i + 1], generator=one) for i in range(3)])
    assert torch.equal(cached, alone)
    assert not torch.equal(cached, model.sample(3, cond=cond, generator=generator(2)))


@pytest.mark.parametrize("name", FAMILIES)
def test_masked_images_are_completed(name):
    shape, levels = (3, 6, 3), 4
    model = small(name, shape, levels)
    image = random_images(2, shape, levels, seed=4)
    free = model.sample(2, generator=generator())
    top, scattered = torch.zeros(6, 3).bool(), torch.rand(2, 1, 6, 3, generator=generator()) < 0.5
    top[:5, :], top[5, :2] = True, True  # whole rows, which are read at once, and a part of another
    bottom = ~top
    for mask in (top, scattered, bottom, torch.ones(6, 3).bool()):
        done = model.sample(2, image=image, mask=mask, generator=generator())
        kept = mask.expand(2, 3, 6, 3)
        assert torch.equal(done[kept], image[kept])
        if mask is scattered or (mask is top and name == "pixelcnnpp"):
            slow = model.sample(2, image=image, mask=mask, generator=generator(), method="naive")
            assert torch.equal(done, slow)
    # What is kept later does not change what is drawn before it.
    done = model.sample(2, image=image, mask=bottom, generator=generator())
    assert torch.equal(done[:, :, :5], free[:, :, :5])
    # Pixels that are not kept may hold anything.
    hidden = torch.where(top, image, math.nan)
    first = model.sample(2, image=hidden, mask=top, generator=generator())
    assert torch.equal(first, model.sample(2, image=image, mask=top, generator=generator()))


def test_frequencies_of_samples_are_the_probabilities():
    model = small("gated_pixelcnn", (1, 2, 2))
    count = 4000
    drawn = to_values(model.sample(count, generator=generator()), 2).flatten(1)
    found = torch.bincount((drawn * torch.tensor([8, 4, 2, 1])).sum(1), minlength=16) / count
    with torch.no_grad():
        expected = model.log_prob(every_image((1, 2, 2), 2)).exp()
    assert float((found - expected).abs().max()) < 5 * math.sqrt(0.25 / count)


def test_temperature():
    model = small("pixelcnn", (1, 5, 7))
    cold = model.sample(9, temperature=1e-4, generator=generator())
    assert len({tuple(row) for row in cold.flatten(1).tolist()}) == 1  # the most probable value each time
    hot = model.sample(200, temperature=1e4, generator=generator())
    assert float(hot.mean()) == pytest.approx(0.5, abs=0.03)
    with torch.no_grad():
        assert model.log_prob(cold).mean() > model.log_prob(hot).mean()


def test_sampling_leaves_the_model_as_it_was():
    model = PixelCNNpp((1, 4, 6), 2, channels=4, blocks=1, dropout=0.5)
    state = torch.random.get_rng_state()
    first = model.sample(2, generator=generator())  # dropout is off while it samples
    assert torch.equal(first, model.sample(2, generator=generator()))
    assert torch.equal(state, torch.random.get_rng_state())
    assert model.training
    model.eval().sample(1)
    assert not model.training
    assert not torch.equal(state, torch.random.get_rng_state())  # without a generator torch's own is used


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 3), (1, 4, 1)])
def test_images_smaller_than_the_kernels(name, shape):
    model = small(name, shape)
    drawn = model.sample(2, generator=generator())
    assert torch.equal(drawn, model.sample(2, generator=generator(), method="naive"))
    assert torch.isfinite(model.log_prob(drawn)).all()


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("name", FAMILIES)
def test_two_pictures_are_learned_by_class(name):
    """Two classes of one picture each cost nothing once they are known; a model without classes pays log 2."""
    torch.manual_seed(0)
    pictures = random_images(2, (1, 3, 4), 2, seed=7)
    pictures[1] = 1 - pictures[0]
    own = {"pixelcnnpp": {"dropout": 0.0, "scales": 2}, "pixelsnail": {"dropout": 0.0}}
    model = GENERATORS[name]((1, 3, 4), 2, classes=2, **SMALL[name], **own.get(name, {}))
    if isinstance(model, WeightNormalized):  # two pictures are too few to standardize layers by
        model.start(random_images(32, (1, 3, 4), 2, seed=3), torch.arange(32) % 2)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.01, total_iters=140)
    batch = {"image": pictures, "label": torch.tensor([0, 1])}
    first = float(model.loss(batch)["nats"])
    for _ in range(140):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
        schedule.step()
    terms = {name: float(value.detach()) for name, value in model.eval().loss(batch).items()}
    assert terms["nats"] < 0.35 < 5 < first
    assert terms["loss"] == pytest.approx(terms["nats"] / (12 * math.log(2)))
    drawn = model.sample(2, cond=torch.tensor([1, 0]), temperature=0.1, generator=generator())
    assert torch.equal(drawn, pictures.flip(0))
    metrics = model.validation_metrics(batch)
    assert metrics["nats"].shape == metrics["bits_per_dim"].shape == (2,)
    assert torch.equal(model.predict(batch), -metrics["nats"])


def test_the_first_loss_is_known():
    model = ImageGPT((3, 2, 4), 8)
    batch = {"image": random_images(3, (3, 2, 4), 8)}
    assert (
        float(model.loss(batch)["loss"].detach())
        == pytest.approx(model.expected_initial_loss(batch))
        == pytest.approx(3)
    )


# ------------------------------------------------------------------------------------------------------- bad input


def test_images_that_no_level_has():
    model = small("pixelcnn", (1, 2, 3), 4)
    images = torch.zeros(1, 1, 2, 3)
    images[0, 0, 1, 2] = 0.5
    with pytest.raises(ValueError, match=r"one of 4 levels, k / 3 .* got 0.5 at index \(0, 0, 1, 2\)"):
        model.log_prob(images)
    for value in (-1 / 3, 4 / 3, math.nan, math.inf):
        with pytest.raises(ValueError, match="images must be at one of 4 levels"):
            model.log_prob(torch.full((1, 1, 2, 3), value))
    with pytest.raises(ValueError, match=r"images must be \('B', 1, 2, 3\), got \(1, 1, 3, 2\)"):
        model.log_prob(torch.zeros(1, 1, 3, 2))


def test_bad_arguments_of_the_sampler():
    model = small("gated_pixelcnn", (1, 2, 3), classes=4)
    image, mask = torch.zeros(1, 2, 3), torch.zeros(2, 3).bool()
    for arguments, message in [
        ({"n": 0}, "n and batch_size must be at least 1"),
        ({"batch_size": 0}, "n and batch_size must be at least 1"),
        ({"temperature": 0.0}, "temperature must be a number above 0, got 0.0"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"temperature": math.nan}, "temperature must be"),
        ({"method": "fast"}, "unknown method 'fast'"),
        ({"method": "graph"}, "needs a model on a CUDA device"),
        ({"cond": None}, "cond must be labels of 4 classes"),
        ({"cond": 4}, "labels must be 0 to 3 for 4 classes, got 4"),
        ({"cond": torch.tensor([0, -1])}, "labels must be 0 to 3 for 4 classes, got -1 at 1"),
        ({"cond": torch.tensor([0])}, r"cond must be \(2,\)"),
        ({"image": image}, "image and mask must be given together"),
        ({"mask": mask}, "image and mask must be given together"),
        ({"image": image, "mask": torch.zeros(3, 2).bool()}, r"mask must be \(2 or 1, 1, 2, 3\).* got \(3, 2\)"),
        ({"image": torch.zeros(1, 3, 2), "mask": mask}, r"image must be \(2 or 1, 1, 2, 3\).* got \(1, 3, 2\)"),
        ({"image": image + 0.3, "mask": ~mask}, "images must be at one of 2 levels"),
        ({"image": image, "mask": torch.zeros(2, 3, dtype=torch.int64)}, "mask"),
    ]:
        with pytest.raises(Exception, match=message) as caught:
            model.sample(**{"n": 2, "cond": 1, **arguments})
        assert isinstance(caught.value, ValueError) or "mask" in message, arguments
    with pytest.raises(ValueError, match="cond must be left out"):
        small("gated_pixelcnn", (1, 2, 3)).sample(1, cond=1)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: PixelCNN((1, 0, 3)), "image_shape must be"),
        (lambda: PixelCNN((1, 3, 3), 1), "2 levels and 1 channel at least"),
        (lambda: PixelCNN((3, 3, 3), 2, channels=8), "multiples of the image's 3 channels"),
        (lambda: PixelCNN((1, 3, 3), channels=5), "channels must be even"),
        (lambda: PixelCNN((1, 3, 3), kernel_size=4), "kernel_size must be odd, got 4"),
        (lambda: GatedPixelCNN((3, 3, 3), channels=4), "multiples of the image's 3 channels"),
        (lambda: GatedPixelCNN((1, 3, 3), classes=0), "classes must be at least 1"),
        (lambda: RowLSTMPixelRNN((3, 3, 3), hidden=4), "multiples of the image's 3 channels"),
        (lambda: DiagonalBiLSTMPixelRNN((3, 3, 3), hidden=4), "multiples of the image's 3 channels"),
        (lambda: PixelCNNpp((3, 3, 3), scales=0), "channels, blocks and scales must be at least 1"),
        (lambda: PixelCNNpp((3, 3, 3), mixtures=0), "mixtures must be at least 1"),
        (lambda: PixelSNAIL((3, 3, 3), mixtures=None), "need mixtures"),
        (lambda: ImageGPT((1, 3, 3), layers=0), "layers must be at least 1"),
        (lambda: ImageGPT((1, 3, 3), width=7), "multiple of heads"),
    ],
)
def test_models_that_cannot_be_built(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["pixelcnnpp", "pixelsnail"])
def test_weight_normalization_starts_from_the_first_batch(name):
    model = small(name, (1, 5, 7), 4, classes=2)
    batch = {"image": random_images(6, (1, 5, 7), 4), "label": torch.tensor([0, 1] * 3)}
    model.eval().loss(batch)
    assert not model.started
    model.train().loss(batch)
    assert model.started
    seconds = {id(module.second) for module in model.modules() if isinstance(module, GatedResNet)}
    seen = []

    def look(layer, _, out):
        of = out.transpose(0, 1).flatten(1)
        deviation = of.std(1, correction=0)
        alive = deviation > 1e-3  # a channel that does not vary has no scale to set
        seen.append((of.mean(1).abs().max().item(), deviation[alive] / (0.1 if id(layer) in seconds else 1.0)))

    for module in model.modules():
        if isinstance(module, CausalConv2d | CausalUpsample2d):
            module.register_forward_hook(look)
    with torch.no_grad():
        model.eval()(batch["image"], batch["label"])
    assert len(seen) > 8
    assert max(mean for mean, _ in seen) < 1e-4
    for _, deviations in seen:
        torch.testing.assert_close(deviations, torch.ones_like(deviations), atol=1e-2, rtol=0)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    model.train().loss({"image": batch["image"].flip(0), "label": batch["label"]})
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())  # once only


# ------------------------------------------------------------------------------------------------ embedded levels


def test_levels_can_be_read_as_vectors():
    """Causal, equal from the cache, and of any order of the levels: numbers of codes mean nothing."""
    torch.manual_seed(3)
    model = GatedPixelCNN((1, 5, 3), 7, channels=4, layers=2, head_channels=4, classes=2, embedding=6).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn_like(parameter))
    images, cond = random_images(2, (1, 5, 3), 7), torch.tensor([1, 0])
    with torch.no_grad():
        expected = model(images, cond)
        for first_rows in (0, 4):
            torch.testing.assert_close(cached_outputs(model, images, cond, first_rows), expected, atol=1e-5, rtol=1e-5)
        for place in range(15):
            changed = images.clone()
            changed.view(2, -1)[:, place] = (changed.view(2, -1)[:, place] + 0.5).remainder(7 / 6)
            changed = to_images(to_values((changed * 6).round() / 6, 7), 7)
            differs = (model(changed, cond) - expected).abs().amax((0, 1)).flatten() > 1e-7
            assert not differs[: place + 1].any()
            assert place == 14 or differs[place + 1 :].any()
    drawn = model.sample(3, cond=1, generator=generator())
    assert torch.equal(drawn, model.sample(3, cond=1, generator=generator(), method="naive"))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    with torch.no_grad():
        before = model(images, cond)
        model.embedding.weight.copy_(model.embedding.weight[torch.argsort(order)])
        renamed = to_images(order[to_values(images, 7)], 7)
        torch.testing.assert_close(model(renamed, cond), before)
    for settings in ({"embedding": 0}, {"image_shape": (3, 2, 2), "channels": 3, "embedding": 2}):
        with pytest.raises(ValueError, match="embedding must be at least 1, of images of one channel"):
            GatedPixelCNN(**{"image_shape": (1, 2, 2), "channels": 4, **settings})
