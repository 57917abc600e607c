"""Folders of images: order, sizes, channels, splits, and every damage named with its file."""

from __future__ import annotations

import shutil
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from edgetrain.data import available_splits, load_dataset, load_folder
from edgetrain.errors import DataError, UsageError

RNG = np.random.default_rng(0)


def write_image(file: Path, size: tuple[int, int] = (5, 4), mode: str = "L", value: int = 0) -> NDArray[Any]:
    pixels = (
        RNG.integers(0, 256, (*size, 3)).astype(np.uint8) if mode == "RGB" else np.full(size, value, np.uint8)
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(file)
    return pixels


@pytest.fixture
def animals(tmp_path: Path) -> Path:
    folder = tmp_path / "animals"
    for value, name in enumerate(("b.png", "a.png")):
        write_image(folder / "cat" / name, value=value)
    write_image(folder / "dog" / "c.PNG", value=9)
    return folder


def test_class_folder_in_sorted_order(animals: Path) -> None:
    (animals / "notes.txt").write_text("not a class")
    (animals / ".hidden").mkdir()
    (animals / "cat" / "Thumbs.db").write_bytes(b"not an image")
    data = load_dataset(animals)
    assert data.images[:, 0, 0, 0].tolist() == [1, 0, 9]
    assert data.labels.tolist() == [0, 0, 1]
    assert (data.class_names, data.input_shape, data.name) == (("cat", "dog"), (1, 5, 4), "animals")


def test_colour_anywhere_makes_three_channels(animals: Path) -> None:
    pixels = write_image(animals / "dog" / "d.png", mode="RGB")
    data = load_folder(animals)
    assert np.array_equal(data.images[3], pixels.transpose(2, 0, 1))
    assert load_folder(animals, channels=1).input_shape == (1, 5, 4)


def test_images_can_be_resized(animals: Path) -> None:
    write_image(animals / "dog" / "wide.png", (5, 10), value=200)
    data = load_dataset(animals, image_size=(3, 7), channels=3)
    assert data.input_shape == (3, 3, 7)
    assert (data.images[3] == 200).all()


def test_mixed_sizes_name_two_files(animals: Path) -> None:
    write_image(animals / "dog" / "wide.png", (5, 10))
    match = r"cat.a\.png has \(5, 4\), .*dog.wide\.png has \(5, 10\); .*image_size=\(height, width\)"
    with pytest.raises(DataError, match=match):
        load_dataset(animals)


def test_class_without_images_is_named(animals: Path) -> None:
    (animals / "emu").mkdir()
    with pytest.raises(DataError, match=r"emu: no image, expected files in \.bmp"):
        load_dataset(animals)


@pytest.mark.parametrize("keep", [0, 10, 40, 100], ids=lambda keep: f"{keep}-bytes")
def test_damaged_image_is_named(animals: Path, keep: int) -> None:
    file = animals / "dog" / "c.PNG"
    write_image(file, mode="RGB")
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"c\.PNG: cannot be decoded .*replace or remove it"):
        load_dataset(animals)


@pytest.mark.parametrize("kind", [2, 7, 12])
def test_an_image_whose_decoder_fails_in_its_own_way_is_named(animals: Path, kind: int) -> None:
    """Of a TIFF whose place of the pixels is not a whole number, Pillow raises a TypeError."""
    file = animals / "dog" / "c.tif"
    write_image(file, mode="RGB")
    content = bytearray(file.read_bytes())
    first, = struct.unpack("<I", content[4:8])
    entries = range(first + 2, first + 2 + 12 * content[first], 12)
    place = next(entry for entry in entries if content[entry : entry + 2] == struct.pack("<H", 273))
    content[place + 2] = kind
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"c\.tif: cannot be decoded"):
        load_dataset(animals, image_size=(5, 4))


def test_sixteen_bit_image_is_refused(animals: Path) -> None:
    Image.fromarray(np.zeros((5, 4), np.uint16)).save(animals / "dog" / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png: pixels of mode 'I(;16)?', expected 8 bits per channel"):
        load_dataset(animals)


def test_folder_without_classes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no sub-folder, expected one sub-folder of images per class"):
        load_folder(tmp_path)


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing: no such folder"):
        load_folder(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"channels": 2}, r"channels is 2, expected 1 \(grey\) or 3 \(colour\)"),
        ({"image_size": 32}, r"image_size is 32, expected a pair \(height, width\)"),
        ({"image_size": (0, 4)}, "height in image_size is 0, expected a whole number of at least 1"),
        ({"image_size": (4, 4.5)}, "width in image_size is 4.5"),
    ],
    ids=["channels", "not-a-pair", "zero", "float"],
)
def test_bad_image_options(animals: Path, options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        load_folder(animals, **options)


def test_absent_pillow_is_explained(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UsageError, match=r"need Pillow.*pip install edgetrain\[images\]"):
        load_folder(animals)


def test_unreadable_folder_is_named(animals: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DataError, match=r"animals: cannot be listed \(Permission denied\)"):
        load_folder(animals)


def test_plain_class_folder_has_no_test_split(animals: Path) -> None:
    assert available_splits(animals) == ("train",)
    with pytest.raises(DataError, match=r"no split 'test'.*load_dataset\(\.\.\.\)\.split\(0\.9, seed=0\)"):
        load_dataset(animals, split="test")


def test_folder_with_splits(tmp_path: Path, animals: Path) -> None:
    root = tmp_path / "root"
    write_image(root / "train" / "cat" / "a.png", mode="RGB")
    shutil.copytree(animals, root / "train", dirs_exist_ok=True)
    write_image(root / "test" / "dog" / "x.png", value=5)
    assert available_splits(root) == ("train", "test")
    assert load_dataset(root).labels.tolist() == [0, 0, 1]
    test = load_dataset(root, split="test")
    assert (test.class_names, test.labels.tolist()) == (("cat", "dog"), [1])


def test_folder_with_a_test_split_alone(tmp_path: Path) -> None:
    write_image(tmp_path / "test" / "cat" / "a.png")
    assert available_splits(tmp_path) == ("test",)
    assert load_dataset(tmp_path, split="test").class_names == ("cat",)


def test_splits_agree_on_colour(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "cat" / "a.png", mode="RGB")
    write_image(tmp_path / "test" / "cat" / "b.png")
    assert load_dataset(tmp_path, split="test").input_shape == (3, 5, 4)


def test_class_unknown_to_the_training_split_is_named(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "cat" / "a.png")
    write_image(tmp_path / "test" / "emu" / "b.png")
    with pytest.raises(DataError, match="emu: class 'emu' is none of cat; remove or rename it"):
        load_dataset(tmp_path, split="test")


def test_classes_called_train_and_bus(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a.png")
    write_image(tmp_path / "bus" / "b.png")
    assert load_dataset(tmp_path).class_names == ("bus", "train")
