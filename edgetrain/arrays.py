"""Arrays at the door, and how samples lie in memory behind it.

A ``Layout`` describes one batched value in lanes (docs/architecture.md,
"One lane, one sample"): ``[blocks][channels][top + rows + bottom][left + columns +
right][lanes]`` float32, the border being zeros.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import DataError

ALIGNMENT = 64  # bytes; a cache line, and the largest vector
READ_BEHIND = 16 * ALIGNMENT  # bytes behind the last row of weights that a tile may read, not use
_MANY = 1 << 15  # numbers, of which the largest and the smallest are looked for sooner than all are looked at


@dataclass(frozen=True)
class Layout:
    """Sizes and byte strides of a batched value.

    Attributes:
        blocks: groups of ``lanes`` samples; single samples when lanes hold channels.
        lanes: samples, or channels, interleaved in a vector.
        channels, rows, columns: of one sample; a signal has one row, a vector of features one pixel.
        border: zeros above, left, below, right of every map, in pixels.
        by_channel: whether the lanes hold channels of one sample instead of samples.
    """

    blocks: int
    lanes: int
    channels: int
    rows: int
    columns: int
    border: tuple[int, int, int, int] = (0, 0, 0, 0)
    by_channel: bool = False

    @property
    def maps(self) -> int:
        """Maps of vectors in a block."""
        return -(-self.channels // self.lanes) if self.by_channel else self.channels

    def at(self, channel: int) -> int:
        """Byte offset of a channel within a block."""
        if self.by_channel:
            return channel // self.lanes * self.channel + 4 * (channel % self.lanes)
        return channel * self.channel

    def offset(self, place: tuple[int, int, int]) -> int:
        """Byte offset of (channel, row, column) within a block."""
        return self.at(place[0]) + place[1] * self.row + place[2] * self.pixel

    def elements(self) -> list[int]:
        """Byte offsets of all elements of a sample in ONNX order."""
        places = itertools.product(range(self.channels), range(self.rows), range(self.columns))
        return [self.offset(place) for place in places]

    @property
    def pixel(self) -> int:
        """Bytes from a pixel to the next."""
        return 4 * self.lanes

    @property
    def row(self) -> int:
        """Bytes from a row to the next."""
        return (self.border[1] + self.columns + self.border[3]) * self.pixel

    @property
    def channel(self) -> int:
        """Bytes from a map to the next."""
        return (self.border[0] + self.rows + self.border[2]) * self.row

    @property
    def block(self) -> int:
        """Bytes from a block to the next."""
        return self.maps * self.channel

    @property
    def nbytes(self) -> int:
        """Bytes of the whole value."""
        return self.blocks * self.block

    @property
    def origin(self) -> int:
        """Byte offset of the first pixel inside the border."""
        return self.border[0] * self.row + self.border[1] * self.pixel

    @property
    def bordered(self) -> bool:
        """Whether there is a border at all."""
        return any(self.border)

    @property
    def planes(self) -> int:
        """Number of maps, all blocks together."""
        return self.blocks * self.maps


def map_sizes(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Return (channels, rows, columns) of a per-sample shape of any rank.

    Example:
        >>> map_sizes((16, 8, 8)), map_sizes((6, 128)), map_sizes((10,)), map_sizes(())
        ((16, 8, 8), (6, 1, 128), (10, 1, 1), (1, 1, 1))
    """
    channels = shape[0] if shape else 1
    columns = shape[-1] if len(shape) > 1 else 1
    return channels, math.prod(shape[1:-1]), columns


