"""Readers of NYU Depth v2 and KITTI, on small files in the published layouts that the tests write."""

import builtins
import pickle
import sys

import numpy as np
import pytest
import torch

from vision3dgen.datasets import DATASETS, KITTIDepth, NYUDepth, NYUDepthScenes, collate
from vision3dgen.files import FileError
from vision3dgen.io import write_depth_png, write_png
from vision3dgen.metrics import DEPTH_PROTOCOLS

DATE, DRIVE = "2011_09_26", "2011_09_26_drive_0002_sync"
HEIGHT, WIDTH = 370, 1226


# ------------------------------------------------------------------------------------------------------- KITTI


@pytest.fixture(scope="module")
def kitti(tmp_path_factory):
    """Two frames of the left camera and one of the right, the last frame without depth."""
    root = tmp_path_factory.mktemp("kitti")
    rng = np.random.default_rng(0)
    for frame, side, part in ((5, 2, "train"), (7, 3, "val"), (9, 2, None)):
        folder = root / "raw" / DATE / DRIVE / f"image_0{side}" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(folder / f"{frame:010d}.png", rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        if part is None:
            continue
        depth = np.where(rng.random((HEIGHT, WIDTH)) < 0.1, rng.integers(256, 65535, (HEIGHT, WIDTH)), 0) / 256
        folder = root / "annotated" / part / DRIVE / "proj_depth" / "groundtruth" / f"image_0{side}"
        folder.mkdir(parents=True)
        write_depth_png(folder / f"{frame:010d}.png", depth, units_per_metre=256)
        np.save(root / f"depth{frame}.npy", depth)
    (root / "raw" / DATE / "calib_cam_to_cam.txt").write_text(
        "calib_time: 09-Jan-2012 13:57:47\n"
        "P_rect_02: 721.5 0 609.5 44.8 0 720.5 172.8 0.2 0 0 1 0.003\n"
        "P_rect_03: 731.5 0 619.5 -340 0 730.5 182.8 2.3 0 0 1 0.003\n"
    )
    relative = f"{DATE}/{DRIVE}/image_02/data/0000000005.png"
    own = f"{DRIVE}/proj_depth/groundtruth/image_02/0000000005.png"
    (root / "bts.txt").write_text(
        f"{relative} {own} 721.5377\n\n{relative.replace('05.png', '09.png')} None 721.5377\n"
    )
    (root / "monodepth2.txt").write_text(f"{DATE}/{DRIVE} 5 l\n{DATE}/{DRIVE} 0000000007 r\n{DATE}/{DRIVE} 9 l\n")
    return root


def kitti_of(root, name, **settings):
    arguments = {"lists": {"train": root / name}, "missing": "skip"} | settings
    return KITTIDepth(root / "raw", root / "annotated", "train", **arguments)


def test_kitti_lists_of_both_kinds_name_the_same_files(kitti):
    first, second = kitti_of(kitti, "bts.txt"), kitti_of(kitti, "monodepth2.txt")
    assert (len(first), first.skipped) == (1, 1)
    assert (len(second), second.skipped) == (2, 1)
    assert first.ids == [f"{DATE}/{DRIVE}/image_02/data/0000000005"]
    assert second.ids[1] == f"{DATE}/{DRIVE}/image_03/data/0000000007"
    a, b = first[0], second[0]
    assert torch.equal(a["image"], b["image"])
    assert torch.equal(a["depth"], b["depth"])
    np.testing.assert_allclose(a["depth"][0], np.load(kitti / "depth5.npy"), rtol=1e-6)
    np.testing.assert_allclose(second[1]["depth"][0], np.load(kitti / "depth7.npy"), rtol=1e-6)
    assert 0 <= a["image"].min() < a["image"].max() <= 1
    assert a["image"].shape == (3, HEIGHT, WIDTH)


def test_kitti_cameras_are_those_of_their_side_with_centers_at_halves(kitti):
    left, right = (kitti_of(kitti, "monodepth2.txt")[index]["camera"] for index in (0, 1))
    np.testing.assert_allclose(left.intrinsics, [[721.5, 0, 610.0], [0, 720.5, 173.3], [0, 0, 1]], rtol=1e-6)
    np.testing.assert_allclose(right.intrinsics, [[731.5, 0, 620.0], [0, 730.5, 183.3], [0, 0, 1]], rtol=1e-6)
    assert left.image_size == (HEIGHT, WIDTH)


def test_kittis_crop_moves_camera_and_pixels_alike(kitti):
    whole, cut = kitti_of(kitti, "bts.txt")[0], kitti_of(kitti, "bts.txt", crop="benchmark")[0]
    assert cut["image"].shape == (3, 352, 1216)
    top, left = HEIGHT - 352, 5
    assert torch.equal(cut["depth"], whole["depth"][:, top:, left : left + 1216])
    assert torch.equal(cut["image"], whole["image"][:, top:, left : left + 1216])
    row, column = (int(x) for x in cut["depth"][0].nonzero()[100])
    z = cut["depth"][:, row, column]
    here = cut["camera"].unproject(torch.tensor([[column + 0.5, row + 0.5]]), z)
    there = whole["camera"].unproject(torch.tensor([[column + left + 0.5, row + top + 0.5]]), z)
    torch.testing.assert_close(here, there)


def test_resizing_keeps_depths_and_what_the_camera_sees(kitti):
    whole, small = kitti_of(kitti, "bts.txt")[0], kitti_of(kitti, "bts.txt", image_size=(74, 613))[0]
    assert small["image"].shape == (3, 74, 613)
    assert small["camera"].image_size == (74, 613)
    assert set(small["depth"].unique().tolist()) <= set(whole["depth"].unique().tolist())  # none is mixed
    assert torch.equal(small["depth"][0], whole["depth"][0][2::5, 1::2])  # the pixels nearest to the new centers
    batch = collate([small, kitti_of(kitti, "monodepth2.txt", image_size=(74, 613))[1]])
    assert batch["depth"].shape == (2, 1, 74, 613)
    assert len(batch["camera"]) == 2
    assert DEPTH_PROTOCOLS["kitti_garg"].valid(whole["depth"]).sum() > 1000


def test_pictures_kept_as_jpeg_are_found(kitti, tmp_path):
    from PIL import Image

    path = kitti / "raw" / DATE / DRIVE / "image_02" / "data" / "0000000005.png"
    kept = path.read_bytes()
    Image.open(path).save(path.with_suffix(".jpg"))
    path.unlink()
    try:
        assert kitti_of(kitti, "bts.txt")[0]["image"].shape == (3, HEIGHT, WIDTH)
    finally:
        path.with_suffix(".jpg").unlink()
        path.write_bytes(kept)


def test_faults_of_kitti_are_named(kitti, tmp_path):
    with pytest.raises(FileError, match=r"monodepth2.txt, line 3: no .*0000000009.png in"):
        kitti_of(kitti, "monodepth2.txt", missing="raise")
    with pytest.raises(FileError, match=r"bts.txt, line 3: no depth in"):
        kitti_of(kitti, "bts.txt", missing="raise")
    for line, message in (
        ("one two", "neither 'IMAGE.png"),
        ("a.png", "an image must be DATE/DRIVE/image_02/data/FRAME.png"),
        (f"../{DRIVE}/image_02/data/5.png ../../x.png", "must not contain"),
    ):
        (tmp_path / "bad.txt").write_text(line)
        with pytest.raises(FileError, match=message):
            kitti_of(kitti, "bts.txt", lists={"train": tmp_path / "bad.txt"})
    (tmp_path / "none.txt").write_text(f"{DATE}/{DRIVE} 9 l\n")
    with pytest.raises(FileError, match="none of its 1 items has a depth"):
        kitti_of(kitti, "bts.txt", lists={"train": tmp_path / "none.txt"})
    with pytest.raises(ValueError, match=r"unknown split 'train'.*choose from \['test'\]"):
        kitti_of(kitti, "bts.txt", lists={"test": "x"})
    with pytest.raises(FileError, match="no such folder"):
        KITTIDepth(kitti / "nowhere", kitti, "train", lists={"train": kitti / "bts.txt"})
    calibration = kitti / "raw" / DATE / "calib_cam_to_cam.txt"
    text = calibration.read_text()
    try:
        calibration.write_text(text.replace("P_rect_02: 721.5 0", "P_rect_02: 0"))
        with pytest.raises(FileError, match="P_rect_02 must be 12 numbers"):
            kitti_of(kitti, "bts.txt")[0]
        calibration.write_text("P_rect_00: 1\n")
        with pytest.raises(FileError, match="no P_rect_02 in it"):
            kitti_of(kitti, "bts.txt")[0]
    finally:
        calibration.write_text(text)


# --------------------------------------------------------------------------------------------------------- NYU


def test_without_h5py_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name == "h5py":
            raise ImportError("No module named 'h5py'")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "h5py", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r'needs h5py: pip install "vision3dgen\[depth\]"'):
        NYUDepth(tmp_path, "train")


