"""Photographs with measured depth, in the layouts they are published in: NYU Depth v2 and KITTI.

Items are {"image": (3, H, W) in [0, 1], "depth": (1, H, W) in metres, 0 where none was measured, "camera": `Camera`
whose world is the camera's own frame, "id": where it comes from}. `image_size` resizes all three: the image
antialiased, depth by the nearest pixel. Every fault of a file is a FileError that names it. NYU's files are HDF5 and
need h5py: pip install "vision3dgen[depth]".
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch.nn.functional import interpolate

from vision3dgen.checks import check_choice
from vision3dgen.datasets.images import Selection
from vision3dgen.files import FileError, safe_join
from vision3dgen.io import read_depth_png, read_image
from vision3dgen.structures import Camera

# Of the color camera of NYU Depth v2, from the toolbox's camera_params.m; its pixel centers are at 1, 2, ..., ours at
# halves.
NYU_FOCAL = (518.8579011745019, 519.4696111212749)
NYU_CENTER = (325.5824494111903 - 0.5, 253.7361663340046 - 0.5)
NYU_SIZE = (480, 640)
KITTI_UNITS = 256.0  # of 16-bit depth pictures, per metre


class Shot(NamedTuple):
    """A picture as it is in the files."""

    image: UInt8[np.ndarray, "H W 3"]
    depth: Float[np.ndarray, "H W"]  # metres, 0 where none
    camera: Camera


class MeasuredDepth(torch.utils.data.Dataset[dict[str, Any]], ABC):
    """What all of them share: `ids` of the items, from which a subclass reads frames."""

    def __init__(self, ids: Sequence[str], image_size: tuple[int, int] | None):
        if image_size is not None and min(image_size) < 1:
            raise ValueError(f"image_size must be a height and a width of at least 1, got {image_size}")
        self.ids, self.image_size = list(ids), image_size

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        index %= len(self)
        image, depth, camera = self._frame(index)
        picture = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float() / 255
        measured = torch.from_numpy(np.ascontiguousarray(depth)).float()[None]
        if self.image_size is not None and self.image_size != tuple(picture.shape[1:]):
            picture = interpolate(picture[None], self.image_size, mode="bilinear", antialias=True)[0].clamp(0, 1)
            measured = interpolate(measured[None], self.image_size, mode="nearest-exact")[0]
            camera = camera.resize(self.image_size)
        return {"image": picture, "depth": measured, "camera": camera, "id": self.ids[index]}

    @abstractmethod
    def _frame(self, index: int) -> Shot:
        """Item `index` in the size of the files."""


def _nyu_camera() -> Camera:
    (fx, fy), (cx, cy) = NYU_FOCAL, NYU_CENTER
    return _camera(torch.tensor([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], dtype=torch.float64), NYU_SIZE)


def _camera(intrinsics: torch.Tensor, image_size: tuple[int, int]) -> Camera:
    return Camera(torch.eye(3), torch.zeros(3), intrinsics.float(), image_size)


def _open(path: Path) -> Any:
    """An HDF5 file, read only."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f'{path} is HDF5, which needs h5py: pip install "vision3dgen[depth]"') from error
    try:
        return h5py.File(path, "r")
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileError(f"{path}: not HDF5, or damaged: {error}") from error


def _read(path: Path, file: Any, name: str, *index: int) -> np.ndarray:
    try:
        return np.asarray(file[name][index] if index else file[name])
    except (KeyError, OSError, ValueError) as error:
        raise FileError(f"{path}: cannot read {name!r}: {error}; it has {sorted(file)}") from error


class NYUDepth(MeasuredDepth):
    """The 1,449 labelled frames of NYU Depth v2, 480 x 640, and the published division into 795 and 654.

    root: the folder of nyu_depth_v2_labeled.mat (MATLAB 7.3) and splits.mat. split: "train" or "test", or a part of one
    by `fractions`, see `Selection`. depth: "filled", or "raw" with its holes. Source: Silberman et al. 2012.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, depth: Literal["filled", "raw"] = "filled",
        image_size: tuple[int, int] | None = None, part: str | None = None,
        fractions: Mapping[str, float] | None = None, seed: int = 0,
    ):  # fmt: skip
        check_choice("depth", depth, ("filled", "raw"))
        self.path = Path(root) / "nyu_depth_v2_labeled.mat"
        self.key = "depths" if depth == "filled" else "rawDepths"
        with _open(self.path) as file:
            for name, shape in (("images", (3, 640, 480)), (self.key, (640, 480))):
                if name not in file or file[name].shape[1:] != shape:
                    found = file[name].shape if name in file else sorted(file)
                    raise FileError(f"{self.path}: needs {name!r} of (N, {', '.join(map(str, shape))}), found {found}")
            count = len(file["images"])
        selection = Selection(part, fractions, None, seed)
        part = selection.part_of(split, ("train", "test"))
        numbers = _published_split(Path(root) / "splits.mat", f"{part}Ndxs", count)
        self.places = [numbers[index] for index in selection.indices(split, len(numbers))]
        super().__init__([f"nyu/{place + 1:04d}" for place in self.places], image_size)
        self._file: Any = None

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file: a worker process opens its own."""
        return self.__dict__ | {"_file": None}

    def _frame(self, index: int) -> Shot:
        if self._file is None:
            self._file = _open(self.path)
        image = _read(self.path, self._file, "images", self.places[index])  # (3, W, H): MATLAB's order
        depth = _read(self.path, self._file, self.key, self.places[index])  # (W, H)
        return Shot(image.transpose(2, 1, 0), depth.T.astype(np.float32), _nyu_camera())