def packed_words(count: int, bits: int) -> int:
    """Return how many words of 32 bits hold ``count`` numbers of ``bits`` bits, of which a word holds a whole number.

    Example:
        >>> packed_words(25, 2), packed_words(196, 1)
        (2, 7)
    """
    return -(-count // (32 // bits))


def mask_words(pixels: int) -> int:
    """Return how many words hold a bit per pixel of a map, for each lane: four vectors side by side have room, too.

    Example:
        >>> mask_words(1024), mask_words(196)
        (32, 8)
    """
    return -(-packed_words(pixels, 1) // 4) * 4


def aligned(count: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Return ``count`` zeros that start at a multiple of ``ALIGNMENT`` bytes."""
    size = np.dtype(dtype).itemsize
    raw = np.zeros(count * size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * size].view(dtype)


class Checked(dict[str, Any]):
    """Inputs by name that have passed ``batch_of``: checking them again took a tenth of a stream's time."""


def array_of(values: Any, what: str) -> NDArray[Any]:
    """Return values as an array; ``what`` begins the message.

    Raises:
        DataError: nested lists of different lengths, or what cannot be read as an array.
    """
    try:
        return np.asarray(values)
    except ValueError as error:
        raise DataError(f"{what} not one rectangular array ({error}); all samples must have one shape") from error
    except (RuntimeError, TypeError) as error:  # a tensor of PyTorch that wants a gradient, or is on another device
        raise DataError(f"{what} not an array ({error})") from error


def batch_of(x: Any, shape: tuple[int, ...], what: str = "x") -> NDArray[np.float32]:
    """Check a batch of inputs and return it as dense float32 ``(N, *shape)``; the input is not modified.

    Floats are taken as they are. Integers are pixels, as in a ``Dataset``: 0 to 255, divided by 255.
    A signal ``(C, W)`` may come as ``(N, C, 1, W)`` and the other way round, an image ``(1, H, W)`` as ``(N, H, W)``.

    Raises:
        DataError: another shape or type, no sample, integers that are no pixels, or a number that is not finite.
    """
    array = array_of(x, f"{what} is")
    if array.dtype.kind not in "fiu":
        raise DataError(f"{what}: dtype {array.dtype} given, expected float32; convert it with astype")
    array = _shaped(array, shape, what)
    return _dense(array if array.dtype.kind == "f" else scaled(pixels_of(array, f"{what} has")), what)


def sample_count(arrays: Mapping[str, NDArray[Any]]) -> int:
    """Return the common number of samples of inputs ``(N, ...)`` by name.

    Raises:
        DataError: they have different numbers.

    Example:
        >>> sample_count({"left": np.zeros((3, 1)), "right": np.zeros((3, 7))})
        3
    """
    first, *others = (len(array) for array in arrays.values())
    if any(other != first for other in others):
        lengths = {name: len(array) for name, array in arrays.items()}
        raise DataError(f"inputs have different numbers of samples: {lengths}")
    return first


def targets_of(y: Any, count: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Check the targets of ``count`` samples and return them as dense float32 ``(N, *shape)``, integers as they are.

    Raises:
        DataError: another shape or type, another number than samples, or a number that is not finite.
    """
    array = array_of(y, "y is")
    if array.dtype.kind not in "fiub":
        raise DataError(f"y: dtype {array.dtype} given, expected float32; convert it with astype")
    targets = _dense(_shaped(array, shape, "y"), "y")
    if len(targets) != count:
        raise DataError(f"inputs have different numbers of samples: {{'x': {count}, 'y': {len(targets)}}}")
    return targets


def pixels_of(array: NDArray[Any], what: str) -> NDArray[np.uint8]:
    """Return an array of integers as uint8, copied only to change the dtype; ``what`` begins the message.

    Raises:
        DataError: a number below 0 or above 255.
    """
    if array.dtype != np.uint8 and array.size:
        low, high = int(array.min()), int(array.max())
        if low < 0 or high > 255:
            raise DataError(
                f"{what} dtype {array.dtype} with values {low} to {high}, expected 0 to 255, as integers are pixels;"
                " scale other numbers and use x.astype(np.float32)"
            )
    return array.astype(np.uint8, copy=False)


def scaled(images: NDArray[np.uint8] | NDArray[np.float32]) -> NDArray[np.float32]:
    """Return uint8 pixels as float32 from 0 to 1; float32 numbers as they are, without a copy.

    Example:
        >>> scaled(np.array([0, 51, 255], np.uint8)).tolist()
        [0.0, 0.20000000298023224, 1.0]
    """
    values = images.astype(np.float32, copy=False)
    if images.dtype == np.uint8:
        values /= np.float32(255)
    return values


def _shaped(array: NDArray[Any], shape: tuple[int, ...], what: str) -> NDArray[Any]:
    """Return a batch as ``(N, *shape)``.

    Raises:
        DataError: another shape, or no sample.
    """
    if array.shape[1:] != shape and array.shape[1:] in _other_shapes(shape):
        array = array.reshape(array.shape[0], *shape)
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
        wanted, hint = "x".join(["N", *map(str, shape)]), ""
        if array.shape == shape:
            hint = "; add the batch dimension: x[None]"
        elif array.ndim == 4 and array.shape[1:] == (*shape[1:], shape[0]):
            hint = "; channels come first: x.transpose(0, 3, 1, 2)"
        raise DataError(f"{what}: shape {array.shape} given, the network expects ({wanted}){hint}")
    if array.shape[0] < 1:
        raise DataError(f"{what}: no sample given, expected at least one")
    return array


def _other_shapes(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the shapes that mean the same samples: a signal with or without its row, an image without its channel."""
    if len(shape) == 2:
        return [(shape[0], 1, shape[1])]
    return [shape[:axis] + shape[axis + 1 :] for axis in (0, 1) if len(shape) == 3 and shape[axis] == 1]


def _dense(array: NDArray[Any], what: str) -> NDArray[np.float32]:
    """Return an array as contiguous float32.

    Raises:
        DataError: a number that is not finite.
    """
    dense: NDArray[np.float32] = array
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows or is NaN is refused below, without warning
            dense = np.ascontiguousarray(array, np.float32)
    if not _finite(dense):
        raise DataError(f"{what}: contains NaN or infinite numbers; clean the data first")
    return dense


def _finite(array: NDArray[np.float32]) -> bool:
    """Whether all numbers are finite.

    The largest and the smallest tell, too, without an array of a byte per number: 256 images of 28x28 that are in no
    cache take 52 us so and 80 the other way, which takes less where there are few (one image 2.2 us and 3.2).
    """
    if array.size < _MANY:
        return bool(np.isfinite(array).all())
    return math.isfinite(array.max()) and math.isfinite(array.min())  # NaN is passed on by both


def labels_of(y: Any, count: int, classes: int) -> NDArray[np.int64]:
    """Check labels and return them as int64 ``(N,)``.

    Raises:
        DataError: not integers, another number than samples, or out of range.
    """
    array = array_of(y, "y is")
    if array.dtype.kind not in "iu":
        raise DataError(f"y: dtype {array.dtype} given, expected integer class labels")
    if array.shape != (count,):
        raise DataError(f"y: shape {array.shape} given, expected ({count},): one label per sample")
    labels = array.astype(np.int64)
    if labels.view(np.uint64).max(initial=0) >= classes:  # one look: those below 0 are large so
        wrong = array[(labels < 0) | (labels >= classes)]
        raise DataError(f"y: label {wrong[0]} given, expected 0 to {classes - 1}: the network has {classes} outputs")
    return labels
