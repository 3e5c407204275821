"""Reader of ShapeNet-style folders: ShapeNetCore meshes, 3D-R2N2 renderings and voxels, Occupancy Networks samples.

It reads what `prepare` writes and what others publish in the same layouts. Mesh, points, surface and voxels of an item
are in its `frame`, Occupancy Networks' (longest edge of the bounding box 1, centred at 0). Camera and depth are in the
coordinates of the OBJ file: `camera.project(frame.denormalize(points))` are pixels of the item's picture.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate

from vision3dgen.checks import check_choice
from vision3dgen.datasets.manifest import SplitManifest, read_json
from vision3dgen.datasets.procedural import CATEGORIES
from vision3dgen.files import safe_join
from vision3dgen.io import load_mesh, load_npz, read_binvox, read_depth_png, read_image
from vision3dgen.structures import Camera, Frame, Meshes, Pointclouds

# Folder names of the public layouts under a root, the preferred one first.
FOLDERS = {
    "core": ("ShapeNetCore.v2", "ShapeNetCore.v1", "ShapeNetCore"),
    "renderings": ("ShapeNetRendering",),
    "voxels": ("ShapeNetVox32",),
    "samples": ("ShapeNet",),
    "geometry": ("ShapeNetGeometry",),
}
FIELDS = ("image", "mask", "depth", "normals", "camera", "voxels", "points", "surface", "cloud", "mesh")
PER_VIEW = frozenset(("image", "mask", "depth", "normals", "camera"))
DEPTH_UNITS = 20_000.0  # per unit of the OBJ's coordinates, in 16-bit depth pictures: farthest 3.27, step 5e-5
_MESHES = ("models/model_normalized.obj", "model.obj")  # v2, v1


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


class View(NamedTuple):
    number: int
    azimuth: float  # degrees
    elevation: float
    distance_ratio: float


class ShapeNet(torch.utils.data.Dataset[dict[str, Any]]):
    """Items of a split of ShapeNet-style data, each a model seen in a view.

    root: folder that holds the public folders (ShapeNetCore.v2 or .v1, ShapeNetRendering, ShapeNetVox32, ShapeNet,
    ShapeNetGeometry), or a mapping of "core", "renderings", "voxels", "samples", "geometry" to their places.
    split: "train", "val", "test" or "all". Membership comes from the manifest (a name in ROOT/splits or a path; by
    default the only one there), else from Occupancy Networks' *.lst files, else from 3D-R2N2's rule: the first 80 % of
    each category's sorted ids train, the others test. `split_name` says which.
    categories: synsets or names, default all there are. fields: which of image, mask, depth, normals, camera, voxels,
    points (and occupancies), surface, cloud, mesh to read. cloud: how the points of that field, the input of a model,
    are made of surface samples, from seed, epoch and index too.
    views: "all" (one item per view), "first", a number (that many first views), or "random" (one item per model, its
    view drawn from seed, epoch and index). Without a per-view field there is one item per model.
    views_per_item: None for one view, else as many distinct ones, stacked in front, (V, 3, H, W), in every per-view
    field: the first ones with views "first", "random" ones in random order; the item is named after its first view.
    points_per_item, surface_points: how many samples an item gets, drawn without replacement from seed, epoch and
    index; None for all in the file.
    image_size: side to resize pictures and cameras to (antialiased; depth, normals and mask take the nearest pixel);
    None keeps `render_size`, the side every PNG must have. background: RGB in [0, 1] behind transparent pixels.
    voxel_placement: "header" puts voxels where translate and scale of the binvox file say; "cube" ignores these and
    takes the grid to fill the frame's unit cube.
    on_error: "raise" stops at the first missing file; "skip" reads everything once (slow on large data) and leaves out
    the items that have a problem, which `problems` then lists.
    cache: keep what was read in memory, as 8-bit images and packed arrays.

    Raises ValueError naming the file and the reason.
    """

    def __init__(
        self,
        root: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]],
        split: str,
        *,
        categories: Sequence[str] | None = None,
        fields: Sequence[str] = ("image", "camera", "voxels", "points", "surface", "mesh"),
        views: Literal["all", "first", "random"] | int = "all",
        views_per_item: int | None = None,
        points_per_item: int | None = None,
        surface_points: int | None = None,
        cloud: InputCloud | None = None,
        image_size: int | None = None,
        render_size: int = 137,
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
        voxel_placement: Literal["header", "cube"] = "header",
        manifest: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        cache: bool = False,
        seed: int = 0,
    ):
        for name in fields:
            check_choice("field", name, FIELDS)
        check_choice("split", split, ("train", "val", "test", "all"))
        check_choice("on_error", on_error, ("raise", "skip"))
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
        }
        for name, count in counts.items():
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1 or None, got {count}")
        self.cloud = cloud or InputCloud()
        if self.cloud.points < 1 or self.cloud.noise < 0:
            raise ValueError(f"cloud needs points of at least 1 and noise of at least 0, got {self.cloud}")
        self.root, self.folders = _find_folders(root)
        self.split, self.fields, self.views, self.seed = split, tuple(dict.fromkeys(fields)), views, seed
        self.points_per_item, self.surface_points = points_per_item, surface_points
        self.views_per_item = views_per_item
        self.image_size = image_size or render_size
        self.render_size, self.background, self.voxel_placement = render_size, background, voxel_placement
        self.epoch = 0
        self.problems: list[Problem] = []
        self._keep = cache
        self._cache: dict[Any, Any] = {}
        self._frames: dict[Model, Frame] = {}

        for name in self.fields:
            needed = pieces_of(name)
            if not any(piece in self.folders for piece in needed):
                names = " or ".join(FOLDERS[piece][0] for piece in needed)
                raise ValueError(f"{self.root}: field {name!r} needs {names}, found {self._found()}")
        self.split_name, chosen = self._choose(manifest)
        self.synsets = self._synsets(categories, chosen)
        self.models = [Model(synset, model) for synset in self.synsets for model in chosen[synset]]
        if not self.models:
            raise ValueError(
                f"{self.root or self._found()}: {self.split_name} puts no model of {', '.join(self.synsets)} into "
                f"{split!r}; choose another split, or prepare more shapes"
            )
        self._views: dict[Model, list[View]] = {}
        self._missing = [problem for model in self.models for problem in self._missing_files(model)]
        self.items = self._items()
        if on_error == "skip":
            self.problems = self.check()
            bad = {problem.item for problem in self.problems if problem.required}
            kept = [item for item in self.items if not {str(item[0]), _item_id(*item)} & bad]
            if not kept:
                raise ValueError(f"{self.root}: no item is whole; the first problem: {_sentence(self.problems[0])}")
            self.items = kept
        elif self._missing:
            more = f" ({len(self._missing) - 1} more; see on_error='skip')" if len(self._missing) > 1 else ""
            raise ValueError(f"{_sentence(self._missing[0])}{more}")

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
        listed = [view.number for view in self._views[model]]
        if self.views != "random":
            return self._read(model, [number] if self.views_per_item is None else listed[: self.views_per_item], rng)
        if self.views_per_item is None:
            return self._read(model, [listed[int(rng.integers(len(listed)))]], rng)
        return self._read(model, rng.choice(listed, self.views_per_item, replace=False).tolist(), rng)

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
                points, occupancies = self._cached(self._points, model)
                rows = _draw(rng, len(points), self.points_per_item, f"points_per_item of {model}")
                item["points"] = _to_float(points[rows])
                item["occupancies"] = _to_float(occupancies[rows])
            elif name == "surface":
                points, normals = self._cached(self._surface, model)
                rows = _draw(rng, len(points), self.surface_points, f"surface_points of {model}")
                item["surface"] = Pointclouds(
                    [_to_float(points[rows])],
                    [_to_float(normals[rows])],
                )
            elif name == "cloud":  # from a stream of its own: other fields and their order do not change it
                item["cloud"] = self._input_cloud(model, rng.spawn(1)[0])
        item["frame"] = self.frame(model)
        item["category"] = model.synset
        item["id"] = _item_id(model, numbers[0] if numbers else None)
        return item

    def _input_cloud(self, model: Model, rng: np.random.Generator) -> Pointclouds:
        points, _ = self._cached(self._surface, model)
        chosen = points[_draw(rng, len(points), self.cloud.points, f"cloud.points of {model}")].astype(np.float32)
        noise = rng.standard_normal(chosen.shape, dtype=np.float32) * np.float32(self.cloud.noise)
        return Pointclouds([torch.from_numpy(chosen + noise)])

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

    # -------------------------------------------------------------------------------------------- finding things

    def _found(self) -> str:
        return ", ".join(str(path) for path in self.folders.values()) or "none of the public folders"

    def _choose(self, manifest: str | None) -> tuple[str, dict[str, list[str]]]:
        """The rule that decides membership, and the models of the split by synset."""
        listed = sorted((self.root / "splits").glob("*.json")) if self.root else []
        if manifest is not None:
            path = Path(manifest)
            if self.root and not path.is_file():
                path = self.root / "splits" / f"{manifest}.json"
            if not path.is_file():
                names = [p.stem for p in listed] or "none"
                raise ValueError(f"no split manifest {manifest!r}: neither a file nor in {path.parent} ({names})")
            listed = [path]
        if len(listed) > 1:
            raise ValueError(f"{self.root}: several split manifests, choose one: manifest={[p.stem for p in listed]}")
        if listed:
            found = SplitManifest.read(listed[0], self.root or listed[0].parent)
            splits = found.splits.values() if self.split == "all" else [found.splits[self.split]]
            synsets = sorted({synset for members in found.splits.values() for synset in members})
            chosen = {s: sorted(m for members in splits for m in members.get(s, [])) for s in synsets}
            return f"{found.name} (version {found.version})", chosen
        return self._choose_by_rule()

    def _choose_by_rule(self) -> tuple[str, dict[str, list[str]]]:
        base = next(self.folders[piece] for name in self.fields for piece in pieces_of(name) if piece in self.folders)
        ids = {folder.name: _subfolders(folder) for folder in sorted(base.iterdir()) if _is_synset(folder)}
        if not any(ids.values()):
            raise ValueError(f"{base}: no SYNSET/MODEL folders in it")
        samples = self.folders.get("samples")
        lists = {s: samples / s / f"{self.split}.lst" for s in ids} if samples else {}
        if self.split == "all":
            return "all", ids
        if lists and all(path.is_file() for path in lists.values()):
            return "Occupancy Networks' lists", {s: _read_list(path) for s, path in lists.items()}
        if self.split == "val":
            raise ValueError(
                f"{self.root or base}: no split manifest, and 3D-R2N2's rule has no 'val', only 'train' and 'test'"
            )
        cut = {synset: int(0.8 * len(models)) for synset, models in ids.items()}
        part = {s: models[: cut[s]] if self.split == "train" else models[cut[s] :] for s, models in ids.items()}
        return "3D-R2N2's rule (sorted, 80 % train, 20 % test)", part

    def _synsets(self, categories: Sequence[str] | None, chosen: Mapping[str, list[str]]) -> list[str]:
        if categories is None:
            return list(chosen)
        names = {name: synset for synset, name in CATEGORIES.items()}
        core = self.folders.get("core")
        if core and (core / "taxonomy.json").is_file():
            for entry in read_json(core / "taxonomy.json"):
                names |= {name.strip(): entry["synsetId"] for name in entry["name"].split(",")}
        synsets = [names.get(category, category) for category in categories]
        for category, synset in zip(categories, synsets):
            if synset not in chosen:
                accepted = {s: [name for name, other in names.items() if other == s] for s in chosen}
                listed = ", ".join(f"{s} ({' '.join(n)})" if n else s for s, n in accepted.items())
                raise ValueError(f"unknown category {category!r} in {self.root or self._found()}; choose from {listed}")
        return list(dict.fromkeys(synsets))

    def _missing_files(self, model: Model) -> list[Problem]:
        """Files the fields need that are not there; lists the model's views on the way."""
        problems = []
        for name in self.fields:
            if name in ("voxels", "points", "surface", "cloud", "mesh") and self._file(model, name) is None:
                path = self._expected(model, name)
                problems.append(Problem(str(model), str(path), f"the file for {name!r} does not exist", True))
        if not PER_VIEW & set(self.fields):
            return problems
        try:
            self._views[model] = self._list_views(model)
        except (ValueError, OSError) as error:
            return [*problems, Problem(str(model), _path_in(error), str(error), True)]
        count = len(self._views[model])
        if count < (self.views_per_item or 1):
            folder = self._folder("renderings", model)
            reason = f"{folder}: {count} views, but views_per_item asks for {self.views_per_item}"
            problems.append(Problem(str(model), str(folder), reason, True))
        present = {path: set(os.listdir(path)) if path.is_dir() else set() for path in self._view_folders(model)}
        for view in self._chosen_views(model):
            for name in PER_VIEW & set(self.fields) - {"camera"}:
                path = self._view_file(model, name, view.number)
                if path.name not in present[path.parent]:
                    identifier = self._owner(model, view.number)
                    problems.append(Problem(identifier, str(path), f"the file for {name!r} does not exist", True))
        return problems

    def _items(self) -> list[tuple[Model, int | None]]:
        if not PER_VIEW & set(self.fields):
            return [(model, None) for model in self.models]
        if self.views == "random" or self.views_per_item is not None:
            return [(model, self._views[model][0].number) for model in self.models if self._views.get(model)]
        return [(model, view.number) for model in self.models for view in self._chosen_views(model)]

    def _chosen_views(self, model: Model) -> list[View]:
        listed = self._views.get(model, [])
        if self.views in ("all", "random"):
            return listed
        return listed[: (self.views_per_item or 1) if self.views == "first" else int(self.views)]

    def _list_views(self, model: Model) -> list[View]:
        """The views rendering_metadata.txt describes, in the order of renderings.txt (or 00, 01, ...)."""
        folder = self._folder("renderings", model)
        path = folder / "rendering_metadata.txt"
        if not path.is_file():
            raise ValueError(f"{path}: missing, it holds the cameras of the views")
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        names = [f"{number:02d}.png" for number in range(len(lines))]
        if (folder / "renderings.txt").is_file():
            names = (folder / "renderings.txt").read_text().split()
        if len(names) != len(lines) or not names:
            raise ValueError(f"{path}: {len(lines)} cameras for {len(names)} pictures")
        views = []
        for number, (name, values) in enumerate(zip(names, lines)):
            try:
                azimuth, elevation, yaw, ratio = (float(value) for value in values[:4])
                views.append(View(int(name.removesuffix(".png")), azimuth, elevation, ratio))
            except ValueError as error:
                raise ValueError(
                    f"{path}: line {number + 1} for {name!r} is not 'azimuth elevation yaw ratio fov'"
                ) from error
            if yaw != 0:
                raise ValueError(f"{path}: line {number + 1} turns the camera by {yaw} about its axis; only 0 is known")
        return views

    def _folder(self, piece: str, model: Model) -> Path:
        folder = self.folders[piece] / model.synset / model.id
        return folder / "rendering" if piece == "renderings" else folder

    def _view_folders(self, model: Model) -> list[Path]:
        return [self._folder(piece, model) for piece in ("renderings", "geometry") if piece in self.folders]

    def _view_file(self, model: Model, name: str, number: int) -> Path:
        if name == "image" or (name == "mask" and "geometry" not in self.folders):
            return self._folder("renderings", model) / f"{number:02d}.png"
        return self._folder("geometry", model) / f"{number:02d}_{name}.png"

    def _candidates(self, model: Model, name: str) -> list[Path]:
        if name == "mesh":
            return [self._folder("core", model) / place for place in _MESHES] if "core" in self.folders else []
        file = {"voxels": "model.binvox", "points": "points.npz"}.get(name, "pointcloud.npz")
        return [self._folder(piece, model) / file for piece in pieces_of(name) if piece in self.folders]

    def _file(self, model: Model, name: str) -> Path | None:
        return next((path for path in self._candidates(model, name) if path.is_file()), None)

    def _expected(self, model: Model, name: str) -> Path:
        return self._file(model, name) or self._candidates(model, name)[0]

    def check(self) -> list[Problem]:
        """Read every item once and list what is missing or broken, item by item.

        Files of the public layouts that no field asked for are listed too when they are missing, as not required.
        """
        problems = list(self._missing)
        bad = {problem.item for problem in problems}
        for model in self.models:
            for name in ("mesh", "voxels", "points", "surface"):
                places = self._candidates(model, name)
                if places and name not in self.fields and self._file(model, name) is None:
                    problems.append(Problem(str(model), str(places[0]), "does not exist", False))
        for model, number in self.items:
            if {str(model), _item_id(model, number)} & bad:
                continue
            several = number is not None and (self.views == "random" or self.views_per_item is not None)
            for each in [view.number for view in self._chosen_views(model)] if several else [number]:
                try:
                    self._read(model, [] if each is None else [each], np.random.default_rng(0))
                except (ValueError, OSError) as error:
                    problems.append(Problem(self._owner(model, each), _path_in(error), str(error), True))
        return problems

    def _owner(self, model: Model, number: int | None) -> str:
        """The item a fault in a view belongs to: the model where an item takes several views."""
        return str(model) if self.views_per_item is not None else _item_id(model, number)

    # -------------------------------------------------------------------------------------------- reading things

    def frame(self, model: Model) -> Frame:
        """How the OBJ's coordinates are normalized: as the samples say, else by the mesh's or the voxels' box."""
        if model not in self._frames:
            self._frames[model] = self._read_frame(model)
        return self._frames[model]

    def _read_frame(self, model: Model) -> Frame:
        for name in ("points", "surface"):
            if path := self._file(model, name):
                arrays = load_npz(path, "loc", "scale")
                center, scale = arrays["loc"].reshape(-1).tolist(), float(arrays["scale"].reshape(-1)[0])
                if len(center) != 3:
                    raise ValueError(f"{path}: loc must be 3 numbers, got {center}")
                return Frame("object", (center[0], center[1], center[2]), scale)
        if path := self._file(model, "mesh"):
            return Frame.longest_edge(load_mesh(path, materials=False).verts_packed())
        if path := self._file(model, "voxels"):
            _, (x, y, z), scale = read_binvox(path)
            return Frame("object", (x + scale / 2, y + scale / 2, z + scale / 2), scale)
        return Frame("object")

    def _mesh(self, model: Model) -> Meshes:
        read = load_mesh(self._expected(model, "mesh"), materials=False)
        return self.frame(model).normalize(Meshes(read.verts_list(), read.faces_list()))  # without the file's colors

    def _voxels(self, model: Model) -> np.ndarray:
        """(D, D, D) = (z, y, x) bool, filling [-0.5, 0.5]^3 of the frame."""
        path = self._expected(model, "voxels")
        voxels, translate, scale = read_binvox(path)
        side = len(voxels)
        if voxels.shape != (side, side, side):
            raise ValueError(f"{path}: voxels must fill a cube, got {tuple(voxels.shape)}")
        if self.voxel_placement == "cube":
            return voxels.numpy()
        frame = self.frame(model)
        centers = (np.arange(side) + 0.5) / side - 0.5
        placed, inside = voxels.numpy(), []
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
                f"{path}: translate {translate} and scale {scale} put its voxels outside the object, which is centred "
                f"at {frame.center} with longest edge {frame.scale}; voxel_placement='cube' ignores them"
            )
        return placed

    def _points(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """Points (N, 3) of the frame and whether each is inside (N,)."""
        path = self._expected(model, "points")
        arrays = load_npz(path, "points", "occupancies")
        points, packed = arrays["points"], arrays["occupancies"]
        _check_rows(path, "points", points)
        if packed.shape == (-(-len(points) // 8),) and packed.dtype == np.uint8 and len(points) > 1:
            return points, np.unpackbits(packed, count=len(points)).astype(bool)
        if packed.shape == (len(points),):
            return points, packed > 0.5
        raise ValueError(
            f"{path}: occupancies of {len(points)} points must be as many values or {-(-len(points) // 8)} bytes of "
            f"packed bits, got {packed.shape} of {packed.dtype}"
        )

    def _surface(self, model: Model) -> tuple[np.ndarray, np.ndarray]:
        """Points (N, 3) of the frame and their normals (N, 3)."""
        path = self._expected(model, "surface")
        arrays = load_npz(path, "points", "normals")
        _check_rows(path, "points", arrays["points"])
        if arrays["normals"].shape != arrays["points"].shape:
            raise ValueError(f"{path}: {arrays['points'].shape} points have {arrays['normals'].shape} normals")
        return arrays["points"], arrays["normals"]

    def _image(self, model: Model, number: int) -> np.ndarray:
        """(3, H, W) uint8 over the background."""
        rgba = read_image(self._view_file(model, "image", number), self._render_shape)
        alpha = rgba[..., 3:].astype(np.float32) / 255
        rgb = rgba[..., :3] * alpha + np.array(self.background, np.float32) * 255 * (1 - alpha)
        picture = torch.from_numpy(rgb).permute(2, 0, 1)
        if self.image_size != self.render_size:
            size = (self.image_size, self.image_size)
            picture = interpolate(picture[None], size, mode="bilinear", antialias=True, align_corners=False)[0]
        return picture.round().clamp(0, 255).byte().contiguous().numpy()

    def _mask(self, model: Model, number: int) -> np.ndarray:
        """(H, W) bool, from the geometry folder or the picture's alpha."""
        path = self._view_file(model, "mask", number)
        if "geometry" in self.folders:
            return self._nearest(read_image(path, self._render_shape, "L") > 127)
        return self._nearest(read_image(path, self._render_shape)[..., 3] > 127)

    def _depth(self, model: Model, number: int) -> np.ndarray:
        path = self._view_file(model, "depth", number)
        return self._nearest(read_depth_png(path, self._render_shape, units_per_metre=DEPTH_UNITS))

    def _normals(self, model: Model, number: int) -> np.ndarray:
        """(3, H, W) of length 1, or 0 where the picture shows nothing."""
        code = read_image(self._view_file(model, "normals", number), self._render_shape, "RGB")
        normals = self._nearest(code).astype(np.float32) / 127.5 - 1
        length = np.linalg.norm(normals, axis=2, keepdims=True)
        return np.ascontiguousarray(np.where(code_is_normal(length), normals / length, 0).transpose(2, 0, 1))

    def _camera(self, model: Model, number: int) -> Camera:
        view = next(view for view in self._views[model] if view.number == number)
        camera = Camera.from_r2n2(view.azimuth, view.elevation, view.distance_ratio, self.render_size)
        return camera.resize((self.image_size, self.image_size)).to(torch.float32)

    @property
    def _render_shape(self) -> tuple[int, int]:
        return self.render_size, self.render_size

    def _nearest(self, picture: np.ndarray) -> np.ndarray:
        """The pixels whose centers are nearest to those of the resized picture."""
        if self.image_size == self.render_size:
            return picture
        index = ((np.arange(self.image_size) + 0.5) * self.render_size / self.image_size).astype(int)
        return picture[index[:, None], index]


def code_is_normal(length: np.ndarray) -> np.ndarray:
    """Whether RGB coded as 2 c - 1 is a direction, by its length; black, the code of none, is sqrt(3) long."""
    return np.abs(length - 1) < 0.1


def pieces_of(name: str) -> tuple[str, ...]:
    """The folders that can serve a field, the preferred one first."""
    return {
        "image": ("renderings",),
        "camera": ("renderings",),
        "mask": ("geometry", "renderings"),
        "depth": ("geometry",),
        "normals": ("geometry",),
        "voxels": ("voxels", "samples"),
        "points": ("samples",),
        "surface": ("samples",),
        "cloud": ("samples",),
        "mesh": ("core",),
    }[name]


def _find_folders(root: Any) -> tuple[Path | None, dict[str, Path]]:
    """The root, None when its pieces are given one by one, and the folder of each piece that is there."""
    if isinstance(root, Mapping):
        for piece, place in root.items():
            check_choice("piece", piece, FOLDERS)
            if not Path(place).is_dir():
                raise ValueError(f"{place}: the folder for {piece!r} does not exist")
        return None, {piece: Path(place) for piece, place in root.items()}
    root = Path(root)
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder")
    if not any(root.iterdir()):
        raise ValueError(f"{root}: the folder is empty")
    folders = {}
    for piece, names in FOLDERS.items():
        for name in names:
            if (root / name).is_dir() and piece not in folders:
                folders[piece] = root / name
    if not folders:
        for piece, names in FOLDERS.items():
            if root.name in names:  # the user named the piece itself
                return root.parent, {piece: root}
        known = ", ".join(name for names in FOLDERS.values() for name in names)
        raise ValueError(f"{root}: none of the folders of the public layouts is in it: {known}")
    return root, folders


def _is_synset(folder: Path) -> bool:
    return folder.is_dir() and len(folder.name) == 8 and folder.name.isdigit()


def _subfolders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _read_list(path: Path) -> list[str]:
    models = path.read_text().split()
    for model in models:
        try:
            safe_join(path.parent, model)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    return sorted(models)


def _item_id(model: Model, number: int | None) -> str:
    return f"{model}/{number or 0:02d}"


def _draw(rng: np.random.Generator, total: int, count: int | None, what: str) -> Any:
    """Row indices of `count` of `total` rows, or the slice of all."""
    if count is None or count == total:
        return slice(None)
    if count > total:
        raise ValueError(f"{what}: {count} asked for, the file has {total}")
    return rng.choice(total, count, replace=False, shuffle=False)


def _to_float(array: np.ndarray) -> torch.Tensor:
    """Always a copy: what is in the cache must outlive what is done to an item."""
    return torch.from_numpy(array).to(torch.float32, copy=True)


def _check_rows(path: Path, key: str, array: np.ndarray) -> None:
    if array.ndim != 2 or array.shape[1] != 3 or not len(array):
        raise ValueError(f"{path}: {key} must be (N, 3) with N > 0, got {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{path}: {key} has values that are not finite")


def _path_in(error: Exception) -> str:
    """The file an error of the readers is about: an OSError's own, else what the message begins with."""
    name = getattr(error, "filename", None)
    return str(name) if name else re.split(r": |, line \d", str(error))[0]


def _sentence(problem: Problem) -> str:
    file = "" if problem.file and problem.file in problem.reason else f"{problem.file}: "
    return f"{problem.item}: {file}{problem.reason}"