def _published_split(path: Path, name: str, count: int) -> list[int]:
    """The frames of a part, counted from 0."""
    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    try:
        numbers = loadmat(path)[name].ravel().astype(int)
    except FileNotFoundError:
        raise
    except (KeyError, ValueError, NotImplementedError, OSError, MatReadError) as error:
        raise FileError(f"{path}: cannot read {name!r}, the published split: {error}") from error
    if not len(numbers) or numbers.min() < 1 or numbers.max() > count:
        raise FileError(f"{path}: {name} must number the {count} frames from 1, got {numbers.min()} to {numbers.max()}")
    return (numbers - 1).tolist()


class NYUDepthScenes(MeasuredDepth):
    """NYU Depth v2 as one HDF5 file per frame: ROOT/{train,val}/SCENE/NUMBER.h5 with rgb (3, H, W) and depth (H, W).

    The layout that Ma and Karaman 2018 (arXiv:1709.07492) published, "nyudepthv2" of FastDepth: 47,584 frames of train,
    and the 654 of the official test set under the name val. split: "train", "val", or a part of one by `fractions`.
    """

    def __init__(
        self, root: str | os.PathLike[str], split: str, *, image_size: tuple[int, int] | None = None,
        part: str | None = None, fractions: Mapping[str, float] | None = None, seed: int = 0,
    ):  # fmt: skip
        selection = Selection(part, fractions, None, seed)
        self.root, part = Path(root), selection.part_of(split, ("train", "val"))
        folder = self.root / part
        if not folder.is_dir():
            raise FileError(f"{folder}: no such folder; it should hold a folder of .h5 files for each scene")
        found = sorted(path.relative_to(self.root).as_posix() for path in folder.glob("*/*.h5"))
        chosen = [found[index] for index in selection.indices(split, len(found))] if found else []
        if not chosen:
            raise FileError(f"{folder}: no SCENE/NUMBER.h5 in it")
        super().__init__([name.removesuffix(".h5") for name in chosen], image_size)

    def _frame(self, index: int) -> Shot:
        path = self.root / f"{self.ids[index]}.h5"
        with _open(path) as file:
            image, depth = _read(path, file, "rgb"), _read(path, file, "depth")
        if image.ndim != 3 or len(image) != 3 or image.dtype != np.uint8 or depth.shape != image.shape[1:]:
            raise FileError(f"{path}: rgb must be (3, H, W) bytes and depth (H, W), got {image.shape}, {depth.shape}")
        height, width = depth.shape
        camera = _nyu_camera()
        return Shot(
            image.transpose(1, 2, 0),
            np.where(np.isfinite(depth), depth, 0).astype(np.float32),
            camera if (height, width) == NYU_SIZE else camera.resize((height, width)),
        )


