"""Preprocessing fitted to data: normalization, principal components, whitening; each with its inverse.

All are modules, so that they move with the model, are saved in its checkpoint and loaded from it. `fit` takes a stream
of batches (B, *shape) and keeps only their number, mean and covariance, in float64: the data need not fit into memory,
and the covariance of D numbers takes 8 D^2 bytes (75 MB for 3 x 32 x 32).
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from vision3dgen.checks import check_choice


class Moments(NamedTuple):
    """Of n samples of D numbers: how many, mean, and covariance with divisor n - 1."""

    samples: int
    mean: Float[Tensor, "D"]
    covariance: Float[Tensor, "D D"]


def moments(batches: Iterable[Float[Tensor, "B *shape"]]) -> Moments:
    """Mean and covariance of the flattened items of a stream, a batch at a time. Source: Chan et al. 1983."""
    count, mean, scatter = 0, None, None
    for batch in batches:
        flat = batch.flatten(1).double()
        if not len(flat):
            continue
        own = flat.mean(0)
        centered = flat - own
        if mean is None or scatter is None:
            count, mean, scatter = len(flat), own, centered.T @ centered
            continue
        total, shift = count + len(flat), own - mean
        scatter = scatter + centered.T @ centered + torch.outer(shift, shift) * (count * len(flat) / total)
        mean, count = mean + shift * (len(flat) / total), total
    if mean is None or scatter is None or count < 2:
        raise ValueError(f"a covariance needs at least two samples, got {count}")
    return Moments(count, mean, scatter / (count - 1))


class Preprocess(nn.Module, ABC):
    """`fit` to batches, then `forward`, and `inverse` back; calling it unfitted is a ValueError."""

    def __init__(self) -> None:
        super().__init__()
        self.fitted: Tensor
        self.register_buffer("fitted", torch.tensor(False))

    @abstractmethod
    def fit(self, batches: Iterable[Float[Tensor, "B *shape"]]) -> "Preprocess":
        """Learn from batches; returns itself."""

    @abstractmethod
    def inverse(self, values: Tensor) -> Tensor:
        """What `forward` would have made the values from."""

    def save(self, path: Path) -> None:
        """Write the fitted state as safetensors."""
        self._check_fitted()
        save_model(self, str(path))

    def load(self, path: Path) -> "Preprocess":
        """Read what `save` wrote; another shape or kind is a ValueError."""
        try:
            load_model(self, path)
        except RuntimeError as error:
            raise ValueError(f"{path} is not of this {type(self).__name__}: {error}") from error
        return self

    def _check_fitted(self) -> None:
        if not self.fitted:
            raise ValueError(f"{type(self).__name__} must be fitted, or loaded, before it is used")


class Normalize(Preprocess):
    """Per channel (x - mean) / deviation, over items and positions, for (B, C, *).

    A channel that never changes has deviation 0 and is an error when fitting: leave it out, or add noise.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.zeros(channels, dtype=torch.float64))
        self.register_buffer("std", torch.ones(channels, dtype=torch.float64))

    def fit(self, batches: Iterable[Float[Tensor, "B C *shape"]]) -> "Normalize":
        found = moments(batch.movedim(1, -1).reshape(-1, len(self.mean)) for batch in batches)
        variance = found.covariance.diagonal() * ((found.samples - 1) / found.samples)
        flat = (variance <= 0).nonzero()
        if len(flat):
            raise ValueError(f"channel {int(flat[0, 0])} has the same value everywhere and cannot be normalized")
        self.mean.copy_(found.mean)
        self.std.copy_(variance.sqrt())
        self.fitted.fill_(True)
        return self

    def forward(self, values: Float[Tensor, "B C *shape"]) -> Float[Tensor, "B C *shape"]:
        self._check_fitted()
        return (values - self._along(self.mean, values)) / self._along(self.std, values)

    def inverse(self, values: Float[Tensor, "B C *shape"]) -> Float[Tensor, "B C *shape"]:
        self._check_fitted()
        return values * self._along(self.std, values) + self._along(self.mean, values)

    @staticmethod
    def _along(vector: Tensor, values: Tensor) -> Tensor:
        return vector.to(values).view(-1, *[1] * (values.ndim - 2))


