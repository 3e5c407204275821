"""VQ-VAE: a picture as a small map of numbers of code vectors, which an autoregressive prior can learn.

    q(z) = the nearest code                     loss = -log p(x | q) + commitment * |z - stop(q)|^2

both terms summed over a picture and averaged over pictures, so that the batch size does not weigh them. The codes are
moving averages of the vectors they stand for; the decoder's gradient passes the quantizer as if it were not there.
Source: van den Oord et al. 2017 (arXiv:1711.00937), equations 1 to 3 and appendix A.1.
Differs: averages start empty, and a code without any keeps its place (an average that starts full and is divided by an
empty count throws away all codes that the first batch does not hit); k-means on the first batch; dead codes restart.
"""

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.config import Named
from vision3dgen.generators.decoder_likelihoods import DECODER_LIKELIHOODS, DecoderLikelihood
from vision3dgen.generators.decoders import MAP_DECODERS, MapDecoder
from vision3dgen.generators.encoders import MAP_ENCODERS, MapEncoder


class Quantized(NamedTuple):
    """What a map became."""

    maps: Float[Tensor, "B D H W"]  # the codes, with the gradient of the input
    codes: Int[Tensor, "B H W"]  # their numbers
    commitment: Float[Tensor, " B"]  # |z - q|^2, summed over the map
    perplexity: Tensor  # exp of the entropy of the codes used: how many are, if all equally often


class VectorQuantizer(nn.Module):
    """The nearest of `count` vectors at each place of a map (B, dims, H, W).

    In training mode codes follow the vectors nearest to them: averages of decay `decay`, free of the bias of their
    start. A code whose average count per batch falls below `restart_below` becomes a vector of the batch, at random;
    0 never restarts. With several processes each follows its own batches, and the first one's codes are kept.
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, count: int = 512, dims: int = 64, *, decay: float = 0.99, restart_below: float = 0.1):
        super().__init__()
        if count < 2 or not 0 <= decay < 1 or restart_below < 0:
            raise ValueError(
                "count must be at least 2, decay in [0, 1) and restart_below >= 0, got "
                f"{count}, {decay} and {restart_below}"
            )
        self.decay, self.restart_below = decay, restart_below
        self.register_buffer("codebook", torch.zeros(count, dims))
        self.register_buffer("counts", torch.zeros(count))  # biased averages, of hits and of the vectors that hit
        self.register_buffer("sums", torch.zeros(count, dims))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def nearest(self, vectors: Float[Tensor, "N D"]) -> Int[Tensor, " N"]:
        """The number of the code nearest to each vector, the first of equally near ones."""
        codes = self.codebook.to(vectors.dtype)
        return (codes.square().sum(1) - 2 * vectors @ codes.T).argmin(1)

    def lookup(self, codes: Int[Tensor, "B H W"]) -> Float[Tensor, "B D H W"]:
        """The map of codes by number; a number that is no code's is a ValueError."""
        if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < len(self.codebook):
            raise ValueError(
                f"codes must be 0 to {len(self.codebook) - 1}, got {int(codes.min())} to {int(codes.max())}"
            )
        return self.codebook[codes].movedim(-1, 1)

    def forward(self, maps: Float[Tensor, "B D H W"]) -> Quantized:
        vectors = maps.detach().float().movedim(1, -1).flatten(0, 2)  # (B H W, D)
        if self.training and int(self.updates) == 0:
            self.codebook.copy_(k_means(vectors, len(self.codebook)))
        nearest = self.nearest(vectors)
        codes = nearest.view(len(maps), *maps.shape[2:])
        quantized = self.codebook[codes].movedim(-1, 1).to(maps.dtype)
        hits = torch.bincount(nearest, minlength=len(self.codebook)).to(vectors.dtype)
        if self.training:
            self._follow(vectors, nearest, hits)
        commitment = (maps - quantized).square().flatten(1).sum(1)
        share = hits / hits.sum()
        perplexity = torch.special.entr(share).sum().exp()
        return Quantized(maps + (quantized - maps).detach(), codes, commitment, perplexity)

    @torch.no_grad()
    def _follow(self, vectors: Tensor, nearest: Tensor, hits: Tensor) -> None:
        self.updates += 1
        self.counts.lerp_(hits, 1 - self.decay)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, nearest, vectors), 1 - self.decay)
        known = self.counts > 1e-6
        self.codebook.copy_(
            torch.where(known[:, None], self.sums / self.counts.clamp_min(1e-6)[:, None], self.codebook)
        )
        unbiased = 1 - self.decay ** int(self.updates)  # an average that starts empty knows this much
        dead = (self.counts < self.restart_below * unbiased).nonzero()[:, 0]
        if len(dead):
            chosen = vectors[torch.randint(len(vectors), (len(dead),), device=vectors.device)]
            self.codebook[dead] = chosen
            self.counts[dead] = self.restart_below * unbiased  # it has as long to be hit as one that just died
            self.sums[dead] = chosen * self.restart_below * unbiased


