"""Predictions without learning to reconstruct, which every table should hold its networks against.

Source: Tatarchenko et al. 2019 (arXiv:1905.03678) found that retrieval and an oracle nearest neighbour equal or beat
published single-view networks; a benchmark without them cannot tell reconstruction from recognition.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from vision3dgen.metrics import Prediction
from vision3dgen.ops import isosurface
from vision3dgen.structures import Frame, GridSpec, Meshes, join_meshes_as_batch


class ShapeLibrary(NamedTuple):
    """The shapes of a training set, and what each of its views looks like."""

    models: list[str]  # "synset/model"
    voxels: Bool[Tensor, "M D H W"]
    meshes: Meshes  # M members, canonical object frame
    features: Float[Tensor, "V K"]  # one row per view
    model_of_view: Int[Tensor, " V"]

    @staticmethod
    def gather(batches: Iterable[dict[str, Any]], features: Callable[[Tensor], Tensor]) -> "ShapeLibrary":
        """Read a whole training set; `features` maps images (B, 3, H, W) to descriptors (B, K)."""
        index: dict[str, int] = {}
        voxels, meshes, rows, owners = [], [], [], []
        for batch in batches:
            rows.append(features(batch["image"]).cpu())
            for position, identity in enumerate(batch["id"]):
                model = identity.rsplit("/", 1)[0]
                if model not in index:
                    index[model] = len(index)
                    voxels.append(batch["voxels"][position].cpu() > 0.5)
                    meshes.append(batch["mesh"][position].cpu())
                owners.append(index[model])
        if not index:
            raise ValueError("a shape library needs at least one training batch, got none")
        library = join_meshes_as_batch([Meshes(mesh.verts_list(), mesh.faces_list()) for mesh in meshes])
        return ShapeLibrary(list(index), torch.stack(voxels), library, torch.cat(rows), torch.tensor(owners))


def voxel_ious(a: Bool[Tensor, "N D H W"], b: Bool[Tensor, "M D H W"]) -> Float[Tensor, "N M"]:
    """Intersection over union of every pair; two empty grids have 1."""
    flat_a, flat_b = a.flatten(1).float(), b.flatten(1).float()
    both = flat_a @ flat_b.t()
    either = flat_a.sum(1)[:, None] + flat_b.sum(1)[None] - both
    return torch.where(either > 0, both / either.clamp_min(1), 1.0)


class MeanShape:
    """One shape for every image: the mean of the training voxels, cut where the mean training IoU is best."""

    def __init__(self, library: ShapeLibrary):
        mean = library.voxels.float().mean(0)
        levels = torch.linspace(0.02, 0.98, 49)
        scores = voxel_ious(mean[None] >= levels.view(-1, 1, 1, 1), library.voxels).mean(1)
        self.threshold = float(levels[scores.argmax()])
        self.voxels = (mean >= self.threshold).float()
        self.mesh = isosurface(mean[None], GridSpec.cube(mean.shape[-1]), level=self.threshold)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        return [Prediction(self.mesh, self.voxels, None, frame) for frame in batch["frame"]]


class MeanDepth:
    """One picture of depth for every image: the mean of the training pictures, pixel by pixel.

    Each pixel is the mean of the depths seen there, of all depths where none was ever seen.
    """

    def __init__(self, batches: Iterable[dict[str, Any]]):
        total: Tensor | float = 0.0
        count: Tensor | float = 0.0
        for batch in batches:
            depth = batch["depth"].cpu().double()
            seen = (depth > 0) & depth.isfinite()
            total = total + depth.where(seen, 0).sum(0)
            count = count + seen.sum(0)
        if not isinstance(total, Tensor) or not isinstance(count, Tensor) or not bool(count.any()):
            raise ValueError("the mean depth needs at least one training picture with a depth above 0")
        self.depth = torch.where(count > 0, total / count.clamp(min=1), total.sum() / count.sum()).float()  # (1, H, W)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        return [Prediction(maps={"depth": self.depth}) for _ in batch["id"]]


class Retrieval:
    """The training shape whose view looks most like the image (largest cosine of descriptors)."""

    def __init__(self, library: ShapeLibrary, features: Callable[[Tensor], Tensor]):
        self.library = library
        self.features = features
        self.rows = torch.nn.functional.normalize(library.features, dim=1)

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        query = torch.nn.functional.normalize(self.features(batch["image"]).cpu(), dim=1)
        return _entries(self.library, self.library.model_of_view[(query @ self.rows.t()).argmax(1)], batch["frame"])


class OracleNeighbor:
    """The training shape with the best voxel IoU to the truth: the ceiling of any retrieval."""

    def __init__(self, library: ShapeLibrary):
        self.library = library

    def predict(self, batch: dict[str, Any]) -> list[Prediction]:
        nearest = voxel_ious(batch["voxels"].cpu() > 0.5, self.library.voxels).argmax(1)
        return _entries(self.library, nearest, batch["frame"])


def _entries(library: ShapeLibrary, chosen: Int[Tensor, " B"], frames: list[Frame]) -> list[Prediction]:
    return [
        Prediction(library.meshes[index], library.voxels[index].float(), None, frame)
        for index, frame in zip(chosen.tolist(), frames)
    ]
