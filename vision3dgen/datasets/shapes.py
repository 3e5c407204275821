"""A dataset of shapes from any layout, the packed store among them; see `layouts` for what each is."""

import os
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from vision3dgen.checks import check_choice
from vision3dgen.datasets.layouts import Layout, Packed, find_layout, open_layout
from vision3dgen.datasets.layouts.layout import RENDER_SIZE, camera_of
from vision3dgen.datasets.procedural import CATEGORIES
from vision3dgen.datasets.shape_items import PER_VIEW, Arrays, InputCloud, Model, Problem, ShapeItems, item_id
from vision3dgen.datasets.splits import choose_split
from vision3dgen.structures import Camera

NEEDS = {"cloud": "surface"}  # fields made of another one's arrays


class Shapes(ShapeItems):
    """Items of a split of shapes in any layout of `LAYOUTS`, as `ShapeNet` gives them, with its arguments.

    layout: its name, by default what the folder looks like. manifest: who is in the split: "r2n2", "random(SEED)", the
    layout's own name, a manifest in ROOT/splits or a file (ours, or Mesh R-CNN's split of views); by default the one
    manifest there, else the layout's own lists, else 3D-R2N2's rule. A packed store is divided already.
    image_size: of a store packed at a size, that size or None. verify: whether the checksums of a packed store are
    compared when their data are first read.
    Raises ValueError naming the file and the reason.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        split: str,
        *,
        layout: str | None = None,
        categories: Sequence[str] | None = None,
        fields: Sequence[str] = ("image", "camera", "voxels", "points", "surface", "mesh"),
        views: Literal["all", "first", "random"] | int = "all",
        views_per_item: int | None = None,
        points_per_item: int | None = None,
        surface_points: int | None = None,
        cloud: InputCloud | None = None,
        image_size: int | None = None,
        background: tuple[float, float, float] = (1.0, 1.0, 1.0),
        voxel_placement: Literal["header", "cube"] = "header",
        manifest: str | None = None,
        on_error: Literal["raise", "skip"] = "raise",
        verify: bool = True,
        seed: int = 0,
    ):
        check_choice("split", split, ("train", "val", "test", "all"))
        check_choice("on_error", on_error, ("raise", "skip"))
        super().__init__(
            fields=fields,
            views=views,
            views_per_item=views_per_item,
            points_per_item=points_per_item,
            surface_points=surface_points,
            cloud=cloud,
            image_size=image_size,
            background=background,
            voxel_placement=voxel_placement,
            cache=False,
            seed=seed,
        )
        self.layout: Layout
        if layout == "packed" or (layout is None and find_layout(root) == "packed"):
            self.layout = self._open_packed(root, split, manifest, verify)
        else:
            self.layout = open_layout(root, layout)
        self.trusted, self.canonical = self.layout.trusted, self.layout.canonical
        self.split = split
        members = self.layout.members()
        if isinstance(self.layout, Packed):
            division, self.split_name = self.layout.manifest(), str(self.layout.about["split"]["name"])
            self.split_sha256, chosen = str(self.layout.about["split"]["sha256"]), members
        else:
            division = choose_split(manifest, members, self.layout.manifest(), self.layout.root)
            self.split_name, self.split_sha256 = division.name, division.sha256
            chosen = members if split == "all" and not division.views else division.members(split)
        self._views_of = None if division is None else division.views_of(split)
        synsets = self._synsets(categories, members)
        self.models = [Model(synset, name) for synset in synsets for name in chosen.get(synset, [])]
        if not self.models:
            raise ValueError(
                f"{root}: {self.split_name} puts no model of {', '.join(synsets)} into {split!r}; choose another split"
            )
        for name in self.fields:
            if self._source(name) not in self.layout.fields and not (name == "mask" and "image" in self.layout.fields):
                raise ValueError(
                    f"{root}: no field {name!r} in this {self.layout.name!r}; it has {', '.join(self.layout.fields)}"
                )
        self._numbers_of: dict[Model, list[int]] = {}
        missing = self._missing()
        self.items = self._items()
        if on_error == "skip":
            self.problems = [*missing, *self._read_all({problem.item for problem in missing})]
            bad = {problem.item for problem in self.problems}
            self.items = [item for item in self.items if not {str(item[0]), item_id(*item)} & bad]
            if not self.items:
                raise ValueError(f"{root}: no item is whole; the first problem: {self.problems[0].reason}")
        elif missing:
            more = f" ({len(missing) - 1} more; see on_error='skip')" if len(missing) > 1 else ""
            raise ValueError(f"{missing[0].item}: {missing[0].reason}{more}")

    def _open_packed(self, root: Any, split: str, manifest: str | None, verify: bool) -> Packed:
        layout = Packed(root, None if split == "all" else (split,), verify=verify)
        named = layout.about["split"]["name"]
        if manifest not in (None, named):
            raise ValueError(f"{root}: packed with the split {named!r}, not {manifest!r}; pack it again with manifest=")
        packed = layout.about.get("pictures")
        if packed and PER_VIEW & set(self.fields):
            if self.image_size not in (None, packed["image_size"]):
                raise ValueError(f"{root}: packed at image_size={packed['image_size']}, asked for {self.image_size}")
            if "image" in self.fields and list(self.background) != packed["background"]:
                raise ValueError(
                    f"{root}: packed over background={packed['background']}, asked for {list(self.background)}"
                )
            self.image_size = packed["image_size"]
        return layout

    def _synsets(self, categories: Sequence[str] | None, members: Any) -> list[str]:
        if categories is None:
            return list(members)
        names = {name: synset for synset, name in CATEGORIES.items()}
        synsets = [category if category in members else names.get(category, category) for category in categories]
        for category, synset in zip(categories, synsets):
            if synset not in members:
                known = [f"{s} ({CATEGORIES[s]})" if s in CATEGORIES else s for s in members]
                raise ValueError(f"unknown category {category!r} in {self.layout.root}; choose from {', '.join(known)}")
        return list(dict.fromkeys(synsets))

    def _source(self, name: str) -> str:
        """The field whose arrays a field is made of."""
        if name == "mask" and "mask" not in self.layout.fields:
            return "image"
        return NEEDS.get(name, name)

    def _missing(self) -> list[Problem]:
        """What the fields need and is not there; lists views on the way."""
        problems = []
        for model in self.models:
            lacking = {
                source: path
                for source in dict.fromkeys(map(self._source, self.fields))
                if (path := self.layout.missing(model, source)) is not None
            }
            problems += [
                Problem(str(model), path, f"{path}: the file for {source!r} does not exist", True)
                for source, path in lacking.items()
            ]
            if PER_VIEW & set(self.fields):
                try:
                    self._numbers_of[model] = [] if lacking else self._list_views(model)
                except (ValueError, OSError) as error:
                    self._numbers_of[model] = []
                    problems.append(Problem(str(model), self.layout.where(model, "camera"), str(error), True))
        return problems

    def _list_views(self, model: Model) -> list[int]:
        """The numbers of the views that belong to the split."""
        numbers = self.layout.numbers(model)
        allowed = None if self._views_of is None else self._views_of.get(str(model), [])
        if allowed is not None:
            if absent := sorted(set(allowed) - set(numbers)):
                raise ValueError(f"{self.layout.where(model, 'image')}: {self.split_name} asks for views {absent}")
            numbers = [number for number in numbers if number in allowed]
        if len(numbers) < (self.views_per_item or 1):
            raise ValueError(f"{model}: {len(numbers)} views, {self.views_per_item or 1} are asked for")
        return numbers

    def check(self) -> list[Problem]:
        """Read every item once, of a packed store compare the checksums of its fields, and list what is broken.

        What was not asked for is listed too where a model lacks what others have, as not required.
        """
        problems = self._missing()
        if isinstance(self.layout, Packed):
            problems += self.layout.check(map(self._source, self.fields))
        others = set(self.layout.fields) - set(map(self._source, self.fields))
        for field in [] if isinstance(self.layout, Packed) else sorted(others):
            paths = {model: self.layout.missing(model, field) for model in self.models}
            if any(path is None for path in paths.values()):
                for model, path in paths.items():
                    if path is not None:
                        problems.append(Problem(str(model), path, f"{path}: does not exist", False))
        return problems + self._read_all({problem.item for problem in problems if problem.required})

    def _read_all(self, bad: set[str]) -> list[Problem]:
        problems = []
        for model, number in self.items:
            if {str(model), item_id(model, number)} & bad:
                continue
            several = number is not None and (self.views == "random" or self.views_per_item is not None)
            for each in self._chosen(model) if several else [number]:
                for name in self.fields:
                    try:
                        self._read_field(name, model, each)
                    except (ValueError, OSError) as error:
                        where = self.layout.where(model, self._source(name))
                        item = str(model) if several else item_id(model, each)
                        problems.append(Problem(item, where, f"{name}: {error}", True))
        return problems

    def _read_field(self, name: str, model: Model, number: int | None) -> None:
        fields, several = self.fields, self.views_per_item
        try:
            self.fields, self.views_per_item = (name,), None
            self._read(model, [] if number is None else [number], np.random.default_rng(0))
        finally:
            self.fields, self.views_per_item = fields, several

    # ------------------------------------------------------------------------------------------- what is on disk

    def _has(self, name: str, model: Model) -> bool:
        return self.layout.has(model, name)

    def _arrays(self, name: str, model: Model) -> Arrays:
        return self.layout.read(model, name)

    def _where(self, name: str, model: Model) -> str:
        return self.layout.where(model, name)

    def _numbers(self, model: Model) -> list[int]:
        return self._numbers_of[model]

    def _index(self, model: Model, number: int) -> int:
        """Which of the layout's views has a number."""
        listed = self._numbers_of[model] if self._views_of is None else self.layout.numbers(model)
        return listed.index(number)

    def _picture(self, name: str, model: Model, number: int) -> np.ndarray:
        source = self._source(name)
        picture = self.layout.read_view(model, source, self._index(model, number))
        if source == name:
            return picture
        if picture.shape[2] != 4:
            raise ValueError(f"{self.layout.where(model, 'image')}: pictures without alpha have no mask")
        return picture[..., 3]

    def _full_camera(self, model: Model, number: int) -> Camera:
        arrays, where = self.layout.read(model, "camera"), self.layout.where(model, "camera")
        return camera_of(arrays, self._index(model, number), self._picture_size(model), where)

    def _picture_size(self, model: Model) -> tuple[int, int]:
        """(H, W) of the pictures as rendered, which cameras are for."""
        if isinstance(self.layout, Packed):
            side = self.layout.about.get("render_size")
            return (side[0], side[1]) if side else (RENDER_SIZE, RENDER_SIZE)
        if not self.layout.has(model, "image"):
            return (RENDER_SIZE, RENDER_SIZE)
        shape = self.layout.read_view(model, "image", 0).shape
        return (shape[0], shape[1])
