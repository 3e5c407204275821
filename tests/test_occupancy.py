"""Heads that predict fields: latent codes, local features, extraction."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from tests.published import filled, shapes_of
from tests.test_docs import python_blocks
from vision3dgen.heads import LocalDecoder, LocalOccupancyHead, OccupancyHead
from vision3dgen.heads.occupancy import LatentEncoder, OccupancyDecoder, Posterior
from vision3dgen.ops import FeatureLayout, extract_surface, isosurface
from vision3dgen.structures import GridSpec

LAYOUT = FeatureLayout(("xz", "grid"), resolution=7, grid_resolution=5)
SETTINGS = {"threshold": 0.4, "resolution": 7, "upsampling_steps": 1}


def draw(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def maps(batch=3):
    return [draw(batch, 11, *LAYOUT.sides(plane)) - 0.5 for plane in LAYOUT.planes]


def batch(size=3):
    return {"points": (draw(size, 19, 3) - 0.5) * 1.1, "occupancies": (draw(size, 19, seed=1) > 0.5).float()}


def awake(module, seed=0):
    """Layers that start at 0 drawn at random: an untrained field has no shape."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.3)
    return module


# -------------------------------------------------------------------------------------------------- latent codes


def test_divergence_is_that_of_normal_distributions_and_draws_follow_the_posterior():
    mean, deviation = draw(5, 3) - 0.5, draw(5, 3, seed=1) + 0.3
    posterior = Posterior(mean, deviation.log())
    expected = kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(posterior.divergence(), expected)
    assert Posterior(torch.zeros(1, 4), torch.zeros(1, 4)).divergence().item() == 0
    many = Posterior(mean[:1].expand(20000, 3), deviation[:1].log().expand(20000, 3))
    drawn = many.sample(torch.Generator().manual_seed(0))
    torch.testing.assert_close(drawn.mean(0), mean[0], atol=0.03, rtol=0)
    torch.testing.assert_close(drawn.std(0), deviation[0], atol=0.03, rtol=0)


def test_a_latent_code_adds_its_divergence_to_the_loss():
    torch.manual_seed(0)
    head = awake(OccupancyHead([11], code_channels=None, hidden=16, latent_channels=5, **SETTINGS))
    prediction = head([draw(3, 11, 1, 1)])
    assert (prediction.conditions[1] == 0).all()  # the mean of the prior
    losses = head.loss(prediction, batch())
    assert set(losses) == {"loss", "reconstruction", "divergence"}
    torch.testing.assert_close(losses["loss"], losses["reconstruction"] + losses["divergence"])
    assert losses["divergence"] > 0
    losses["loss"].backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    assert head.decoder.fc_z.weight.grad.abs().sum() > 0
    assert head.encoder_latent.fc_logstd.weight.grad.abs().sum() > 0
    assert head.expected_initial_loss(batch()) is None


