"""The input normalisation of a stream, from its first instances alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgetrain.data.images import deviation_to_divide_by
from edgetrain.graph import Normalization

# An instance whose largest number is so many times that of a usual one stands out.
STANDS_OUT = 100
# Unless more than such a share do, which then are the data.
_LARGEST_SHARE = 0.25
# Images whose deviation is below one grey level are as good as dark: their noise says nothing about what comes later.
_GREY_LEVEL = 1 / 255


def normalization_of(x: NDArray[np.float32]) -> Normalization:
    """Return mean and deviation of every channel of instances ``(N, C, ...)``."""
    axes = (0, *range(2, x.ndim))
    mean, deviation = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
    std = deviation_to_divide_by(mean, deviation, _GREY_LEVEL if _are_pixels(x) else 0.0)
    return Normalization(mean.astype(np.float32), std)


def sizes_of(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the largest number of each of the instances ``(N, ...)``, without its sign, float32 ``(N,)``."""
    sizes: NDArray[np.float32] = np.abs(x.reshape(len(x), -1)).max(1)
    return sizes


def standing_out(x: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Return which of the instances ``(N, ...)`` stand out by their largest number, bool ``(N,)``: a few, or none.

    One of them decides about the deviation of all, so that next to nothing is left of the others when they are divided
    by it. Numbers up to 1 never stand out: a bright image behind dark ones is nothing strange.

    Example:
        >>> standing_out(np.array([[0.5], [2.0], [-1e30], [0.0], [1.0]], np.float32))
        array([False, False,  True, False, False])
    """
    sizes = sizes_of(x)
    usual = float(np.median(sizes[sizes > 0])) if sizes.any() else 0.0
    found = (sizes > STANDS_OUT * usual) & (sizes > 1)
    return found if found.mean() <= _LARGEST_SHARE else np.zeros(len(x), bool)


def _are_pixels(x: NDArray[np.float32]) -> bool:
    """Tell whether all values are whole numbers of grey levels, as those of 8-bit images are."""
    return bool(x.min() >= 0 and x.max() <= 1) and np.array_equal(x, np.rint(x * 255) / np.float32(255))
