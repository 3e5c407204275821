"""Image datasets read in their published layouts, written here by the formats' own descriptions."""

import gzip
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from vision3dgen.datasets import CIFAR10, CIFAR100, DATASETS, MNIST, ImageFolder, ImageList, collate, images, read_idx
from vision3dgen.io import FileError

TYPES = {"u1": 0x08, "i1": 0x09, ">i2": 0x0B, ">i4": 0x0C, ">f4": 0x0D, ">f8": 0x0E}


def idx(array, kind="u1"):
    return (
        bytes([0, 0, TYPES[kind], array.ndim])
        + struct.pack(f">{array.ndim}I", *array.shape)
        + array.astype(kind).tobytes()
    )


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def mnist(tmp_path):
    """7 training and 5 test pictures, the training images gzipped."""
    train, test = pixels(7, 28, 28), pixels(5, 28, 28, seed=1)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(train)))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.arange(7)))
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(idx(test))
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([9, 9, 1, 0, 9])))
    return tmp_path


# ---------------------------------------------------------------------------------------------------------- idx


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("shape", [(5,), (2, 3, 7), (0, 3)])
def test_idx_arrays_of_every_type_are_read(tmp_path, kind, shape):
    array = np.random.default_rng(0).integers(-100 if kind != "u1" else 0, 100, shape).astype(kind)
    for name, content in (("plain", idx(array, kind)), ("packed.gz", gzip.compress(idx(array, kind)))):
        (tmp_path / name).write_bytes(content)
        found = read_idx(tmp_path / name)
        assert found.dtype == np.dtype(kind).newbyteorder("=")
        np.testing.assert_array_equal(found, array)


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", r"not an idx file, it starts with the bytes \(none\)"),
        (b"\x89PNG\r\n", "not an idx file, it starts with the bytes 89 50 4e 47; expected 00 00"),
        (b"\0\0\x07\x01\0\0\0\x01a", "not an idx file"),
        (b"\0\0\x08\0", "not an idx file"),
        (b"\0\0\x08\x03\0\0\0\x01", "cut short within the header, which announces 3 axes"),
        (idx(pixels(5))[:-1], r"the header says \(5,\), which is 5 bytes of values, the file has 4"),
        (idx(pixels(5)) + b"a", "the file has more"),
        (b"\0\0\x08\x03" + b"\xff" * 12, r"the header says \(4294967295, .* the file has 0"),
        (gzip.compress(idx(pixels(50)), mtime=0)[:-9], "damaged or cut short gzip"),
        (gzip.compress(idx(pixels(50)), mtime=0)[:12] + b"\xff" * 30, "damaged or cut short gzip"),
    ],
)
def test_a_broken_idx_file_is_named(tmp_path, content, message):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(FileError, match=message) as raised:
        read_idx(tmp_path / "broken")
    assert str(tmp_path / "broken") in str(raised.value)


def test_mnist_items(mnist):
    train, test = MNIST(mnist, "train"), MNIST(mnist, "test")
    assert (len(train), len(test)) == (7, 5)
    item = test[2]
    np.testing.assert_array_equal(
        (item["image"][0] * 255).round().numpy().astype(np.uint8), pixels(5, 28, 28, seed=1)[2]
    )
    assert (int(item["label"]), item["category"], item["id"]) == (1, "1", "test/00002")
    assert item["image"].shape == (1, 28, 28)
    batch = collate([test[0], test[-1]])
    assert batch["label"].tolist() == [9, 9]
    assert batch["image"].shape == (2, 1, 28, 28)
    assert batch["id"] == ["test/00000", "test/00004"]
    assert DATASETS["fashion_mnist"](mnist, "test")[0]["category"] == "Ankle boot"
    with pytest.raises(IndexError):
        test[5]


