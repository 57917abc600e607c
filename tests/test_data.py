"""The Dataset: what it accepts, what it refuses, and what it computes."""

from __future__ import annotations

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetrain.data import Dataset
from edgetrain.data.convert import MAX_CLASSES
from edgetrain.data.images import deviation_to_divide_by
from edgetrain.errors import DataError, UsageError

PIXELS = np.random.default_rng(7).integers(0, 256, (40, 3, 6, 5)).astype(np.uint8)
LABELS = np.arange(40, dtype=np.int64) % 4
IMAGES = np.zeros((3, 1, 4, 4), np.uint8)


def pixels_of(dataset: Dataset) -> NDArray[Any]:
    return np.asarray(dataset.images)


@pytest.fixture
def data() -> Dataset:
    return Dataset.from_arrays(PIXELS, LABELS, ["a", "b", "c", "d"], name="toy")


def test_dataset_describes_itself(data: Dataset) -> None:
    assert (len(data), data.num_classes, data.input_shape, data.name) == (40, 4, (3, 6, 5), "toy")


def test_dataset_is_frozen(data: Dataset) -> None:
    with pytest.raises(FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]


def test_from_arrays_keeps_uint8_without_a_copy(data: Dataset) -> None:
    assert np.shares_memory(data.images, PIXELS)


@pytest.mark.parametrize(
    ("dtype", "stored"),
    [
        (np.uint8, np.uint8),
        (np.int64, np.uint8),
        (np.uint16, np.uint8),
        (np.float16, np.float32),
        (np.float32, np.float32),
        (np.float64, np.float32),
        (">f4", np.float32),
    ],
    ids=str,
)
def test_from_arrays_converts_images(dtype: Any, stored: Any) -> None:
    x = (np.arange(32) % 7).reshape(2, 1, 4, 4).astype(dtype)
    before = x.copy()
    data = Dataset.from_arrays(x, [0, 1])
    assert data.images.dtype == stored
    assert np.array_equal(data.images, x)
    assert np.array_equal(x, before)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "uint64", "int64"])
def test_from_arrays_accepts_every_integer_label(dtype: str) -> None:
    assert Dataset.from_arrays(IMAGES, np.array([0, 1, 0], dtype)).labels.dtype == np.int64


def test_labels_beyond_all_integers_are_refused() -> None:
    with pytest.raises(DataError, match="label 9223372036854775808, expected integers"):
        Dataset.from_arrays(IMAGES, np.array([0, 1, 2**63], np.uint64))


@pytest.mark.parametrize(
    ("shape", "layout", "stored", "input_shape"),
    [
        ((2, 8, 8), "auto", (2, 1, 8, 8), (1, 8, 8)),
        ((2, 3, 50), "auto", (2, 3, 50), (3, 1, 50)),
        ((2, 8, 6), "image", (2, 1, 8, 6), (1, 8, 6)),
        ((2, 8, 8), "signal", (2, 8, 8), (8, 1, 8)),
        ((2, 3, 1, 50), "auto", (2, 3, 1, 50), (3, 1, 50)),
    ],
    ids=["square", "signal", "image-said", "signal-said", "flat"],
)
def test_three_dimensional_arrays(shape: Any, layout: Any, stored: Any, input_shape: Any) -> None:
    data = Dataset.from_arrays(np.zeros(shape, np.float32), [0, 1], layout=layout)
    assert (data.images.shape, data.input_shape) == (stored, input_shape)


