"""Scores of generated pictures and of generated sets of shapes, on the features of any extractor.

A number here depends on the extractor, on how many samples there are of both kinds, and on their quantization: compare
none across them. Features are rows (N, D); all is computed in float64.
Source: Heusel et al. 2017 (FID, arXiv:1706.08500); Binkowski et al. 2018 (KID, arXiv:1801.01401); Salimans et al. 2016
(IS, arXiv:1606.03498); Kynkaanniemi et al. 2019 (precision and recall, arXiv:1904.06991); Naeem et al. 2020 (density
and coverage, arXiv:2002.09797); Achlioptas et al. 2018 (arXiv:1707.02392) and Yang et al. 2019 (arXiv:1906.12320) for
sets of shapes.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy.spatial import cKDTree
from torch import Tensor

from vision3dgen.checks import check_finite, check_shape
from vision3dgen.files import atomic_write
from vision3dgen.metrics.evaluator import Batches, Evaluator, Predict

Rows = Float[Tensor, "N D"]
Others = Float[Tensor, "M D"]
CHUNK = 2048  # rows of a distance matrix held at a time


class Features(NamedTuple):
    """What an extractor gives for pictures in [0, 1]."""

    features: Float[Tensor, "B D"]
    logits: Float[Tensor, "B K"] | None = None  # of a classifier, for the inception score


class Pair(NamedTuple):
    """Features of the real pictures of a batch, and of as many generated ones."""

    real: Features
    generated: Features


Extractor = Callable[[Tensor], Features]


def quantize(images: Float[Tensor, "B *S"]) -> Float[Tensor, "B *S"]:
    """Pictures in [0, 1] as read back from a file of bytes; values outside are clipped, as saving does."""
    return (images.clamp(0, 1) * 255).round() / 255


# ----------------------------------------------------------------------------------------------- FID, KID and IS


class Moments(NamedTuple):
    """Mean and unbiased covariance of rows, float64."""

    mean: Float[Tensor, " D"]
    covariance: Float[Tensor, "D D"]


def moments(features: Rows) -> Moments:
    """Of at least two rows."""
    check_finite(features=features)
    if len(features) < 2:
        raise ValueError(f"a covariance needs at least 2 rows, got {len(features)}")
    return Moments(features.double().mean(0), torch.atleast_2d(features.double().T.cov()))


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)): the squared 2-Wasserstein distance of two Gaussians.

    The trace of the root comes from the eigenvalues of S1^(1/2) S2 S1^(1/2), which is symmetric: no complex numbers, no
    epsilon, not even for singular covariances.
    """
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    between = torch.linalg.eigvalsh(root @ second.covariance @ root).clamp_min(0).sqrt().sum()
    apart = (first.mean - second.mean).square().sum()
    distance = apart + first.covariance.trace() + second.covariance.trace() - 2 * between
    return max(float(distance), 0.0)  # rounding may leave a small negative number for equal moments


def fid(real: Rows, generated: Others) -> float:
    """`frechet_distance` of the moments of features; a ValueError where there are not more samples than features.

    With fewer, the covariances are singular and the number measures the sample size: KID does not have that fault.
    """
    for name, rows in (("real", real), ("generated", generated)):
        if len(rows) <= rows.shape[1]:
            raise ValueError(
                f"FID of {rows.shape[1]} features needs more samples than that, got {len(rows)} {name} ones: take "
                "more, or KID"
            )
    return frechet_distance(moments(real), moments(generated))


class Kid(NamedTuple):
    """Mean and standard deviation over subsets; the mean may be negative, its expectation for equal laws is 0."""

    mean: float
    std: float


def polynomial_mmd(x: Float[Tensor, "N D"], y: Float[Tensor, "M D"]) -> Tensor:
    """The unbiased squared maximum mean discrepancy for the kernel (a.b / D + 1)^3."""
    if min(len(x), len(y)) < 2:
        raise ValueError(f"an unbiased discrepancy needs at least 2 rows of each, got {len(x)} and {len(y)}")
    x, y, dims = x.double(), y.double(), x.shape[1]
    within = []
    for rows in (x, y):
        kernel = (rows @ rows.T / dims + 1) ** 3
        count = len(rows)
        within.append((kernel.sum() - kernel.trace()) / (count * (count - 1)))
    return within[0] + within[1] - 2 * ((x @ y.T / dims + 1) ** 3).mean()


