"""Meshes from a picture, in the frame of its camera: voxels made a mesh and refined, or a sphere moved to the object.

Source: Gkioxari et al. 2019, Mesh R-CNN (arXiv:1906.02739): VoxMesh, Sphere-Init and Pixel2Mesh+ of the ShapeNet
experiments. Parameter names are the published ones under `voxel_head` and `mesh_head`; `vision3dgen convert` renames
the rest of a published state dict.
Differs: no first iterations on the voxels alone, which start out empty instead; no step is left out for a large loss.
"""

from abc import ABC
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from vision3dgen.heads.frustum import CLIP, FOCAL, Frustum, VoxelTubes, picture_intrinsics, read_voxels
from vision3dgen.heads.graph import Convolution
from vision3dgen.heads.head import Head, View
from vision3dgen.heads.refinement import (
    LIGHT_AND_PRETTY,
    OPENGL,
    MeshRefinement,
    StageLosses,
    f1_of_batch,
    true_surface,
)
from vision3dgen.ops import cubify, ico_sphere
from vision3dgen.structures import Meshes


class RefinedMeshes(NamedTuple):
    """The mesh after each stage, in the camera's frame, and how its camera projects."""

    stages: list[Any]
    intrinsics: Float[Tensor, "B 3 3"]
    voxels: Tensor | None = None  # logits (B, D, H, W) in the view volume


