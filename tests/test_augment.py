"""Augmentation: one law for each thing that moves, against positions worked out from the camera or by slicing."""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vision3dgen.datasets import AUGMENTATIONS, Augment, Augmented, collate
from vision3dgen.datasets.augment import (
    Blur,
    ColorJitter,
    Crop,
    Distort,
    Flip,
    Geometric,
    Greyscale,
    Moved,
    Resize,
    ResizedCrop,
    Rotate,
    Scale,
    Shear,
    Stretch,
    Translate,
)
from vision3dgen.engine import Data, ShuffleSampler
from vision3dgen.engine.loading import make_loader
from vision3dgen.io import read_image
from vision3dgen.structures import Camera

H, W = 37, 53
AFFINE: dict[str, Geometric] = {
    "crop": Crop((29, 31)),
    "center": Crop((29, 31), center=True),
    "resize": Resize((59, 41)),
    "resized_crop": ResizedCrop((31, 43)),
    "scale": Scale((0.5, 2.0)),
    "translate": Translate(0.3),
    "rotate": Rotate(40.0),
    "stretch": Stretch((0.5, 2.0)),
    "shear": Shear(25.0),
    "flip": Flip(1.0),
}
AXIS_ALIGNED = [name for name in AFFINE if name not in ("rotate", "shear")]
STILL = [
    Scale((1, 1)),
    Translate(0.0),
    Rotate(0.0),
    Stretch((1, 1)),
    Shear(0.0),
    Flip(0.0),
    Resize((H, W)),
    Crop((H, W)),
]
NO_PAINT = [ColorJitter(0, 0, 0, 0), Blur(probability=0), Greyscale(probability=0), Distort((0, 0))]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def camera() -> Camera:
    found = Camera.look_at((0.4, 0.7, -2.0), field_of_view=50, image_size=(H, W))
    skewed = found.intrinsics.clone()
    skewed[0, 0] *= 1.3  # pixels that are not square
    skewed[0, 1] = 2.0
    return Camera(found.rotation, found.translation, skewed, (H, W))


def sample(seed: int = 0) -> dict:
    """A picture of smooth random colours with everything in it that can move."""
    generator = seeded(seed + 100)
    smooth = torch.rand(1, 3, 5, 7, generator=generator)
    image = torch.nn.functional.interpolate(smooth, (H, W), mode="bicubic").clamp(0, 1)[0]
    mask = torch.zeros(1, H, W)
    mask[:, 11:24, 17:36] = 1
    depth = torch.where(mask > 0, 1 + torch.rand(1, H, W, generator=generator), 0.0)
    depth[:, 0, :3] = math.inf
    normals = torch.nn.functional.normalize(torch.randn(3, H, W, generator=generator), dim=0) * mask
    return {
        "image": image,
        "mask": mask,
        "depth": depth,
        "normals": normals,
        "masks": torch.stack([mask[0], torch.zeros(H, W)]).bool(),
        "boxes": torch.tensor([[17.0, 11.0, 36.0, 24.0], [3.0, 2.0, 9.0, 30.0], [5.0, 5.0, 5.0, 9.0]]),
        "keypoints": torch.tensor([[17.0, 11.0], [25.25, 18.5], [52.9, 36.9], [-1.0, 4.0]]),
        "camera": camera(),
        "labels": torch.tensor([1, 2, 3]),
        "id": "a/b/c",
    }


@dataclass(frozen=True)
class Fixed(Geometric):
    """A map that is given."""

    matrix: list[list[float]]

    def move(self, count: int, size: tuple[int, int], generator: torch.Generator | None) -> Moved:
        return Moved(torch.tensor(self.matrix, dtype=torch.float64).expand(count, 3, 3), size)


def matrix_of(step: Geometric, seed: int) -> Tensor:
    """The map a step draws when it is the first to draw."""
    return step.move(1, (H, W), seeded(seed)).matrix[0]


def moved(points: Tensor, matrix: Tensor) -> Tensor:
    return (points.double() @ matrix[:2, :2].T + matrix[:2, 2]).to(points)


# Nothing and twice