def test_the_real_test_images(shared_data):
    data = MNIST(shared_data / "mnist", "test")
    assert torch.bincount(data.labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # published
    assert data.labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    mean = data._pixels.double().mean() / 255
    assert float(mean) == pytest.approx(0.1325, abs=1e-4)


def test_faults_of_mnist_folders_are_named(mnist, tmp_path):
    def broken(name, content, message, error=FileError):
        original = (mnist / name).read_bytes()
        (mnist / name).write_bytes(content)
        with pytest.raises(error, match=message) as raised:
            MNIST(mnist, "test")
        (mnist / name).write_bytes(original)
        assert name in str(raised.value)

    broken("t10k-labels-idx1-ubyte", idx(np.array([1, 2, 10, 0, 9])), "label 10 of item 2 is out of range, .* 0 to 9")
    broken("t10k-labels-idx1-ubyte", idx(np.arange(4)), "5 images, but .* has 4 labels")
    broken("t10k-labels-idx1-ubyte", idx(pixels(5, 1)), r"labels must be \(N,\) bytes, got \(5, 1\)")
    broken("t10k-images-idx3-ubyte", idx(pixels(5, 784)), r"images must be \(N, H, W\) of bytes, got \(5, 784\)")
    broken("t10k-images-idx3-ubyte", idx(np.zeros((5, 2, 2)), ">f4"), "of float32")
    (mnist / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"t10k-images-idx3-ubyte: no such file, nor .*gz; the folder has \['t10k-la"
    ):
        MNIST(mnist, "test")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        MNIST(tmp_path / "none", "test")


# ------------------------------------------------------------------------------------------------------- splits


def ids(dataset):
    return [dataset[index]["id"] for index in range(len(dataset))]


def test_fractions_divide_a_part_once_and_for_all(shared_data):
    root, shares = shared_data / "mnist", {"train": 0.8, "test": 0.2}
    train, test = (MNIST(root, split, part="test", fractions=shares) for split in ("train", "test"))
    assert (len(train), len(test)) == (8000, 2000)
    assert sorted(train.places.tolist() + test.places.tolist()) == list(range(10000))
    assert torch.equal(MNIST(root, "test", part="test", fractions=shares).places, test.places)
    other = MNIST(root, "test", part="test", fractions=shares, seed=1)
    assert len(set(other.places.tolist()) & set(test.places.tolist())) < 600


def test_a_published_part_beside_fractions_stays_whole(mnist):
    shares = {"train": 0.6, "val": 0.4}
    train, val, test = (MNIST(mnist, split, fractions=shares) for split in ("train", "val", "test"))
    assert sorted(ids(train) + ids(val)) == ids(MNIST(mnist, "train"))
    assert ids(test) == ids(MNIST(mnist, "test"))
    with pytest.raises(ValueError, match=r"no published split 'val', only .*divide one by fractions, such as"):
        MNIST(mnist, "val")
    with pytest.raises(ValueError, match="part 'test' needs fractions that say which share of it is 'train'"):
        MNIST(mnist, "train", part="test")
    with pytest.raises(ValueError, match=r"unknown split 'val'; choose from \['test', 'train'\]"):
        MNIST(mnist, "val", part="test", fractions={"train": 0.6, "test": 0.4})
    with pytest.raises(ValueError, match="unknown part 'val'"):
        MNIST(mnist, "train", part="val", fractions=shares)
    with pytest.raises(ValueError, match="fractions must be >= 0 and add up to 1"):
        MNIST(mnist, "train", fractions={"train": 0.6})


def test_kept_classes_are_numbered_anew(mnist):
    data = MNIST(mnist, "test", keep=[9, 0])
    assert data.labels.tolist() == [0, 0, 1, 0]
    assert data.classes == ["9", "0"]
    assert ids(data) == ["test/00000", "test/00001", "test/00003", "test/00004"]
    assert data[2]["category"] == "0"
    for keep in ([], [1, 1], [10]):
        with pytest.raises(ValueError, match="keep must be different classes of 0 to 9"):
            MNIST(mnist, "test", keep=keep)
    with pytest.raises(ValueError, match="split 'test' has no items"):
        MNIST(mnist, "test", keep=[5])


def test_padded_pictures_are_shifted_by_the_seed(mnist):
    plain, padded = MNIST(mnist, "test"), MNIST(mnist, "test", pad=2)
    frame = torch.nn.functional.pad(plain[1]["image"], (2,) * 4)
    windows = [frame[:, y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
    seen = set()
    for seed in range(300):
        torch.manual_seed(seed)
        image = padded[1]["image"]
        torch.manual_seed(seed)
        assert torch.equal(padded[1]["image"], image)
        seen.add(next(place for place, window in enumerate(windows) if torch.equal(image, window)))
    assert seen == set(range(25))
    with pytest.raises(ValueError, match="pad must be at least 0 pixels, got -1"):
        MNIST(mnist, "test", pad=-1)


# -------------------------------------------------------------------------------------------------------- CIFAR


def cifar(folder, kind, monkeypatch, count=3):
    monkeypatch.setattr(kind, "records", dict.fromkeys(kind.records, count))
    folder.mkdir()
    content = {}
    for files in kind.files.values():
        for number, name in enumerate(files):
            data = pixels(count, len(kind.label_bytes) + 3072, seed=len(name) + number)
            data[:, 0] = np.arange(count) + number
            data[:, len(kind.label_bytes) - 1] = np.arange(count) + number
            (folder / name).write_bytes(data.tobytes())
            content[name] = data
    for name, limit in kind.name_files:
        (folder / name).write_text("".join(f"{name[0]}{number}\n" for number in range(limit)) + "\n")
    return content


def test_cifar10_records(tmp_path, monkeypatch):
    content = cifar(tmp_path / "cifar-10-batches-bin", CIFAR10, monkeypatch)
    for root in (tmp_path, tmp_path / "cifar-10-batches-bin"):
        train, test = CIFAR10(root, "train"), CIFAR10(root, "test")
        assert (len(train), len(test)) == (15, 3)
        record = content["data_batch_2.bin"][1]  # the fifth item
        item = train[4]
        assert (int(item["label"]), item["category"], item["id"]) == (2, "b2", "train/00004")
        for channel, row, column in ((0, 0, 0), (1, 5, 7), (2, 31, 30)):
            byte = record[1 + 1024 * channel + 32 * row + column]
            assert float(item["image"][channel, row, column]) == pytest.approx(byte / 255)


def test_cifar100_has_two_labels(tmp_path, monkeypatch):
    content = cifar(tmp_path / "cifar-100-binary", CIFAR100, monkeypatch)
    content["test.bin"][:, 0], content["test.bin"][:, 1] = [19, 0, 3], [99, 5, 7]
    (tmp_path / "cifar-100-binary" / "test.bin").write_bytes(content["test.bin"].tobytes())
    fine, coarse = CIFAR100(tmp_path, "test"), CIFAR100(tmp_path, "test", labels="coarse")
    assert fine.labels.tolist() == [99, 5, 7]
    assert coarse.labels.tolist() == [19, 0, 3]
    assert (fine[0]["category"], coarse[0]["category"]) == ("f99", "c19")
    assert torch.equal(fine[1]["image"], coarse[1]["image"])
    assert float(fine[1]["image"][0, 0, 3]) == pytest.approx(content["test.bin"][1, 5] / 255)
    with pytest.raises(ValueError, match="unknown labels 'super'"):
        CIFAR100(tmp_path, "test", labels="super")


def test_faults_of_cifar_folders_are_named(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-100-binary"
    content = cifar(folder, CIFAR100, monkeypatch)["test.bin"]
    whole = content.tobytes()
    for cut in (whole[:-1], whole[:-3074], whole + b"a", b""):
        (folder / "test.bin").write_bytes(cut)
        with pytest.raises(FileError, match=rf"test.bin: must be 3 records of 3074 bytes.* the file has {len(cut)}"):
            CIFAR100(tmp_path, "test")
    content[1, 0] = 20
    (folder / "test.bin").write_bytes(content.tobytes())
    with pytest.raises(FileError, match=r"test.bin: coarse label 20 of item 1 is out of range, it must be 0 to 19"):
        CIFAR100(tmp_path, "test")
    (folder / "fine_label_names.txt").write_text("apple\n")
    with pytest.raises(FileError, match=r"fine_label_names.txt: must name 100 classes, a line each, got 1"):
        CIFAR100(tmp_path, "train")
    (folder / "train.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"coarse_label_names|train.bin: no such file of the binary version"):
        CIFAR100(tmp_path, "train", labels="coarse")
    python = tmp_path / "python" / "cifar-10-batches-py"
    python.mkdir(parents=True)
    (python / "data_batch_1").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"data_batch_1 is of the Python version, .* it is a pickle"):
        CIFAR10(tmp_path / "python", "train")


# -------------------------------------------------------------------------------------------- folders and lists


def picture(path, height=8, width=6, color=(10, 20, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (width, height), color).save(path)


@pytest.fixture
def tree(tmp_path):
    for split, counts in (("train", {"cat": 3, "ape": 2, "bee": 1}), ("val", {"cat": 1, "bee": 2})):
        for name, count in counts.items():
            for number in range(count):
                picture(tmp_path / split / name / f"{number}.png", color=(number, 2, 3))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not a picture")
    return tmp_path


def test_a_folder_per_class(tree):
    train, val = ImageFolder(tree, "train"), ImageFolder(tree, "val")
    assert train.classes == val.classes == ["ape", "bee", "cat"]
    assert train.labels.tolist() == [0, 0, 1, 2, 2, 2]
    assert val.labels.tolist() == [1, 1, 2]  # the numbers of train
    item = train[4]
    assert (item["id"], item["category"], item["image"].shape) == ("train/cat/1.png", "cat", (3, 8, 6))
    assert item["image"][:, 0, 0].tolist() == pytest.approx([1 / 255, 2 / 255, 3 / 255])
    flat = ImageFolder(tree / "train", "train", fractions={"train": 0.5, "val": 0.5})
    assert flat.classes == ["ape", "bee", "cat"]
    assert len(flat) == 3
    assert "/" in flat[0]["id"]
    assert len(set(ids(flat)) & set(ids(ImageFolder(tree / "train", "val", fractions={"train": 0.5, "val": 0.5})))) == 0


def test_faults_of_folders_are_named(tree, tmp_path):
    with pytest.raises(ValueError, match="image_size must be at least 1 or None, got 0"):
        ImageFolder(tree, "val", image_size=0)
    with pytest.raises(ValueError, match=r"no published split 'test', only \['train', 'val'\]"):
        ImageFolder(tree, "test")
    (tree / "train" / "cat" / "2.png").write_bytes(b"\x89PNG")
    with pytest.raises(FileError, match=r"train/cat/2.png: (not an image|cannot decode)"):
        ImageFolder(tree, "train")[5]
    (tree / "val" / "dog").mkdir()
    with pytest.raises(FileError, match=r"val/dog: the class 'dog' is not in .*train"):
        ImageFolder(tree, "val")
    (tree / "train" / "dog").mkdir()
    with pytest.raises(FileError, match=r"train/dog: no picture of this class, that is, no file ending in"):
        ImageFolder(tree, "train")
    (tmp_path / "bare").mkdir()
    with pytest.raises(FileError, match="bare: no folder in it; each class should have one"):
        ImageFolder(tmp_path / "bare", "train")
    with pytest.raises(FileNotFoundError, match="none: no such folder"):
        ImageFolder(tmp_path / "none", "train")


def test_lists_of_paths_and_labels(tmp_path):
    """Places365's files: a slash before each path, classes of two words, labels in another file's order."""
    for name in ("a/airfield/1.jpg", "f/field/wild/7.jpg", "a/airfield/2.jpg"):
        picture(tmp_path / name)
    (tmp_path / "categories.txt").write_text("/f/field/wild 1\n/a/airfield 0\n")
    (tmp_path / "train.txt").write_text("/a/airfield/1.jpg 0\n/f/field/wild/7.jpg 1\n/a/airfield/2.jpg 0\n")
    settings = {"lists": {"train": "train.txt"}, "categories": "categories.txt"}
    data = ImageList(tmp_path, "train", **settings, image_size=5)
    assert data.classes == ["/a/airfield", "/f/field/wild"]
    assert data.labels.tolist() == [0, 1, 0]
    assert (data[1]["id"], data[1]["image"].shape) == ("f/field/wild/7.jpg", (3, 5, 5))

    def broken(name, text, message):
        original = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text)
        with pytest.raises(FileError, match=rf"{name}.*{message}"):
            ImageList(tmp_path, "train", **settings)
        (tmp_path / name).write_text(original)

    broken("train.txt", "a.jpg 0\nb.jpg\n", "line 2: must be a path, a space and the number of a class, got 'b.jpg'")
    broken("train.txt", "a.jpg 0\nb.jpg 2\n", "label 2 of item 1 is out of range, it must be 0 to 1")
    broken("train.txt", "a.jpg 0\n/../b.jpg 1\n", r"line 2: '../b.jpg' must not contain '..'")
    broken("train.txt", "", "the list is empty")
    broken("categories.txt", "a 0\nb 2\n", "the classes must be numbered 0 to 1, each once")
    (tmp_path / "a/airfield/2.jpg").unlink()
    with pytest.raises(OSError, match=r"2\.jpg"):
        ImageList(tmp_path, "train", **settings)[2]


@pytest.mark.parametrize("shape", [(11, 17), (17, 11), (5, 5), (3, 40)])
def test_resize_crop_keeps_the_middle(shape):
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in shape), indexing="ij")
    picture = torch.stack([rows, columns, 0.3 * torch.ones(shape)]) * 0.5 + 0.5
    picture[2] = 0.3
    cut = images.resize_crop(picture, 5)
    assert cut.shape == (3, 5, 5)
    torch.testing.assert_close(cut[2], torch.full((5, 5), 0.3))
    for channel in range(2):  # what is symmetrical about the middle stays so
        torch.testing.assert_close(cut[channel] + cut[channel].flip((0, 1)), torch.ones(5, 5), atol=0.03, rtol=0)
