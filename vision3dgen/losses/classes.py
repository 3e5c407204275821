"""Losses of class scores against labels: one number per item."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def softmax_cross_entropy(scores: Float[Tensor, "B K"], labels: Tensor) -> Float[Tensor, " B"]:
    """-log of the probability that softmax(scores) gives to the label, in nats; log K where all scores are equal.

    labels: classes (B,), or probabilities (B, K) of mixed images, for which it is the expectation.
    """
    check_labels(labels, scores)
    return F.cross_entropy(scores.float() if scores.dtype.itemsize < 4 else scores, labels, reduction="none")


def multiclass_hinge(scores: Float[Tensor, "B K"], labels: Tensor, margin: float = 1.0) -> Float[Tensor, " B"]:
    """sum over j != y of max(0, s_j - s_y + margin), y the label; (K - 1) * margin where all scores are equal.

    labels: classes (B,). At a kink the gradient is that of the flat side. Source: Weston and Watkins 1999.
    Differs: torch's `multi_margin_loss`, which computes it, divides by K.
    """
    check_labels(labels, scores)
    if not margin > 0:
        raise ValueError(f"margin must be > 0, got {margin}")
    if labels.is_floating_point():
        raise ValueError("the hinge loss takes classes as labels, not probabilities")
    scores = scores.float() if scores.dtype.itemsize < 4 else scores
    return F.multi_margin_loss(scores, labels, margin=margin, reduction="none") * scores.shape[1]


def check_labels(labels: Tensor, scores: Float[Tensor, "B K"]) -> None:
    """Raise a ValueError unless labels are one class below K, or probabilities of K classes, for each row of scores."""
    count, classes = scores.shape
    if labels.is_floating_point():
        if labels.shape != scores.shape:
            raise ValueError(f"labels as probabilities must be {(count, classes)}, got {tuple(labels.shape)}")
        return
    if labels.shape != (count,):
        raise ValueError(f"labels must be ({count},), one class for each row of scores, got {tuple(labels.shape)}")
    wrong = (labels < 0) | (labels >= classes)
    if bool(wrong.any()):
        index = int(wrong.nonzero()[0])
        raise ValueError(
            f"labels must be 0 to {classes - 1} for {classes} classes, got {int(labels[index])} at {index}"
        )