@pytest.mark.parametrize("steps", [[], STILL, NO_PAINT, [*STILL, *NO_PAINT, *STILL]])
def test_no_change_changes_no_bit(steps: list):
    item = sample()
    if any(isinstance(step, Distort) for step in steps):
        del item["camera"]
    item["boxes"], item["keypoints"] = item["boxes"][:2], item["keypoints"][:3]
    found = Augment(steps)(item, seeded())
    assert set(found) == {*item, "boxes_visible", "keypoints_visible"}
    for key, value in item.items():
        if isinstance(value, Tensor):
            assert torch.equal(found[key], value), key
    if "camera" in item:
        assert torch.equal(found["camera"].intrinsics, item["camera"].intrinsics)
    assert found["boxes_visible"].all()
    assert found["keypoints_visible"].all()
    assert found["id"] == "a/b/c"


def test_a_flip_is_the_reversed_picture_and_twice_is_none():
    item = sample()
    once = Augment([Flip(1.0)])(item)
    torch.testing.assert_close(once["image"], item["image"].flip(-1), rtol=0, atol=2e-5)
    for key in ("mask", "depth", "masks"):
        assert torch.equal(once[key], item[key].flip(-1)), key
    mirror = torch.tensor([-1.0, 1.0, 1.0]).view(3, 1, 1)
    for twice in (Augment([Flip(1.0)])(once), Augment([Flip(1.0), Flip(1.0)])(item)):
        torch.testing.assert_close(twice["image"], item["image"], rtol=0, atol=4e-5)
        for key in ("mask", "depth", "masks", "keypoints"):
            torch.testing.assert_close(twice[key], item[key], rtol=0, atol=1e-5)
        torch.testing.assert_close(twice["boxes"][:2], item["boxes"][:2], rtol=0, atol=1e-5)
        for field in ("rotation", "translation", "intrinsics"):
            torch.testing.assert_close(getattr(twice["camera"], field), getattr(item["camera"], field))
    plain = {key: value for key, value in item.items() if key != "camera"}
    torch.testing.assert_close(Augment([Flip(1.0)])(plain)["normals"], item["normals"].flip(-1) * mirror)


def test_a_quarter_turn_and_a_crop_are_slices():
    item = {"image": sample()["image"][:, :, :H], "depth": sample()["depth"][:, :, :H]}
    turned = Augment([Fixed([[0.0, -1.0, H], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])])(item)
    for key in ("image", "depth"):  # (u, v) -> (H - v, u): clockwise
        torch.testing.assert_close(turned[key], item[key].rot90(-1, (1, 2)), rtol=0, atol=2e-5)
    cropped = Augment([Crop((29, 31), center=True)])(sample())
    torch.testing.assert_close(cropped["image"], sample()["image"][:, 4:33, 11:42], rtol=0, atol=2e-5)
    assert torch.equal(cropped["depth"], sample()["depth"][:, 4:33, 11:42])


def test_outside_is_fill_and_invalid_depth_stays_what_it_is():
    item = sample()
    found = Augment([Translate(0.0), Scale((0.5, 0.5))], fill=0.25)(item)
    assert (found["image"][:, 0] == 0.25).all()
    assert (found["depth"][:, 0] == 0).all()
    assert (found["mask"][:, 0] == 0).all()
    original = set(item["depth"].flatten().tolist())
    for step in AFFINE.values():
        found = Augment([step])(item, seeded(3))["depth"]
        assert not found.isnan().any()
        assert set(found.flatten().tolist()) <= original  # nothing is mixed


# Things move together


@pytest.mark.parametrize("name", AFFINE)
def test_keypoints_and_camera_follow_the_map(name: str):
    for seed in range(3):
        item = sample()
        world = torch.randn(13, 3, generator=seeded(seed), dtype=torch.float64) * 0.4
        pixels, depths = item["camera"].project(world)
        item["keypoints"] = pixels
        found = Augment([AFFINE[name]])(item, seeded(seed))
        expected = moved(pixels, matrix_of(AFFINE[name], seed))
        torch.testing.assert_close(found["keypoints"], expected)
        new = found["camera"]
        torch.testing.assert_close(new.project(world).pixels, expected)
        torch.testing.assert_close(new.project(world).depth, depths)  # along the axis nothing changes
        assert new.image_size == tuple(found["image"].shape[-2:])
        torch.testing.assert_close(new.unproject(expected, depths), world)
        # A camera: positive focal lengths, upper triangular, extrinsics orthogonal, mirrored by flips alone.
        assert (new.intrinsics.diagonal() > 0).all()
        assert new.intrinsics[1, 0] == new.intrinsics[2, 0] == new.intrinsics[2, 1] == 0
        torch.testing.assert_close(new.rotation @ new.rotation.T, torch.eye(3, dtype=torch.float64))
        assert float(torch.linalg.det(new.rotation)) == pytest.approx(-1 if name == "flip" else 1)
        if name not in ("rotate", "shear", "flip"):
            assert torch.equal(new.rotation, item["camera"].rotation)  # all of it is in the intrinsics


