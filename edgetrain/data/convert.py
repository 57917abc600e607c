"""Arrays of any reasonable dtype into what a Dataset stores: uint8 or float32 images, int64 labels."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.arrays import array_of, pixels_of
from edgetrain.errors import DataError, UsageError

Images: TypeAlias = NDArray[np.uint8] | NDArray[np.float32]
ImageLayout: TypeAlias = Literal["auto", "image", "signal"]

# Beyond this a label is a mistake (an identifier, a time stamp), and naming the classes would fill memory.
MAX_CLASSES = 65536


def images_from(x: ArrayLike, layout: ImageLayout = "auto") -> Images:
    """Return ``x`` as uint8 or float32 of shape (N, C, H, W) or (N, C, W); copied only to change the dtype.

    ``layout`` says what a 3-D array is: "image" (N, H, W), one channel; "signal" (N, C, W); "auto" takes
    equal last dimensions for an image, everything else for a signal.

    Raises:
        DataError: the dtype or the shape cannot be images or signals.
        UsageError: unknown ``layout``.
    """
    if layout not in ("auto", "image", "signal"):
        raise UsageError(f"layout is {layout!r}, expected 'auto', 'image' or 'signal'")
    array = array_of(x, "images are")
    _refuse_channels_last(array.shape)
    if array.ndim == 3 and (layout == "image" or (layout == "auto" and array.shape[1] == array.shape[2])):
        array = array[:, None]
    return _to_stored_dtype(array)


def labels_from(y: ArrayLike) -> NDArray[np.int64]:
    """Return ``y`` as int64 of shape (N,); any integer dtype is accepted.

    Raises:
        DataError: not integers, or not one-dimensional.
    """
    array = array_of(y, "labels are")
    if array.ndim != 1:
        raise DataError(
            f"labels have shape {array.shape}, expected (N,); use y.argmax(axis=1) for one-hot labels"
            " or y.reshape(-1) for a column"
        )
    if array.dtype.kind not in "iu":
        raise DataError(
            f"labels have dtype {array.dtype}, expected integers 0, 1, 2, ...;"
            " use y.astype(np.int64) if they are class numbers"
        )
    if array.dtype == np.uint64 and array.max(initial=0) > np.iinfo(np.int64).max:
        raise DataError(f"label {array.max()}, expected integers 0, 1, 2, ..., one number per class")
    return array.astype(np.int64, copy=False)


def class_names_for(labels: NDArray[np.int64]) -> tuple[str, ...]:
    """Return the names "0", "1", ... up to the largest label; labels has shape (N,).

    Raises:
        DataError: a label beyond ``MAX_CLASSES``.
    """
    largest = int(labels.max(initial=0))
    if largest >= MAX_CLASSES:
        raise DataError(
            f"label {largest} would need {largest + 1} classes, expected at most {MAX_CLASSES};"
            " number the classes 0, 1, 2, ..."
        )
    return tuple(str(label) for label in range(max(largest, 0) + 1))


def _refuse_channels_last(shape: tuple[int, ...]) -> None:
    # (N, 32, 32, 3) would silently train as 32 channels of 32x3 pixels: a common mistake with foreign arrays.
    if len(shape) == 4 and shape[1] == shape[2] > 4 and shape[3] in (1, 3, 4):
        raise DataError(
            f"images have shape {shape}, which looks like (N, H, W, C), expected (N, C, H, W);"
            " use x.transpose(0, 3, 1, 2), or Dataset(...) directly if the channels do come first"
        )


def _to_stored_dtype(array: NDArray[Any]) -> Images:
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # an overflow becomes inf, and Dataset names the image that holds it
            return array.astype(np.float32, copy=False)
    if array.dtype.kind not in "iu":
        raise DataError(f"images have dtype {array.dtype}, expected uint8 or float32; use x.astype(np.float32)")
    return pixels_of(array, "images have")
