"""Errors of predicted depth, alignment to the truth, and the published protocols as data.

With ŷ the prediction, y the truth, n valid pixels of a picture, d = ln ŷ - ln y:

    abs_rel = mean |ŷ - y| / y                      rmse_log = sqrt mean d²
    sq_rel  = mean (ŷ - y)² / y                     log10 = mean |log10 ŷ - log10 y|
    rmse    = sqrt mean (ŷ - y)²                    scale_invariant = mean d² - (mean d)²
    delta_k = share with max(ŷ / y, y / ŷ) < 1.25^k   silog = 100 sqrt(scale_invariant)

Every number is of one picture; a set's number is the mean over its pictures, as in the published evaluations.
Sources: Eigen et al. 2014 (arXiv:1406.2283); the KITTI depth benchmark (SILog); docs/depth.md.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from vision3dgen.checks import check_choice
from vision3dgen.metrics.maps import MapEvaluator, Measured, Unscorable
from vision3dgen.ops.depth import pixels_with_depth


class DepthErrors(NamedTuple):
    """Per picture (B,); NaN for a picture without a valid pixel."""

    abs_rel: Tensor
    sq_rel: Tensor
    rmse: Tensor
    rmse_log: Tensor
    log10: Tensor
    silog: Tensor
    scale_invariant: Tensor
    delta1: Tensor
    delta2: Tensor
    delta3: Tensor


def depth_errors(
    prediction: Float[Tensor, "B 1 H W"], target: Float[Tensor, "B 1 H W"], mask: Tensor | None = None
) -> DepthErrors:
    """The errors of each picture over the pixels whose true depth is positive and finite and which are in `mask`.

    In float64. A prediction of 0 or less has no logarithm and no ratio: rmse_log and its like are infinite or NaN then.
    """
    valid = pixels_with_depth(target, mask).flatten(1)
    count = valid.sum(1)
    p = prediction.double().flatten(1).where(valid, 1)
    t = target.double().flatten(1).where(valid, 1)

    def mean(values: Float[Tensor, "B N"]) -> Float[Tensor, " B"]:
        return (values * valid).sum(1) / count  # 0 / 0 is NaN

    error = (p - t).abs()
    d = p.clamp(min=0).log() - t.log()
    ratio = torch.maximum(p / t, t / p).where(p > 0, torch.inf)
    variance = mean((d - mean(d)[:, None]).square())
    return DepthErrors(
        abs_rel=mean(error / t),
        sq_rel=mean(error.square() / t),
        rmse=mean(error.square()).sqrt(),
        rmse_log=mean(d.square()).sqrt(),
        log10=mean(d.abs()) / torch.tensor(10.0, dtype=torch.float64).log().to(d.device),
        silog=100 * variance.sqrt(),
        scale_invariant=variance,
        delta1=mean((ratio < 1.25).double()),
        delta2=mean((ratio < 1.25**2).double()),
        delta3=mean((ratio < 1.25**3).double()),
    )


Alignment = Literal["none", "median", "scale", "scale_shift"]
Space = Literal["depth", "inverse"]
ALIGNMENTS: tuple[Alignment, ...] = ("none", "median", "scale", "scale_shift")
SPACES: tuple[Space, ...] = ("depth", "inverse")


def align_depth(
    prediction: Float[Tensor, "B 1 H W"],
    target: Float[Tensor, "B 1 H W"],
    mask: Tensor | None = None,
    *,
    alignment: Alignment,
    space: Space = "depth",
) -> Float[Tensor, "B 1 H W"]:
    """Each predicted picture multiplied, and shifted, so that it fits the truth best over the valid pixels.

    "median": by the ratio of the medians (of an even number of pixels, the mean of the middle two). "scale": by the
    factor of least squared error. "scale_shift": the same with a constant added. In space "inverse" 1 / depth is fitted
    instead, and depth is infinite where the fitted inverse is not above 0. A picture without valid pixels is returned
    as it is. What fits a constant prediction with a shift is the mean of the truth.
    """
    check_choice("alignment", alignment, ALIGNMENTS)
    check_choice("space", space, SPACES)
    if alignment == "none":
        return prediction
    valid = pixels_with_depth(target, mask)
    aligned = [_aligned(*each, alignment, space) for each in zip(prediction[:, 0], target[:, 0], valid)]
    return torch.stack(aligned)[:, None] if aligned else prediction


def _aligned(
    prediction: Float[Tensor, "H W"], target: Float[Tensor, "H W"], valid: Bool[Tensor, "H W"], alignment: str,
    space: str,
) -> Float[Tensor, "H W"]:  # fmt: skip
    if not bool(valid.any()):
        return prediction
    all_of_it, t = prediction.double(), target.double()[valid]
    if space == "inverse":
        all_of_it, t = 1 / all_of_it, 1 / t
    p = all_of_it[valid]
    shift = torch.zeros_like(t[0])
    if alignment == "median":
        scale = _median(t) / _median(p)
    elif alignment == "scale":
        scale = (p * t).sum() / p.square().sum()
    else:
        offset = p - p.mean()
        spread = offset.square().sum()
        flat = spread <= len(p) * (1e-12 * p.abs().max()) ** 2  # nothing but rounding
        scale = torch.where(flat, 0.0, (offset * (t - t.mean())).sum() / spread.where(~flat, 1.0))
        shift = t.mean() - scale * p.mean()
    fitted = scale * all_of_it + shift
    if space == "inverse":
        fitted = (1 / fitted).where(fitted > 0, torch.inf)
    return fitted.to(prediction.dtype)


def _median(values: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    ordered = values.sort().values
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


# ---------------------------------------------------------------------------------------------------- protocols


@dataclass(frozen=True)
class PixelCrop:
    """Rows and columns from the first to before the second, of pictures of one size."""

    rows: tuple[int, int]
    columns: tuple[int, int]
    image_size: tuple[int, int]

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        if (height, width) != tuple(self.image_size):
            raise Unscorable(
                f"the crop is for pictures of {self.image_size[0]} x {self.image_size[1]}, got {height} x {width}"
            )
        return slice(*self.rows), slice(*self.columns)


@dataclass(frozen=True)
class ShareCrop:
    """Rows and columns as shares of the picture's height and width, rounded down."""

    rows: tuple[float, float]
    columns: tuple[float, float]

    def region(self, height: int, width: int) -> tuple[slice, slice]:
        return slice(*(int(s * height) for s in self.rows)), slice(*(int(s * width) for s in self.columns))