def test_a_turn_about_the_principal_point_is_in_the_extrinsics_alone():
    item = sample()
    item["camera"] = Camera.look_at((0.4, 0.7, -2.0), field_of_view=50, image_size=(H, W))
    found = Augment([Rotate(40.0)])(item, seeded(1))["camera"]
    torch.testing.assert_close(found.intrinsics, item["camera"].intrinsics)
    angle = math.atan2(*matrix_of(Rotate(40.0), 1)[[1, 0], 0].tolist())
    turn = torch.eye(3, dtype=torch.float64)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    torch.testing.assert_close(found.rotation, turn @ item["camera"].rotation)


@pytest.mark.parametrize("name", AFFINE)
def test_normals_agree_with_the_moved_camera(name: str):
    """The normals of a plane in the world, wherever they are shown."""
    item = sample()
    normal = torch.nn.functional.normalize(torch.tensor([0.3, -0.5, 0.8], dtype=torch.float64), dim=0)
    item["normals"] = (item["camera"].rotation @ normal).view(3, 1, 1).expand(3, H, W)
    found = Augment([AFFINE[name]])(item, seeded(2))
    shown = found["normals"].flatten(1).T
    shown = shown[shown.norm(dim=1) > 0]
    assert len(shown) > 100
    torch.testing.assert_close(shown, (found["camera"].rotation @ normal).expand_as(shown))


def bounding_box(mask: Tensor) -> list[int]:
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1]


@pytest.mark.parametrize("name", [*AFFINE, "distort"])
def test_the_box_of_a_moved_mask_and_the_moved_box(name: str):
    step = Distort((-0.1, 0.3), (-0.02, 0.02)) if name == "distort" else AFFINE[name]
    seen = 0
    for seed in range(5):
        item = sample()
        del item["camera"]
        found = Augment([step])(item, seeded(seed))
        if not found["masks"][0].any():
            continue
        seen += 1
        box, around = found["boxes"][0], torch.tensor(bounding_box(found["masks"][0]))
        assert found["boxes_visible"][0]
        assert (around[:2] >= box[:2] - 0.51).all()  # a pixel counts by its center
        assert (around[2:] <= box[2:] + 0.51).all()
        if name in AXIS_ALIGNED:
            torch.testing.assert_close(box, around.float(), rtol=0, atol=0.51)
    assert seen >= 3


def test_what_leaves_the_picture_is_marked():
    found = Augment([Crop((11, 13), center=True)])(sample())  # rows 13 to 24, columns 20 to 33
    assert found["boxes_visible"].tolist() == [True, False, False]
    assert found["boxes"][0].tolist() == [0, 0, 13, 11]
    assert found["keypoints_visible"].tolist() == [False, True, False, False]
    assert found["keypoints"][0].tolist() == [-3, -2]  # moved, not clipped
    assert found["labels"].tolist() == [1, 2, 3]
    lost = Augment([Crop((11, 13), center=True), Blur(probability=0), Scale((0.3, 0.3))])(sample())
    assert lost["keypoints_visible"].tolist() == [False, True, False, False]  # back inside, where no picture is
    assert lost["boxes_visible"].tolist() == [True, False, False]
    known = sample() | {"keypoints_visible": torch.tensor([True, False, True, True])}
    assert Augment([])(known)["keypoints_visible"].tolist() == [True, False, True, False]
    assert known["keypoints_visible"].tolist() == [True, False, True, True]  # the caller's own is untouched


@pytest.mark.parametrize("step", [AFFINE["rotate"], Distort((0.1, 0.2))])
def test_no_boxes_and_no_keypoints(step):
    empty = {"boxes": torch.zeros(0, 4), "keypoints": torch.zeros(0, 5, 2), "masks": torch.zeros(0, H, W).bool()}
    found = Augment([step])({"image": sample()["image"], **empty}, seeded(1))
    assert found["boxes"].shape == (0, 4)
    assert found["keypoints"].shape == (0, 5, 2)
    assert found["keypoints_visible"].shape == (0, 5)
    assert found["masks"].shape == (0, H, W)


