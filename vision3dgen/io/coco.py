"""Masks in COCO's files: run lengths as a list or as a string, polygons."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int64

from vision3dgen.files import FileError
from vision3dgen.ops.rle import Rle, check_rle, polygons_to_rle

_OFFSET = 48  # of a digit's character
_MORE, _SIGN, _BITS = 32, 16, 5  # another digit follows; the number is negative; bits of a digit


def rle_from_coco(segmentation: Any, size: tuple[int, int], where: str) -> Rle:
    """The mask of an annotation's "segmentation": polygons, or {"size": [H, W], "counts": list or string}.

    size: of the picture. Raises FileError that says `where` for a mask of another size, runs that do not add up to it,
    a string that is cut short, a polygon of fewer than three points.
    """
    try:
        if isinstance(segmentation, list):
            return polygons_to_rle(segmentation, size)
        if not isinstance(segmentation, Mapping) or not {"size", "counts"} <= set(segmentation):
            raise ValueError('must be polygons or {"size": [H, W], "counts": ...}')
        found = tuple(segmentation["size"])
        if found != tuple(size):
            raise ValueError(f"the run lengths are of {_times(found)} pixels, the picture is {_times(size)}")
        counts = segmentation["counts"]
        if isinstance(counts, list):
            numbers = np.array(counts, dtype=np.int64)
        else:
            numbers = _from_string(counts if isinstance(counts, bytes) else str(counts).encode("ascii"))
        rle = Rle((int(size[0]), int(size[1])), numbers)
        check_rle(rle, "run lengths")
        return rle
    except (ValueError, TypeError, OverflowError) as error:
        raise FileError(f"{where}: segmentation: {error}") from error


def rle_to_coco(rle: Rle, *, compressed: bool = True) -> dict[str, Any]:
    """{"size": [H, W], "counts": ...}, with the run lengths as COCO's string or as a list."""
    counts: Any = _to_string(rle.counts) if compressed else rle.counts.tolist()
    return {"size": list(rle.size), "counts": counts}


def _times(size: Any) -> str:
    return " x ".join(str(side) for side in size)


# A number is written in digits of 5 bits, lowest first, in two's complement; a digit's sixth bit says that another one
# follows. From the fourth count on it is the difference to the count two before, for runs inside and outside alternate.


def _to_string(counts: Int64[np.ndarray, " R"]) -> str:
    numbers = counts.tolist()
    letters = []
    for index, count in enumerate(numbers):
        left = count - numbers[index - 2] if index > 2 else count
        while True:
            digit, left = left & (_MORE - 1), left >> _BITS
            done = left == (-1 if digit & _SIGN else 0)
            letters.append(chr(_OFFSET + (digit if done else digit | _MORE)))
            if done:
                break
    return "".join(letters)


def _from_string(text: bytes) -> Int64[np.ndarray, " R"]:
    if not text:
        return np.zeros(0, dtype=np.int64)
    digits = np.frombuffer(text, dtype=np.uint8).astype(np.int64) - _OFFSET
    if digits.min() < 0 or digits.max() >= 2 * _MORE:
        at = int(np.flatnonzero((digits < 0) | (digits >= 2 * _MORE))[0])
        raise ValueError(f"the string of run lengths has {chr(text[at])!r} at {at}, which is none of its characters")
    last = (digits & _MORE) == 0
    if not last[-1]:
        raise ValueError("the string of run lengths is cut short")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    if (ends - starts).max() > 11:
        raise ValueError("the string of run lengths has a number of more than 60 bits")
    place = _BITS * (np.arange(len(digits)) - np.repeat(starts, ends - starts + 1))
    numbers = np.add.reduceat((digits & (_MORE - 1)) << place, starts)
    numbers -= np.where(digits[ends] & _SIGN, np.int64(1) << (_BITS * (ends - starts + 1)), 0)
    for odd in (1, 2):  # sums of the differences, within the runs outside and those inside
        numbers[odd::2] = numbers[odd::2].cumsum()
    return numbers