class RefinedMeshHead(Head, ABC):
    """What the heads share whose mesh goes through `mesh_head`."""

    frame = "camera"

    def __init__(self, channels: list[int], losses: StageLosses, **refinement: Any):
        super().__init__()
        self.losses = losses
        self.mesh_head = MeshRefinement(channels, **refinement)

    def loss(
        self, prediction: RefinedMeshes, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`StageLosses` against `batch["surface"]` or `batch["mesh"]`, moved to the camera's frame."""
        truth = true_surface(batch, self.losses.samples, "camera", generator)
        return self.losses(prediction.stages, truth, generator)

    def shape(self, prediction: RefinedMeshes) -> Meshes:
        """The last stage's meshes, in the camera's frame."""
        return prediction.stages[-1].detach()

    def validation_metrics(self, prediction: RefinedMeshes, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """F1 at 2 % of the longest edge."""
        return f1_of_batch(self.shape(prediction), batch, "camera")


class VoxMeshHead(RefinedMeshHead):
    """Voxels of the view volume, their surface as a mesh, and three stages of refinement.

    resolution, depths: of the volume, see `Frustum`. threshold: probability from which a voxel is filled. fill_empty:
    where no voxel is, the middle half of the volume along each axis becomes the mesh, as published; else the mesh is
    empty. align: "topleft", as published, puts the cubes half a voxel further along each axis than the samples that the
    truth is read at; "center" puts them around these. width: of the voxels' convolutions. voxels: weight of the voxels'
    mean binary cross-entropy.
    """

    def __init__(
        self, channels: list[int], *, resolution: int = 48,
        depths: tuple[float, float] = (Frustum.near, Frustum.far), threshold: float = 0.2, fill_empty: bool = True,
        align: Literal["topleft", "center"] = "topleft", width: int = 256, stages: int = 3, hidden: int = 128,
        voxels: float = 1.0, losses: StageLosses = LIGHT_AND_PRETTY, convolution: Convolution = "csr",
    ):  # fmt: skip
        super().__init__(channels, losses, stages=stages, hidden=hidden, convolution=convolution)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold}")
        self.frustum = Frustum(resolution, *depths)
        self.threshold: float = threshold
        self.fill_empty, self.align, self.voxels = fill_empty, align, voxels
        self.voxel_head = VoxelTubes(channels[-1], resolution, width)

    def forward(self, features: list[Tensor], view: View | None = None) -> RefinedMeshes:
        intrinsics = picture_intrinsics(view, features[-1])
        logits = self.voxel_head(features[-1]).float()
        return RefinedMeshes(self.mesh_head(features, self._cubify(logits, intrinsics), intrinsics), intrinsics, logits)

    @torch.no_grad()
    def _cubify(self, logits: Float[Tensor, "B D H W"], intrinsics: Float[Tensor, "B 3 3"]) -> Any:
        cubes = cubes_of(logits, self.threshold, self.fill_empty, self.align)
        return cubes.update_padded(self.frustum.to_camera(cubes.verts_padded(), intrinsics))

    def loss(
        self, prediction: RefinedMeshes, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """That of the meshes, and the binary cross-entropy of the voxels against `Frustum.truth`."""
        assert prediction.voxels is not None
        filled = self.frustum.truth(batch, prediction.intrinsics).to(prediction.voxels.dtype)
        voxels = F.binary_cross_entropy_with_logits(prediction.voxels, filled)
        losses = super().loss(prediction, batch, generator)
        return {**losses, "loss": losses["loss"] + self.voxels * voxels, "voxels": voxels}

    def occupancy(self, prediction: RefinedMeshes, points: Float[Tensor, "B N 3"]) -> Float[Tensor, "B N"]:
        """Probability of the voxel of the view volume each point falls in; 0 outside the volume."""
        assert prediction.voxels is not None
        places = self.frustum.from_camera(points, prediction.intrinsics)
        return read_voxels(prediction.voxels.sigmoid(), self.frustum.grid, places)


@torch.no_grad()
def cubes_of(
    logits: Float[Tensor, "B D H W"], threshold: float, fill_empty: bool, align: Literal["topleft", "center"]
) -> Meshes:
    """The surface of the voxels whose probability passes a threshold, in [-1, 1]^3; see `VoxMeshHead` for the rest."""
    probability = logits.sigmoid()
    if fill_empty:
        middle = slice(logits.shape[-1] // 4, 3 * logits.shape[-1] // 4)
        probability[(probability <= threshold).flatten(1).all(1), middle, middle, middle] = 1
    return cubify(probability, threshold, align=align)


class SphereInitHead(RefinedMeshHead):
    """A sphere moved to the object by three stages of refinement.

    level: of the icosphere, 10 * 4^level + 2 vertices. subdivide: faces are split in four between stages; with level 2
    that is Pixel2Mesh+. radius, distance: of the sphere, which is centred on the optical axis; published is the unit
    sphere around the camera itself, from which the offsets of up to 1 along each axis of each stage must lead away.
    """

    def __init__(
        self, channels: list[int], *, level: int = 4, subdivide: bool = False, radius: float = 1.0,
        distance: float = 0.0, stages: int = 3, hidden: int = 128, losses: StageLosses = LIGHT_AND_PRETTY,
        convolution: Convolution = "csr",
    ):  # fmt: skip
        super().__init__(channels, losses, stages=stages, hidden=hidden, convolution=convolution, subdivide=subdivide)
        sphere = ico_sphere(level)
        verts = radius * sphere.verts_packed() * torch.tensor(OPENGL) + torch.tensor([0.0, 0.0, distance])
        self.verts: Tensor
        self.faces: Tensor
        self.register_buffer("verts", verts, persistent=False)
        self.register_buffer("faces", sphere.faces_packed(), persistent=False)

    def forward(self, features: list[Tensor], view: View | None = None) -> RefinedMeshes:
        size = len(features[-1])
        sphere = Meshes(self.verts.expand(size, -1, -1), self.faces.expand(size, -1, -1))
        intrinsics = picture_intrinsics(view, features[-1])
        return RefinedMeshes(self.mesh_head(features, sphere, intrinsics), intrinsics)


# ------------------------------------------------------------------------------------------------ published weights

PUBLISHED_PREFIXES = {
    "backbone.stem.0.": "backbone.conv1.",
    "backbone.stem.1.": "backbone.bn1.",
    "backbone.stage": "backbone.layer",
    "voxel_head.": "head.voxel_head.",
    "mesh_head.": "head.mesh_head.",
}
PUBLISHED_K = [[FOCAL, 0.0, 0.0, 0.0], [0.0, FOCAL, 0.0, 0.0], [0.0, 0.0, -CLIP[0], -CLIP[1]], [0.0, 0.0, -1.0, 0.0]]
