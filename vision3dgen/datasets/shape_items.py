"""Items of shapes, whatever files they come from: which views and points an item gets, and how arrays become fields.

A reader says where arrays lie (`ShapeItems`' abstract methods); frames, cameras, drawing and decoding are written here
once. So an item read from folders and the same item read from a packed store are equal bit for bit.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from vision3dgen.checks import check_choice
from vision3dgen.structures import Camera, Frame, Meshes, Pointclouds

FIELDS = ("image", "mask", "depth", "normals", "camera", "voxels", "points", "surface", "cloud", "mesh")
PER_VIEW = frozenset(("image", "mask", "depth", "normals", "camera"))
DEPTH_UNITS = 20_000.0  # per unit of the OBJ's coordinates, in 16-bit depth pictures: farthest 3.27, step 5e-5

Arrays = Mapping[str, np.ndarray]


class Model(NamedTuple):
    synset: str
    id: str

    def __str__(self) -> str:
        return f"{self.synset}/{self.id}"


class Problem(NamedTuple):
    item: str  # synset/model or synset/model/view
    file: str
    reason: str
    required: bool  # whether a field asked for needs the file


class InputCloud(NamedTuple):
    """The sparse and noisy cloud that a shape is to be completed from: Occupancy Networks' by default.

    points: samples of the surface, drawn without replacement; noise: standard deviation of what is added to each
    coordinate, in units of the frame.
    """

    points: int = 300
    noise: float = 0.005


class Samples(NamedTuple):
    points: np.ndarray  # (N, 3)
    values: Any  # occupancies (N,) or their packed bits, normals (N, 3) or None
    framed: bool  # whether the points are in the frame, not in the file's coordinates


class ShapeItems(torch.utils.data.Dataset[dict[str, Any]]):
    """What datasets of shapes share.

    A subclass sets `models` and `items` (each a model and the number of its view, None without a per-view field) and
    says by the abstract methods what is on disk.
    """

    models: list[Model]
    items: list[tuple[Model, int | None]]
    split_name: str  # the rule that divides the models
    split_sha256: str  # of who is in which split; equal for equal divisions, whatever file they were read from
    trusted = False  # whether arrays were checked when they were written, so that they need not be again
    canonical = False  # whether shapes without `loc` and `scale` are in the canonical frame already

    def __init__(
        self,
        *,
        fields: Sequence[str],
        views: Literal["all", "first", "random"] | int,
        views_per_item: int | None,
        points_per_item: int | None,
        surface_points: int | None,
        cloud: InputCloud | None,
        image_size: int | None,
        background: tuple[float, float, float],
        voxel_placement: Literal["header", "cube"],
        cache: bool,
        seed: int,
    ):
        for name in fields:
            check_choice("field", name, FIELDS)
        check_choice("voxel_placement", voxel_placement, ("header", "cube"))
        if isinstance(views, str):
            check_choice("views", views, ("all", "first", "random"))
        elif views < 1:
            raise ValueError(f"views must be at least 1, got {views}")
        if views_per_item is not None and views not in ("first", "random"):
            raise ValueError(f"views_per_item needs views to be 'first' or 'random', got {views!r}")
        counts = {
            "points_per_item": points_per_item,
            "surface_points": surface_points,
            "views_per_item": views_per_item,
            "image_size": image_size,
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {count}")
        self.cloud = cloud or InputCloud()
        if self.cloud.points < 1 or self.cloud.noise < 0:
            raise ValueError(f"cloud needs points of at least 1 and noise of at least 0, got {self.cloud}")
        self.fields, self.views, self.seed = tuple(dict.fromkeys(fields)), views, seed
        self.points_per_item, self.surface_points = points_per_item, surface_points
        self.views_per_item = views_per_item
        self.image_size, self.background, self.voxel_placement = image_size, background, voxel_placement
        self.epoch = 0
        self.problems: list[Problem] = []
        self._keep = cache
        self._cache: dict[Any, Any] = {}
        self._frames: dict[Model, Frame] = {}

    # ------------------------------------------------------------------------------------------- what is on disk

    @abstractmethod
    def _has(self, name: str, model: Model) -> bool:
        """Whether the arrays of mesh, voxels, points or surface are there."""

    @abstractmethod
    def _arrays(self, name: str, model: Model) -> Arrays:
        """As stored. mesh: verts, faces; voxels: voxels, translate, scale; points: points, occupancies, and loc, scale
        where they are in a frame; surface: points, and likewise normals, loc, scale."""

    @abstractmethod
    def _picture(self, name: str, model: Model, number: int) -> np.ndarray:
        """As stored: image (H, W, 4) or (H, W, 3), normals (H, W, 3), mask (H, W), all uint8; depth (H, W) uint16."""

    @abstractmethod
    def _full_camera(self, model: Model, number: int) -> Camera:
        """The camera of a picture as rendered."""

    @abstractmethod
    def _numbers(self, model: Model) -> list[int]:
        """The numbers of a model's views, in order."""

    @abstractmethod
    def _where(self, name: str, model: Model) -> str:
        """What an error in these arrays begins with."""

    # ---------------------------------------------------------------------------------------------------- items

    def __len__(self) -> int:
        return len(self.items)

    def __getstate__(self) -> dict[str, Any]:
        """Without the cache: a worker process fills its own."""
        return self.__dict__ | {"_cache": {}}

    def set_epoch(self, epoch: int) -> None:
        """Draw other points and random views than in the epochs before; the same ones for the same epoch."""
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Item `index`: the fields asked for, and frame, category (synset) and id "synset/model/view"."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is out of range for {len(self)} items")
        index %= len(self)
        model, number = self.items[index]
        rng = np.random.default_rng([self.seed, self.epoch, index])
        if number is None:
            return self._read(model, [], rng)
        if self.views != "random" and self.views_per_item is None:
            return self._read(model, [number], rng)
        listed = self._numbers(model)
        if self.views != "random":
            return self._read(model, listed[: self.views_per_item], rng)
        if self.views_per_item is None:
            return self._read(model, [listed[int(rng.integers(len(listed)))]], rng)
        return self._read(model, rng.choice(listed, self.views_per_item, replace=False).tolist(), rng)

    def _items(self) -> list[tuple[Model, int | None]]:
        if not PER_VIEW & set(self.fields):
            return [(model, None) for model in self.models]
        if self.views == "random" or self.views_per_item is not None:
            return [(model, numbers[0]) for model in self.models if (numbers := self._numbers(model))]
        return [(model, number) for model in self.models for number in self._chosen(model)]

    def _chosen(self, model: Model) -> list[int]:
        """The views that items show."""
        listed = self._numbers(model)
        if self.views in ("all", "random"):
            return listed
        return listed[: (self.views_per_item or 1) if self.views == "first" else int(self.views)]

    def _read(self, model: Model, numbers: list[int], rng: np.random.Generator) -> dict[str, Any]:
        item: dict[str, Any] = {}
        for name in self.fields:
            if name in PER_VIEW:
                seen = [self._read_view(name, model, number) for number in numbers]
                if self.views_per_item is None:
                    (item[name],) = seen
                else:
                    item[name] = Camera.stack(seen) if name == "camera" else torch.stack(seen)
            elif name == "voxels":
                item[name] = _to_float(self._cached(self._voxels, model))
            elif name == "mesh":
                item[name] = self._cached(self._mesh, model)
            elif name == "points":
                samples = self._cached(self._points, model)
                points, occupancies = samples.points, samples.values
                rows = _draw(rng, len(points), self.points_per_item, f"points_per_item of {model}")
                item["points"] = self._framed(samples, rows, model)
                item["occupancies"] = _to_float(_occupied(occupancies, rows, len(points)))
            elif name == "surface":
                samples = self._cached(self._surface, model)
                rows = _draw(rng, len(samples.points), self.surface_points, f"surface_points of {model}")
                normals = None if samples.values is None else [_to_float(samples.values[rows])]
                item["surface"] = Pointclouds([self._framed(samples, rows, model)], normals)
            elif name == "cloud":  # from a stream of its own: other fields and their order do not change it
                item["cloud"] = self._input_cloud(model, rng.spawn(1)[0])
        item["frame"] = self.frame(model)
        item["category"] = model.synset
        item["id"] = item_id(model, numbers[0] if numbers else None)
        return item

    def _input_cloud(self, model: Model, rng: np.random.Generator) -> Pointclouds:
        samples = self._cached(self._surface, model)
        rows = _draw(rng, len(samples.points), self.cloud.points, f"cloud.points of {model}")
        chosen = self._framed(samples, rows, model).numpy()
        noise = rng.standard_normal(chosen.shape, dtype=np.float32) * np.float32(self.cloud.noise)
        return Pointclouds([torch.from_numpy(chosen + noise)])

    def _framed(self, samples: "Samples", rows: Any, model: Model) -> torch.Tensor:
        """The chosen points, in the frame."""
        points = _to_float(samples.points[rows])
        return points if samples.framed else self.frame(model).normalize(points)

    def _read_view(self, name: str, model: Model, number: int) -> Any:
        if name == "image":
            return _to_float(self._cached(self._image, model, number)) / 255
        if name == "mask":
            return _to_float(self._cached(self._mask, model, number))[None]
        if name == "depth":
            return _to_float(self._cached(self._depth, model, number))[None]
        if name == "normals":
            return _to_float(self._cached(self._normals, model, number))
        return self._cached(self._camera, model, number)

    def _cached(self, read: Any, *key: Any) -> Any:
        if not self._keep:
            return read(*key)
        key = (read.__name__, *key)
        if key not in self._cache:
            self._cache[key] = read(*key[1:])
        return self._cache[key]

    # ------------------------------------------------------------------------------------------------- decoding

    def frame(self, model: Model) -> Frame:
        """How the OBJ's coordinates are normalized: as the samples say, else by the box of mesh, voxels or surface."""
        if model not in self._frames:
            self._frames[model] = self._read_frame(model)
        return self._frames[model]

    def _read_frame(self, model: Model) -> Frame:
        if self.canonical:
            return Frame("object")
        for name in ("points", "surface"):
            if self._has(name, model) and "loc" in (arrays := self._arrays(name, model)):
                if "scale" not in arrays:
                    raise ValueError(f"{self._where(name, model)}: loc without scale")
                center, scale = arrays["loc"].reshape(-1).tolist(), float(arrays["scale"].reshape(-1)[0])
                if len(center) != 3:
                    raise ValueError(f"{self._where(name, model)}: loc must be 3 numbers, got {center}")
                return Frame("object", (center[0], center[1], center[2]), scale)
        if self._has("mesh", model):
            return Frame.longest_edge(torch.as_tensor(np.array(self._arrays("mesh", model)["verts"])))
        if self._has("voxels", model):
            arrays = self._arrays("voxels", model)
            (x, y, z), scale = arrays["translate"].tolist(), float(arrays["scale"])
            return Frame("object", (x + scale / 2, y + scale / 2, z + scale / 2), scale)
        if self._has("surface", model):
            return Frame.longest_edge(_to_float(self._surface(model).points))
        return Frame("object")

    def _mesh(self, model: Model) -> Meshes:
        arrays = self._arrays("mesh", model)
        verts, faces = np.array(arrays["verts"], np.float32), np.array(arrays["faces"], np.int64)
        return self.frame(model).normalize(Meshes([torch.from_numpy(verts)], [torch.from_numpy(faces)]))

    def _voxels(self, model: Model) -> np.ndarray:
        """(D, D, D) = (z, y, x) bool, filling [-0.5, 0.5]^3 of the frame."""
        arrays = self._arrays("voxels", model)
        voxels, translate, scale = arrays["voxels"], arrays["translate"].tolist(), float(arrays["scale"])
        side, where = len(voxels), self._where("voxels", model)
        if voxels.shape != (side, side, side):
            raise ValueError(f"{where}: voxels must fill a cube, got {tuple(voxels.shape)}")
        if self.voxel_placement == "cube":
            return voxels
        frame = self.frame(model)
        centers = (np.arange(side) + 0.5) / side - 0.5
        placed, inside = voxels, []
        for axis, (middle, low) in enumerate(zip(frame.center, translate)):
            index = (middle + frame.scale * centers - low) / scale * side
            # a grid written with nine digits may be off by a rounding error, not by a cell
            index = np.floor(index + 1e-6 * side).astype(int)
            inside.append((index >= 0) & (index < side))
            placed = placed.take(index.clip(0, side - 1), axis=2 - axis)
        placed = placed & inside[2][:, None, None] & inside[1][:, None] & inside[0]
        expected = int(voxels.sum()) * (scale / frame.scale) ** 3
        if placed.sum() < 0.5 * expected:
            raise ValueError(
                f"{where}: translate {tuple(translate)} and scale {scale} put its voxels outside the object, which is "
                f"centred at {frame.center} with longest edge {frame.scale}; voxel_placement='cube' ignores them"
            )
        return placed

    def _points(self, model: Model) -> Samples:
        arrays, where = self._arrays("points", model), self._where("points", model)
        points, occupancies = arrays["points"], arrays["occupancies"]
        if points.ndim == 3 and occupancies.ndim == 2:  # several files of a scene, one after the other
            count = points.shape[1]
            if occupancies.dtype == np.uint8 and occupancies.shape[1] != count and count % 8:
                occupancies = np.unpackbits(occupancies, axis=1, count=count)
            points, occupancies = points.reshape(-1, points.shape[2]), occupancies.reshape(-1)
        if not self.trusted:
            check_rows(where, "points", points)
        packed = -(-len(points) // 8)
        if occupancies.shape == (len(points),) or is_packed(occupancies, len(points)):
            return Samples(points, occupancies, self.canonical or "loc" in arrays)
        raise ValueError(
            f"{where}: occupancies of {len(points)} points must be as many values or {packed} bytes of packed bits, "
            f"got {occupancies.shape} of {occupancies.dtype}"
        )

    def _surface(self, model: Model) -> Samples:
        arrays, where = self._arrays("surface", model), self._where("surface", model)
        points, normals = arrays["points"], arrays.get("normals")
        if points.ndim == 3:
            points = points.reshape(-1, points.shape[2])
            normals = None if normals is None else normals.reshape(-1, normals.shape[-1])
        if not self.trusted:
            check_rows(where, "points", points)
        if normals is not None and normals.shape != points.shape:
            raise ValueError(f"{where}: {points.shape} points have {normals.shape} normals")
        return Samples(points, normals, self.canonical or "loc" in arrays)

    def _image(self, model: Model, number: int) -> np.ndarray:
        """(3, H, W) uint8 over the background."""
        return composite(self._picture("image", model, number), self.background, self.image_size)

    def _mask(self, model: Model, number: int) -> np.ndarray:
        """(H, W) bool."""
        return nearest(self._picture("mask", model, number), self.image_size) > 127

    def _depth(self, model: Model, number: int) -> np.ndarray:
        codes = nearest(self._picture("depth", model, number), self.image_size)
        return (codes.astype(np.float64) / DEPTH_UNITS).astype(np.float32)

    def _normals(self, model: Model, number: int) -> np.ndarray:
        """(3, H, W) of length 1, or 0 where the picture shows nothing."""
        code = self._picture("normals", model, number)
        normals = nearest(code, self.image_size).astype(np.float32) / 127.5 - 1
        length = np.linalg.norm(normals, axis=2, keepdims=True)
        return np.ascontiguousarray(np.where(code_is_normal(length), normals / length, 0).transpose(2, 0, 1))

    def _camera(self, model: Model, number: int) -> Camera:
        camera = self._full_camera(model, number)
        if self.image_size is not None:
            camera = camera.resize((self.image_size, self.image_size))
        return camera.to(torch.float32)


def composite(picture: np.ndarray, background: Sequence[float], size: int | None) -> np.ndarray:
    """(3, H, W) uint8 of a picture (H, W, 3) or (H, W, 4) over a background, resized (antialiased) to a side."""
    if picture.shape[2] == 3 and size in (None, picture.shape[0]) and picture.shape[0] == picture.shape[1]:
        return picture.transpose(2, 0, 1)
    rgb: np.ndarray = picture[..., :3].astype(np.float32)
    if picture.shape[2] == 4:
        alpha = picture[..., 3:].astype(np.float32) / 255
        rgb = picture[..., :3] * alpha + np.array(background, np.float32) * 255 * (1 - alpha)
    pixels = torch.from_numpy(rgb).permute(2, 0, 1)
    if size is not None and tuple(pixels.shape[1:]) != (size, size):
        pixels = interpolate(pixels[None], (size, size), mode="bilinear", antialias=True, align_corners=False)[0]
    return pixels.round().clamp(0, 255).byte().contiguous().numpy()


def nearest(picture: np.ndarray, size: int | None) -> np.ndarray:
    """The pixels whose centers are nearest to those of the picture resized to a side."""
    if size is None or picture.shape[:2] == (size, size):
        return picture
    rows, columns = (((np.arange(size) + 0.5) * side / size).astype(int) for side in picture.shape[:2])
    return picture[rows[:, None], columns]


def code_is_normal(length: np.ndarray) -> np.ndarray:
    """Whether RGB coded as 2 c - 1 is a direction, by its length; black, the code of none, is sqrt(3) long."""
    return np.abs(length - 1) < 0.1


def item_id(model: Model, number: int | None) -> str:
    return f"{model}/{number or 0:02d}"


def is_packed(occupancies: np.ndarray, count: int) -> bool:
    """Whether the occupancies of `count` points are bits, eight in a byte."""
    return occupancies.dtype == np.uint8 and count > 1 and occupancies.shape == (-(-count // 8),)


def check_rows(where: Any, key: str, array: np.ndarray) -> None:
    if array.ndim != 2 or array.shape[1] != 3 or not len(array):
        raise ValueError(f"{where}: {key} must be (N, 3) with N > 0, got {array.shape}")
    if array.dtype.kind not in "fiu":
        raise ValueError(f"{where}: {key} must be numbers, got {array.dtype}")
    if not np.isfinite(array).all():
        raise ValueError(f"{where}: {key} has values that are not finite")


def _occupied(occupancies: np.ndarray, rows: Any, count: int) -> np.ndarray:
    """Whether the chosen points are inside; of packed bits only their bytes are read."""
    if not is_packed(occupancies, count):
        return occupancies[rows] > 0.5
    if isinstance(rows, slice):
        return np.unpackbits(occupancies, count=count)[rows]
    return (occupancies[rows >> 3] >> (7 - (rows & 7)).astype(np.uint8)) & 1


def _draw(rng: np.random.Generator, total: int, count: int | None, what: str) -> Any:
    """Row indices of `count` of `total` rows, or the slice of all."""
    if count is None or count == total:
        return slice(None)
    if count > total:
        raise ValueError(f"{what}: {count} asked for, the file has {total}")
    return rng.choice(total, count, replace=False, shuffle=False)


def _to_float(array: np.ndarray) -> torch.Tensor:
    """Always a copy: what is in the cache must outlive what is done to an item."""
    return torch.from_numpy(np.array(array, np.float32, order="C"))
