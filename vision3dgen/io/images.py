"""Image files: 8-bit pictures and 16-bit depth maps."""

import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from vision3dgen.checks import check_choice
from vision3dgen.files import FileError, atomic_write

_BYTES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA")  # modes with at most 8 bits a channel that convert without loss


def read_image(
    path: str | os.PathLike[str], size: tuple[int, int] | None = None, mode: str = "RGBA"
) -> UInt8[np.ndarray, "H W *C"]:
    """Read a picture as (H, W, 4) for "RGBA", (H, W, 3) for "RGB", (H, W) for "L".

    size: the (H, W) it must have. Raises FileError naming file and reason: another size, cut short, no image, 16 bits.
    """
    check_choice("mode", mode, ("L", "RGB", "RGBA"))
    image = _decode(Path(path), size)
    if image.mode not in (*_BYTES, "CMYK", "YCbCr"):
        raise FileError(f"{path}: mode {image.mode} has more than 8 bits a channel; read depth with read_depth_png")
    return np.array(image.convert(mode))


def read_index_png(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> UInt8[np.ndarray, "H W"]:
    """Read the numbers that pixels hold: indices of a palette, whatever its colors, or gray values.

    size: the (H, W) it must have. Raises FileError naming file and reason, colors without a palette among them.
    """
    image = _decode(Path(path), size)
    if image.mode not in ("P", "L"):
        raise FileError(f"{path}: must have a palette or 8 bits of gray, so that pixels are numbers; got {image.mode}")
    return np.array(image)


def has_alpha(path: str | os.PathLike[str]) -> bool:
    """Whether a picture has an alpha channel or a transparent colour; only its header is read."""
    try:
        with Image.open(path) as image:
            return "A" in image.getbands() or "transparency" in image.info
    except Image.UnidentifiedImageError as error:
        raise FileError(f"{path}: not an image") from error


def write_png(path: str | os.PathLike[str], image: Any) -> None:
    """Write (H, W), (H, W, 3) or (H, W, 4), uint8 or bool, as PNG, atomically; equal pictures give equal bytes."""
    pixels = np.asarray(image)
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3) or (pixels.ndim == 3 and pixels.shape[2] not in (3, 4)):
        raise FileError(
            f"{path}: must be (H, W), (H, W, 3) or (H, W, 4), uint8 or bool; got {pixels.shape} {pixels.dtype}"
        )
    _encode(path, pixels)


def read_depth_png(
    path: str | os.PathLike[str], size: tuple[int, int] | None = None, *, units_per_metre: float = 1000.0
) -> Float[np.ndarray, "H W"]:
    """Read a 16-bit PNG as depth in metres, float32; 0 means none."""
    image = _decode(Path(path), size)
    if not image.mode.startswith("I"):
        raise FileError(f"{path}: a depth map must be a 16-bit gray PNG, got mode {image.mode}")
    return (np.array(image).astype(np.float64) / units_per_metre).astype(np.float32)


def write_depth_png(path: str | os.PathLike[str], depth: Any, *, units_per_metre: float = 1000.0) -> None:
    """Write depth (H, W) in metres, 0 for none, as 16-bit PNG, atomically; rounded to the nearest unit.

    Raises FileError on depth that is negative, not finite, over 65535 units, or would round to none.
    """
    metres = np.asarray(depth, np.float64)
    if metres.ndim != 2:
        raise FileError(f"{path}: depth must be (H, W), got {metres.shape}")
    units = np.round(metres * units_per_metre)
    bad = ~((units >= 0) & (units <= 65535)) | ((units == 0) & (metres != 0))
    if bad.any():
        row, column = np.argwhere(bad)[0].tolist()
        raise FileError(
            f"{path}: depth {metres[row, column]} at ({row}, {column}) cannot be stored, "
            f"it must be 0 or in [{1 / units_per_metre:g}, {65535 / units_per_metre:g}] metres"
        )
    _encode(path, units.astype(np.uint16))


def _decode(path: Path, size: tuple[int, int] | None) -> Image.Image:
    data = path.read_bytes()
    try:
        image = Image.open(io.BytesIO(data))
        found = (image.height, image.width)
        if size is not None and found != tuple(size):  # before the pixels take memory
            raise FileError(f"{path}: must be {size[0]} x {size[1]} (height x width), got {found[0]} x {found[1]}")
        image.load()
    except FileError:
        raise
    except Image.UnidentifiedImageError as error:
        raise FileError(f"{path}: not an image, it starts with {data[:8]!r}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise FileError(f"{path}: cannot decode the image, {error}") from error
    return image


def _encode(path: str | os.PathLike[str], pixels: np.ndarray) -> None:
    with atomic_write(path) as file:
        Image.fromarray(pixels).save(file, format="PNG", compress_level=6)