def test_steps_together_are_interpolated_once():
    torch.manual_seed(0)
    fine = {"image": torch.rand(3, H, W)}

    turn = matrix_of(Rotate(40.0), 1)
    there, back = Fixed(turn.tolist()), Fixed(torch.linalg.inv(turn).tolist())
    there_and_back = Augment([there, back])(fine)
    torch.testing.assert_close(there_and_back["image"], fine["image"], rtol=0, atol=1e-4)
    apart = Augment([back])(Augment([there])(fine))
    assert (apart["image"] - fine["image"])[:, 10:-10, 20:-20].abs().mean() > 0.02


# Distortion


def test_distortion_moves_points_by_the_formula_and_pictures_alike():
    step = Distort((0.2, 0.2), (-0.03, -0.03))
    half = math.hypot(H, W) / 2
    points = torch.tensor([[W / 2, H / 2], [10.0, 5.0], [40.0, 30.0]], dtype=torch.float64)
    centered = (points - torch.tensor([W / 2, H / 2])) / half
    squared = centered.square().sum(1, keepdim=True)
    expected = centered * (1 + 0.2 * squared - 0.03 * squared**2) * half + torch.tensor([W / 2, H / 2])
    ramp = torch.stack([t.float() for t in torch.meshgrid(torch.arange(H) + 0.5, torch.arange(W) + 0.5, indexing="ij")])
    item = {"image": torch.cat([ramp, ramp[:1]]), "keypoints": points}
    found = Augment([step])(item)
    torch.testing.assert_close(found["keypoints"], expected)
    # The picture holds its old positions as colours: at the new place of a point its old place is found.
    for old, new in zip(points, found["keypoints"]):
        u, v = new.tolist()
        if not (1 <= u < W - 1 and 1 <= v < H - 1):
            continue
        shown = found["image"][:2, int(v), int(u)].flip(0)
        torch.testing.assert_close(shown.double(), old, rtol=0, atol=1.0)  # within a pixel


def test_the_box_of_a_bent_outline_reaches_to_its_middle():
    item = {"image": torch.rand(3, H, W), "boxes": torch.tensor([[3.0, 12.0, 50.0, 36.0]])}
    found = Augment([Distort((-0.14, -0.14))])(item)["boxes"][0]
    half, middle = math.hypot(H, W) / 2, torch.tensor([W / 2, H / 2])
    below = (36.0 - H / 2) / half  # the point of the lower edge under the middle, further out than the corners
    assert found[3].item() == pytest.approx(below * (1 - 0.14 * below**2) * half + middle[1].item(), abs=0.01)


def test_distortion_takes_the_camera_away_or_refuses():
    with pytest.raises(ValueError, match="no pinhole camera: give distort drop_camera=True"):
        Augment([Distort()])(sample())
    assert "camera" not in Augment([Distort(drop_camera=True)])(sample())
    assert "camera" not in Augment([Distort((0, 0), drop_camera=True)])(sample())  # by the rule, not by the draw
    with pytest.raises(ValueError, match="would come from nowhere; with k2=0, k1 must be at least -4/27"):
        Distort((-0.15, 0.0))
    Distort((-0.148, 0.0))


# Colour


def test_colours_by_hand():
    image = torch.rand(1, 3, 5, 7, generator=seeded())
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    grey = (image * weights).sum(1, keepdim=True)
    torch.testing.assert_close(Greyscale(1.0).paint(image, None), grey.expand(1, 3, 5, 7))
    for name, seed in itertools.product(("brightness", "contrast"), range(3)):
        amounts = dict.fromkeys(("brightness", "contrast", "saturation", "hue"), 0.0) | {name: 0.5}
        generator = seeded(seed)
        drawn = [0.5 + torch.rand(1, dtype=torch.float64, generator=generator).item() for _ in range(3)]
        found = ColorJitter(**amounts).paint(image, seeded(seed))
        if name == "brightness":
            expected = image * drawn[0]
        else:
            mean = grey.mean()
            expected = (image - mean) * drawn[1] + mean
        torch.testing.assert_close(found, expected.clamp(0, 1), rtol=0, atol=1e-5)
    turned = ColorJitter(0, 0, 0, 0.5).paint(image, seeded(5))
    torch.testing.assert_close(turned.amax(1), image.amax(1))  # turning the hue keeps value
    torch.testing.assert_close(turned.amin(1), image.amin(1))
    assert (turned - image).abs().max() > 0.1
    dull = ColorJitter(0, 0, 1.0, 0).paint(image, seeded(1))
    assert dull.min() >= 0
    assert dull.max() <= 1