@pytest.mark.parametrize(
    ("x", "y", "match"),
    [
        (IMAGES, [0.0, 1.0, 0.0], r"labels have dtype float64, expected integers.*astype\(np.int64\)"),
        (IMAGES, np.eye(3, dtype=int), r"labels have shape \(3, 3\), expected \(N,\); use y.argmax"),
        (IMAGES, [0, 1], r"3 images but 2 labels"),
        (IMAGES, [0, 2, 2], r"class 1 \('1'\) has no example"),
        (IMAGES, [0, -1, 0], r"label -1 of image 1 is out of range, expected 0 to 0"),
        (IMAGES, [0, 1, MAX_CLASSES], rf"label {MAX_CLASSES} would need .* expected at most {MAX_CLASSES}"),
        (IMAGES.astype(np.int64) + 256, [0, 1, 0], r"dtype int64 with values 256 to 256, expected 0 to 255"),
        (IMAGES.astype(np.int64) - 1, [0, 1, 0], r"values -1 to -1, expected 0 to 255"),
        (IMAGES.astype(bool), [0, 1, 0], r"images have dtype bool, expected uint8 or float32"),
        (IMAGES.astype(complex), [0, 1, 0], r"images have dtype complex128"),
        (np.full((3, 1, 4, 4), 1e300), [0, 1, 0], r"image 0 holds NaN, infinity or a value beyond float32"),
        (IMAGES[:, 0, 0], [0, 1, 0], r"images have shape \(3, 4\), expected \(N, C, H, W\)"),
        (IMAGES[:0], [], r"labels have dtype float64"),
        (IMAGES[:0], np.zeros(0, int), r"images have shape \(0, 1, 4, 4\)"),
        (np.zeros((3, 8, 8, 3), np.uint8), [0, 1, 0], r"looks like \(N, H, W, C\).*transpose\(0, 3, 1, 2\)"),
        ([[1, 2], [3]], [0, 1], r"images are not one rectangular array"),
    ],
    ids=[
        "float-labels",
        "one-hot",
        "lengths",
        "empty-class",
        "negative-label",
        "huge-label",
        "integers-above-255",
        "integers-below-0",
        "bool",
        "complex",
        "beyond-float32",
        "two-dimensional",
        "no-image-float-labels",
        "no-image",
        "channels-last",
        "ragged",
    ],
)
def test_bad_arrays_are_refused(x: Any, y: Any, match: str) -> None:
    with pytest.raises(DataError, match=r"data set 'arrays': .*" + match):
        Dataset.from_arrays(x, y)


def test_non_finite_image_is_named() -> None:
    x = np.zeros((5, 1, 300, 300), np.float32)  # more than one chunk
    x[4, 0, 2, 2] = np.nan
    with pytest.raises(DataError, match="image 4 holds NaN"):
        Dataset.from_arrays(x, [0, 1, 0, 1, 0])


@pytest.mark.parametrize(
    ("names", "match"),
    [
        ((), r"class_names is \(\), expected a tuple of at least one string"),
        (("a", 1), r"expected a tuple of at least one string"),
        (("a", "a"), r"class name 'a' appears twice"),
        (("a",), r"label 1 of image 1 is out of range, expected 0 to 0 for 1 classes"),
        (("a", "b", "c"), r"class 2 \('c'\) has no example.*allow_missing_classes"),
    ],
    ids=["none", "number", "twice", "too-few", "too-many"],
)
def test_bad_class_names_are_refused(names: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Dataset.from_arrays(IMAGES, [0, 1, 0], names)


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (IMAGES.astype(np.float64), LABELS[:3], "images are float64, expected a uint8 or float32 array"),
        ([[1]], LABELS[:3], "images are list, expected"),
        (IMAGES, LABELS[:3].astype(np.int32), r"labels are int32, expected an int64 array \(N,\)"),
    ],
    ids=["float64", "list", "int32-labels"],
)
def test_constructor_takes_only_the_stored_dtypes(images: Any, labels: Any, match: str) -> None:
    with pytest.raises(DataError, match=match):
        Dataset(images, labels, ("a", "b", "c"), "direct")


def test_missing_classes_can_be_allowed() -> None:
    data = Dataset.from_arrays(IMAGES, [0, 2, 2], ["a", "b", "c"], allow_missing_classes=True)
    assert data.num_classes == 3


def test_unknown_layout_is_refused() -> None:
    with pytest.raises(UsageError, match="layout is 'nhwc', expected 'auto', 'image' or 'signal'"):
        Dataset.from_arrays(IMAGES, [0, 1, 0], layout="nhwc")  # type: ignore[arg-type]


def test_take_scales_bytes_to_unit_floats(data: Dataset) -> None:
    x, y = data.take([5, 0, 5])
    assert (x.dtype, y.dtype) == (np.float32, np.int64)
    assert np.array_equal(x, PIXELS[[5, 0, 5]] / np.float32(255))
    assert y.tolist() == [1, 0, 1]


def test_take_returns_new_arrays() -> None:
    stored = np.zeros((2, 1, 2, 2), np.float32)
    x, y = Dataset.from_arrays(stored, [0, 1]).take([0, 1])
    x += 1
    y += 1
    assert not stored.any()