@torch.no_grad()
def k_means(vectors: Float[Tensor, "N D"], count: int, iterations: int = 10) -> Float[Tensor, "K D"]:
    """`count` centers after Lloyd's iterations from vectors drawn at random; a center without vectors stays."""
    if not len(vectors):
        raise ValueError("k-means needs at least one vector, got none")
    order = torch.randperm(len(vectors), device=vectors.device)
    centers = vectors[order.repeat(-(-count // len(vectors)))[:count]].clone()  # repeated where there are too few
    for _ in range(iterations):
        nearest = (centers.square().sum(1) - 2 * vectors @ centers.T).argmin(1)
        sizes = torch.bincount(nearest, minlength=count).to(vectors.dtype)
        sums = torch.zeros_like(centers).index_add_(0, nearest, vectors)
        centers = torch.where(sizes[:, None] > 0, sums / sizes.clamp_min(1)[:, None], centers)
    return centers


class VQVAE(nn.Module):
    """An autoencoder whose code is a map of integers; 1x1 convolutions lead from the features to the code vectors.

    `codes` gives pictures as integer images (B, H', W') for a prior to train on, and `decode` makes pictures of them.
    prior: a model whose `sample(n, cond=, generator=)` gives such maps, integers (n, H', W') or as of `code_images`;
    without one `sample` is a ValueError. commitment: the beta of the paper.
    """

    parts = ("model",)

    def __init__(
        self,
        encoder: Annotated[MapEncoder, Named(MAP_ENCODERS, "residual")],
        decoder: Annotated[MapDecoder, Named(MAP_DECODERS, "residual")],
        likelihood: Annotated[DecoderLikelihood, Named(DECODER_LIKELIHOODS, "gaussian")],
        *,
        count: int = 512,
        commitment: float = 0.25,
        decay: float = 0.99,
        restart_below: float = 0.1,
    ):
        super().__init__()
        if not commitment > 0:
            raise ValueError(f"commitment must be > 0, got {commitment}")
        self.encoder, self.decoder, self.likelihood, self.commitment = encoder, decoder, likelihood, commitment
        self.project = nn.Conv2d(encoder.features, decoder.inputs, 1)
        self.quantizer = VectorQuantizer(count, decoder.inputs, decay=decay, restart_below=restart_below)
        self.prior: Any = None

    @torch.no_grad()
    def codes(self, images: Float[Tensor, "B C H W"]) -> Int[Tensor, "B H2 W2"]:
        """Pictures in [0, 1] as maps of code numbers."""
        maps = self.project(self.encoder(self.likelihood.observe(images)))
        nearest = self.quantizer.nearest(maps.movedim(1, -1).flatten(0, 2))
        return nearest.view(len(maps), *maps.shape[2:])

    def code_images(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 1 H2 W2"]:
        """Code maps as pictures of `count` grey levels in [0, 1], as a generator of pictures takes and makes them."""
        return self.codes(images)[:, None].float() / (len(self.quantizer.codebook) - 1)

    @torch.no_grad()
    def decode(self, codes: Int[Tensor, "B H2 W2"]) -> Float[Tensor, "B C H W"]:
        """The mean picture of maps of code numbers."""
        return self.likelihood.mean(self.decoder(self.quantizer.lookup(codes)))

    def forward(self, images: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
        """The pictures made again from their codes."""
        return self.decode(self.codes(images))

    @torch.no_grad()
    def sample(
        self, n: int, *, cond: Int[Tensor, " B"] | None = None, generator: torch.Generator | None = None
    ) -> Float[Tensor, "B C H W"]:
        """n pictures in [0, 1] of code maps drawn from the prior."""
        if self.prior is None:
            raise ValueError(
                "a VQ-VAE alone has no distribution over its codes: train a prior on codes(images), set it as `prior`"
            )
        codes = self.prior.sample(n, cond=cond, generator=generator)
        if codes.is_floating_point():
            codes = (codes[:, 0] * (len(self.quantizer.codebook) - 1)).round().long()
        return self.decode(codes).clamp(0, 1)

    def loss(self, batch: Mapping[str, Any], part: str = "model") -> dict[str, Tensor]:
        """Means over pictures, in nats; the log has the perplexity of the batch's codes."""
        observed = self.likelihood.observe(batch["image"])
        quantized = self.quantizer(self.project(self.encoder(observed)))
        reconstruction = self.likelihood.log_prob(self.decoder(quantized.maps), observed).mean()
        commitment = quantized.commitment.mean()
        return {
            "loss": self.commitment * commitment - reconstruction,
            "reconstruction": reconstruction,
            "commitment": commitment,
            "perplexity": quantized.perplexity,
        }

    @torch.no_grad()
    def validation_metrics(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """Per item (B,): log p(x | codes), and the mean squared error of a value."""
        observed = self.likelihood.observe(batch["image"])
        output = self.decoder(self.quantizer.lookup(self.codes(batch["image"])))
        error = (self.likelihood.mean(output) - observed).square().flatten(1).mean(1)
        return {"reconstruction": self.likelihood.log_prob(output, observed), "squared_error": error}
