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

from vision3dgen.checks import check_choice
from vision3dgen.datasets.camera_files import read_cameras
from vision3dgen.datasets.manifest import SplitManifest, read_json
from vision3dgen.datasets.procedural import CATEGORIES
from vision3dgen.datasets.shape_items import DEPTH_UNITS as DEPTH_UNITS
from vision3dgen.datasets.shape_items import FIELDS as FIELDS
from vision3dgen.datasets.shape_items import PER_VIEW, Arrays, ShapeItems, item_id
from vision3dgen.datasets.shape_items import InputCloud as InputCloud
from vision3dgen.datasets.shape_items import Model as Model
from vision3dgen.datasets.shape_items import Problem as Problem
from vision3dgen.datasets.shape_items import code_is_normal as code_is_normal
from vision3dgen.datasets.splits import choose_split, onet_split, r2n2_split, read_split
from vision3dgen.io import load_mesh, load_npz, read_binvox, read_depth_png, read_image
from vision3dgen.structures import Camera

# Folder names of the public layouts under a root, the preferred one first.
FOLDERS = {
    "core": ("ShapeNetCore.v2", "ShapeNetCore.v1", "ShapeNetCore"),
    "renderings": ("ShapeNetRendering",),
    "voxels": ("ShapeNetVox32",),
    "samples": ("ShapeNet",),
    "geometry": ("ShapeNetGeometry",),
}
MESHES = ("models/model_normalized.obj", "model.obj")  # v2, v1


class View(NamedTuple):
    number: int
    azimuth: float  # degrees
    elevation: float
    distance_ratio: float
    fov: float = 25.0  # as the file says; not the field of view


class GivenView(NamedTuple):
    """A view with a camera of its own, from cameras.npz."""

    number: int
    world: np.ndarray  # (3, 4), world to camera
    intrinsics: np.ndarray  # (3, 3)


