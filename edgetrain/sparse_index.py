"""Which weights of one product exist: compressed sparse rows over a weight's ONNX array.

Kernels read the arrays of an index while they run; a new topology is written into the same memory, so no plan has to
be made again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.arrays import aligned
from edgetrain.errors import UsageError

WORD = 16  # weights that a word of ``SparseIndex.bits`` tells of
_BLOCK = 1 << 20  # bytes, about, that writing them takes beside what is kept
Mask = NDArray[np.bool_]
Positions = NDArray[np.int64]
Floats = NDArray[np.float32]


class SparseIndex:
    """The places of a weight's non-zeros, row by row; a row is one output channel, over all groups.

    Within a row the entries are ascending by column. A row may be empty or full.

    Args:
        shape: of the weight in ONNX layout: ``(O, C / groups, [KH,] KW)``, or two sizes for Gemm and MatMul.
        capacity: most entries there can be; all weights by default.
        inputs_first: a Gemm's weights are ``(inputs, outputs)`` instead of ``(outputs, inputs)``.
        groups: of the convolution.
        compact: the values lie one after another in the order of the entries, ``capacity`` floats in all, and there
            is no dense array; otherwise the dense array stays and ``places`` point into it.

    Attributes:
        shape, inputs_first, groups, compact, capacity: as given.
        count, size: number of weights that exist, and of all.
        input_rows: input channels, over all groups.
        rows, row_size: output channels; weights of one of them.
        taps: weights of one (output channel, input channel): ``KH * KW``, 1 for Gemm and MatMul.
        starts: int32 ``(rows + 1,)``: first entry of every row; the last one is ``count``.
        columns: int32 ``(capacity,)``: input channel within the group times ``taps`` plus tap.
        places: int32 ``(capacity,)``: the value's index in the weight's storage, in floats.
        input_starts, input_columns, input_places: the same entries ordered by input channel (over all groups) and
            output channel, for the input gradient: ``input_columns`` is the output channel within the group times
            ``taps`` plus tap.
        bits: uint16 ``(rows * row_words,)``: which columns of a row exist, a bit each, the first one lowest. If not
            compact, the rows are those of the ONNX array in any case; of compact weights ``None`` until ``keep_bits``.
        row_words: words of a row in ``bits``.

    The arrays keep their addresses and sizes for life; what stands behind ``count`` is 0.

    Raises:
        UsageError: the shape or the capacity makes no sense.

    Example:
        >>> index = SparseIndex((2, 3), capacity=4)
        >>> index.set([[True, False, True], [False, True, False]])
        >>> index.starts.tolist(), index.columns.tolist(), index.places.tolist(), index.density
        ([0, 2, 3], [0, 2, 1, 0], [0, 1, 2, 0], 0.5)
        >>> index.input_starts.tolist(), index.input_columns.tolist(), index.input_places.tolist()
        ([0, 1, 2, 3], [0, 1, 0, 0], [0, 2, 1, 0])
        >>> index.keep_bits()
        >>> index.bits.tolist()
        [5, 2]
    """

    def __init__(
        self, shape: Sequence[int], capacity: int | None = None, *, inputs_first: bool = False, groups: int = 1,
        compact: bool = True,
    ) -> None:  # fmt: skip
        self.shape, self.inputs_first, self.groups, self.compact = tuple(shape), inputs_first, groups, compact
        if len(self.shape) not in (2, 3, 4) or (inputs_first and len(self.shape) != 2):
            raise UsageError(f"sparse index: shape {self.shape}, expected the weights of a Conv, Gemm or MatMul")
        by_row = self.shape[::-1] if inputs_first else self.shape
        self.rows, self.row_size = by_row[0], int(np.prod(by_row[1:]))
        self.size = self.rows * self.row_size
        self.taps = int(np.prod(by_row[2:]))
        self.capacity = self.size if capacity is None else capacity
        if not 0 <= self.capacity <= self.size < 2**31:
            raise UsageError(f"sparse index: capacity={capacity}, expected 0 to {self.size} weights")
        if self.rows % groups:
            raise UsageError(f"sparse index: {self.rows} output channels, not divisible by groups={groups}")
        self.input_rows = groups * self.row_size // self.taps
        self.count = 0  # read for every layer in every step
        self.starts, self.columns, self.places = (
            aligned(size, np.int32) for size in (self.rows + 1, self.capacity, self.capacity)
        )
        self.input_starts, self.input_columns, self.input_places = (
            aligned(size, np.int32) for size in (self.input_rows + 1, self.capacity, self.capacity)
        )
        self._line = self.rows if inputs_first else self.row_size  # numbers side by side in the ONNX array
        self.row_words = -(-self._line // WORD)
        self.bits: NDArray[np.uint16] | None = None
        if not compact:
            self.keep_bits()

    @property
    def density(self) -> float:
        """Share of weights that exist."""
        return self.count / self.size

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        words = 0 if self.bits is None else int(self.bits.nbytes)
        return 4 * (self.rows + 1 + self.input_rows + 1 + 4 * self.capacity) + words

    def keep_bits(self) -> None:
        """Keep ``bits`` from now on; not where columns do not lie side by side (compact, ``inputs_first``)."""
        if self.bits is None and not (self.compact and self.inputs_first):
            self.bits = aligned(self.size // self._line * self.row_words, np.uint16)
            self._write_bits(self.bits, np.repeat(np.arange(self.rows), np.diff(self.starts)))

    def set(self, mask: ArrayLike) -> None:
        """Take another topology; the values are the caller's business.

        Args:
            mask: which weights exist, bool in the weight's ONNX shape.

        Raises:
            UsageError: another shape, or more entries than ``capacity``.
        """
        given = np.asarray(mask, bool)
        if given.shape != self.shape:
            raise UsageError(f"sparse index: a mask of shape {given.shape}, expected {self.shape}")
        self.set_positions(np.flatnonzero(given))

    def set_positions(self, positions: Positions) -> None:
        """Take another topology without a dense mask; the values are the caller's business.

        Args:
            positions: indices of the weights that exist in the flat ONNX array, ascending, int64 ``(count,)``.

        Raises:
            UsageError: more entries than ``capacity``.
        """
        count = len(positions)
        if count > self.capacity:
            raise UsageError(f"sparse index: {count} weights given, there is room for {self.capacity}")
        owners, columns = self._by_row(positions.astype(np.int32))  # any fits; a change takes half as much memory so
        self.count, self.starts[0] = count, 0
        self.starts[1:] = np.cumsum(np.bincount(owners, minlength=self.rows))
        self.columns[:count], self.columns[count:] = columns, 0
        self.places[:count] = np.arange(count) if self.compact else self._flat(owners, columns)
        self.places[count:] = 0
        self._transpose(owners, count)
        if self.bits is not None:
            self._write_bits(self.bits, owners)

    def positions_of(self, starts: ArrayLike, columns: ArrayLike) -> Positions:
        """Return the topology of which ``starts`` and the first ``count`` of ``columns`` were kept.

        Returns:
            For ``set_positions``.

        Raises:
            UsageError: they are those of another index.
        """
        first, places = np.asarray(starts), np.asarray(columns)
        fits = first.shape == self.starts.shape and places.shape == (first[-1],) and bool((np.diff(first) >= 0).all())
        if not fits or len(places) > self.capacity or not ((places >= 0) & (places < self.row_size)).all():
            raise UsageError(f"sparse index: starts {first.shape} and columns {places.shape} of another index")
        return np.sort(self._flat(np.repeat(np.arange(self.rows), np.diff(first)), places.astype(np.int64)))

    def _transpose(self, owners: Positions, count: int) -> None:
        """Write the entries by input channel; ``owners``: the row of every entry."""
        group, output = _divided(owners, self.rows // self.groups)
        channel, tap = _divided(self.columns[:count], self.taps)
        inputs, places = group * (self.row_size // self.taps) + channel, output * self.taps + tap
        del group, output, channel, tap  # a third of the memory of a change
        order = _order(inputs, self.input_rows)  # entries are ascending by output channel already
        self.input_starts[0] = 0
        self.input_starts[1:] = np.cumsum(np.bincount(inputs, minlength=self.input_rows))
        self.input_columns[:count] = places[order]
        self.input_places[:count] = self.places[:count][order]
        self.input_columns[count:] = self.input_places[count:] = 0

    def _write_bits(self, bits: NDArray[np.uint16], owners: Positions) -> None:
        """Write the bit of every entry; ``owners``: the rows of all entries.

        Some rows at a time, as bytes first: half of 48,000 bits take 0.08 ms so, set one by one 0.46. Rows of the ONNX
        array that are not those of the entries (``inputs_first``) are written at once, there is a dense array anyway.
        """
        line, column = owners, self.columns[: self.count]
        if self.inputs_first:
            line, column = column, owners
        width, lines = WORD * self.row_words, len(bits) // max(1, self.row_words)
        step = lines if self.inputs_first else _BLOCK // width + 1
        for first in range(0, lines, max(1, step)):
            inside = slice(None) if self.inputs_first else slice(*np.searchsorted(line, (first, first + step)))
            flags = np.zeros(min(step, lines - first) * width, bool)
            flags[(line[inside] - first) * width + column[inside]] = True
            bits[first * self.row_words :][: len(flags) // WORD] = np.packbits(flags, bitorder="little").view("<u2")

    def mask(self) -> Mask:
        """Return which weights exist, bool in the weight's ONNX shape."""
        mask = np.zeros(self.size, bool)
        mask[self.positions()] = True
        return mask.reshape(self.shape)

    def ascending(self) -> tuple[Positions, Positions | slice]:
        """Return the entries' positions in ascending order, and what puts an array of their values into that order."""
        order = self.order()
        return self.positions()[order], order

    def order(self) -> Positions | slice:
        """Return what puts an array of the entries' values into the order of their ascending positions."""
        return np.argsort(self.positions()) if self.inputs_first else slice(0, self.count)

    def positions(self) -> Positions:
        """Return the entries' indices in the flat ONNX array int64 ``(count,)``, in the order of the entries."""
        owners = np.repeat(np.arange(self.rows), np.diff(self.starts))
        return self._flat(owners, self.columns[: self.count].astype(np.int64))

    def values_of(self, dense: ArrayLike) -> Floats:
        """Return the values of the entries of a dense array (ONNX shape), float32 ``(count,)``, in their order."""
        values: Floats = np.asarray(dense, np.float32).reshape(-1)[self.positions()]
        return values

    def dense(self, values: ArrayLike) -> Floats:
        """Return the array in its ONNX shape, float32, 0 where no weight exists; ``values``: at least ``count``."""
        out = np.zeros(self.size, np.float32)
        out[self.positions()] = np.asarray(values, np.float32)[: self.count]
        return out.reshape(self.shape)

    def _by_row(self, positions: Positions) -> tuple[Positions, Positions]:
        """Return row and column of ascending positions, in the order of the entries."""
        if not self.inputs_first:
            return _divided(positions, self.row_size)
        columns, owners = _divided(positions, self.rows)
        order = _order(owners, self.rows)  # within a row they are ascending by column already
        return owners[order], columns[order]

    def _flat(self, rows: Positions, columns: Positions) -> Positions:
        return columns * self.rows + rows if self.inputs_first else rows * self.row_size + columns


def _divided(numbers: Positions, by: int) -> tuple[Positions, Positions]:
    """Return whole quotients and remainders: without ``divmod``, as NumPy has vectors for divisions by one number.

    A change of half of LeNet-5's weights (SWAT) takes 2.2 ms so, with ``divmod`` 2.6.
    """
    quotients = numbers // numbers.dtype.type(by)
    return quotients, numbers - quotients * numbers.dtype.type(by)


def _order(numbers: Positions, below: int) -> Positions:
    """Return what sorts numbers from 0 to ``below``; equal ones stay in their order.

    NumPy sorts numbers of 16 bits by their digits: 24,000 below 400 take 0.16 ms, as int32 1.4 ms.
    """
    return np.argsort(numbers.astype(np.uint16 if below <= 1 << 16 else np.int64), kind="stable")