def test_blur_is_a_gaussian_of_the_drawn_width():
    image = torch.zeros(1, 3, 41, 41)
    image[..., 20, 20] = 1
    found = Blur((1.5, 1.5), probability=1.0).paint(image, seeded())
    place = torch.arange(41) - 20.0
    expected = torch.exp(-place.square() / (2 * 1.5**2)) * (place.abs() <= 5)
    expected = torch.outer(expected, expected) / expected.sum() ** 2
    torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-6)
    flat = torch.full((2, 3, 7, 11), 0.3)
    torch.testing.assert_close(Blur(probability=1.0).paint(flat, seeded()), flat)


# Draws


EVERYTHING = [
    ResizedCrop((31, 43)), Flip(), Rotate(20.0), Shear(5.0), Stretch(), Scale(), Translate(), ColorJitter(), Blur(),
]  # fmt: skip


def batch_of(count: int) -> dict:
    items = [sample(seed) for seed in range(count)]
    ragged = ("boxes", "keypoints", "masks", "labels")
    joined = collate([{key: value for key, value in item.items() if key not in ragged} for item in items])
    return joined | {key: [item[key] for item in items] for key in ragged}


def test_a_batch_is_its_members_with_draws_of_their_own():
    found = Augment(EVERYTHING)(batch_of(3), seeded())
    assert found["image"].shape == (3, 3, 31, 43)
    assert len(found["camera"]) == len(found["boxes"]) == len(found["masks"]) == 3
    again = Augment(EVERYTHING)(batch_of(3), seeded())
    assert torch.equal(found["image"], again["image"])
    assert not torch.equal(found["camera"].intrinsics[0], found["camera"].intrinsics[1])
    for member in range(3):  # each one's camera and keypoints went with its own picture
        item = sample(member)
        world = item["camera"].unproject(item["keypoints"].double(), torch.ones(4, dtype=torch.float64))
        pixels = found["camera"][member].project(world).pixels
        torch.testing.assert_close(found["keypoints"][member].double(), pixels, rtol=0, atol=1e-3)
    same = Augment([Rotate(0.0), Crop((29, 31), center=True)])
    torch.testing.assert_close(same(batch_of(3))["image"][1], same(sample(1))["image"])


def test_the_generator_decides_and_else_the_global_one():
    augment = Augment(EVERYTHING)
    first, second, other = (augment(sample(), seeded(seed)) for seed in (1, 1, 2))
    assert torch.equal(first["image"], second["image"])
    assert not torch.equal(first["image"], other["image"])
    state = torch.get_rng_state()
    augment(sample(), seeded())
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(augment(sample())["image"], first["image"])


class Samples:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict:
        return {"image": sample(index)["image"]}


def test_the_trainer_seeds_each_sample():
    def images(workers: int, skip: int) -> list[Tensor]:
        sampler = ShuffleSampler(4, seed=3, batch_size=2)
        for _ in range(skip):
            sampler.advance()
        loader = make_loader(Data(Augmented(Samples(), Augment(EVERYTHING)), 2, collate, workers), sampler)
        return [batch["image"] for batch in itertools.islice(loader, 4 - skip)]

    whole = images(0, 0)
    assert not torch.equal(whole[0], whole[2])  # another epoch draws anew
    for images_again, start in ((images(1, 0), 0), (images(0, 3), 3)):
        assert all(torch.equal(a, b) for a, b in zip(images_again, whole[start:]))


