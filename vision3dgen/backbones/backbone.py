"""What every backbone offers, and what it says to images it cannot take."""

from abc import ABC, abstractmethod

from jaxtyping import Float
from torch import Tensor, nn


class Backbone(nn.Module, ABC):
    """Images (B, C, H, W), normalized, to a list of maps, fine to coarse.

    `channels` and `strides` describe the maps: an image larger by one stride gives a map larger by one cell. With
    `num_classes` there is a classifier too, used by `logits`; without, its parameters do not exist. `smallest` is the
    shortest side an image may have.
    """

    channels: list[int]
    strides: list[int]

    def __init__(self, in_channels: int, smallest: int, num_classes: int | None = None):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("num_classes", num_classes)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.in_channels = in_channels
        self.smallest = smallest
        self.num_classes = num_classes

    @abstractmethod
    def forward(self, images: Float[Tensor, "B C H W"]) -> list[Tensor]:
        """Maps (B, channels[i], H_i, W_i)."""

    def check_images(self, images: Tensor) -> None:
        """Raise a ValueError saying what is wrong with images this network cannot take, and what it takes."""
        name = type(self).__name__
        if images.ndim != 4 or images.shape[1] != self.in_channels:
            raise ValueError(
                f"{name} takes images (B, {self.in_channels}, H, W) of {self.in_channels} channels, got "
                f"{tuple(images.shape)}"
            )
        if min(images.shape[2:]) < self.smallest:
            raise ValueError(
                f"{name} takes images of at least {self.smallest} x {self.smallest} pixels, got "
                f"{images.shape[2]} x {images.shape[3]}"
            )

    def check_statistics(self, images: Tensor) -> None:
        """Raise a ValueError where batch normalization in training would see one value per channel of the last map."""
        height, width = (-(-side // self.strides[-1]) for side in images.shape[2:])
        if len(images) * height * width == 1 and any(
            isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training for module in self.modules()
        ):
            raise ValueError(
                f"one image of {images.shape[2]} x {images.shape[3]} gives {type(self).__name__} a last map of 1 x 1, "
                "one value per channel, from which batch normalization cannot train: use two images or more, a larger "
                "image, or eval()"
            )


def pooled_logits(backbone: Backbone, fc: nn.Module | None, images: Tensor) -> Float[Tensor, "B K"]:
    """Class scores: the classifier on the mean over space of the last map."""
    return present(fc)(backbone(images)[-1].mean(dim=(2, 3)))


def present(classifier: nn.Module | None) -> nn.Module:
    """The classifier, or a ValueError where the network was built without."""
    if classifier is None:
        raise ValueError("this network has no classifier: build it with num_classes")
    return classifier
