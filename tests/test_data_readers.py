"""Readers of array files: every format from files made here, every damage named with its file."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetrain.data import (
    available_splits,
    load_cifar,
    load_dataset,
    load_idx,
    load_npz,
)
from edgetrain.errors import DataError, UsageError

RNG = np.random.default_rng(0)
DIGITS = RNG.integers(0, 256, (6, 4, 5)).astype(np.uint8)
DIGIT_LABELS = np.array([0, 1, 2, 0, 1, 2], np.uint8)


def idx_bytes(values: NDArray[Any]) -> bytes:
    header = [0x800 + values.ndim, *values.shape]
    return b"".join(number.to_bytes(4, "big") for number in header) + values.tobytes()


def write_idx(
    folder: Path, prefix: str, x: NDArray[Any], y: NDArray[Any], end: str = "", mark: str = "-"
) -> None:
    pack = gzip.compress if end else bytes
    folder.mkdir(exist_ok=True)
    (folder / f"{prefix}-images{mark}idx3-ubyte{end}").write_bytes(pack(idx_bytes(x)))
    (folder / f"{prefix}-labels{mark}idx1-ubyte{end}").write_bytes(pack(idx_bytes(y)))


def write_cifar(file: Path, labels: NDArray[Any], coarse: bool = False) -> NDArray[Any]:
    pixels = RNG.integers(0, 256, (len(labels), 3072)).astype(np.uint8)
    columns = [np.zeros_like(labels)] * coarse + [labels]
    file.write_bytes(np.hstack([np.stack(columns, axis=1), pixels]).astype(np.uint8).tobytes())
    return pixels.reshape(-1, 3, 32, 32)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    folder = tmp_path / "mnist"
    write_idx(folder, "train", DIGITS, DIGIT_LABELS, ".gz")
    write_idx(folder, "t10k", DIGITS[:2], DIGIT_LABELS[:2])
    return folder


# IDX


@pytest.mark.parametrize("end", ["", ".gz"], ids=["plain", "gzip"])
@pytest.mark.parametrize("mark", ["-", "."], ids=["hyphen", "full-stop"])
def test_idx_folder(tmp_path: Path, end: str, mark: str) -> None:
    write_idx(tmp_path / "set", "train", DIGITS, DIGIT_LABELS, end, mark)
    data = load_dataset(tmp_path / "set")
    assert np.array_equal(data.images, DIGITS[:, None])
    assert data.labels.tolist() == DIGIT_LABELS.tolist()
    assert (data.class_names, data.name) == (("0", "1", "2"), "set")


def test_idx_test_split_has_the_classes_of_the_training_split(mnist: Path) -> None:
    assert available_splits(mnist) == ("train", "test")
    test = load_dataset(mnist, split="test")
    assert (len(test), test.num_classes) == (2, 3)


def test_idx_pair_with_class_names(mnist: Path) -> None:
    files = mnist / "t10k-images-idx3-ubyte", mnist / "t10k-labels-idx1-ubyte"
    data = load_idx(*files, class_names=["zero", "one"])
    assert (data.class_names, data.name) == (("zero", "one"), "t10k-images-idx3-ubyte")


def test_idx_split_that_is_absent(tmp_path: Path) -> None:
    write_idx(tmp_path, "train", DIGITS, DIGIT_LABELS)
    with pytest.raises(DataError, match="no split 'test', this source has only 'train'; cut off a part"):
        load_dataset(tmp_path, split="test")


GOOD_IMAGES, GOOD_LABELS = idx_bytes(DIGITS), idx_bytes(DIGIT_LABELS)


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (
            GOOD_IMAGES[:-1],
            GOOD_LABELS,
            r"images.bin: 135 bytes, expected 136 for shape \(6, 4, 5\); damaged",
        ),
        (GOOD_IMAGES + b"x", GOOD_LABELS, r"images.bin: 137 bytes, expected 136"),
        (GOOD_IMAGES[:6], GOOD_LABELS, r"images.bin: 6 bytes, expected 16"),
        (b"", GOOD_LABELS, r"images.bin: starts with 0x00000000, expected 0x00000803"),
        (GOOD_LABELS, GOOD_IMAGES, r"images.bin: starts with 0x00000801.*images and labels are swapped"),
        (b"\0\0\x0d\3" + GOOD_IMAGES[4:], GOOD_LABELS, r"0x00000d03, .*only unsigned-byte IDX is read"),
        (GOOD_IMAGES, GOOD_LABELS[:-1], r"labels.bin: 13 bytes, expected 14"),
        (GOOD_IMAGES, idx_bytes(DIGIT_LABELS[:3]), r"labels.bin: 3 labels for the 6 images of .*images.bin"),
        (
            GOOD_IMAGES,
            idx_bytes(DIGIT_LABELS * 2),
            r"labels.bin: data set 'images.bin': class 1 .* no example",
        ),
        (gzip.compress(GOOD_IMAGES)[:-9], GOOD_LABELS, r"images.bin: damaged gzip file"),
        (b"\x1f\x8b" + GOOD_IMAGES, GOOD_LABELS, r"images.bin: damaged gzip file"),
    ],
    ids=[
        "truncated",
        "too-long",
        "header-cut",
        "empty",
        "swapped",
        "floats",
        "labels-truncated",
        "lengths",
        "empty-class",
        "gzip-truncated",
        "gzip-damaged",
    ],
)
def test_damaged_idx_is_named(tmp_path: Path, images: bytes, labels: bytes, match: str) -> None:
    (tmp_path / "images.bin").write_bytes(images)
    (tmp_path / "labels.bin").write_bytes(labels)
    with pytest.raises(DataError, match=match):
        load_idx(tmp_path / "images.bin", tmp_path / "labels.bin")


def test_missing_idx_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such file; check the path"):
        load_idx(tmp_path / "nothing", tmp_path / "nothing")


def test_folder_in_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot be read .*expected a readable file"):
        load_idx(tmp_path, tmp_path)


# CIFAR


def test_cifar10_folder(tmp_path: Path) -> None:
    first = write_cifar(tmp_path / "data_batch_1.bin", np.arange(10))
    second = write_cifar(tmp_path / "data_batch_2.bin", np.arange(10)[::-1])
    write_cifar(tmp_path / "test_batch.bin", np.array([3, 3]))
    (tmp_path / "batches.meta.txt").write_text("\n".join(f"kind {i}" for i in range(10)) + "\n\n")
    train, test = load_dataset(tmp_path), load_dataset(tmp_path, split="test")
    assert available_splits(tmp_path) == ("train", "test")
    assert np.array_equal(train.images, np.concatenate([first, second]))
    assert train.labels.tolist() == [*range(10), *range(9, -1, -1)]
    assert (test.labels.tolist(), test.class_names[3], test.num_classes) == ([3, 3], "kind 3", 10)


def test_cifar100_folder_has_the_fine_labels(tmp_path: Path) -> None:
    pixels = write_cifar(tmp_path / "train.bin", np.arange(100), coarse=True)
    data = load_cifar(tmp_path)
    assert np.array_equal(data.images, pixels)
    assert data.labels.tolist() == list(range(100))
    assert data.class_names[99] == "99"


@pytest.mark.parametrize(
    ("name", "coarse", "classes", "splits"),
    [("data_batch_4.bin", False, 10, ("train",)), ("test.bin", True, 100, ("test",))],
    ids=["cifar10", "cifar100"],
)
def test_one_cifar_file(tmp_path: Path, name: str, coarse: bool, classes: int, splits: Any) -> None:
    pixels = write_cifar(tmp_path / name, np.array([7, 9]), coarse)
    data = load_dataset(tmp_path / name, split=splits[0])
    assert np.array_equal(data.images, pixels)
    assert (data.labels.tolist(), data.num_classes) == ([7, 9], classes)
    assert available_splits(tmp_path / name) == splits


@pytest.mark.parametrize("size", [0, 3072, 6145])
def test_truncated_cifar_is_named(tmp_path: Path, size: int) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"data_batch_1.bin: {size} bytes, expected a multiple of 3073"):
        load_cifar(tmp_path)


def test_cifar_label_out_of_range_is_named(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data_batch_1.bin", np.array([1, 200]))
    with pytest.raises(DataError, match=r"data_batch_1\.bin: label 200, expected 0 to 9"):
        load_cifar(tmp_path)


def test_cifar_without_a_class_is_refused(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data_batch_1.bin", np.arange(9))
    with pytest.raises(DataError, match=r"class 9 \('9'\) has no example"):
        load_cifar(tmp_path)


def test_cifar_names_must_be_text(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data_batch_1.bin", np.arange(10))
    (tmp_path / "batches.meta.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"batches.meta.txt: not UTF-8"):
        load_cifar(tmp_path)


def test_cifar_split_that_is_absent(tmp_path: Path) -> None:
    write_cifar(tmp_path / "data_batch_1.bin", np.arange(10))
    with pytest.raises(DataError, match="no split 'test'; splits found here: 'train'"):
        load_cifar(tmp_path, train=False)


# npz


def test_npz_splits_and_names(tmp_path: Path) -> None:
    file = tmp_path / "own.npz"
    np.savez(
        file, x=DIGITS[:, None], y=DIGIT_LABELS, x_test=DIGITS[:1, None], y_test=[1], class_names=list("abc")
    )
    train, test = load_dataset(file), load_dataset(str(file), split="test")
    assert available_splits(file) == ("train", "test")
    assert np.array_equal(train.images, DIGITS[:, None])
    assert (test.labels.tolist(), test.class_names, test.name) == ([1], ("a", "b", "c"), "own")


def test_npz_with_keras_names_counts_the_classes_of_both_splits(tmp_path: Path) -> None:
    file = tmp_path / "keras.npz"
    np.savez_compressed(
        file, x_train=np.zeros((3, 8, 8)), y_train=[0, 1, 2], x_test=np.zeros((1, 8, 8)), y_test=[1]
    )
    assert load_npz(file).input_shape == (1, 8, 8)
    assert load_npz(file, "test").num_classes == 3


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"a": [1]}, r"holds \['a'\], expected arrays 'x' and 'y'"),
        ({"x": DIGITS[:, None], "y": [0.5] * 6}, "labels have dtype float64"),
        ({"x": DIGITS[:, None], "y": [0, 1]}, "6 images but 2 labels"),
        ({"x": DIGITS[:, None], "y": DIGIT_LABELS, "class_names": [1, 2, 3]}, "class_names have dtype int64"),
        ({"x": np.array([{}] * 6), "y": DIGIT_LABELS}, "cannot be read .*without pickled objects"),
    ],
    ids=["keys", "float-labels", "lengths", "names", "objects"],
)
def test_bad_npz_is_named(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(DataError, match=r"bad\.npz: .*" + match):
        load_npz(tmp_path / "bad.npz")


def test_npz_split_that_is_absent(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", x=DIGITS[:, None], y=DIGIT_LABELS)
    with pytest.raises(DataError, match=r"own\.npz: no split 'test'; splits found here: 'train'"):
        load_npz(tmp_path / "own.npz", "test")


def damaged_npz(kind: str) -> bytes:
    if kind == "pickle":
        return pickle.dumps({"x": 1})
    if kind == "noise":
        return b"PK\x03\x04 and nothing that belongs there"
    return b""


@pytest.mark.parametrize("kind", ["pickle", "noise", "empty"])
def test_damaged_npz_is_named(tmp_path: Path, kind: str) -> None:
    (tmp_path / "bad.npz").write_bytes(damaged_npz(kind))
    with pytest.raises(DataError, match=r"bad\.npz: cannot be read .*expected a whole \.npz file"):
        load_npz(tmp_path / "bad.npz")


def test_npz_with_a_flipped_byte_is_named(tmp_path: Path) -> None:
    file = tmp_path / "bad.npz"
    np.savez(file, x=DIGITS[:, None], y=DIGIT_LABELS)
    file.write_bytes(file.read_bytes().replace(DIGITS.tobytes(), DIGITS[::-1].tobytes()))
    with pytest.raises(DataError, match=r"bad\.npz: cannot be read .*CRC"):
        load_npz(file)


def test_npz_with_a_damaged_lzma_member_is_named(tmp_path: Path) -> None:
    pytest.importorskip("lzma")
    file = tmp_path / "bad.npz"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_LZMA) as archive:
        for name, values in (("x", DIGITS[:, None]), ("y", DIGIT_LABELS)):
            np.save(data := io.BytesIO(), values)
            archive.writestr(f"{name}.npy", data.getvalue())
    whole = bytearray(file.read_bytes())
    whole[60:120] = bytes(60)
    file.write_bytes(whole)
    with pytest.raises(DataError, match=r"bad\.npz: cannot be read .*expected a whole \.npz file"):
        load_npz(file)


def test_single_array_is_not_an_npz(tmp_path: Path) -> None:
    np.save(tmp_path / "one.npy", DIGITS)
    with pytest.raises(DataError, match=r"cannot be read .a single array, as numpy.save writes it"):
        load_npz(tmp_path / "one.npy")


@pytest.mark.parametrize("name", ["data_batch_1.bin", "own.npz"])
def test_unreadable_file_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    write_cifar(tmp_path / name, np.arange(10))
    monkeypatch.setattr(np, "memmap", refuse)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match=rf"{name}: cannot be read \(Permission denied\)"):
        load_dataset(tmp_path / name)


def test_missing_npz_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.npz: no such file"):
        load_npz(tmp_path / "none.npz")


# The one door


@pytest.mark.parametrize("make", ["absent", "empty-folder", "text-file"])
def test_unknown_source_lists_what_is_understood(tmp_path: Path, make: str) -> None:
    source = tmp_path / "source"
    if make == "empty-folder":
        source.mkdir()
    if make == "text-file":
        source.write_text("hello")
    match = (
        "'embedded'; a folder with IDX files .*CIFAR.*npz.*sub-folders train and test.*sub-folder of images"
    )
    with pytest.raises(DataError, match=match):
        load_dataset(source)


@pytest.mark.parametrize("source", ["embedded", "mnist"])
def test_image_options_are_for_folders(mnist: Path, source: str) -> None:
    with pytest.raises(UsageError, match="image_size and channels are for folders of images"):
        load_dataset("embedded" if source == "embedded" else mnist, channels=3)


def test_unknown_split_lists_those_present(mnist: Path) -> None:
    with pytest.raises(DataError, match="no split 'dev'; splits found here: 'train', 'test'"):
        load_dataset(mnist, split="dev")
