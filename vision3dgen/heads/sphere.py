"""A sphere deformed in the object frame by graph convolutions, from one global code: it needs no camera.

Source: the residual graph convolutions of Wang et al. 2018, Pixel2Mesh (arXiv:1804.01654), without its perceptual
pooling: each vertex starts from its place on the sphere and the code, as in the sphere decoder of Groueix et al. 2018,
AtlasNet (arXiv:1802.05384).
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vision3dgen.checks import check_finite
from vision3dgen.heads.graph import Convolution
from vision3dgen.heads.head import Head, View
from vision3dgen.heads.pixel2mesh import GraphBlock
from vision3dgen.heads.refinement import LIGHT_AND_PRETTY, StageLosses, f1_of_batch, true_surface
from vision3dgen.ops import SubdivideMeshes, ico_sphere
from vision3dgen.structures import Meshes


class SphereHead(Head):
    """A closed surface of genus 0 in the object frame, coarse to fine.

    channels: the backbone's; the coarsest map is averaged over space, so any encoder of one code will do. level: of the
    icosphere it starts as, with the given radius. blocks: of graph convolutions, faces are split in four between them.
    residuals: residual graph convolutions of a block. losses: of the mesh after each block.
    """

    def __init__(
        self, channels: list[int], *, level: int = 2, radius: float = 0.4, blocks: int = 2, hidden: int = 128,
        residuals: int = 3, losses: StageLosses = LIGHT_AND_PRETTY, convolution: Convolution = "csr",
    ):  # fmt: skip
        super().__init__()
        if blocks < 1:
            raise ValueError(f"blocks must be at least 1, got {blocks}")
        self.losses = losses
        self.fc_c = nn.Linear(channels[-1], hidden)
        self.fc_p = nn.Linear(3, hidden)
        self.blocks = nn.ModuleList(
            GraphBlock(hidden, hidden, residuals=residuals, convolution=convolution) for _ in range(blocks)
        )
        self.divide = SubdivideMeshes()
        sphere = ico_sphere(level)
        self.verts: Tensor
        self.faces: Tensor
        self.register_buffer("verts", radius * sphere.verts_packed(), persistent=False)
        self.register_buffer("faces", sphere.faces_packed(), persistent=False)

    def forward(self, features: list[Tensor], view: View | None = None) -> list[Meshes]:
        """The mesh after each block; ValueError naming the block whose vertices are not finite."""
        code = self.fc_c(features[-1].mean(dim=(2, 3)))  # (B, H)
        meshes = Meshes(self.verts.expand(len(code), -1, -1), self.faces.expand(len(code), -1, -1))
        x = (self.fc_p(meshes.verts_packed()) + code[meshes.verts_packed_to_mesh_idx()]).relu()  # (V, H)
        stages = []
        for number, block in enumerate(self.blocks, start=1):
            if number > 1:
                meshes, x = self.divide(meshes, x)
                x = (x + self.fc_p(meshes.verts_packed()) + code[meshes.verts_packed_to_mesh_idx()]).relu()
            offsets, x = block(x, meshes.edges_packed())
            meshes = meshes.offset_verts(offsets.to(meshes.verts_packed().dtype))
            check_finite(**{f"vertices after block {number}": meshes.verts_packed()})
            stages.append(meshes)
        return stages

    def loss(
        self, prediction: list[Meshes], batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`StageLosses` against `batch["surface"]` or `batch["mesh"]`, in the object frame."""
        truth = true_surface(batch, self.losses.samples, "object", generator)
        return self.losses(prediction, truth, generator)

    def shape(self, prediction: list[Meshes]) -> Meshes:
        """The last block's meshes."""
        return prediction[-1].detach()

    def validation_metrics(self, prediction: list[Meshes], batch: Mapping[str, Any]) -> dict[str, Float[Tensor, " B"]]:
        """F1 at 2 % of the longest edge."""
        return f1_of_batch(self.shape(prediction), batch, "object")
