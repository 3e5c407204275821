"""An ellipsoid before the camera, deformed by three blocks of residual graph convolutions, finer from block to block.

Source: Wang et al. 2018, Pixel2Mesh (arXiv:1804.01654), sections 3.2 to 3.4: features of the picture where a vertex is
seen, graph unpooling, and five losses on each block's mesh.
Differs: the template is an icosphere stretched to the published ellipsoid (162, 642 and 2,562 vertices; the published
template, of unknown construction, has 156, 618 and 2,466); neighbors are summed, as in Mesh R-CNN, where the published
sum has weights of a normalized adjacency (on an icosphere, whose degrees are 5 and 6, nearly a constant factor, which
weights absorb); blocks predict offsets, not places, so that a new network starts at the ellipsoid and not at the
camera, and none has a last graph convolution more than the others; maps are sampled with their cells where the picture
has them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vision3dgen.checks import check_finite
from vision3dgen.heads.frustum import picture_intrinsics
from vision3dgen.heads.graph import GRAPH_CONVOLUTIONS, Convolution
from vision3dgen.heads.head import Head, View
from vision3dgen.heads.refinement import TrueSurface, f1_of_batch, project, true_surface
from vision3dgen.losses import mesh_edge_loss
from vision3dgen.ops import SubdivideMeshes, ico_sphere, knn_gather, knn_points, vert_align
from vision3dgen.ops.meshes import spread_differences
from vision3dgen.structures import Meshes

UNIT = 0.57  # Pixel2Mesh measures 3D-R2N2's world in units 1 / 0.57 as long


class GraphResidual(nn.Module):
    """The mean of x and of two graph convolutions of it, each with a ReLU."""

    def __init__(self, channels: int, convolution: Convolution = "csr"):
        super().__init__()
        build = GRAPH_CONVOLUTIONS[convolution]
        self.conv1, self.conv2 = build(channels, channels), build(channels, channels)

    def forward(self, x: Float[Tensor, "V C"], edges: Int[Tensor, "E 2"]) -> Float[Tensor, "V C"]:
        return 0.5 * (x + self.conv2(self.conv1(x, edges).relu(), edges).relu())


class GraphBlock(nn.Module):
    """G-ResNet: a graph convolution, residual ones, and one more to `outputs` channels; also the features before it."""

    def __init__(
        self, inputs: int, hidden: int, outputs: int = 3, *, residuals: int = 6, convolution: Convolution = "csr"
    ):
        super().__init__()
        build = GRAPH_CONVOLUTIONS[convolution]
        self.first = build(inputs, hidden)
        self.residuals = nn.ModuleList(GraphResidual(hidden, convolution) for _ in range(residuals))
        self.last = build(hidden, outputs)
        for module in self.modules():
            if isinstance(module, build):
                nn.init.kaiming_normal_(module.w0.weight, nonlinearity="relu")
                nn.init.kaiming_normal_(module.w1.weight, nonlinearity="relu")
                with torch.no_grad():
                    module.w1.weight /= 6  # as many neighbors as most vertices have
        nn.init.zeros_(self.last.w0.weight)
        nn.init.zeros_(self.last.w1.weight)

    def forward(
        self, x: Float[Tensor, "V C"], edges: Int[Tensor, "E 2"]
    ) -> tuple[Float[Tensor, "V O"], Float[Tensor, "V H"]]:
        x = self.first(x, edges).relu()
        for residual in self.residuals:
            x = residual(x, edges)
        return self.last(x, edges), x


class Deformation(NamedTuple):
    """The meshes each block was given and gave."""

    before: list[Meshes]
    after: list[Meshes]


@dataclass(frozen=True)
class DeformationLosses:
    """Weights of Pixel2Mesh's five losses on each block's mesh; their sum over the blocks is minimized.

    chamfer: mean squared distance from truth to vertices and, times `backward`, from vertices to truth. normals: |cos|
    between edges and the normal of the truth nearest to their ends. laplacian: squared change of each vertex's offset
    from the mean of its neighbors, three tenths of it in the first block. move: squared displacement, but in the first
    block. edges: squared edge length. Distances are in units of `unit` times the file's (Pixel2Mesh: 0.57).
    """

    chamfer: float = 3000.0
    backward: float = 0.55
    normals: float = 0.5
    laplacian: float = 1500.0
    move: float = 100.0
    edges: float = 300.0
    samples: int = 8000
    unit: float = UNIT

    def __call__(self, prediction: Deformation, truth: TrueSurface) -> dict[str, Tensor]:
        """Each term summed over the blocks as it enters "loss", their sum. A truth without points counts zero."""
        totals: dict[str, Tensor] = {}
        for block, (before, after) in enumerate(zip(prediction.before, prediction.after)):
            for name, value in self._block(block, before, after, truth).items():
                totals[name] = totals.get(name, 0) + value
        return {"loss": torch.stack(list(totals.values())).sum(), **totals}

    def _block(self, block: int, before: Meshes, after: Meshes, truth: TrueSurface) -> dict[str, Tensor]:
        square = self.unit**2
        verts = after.verts_padded()  # (B, V, 3)
        to_verts = knn_points(truth.points, verts, lengths1=truth.lengths).dists[..., 0]  # (B, S)
        to_truth = knn_points(verts, truth.points, lengths2=truth.lengths)
        present = truth.present.to(verts.dtype)
        count = present.sum().clamp(min=1)
        forward = (to_verts.sum(1) / truth.lengths.clamp(min=1) * present).sum() / count
        backward = (to_truth.dists[..., 0].mean(1) * present).sum() / count
        moved = after.verts_packed() - before.verts_packed()
        terms = {
            "chamfer": self.chamfer * square * (forward + self.backward * backward),
            "edges": self.edges * square * mesh_edge_loss(after),
            "laplacian": (0.3 if block == 0 else 1) * self.laplacian * square * _uneven(after, moved),
        }
        if block:
            terms["move"] = self.move * square * moved.square().sum(1).mean()
        if truth.normals is not None:
            nearest = knn_gather(truth.normals, to_truth.idx, truth.lengths)[:, :, 0].flatten(0, 1)  # (B V, 3)
            i, j = after.edges_packed().unbind(1)
            own = present[after.edges_packed_to_mesh_idx()]
            along = after.verts_packed()[i] - after.verts_packed()[j]
            length = along.square().sum(1, keepdim=True)
            direction = along / length.where(length > 0, 1).sqrt()
            turned = (direction * nearest[i]).sum(1).abs() + (direction * nearest[j]).sum(1).abs()
            terms["normals"] = self.normals * (own * turned).sum() / (2 * own.sum()).clamp(min=1)
        return terms


def _uneven(meshes: Meshes, moved: Float[Tensor, "V 3"]) -> Tensor:
    """Mean squared difference between a vertex's displacement and the mean of its neighbors'."""
    i, j = meshes.edges_packed().unbind(1)
    offsets, degree = spread_differences(moved, i, j, moved.new_ones(len(i)))
    return (offsets / degree.clamp(min=1)).square().sum(1).mean()


class Pixel2MeshHead(Head):
    """An ellipsoid deformed in the camera's frame.

    level: of the icosphere it starts as. radii, distance: of the ellipsoid, along x, y and z and to its centre, in
    units of the file; published are 0.2, 0.2, 0.4 and 0.8 in Pixel2Mesh's. blocks: as many as meshes; faces are split
    between them. residuals: residual graph convolutions of a block.
    """

    frame = "camera"

    def __init__(
        self, channels: list[int], *, level: int = 2,
        radii: tuple[float, float, float] = (0.2 / UNIT, 0.2 / UNIT, 0.4 / UNIT), distance: float = 0.8 / UNIT,
        blocks: int = 3, hidden: int = 192, residuals: int = 6, losses: DeformationLosses = DeformationLosses(),
        convolution: Convolution = "csr",
    ):  # fmt: skip
        super().__init__()
        if not distance > radii[2]:
            raise ValueError(f"the ellipsoid must be before the camera, got distance {distance} and radii {radii}")
        self.losses = losses
        inputs = sum(channels) + 3
        self.blocks = nn.ModuleList(
            GraphBlock(inputs + (hidden if index else 0), hidden, residuals=residuals, convolution=convolution)
            for index in range(blocks)
        )
        self.unpool = SubdivideMeshes()
        sphere = ico_sphere(level)
        verts = sphere.verts_packed() * torch.tensor(radii) + torch.tensor([0.0, 0.0, distance])
        self.verts: Tensor
        self.faces: Tensor
        self.register_buffer("verts", verts, persistent=False)
        self.register_buffer("faces", sphere.faces_packed(), persistent=False)

    def forward(self, features: list[Tensor], view: View | None = None) -> Deformation:
        """Raises ValueError naming the block whose vertices are not finite."""
        size = len(features[-1])
        intrinsics = picture_intrinsics(view, features[-1])
        meshes = Meshes(self.verts.expand(size, -1, -1), self.faces.expand(size, -1, -1))
        hidden: Tensor | None = None
        before, after = [], []
        for number, block in enumerate(self.blocks, start=1):
            x = self._perceive(features, meshes, intrinsics)
            if hidden is not None:
                meshes, x = self.unpool(meshes, torch.cat([x, hidden], dim=1))
            before.append(meshes)
            offsets, hidden = block(x, meshes.edges_packed())
            meshes = meshes.offset_verts(offsets.to(meshes.verts_packed().dtype))
            check_finite(**{f"vertices after block {number}": meshes.verts_packed()})
            after.append(meshes)
        return Deformation(before, after)

    @staticmethod
    def _perceive(
        features: Sequence[Tensor], meshes: Meshes, intrinsics: Float[Tensor, "B 3 3"]
    ) -> Float[Tensor, "V C"]:
        verts = meshes.verts_padded()
        seen = vert_align(
            list(features), project(verts, intrinsics), return_packed=True, padding_mode="border", align_corners=False
        )
        return torch.cat([seen, meshes.verts_packed()], dim=1)

    def loss(
        self, prediction: Deformation, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """`DeformationLosses` against `batch["surface"]` or `batch["mesh"]`, moved to the camera's frame."""
        return self.losses(prediction, true_surface(batch, self.losses.samples, "camera", generator))

    def shape(self, prediction: Deformation) -> Meshes:
        """The last block's meshes, in the camera's frame."""
        return prediction.after[-1].detach()

    def validation_metrics(self, prediction: Deformation, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """F1 at 2 % of the longest edge."""
        return f1_of_batch(self.shape(prediction), batch, "camera")