def kid(
    real: Rows, generated: Others, *, subsets: int = 100, size: int = 1000, generator: torch.Generator | None = None
) -> Kid:
    """`polynomial_mmd` over random subsets of `size` rows of each; published tables show it times 1000."""
    check_finite(real=real, generated=generated)
    smaller = min(len(real), len(generated))
    if subsets < 1 or not 2 <= size <= smaller:
        raise ValueError(f"subsets must be at least 1 and size 2 to the {smaller} rows, got {subsets} and {size}")
    found = []
    for _ in range(subsets):
        own = [
            rows[torch.randperm(len(rows), generator=generator)[:size].to(rows.device)] for rows in (real, generated)
        ]
        found.append(float(polynomial_mmd(*own)))
    values = torch.tensor(found, dtype=torch.float64)
    return Kid(float(values.mean()), float(values.std(correction=0)))


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the splits."""

    mean: float
    std: float


def inception_score(logits: Float[Tensor, "N K"], splits: int = 10) -> InceptionScore:
    """exp E KL(p(y | x) || p(y)) for `splits` parts of the samples in order: 1 at worst, K at best."""
    check_finite(logits=logits)
    if not 1 <= splits <= len(logits):
        raise ValueError(f"splits must be from 1 to the {len(logits)} samples, got {splits}")
    log_probabilities = logits.double().log_softmax(1)
    scores = []
    for part in log_probabilities.tensor_split(splits):
        marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(1).mean().exp())
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)))


# ------------------------------------------------------------------------------- fidelity and diversity, apart


class Manifold(NamedTuple):
    """How two sets of features cover each other (Kynkäänniemi et al. 2019; Naeem et al. 2020)."""

    precision: float  # share of generated samples within the reach of some real one
    recall: float  # share of real samples within the reach of some generated one
    density: float  # how many real samples reach a generated one, over `nearest`; may exceed 1
    coverage: float  # share of real samples that have a generated one within their reach


def _distances(x: Rows, y: Others) -> Iterator[Float[Tensor, "N M"]]:
    for start in range(0, len(x), CHUNK):
        yield torch.cdist(x[start : start + CHUNK], y, compute_mode="donot_use_mm_for_euclid_dist")


def manifold(real: Rows, generated: Others, *, nearest: int = 5) -> Manifold:
    """Precision, recall, density and coverage; the reach of a sample is the distance to its `nearest`-th other one.

    5 is the choice of Naeem et al.; Kynkaanniemi et al. take 3.
    """
    check_shape(real=(real, "N D"), generated=(generated, "M D"))
    check_finite(real=real, generated=generated)
    if not 1 <= nearest < min(len(real), len(generated)):
        raise ValueError(
            f"nearest must be from 1 to less than the {len(real)} real and {len(generated)} generated samples, got "
            f"{nearest}"
        )
    real, generated = real.double(), generated.double()
    reach_real, reach_generated = (
        torch.cat([part.kthvalue(nearest + 1, dim=1).values for part in _distances(rows, rows)])  # itself is at 0
        for rows in (real, generated)
    )
    reached = torch.zeros(len(generated), dtype=torch.int64, device=real.device)
    recalled, covered = [], []
    for number, part in enumerate(_distances(real, generated)):
        own = reach_real[number * CHUNK : number * CHUNK + len(part), None]
        reached += (part <= own).sum(0)
        recalled.append((part <= reach_generated).any(1))
        covered.append((part <= own).any(1))
    return Manifold(
        precision=float((reached > 0).double().mean()),
        recall=float(torch.cat(recalled).double().mean()),
        density=float(reached.double().mean() / nearest),
        coverage=float(torch.cat(covered).double().mean()),
    )


# ------------------------------------------------------------------------------------------------ sets of shapes


class SetScores(NamedTuple):
    """How a set of generated shapes covers a set of reference shapes, for one distance."""

    mmd: float  # minimum matching distance: mean over references of the distance to the nearest generated shape
    coverage: float  # share of the references that are nearest to some generated shape
    one_nna: float  # accuracy of telling the sets apart by the nearest neighbor, left out itself: 0.5 at best


Distance = Callable[[Tensor, Tensor], Tensor]  # clouds (B, N, 3), (B, M, 3) to (B,)


def set_distances(
    first: Float[Tensor, "G N 3"], second: Float[Tensor, "R M 3"], distance: Distance
) -> Float[Tensor, "G R"]:
    """`distance` of every pair, a row at a time."""
    rows = [distance(each.expand(len(second), -1, -1), second) for each in first]
    return torch.stack(rows) if rows else first.new_zeros(0, len(second))


def set_scores(
    cross: Float[Tensor, "G R"], generated: Float[Tensor, "G G"], reference: Float[Tensor, "R R"]
) -> SetScores:
    """From the distances of generated to reference shapes, and among each.

    Differs: of equally near neighbors the 1-NNA takes a generated one, as the one order of columns makes it.
    """
    check_shape(cross=(cross, "G R"), generated=(generated, "G G"), reference=(reference, "R R"))
    check_finite(cross=cross, generated=generated, reference=reference)
    count, references = cross.shape
    if not count or not references:
        raise ValueError(f"both sets must have shapes, got {count} generated and {references} reference ones")
    everything = torch.cat([torch.cat([generated, cross], 1), torch.cat([cross.T, reference], 1)])
    everything = everything.clone().fill_diagonal_(math.inf)
    is_generated = torch.arange(count + references, device=cross.device) < count
    right = is_generated[everything.argmin(1)] == is_generated
    return SetScores(
        mmd=float(cross.amin(0).double().mean()),
        coverage=len(cross.argmin(1).unique()) / references,
        one_nna=float(right.double().mean()),
    )


def jensen_shannon(first: Float[Tensor, "G N 3"], second: Float[Tensor, "R M 3"], *, resolution: int = 28) -> float:
    """Divergence in bits of where the points of all shapes of two sets are, on a grid of the ball of radius 0.5.

    Each point counts for the nearest of the resolution^3 grid points of [-0.5, 0.5]^3 that are in the ball: shapes are
    to be scaled into it first. Source: Achlioptas et al. 2018, section 4, with the ball of their code.
    """
    check_finite(first=first, second=second)
    if resolution < 2 or not first.numel() or not second.numel():
        raise ValueError(f"resolution must be at least 2 and both sets not empty, got {resolution}")
    axis = np.linspace(-0.5, 0.5, resolution)
    grid = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    grid = grid[np.linalg.norm(grid, axis=1) <= 0.5]
    tree = cKDTree(grid)
    shares = []
    for clouds in (first, second):
        cells = tree.query(clouds.detach().reshape(-1, 3).cpu().numpy())[1]
        counts = np.bincount(cells, minlength=len(grid))
        shares.append(torch.from_numpy(counts / counts.sum()))
    middle = (shares[0] + shares[1]) / 2
    entropies = [float(torch.special.entr(share).sum()) for share in (middle, *shares)]
    return max(entropies[0] - (entropies[1] + entropies[2]) / 2, 0.0) / math.log(2)


# ------------------------------------------------------------------------------------------------- the evaluation


@dataclass(frozen=True)
class GenerationScores:
    """Generated pictures against the real ones of a split. Samples whose features are not finite are failures: they
    are counted, listed, and in no other number.
    """

    total: int  # of each kind
    n_failed: int
    features: int
    fid: float
    kid: Kid
    inception: InceptionScore | None
    manifold: Manifold
    nearest: int
    kid_subsets: int
    kid_size: int
    failures: list[str]
    seed: int
    about: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain values for JSON."""
        values = asdict(self)
        named = {"kid": self.kid, "inception": self.inception, "manifold": self.manifold}
        return values | {name: None if value is None else value._asdict() for name, value in named.items()}

    def to_markdown(self) -> str:
        """A table, then what it rests on."""
        rows = [
            ("FID", f"{self.fid:.3f}"),
            ("KID x 1000", f"{1000 * self.kid.mean:.3f} ± {1000 * self.kid.std:.3f}"),
            (
                "inception score",
                "-" if self.inception is None else f"{self.inception.mean:.3f} ± {self.inception.std:.3f}",
            ),
            *((name, f"{value:.4f}") for name, value in self.manifold._asdict().items()),
        ]
        lines = ["| score | value |", "| --- | ---: |", *(f"| {name} | {value} |" for name, value in rows), ""]
        lines.append(
            f"{self.total} real and {self.total - self.n_failed} generated samples, {self.features} features, seed "
            f"{self.seed}; KID over {self.kid_subsets} subsets of {self.kid_size}, the last four with "
            f"{self.nearest} neighbors. n_failed {self.n_failed}."
        )
        return "\n".join(lines) + "\n"


