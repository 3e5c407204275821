"""A class for every pixel of a picture: a backbone and a head, and an auxiliary head while it learns.

Sources: Long et al. 2015 (arXiv:1411.4038); Zhao et al. 2017, PSPNet (arXiv:1612.01105) for the auxiliary loss. `fcn`
on a ResNet-50 with `dilated=(False, True, True)` has the parameter names and outputs of torchvision's fcn_resnet50.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.backbones import Backbone
from vision3dgen.heads.segmentation import VOID, FCNHead, SemanticHead, UNetHead, check_semantic, pixel_cross_entropy
from vision3dgen.models.reconstruction import IMAGENET_MEAN, IMAGENET_STD


class ClassLogits(NamedTuple):
    """Of every pixel."""

    main: Float[Tensor, "B K H W"]
    auxiliary: Float[Tensor, "B K H W"] | None


class SemanticSegmentation(nn.Module):
    """`classifier` on the maps of `backbone`; `aux_classifier` adds its loss, `auxiliary` times, in training.

    Images are in [0, 1] and normalized here with `mean` and `std`. The loss is the mean cross-entropy over pixels of
    `batch["semantic"]` (classes from 0) that are not 255. Images of differing sizes come as a list, and go through one
    by one.
    """

    parts = ("model",)
    takes = "image"

    def __init__(
        self, backbone: Backbone, classifier: SemanticHead, aux_classifier: SemanticHead | None = None, *,
        auxiliary: float = 0.5, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
    ):  # fmt: skip
        super().__init__()
        if aux_classifier is not None and aux_classifier.classes != classifier.classes:
            raise ValueError(f"heads of {classifier.classes} and {aux_classifier.classes} classes do not go together")
        self.backbone, self.classifier, self.aux_classifier = backbone, classifier, aux_classifier
        self.auxiliary = auxiliary
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def classes(self) -> int:
        return self.classifier.classes

    def logits(self, images: Float[Tensor, "B 3 H W"]) -> ClassLogits:
        height, width = images.shape[-2:]
        features = self.backbone((images - self.mean) / self.std)
        auxiliary = None if self.aux_classifier is None else self.aux_classifier(features, (height, width))
        return ClassLogits(self.classifier(features, (height, width)), auxiliary)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B K H W"]:
        """Logits of the classes at the images' size."""
        height, width = images.shape[-2:]
        return self.classifier(self.backbone((images - self.mean) / self.std), (height, width))

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """ "semantic", "auxiliary" where there is such a head, and "loss"; "accuracy" of pixels for the log."""
        check_targets(batch, self.classes)
        main, auxiliary, right, asked = [], [], [], []
        for images, target in _groups(batch):
            found = self.logits(images)
            count = (target != VOID).sum()
            main.append(pixel_cross_entropy(found.main, target) * count)
            if found.auxiliary is not None:
                auxiliary.append(pixel_cross_entropy(found.auxiliary, target) * count)
            right.append(((found.main.detach().argmax(1) == target) & (target != VOID)).sum())
            asked.append(count)
        total = torch.stack(asked).sum().clamp(min=1)
        terms = {"semantic": torch.stack(main).sum() / total}
        loss = terms["semantic"]
        if auxiliary:
            terms["auxiliary"] = torch.stack(auxiliary).sum() / total
            loss = loss + self.auxiliary * terms["auxiliary"]
        return {"loss": loss, **terms, "accuracy": torch.stack(right).sum() / total}

    @torch.no_grad()
    def expected_initial_loss(self, batch: Mapping[str, Any]) -> float:
        """log K for each head: their last layers start small."""
        heads = 1.0 if self.aux_classifier is None else 1.0 + self.auxiliary
        return heads * float(torch.tensor(float(self.classes)).log())

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per image (B,): "semantic", the "accuracy" of its pixels, "miou" over the classes in it or found in it."""
        check_targets(batch, self.classes)
        rows = []
        for images, target in _groups(batch):
            for logits, own in zip(self(images), target):
                found, asked = logits.argmax(0), own != VOID
                accuracy = (found == own)[asked].float().mean() if bool(asked.any()) else logits.new_tensor(1.0)
                rows.append(
                    [pixel_cross_entropy(logits[None], own[None]), accuracy, image_miou(found[asked], own[asked])]
                )
        loss, accuracy, overlap = (torch.stack(column) for column in zip(*rows))
        return {"semantic": loss, "accuracy": accuracy, "miou": overlap}

    @torch.no_grad()
    def predict(self, batch: Mapping[str, Any]) -> Tensor | list[Tensor]:
        """The likeliest class of each pixel (B, H, W); a list where the images are one."""
        images = batch["image"]
        if isinstance(images, Tensor):
            return self(images).argmax(1)
        return [self(image[None])[0].argmax(0) for image in images]


def _groups(batch: Mapping[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Images and class maps that go through the network together."""
    if isinstance(batch["image"], Tensor):
        return [(batch["image"], batch["semantic"].long())]
    return [(image[None], target[None].long()) for image, target in zip(batch["image"], batch["semantic"])]


def check_targets(batch: Mapping[str, Any], classes: int) -> None:
    """Raise a ValueError naming image and fault for class maps that cannot be meant."""
    if "semantic" not in batch:
        raise ValueError(f"the loss needs 'semantic', the batch has {sorted(batch)}: add it to the data's fields")
    for index, (image, target) in enumerate(zip(batch["image"], batch["semantic"])):
        name = str(batch["id"][index]) if "id" in batch else str(index)
        check_semantic(target, (image.shape[-2], image.shape[-1]), classes, name)


def image_miou(found: Tensor, true: Tensor) -> Float[Tensor, ""]:
    """Mean IoU over the classes that are in either, 1 where there is no pixel."""
    classes = torch.cat([found, true]).unique()
    if not len(classes):
        return torch.ones((), device=found.device)
    a, b = found[None] == classes[:, None], true[None] == classes[:, None]
    return ((a & b).sum(1) / (a | b).sum(1)).mean()


# ------------------------------------------------------------------------------------------------------- factories


def fcn(
    backbone: Backbone, classes: int, *, hidden: int | None = None, dropout: float = 0.1,
    auxiliary: float = 0.5, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
) -> SemanticSegmentation:  # fmt: skip
    """A fully convolutional network: a head on the last map, and an auxiliary one on the map before.

    auxiliary: weight of the latter's loss; with 0 there is none.
    """
    head = FCNHead(backbone.channels, classes, hidden=hidden, dropout=dropout)
    second = FCNHead(backbone.channels, classes, level=-2, dropout=dropout) if auxiliary else None
    return SemanticSegmentation(backbone, head, second, auxiliary=auxiliary, mean=mean, std=std)


def unet(
    backbone: Backbone, classes: int, *, upsampling: str = "bilinear", width: int = 32,
    mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD,
) -> SemanticSegmentation:  # fmt: skip
    """A U-Net whose way down is any backbone; upsampling: a name of `layers.UPSAMPLINGS`."""
    head = UNetHead(backbone.channels, backbone.strides, classes, upsampling=upsampling, width=width)
    return SemanticSegmentation(backbone, head, mean=mean, std=std)