class _Spectral(Preprocess):
    """What PCA and whitening share: eigenvectors of the covariance, the largest `components` of them."""

    def __init__(self, shape: Sequence[int], components: int | None):
        super().__init__()
        self.shape = tuple(shape)
        size = torch.Size(self.shape).numel()
        self.components = size if components is None else components
        if not 1 <= self.components <= size:
            raise ValueError(f"components must be from 1 to {size}, the numbers in an item, got {components}")
        self.mean: Tensor
        self.basis: Tensor
        self.variance: Tensor
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("basis", torch.zeros(size, self.components, dtype=torch.float64))
        self.register_buffer("variance", torch.zeros(self.components, dtype=torch.float64))

    def _fit(self, batches: Iterable[Tensor]) -> tuple[int, int]:
        """Eigenvectors by falling variance, signs so that each one's largest entry is positive; count and rank."""

        def checked() -> Iterable[Tensor]:
            for batch in batches:
                if tuple(batch.shape[1:]) != self.shape:
                    raise ValueError(f"items must be {self.shape}, got {tuple(batch.shape[1:])}")
                yield batch

        found = moments(checked())
        variance, basis = torch.linalg.eigh(found.covariance)
        variance, basis = variance.flip(0).clamp(min=0), basis.flip(1)
        largest = basis.abs().argmax(0)
        basis = basis * basis.gather(0, largest[None]).sign()
        # Below this a variance is rounding of the largest one, as in torch.linalg.matrix_rank.
        rank = int((variance > len(variance) * torch.finfo(torch.float64).eps * variance[0]).sum())
        self.mean.copy_(found.mean)
        self.basis.copy_(basis[:, : self.components])
        self.variance.copy_(variance[: self.components])
        self.fitted.fill_(True)
        return found.samples, rank

    def _project(self, values: Tensor) -> Tensor:
        self._check_fitted()
        return (values.flatten(1) - self.mean.to(values)) @ self.basis.to(values)

    def _unproject(self, scores: Tensor) -> Tensor:
        self._check_fitted()
        return (scores @ self.basis.to(scores).T + self.mean.to(scores)).view(-1, *self.shape)


class PCA(_Spectral):
    """Principal components: items (B, *shape) to scores (B, components), by falling variance, uncorrelated.

    The inverse is exact with all components; with fewer it is the nearest point of their subspace, and what is left out
    has the mean square of the omitted variances. `variance` holds those of the scores.
    """

    def __init__(self, shape: Sequence[int], components: int | None = None):
        super().__init__(shape, components)

    def fit(self, batches: Iterable[Float[Tensor, "B *shape"]]) -> "PCA":
        self._fit(batches)
        return self

    def forward(self, values: Float[Tensor, "B *shape"]) -> Float[Tensor, "B K"]:
        return self._project(values)

    def inverse(self, values: Float[Tensor, "B K"]) -> Float[Tensor, "B *shape"]:
        return self._unproject(values)


class Whiten(_Spectral):
    """Uncorrelated numbers of variance 1: z = (x - mean) U / sqrt(variance + epsilon), for "zca" turned back by U^T.

    "pca" gives scores (B, components); "zca" gives items of the data's own shape, the nearest to the data of all
    whitenings. The covariance over the data fitted to is the identity for `epsilon` 0, and diagonal with entries
    variance / (variance + epsilon) in the basis U otherwise. The inverse multiplies by the same roots and is exact, up
    to directions left out by `components`. Data that do not vary in some direction, as when there are fewer items
    than numbers, need an `epsilon` above 0 or fewer components: anything else is a ValueError that gives the rank.
    Source: Krizhevsky 2009, appendix A (ZCA); Bell and Sejnowski 1997.
    """

    def __init__(self, shape: Sequence[int], kind: str = "zca", components: int | None = None, epsilon: float = 0.0):
        check_choice("kind of whitening", kind, ("pca", "zca"))
        if not epsilon >= 0:
            raise ValueError(f"epsilon must be >= 0, got {epsilon}")
        super().__init__(shape, components)
        self.kind, self.epsilon = kind, epsilon

    def fit(self, batches: Iterable[Float[Tensor, "B *shape"]]) -> "Whiten":
        count, rank = self._fit(batches)
        if rank < self.components and self.epsilon == 0:
            self.fitted.fill_(False)
            raise ValueError(
                f"the {count} items vary in {rank} directions and {self.components} are to be whitened: "
                f"give epsilon > 0 or components <= {rank}"
            )
        return self

    def forward(self, values: Float[Tensor, "B *shape"]) -> Tensor:
        scores = self._project(values) / self._roots(values)
        return (scores @ self.basis.to(values).T).view(values.shape) if self.kind == "zca" else scores

    def inverse(self, values: Tensor) -> Float[Tensor, "B *shape"]:
        self._check_fitted()
        scores = values.flatten(1) @ self.basis.to(values) if self.kind == "zca" else values
        return self._unproject(scores * self._roots(values))

    def _roots(self, values: Tensor) -> Tensor:
        return (self.variance + self.epsilon).sqrt().to(values)


PREPROCESSING = {"normalize": Normalize, "pca": PCA, "whiten": Whiten}
