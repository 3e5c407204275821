"""Normalization, PCA and whitening: covariance of the result, inverses, streams, kornia's ZCA, deficient ranks."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision3dgen.datasets import PCA, Normalize, Whiten
from vision3dgen.datasets.preprocess import moments

SHAPE = (2, 3, 5)  # 30 numbers
N = 211


def data(rank: int = 30, count: int = N, seed: int = 0) -> Tensor:
    """Correlated items far from zero that vary in `rank` directions, by very different amounts."""
    generator = torch.Generator().manual_seed(seed)
    mix = (
        torch.randn(rank, 30, dtype=torch.float64, generator=generator) * torch.logspace(0, -2, rank).double()[:, None]
    )
    return (torch.randn(count, rank, dtype=torch.float64, generator=generator) @ mix + 7).view(count, *SHAPE)


def stream(values: Tensor):
    """In uneven pieces, one of them empty."""
    return iter([values[:1], values[1:90], values[90:90], values[90:103], values[103:]])


def covariance(values: Tensor) -> Tensor:
    return torch.cov(values.flatten(1).T)


def test_moments_of_a_stream_are_those_of_the_whole():
    values = data()
    found = moments(stream(values))
    assert found.samples == N
    torch.testing.assert_close(found.mean, values.flatten(1).mean(0))
    torch.testing.assert_close(found.covariance, covariance(values))
    far = moments(stream(values + 1e6))  # no cancellation
    torch.testing.assert_close(far.covariance, covariance(values), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_whitened_covariance_is_the_identity_and_the_inverse_exact(kind: str):
    values = data()
    whiten = Whiten(SHAPE, kind).fit(stream(values))
    white = whiten(values)
    assert white.shape == ((N, 30) if kind == "pca" else values.shape)
    torch.testing.assert_close(covariance(white), torch.eye(30, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(white.flatten(1).mean(0), torch.zeros(30, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(whiten.inverse(white), values)
    new = data(seed=5, count=3).float()
    assert whiten(new).dtype == torch.float32
    torch.testing.assert_close(whiten.inverse(whiten(new)), new, rtol=1e-3, atol=1e-3)


def test_zca_is_kornias():
    from kornia.enhance import zca_whiten

    values = data()
    expected = zca_whiten(values.flatten(1), eps=1e-3).view(values.shape)
    torch.testing.assert_close(Whiten(SHAPE, "zca", epsilon=1e-3).fit([values])(values), expected)


def test_zca_stays_nearest_to_the_data():
    """Among whitenings, turned by any rotation, ZCA's correlate most with the data (Kessy et al. 2018)."""
    values = data()
    zca = Whiten(SHAPE, "zca").fit([values])(values).flatten(1)
    centered = values.flatten(1) - values.flatten(1).mean(0)
    turn = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    assert (zca - centered).square().sum() < (zca @ turn - centered).square().sum()
    torch.testing.assert_close(zca.T @ centered, (zca.T @ centered).T)


@pytest.mark.parametrize("kind", ["pca", "zca"])
def test_a_deficient_rank_needs_epsilon_or_fewer_components(kind: str):
    values = data(rank=4)
    with pytest.raises(ValueError, match=r"the 211 items vary in 4 directions and 30 are to be whitened.*<= 4"):
        Whiten(SHAPE, kind).fit(stream(values))
    few = Whiten(SHAPE, kind, components=4).fit(stream(values))
    torch.testing.assert_close(few.inverse(few(values)), values)
    eigenvalues = torch.linalg.eigvalsh(covariance(few(values))).flip(0)
    torch.testing.assert_close(eigenvalues[:4], torch.ones(4, dtype=torch.float64))
    soft = Whiten(SHAPE, kind, epsilon=0.01).fit(stream(values))
    torch.testing.assert_close(soft.inverse(soft(values)), values)
    variance = torch.linalg.eigvalsh(covariance(values)).flip(0).clamp(min=0)
    eigenvalues = torch.linalg.eigvalsh(covariance(soft(values))).flip(0)
    torch.testing.assert_close(eigenvalues, variance / (variance + 0.01), rtol=1e-7, atol=1e-9)
    fewer_items = data(count=13)
    with pytest.raises(ValueError, match="the 13 items vary in 12 directions"):
        Whiten(SHAPE, kind).fit([fewer_items])


def test_principal_components():
    values = data()
    pca = PCA(SHAPE).fit(stream(values))
    scores = pca(values)
    torch.testing.assert_close(covariance(scores), pca.variance.diag(), rtol=1e-9, atol=1e-9)
    assert (pca.variance.diff() <= 0).all()
    torch.testing.assert_close(pca.inverse(scores), values)
    few = PCA(SHAPE, components=7).fit(stream(values))
    torch.testing.assert_close(few(values), scores[:, :7])
    left_out = (few.inverse(few(values)) - values).square().sum() / (N - 1)
    assert left_out.item() == pytest.approx(pca.variance[7:].sum().item(), rel=1e-9)
    torch.testing.assert_close(few(few.inverse(few(values))), few(values))
    again = PCA(SHAPE).fit([values.flip(0)])  # signs do not hang on the order
    torch.testing.assert_close(again.basis, pca.basis, rtol=1e-6, atol=1e-8)


def test_channels_are_normalized_over_items_and_places():
    values = data()
    norm = Normalize(2).fit(stream(values))
    found = norm(values)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(found.square().mean((0, 2, 3)), torch.ones(2, dtype=torch.float64))
    torch.testing.assert_close(norm.inverse(found), values)
    flat = values.clone()
    flat[:, 1] = 3
    with pytest.raises(ValueError, match="channel 1 has the same value everywhere"):
        Normalize(2).fit([flat])


@pytest.mark.parametrize(
    "make", [lambda: Normalize(2), lambda: PCA(SHAPE, 5), lambda: Whiten(SHAPE, "zca", epsilon=0.1)]
)
def test_saved_and_loaded_equals(tmp_path: Path, make):
    values = data()
    first = make().fit(stream(values))
    first.save(tmp_path / "fitted.safetensors")
    second = make().load(tmp_path / "fitted.safetensors")
    assert torch.equal(first(values), second(values))
    with pytest.raises(ValueError, match="must be fitted, or loaded, before it is used"):
        make()(values)
    with pytest.raises(ValueError, match="must be fitted"):
        make().inverse(first(values))
    with pytest.raises(ValueError, match="must be fitted"):
        make().save(tmp_path / "unfitted")
    with pytest.raises(ValueError, match=r"fitted.safetensors is not of this PCA"):
        PCA((3,)).load(tmp_path / "fitted.safetensors")


def test_bad_values_are_named():
    with pytest.raises(ValueError, match="components must be from 1 to 30, the numbers in an item, got 31"):
        PCA(SHAPE, 31)
    with pytest.raises(ValueError, match="unknown kind of whitening 'zac'"):
        Whiten(SHAPE, "zac")
    with pytest.raises(ValueError, match="epsilon must be >= 0"):
        Whiten(SHAPE, epsilon=-1.0)
    with pytest.raises(ValueError, match=r"items must be \(2, 3, 5\), got \(30,\)"):
        PCA(SHAPE).fit([data().flatten(1)])
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        PCA(SHAPE).fit([data(count=1)])
