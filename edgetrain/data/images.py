"""What data sets of labels and of targets do with their images or signals: checks, chosen ones, statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.data.convert import Images
from edgetrain.errors import DataError, UsageError

# A channel is constant when its deviation is below this part of its mean (rounding in float32 gives as much), or so
# small that float32 has no inverse of it.
_CONSTANT, _NO_INVERSE = 1e-6, 1e-30

# Elements converted at a time in whole-set passes: 2 MiB as float64, whatever the size of the set.
_CHUNK_ELEMENTS = 1 << 18


def check_images(images: Images, named: Callable[[int], str] = "image {}".format) -> None:
    """Refuse what is not uint8 or finite float32 of shape (N, C, H, W) or (N, C, W) with N >= 1.

    Args:
        images: to check.
        named: returns what a message calls an image, by its index.

    Raises:
        DataError: another type or shape, or a number that is not finite.
    """
    if not isinstance(images, np.ndarray) or images.dtype not in (np.uint8, np.float32):
        found = getattr(images, "dtype", type(images).__name__)
        raise DataError(f"images are {found}, expected a uint8 or float32 array; see Dataset.from_arrays")
    if images.ndim not in (3, 4) or 0 in images.shape:
        raise DataError(f"images have shape {images.shape}, expected (N, C, H, W) or (N, C, W), every size at least 1")
    if images.dtype == np.float32:
        _check_finite(images, named)


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
    return mean.astype(np.float32), deviation_to_divide_by(mean, np.sqrt(variance))


def deviation_to_divide_by(
    mean: NDArray[np.float64], deviation: NDArray[np.float64], smallest: float = 0.0
) -> NDArray[np.float32]:
    """Return the deviation of every channel, 1 where the channel is constant.

    A tiny number instead of 1 would make a million of every value that is not that constant. scikit-learn's
    ``StandardScaler`` does the same.

    Args:
        mean, deviation: of every channel, shape (C,).
        smallest: a deviation below it counts as none.

    Returns:
        float32 (C,), every entry above 0.

    Example:
        >>> deviation_to_divide_by(np.array([0.5, 0.0]), np.array([0.3, 0.0]))
        array([0.3, 1. ], dtype=float32)
    """
    constant = deviation < np.maximum(np.maximum(_CONSTANT * np.abs(mean), _NO_INVERSE), smallest)
    return np.where(constant, 1.0, deviation).astype(np.float32)


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


def _check_finite(images: Images, named: Callable[[int], str]) -> None:
    seen = 0
    for chunk in _chunks(images):
        finite = np.isfinite(chunk).reshape(len(chunk), -1).all(axis=1)
        if not finite.all():
            raise DataError(
                f"{named(seen + int(finite.argmin()))} holds NaN, infinity or a value beyond float32,"
                " expected finite numbers; repair it or leave it out"
            )
        seen += len(chunk)
