"""Arrays at the door, and how samples lie in memory behind it.

Floor 0. A ``Layout`` describes one batched value in lanes (docs/architecture.md,
"One lane, one sample"): ``[blocks][channels][top + rows + bottom][left + columns +
right][lanes]`` float32, the border being zeros.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import DataError

ALIGNMENT = 64  # bytes; a cache line, and the largest vector


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


def aligned(count: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Return ``count`` zeros that start at a multiple of ``ALIGNMENT`` bytes."""
    size = np.dtype(dtype).itemsize
    raw = np.zeros(count * size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + count * size].view(dtype)


class Checked(dict[str, Any]):
    """Inputs by name that have passed ``batch_of``: checking them again took a tenth of a stream's time."""


def batch_of(x: Any, shape: tuple[int, ...], what: str = "x") -> NDArray[np.float32]:
    """Check a batch of samples and return it as dense float32 ``(N, *shape)``; the input is not modified.

    A one-dimensional signal may come as ``(N, C, 1, W)`` as well as ``(N, C, W)``.

    Raises:
        DataError: another shape or type, no sample, or a number that is not finite.
    """
    array = np.asarray(x)
    if array.dtype.kind not in "fiub":
        raise DataError(f"{what}: dtype {array.dtype} given, expected float32; convert it with astype")
    if array.shape[1:] != shape and math.prod(array.shape[1:]) == math.prod(shape) and 1 in array.shape[2:]:
        array = array.reshape(array.shape[0], *shape)
    if array.ndim != len(shape) + 1 or array.shape[1:] != shape:
        wanted, hint = "x".join(["N", *map(str, shape)]), ""
        if array.shape == shape:
            hint = "; add the batch dimension: x[None]"
        raise DataError(f"{what}: shape {array.shape} given, the network expects ({wanted}){hint}")
    if array.shape[0] < 1:
        raise DataError(f"{what}: no sample given, expected at least one")
    with np.errstate(over="ignore", invalid="ignore"):  # what overflows or is NaN is refused below, without a warning
        dense = np.ascontiguousarray(array, np.float32)
    if not np.isfinite(dense).all():  # half the time of looking at the sum
        raise DataError(f"{what}: contains NaN or infinite numbers; clean the data first")
    return dense


def labels_of(y: Any, count: int, classes: int) -> NDArray[np.int64]:
    """Check labels and return them as int64 ``(N,)``.

    Raises:
        DataError: not integers, another number than samples, or out of range.
    """
    array = np.asarray(y)
    if array.dtype.kind not in "iu":
        raise DataError(f"y: dtype {array.dtype} given, expected integer class labels")
    if array.shape != (count,):
        raise DataError(f"y: shape {array.shape} given, expected ({count},): one label per sample")
    labels = array.astype(np.int64)
    wrong = labels[(labels < 0) | (labels >= classes)]
    if wrong.size:
        raise DataError(f"y: label {wrong[0]} given, expected 0 to {classes - 1}: the network has {classes} outputs")
    return labels
