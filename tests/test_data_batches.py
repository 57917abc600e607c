"""Augmentation and batches: invariants, determinism, going on in the middle of an epoch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetrain.data import Augmentation, Dataset, batch_count, batches
from edgetrain.errors import UsageError

PIXELS = np.random.default_rng(7).integers(0, 256, (40, 3, 6, 5)).astype(np.uint8)
LABELS = np.arange(40, dtype=np.int64) % 4


@pytest.fixture
def data() -> Dataset:
    return Dataset.from_arrays(PIXELS, LABELS)


# Augmentation

AUGMENTATIONS = st.builds(Augmentation, st.booleans(), st.integers(0, 3), st.integers(0, 3))


@given(AUGMENTATIONS)
@settings(max_examples=30, deadline=None)
def test_describe_is_the_inverse_of_parse(augmentation: Augmentation) -> None:
    assert Augmentation.parse(augmentation.describe()) == augmentation


@given(AUGMENTATIONS, st.integers(1, 6), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_augmentation_is_deterministic_and_leaves_its_input(
    augmentation: Augmentation, count: int, seed: int
) -> None:
    x = np.random.default_rng(seed).random((count, 2, 5, 6), np.float32) + 1
    before = x.copy()
    once, again = (augmentation(x, np.random.default_rng(seed)) for _ in range(2))
    assert np.array_equal(once, again)
    assert np.array_equal(x, before)
    assert not np.shares_memory(once, x)
    assert (once.dtype, once.shape) == (np.float32, x.shape)
    for image, original in zip(once, x, strict=True):
        assert set(image.ravel()) <= {*original.ravel(), np.float32(0)}


def test_flip_mirrors_about_half_of_the_images() -> None:
    x = np.random.default_rng(0).random((400, 1, 3, 4), np.float32)
    out = Augmentation(flip=True)(x, np.random.default_rng(0))
    flipped = (out == x[..., ::-1]).all(axis=(1, 2, 3))
    kept = (out == x).all(axis=(1, 2, 3))
    assert (flipped ^ kept).all()
    assert 160 < flipped.sum() < 240


@pytest.mark.parametrize("text", ["crop:2", "shift:2"])
def test_moves_cover_all_offsets_with_zero_fill(text: str) -> None:
    x = np.arange(1, 21, dtype=np.float32).reshape(1, 1, 4, 5)
    out = Augmentation.parse(text)(np.repeat(x, 500, axis=0), np.random.default_rng(0))
    padded = np.pad(x[0, 0], 2)
    allowed = {padded[i : i + 4, j : j + 5].tobytes() for i in range(5) for j in range(5)}
    assert {image.tobytes() for image in out} == allowed


@pytest.mark.parametrize("shape", [(300, 2, 7), (300, 2, 1, 7)], ids=["NCW", "NC1W"])
def test_signals_shift_in_time_alone(shape: tuple[int, ...]) -> None:
    signal = np.arange(1, 15, dtype=np.float32).reshape(2, 7)
    x = np.broadcast_to(signal.reshape(1, *shape[1:]), shape).copy()
    out = Augmentation(shift=1)(x, np.random.default_rng(0))
    padded = np.pad(signal, ((0, 0), (1, 1)))
    assert out.shape == shape
    assert {item.tobytes() for item in out} == {padded[:, i : i + 7].tobytes() for i in range(3)}


@pytest.mark.parametrize("text", ["flip", "crop:1", "flip,shift:1"])
@pytest.mark.parametrize("shape", [(2, 3, 9), (2, 3, 1, 9)], ids=["NCW", "NC1W"])
def test_signals_refuse_flip_and_crop(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match=rf"augmentation '{text}' on signals .* expected 'shift' alone"):
        Augmentation.parse(text)(np.zeros(shape, np.float32), np.random.default_rng(0))


@pytest.mark.parametrize(
    ("text", "augmentation"),
    [
        ("", Augmentation()),
        ("none", Augmentation()),
        (" flip , crop:4 ", Augmentation(flip=True, crop_padding=4)),
        ("shift:2,flip", Augmentation(flip=True, shift=2)),
    ],
    ids=["empty", "none", "spaces", "any-order"],
)
def test_parse(text: str, augmentation: Augmentation) -> None:
    assert Augmentation.parse(text) == augmentation


@pytest.mark.parametrize(
    "text", ["rotate", "crop", "crop:-1", "crop:x", "flip:1", "flip,", "shift:1.5", "flip:"]
)
def test_parse_refuses_nonsense(text: str) -> None:
    with pytest.raises(
        UsageError, match=rf"augmentation '{text}': cannot read .* expected 'none' or a comma"
    ):
        Augmentation.parse(text)


def test_parse_refuses_repetition() -> None:
    with pytest.raises(UsageError, match="has 'flip' twice"):
        Augmentation.parse("flip,flip")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"flip": 1}, "flip is 1, expected True or False"),
        ({"crop_padding": -1}, "crop_padding is -1, expected a whole number of at least 0"),
        ({"shift": 0.5}, "shift is 0.5, expected a whole number"),
    ],
    ids=["flip", "crop", "shift"],
)
def test_augmentation_checks_its_arguments(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Augmentation(**arguments)


@pytest.mark.parametrize(
    ("x", "match"),
    [
        (np.zeros((1, 1, 8, 8)), r"got float64 of shape \(1, 1, 8, 8\), expected float32"),
        (np.zeros((8, 8), np.float32), r"got float32 of shape \(8, 8\)"),
        (np.zeros((1, 1, 9, 3), np.float32), r"moves by up to 3, expected less than 3, the smallest side"),
    ],
    ids=["float64", "two-dimensional", "too-small"],
)
def test_augmentation_refuses_bad_batches(x: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        Augmentation(shift=3)(x, np.random.default_rng(0))


# Batches


def epoch_of(data: Dataset, **changes: Any) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    arguments: dict[str, Any] = {
        "seed": 5,
        "epoch": 2,
        "augmentation": Augmentation(flip=True, crop_padding=1, shift=1),
    }
    return list(batches(data, 7, **(arguments | changes)))


def equal(left: Any, right: Any) -> bool:
    return len(left) == len(right) and all(
        np.array_equal(x, other_x) and np.array_equal(y, other_y)
        for (x, y), (other_x, other_y) in zip(left, right, strict=True)
    )


def test_every_image_comes_once_and_the_last_batch_is_partial(data: Dataset) -> None:
    epoch = epoch_of(data, augmentation=None)
    assert [len(y) for _, y in epoch] == [7, 7, 7, 7, 7, 5]
    x = np.concatenate([x for x, _ in epoch])
    assert sorted(image.tobytes() for image in x) == sorted(
        image.tobytes() for image in data.take(range(40))[0]
    )


@pytest.mark.parametrize("start", range(7))
def test_an_epoch_continues_bit_for_bit(data: Dataset, start: int) -> None:
    assert equal(epoch_of(data)[start:], epoch_of(data, start=start))


def test_augmentation_leaves_the_order_alone(data: Dataset) -> None:
    with_it, without = epoch_of(data), epoch_of(data, augmentation=None)
    assert [y.tolist() for _, y in with_it] == [y.tolist() for _, y in without]


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 3}], ids=["seed", "epoch"])
@pytest.mark.parametrize("shuffle", [True, False], ids=["order", "augmentation"])
def test_another_seed_or_epoch_is_another_sequence(data: Dataset, change: Any, shuffle: bool) -> None:
    assert not equal(epoch_of(data, shuffle=shuffle), epoch_of(data, shuffle=shuffle, **change))


def test_batches_of_one_epoch_are_augmented_differently() -> None:
    same = Dataset.from_arrays(np.repeat(PIXELS[:1], 20, axis=0), np.arange(20) % 2)
    first, second = batches(same, 10, seed=0, epoch=0, augmentation=Augmentation(shift=2))
    assert not np.array_equal(first[0], second[0])


def test_without_shuffling_the_order_is_that_of_the_set(data: Dataset) -> None:
    epoch = epoch_of(data, shuffle=False, augmentation=None)
    assert np.array_equal(np.concatenate([y for _, y in epoch]), LABELS)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"start": 7}, "start is 7, expected at most 6, the number of batches in an epoch"),
        ({"start": -1}, "start is -1, expected a whole number of at least 0"),
        ({"seed": -1}, "seed is -1"),
        ({"epoch": 0.5}, "epoch is 0.5"),
    ],
    ids=["start-above", "start-negative", "seed", "epoch"],
)
def test_batches_refuse_bad_arguments_at_once(data: Dataset, changes: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match):
        batches(data, 7, **({"seed": 0, "epoch": 0} | changes))


@pytest.mark.parametrize(("n", "size", "count"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_batch_count(n: int, size: int, count: int) -> None:
    assert batch_count(n, size) == count


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(UsageError, match="batch_size is 0, expected a whole number of at least 1"):
        batch_count(4, 0)