def test_a_resized_crop_keeps_to_its_ranges():
    step = ResizedCrop((10, 20), area=(0.2, 0.6), ratio=(0.5, 2.0))
    for matrix in step.move(200, (H, W), seeded()).matrix:
        width, height = 20 / matrix[0, 0], 10 / matrix[1, 1]
        left, top = -matrix[0, 2] / matrix[0, 0], -matrix[1, 2] / matrix[1, 1]
        assert 0.2 - 1e-9 <= width * height / (H * W) <= 0.6 + 1e-9
        assert 0.5 - 1e-9 <= width / height <= 2.0 + 1e-9
        assert left >= -1e-9
        assert top >= -1e-9
        assert left + width <= W + 1e-9
        assert top + height <= H + 1e-9
    wide = ResizedCrop((10, 20), area=(1, 1), ratio=(4, 4)).move(1, (H, W), seeded()).matrix[0]  # fits nowhere
    assert 20 / wide[0, 0] == pytest.approx(W)
    assert 10 / wide[1, 1] == pytest.approx(W / 4)


def test_every_name_builds_and_bad_values_are_named():
    for name, kind in AUGMENTATIONS.items():
        step = kind(**{"size": (5, 7)} if name in ("crop", "resize", "resized_crop") else {})
        image, boxes = sample()["image"], sample()["boxes"]
        assert Augment([step])({"image": image, "boxes": boxes}, seeded())["image"].shape[0] == 3
    with pytest.raises(ValueError, match=r"crop of \(40, 40\) does not fit into an image of \(37, 53\)"):
        Augment([Crop((40, 40))])(sample())
    with pytest.raises(ValueError, match=r"factor must be a range from above 0 to inf, got \(2.0, 1.0\)"):
        Scale((2.0, 1.0))
    with pytest.raises(ValueError, match=r"area must be a range from above 0 to 1, got \(0.0, 1.0\)"):
        ResizedCrop((5, 5), area=(0.0, 1.0))
    with pytest.raises(ValueError, match=r"degrees must be in \[0, 45\)"):
        Shear(45.0)
    with pytest.raises(ValueError, match=r"probability must be in \[0, 1\], got 2"):
        Flip(2.0)
    with pytest.raises(ValueError, match=r"hue must be in \[0, 0.5\]"):
        ColorJitter(hue=0.7)
    with pytest.raises(ValueError, match="needs the key 'image'"):
        Augment([])({"depth": torch.zeros(1, 2, 3)})
    with pytest.raises(ValueError, match=r"image_size is \(37, 53\), the image's \(5, 7\)"):
        Augment([])({"image": torch.zeros(3, 5, 7), "camera": camera()})


@pytest.mark.slow
def test_the_examples_of_the_manual_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.chdir(tmp_path)
    manual = (Path(__file__).parents[1] / "docs" / "augmentation.md").read_text()
    namespaces = []
    for block in manual.split("```python\n")[1:]:
        namespaces.append({"__name__": "example"})
        exec(block.split("```")[0], namespaces[-1])
    picture, _, fitted = namespaces
    assert (tmp_path / "augmentations.png").stat().st_size < 300_000
    assert {title for title, _ in picture["cells"]} >= set(AUGMENTATIONS) - {"drop_invisible"}
    for _, found in picture["cells"]:
        if "camera" in found:  # the crosses are on the dots
            pixels = found["camera"].project(picture["corners"]).pixels
            torch.testing.assert_close(found["keypoints"], pixels)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("tensor([1.")
    assert (fitted["zca"].inverse(fitted["white"]) - fitted["images"]).abs().max() < 1e-4


def test_photographs_with_pedestrians(shared_data: Path):
    found = 0
    for path in sorted((shared_data / "pennfudan").glob("*_mask.png"))[:3]:
        numbers = torch.from_numpy(read_image(path)[..., 0].copy())
        image = torch.from_numpy(read_image(path.with_name(path.name.replace("_mask", "")))[..., :3].copy())
        masks = torch.stack([numbers == number for number in numbers.unique() if number])
        item = {
            "image": image.permute(2, 0, 1).float() / 255,
            "masks": masks,
            "boxes": torch.tensor([bounding_box(mask) for mask in masks]).float(),
        }
        moved_item = Augment([ResizedCrop((240, 320), area=(0.5, 0.9)), Flip(1.0)])(item, seeded(found))
        for mask, box, visible in zip(moved_item["masks"], moved_item["boxes"], moved_item["boxes_visible"]):
            whole = (box[:2] > 0).all() and box[2] < 320 and box[3] < 240  # else the cut may leave less than the box
            if visible and whole:
                found += 1
                torch.testing.assert_close(box, torch.tensor(bounding_box(mask)).float(), rtol=0, atol=1.0)
    assert found >= 3
