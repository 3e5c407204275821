"""One image in, one sentence out: a backbone and a sequence decoder."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.language import END, PAD
from vision3dgen.metrics import Caption
from vision3dgen.models.decoders import SequenceDecoder
from vision3dgen.models.reconstruction import IMAGENET_MEAN, IMAGENET_STD
from vision3dgen.models.search import Found, beam_search


class Captioner(nn.Module):
    """Captions of images (B, 3, H, W) in [0, 1], normalized here with ImageNet's mean and deviation.

    Trained by teacher forcing: the mean over words, padding left out, of -log p(word | the true words before).
    beams, length_penalty, max_length: of the search in `predict`, see `beam_search`. coverage: weight of the mean over
    images of Σ_i (1 - Σ_t α_ti)², which wants every place looked at (Xu et al. 2015, equation 14).
    """

    parts = ("model",)

    def __init__(
        self, backbone: nn.Module, decoder: SequenceDecoder, *, beams: int = 1, length_penalty: float = 0.0,
        max_length: int = 24, coverage: float = 0.0,
    ):  # fmt: skip
        super().__init__()
        self.backbone, self.decoder = backbone, decoder
        self.beams, self.length_penalty, self.max_length, self.coverage = beams, length_penalty, max_length, coverage
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def features(self, images: Float[Tensor, "B 3 H W"]) -> list[Tensor]:
        """The backbone's maps, fine to coarse."""
        normalized = (images - self.mean) / self.std
        # Convolutions of few channels are a quarter faster so, on a CPU with torch 2.13.
        return self.backbone(normalized.contiguous(memory_format=torch.channels_last))

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Found:
        """The best captions found."""
        features = self.features(images)
        return beam_search(
            self.decoder.step,
            self.decoder.start(features),
            len(images),
            beams=self.beams,
            max_length=self.max_length,
            length_penalty=self.length_penalty,
        )

    def loss(self, batch: dict[str, Any], part: str = "model") -> dict[str, Tensor]:
        """The mean over the words of the batch; "nats" is that without the coverage term."""
        self._check_vocabulary(batch)
        inputs, targets = _shifted(batch["tokens"])
        decoded = self.decoder(self.features(batch["image"]), inputs)
        nats = F.cross_entropy(decoded.logits.flatten(0, 1).float(), targets.flatten(), ignore_index=PAD)
        if not self.coverage or decoded.attention is None:
            return {"loss": nats}
        looked = (decoded.attention * (targets != PAD)[..., None, None]).sum(1)  # (B, h, w)
        return {"loss": nats + self.coverage * (1 - looked).square().sum((1, 2)).mean(), "nats": nats}

    @torch.no_grad()
    def validation_metrics(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): mean nats per word, and the share of words that are the most probable, given those before."""
        self._check_vocabulary(batch)
        inputs, targets = _shifted(batch["tokens"])
        logits = self.decoder(self.features(batch["image"]), inputs).logits.float()
        nats = F.cross_entropy(logits.transpose(1, 2), targets, ignore_index=PAD, reduction="none")  # (B, T)
        known = targets != PAD
        count = known.sum(1)
        right = (logits.argmax(2) == targets) & known
        return {"loss": nats.sum(1) / count, "accuracy": right.sum(1) / count}

    @torch.no_grad()
    def predict(self, batch: dict[str, Any]) -> list[Caption]:
        """One caption per image, <end> left out, with where each word was read."""
        self._check_vocabulary(batch)
        found = self(batch["image"])
        captions = []
        for index, tokens in enumerate(found.tokens):
            length = int(((tokens != PAD) & (tokens != END)).sum())
            looks = None if found.attention is None else found.attention[index, :length]
            captions.append(Caption(tokens[:length], found.log_probability[index], looks))
        return captions

    def _check_vocabulary(self, batch: dict[str, Any]) -> None:
        for vocabulary in batch.get("vocabulary", [])[:1]:  # all items of a dataset share it
            if len(vocabulary) != self.decoder.vocabulary_size:
                raise ValueError(
                    f"the decoder knows {self.decoder.vocabulary_size} words, the data's vocabulary has "
                    f"{len(vocabulary)}: set the decoder's vocabulary_size to it and train again"
                )


def _shifted(tokens: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Words read and words to say, cut to the longest caption of the batch."""
    longest = int((tokens != PAD).sum(1).max())
    return tokens[:, : longest - 1], tokens[:, 1:longest]