def write_labelled(root, count=5):
    h5py = pytest.importorskip("h5py")
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (count, 3, 640, 480), dtype=np.uint8)
    depths = rng.uniform(1, 9, (count, 640, 480)).astype(np.float32)
    with h5py.File(root / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"], file["depths"], file["rawDepths"] = images, depths, depths * (rng.random(depths.shape) > 0.2)
    savemat(root / "splits.mat", {"trainNdxs": [[2], [5]], "testNdxs": [[1], [3], [4]]})
    return images, depths


def test_nyu_labelled_frames(tmp_path):
    images, depths = write_labelled(tmp_path)
    train, test = NYUDepth(tmp_path, "train"), NYUDepth(tmp_path, "test")
    assert train.ids == ["nyu/0002", "nyu/0005"]
    assert test.ids == ["nyu/0001", "nyu/0003", "nyu/0004"]
    item = test[1]
    assert item["image"].shape == (3, 480, 640)
    np.testing.assert_allclose(item["image"][2, 7, 11] * 255, images[2, 2, 11, 7], atol=1e-4)
    np.testing.assert_allclose(item["depth"][0, 7, 11], depths[2, 11, 7])
    assert item["camera"].image_size == (480, 640)
    np.testing.assert_allclose(item["camera"].intrinsics[:2, 2], [325.0824494, 253.2361663], rtol=1e-6)
    raw = NYUDepth(tmp_path, "test", depth="raw")[1]["depth"]
    assert 0.1 < (raw == 0).float().mean() < 0.3
    assert torch.equal(raw[raw > 0], item["depth"][raw > 0])
    again = pickle.loads(pickle.dumps(test))  # as a worker process gets it
    assert torch.equal(again[1]["depth"], item["depth"])
    assert DEPTH_PROTOCOLS["nyu_eigen"].valid(item["depth"]).sum() == 426 * 560
    part = NYUDepth(tmp_path, "val", fractions={"train": 0.5, "val": 0.5})
    assert len(part) == 1
    assert part.ids[0] in train.ids
    assert NYUDepth(tmp_path, "test", image_size=(48, 64))[0]["depth"].shape == (1, 48, 64)


def test_faults_of_the_labelled_file_are_named(tmp_path):
    h5py = pytest.importorskip("h5py")
    from scipy.io import savemat

    with pytest.raises(FileNotFoundError):
        NYUDepth(tmp_path, "train")
    (tmp_path / "nyu_depth_v2_labeled.mat").write_bytes(b"MATLAB 5.0 MAT-file" + bytes(100))
    with pytest.raises(FileError, match="not HDF5, or damaged"):
        NYUDepth(tmp_path, "train")
    write_labelled(tmp_path)
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[2], [9]], "testNdxs": [[1]]})
    with pytest.raises(FileError, match="must number the 5 frames from 1, got 2 to 9"):
        NYUDepth(tmp_path, "train")
    (tmp_path / "splits.mat").write_bytes(b"no")
    with pytest.raises(FileError, match="the published split"):
        NYUDepth(tmp_path, "train")
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file["images"] = np.zeros((2, 480, 640, 3), np.uint8)
    with pytest.raises(FileError, match=r"needs 'images' of \(N, 3, 640, 480\), found \(2, 480, 640, 3\)"):
        NYUDepth(tmp_path, "train")