@dataclass(frozen=True)
class DepthProtocol:
    """Everything that moves a depth score.

    A pixel counts where min_depth < truth < max_depth (None: no bound) and inside `crop`. Predictions are aligned to
    the truth (`align_depth`), then clamped to [min_depth, max_depth], and the errors of each picture averaged.
    """

    name: str
    min_depth: float
    max_depth: float | None
    crop: PixelCrop | ShareCrop | None
    alignment: Alignment
    space: Space
    citation: str

    def __post_init__(self) -> None:
        check_choice("alignment", self.alignment, ALIGNMENTS)
        check_choice("space", self.space, SPACES)
        if not 0 < self.min_depth < (torch.inf if self.max_depth is None else self.max_depth):
            raise ValueError(
                f"min_depth must be above 0 and below max_depth, got {self.min_depth} and {self.max_depth}: "
                "predictions are clamped to it, and 0 has no logarithm"
            )

    def valid(self, target: Float[Tensor, "1 H W"]) -> Bool[Tensor, "1 H W"]:
        """The pixels of a true picture that count; `Unscorable` for a picture that the crop is not made for."""
        valid = (target > self.min_depth) & target.isfinite()
        if self.max_depth is not None:
            valid &= target < self.max_depth
        if self.crop is not None:
            rows, columns = self.crop.region(*target.shape[-2:])
            inside = torch.zeros_like(valid)
            inside[:, rows, columns] = True
            valid &= inside
        return valid

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON types."""
        return dataclasses.asdict(self)


_GARG = ShareCrop((0.40810811, 0.99189189), (0.03594771, 0.96405229))
_DEFAULT = DepthProtocol(
    name="default", min_depth=1e-3, max_depth=None, crop=None, alignment="none", space="depth",
    citation="vision3dgen: every pixel that shows the object",
)  # fmt: skip
_KITTI = DepthProtocol(
    name="kitti_eigen", min_depth=1e-3, max_depth=80.0,
    crop=ShareCrop((0.3324324, 0.91351351), (0.0359477, 0.96405229)),
    alignment="none", space="depth", citation="Eigen et al. 2014, arXiv:1406.2283, on KITTI",
)  # fmt: skip

DEPTH_PROTOCOLS: dict[str, DepthProtocol] = {
    protocol.name: protocol
    for protocol in (
        _DEFAULT,
        dataclasses.replace(
            _DEFAULT, name="default_median", alignment="median", citation="vision3dgen: default up to scale"
        ),
        DepthProtocol(
            name="nyu_eigen",
            min_depth=1e-3,
            max_depth=10.0,
            crop=PixelCrop((45, 471), (41, 601), (480, 640)),
            alignment="none",
            space="depth",
            citation="Eigen et al. 2014, arXiv:1406.2283, on NYU Depth v2",
        ),
        _KITTI,
        dataclasses.replace(
            _KITTI, name="kitti_garg", crop=_GARG, citation="Garg et al. 2016, arXiv:1603.04992, on KITTI"
        ),
        dataclasses.replace(
            _KITTI,
            name="kitti_garg_median",
            crop=_GARG,
            alignment="median",
            citation="Zhou et al. 2017, arXiv:1704.07813; Godard et al. 2019, arXiv:1806.01260, on KITTI",
        ),
    )
}


# --------------------------------------------------------------------------------------------------- evaluation


@dataclass(frozen=True, kw_only=True)
class DepthEvaluator(MapEvaluator):
    """Predicted "depth" against batch["depth"] (B, 1, H, W), under the protocols named.

    A prediction that also has a "mask" is scored for it too: mask_iou, over the whole picture, of the pixels with a
    probability of at least a half and those with a true depth.
    """

    target: ClassVar[str] = "depth"
    shares: ClassVar[tuple[str, ...]] = ("delta1", "delta2", "delta3", "mask_iou")

    protocols: list[str] = field(default_factory=lambda: ["default"])

    def __post_init__(self) -> None:
        for name in self.protocols:
            check_choice("protocol", name, DEPTH_PROTOCOLS)

    @property
    def names(self) -> Sequence[str]:
        return self.protocols

    @property
    def choices(self) -> Sequence[str]:
        return sorted(DEPTH_PROTOCOLS)

    def describe(self, name: str) -> dict[str, Any]:
        return DEPTH_PROTOCOLS[name].to_dict()

    def valid(self, name: str, target: Tensor) -> Bool[Tensor, "H W"]:
        return DEPTH_PROTOCOLS[name].valid(target)[0]

    def measure(self, name: str, maps: Mapping[str, Tensor], target: Tensor, valid: Bool[Tensor, "H W"]) -> Measured:
        return measure_depth(DEPTH_PROTOCOLS[name], maps, target, valid)


def measure_depth(
    protocol: DepthProtocol, maps: Mapping[str, Tensor], target: Float[Tensor, "1 H W"], valid: Bool[Tensor, "H W"]
) -> Measured:
    """The errors of one picture, and how many of its pixels were clamped; `Unscorable` if it cannot be aligned."""
    depth = maps["depth"]
    if protocol.alignment != "none" and protocol.space == "inverse" and bool((depth[0][valid] <= 0).any()):
        count = int((depth[0][valid] <= 0).sum())
        raise Unscorable(
            f"depth is 0 or less at {count} of {int(valid.sum())} valid pixels: there is no inverse to align"
        )
    aligned = align_depth(
        depth[None], target[None], valid[None, None], alignment=protocol.alignment, space=protocol.space
    )
    if bool(aligned[0, 0][valid].isnan().any()):
        raise Unscorable(f"depth cannot be aligned by {protocol.alignment!r}: it has no scale")
    clamped = aligned.clamp(min=protocol.min_depth, max=protocol.max_depth)
    if bool(clamped[0, 0][valid].isinf().any()):
        raise Unscorable("depth is infinite once aligned, and the protocol has no largest depth")
    errors = depth_errors(clamped, target[None], valid[None, None])
    metrics = {key: float(value) for key, value in errors._asdict().items()}
    if "mask" in maps:
        if maps["mask"].shape != target.shape:
            raise Unscorable(f"mask must be {tuple(target.shape)} like the truth, got {tuple(maps['mask'].shape)}")
        found, true = maps["mask"][0] >= 0.5, pixels_with_depth(target[None])[0]
        metrics["mask_iou"] = float((found & true).sum() / (found | true).sum())
    return Measured(metrics, int((clamped != aligned)[0, 0][valid].sum()))
