"""What data sets of labels and of targets do with their images or signals: checks, chosen ones, statistics."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.data.convert import Images
from edgetrain.errors import DataError, UsageError

# Smallest standard deviation that channel_statistics() reports: a constant channel must not divide by zero.
STD_FLOOR = 1e-6

# Elements converted at a time in whole-set passes: 2 MiB as float64, whatever the size of the set.
_CHUNK_ELEMENTS = 1 << 18


def check_images(images: Images) -> None:
    """Refuse what is not uint8 or finite float32 of shape (N, C, H, W) or (N, C, W) with N >= 1.

    Raises:
        DataError: another type or shape, or a number that is not finite.
    """
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
        found = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"images are {found}, expected a uint8 or float32 array; see Dataset.from_arrays")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"images have shape {images.shape}, expected (N, C, H, W) or (N, C, W), every size at least 1")
    if images.dtype == np.float32:
        _check_finite(images)


def sizes_of(images: Images) -> tuple[int, int, int]:
    """Return (C, H, W) of images (N, C, H, W); a signal (N, C, W) counts as height 1."""
    channels, *space = images.shape[1:]
    return (channels, 1, space[0]) if len(space) == 1 else (channels, space[0], space[1])


def checked_indices(indices: ArrayLike, count: int, name: str) -> NDArray[np.intp]:
    """Return indices (n,) into the ``count`` images of the data set ``name``.

    Raises:
        UsageError: an index is out of range or not an integer.
    """
    array = np.asarray(indices)
    if array.size == 0:
        return np.zeros(0, np.intp)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UsageError(f"indices have dtype {array.dtype} and shape {array.shape}, expected integers (n,)")
    low, high = int(array.min()), int(array.max())
    if low < 0 or high >= count:
        wrong = low if low < 0 else high
        raise UsageError(f"index {wrong} is out of range, data set {name!r} has 0 to {count - 1}")
    return array.astype(np.intp, copy=False)


def channel_statistics(images: Images) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return mean and standard deviation of every channel, each float32 (C,); see ``Dataset.statistics``."""
    mean = _channel_average(images, np.zeros((images.shape[1], 1)), power=1)
    variance = _channel_average(images, mean[:, None], power=2)
    return mean.astype(np.float32), np.maximum(np.sqrt(variance), STD_FLOOR).astype(np.float32)


def _channel_average(images: Images, centre: NDArray[np.float64], power: int) -> NDArray[np.float64]:
    """Return the average of (value - centre) ** power per channel; two passes lose no digits."""
    total = np.zeros(images.shape[1])
    for chunk in _chunks(images):
        values = chunk.reshape(*chunk.shape[:2], -1).astype(np.float64)
        if chunk.dtype == np.uint8:
            values /= 255
        values -= centre
        total += (values**power).sum(axis=(0, 2))
    average: NDArray[np.float64] = total * images.shape[1] / images.size
    return average


def _chunks(images: Images) -> Iterator[Images]:
    rows = max(1, _CHUNK_ELEMENTS * len(images) // images.size)
    for first in range(0, len(images), rows):
        yield images[first : first + rows]


def _check_finite(images: Images) -> None:
    seen = 0
    for chunk in _chunks(images):
        finite = np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        if not finite.all():
            raise DataError(
                f"image {seen + int(finite.argmin())} holds NaN, infinity or a value beyond float32,"
                " expected finite numbers; repair it or leave it out"
            )
        seen += len(chunk)