def test_nyu_as_one_file_per_frame(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng = np.random.default_rng(0)
    expected = {}
    for part, scene, number in (("train", "bath", 2), ("train", "attic", 1), ("val", "official", 3)):
        folder = tmp_path / part / scene
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{part}/{scene}/{number:05d}"
        expected[name] = rng.integers(0, 256, (3, 480, 640), dtype=np.uint8), rng.random((480, 640), np.float32) + 1
        with h5py.File(tmp_path / f"{name}.h5", "w") as file:
            file["rgb"], file["depth"] = expected[name]
    train = NYUDepthScenes(tmp_path, "train")
    assert train.ids == ["train/attic/00001", "train/bath/00002"]
    (item,) = NYUDepthScenes(tmp_path, "val")
    image, depth = expected["val/official/00003"]
    np.testing.assert_allclose(item["image"] * 255, image, atol=1e-4)
    np.testing.assert_allclose(item["depth"][0], depth)
    with h5py.File(tmp_path / "val/official/00003.h5", "w") as file:
        file["rgb"] = image
    with pytest.raises(FileError, match="cannot read 'depth'"):
        NYUDepthScenes(tmp_path, "val")[0]
    with pytest.raises(FileError, match="no such folder"):
        NYUDepthScenes(tmp_path / "nowhere", "train")
    (tmp_path / "empty" / "train").mkdir(parents=True)
    with pytest.raises(FileError, match=r"no SCENE/NUMBER\.h5 in it"):
        NYUDepthScenes(tmp_path / "empty", "train")


def test_the_readers_are_in_the_table():
    assert DATASETS["nyu_depth"] is NYUDepth
    assert DATASETS["nyu_depth_scenes"] is NYUDepthScenes
    assert DATASETS["kitti_depth"] is KITTIDepth