class ShapeNet(ShapeItems):
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
    voxel_resolution: which of 3D-R2N2's ShapeNetVox32 and the ShapeNetVoxN of `prepare shapenet` to read.
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
        voxel_resolution: int = 32,
        voxel_placement: Literal["header", "cube"] = "header",
        manifest: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        cache: bool = False,
        seed: int = 0,
    ):
        check_choice("on_error", on_error, ("raise", "skip"))
        super().__init__(
            split=split,
            fields=fields,
            views=views,
            views_per_item=views_per_item,
            points_per_item=points_per_item,
            surface_points=surface_points,
            cloud=cloud,
            image_size=image_size or render_size,
            background=background,
            voxel_placement=voxel_placement,
            cache=cache,
            seed=seed,
        )
        self.root, self.folders = find_folders(root)
        if voxel_resolution != 32:
            self._take_voxels(voxel_resolution)
        self.render_size = render_size

        for name in self.fields:
            needed = pieces_of(name)
            if not any(piece in self.folders for piece in needed):
                names = " or ".join(FOLDERS[piece][0] for piece in needed)
                raise ValueError(f"{self.root}: field {name!r} needs {names}, found {self._found()}")
        self.split_name, division = self._choose(manifest)
        self.split_sha256, chosen = division.sha256, division.members(split)
        self._allowed = division.views_of(split)
        self.synsets = self._synsets(categories, chosen)
        self.models = [Model(synset, model) for synset in self.synsets for model in chosen[synset]]
        if not self.models:
            raise ValueError(
                f"{self.root or self._found()}: {self.split_name} puts no model of {', '.join(self.synsets)} into "
                f"{split!r}; choose another split, or prepare more shapes"
            )
        self._views: dict[Model, list[View] | list[GivenView]] = {}
        self._missing = [problem for model in self.models for problem in self._missing_files(model)]
        self.items = self._items()
        self._settle(self.root, on_error, self._missing, self.check)

    # -------------------------------------------------------------------------------------------- finding things

    def _take_voxels(self, resolution: int) -> None:
        """Read ShapeNetVoxN in place of ShapeNetVox32; there is no other place for such voxels."""
        if self.root is None:
            raise ValueError('voxel_resolution chooses a folder of a root; without one give the folder as "voxels"')
        folder = self.root / f"ShapeNetVox{resolution}"
        if not folder.is_dir():
            there = sorted(path.name for path in self.root.glob("ShapeNetVox*"))
            raise ValueError(f"{folder}: no such folder for voxel_resolution={resolution}; there are {there}")
        self.folders["voxels"] = folder

    def _found(self) -> str:
        return ", ".join(str(path) for path in self.folders.values()) or "none of the public folders"

    def _choose(self, manifest: str | None) -> tuple[str, SplitManifest]:
        """What decides membership, in words, and the division."""
        listed = sorted((self.root / "splits").glob("*.json")) if self.root else []
        if manifest is not None:
            path = Path(manifest)
            if self.root and not path.is_file():
                path = self.root / "splits" / f"{manifest}.json"
            if not path.is_file() and (manifest in ("r2n2", "onet") or manifest.startswith("random(")):
                return self._choose_by_rule(manifest)
            if not path.is_file():
                names = [p.stem for p in listed] or "none"
                raise ValueError(
                    f"no split manifest {manifest!r}: neither a file nor in {path.parent} ({names}), nor one of "
                    "r2n2, onet, random(SEED)"
                )
            listed = [path]
        if len(listed) > 1:
            raise ValueError(f"{self.root}: several split manifests, choose one: manifest={[p.stem for p in listed]}")
        if listed:
            found = read_split(listed[0], self.root or listed[0].parent)
            return f"{found.name} (version {found.version})", found
        return self._choose_by_rule(None)

    def _choose_by_rule(self, wanted: str | None) -> tuple[str, SplitManifest]:
        base = next(self.folders[piece] for name in self.fields for piece in pieces_of(name) if piece in self.folders)
        ids = {folder.name: _subfolders(folder) for folder in sorted(base.iterdir()) if _is_synset(folder)}
        if not any(ids.values()):
            raise ValueError(f"{base}: no SYNSET/MODEL folders in it")
        samples = self.folders.get("samples")
        listed = samples and all((samples / s / f"{self.split}.lst").is_file() for s in ids)
        if wanted == "onet" or (wanted is None and listed and self.split != "all"):
            lists = onet_split(samples) if samples else None
            if lists is None:
                raise ValueError(f"{samples or base}: no train.lst, val.lst, test.lst of Occupancy Networks")
            return "Occupancy Networks' lists", lists
        if wanted is not None and wanted != "r2n2":
            drawn = choose_split(wanted, ids, None, self.root or base)
            return drawn.name, drawn
        if self.split == "all":
            return "all", r2n2_split(ids)
        if self.split == "val":
            raise ValueError(
                f"{self.root or base}: no split manifest, and 3D-R2N2's rule has no 'val', only 'train' and 'test'"
            )
        return "3D-R2N2's rule (sorted, 80 % train, 20 % test)", r2n2_split(ids)

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
            self._views[model] = self._allowed_views(model)
        except (ValueError, OSError) as error:
            return [*problems, Problem(str(model), _path_in(error), str(error), True)]
        count = len(self._views[model])
        if count < (self.views_per_item or 1):
            folder = self._folder("renderings", model)
            reason = f"{folder}: {count} views, but views_per_item asks for {self.views_per_item}"
            problems.append(Problem(str(model), str(folder), reason, True))
        present = {path: set(os.listdir(path)) if path.is_dir() else set() for path in self._view_folders(model)}
        for number in self._chosen(model):
            for name in PER_VIEW & set(self.fields) - {"camera"}:
                path = self._view_file(model, name, number)
                if path.name not in present[path.parent]:
                    identifier = self._owner(model, number)
                    problems.append(Problem(identifier, str(path), f"the file for {name!r} does not exist", True))
        return problems

    def _allowed_views(self, model: Model) -> list[View] | list[GivenView]:
        """The views that rendering_metadata.txt or cameras.npz describes, but those of another split."""
        folder = self._folder("renderings", model)
        if self._allowed is None:
            return _views_in(folder)
        views, allowed = _views_in(folder), self._allowed.get(str(model), [])
        absent = sorted(set(allowed) - {view.number for view in views})
        if absent:
            raise ValueError(f"{folder}: {self.split_name} asks for views {absent}")
        return [view for view in views if view.number in allowed]  # type: ignore[return-value]

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
            return [self._folder("core", model) / place for place in MESHES] if "core" in self.folders else []
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
            if {str(model), item_id(model, number)} & bad:
                continue
            several = number is not None and (self.views == "random" or self.views_per_item is not None)
            for each in self._chosen(model) if several else [number]:
                try:
                    self._read(model, [] if each is None else [each], np.random.default_rng(0))
                except (ValueError, OSError) as error:
                    problems.append(Problem(self._owner(model, each), _path_in(error), str(error), True))
        return problems

    def _owner(self, model: Model, number: int | None) -> str:
        """The item a fault in a view belongs to: the model where an item takes several views."""
        return str(model) if self.views_per_item is not None else item_id(model, number)

    # -------------------------------------------------------------------------------------------- reading things

    def _has(self, name: str, model: Model) -> bool:
        return self._file(model, name) is not None

    def _where(self, name: str, model: Model) -> str:
        return str(self._expected(model, name))

    def _arrays(self, name: str, model: Model) -> Arrays:
        path = self._expected(model, name)
        if name == "mesh":
            verts, faces = load_mesh(path, materials=False).get_mesh_verts_faces(0)  # without the file's colors
            return {"verts": verts.numpy(), "faces": faces.numpy()}
        if name == "voxels":
            voxels, translate, scale = read_binvox(path)
            return {"voxels": voxels.numpy(), "translate": np.array(translate), "scale": np.array(scale)}
        return load_npz(path, "points", "occupancies" if name == "points" else "normals", "loc", "scale")

    def _numbers(self, model: Model) -> list[int]:
        return [view.number for view in self._views.get(model, [])]

    def _picture(self, name: str, model: Model, number: int) -> np.ndarray:
        path, shape = self._view_file(model, name, number), (self.render_size, self.render_size)
        if name == "depth":
            return read_depth_png(path, shape, units_per_metre=1.0).astype(np.uint16)
        if name == "mask" and "geometry" not in self.folders:
            return read_image(path, shape)[..., 3]
        return read_image(path, shape, {"image": "RGBA", "mask": "L", "normals": "RGB"}[name])

    def _full_camera(self, model: Model, number: int) -> Camera:
        view = next(view for view in self._views[model] if view.number == number)
        if isinstance(view, GivenView):
            world, matrix = torch.from_numpy(view.world).double(), torch.from_numpy(view.intrinsics).double()
            size = (self.render_size, self.render_size)
            return Camera(world[:, :3].contiguous(), world[:, 3].contiguous(), matrix, size)
        return Camera.from_r2n2(view.azimuth, view.elevation, view.distance_ratio, self.render_size)


