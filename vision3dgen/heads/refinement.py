"""Meshes moved to where the picture shows them, in stages, and the losses that pull them.

Source: Gkioxari et al. 2019, Mesh R-CNN (arXiv:1906.02739), section 3.2 and its ShapeNet experiments. Each stage
samples the feature maps where a vertex is seen, passes them along the edges by graph convolutions, and moves the vertex
by tanh of a last layer. Parameter names are the published ones.
Differs: the layer after the sampling (`bottleneck`) runs on the maps before it. Both are linear, so values are the
same, and a vertex reads 128 channels instead of 3,840.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from vision3dgen.checks import check_finite
from vision3dgen.heads.frustum import CLIP
from vision3dgen.heads.graph import GRAPH_CONVOLUTIONS, Convolution
from vision3dgen.losses import chamfer_distance, mesh_edge_loss, mesh_laplacian_smoothing
from vision3dgen.ops import SubdivideMeshes, knn_points, sample_points_from_meshes, vert_align
from vision3dgen.structures import Camera, Meshes

OPENGL = (1.0, -1.0, -1.0)  # the published networks speak of a camera with y up that looks along -z: two signs differ


def project(points: Float[Tensor, "B V 3"], intrinsics: Float[Tensor, "B 3 3"]) -> Float[Tensor, "B V 3"]:
    """Picture coordinates (x right, y down, in [-1, 1]) and Blender's device depth of points of the camera frame.

    Depths are kept from zero by 0.1 either side, as published: points behind the camera are seen mirrored, not at
    infinity.
    """
    depth = points[..., 2:]
    divisor = torch.where(depth < 0, -1, 1) * depth.abs().clamp(min=0.1)
    homogeneous = points @ intrinsics.mT
    return torch.cat([homogeneous[..., :2] / divisor, (CLIP[0] * depth - CLIP[1]) / divisor], dim=-1)


class RefinementStage(nn.Module):
    """One displacement of every vertex, and the features (V, hidden) that led to it.

    channels: of the maps. previous: of the vertices' features from the stage before, 0 for the first.
    """

    def __init__(
        self, channels: Sequence[int], previous: int = 0, *, hidden: int = 128, convolutions: int = 3,
        convolution: Convolution = "csr",
    ):  # fmt: skip
        super().__init__()
        self.bottleneck = nn.Linear(sum(channels), hidden)
        self.vert_offset = nn.Linear(hidden + 3, 3)
        build = GRAPH_CONVOLUTIONS[convolution]
        inputs = [hidden + 3 + previous] + [hidden + 3] * (convolutions - 1)
        self.gconvs = nn.ModuleList(build(width, hidden) for width in inputs)
        nn.init.normal_(self.bottleneck.weight, std=0.01)
        nn.init.zeros_(self.bottleneck.bias)
        nn.init.zeros_(self.vert_offset.weight)
        nn.init.zeros_(self.vert_offset.bias)

    def forward(
        self,
        maps: Sequence[Tensor],
        meshes: Any,
        intrinsics: Float[Tensor, "B 3 3"] | None,
        features: Float[Tensor, "V C"] | None,
    ) -> tuple[Any, Float[Tensor, "V H"]]:
        verts = meshes.verts_padded()
        seen = verts if intrinsics is None else project(verts, intrinsics)  # (B, V, 3)
        rows = meshes.verts_padded_to_packed_idx()
        up = seen.new_tensor([1.0, -1.0, 1.0])
        positions = (seen * up).flatten(0, 1)[rows]  # (V, 3), packed from here on
        x = torch.cat([self._sample(maps, seen).flatten(0, 1)[rows].relu(), positions], dim=1)
        if features is not None:
            x = torch.cat([x, features], dim=1)
        edges = meshes.edges_packed()
        for conv in self.gconvs:
            hidden = conv(x, edges).relu()
            x = torch.cat([hidden, positions], dim=1)
        offsets = self.vert_offset(x).tanh() * seen.new_tensor(OPENGL)
        return meshes.offset_verts(offsets), hidden

    def _sample(self, maps: Sequence[Tensor], seen: Float[Tensor, "B V 3"]) -> Float[Tensor, "B V H"]:
        """The bottleneck of all maps at the places seen."""
        weights = self.bottleneck.weight.split([feature.shape[1] for feature in maps], dim=1)
        reduced = [F.conv2d(feature, weight[..., None, None]) for feature, weight in zip(maps, weights)]
        if seen.shape[1]:
            sampled = vert_align(reduced, seen).unflatten(2, (len(maps), -1)).sum(2)  # (B, V, H)
        else:  # torch samples no empty grid
            sampled = seen.new_zeros(*seen.shape[:2], len(self.bottleneck.bias)) + 0 * sum(r.sum() for r in reduced)
        return sampled + self.bottleneck.bias


class MeshRefinement(nn.Module):
    """Several `RefinementStage`s one after another, without shared weights; the mesh after each.

    subdivide: every face is split in four between stages. Without intrinsics the vertices are where the maps show them
    already: x right and y down in [-1, 1], and any depth.
    """

    def __init__(
        self, channels: Sequence[int], *, stages: int = 3, hidden: int = 128, convolution: Convolution = "csr",
        subdivide: bool = False,
    ):  # fmt: skip
        super().__init__()
        if stages < 1:
            raise ValueError(f"stages must be at least 1, got {stages}")
        self.subdivide = SubdivideMeshes() if subdivide else None
        self.stages = nn.ModuleList(
            RefinementStage(channels, hidden if index else 0, hidden=hidden, convolution=convolution)
            for index in range(stages)
        )

    def forward(
        self, maps: Sequence[Tensor], meshes: Any, intrinsics: Float[Tensor, "B 3 3"] | None = None
    ) -> list[Any]:
        """Raises ValueError naming the stage whose vertices are not finite."""
        refined: list[Any] = []
        features = None
        for number, stage in enumerate(self.stages, start=1):
            if self.subdivide is not None and number > 1:
                meshes, features = self.subdivide(meshes, features)
            meshes, features = stage(maps, meshes, intrinsics, features)
            check_finite(**{f"vertices after mesh stage {number}": meshes.verts_packed()})
            refined.append(meshes)
        return refined


# -------------------------------------------------------------------------------------------------------- the truth


class TrueSurface(NamedTuple):
    """Points on the true surfaces of a batch, ragged."""

    points: Float[Tensor, "B S 3"]
    lengths: Tensor  # (B,)
    normals: Float[Tensor, "B S 3"] | None

    @property
    def present(self) -> Bool[Tensor, " B"]:
        return self.lengths > 0


@torch.no_grad()
def true_surface(
    batch: Mapping[str, Any],
    samples: int,
    frame: Literal["object", "camera"],
    generator: torch.Generator | None = None,
) -> TrueSurface:
    """`samples` points of each true surface in the object frame, or moved to the camera's.

    Drawn from `batch["surface"]`, without replacement (all where there are no more), or if there is none from
    `batch["mesh"]`, uniform by area. Raises ValueError when the batch has neither or, for the camera frame, no camera.
    """
    if not {"surface", "mesh"} & set(batch) or (frame == "camera" and "camera" not in batch):
        camera = " and camera" if frame == "camera" else ""
        raise ValueError(f"the loss on meshes needs surface or mesh{camera}; the batch has {sorted(batch)}")
    normals: Tensor | None
    if "surface" in batch:
        clouds = batch["surface"].subsample(samples, generator=generator)
        points, normals = clouds.points_padded(), clouds.normals_padded()
        lengths = clouds.num_points_per_cloud()
    else:
        points, normals = sample_points_from_meshes(batch["mesh"], samples, True, generator=generator)
        lengths = samples * batch["mesh"].valid.long()
    if frame == "camera":
        cameras: Camera = batch["camera"]
        world = torch.stack([own.denormalize(each) for own, each in zip(batch["frame"], points)])
        points = cameras.world_to_camera(world)
        normals = None if normals is None else normals @ cameras.rotation.mT
    return TrueSurface(points, lengths, normals)


@dataclass(frozen=True)
class StageLosses:
    """Weights of the losses on the mesh after each stage; their sum is averaged over the stages.

    chamfer: mean squared distance between samples of prediction and truth, both directions added. normals: 1 - |cos| of
    the nearest samples' normals. edges: mean squared edge length.
    laplacian: distance of vertices from the mean of their neighbors. samples: drawn from each surface.
    The defaults are those of Mesh R-CNN's published ShapeNet models ("light and pretty").
    """

    chamfer: float = 1.0
    normals: float = 0.0
    edges: float = 0.2
    laplacian: float = 0.0
    samples: int = 5000

    def __call__(
        self, stages: Sequence[Any], truth: TrueSurface, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The mean over stages of each term that has a weight, and "loss", their weighted sum; an empty mesh adds 0."""
        totals: dict[str, Tensor] = {}
        for meshes in stages:
            for name, value in self._stage(meshes, truth, generator).items():
                totals[name] = totals.get(name, 0) + value / len(stages)
        weighted = [getattr(self, name) * value for name, value in totals.items()]
        return {"loss": torch.stack(weighted).sum(), **totals}

    def _stage(self, meshes: Any, truth: TrueSurface, generator: torch.Generator | None) -> dict[str, Tensor]:
        kept = 0 * meshes.verts_packed().sum()  # keeps the graph where there is nothing to lose
        terms: dict[str, Tensor] = {}
        if self.edges:
            terms["edges"] = kept + mesh_edge_loss(meshes)
        if self.laplacian:
            terms["laplacian"] = kept + mesh_laplacian_smoothing(meshes)
        names = [name for name in ("chamfer", "normals") if getattr(self, name)]
        present = meshes.num_faces_per_mesh() > 0
        if not bool(present.any()):
            return {**dict.fromkeys(names, kept), **terms}
        if not names:
            return terms
        normals = None
        if self.normals:
            if truth.normals is None:
                raise ValueError("the loss on normals needs a surface with normals, the batch's has none")
            points, normals = sample_points_from_meshes(meshes, self.samples, True, generator=generator)
        else:
            points = sample_points_from_meshes(meshes, self.samples, generator=generator)
        distances = chamfer_distance(
            points,
            truth.points,
            y_lengths=truth.lengths,
            x_normals=normals,
            y_normals=truth.normals if self.normals else None,
            weights=(present & truth.present).to(points.dtype),
        )
        values = {"chamfer": distances.loss, "normals": distances.loss_normals}
        return {**{name: kept + values[name] for name in names}, **terms}


