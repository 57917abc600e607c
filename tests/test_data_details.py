"""Data in cases that larger tests pass over: orders, resumed sources, images in lines, resizing."""

from __future__ import annotations

import json

import numpy as np
import pytest

import edgetrain as et
import edgetrain.onnx_io
from edgetrain.data import Augmentation, Dataset, batches
from edgetrain.data.streaming import _JsonLines, open_stream
from edgetrain.errors import UsageError
from tests.test_stream import SHAPE, never, piped, whole


def folder_of_images(tmp_path, sizes=(28, 28)):
    image = pytest.importorskip("PIL.Image")
    for number in range(9):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        image.fromarray(np.full(sizes, 10 * number, np.uint8)).save(folder / f"{number:03d}.png")


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 3}], ids=["seed", "epoch"])
def test_seed_and_epoch_change_the_order(change):
    """Without augmentation, which would tell images apart that come in the same order."""
    data = Dataset.from_arrays(np.zeros((60, 1, 4, 4), np.uint8), np.arange(60))
    orders = [[y.tolist() for _, y in batches(data, 10, **{"seed": 5, "epoch": 2, **more})] for more in ({}, change)]
    assert orders[0] != orders[1]


def test_changes_of_images_are_drawn_one_after_another():
    x = np.random.default_rng(1).random((50, 3, 6, 6), np.float32)
    rng = np.random.default_rng(0)
    expected = x
    for one in (Augmentation(flip=True), Augmentation(crop_padding=2), Augmentation(shift=3)):
        expected = one(expected, rng)
    found = Augmentation(flip=True, crop_padding=2, shift=3)(x, np.random.default_rng(0))
    assert np.array_equal(found, expected)


def test_the_smaller_side_limits_shifts():
    with pytest.raises(UsageError, match="expected less than 4, the smallest side"):
        Augmentation(shift=5)(np.zeros((1, 1, 4, 8), np.float32), np.random.default_rng(0))


def test_images_are_made_smaller_by_averaging(tmp_path):
    image = pytest.importorskip("PIL.Image")
    (tmp_path / "a").mkdir()
    image.fromarray((np.indices((16, 16)).sum(0) % 2 * 255).astype(np.uint8)).save(tmp_path / "a/0.png")
    pixels = et.load_dataset(tmp_path, image_size=(4, 4)).images
    assert abs(pixels.astype(int) - 127).max() < 20


def test_a_folder_goes_on_where_it_stopped(tmp_path):
    folder_of_images(tmp_path)
    source = open_stream(str(tmp_path), SHAPE, 2)
    x, y = whole(source, 4, start=3)
    np.testing.assert_array_equal((255 * x[:, 0, 0, 0]).round(), 10 * np.arange(3, 9))
    assert y.tolist() == [1, 0, 1, 0, 1, 0]


def test_an_archive_goes_on_where_it_stopped(tmp_path):
    x = np.random.default_rng(0).integers(0, 255, (150, 1, 28, 28), np.uint8)
    np.savez(tmp_path / "a.npz", x=x, y=np.arange(150) % 4)
    images, labels = whole(open_stream(str(tmp_path / "a.npz"), SHAPE, 10), 7, start=130)  # 102 KB are passed over
    np.testing.assert_array_equal((255 * images).round(), x[130:])
    np.testing.assert_array_equal(labels, np.arange(130, 150) % 4)


def test_all_labels_of_an_archive_are_looked_at(tmp_path):
    y = np.zeros(70_000, np.uint8)
    y[-1] = 3
    np.savez(tmp_path / "a.npz", x=np.zeros((70_000, 1, 1, 1), np.uint8), y=y)
    assert open_stream(str(tmp_path / "a.npz"), (), 10).class_names == ("0", "1", "2", "3")


def test_a_line_may_name_an_image(tmp_path):
    image = pytest.importorskip("PIL.Image")
    pixels = np.arange(6, dtype=np.uint8).reshape(2, 3) * 51
    image.fromarray(pixels).save(tmp_path / "a.png")
    with piped(json.dumps({"image": str(tmp_path / "a.png"), "y": 1}) + "\n") as reading:
        ((x, y),) = _JsonLines(reading, (1, 2, 3), 3, ()).blocks(2, 0, never)
    np.testing.assert_allclose(x[0, 0], pixels / 255, rtol=1e-6)
    assert y.tolist() == [1]
