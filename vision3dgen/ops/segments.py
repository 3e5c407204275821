"""Segments of a picture: regions of similar color, by a graph of its pixels.

Source: Felzenszwalb and Huttenlocher, Efficient Graph-Based Image Segmentation, IJCV 2004.
"""

import numpy as np
from jaxtyping import Float, Int
from scipy import ndimage
from torch import Tensor, from_numpy

from vision3dgen.checks import check_numbers, check_shape

_STEPS = ((0, 1), (1, 0), (1, 1), (1, -1))  # to half of the eight neighbors: the other half has the same edges


def graph_segments(
    image: Float[Tensor, "C H W"], scale: float = 100.0, *, sigma: float = 0.8, smallest: int = 20
) -> Int[Tensor, "H W"]:
    """The segment of each pixel, numbered from 0 in the order of their first pixels.

    Two segments become one if the lightest edge between them is at most as heavy as the heaviest edge of either's
    minimum spanning tree plus scale / its pixels; an edge between neighbors of eight weighs as much as their colors
    differ (Euclidean; the image is taken times 255, which `scale` is meant for) after smoothing by `sigma` pixels. At
    last segments of fewer than `smallest` pixels join the neighbor of least difference. Equal edges are looked at from
    the top left.
    """
    check_shape(image=(image, "C H W"))
    check_numbers(image=image)
    if not image.numel():
        raise ValueError(f"image must have a pixel and a channel at least, got {tuple(image.shape)}")
    if scale < 0 or sigma < 0 or smallest < 0:
        raise ValueError(f"scale, sigma and smallest must be at least 0, got {scale}, {sigma} and {smallest}")
    pixels = 255 * image.detach().double().cpu().numpy()
    if sigma:
        pixels = ndimage.gaussian_filter(pixels, (0, sigma, sigma), mode="nearest")
    height, width = pixels.shape[1:]
    numbers = np.arange(height * width).reshape(height, width)
    firsts, seconds, weights = [], [], []
    for down, right in _STEPS:
        a = (slice(0, height - down), slice(max(-right, 0), width - max(right, 0)))
        b = (slice(down, height), slice(max(right, 0), width - max(-right, 0)))
        firsts.append(numbers[a].ravel())
        seconds.append(numbers[b].ravel())
        weights.append(np.sqrt(((pixels[(slice(None), *a)] - pixels[(slice(None), *b)]) ** 2).sum(0)).ravel())
    weight = np.concatenate(weights)
    order = np.argsort(weight, kind="stable")
    first, second = np.concatenate(firsts)[order].tolist(), np.concatenate(seconds)[order].tolist()
    roots = _joined(first, second, weight[order].tolist(), height * width, scale, smallest)
    _, where, inverse = np.unique(roots, return_index=True, return_inverse=True)
    rank = np.empty_like(where)
    rank[np.argsort(where)] = np.arange(len(where))
    return from_numpy(rank[inverse.reshape(height, width)])


def _joined(
    first: list[int], second: list[int], weight: list[float], count: int, scale: float, smallest: int
) -> Int[np.ndarray, " N"]:
    """The root of each pixel after all edges, lightest first."""
    parent, size = list(range(count)), [1] * count
    limit = [scale] * count  # heaviest edge inside plus scale / size
    left_out: list[int] = []

    def root(pixel: int) -> int:
        while parent[pixel] != pixel:
            parent[pixel] = pixel = parent[parent[pixel]]
        return pixel

    def join(a: int, b: int) -> int:
        if size[a] < size[b]:
            a, b = b, a
        parent[b] = a
        size[a] += size[b]
        return a

    for number, (one, other, heavy) in enumerate(zip(first, second, weight)):
        a, b = root(one), root(other)
        if a == b:
            continue
        if heavy <= limit[a] and heavy <= limit[b]:
            joined = join(a, b)
            limit[joined] = heavy + scale / size[joined]
        else:
            left_out.append(number)
    for number in left_out:
        a, b = root(first[number]), root(second[number])
        if a != b and min(size[a], size[b]) < smallest:
            join(a, b)
    return np.array([root(pixel) for pixel in range(count)])
