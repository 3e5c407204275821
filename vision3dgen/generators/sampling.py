"""One sampler for every autoregressive model: whole images or the rest of masked ones, fast or by the definition.

"naive" runs the whole network for each value, which defines the result. "cached" computes each layer once for each
place, from what the layers remember of the rows above and of the pixels to the left. "graph" is "cached" with the work
of a row captured in a CUDA graph, which is replayed for the other rows.

Every image has a random stream of its own, drawn from the generator in order: it does not depend on n, on batch_size,
on the method, nor on what is masked. (Rounding still does: a number that falls on the edge between two levels, to
seven digits, may go either way.)
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils import parametrize

from vision3dgen.checks import check_choice
from vision3dgen.generators.autoregressive import Autoregressive
from vision3dgen.generators.likelihoods import to_images, to_values
from vision3dgen.generators.masked import Cache

METHODS = ("cached", "naive", "graph")


def sample(
    model: Autoregressive, n: int, *, cond: Int[Tensor, " B"] | int | None = None,
    image: Float[Tensor, "..."] | None = None, mask: Bool[Tensor, "..."] | None = None, temperature: float = 1.0,
    generator: torch.Generator | None = None, method: str = "cached", batch_size: int | None = None,
) -> Float[Tensor, "n C H W"]:  # fmt: skip
    """n images in [0, 1] at the levels of the model's likelihood, on the model's device.

    cond: a class for each image, or one for all. image, mask: (n or 1, C, H, W) and (n or 1, 1, H, W), or without the
    first axis: where the mask is True the image's pixels are kept exactly, the others are drawn given all that come
    before them. temperature: below 1 more probable images, above 1 more varied ones. generator: a CPU generator; n
    calls for one image draw what one call for n does. batch_size: how many at once; all by default.
    Differs: what is kept below and right of a pixel does not change how it is drawn, as the model has no way to look
    there.
    """
    check_choice("method", method, METHODS)
    if n < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"n and batch_size must be at least 1, got {n} and {batch_size}")
    if not temperature > 0 or temperature == float("inf"):
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    device = next(model.parameters()).device
    if method == "graph" and (device.type != "cuda" or model.period is None):
        raise ValueError(
            f"method 'graph' needs a model on a CUDA device whose rows repeat, got {type(model).__name__} on {device}: "
            "use 'cached'"
        )
    if isinstance(cond, int):
        cond = torch.full((n,), cond)
    model.check_cond(cond, n)
    known, values = _observed(model, n, image, mask)
    seeds = torch.randint(2**62, (n,), generator=generator).tolist()
    size = batch_size or n
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), parametrize.cached():
            parts = [
                _Sampling(
                    model,
                    values[start : start + size].to(device),
                    known[start : start + size].to(device),
                    _uniforms(model, seeds[start : start + size]).to(device),
                    None if cond is None else cond[start : start + size].to(device),
                    temperature,
                ).run(method)
                for start in range(0, n, size)
            ]
    finally:
        model.train(training)
    return to_images(torch.cat(parts), model.likelihood.levels)


def _observed(
    model: Autoregressive, n: int, image: Tensor | None, mask: Tensor | None
) -> tuple[Bool[Tensor, "B 1 H W"], Int[Tensor, "B C H W"]]:
    """Which pixels are given, and their values, 0 elsewhere."""
    channels, height, width = model.image_shape
    if image is None and mask is None:
        return torch.zeros(n, 1, height, width, dtype=torch.bool), torch.zeros(n, *model.image_shape, dtype=torch.int64)
    if image is None or mask is None:
        raise ValueError("image and mask must be given together: mask is True where the image's pixels are kept")
    for name, tensor, planes in (("image", image, channels), ("mask", mask, 1)):
        shape = tuple(tensor.shape)
        if shape not in {(n, planes, height, width), (1, planes, height, width), (planes, height, width)} and (
            name == "image" or shape != (height, width)
        ):
            raise ValueError(
                f"{name} must be ({n} or 1, {planes}, {height}, {width}), the first axis may be left out, got {shape}"
            )
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be bool, True where pixels are kept, got {mask.dtype}")
    image = image.cpu().view(-1, channels, height, width)
    known = mask.cpu().view(-1, 1, height, width)
    values = to_values(torch.where(known, image, 0.0), model.likelihood.levels)
    return known.expand(n, -1, -1, -1), values.expand(n, -1, -1, -1).clone()


def _uniforms(model: Autoregressive, seeds: list[int]) -> Float[Tensor, "B U H W"]:
    """Random numbers for every pixel, from a stream for each image: the same whatever they are used for."""
    shape = (model.likelihood.uniforms, *model.image_shape[1:])
    return torch.stack([torch.rand(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class _Sampling:
    """One batch on its way: `values` are filled in from the top."""

    def __init__(
        self, model: Autoregressive, values: Tensor, known: Tensor, uniforms: Tensor, cond: Tensor | None,
        temperature: float,
    ):  # fmt: skip
        self.model, self.cond, self.temperature = model, cond, temperature
        self.values, self.known, self.uniforms = values, known, uniforms
        self.height, self.width = values.shape[2:]
        self.completes = bool(known.any())
        levels = model.likelihood.levels
        every = torch.arange(levels, device=values.device).view(1, 1, 1, -1)
        self.seen = (2 * to_images(every, levels) - 1).flatten()  # what the network sees of each value

    def run(self, method: str) -> Int[Tensor, "B C H W"]:
        if bool(self.known.all()):
            return self.values
        {"naive": self._naive, "cached": self._cached, "graph": self._graph}[method]()
        return self.values

    def _naive(self) -> None:
        for row in range(self.height):
            for column in range(self.width):
                for step in range(self.model.likelihood.steps):
                    outputs = self.model(to_images(self.values, self.model.likelihood.levels), self.cond)
                    values, known, uniforms = self._row(row)
                    self._decide(outputs[:, :, row, column], values, known, uniforms, column, step)

    def _cached(self) -> None:
        cache = Cache(self.width)
        above = self.values.new_zeros(len(self.values), self.values.shape[1], 1, self.width, dtype=torch.float32)
        first = self._prefill(cache)
        for row in range(first, self.height):
            if row:
                above = self._centered(self.values[:, :, row - 1 : row])
            self._fill_row(cache.at(row), above, *self._row(row))

    def _prefill(self, cache: Cache) -> int:
        """Read the rows at the top that are given in all images in one pass; returns how many."""
        complete = self.known.all(3).all(1).all(0).long()  # (H,)
        rows = int(complete.cumprod(0).sum())
        rows -= rows % (self.model.period or 1)
        if rows:
            x = self._centered(self.values[:, :, :rows])
            shifted = torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, :-1]], 2)
            self.model.horizontal(x, self.model.vertical(shifted, self.cond, cache), self.cond, cache)
        return rows

    def _fill_row(self, cache: Cache, above: Tensor, values: Tensor, known: Tensor, uniforms: Tensor) -> None:
        """Decide the pixels of a row, changing `values` (B, C, W) in place; `above` is the row above in [-1, 1]."""
        model, likelihood = self.model, self.model.likelihood
        rows = model.vertical(above, self.cond, cache)
        pixels = model.begin_row(len(values), rows, self.cond, cache)
        given, own, random = self._centered(values).unbind(2), values.unbind(2), uniforms.unbind(2)
        keep = known.unbind(2)
        for column, (x, pixel) in enumerate(zip(given, own)):
            for step in range(likelihood.steps):
                drawn = likelihood.sample(pixels.step(x, column), pixel, random[column], step, self.temperature)
                pixel.copy_(torch.where(keep[column], pixel, drawn) if self.completes else drawn)
                x = self._centered(pixel)
            pixels.observe(x, column)

    def _decide(self, outputs: Tensor, values: Tensor, known: Tensor, uniforms: Tensor, column: int, step: int) -> None:
        now = values[:, :, column]
        drawn = self.model.likelihood.sample(outputs.float(), now, uniforms[:, :, column], step, self.temperature)
        values[:, :, column] = torch.where(known[:, :, column], now, drawn)

    def _row(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Views of a row: values (B, C, W), known (B, 1, W), uniforms (B, U, W)."""
        return self.values[:, :, row], self.known[:, :, row], self.uniforms[:, :, row]

    def _centered(self, values: Tensor) -> Tensor:
        return self.seen[values]

    def _graph(self) -> None:
        """As `_cached`; rows that do the same share one captured graph, which works on buffers of a row.

        The first rows, up to the model's period, run as they are: they allocate what the layers remember.
        """
        cache, period = Cache(self.width), self.model.period or 1
        first = self._prefill(cache)
        buffers = tuple(torch.empty_like(part) for part in self._row(0))
        above = self._centered(torch.zeros_like(buffers[0]))[:, :, None] + 1  # zeros
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        for row in range(first, self.height):
            for buffer, part in zip(buffers, self._row(row)):
                buffer.copy_(part)
            if row:
                above.copy_(self._centered(self.values[:, :, row - 1 : row]))
            if row < first + period:
                self._fill_row(cache.at(row), above, *buffers)
            else:
                if row % period not in graphs:
                    torch.cuda.synchronize()
                    graphs[row % period] = graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        self._fill_row(cache.at(row), above, *buffers)
                graphs[row % period].replay()
            self.values[:, :, row] = buffers[0]