LIGHT_AND_PRETTY = StageLosses()


@torch.no_grad()
def f1_of_items(meshes: Meshes, truth: TrueSurface, thresholds: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """Harmonic mean of precision and recall of each mesh at a distance; 0 where the mesh or the truth is empty."""
    present = meshes.valid & truth.present
    if not bool(present.any()):
        return torch.zeros_like(thresholds)
    generator = torch.Generator().manual_seed(0)  # the same samples whenever it is asked
    points = sample_points_from_meshes(meshes, truth.points.shape[1], generator=generator)
    to_truth = knn_points(points, truth.points, lengths2=truth.lengths).dists[..., 0]
    to_mesh = knn_points(truth.points, points, lengths1=truth.lengths).dists[..., 0]
    squared = thresholds.square()[:, None]
    precision = (to_truth < squared).float().mean(1)
    counted = torch.arange(to_mesh.shape[1], device=to_mesh.device) < truth.lengths[:, None]
    recall = ((to_mesh < squared) & counted).sum(1) / truth.lengths.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-8)
    return f1.where(present, 0)


def f1_of_batch(
    meshes: Meshes, batch: Mapping[str, Any], frame: Literal["object", "camera"], share: float = 0.02
) -> dict[str, Float[Tensor, " B"]]:
    """`f1_of_items` under the name "f1", at a share of the longest edge of each object; for a run to watch."""
    truth = true_surface(batch, 2048, frame, torch.Generator().manual_seed(0))
    scales = [share * (own.scale if frame == "camera" else 1.0) for own in batch["frame"]]
    return {"f1": f1_of_items(meshes, truth, truth.points.new_tensor(scales))}
