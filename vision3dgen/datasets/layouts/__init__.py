"""Layouts of shapes on disk: `LAYOUTS` by name, each read as arrays under common names, most written too."""

import os
from pathlib import Path

from vision3dgen.checks import check_choice
from vision3dgen.datasets.layouts.atlasnet import AtlasNet as AtlasNet
from vision3dgen.datasets.layouts.deepsdf import DeepSDF as DeepSDF
from vision3dgen.datasets.layouts.layout import Layout as Layout
from vision3dgen.datasets.layouts.meshrcnn import MeshRCNN as MeshRCNN
from vision3dgen.datasets.layouts.modelnet import ModelNet as ModelNet
from vision3dgen.datasets.layouts.onet import ConvONetRooms as ConvONetRooms
from vision3dgen.datasets.layouts.onet import OccupancyNetworks as OccupancyNetworks
from vision3dgen.datasets.layouts.packed import Packed as Packed
from vision3dgen.datasets.layouts.plyfolder import PlyFolder as PlyFolder
from vision3dgen.datasets.layouts.plyfolder import What3D as What3D
from vision3dgen.datasets.layouts.shapenet import ShapeNetFolders as ShapeNetFolders

LAYOUTS: dict[str, type[Layout]] = {  # in the order in which a folder is compared with them
    "packed": Packed,
    "shapenet": ShapeNetFolders,
    "atlasnet": AtlasNet,
    "deepsdf": DeepSDF,
    "what3d": What3D,
    "meshrcnn": MeshRCNN,
    "onet": OccupancyNetworks,
    "convonet_rooms": ConvONetRooms,
    "modelnet": ModelNet,
    "ply": PlyFolder,
}


def find_layout(root: str | os.PathLike[str]) -> str | None:
    """The name of the layout a folder has, None where it has none of them."""
    root = Path(root)
    return next((name for name, layout in LAYOUTS.items() if root.is_dir() and layout.matches(root)), None)


def open_layout(root: str | os.PathLike[str], name: str | None = None) -> Layout:
    """The reader of a folder, by its layout's name or by what is in it.

    Raises ValueError for a folder of no known layout, and for one without a model.
    """
    if name is not None:
        check_choice("layout", name, LAYOUTS)
    found = name or find_layout(root)
    if found is None:
        absent = "no such folder" if not Path(root).is_dir() else "its layout is none of"
        raise ValueError(f"{root}: {absent} {', '.join(LAYOUTS) if Path(root).is_dir() else ''}".rstrip())
    layout = LAYOUTS[found](root)
    if not layout.members():
        raise ValueError(f"{root}: read as {found!r}, there is no model in it")
    return layout