def test_draws_of_the_prior_are_other_shapes_and_repeatable():
    head = awake(OccupancyHead([11], code_channels=None, hidden=16, latent_channels=5, **SETTINGS)).eval()
    prediction = head([draw(3, 11, 1, 1)])
    first, again = (head.draw(prediction, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    points = batch()["points"]
    assert torch.equal(first(points), again(points))
    other = head.draw(prediction, generator=torch.Generator().manual_seed(3))
    assert (first(points) - other(points)).abs().max() > 1e-3
    assert (first(points) - prediction(points)).abs().max() > 1e-3
    assert len(head.shape(first)) == 3
    with pytest.raises(ValueError, match="build it with latent_channels"):
        OccupancyHead([11], hidden=4).draw(prediction)


def test_the_latent_encoder_has_the_published_layout_and_sees_sets():
    encoder = LatentEncoder(7, 5)
    expected = {}
    for name, inputs, outputs in [
        ("fc_pos", 3, 128), ("fc_c", 5, 128), ("fc_0", 1, 128), ("fc_1", 128, 128), ("fc_2", 256, 128),
        ("fc_3", 256, 128), ("fc_mean", 128, 7), ("fc_logstd", 128, 7),
    ]:  # fmt: skip
        expected |= {f"{name}.weight": [outputs, inputs], f"{name}.bias": [outputs]}
    assert shapes_of(encoder) == expected
    assert shapes_of(OccupancyDecoder(5, 16, 7))["fc_z.weight"] == [16, 7]
    data, code = batch(), draw(3, 5, seed=4)
    whole = encoder(data["points"], data["occupancies"], code)
    order = torch.randperm(19, generator=torch.Generator().manual_seed(0))
    shuffled = encoder(data["points"][:, order], data["occupancies"][:, order], code)
    torch.testing.assert_close(shuffled.mean, whole.mean)
    flipped = encoder(data["points"], 1 - data["occupancies"], code)
    assert (flipped.mean - whole.mean).abs().max() > 1e-3


# ------------------------------------------------------------------------------------------------ local features


def test_the_local_head_keeps_the_contract():
    head = awake(LocalOccupancyHead([11, 11], LAYOUT, hidden=6, blocks=2, **SETTINGS))
    prediction = head(maps())
    loss = head.loss(prediction, batch())["loss"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in head.parameters())
    head.eval()
    assert len(head.shape(prediction)) == 3
    probability = head.occupancy(prediction, batch()["points"])
    assert probability.shape == (3, 19)
    assert ((probability > 0) & (probability < 1)).all()
    expected = torch.nn.functional.binary_cross_entropy(probability, batch()["occupancies"], reduction="sum") / 3
    torch.testing.assert_close(loss, expected)
    assert head.expected_initial_loss(batch()) == pytest.approx(19 * math.log(2))
    alone = prediction[1](batch()["points"][1:2])
    torch.testing.assert_close(alone[0], prediction(batch()["points"])[1])


def test_a_point_reads_the_features_around_it_alone():
    decoder = awake(LocalDecoder(FeatureLayout(("grid",), grid_resolution=5), 3, hidden=8, blocks=2))
    grid = (draw(1, 3, 5, 5, 5) - 0.5).requires_grad_()
    (gradient,) = torch.autograd.grad(decoder(torch.tensor([[[0.4, -0.4, 0.4]]]), grid).sum(), grid)
    reached = gradient.abs().sum(1)[0].nonzero()
    assert reached.tolist() == [[z, y, x] for z in (3, 4) for y in (0, 1) for x in (3, 4)]


def test_normals_of_a_head_are_the_slopes_of_its_field():
    head = awake(LocalOccupancyHead([11, 11], LAYOUT, hidden=6, **SETTINGS)).double().eval()
    prediction = head([values.double() for values in maps()])
    points = batch()["points"].double()
    normals = head.normals(prediction, points)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(3, 19, dtype=torch.float64))
    step = 1e-6
    ahead, behind = (head.occupancy(prediction, points + sign * step * normals) for sign in (1, -1))
    assert (ahead < behind).all()  # outward is down


# ---------------------------------------------------------------------------------------------------- extraction


def same_mesh(mesh, other):
    """Whether two meshes have the same vertices, whatever their order, and the same number of faces."""
    rows = [np.round(m.verts_packed().double().numpy() * 1e5).astype(int) for m in (mesh, other)]
    return {tuple(r) for r in rows[0]} == {tuple(r) for r in rows[1]} and len(mesh.faces_packed()) == len(
        other.faces_packed()
    )


def torus(points):
    return 0.13 - ((points[:, :2].norm(dim=1) - 0.3).square() + points[:, 2].square()).sqrt()


def filled_field():
    """The field of a network whose weights were filled by the published outputs' rule, and its level."""
    decoder = OccupancyDecoder(8, 16).eval()
    decoder.load_state_dict(filled(shapes_of(decoder)))
    code = draw(1, 8)

    def field(points):
        return decoder(points[None], code)[0]

    with torch.no_grad():
        values = field((draw(5000, 3) - 0.5) * 1.1)
    return field, float(values.quantile(0.93))


@pytest.mark.parametrize("name", ["torus", "network"])
def test_extraction_at_128_asks_for_a_tenth_of_the_grid_and_gives_its_mesh(name):
    field, level = (torus, 0.0) if name == "torus" else filled_field()
    with torch.no_grad():
        sparse = extract_surface(field, (-0.55, 0.55), level=level, resolution0=32, upsampling_steps=2)
        grid = GridSpec.cube(129, -0.55, 0.55, align="corner")
        values = torch.cat([field(piece) for piece in grid.points().view(-1, 3).split(65536)])
    dense = isosurface(values.view(1, *grid.shape), grid, level=level)
    assert len(dense.faces_packed()) > 5000
    assert sparse.evaluations < 0.1 * values.numel()
    assert same_mesh(sparse.mesh, dense)


def test_a_head_simplifies_and_refines():
    pytest.importorskip("open3d")

    class Ball(torch.nn.Module):
        def forward(self, points, code):
            return (0.3 - points.norm(dim=-1)) * 20 + math.log(0.4 / 0.6)

    meshes = {}
    for name, more in {
        "plain": {},
        "simple": {"faces": 100},
        "refined": {"faces": 100, "refinement_steps": 40},
    }.items():
        head = OccupancyHead([3], code_channels=None, hidden=4, **(SETTINGS | {"resolution": 16}), **more).eval()
        head.decoder = Ball()
        meshes[name] = head.shape(head([draw(2, 3, 1, 1)]))
    assert meshes["plain"].num_faces_per_mesh()[0] > 1000
    assert meshes["simple"].num_faces_per_mesh().tolist() == [100, 100]
    off = {
        k: float((m.verts_packed()[m.faces_packed()].mean(1).norm(dim=1) - 0.3).abs().mean()) for k, m in meshes.items()
    }
    assert off["refined"] < 0.8 * off["simple"]
    assert torch.equal(meshes["refined"][0].verts_packed(), meshes["refined"][1].verts_packed())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"threshold": 1.0}, "threshold must be a probability"),
        ({"resolution": 0}, "resolution must be at least 1"),
        ({"refinement_steps": -1}, "refinement_steps at least 0"),
        ({"latent_channels": -1}, "latent_channels must be at least 0"),
    ],
)
def test_faults_of_a_head_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        OccupancyHead([3], **settings)


# -------------------------------------------------------------------------------------------------- documentation

PAGE = Path(__file__).parents[1] / "docs" / "occupancy.md"


@pytest.mark.parametrize("index, block", list(enumerate(python_blocks(PAGE))))
def test_examples_of_the_page_run_and_print_what_it_says(index, block, capsys):
    exec(compile(block, f"docs/occupancy.md, example {index}", "exec"), {})
    printed = capsys.readouterr().out
    if index == 0:
        assert f"```\n{printed}```" in PAGE.read_text()
    else:
        rough, fine = map(float, printed.split())
        assert fine < 0.5 * rough
