"""Image classification: nearest neighbors, linear classifiers, fully connected networks, and any backbone.

All take images (B, C, H, W) in [0, 1] and normalize them themselves; `predict` gives class scores (B, K), larger for
classes that are more likely, which is what `metrics.ClassEvaluator` takes.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.backbones import Backbone
from vision3dgen.checks import check_choice
from vision3dgen.layers import activation as make_activation
from vision3dgen.losses import check_labels, multiclass_hinge, softmax_cross_entropy

LOSSES = {"softmax": softmax_cross_entropy, "hinge": multiclass_hinge}


class Recognition(nn.Module, ABC):
    """A differentiable classifier: `forward` gives scores (B, K), `loss` compares them with the labels of a batch.

    loss: "softmax" (cross-entropy) or "hinge" (multiclass SVM, margin 1). mean, std: of a value, or of each channel, to
    normalize images with.
    """

    parts = ("model",)

    def __init__(self, loss: str, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        check_choice("loss", loss, LOSSES)
        if len(mean) != len(std) or not mean or min(std) <= 0:
            raise ValueError(f"mean and std must be as many, and std > 0, got {list(mean)} and {list(std)}")
        self.loss_name = loss
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(-1, 1, 1), persistent=False)

    @abstractmethod
    def scores(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        """Class scores of normalized images; a softmax makes them probabilities."""

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        if images.ndim != 4 or len(self.mean) not in (1, images.shape[1]):
            raise ValueError(
                f"images must be (B, {len(self.mean) if len(self.mean) > 1 else 'C'}, H, W) with as many channels as "
                f"mean and std have values, got {tuple(images.shape)}"
            )
        return self.scores((images - self.mean) / self.std)

    def losses(self, scores: Float[Tensor, "B K"], labels: Tensor) -> Float[Tensor, " B"]:
        """The loss of each item."""
        return LOSSES[self.loss_name](scores, labels)

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Mean loss over the batch, and the accuracy on it for the log."""
        scores, labels = self(batch["image"]), batch["label"]
        terms = {"loss": self.losses(scores, labels).mean()}
        if not labels.is_floating_point():
            terms["accuracy"] = (scores.detach().argmax(1) == labels).float().mean()
        return terms

    @torch.no_grad()
    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float:
        """The loss of equal scores: log K for softmax, K - 1 for hinge."""
        return float(self.losses(torch.zeros_like(self(batch["image"])), batch["label"]).mean())

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): the loss, and whether the class with the largest score is right."""
        scores, labels = self(batch["image"]), batch["label"]
        return {"loss": self.losses(scores, labels), "accuracy": (scores.argmax(1) == labels).float()}

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> Float[Tensor, "B K"]:
        """Log probabilities for softmax, plain scores for hinge."""
        scores = self(batch["image"])
        return scores.log_softmax(1) if self.loss_name == "softmax" else scores


class LinearClassifier(Recognition):
    """scores = W x + b on the pixels of images of one shape (C, H, W).

    Weights start small and random (deviation 1e-3), so that the first softmax loss is log K and the first hinge loss
    K - 1.
    """

    def __init__(
        self, image_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, *, loss: str = "softmax",
        mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,),
    ):  # fmt: skip
        super().__init__(loss, mean, std)
        self.image_shape = tuple(image_shape)
        self.fc = nn.Linear(math.prod(image_shape), classes)
        _start_small(self.fc)

    def scores(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        _check_images(self, images, self.image_shape)
        return self.fc(images.flatten(1))

    def templates(self) -> Float[Tensor, "K C H W"]:
        """The weights of each class as a picture: an image scores as much as it looks like one."""
        return self.fc.weight.detach().view(-1, *self.image_shape)


class FullyConnected(Recognition):
    """Linear layers with an activation between them, on the pixels of images of one shape (C, H, W).

    hidden: widths of the hidden layers. activation: a name of `layers.ACTIVATIONS`. Weights start as Kaiming's, those
    of the last layer small.
    """

    def __init__(
        self, hidden: Sequence[int] = (256,), image_shape: tuple[int, int, int] = (1, 28, 28), classes: int = 10, *,
        activation: str = "relu", dropout: float = 0.0, loss: str = "softmax", mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
    ):  # fmt: skip
        super().__init__(loss, mean, std)
        self.image_shape = tuple(image_shape)
        layers: list[nn.Module] = []
        inputs = math.prod(image_shape)
        for width in hidden:
            linear = nn.Linear(inputs, width)
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)
            layers += [linear, make_activation(activation)] + ([nn.Dropout(dropout)] if dropout else [])
            inputs = width
        self.hidden = nn.Sequential(*layers)
        self.fc = nn.Linear(inputs, classes)
        _start_small(self.fc)

    def scores(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        _check_images(self, images, self.image_shape)
        return self.fc(self.hidden(images.flatten(1)))


class Classifier(Recognition):
    """A backbone and a linear layer on the mean over space of its last map.

    A backbone built with `num_classes` brings a classifier of its own (as published for AlexNet, VGG and LeNet-5),
    which is used instead; `classes` must then be that number.
    """

    def __init__(
        self, backbone: Backbone, classes: int = 10, *, dropout: float = 0.0, loss: str = "softmax",
        mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.5,),
    ):  # fmt: skip
        super().__init__(loss, mean, std)
        if backbone.num_classes not in (None, classes):
            raise ValueError(
                f"the backbone has a classifier of {backbone.num_classes} classes, the model is to have {classes}: "
                "leave out num_classes, or make them equal"
            )
        self.backbone = backbone
        self.dropout = nn.Dropout(dropout)
        self.fc = None
        if backbone.num_classes is None:
            self.fc = nn.Linear(backbone.channels[-1], classes)
            _start_small(self.fc)

    def features(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B D"]:
        """The mean over space of the last map, for images in [0, 1]."""
        return self.backbone((images - self.mean) / self.std)[-1].mean(dim=(2, 3))

    def scores(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B K"]:
        if self.fc is None:
            return self.backbone.logits(images)  # type: ignore[operator]
        return self.fc(self.dropout(self.backbone(images)[-1].mean(dim=(2, 3))))


def _start_small(layer: nn.Linear) -> None:
    nn.init.normal_(layer.weight, std=1e-3)
    nn.init.zeros_(layer.bias)


def _check_images(model: nn.Module, images: Tensor, shape: tuple[int, ...]) -> None:
    if images.shape[1:] != shape:
        raise ValueError(f"{type(model).__name__} takes images {('B', *shape)}, got {tuple(images.shape)}")


# ------------------------------------------------------------------------------------------- nearest neighbors


class Neighbors(NamedTuple):
    """The nearest training items of each query, nearest first; equal distances in the order of the training set."""

    distances: Float[Tensor, "B k"]
    indices: Int[Tensor, "B k"]


class NearestNeighbors:
    """The majority class of the `k` training images nearest to an image.

    metric: "l1", "l2" or "cosine" (1 - cosine similarity) on the pixels. A tie of votes goes to the class whose nearest
    member is nearest. Distances are computed directly, not through a matrix product, so that equal images are at equal
    distance; at most about `memory` bytes of them are held at a time.
    """

    def __init__(
        self, images: Float[Tensor, "N *S"], labels: Int[Tensor, " N"], classes: int, *, k: int = 1,
        metric: str = "l2", memory: int = 1 << 28,
    ):  # fmt: skip
        check_choice("metric", metric, ("l1", "l2", "cosine"))
        if not 1 <= k <= len(images):
            raise ValueError(f"k must be from 1 to the {len(images)} training images, got {k}")
        if memory < 1:
            raise ValueError(f"memory must be at least 1 byte, got {memory}")
        check_labels(labels, images.new_empty(len(images), classes))
        self.shape = tuple(images.shape[1:])
        self.labels, self.classes, self.k, self.metric, self.memory = labels, classes, k, metric, memory
        self.rows = self._rows(images, "training image")

    @staticmethod
    def gather(
        batches: Iterable[Mapping[str, Any]], classes: int, *, device: torch.device | str = "cpu", **settings: Any
    ) -> "NearestNeighbors":
        """Read a whole training set and keep it on `device`; `settings` are those of the constructor."""
        images, labels = [], []
        for batch in batches:
            images.append(batch["image"])
            labels.append(batch["label"])
        if not images:
            raise ValueError("nearest neighbors need at least one training batch, got none")
        return NearestNeighbors(torch.cat(images).to(device), torch.cat(labels).to(device), classes, **settings)

    def neighbors(self, images: Float[Tensor, "B *S"]) -> Neighbors:
        """The k nearest training items of each image, whatever the number of images."""
        queries = self._rows(images, "image")
        step = max(self.memory // (3 * self.rows.element_size() * len(self.rows)), 1)  # distances, sorting, indices
        found = [self._nearest(queries[start : start + step]) for start in range(0, len(queries), step)]
        if not found:
            return Neighbors(queries.new_empty(0, self.k), self.labels.new_empty(0, self.k))
        return Neighbors(torch.cat([each.distances for each in found]), torch.cat([each.indices for each in found]))

    def scores(self, images: Float[Tensor, "B *S"]) -> Float[Tensor, "B K"]:
        """Votes for each class, plus a fraction of one that is larger the nearer its nearest member among the k."""
        classes = self.labels[self.neighbors(images).indices]  # (B, k)
        votes = torch.zeros(len(classes), self.classes, device=classes.device)
        votes.scatter_add_(1, classes, torch.ones_like(classes, dtype=votes.dtype))
        bonus = (self.k - torch.arange(self.k, device=classes.device)) / (self.k + 1)
        nearest = torch.zeros_like(votes).scatter_reduce_(1, classes, bonus.expand(classes.shape).contiguous(), "amax")
        return votes + nearest

    def predict(self, batch: Mapping[str, Any]) -> Float[Tensor, "B K"]:
        """`scores` of a batch's images: the largest is the class."""
        return self.scores(batch["image"])

    def _rows(self, images: Tensor, what: str) -> Float[Tensor, "B D"]:
        if tuple(images.shape[1:]) != self.shape:
            raise ValueError(f"images must be {('B', *self.shape)}, as in training, got {tuple(images.shape)}")
        rows = images.flatten(1)
        rows = rows.float() if rows.dtype.itemsize < 4 else rows
        if self.metric != "cosine":
            return rows
        length = rows.norm(dim=1, keepdim=True)
        if bool((length == 0).any()):
            raise ValueError(f"{what} {int((length == 0).nonzero()[0, 0])} is 0 everywhere: it has no cosine")
        return rows / length

    def _nearest(self, queries: Float[Tensor, "B D"]) -> Neighbors:
        direct = "donot_use_mm_for_euclid_dist"
        distances = torch.cdist(queries, self.rows, p=1.0 if self.metric == "l1" else 2.0, compute_mode=direct)
        farthest = distances.kthvalue(self.k, dim=1, keepdim=True).values
        # All candidates, more than k where distances are equal, in the order of the training set, then by distance.
        count = int((distances <= farthest).sum(1).max()) if len(queries) else self.k
        candidates = distances.topk(count, largest=False).indices.sort(dim=1).values
        near, order = distances.gather(1, candidates).sort(dim=1, stable=True)
        near, indices = near[:, : self.k], candidates.gather(1, order)[:, : self.k]
        return Neighbors(near.square() / 2 if self.metric == "cosine" else near, indices)  # |a - b|^2 = 2 - 2 cos