@dataclass(frozen=True, kw_only=True)
class GenerationEvaluator(Evaluator):
    """As many generated pictures as the split has real ones, compared by the features of a classifier.

    extractor: the run folder of the classifier (a `Classifier`: the features are those before its last layer).
    nearest: neighbors of precision, recall, density and coverage. splits: of the inception score.
    """

    extractor: Path
    batch_size: int = 256
    nearest: int = 5
    kid_subsets: int = 100
    kid_size: int = 1000
    splits: int = 10

    def __post_init__(self) -> None:
        if min(self.nearest, self.kid_subsets, self.splits) < 1 or self.kid_size < 2:
            raise ValueError(
                "nearest, kid_subsets and splits must be at least 1 and kid_size 2, got "
                f"{self.nearest}, {self.kid_subsets}, {self.splits} and {self.kid_size}"
            )

    @property
    def names(self) -> Sequence[str]:
        return ["generation"]

    def score(
        self, name: str, batches: Batches, predict: Predict, out: Path, *, seed: int, about: Mapping[str, Any]
    ) -> GenerationScores:
        """`predict` gives a `Pair` for each batch. Each line of `out`: id of a real item, distance of the sample made
        beside it to the nearest real one, null if it failed.
        """
        ids: list[str] = []
        pairs: list[Pair] = []
        for batch in batches:
            pair = predict(batch)
            if len(pair.real.features) != len(pair.generated.features) or len(pair.real.features) != len(batch["id"]):
                raise ValueError(
                    f"predict must give {len(batch['id'])} rows of both kinds, got {len(pair.real.features)} and "
                    f"{len(pair.generated.features)}"
                )
            ids += batch["id"]
            pairs.append(pair)
        if not pairs:
            raise ValueError("there is nothing to evaluate: no batch was given")
        real = torch.cat([pair.real.features for pair in pairs])
        made = torch.cat([pair.generated.features for pair in pairs])
        logits = None
        if all(pair.generated.logits is not None for pair in pairs):
            logits = torch.cat([pair.generated.logits for pair in pairs])  # type: ignore[misc]
        fine = torch.isfinite(made).all(1)
        if not bool(fine.any()):
            raise ValueError(f"no feature of the {len(made)} generated samples is finite")
        closest = torch.full((len(made),), math.nan, dtype=torch.float64)
        closest[fine] = torch.cat([part.amin(1) for part in _distances(made[fine].double(), real.double())])
        rows = [
            {"id": each, "nearest_real": None if math.isnan(distance) else distance}
            for each, distance in zip(ids, closest.tolist())
        ]
        header = {"evaluation": name, "seed": seed, "about": dict(about)}
        with atomic_write(out) as file:
            file.write("".join(json.dumps(row, allow_nan=False) + "\n" for row in [header, *rows]).encode())
        made, logits = made[fine], None if logits is None else logits[fine]
        generator = torch.Generator().manual_seed(seed)
        return GenerationScores(
            total=len(real),
            n_failed=int((~fine).sum()),
            features=real.shape[1],
            fid=fid(real, made),
            kid=kid(real, made, subsets=self.kid_subsets, size=self.kid_size, generator=generator),
            inception=None if logits is None else inception_score(logits, self.splits),
            manifold=manifold(real, made, nearest=self.nearest),
            nearest=self.nearest,
            kid_subsets=self.kid_subsets,
            kid_size=self.kid_size,
            failures=[each for each, good in zip(ids, fine.tolist()) if not good],
            seed=seed,
            about=dict(about),
        )