def _views_in(folder: Path) -> list[View] | list[GivenView]:
    given = folder / "cameras.npz"
    if (folder / "rendering_metadata.txt").is_file() or not given.is_file():
        return read_views(folder)
    found = read_cameras(given, [])
    cameras = zip(found["numbers"].tolist(), found["world_mat"], found["camera_mat"])
    return [GivenView(number, world, matrix) for number, world, matrix in cameras]


def read_views(folder: Path) -> list[View]:
    """The views rendering_metadata.txt in a folder describes, in the order of renderings.txt (or 00, 01, ...)."""
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
            fov = float(values[4]) if len(values) > 4 else 25.0
            views.append(View(int(name.removesuffix(".png")), azimuth, elevation, ratio, fov))
        except ValueError as error:
            raise ValueError(
                f"{path}: line {number + 1} for {name!r} is not 'azimuth elevation yaw ratio fov'"
            ) from error
        if yaw != 0:
            raise ValueError(f"{path}: line {number + 1} turns the camera by {yaw} about its axis; only 0 is known")
    return views


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


def find_folders(root: Any) -> tuple[Path | None, dict[str, Path]]:
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


def _path_in(error: Exception) -> str:
    """The file an error of the readers is about: an OSError's own, else what the message begins with."""
    name = getattr(error, "filename", None)
    return str(name) if name else re.split(r": |, line \d", str(error))[0]
