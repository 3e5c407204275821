"""The shape of the object in a region, in the frame of the camera: its depth, its voxels, its mesh.

Source: Gkioxari et al. 2019, Mesh R-CNN (arXiv:1906.02739), section 3, with the sizes and weights of its Pix3D
experiments. A region is a view volume: the rays through the box, between the nearest and the farthest depth of the
object. Voxels and mesh live in its coordinates, [-1, 1] along each axis, until the depths are known.

A network that sees a box of h pixels by a camera of focal length f cannot tell a small object from a large one far
away. What it says of depths is therefore in units of the height that the box has at the object's center, m = h c / f:
the extent e along the depth as log(e / m), and m itself as log(m), from which c = m f / h.
Differs: published is the extent alone, with the true depth c of the center given in evaluation too. A prediction moved
along its rays by c_true / c, a multiplication of its vertices, is what that evaluation scores. Depth is inverse along
the volume's axis, so that lines stay straight. One answer serves all classes.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.heads.box import TwoLayers
from vision3dgen.heads.frustum import VoxelTubes, into_volume, out_of_volume
from vision3dgen.heads.graph import Convolution
from vision3dgen.heads.mesh import cubes_of
from vision3dgen.heads.pooling import Pooling
from vision3dgen.heads.refinement import MeshRefinement, StageLosses, TrueSurface
from vision3dgen.heads.roi import Canvas, RoIHead, Samples, Truth, of_objects
from vision3dgen.ops import sample_points_from_meshes, voxelize
from vision3dgen.structures import Detections, GridSpec, Meshes, join_meshes_as_batch

FLATTEST = 1e-3  # extent of an object along the depth, as a share of its depth
NEAREST = 0.05  # a predicted object begins no nearer than this share of its center's depth
PIX3D = StageLosses(chamfer=1.0, normals=0.1, edges=1.0, samples=5000)
DEPTH_POOLING = Pooling(7)


class Volumes(NamedTuple):
    """The view volumes of regions."""

    intrinsics: Float[Tensor, "R 3 3"]  # from the camera's frame to [-1, 1] across each box
    near: Float[Tensor, "R 1 1"]
    far: Float[Tensor, "R 1 1"]


class RoIMeshHead(RoIHead):
    """Depths, voxels and a refined mesh of each region.

    channels, strides: the backbone's, of one width. resolution: of the voxels. threshold, align: of their surface, see
    `VoxMeshHead`; where no voxel is filled the middle is. width: of the two layers before the depths, and of the
    voxels' convolutions a quarter of it. voxels: weight of the voxels' mean binary cross-entropy. most: regions of a
    photograph that the loss is taken on.
    """

    needs = ("mesh",)

    def __init__(
        self, channels: list[int], strides: list[int], *, resolution: int = 24, threshold: float = 0.2,
        align: Literal["topleft", "center"] = "center", stages: int = 3, hidden: int = 128, width: int = 1024,
        voxels: float = 3.0, losses: StageLosses = PIX3D, most: int = 128, convolution: Convolution = "csr",
    ):  # fmt: skip
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be a probability between 0 and 1, got {threshold}")
        if resolution < 4 or resolution % 2:
            raise ValueError(f"resolution must be an even number of voxels, at least 4, got {resolution}")
        self.strides = list(strides)
        self.threshold, self.align, self.voxels, self.losses, self.most = threshold, align, voxels, losses, most
        self.grid = GridSpec.cube(resolution, -1.0, 1.0, align="corner")
        self.voxel_pooling, self.mesh_pooling = Pooling(resolution // 2), Pooling(14)
        inputs = channels[DEPTH_POOLING.levels(strides)[0]]
        self.z_head = nn.Sequential(TwoLayers(inputs * DEPTH_POOLING.resolution**2, width), nn.Linear(width, 2))
        last = self.z_head[1]
        assert isinstance(last, nn.Linear)
        nn.init.normal_(last.weight, std=0.001)
        nn.init.zeros_(last.bias)
        self.voxel_head = VoxelTubes(inputs, resolution, max(width // 4, 1))
        self.mesh_head = MeshRefinement([inputs], stages=stages, hidden=hidden, convolution=convolution)

    def forward(
        self, maps: Sequence[Tensor], boxes: Sequence[Float[Tensor, "_ 4"]]
    ) -> tuple[Float[Tensor, "N 2"], Float[Tensor, "N D H W"], list[Any]]:
        """Log extent and log height, the voxels' logits, and the mesh after each stage, in the volumes' coordinates."""
        depths = self.z_head(DEPTH_POOLING(maps, boxes, self.strides)).float()
        logits = self.voxel_head(self.voxel_pooling(maps, boxes, self.strides)).float()
        cubes = cubes_of(logits, self.threshold, True, self.align)
        return depths, logits, self.mesh_head([self.mesh_pooling(maps, boxes, self.strides)], cubes)

    def loss(
        self, maps: Sequence[Tensor], samples: Sequence[Samples], truths: Sequence[Truth], canvas: Canvas,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:  # fmt: skip
        """ "extent", "depth" (smooth L1 of the logarithms), "voxels" and "mesh"."""
        own = [Samples(*(part[: self.most] for part in sample.positive)) for sample in samples]
        boxes = [sample.boxes for sample in own]
        if not sum(map(len, boxes)):
            kept = sum((0 * parameter.sum() for parameter in self.parameters()), maps[0].sum() * 0)
            return dict.fromkeys(("extent", "depth", "voxels", "mesh"), kept)
        meshes = join_meshes_as_batch(of_objects(truths, own, "meshes"))
        volumes, wanted = self._true_volumes(meshes, boxes, canvas)
        depths, logits, stages = self(maps, boxes)
        verts = into_volume(meshes.verts_padded(), *volumes)
        true = meshes.update_padded(verts)
        filled = voxelize(true, self.grid, inside="nonzero").to(logits.dtype)
        points, normals = sample_points_from_meshes(true, self.losses.samples, True, generator=generator)
        surface = TrueSurface(points, self.losses.samples * true.valid.long(), normals)
        extent, depth = F.smooth_l1_loss(depths, wanted, reduction="none").mean(0)
        return {
            "extent": extent,
            "depth": depth,
            "voxels": self.voxels * F.binary_cross_entropy_with_logits(logits, filled),
            "mesh": self.losses(stages, surface, generator)["loss"],
        }

    def find(self, maps: Sequence[Tensor], found: Sequence[Detections], canvas: Canvas) -> list[Detections]:
        """Meshes in the camera's frame, one for each detection."""
        boxes = [own.boxes for own in found]
        counts = [len(own) for own in boxes]
        if not sum(counts):
            none = Meshes(maps[0].new_zeros(0, 0, 3), torch.zeros(0, 0, 3, dtype=torch.int64, device=maps[0].device))
            return [own._replace(meshes=none) for own in found]
        depths, _, stages = self(maps, boxes)
        intrinsics, heights, focal = _regions(boxes, canvas)
        extent, height = depths.exp().unbind(1)
        center = height * focal / heights
        half = 0.5 * (extent * height).maximum(FLATTEST * center)
        near, far = (center - half).maximum(NEAREST * center), center + half
        verts = out_of_volume(stages[-1].verts_padded(), intrinsics, near.view(-1, 1, 1), far.view(-1, 1, 1))
        meshes = stages[-1].update_padded(verts)
        return [own._replace(meshes=some) for own, some in zip(found, meshes.split(counts))]

    def _true_volumes(
        self, meshes: Meshes, boxes: Sequence[Float[Tensor, "_ 4"]], canvas: Canvas
    ) -> tuple[Volumes, Float[Tensor, "N 2"]]:
        """The volumes around the true meshes, and what is to be said of their depths."""
        intrinsics, heights, focal = _regions(boxes, canvas)
        low, high = meshes.get_bounding_boxes()[:, 2].to(intrinsics).unbind(1)
        center = (low + high) / 2
        half = ((high - low) / 2).maximum(FLATTEST * center)
        height = heights * center / focal
        volumes = Volumes(intrinsics, (center - half).view(-1, 1, 1), (center + half).view(-1, 1, 1))
        return volumes, torch.stack([2 * half / height, height], dim=1).log()


def _regions(boxes: Sequence[Float[Tensor, "_ 4"]], canvas: Canvas) -> tuple[Tensor, Tensor, Tensor]:
    """Of each region: the matrix to [-1, 1] across its box, the box's height, and the focal length, both in pixels."""
    if canvas.intrinsics is None:
        raise ValueError("meshes in the camera's frame need the batch's camera")
    cameras = torch.cat([own.expand(len(box), 3, 3) for own, box in zip(canvas.intrinsics.float(), boxes)])
    x0, y0, x1, y1 = torch.cat(list(boxes)).unbind(1)
    zero, one = torch.zeros_like(x0), torch.ones_like(x0)
    wide, tall = x1 - x0, y1 - y0
    across = torch.stack([2 / wide, zero, -(x0 + x1) / wide, zero, 2 / tall, -(y0 + y1) / tall, zero, zero, one], dim=1)
    return across.view(-1, 3, 3) @ cameras, tall, cameras[:, 1, 1]