class KITTIDepth(MeasuredDepth):
    """Pictures of KITTI's raw recordings with the depth of its depth benchmark, as lists such as Eigen's choose them.

    images: folder of the raw recordings: DATE/DRIVE/image_02/data/0000000069.png (or .jpg), DATE/calib_cam_to_cam.txt.
    depths: folder of the annotated depth: DRIVE/proj_depth/groundtruth/image_02/0000000069.png, in it or in its train
    and val. lists: the file of each split. Its lines are an image's path, optionally with its depth's path (or "None")
    and a focal length, as BTS's, or "DATE/DRIVE FRAME l" (or r), as Monodepth2's. missing: "skip" leaves out items
    that have no depth file, which `skipped` counts. crop: "benchmark" cuts 352 x 1216 from the bottom and the middle
    for one size. Sparse depth stays so when resized. Sources: Geiger et al. 2013; Uhrig et al. 2017 (arXiv:1708.06500).
    """

    def __init__(
        self, images: str | os.PathLike[str], depths: str | os.PathLike[str], split: str, *,
        lists: Mapping[str, str | os.PathLike[str]], missing: Literal["raise", "skip"] = "raise",
        crop: Literal["none", "benchmark"] = "none", image_size: tuple[int, int] | None = None,
    ):  # fmt: skip
        check_choice("split", split, lists)
        check_choice("missing", missing, ("raise", "skip"))
        check_choice("crop", crop, ("none", "benchmark"))
        self.images, self.depths, self.crop = Path(images), Path(depths), crop
        for folder in (self.images, self.depths):
            if not folder.is_dir():
                raise FileError(f"{folder}: no such folder")
        path = Path(lists[split])
        self.frames: list[tuple[str, Path]] = []  # DATE/DRIVE/image_0X/data/FRAME.png, and the depth's file
        self.skipped = 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            image, depth = _list_entry(line.split(), f"{path}, line {number}")
            found = None if depth is None else _first(self.depths, depth)
            if found is not None:
                self.frames.append((image, found))
            elif missing == "raise":
                raise FileError(f"{path}, line {number}: no {depth or 'depth'} in {self.depths}, its train or its val")
            else:
                self.skipped += 1
        if not self.frames:
            raise FileError(f"{path}: none of its {self.skipped} items has a depth in {self.depths}")
        super().__init__([image.rsplit(".", 1)[0] for image, _ in self.frames], image_size)

    def _frame(self, index: int) -> Shot:
        name, depth_path = self.frames[index]
        path = safe_join(self.images, name)
        if not path.exists():  # the recordings take a quarter of the room as JPEG
            path = path.with_suffix(".jpg" if path.suffix == ".png" else ".png")
        image = read_image(path, mode="RGB")
        depth = read_depth_png(depth_path, image.shape[:2], units_per_metre=KITTI_UNITS)
        date, _, folder = name.split("/")[:3]
        intrinsics = _kitti_intrinsics(self.images / date / "calib_cam_to_cam.txt", folder.removeprefix("image_"))
        if self.crop == "benchmark":
            height, width = depth.shape
            if height < 352 or width < 1216:
                raise FileError(f"{path}: the benchmark's crop is 352 x 1216, the picture only {height} x {width}")
            top, left = height - 352, (width - 1216) // 2
            image, depth = image[top:, left : left + 1216], depth[top:, left : left + 1216]
            intrinsics[:2, 2] -= torch.tensor([left, top], dtype=intrinsics.dtype)
        height, width = depth.shape
        return Shot(image, depth, _camera(intrinsics, (height, width)))


def _list_entry(words: list[str], where: str) -> tuple[str, str | None]:
    """The image's path under the recordings and the depth's under the annotations, None where the list has none."""
    if words[0].endswith((".png", ".jpg")):
        image = words[0].lstrip("/")
        depth = words[1].lstrip("/") if len(words) > 1 else ""
    elif len(words) == 3 and words[2] in ("l", "r") and words[1].isdigit():
        image, depth = f"{words[0]}/image_0{2 if words[2] == 'l' else 3}/data/{int(words[1]):010d}.png", ""
    else:
        raise FileError(f"{where}: neither 'IMAGE.png [DEPTH.png [FOCAL]]' nor 'DATE/DRIVE FRAME l', got {words}")
    parts = image.split("/")
    if len(parts) != 5 or parts[2] not in ("image_02", "image_03"):
        raise FileError(f"{where}: an image must be DATE/DRIVE/image_02/data/FRAME.png (or image_03), got {image!r}")
    if depth == "None":
        return image, None
    return image, depth or f"{parts[1]}/proj_depth/groundtruth/{parts[2]}/{Path(image).stem}.png"


def _first(root: Path, name: str) -> Path | None:
    places = (safe_join(root / part, name) for part in ("", "train", "val"))
    return next((place for place in places if place.is_file()), None)


def _kitti_intrinsics(path: Path, camera: str) -> Float[torch.Tensor, "3 3"]:
    """Of the rectified pictures; the file's pixel centers are at integers."""
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, values = line.partition(":")
        if key == f"P_rect_{camera}":
            try:
                matrix = torch.tensor([float(value) for value in values.split()], dtype=torch.float64).view(3, 4)
            except (ValueError, RuntimeError) as error:
                raise FileError(f"{path}: {key} must be 12 numbers, got {values.strip()!r}") from error
            intrinsics = matrix[:, :3].clone()
            intrinsics[:2, 2] += 0.5
            return intrinsics
    raise FileError(f"{path}: no P_rect_{camera} in it")