@pytest.mark.parametrize(
    ("indices", "match"),
    [
        ([40], "index 40 is out of range, data set 'toy' has 0 to 39"),
        ([-1], "index -1 is out of range"),
        ([0.5], "indices have dtype float64"),
        ([[0]], r"shape \(1, 1\), expected integers"),
        ([True] * 40, "indices have dtype bool"),
    ],
    ids=["above", "negative", "float", "two-dimensional", "mask"],
)
def test_take_refuses_bad_indices(data: Dataset, indices: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        data.take(indices)


def test_subset_keeps_the_classes(data: Dataset) -> None:
    part = data.subset([0, 4])
    assert (len(part), part.num_classes, part.labels.tolist()) == (2, 4, [0, 0])


def test_empty_subset_is_refused(data: Dataset) -> None:
    with pytest.raises(DataError, match="data set 'toy': images have shape"):
        data.subset([])


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.8, 0.99])
def test_split_is_stratified_and_complete(data: Dataset, fraction: float) -> None:
    first, second = data.split(fraction, seed=3)
    per_class = min(max(round(10 * fraction), 1), 9)
    assert np.bincount(first.labels).tolist() == [per_class] * 4
    assert np.bincount(second.labels).tolist() == [10 - per_class] * 4
    together = np.concatenate([pixels_of(first), pixels_of(second)])
    assert sorted(image.tobytes() for image in together) == sorted(image.tobytes() for image in PIXELS)


def test_split_depends_on_the_seed_alone(data: Dataset) -> None:
    once, again, other = (data.split(0.5, seed=seed)[0] for seed in (1, 1, 2))
    assert np.array_equal(once.images, again.images)
    assert not np.array_equal(once.images, other.images)


def test_split_gives_a_single_example_to_the_first_part() -> None:
    first, second = Dataset.from_arrays(IMAGES, [0, 1, 0]).split(0.1, seed=0)
    assert sorted(first.labels) == [0, 1]
    assert second.labels.tolist() == [0]


def test_split_without_a_pair_is_refused() -> None:
    with pytest.raises(DataError, match="data set 'arrays': cannot be split, no class has two examples"):
        Dataset.from_arrays(IMAGES, [0, 1, 2]).split(0.5, seed=0)


@pytest.mark.parametrize(
    ("fraction", "seed", "match"),
    [
        (0.0, 0, "fraction is 0.0, expected more than 0 and less than 1"),
        (1, 0, "fraction is 1, expected"),
        (float("nan"), 0, "fraction is nan"),
        (0.5, -1, "seed is -1, expected a whole number of at least 0"),
        (0.5, 1.5, "seed is 1.5, expected a whole number"),
        (0.5, True, "seed is True, expected a whole number"),
    ],
    ids=["zero", "one", "nan", "negative-seed", "float-seed", "bool-seed"],
)
def test_split_refuses_bad_arguments(data: Dataset, fraction: float, seed: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        data.split(fraction, seed)


@pytest.mark.parametrize("shape", [(700, 3, 20, 20), (900, 2, 300)], ids=["images", "signals"])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_statistics_agree_with_float64(shape: tuple[int, ...], dtype: Any) -> None:
    x = np.random.default_rng(0).normal(120, 25, shape).clip(0, 255).astype(dtype)
    mean, std = Dataset.from_arrays(x, np.arange(len(x)) % 2).statistics()
    exact = x.astype(np.float64) / (255 if dtype == np.uint8 else 1)
    axes = (0, *range(2, x.ndim))
    assert (mean.dtype, std.dtype, mean.shape) == (np.float32, np.float32, (shape[1],))
    np.testing.assert_allclose(mean, exact.mean(axis=axes), rtol=1e-6)
    np.testing.assert_allclose(std, exact.std(axis=axes), rtol=1e-6)


def test_statistics_survive_a_large_offset() -> None:
    x = 1000 + np.random.default_rng(0).normal(0, 0.01, (50, 1, 9, 9)).astype(np.float32)
    _, std = Dataset.from_arrays(x, np.arange(50) % 2).statistics()
    np.testing.assert_allclose(std, x.astype(np.float64).std(), rtol=1e-6)


def test_deviation_of_a_constant_channel_is_one() -> None:
    x = np.random.default_rng(0).random((20, 3, 9, 9)).astype(np.float32)
    x[:, 0], x[:, 2] = 0.1, 0
    _, std = Dataset.from_arrays(x, np.arange(20) % 2).statistics()
    np.testing.assert_allclose(std, [1, x[:, 1].std(dtype=np.float64), 1], rtol=1e-6)


def test_deviation_of_a_weak_signal_is_kept() -> None:
    x = 1e-9 * np.random.default_rng(0).standard_normal((20, 1, 9, 9)).astype(np.float32)
    _, std = Dataset.from_arrays(x, np.arange(20) % 2).statistics()
    np.testing.assert_allclose(std, x.astype(np.float64).std(), rtol=1e-6)


def test_deviation_below_what_counts_is_one() -> None:
    mean, deviation = np.array([0.0, 0.5, 1e-35]), np.array([0.003, 0.3, 1e-36])
    np.testing.assert_array_equal(deviation_to_divide_by(mean, deviation, 0.004), np.float32([1, 0.3, 1]))
    np.testing.assert_array_equal(deviation_to_divide_by(mean, deviation), np.float32([0.003, 0.3, 1]))
