"""Between compact storage and dense arrays; the readable twins are ``SparseIndex.dense`` and ``values_of``.

``starts``, ``columns``: int32 arrays of a ``sparse_index.SparseIndex``, read anew at every call; the values lie in the
order of the entries. See ``bits`` for machines that can do it a vector at a time.
"""

from __future__ import annotations

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import arguments, broadcast, load_f32, load_i32, store, store_f32

_WIDTH = 8  # floats that are cleared at once
_INDEX = ("starts", "columns", "dense_row", "dense_column")


@kernel("values", "dense", "row_size", *_INDEX)
def expand_sparse() -> Body:
    """Write a dense array of weights: the values where they exist, 0 elsewhere. Job: row.

    ``dense_row``, ``dense_column``: byte strides of a row and of a column of the dense array.
    """

    def body(args: int, first: int, last: int) -> None:
        values, dense, row_size, starts, columns, dense_row, dense_column = arguments(args, 7)
        for row in range(first, last):
            line = dense + row * dense_row
            if dense_column == 4:
                # Number by number 30,720 weights of which a tenth exist took 31 us, and take 5.4 so (one thread).
                whole = row_size // _WIDTH * _WIDTH
                for column in range(0, whole, _WIDTH):
                    store(line + 4 * column, broadcast(0.0, _WIDTH))
                for column in range(whole, row_size):
                    store_f32(line + 4 * column, 0.0)
            else:
                for column in range(row_size):
                    store_f32(line + column * dense_column, 0.0)
            for k in range(load_i32(starts + 4 * row), load_i32(starts + 4 * row + 4)):
                store_f32(line + load_i32(columns + 4 * k) * dense_column, load_f32(values + 4 * k))

    return body


@kernel("values", "dense", *_INDEX)
def gather_sparse() -> Body:
    """Take the entries of a dense array into sparse storage. Job: row; strides as for ``expand_sparse``."""

    def body(args: int, first: int, last: int) -> None:
        values, dense, starts, columns, dense_row, dense_column = arguments(args, 6)
        for row in range(first, last):
            line = dense + row * dense_row
            for k in range(load_i32(starts + 4 * row), load_i32(starts + 4 * row + 4)):
                store_f32(values + 4 * k, load_f32(line + load_i32(columns + 4 * k) * dense_column))

    return body
