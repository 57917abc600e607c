"""Pooling and its gradients.

Windows come as two tables of int64 triples ``(byte offset of the first pixel inside
the map, how many inside, divisor)``, one row of the table per output row and per
output column; so padding costs nothing in the loops.
"""

from __future__ import annotations

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    load,
    load_f32,
    load_i64,
    maximum,
    pack,
    select_gt,
    select_same,
    store,
    unpack,
    whole,
)

_WINDOWS = (
    "window_rows", "window_columns", "out_rows", "out_columns", "x_plane", "y_plane", "y_row", "tap_row", "tap_column",
)  # fmt: skip


@kernel("x", "y", "positions", "positions_plane", *_WINDOWS)
def max_pool(lanes: int, height: int, width: int, bits: int) -> Body:
    """Write the largest value of every window, and which one it was. Job: plane.

    Args:
        lanes: samples in a vector.
        height, width: of windows that lie wholly inside the map, in neighbouring pixels; 0 and 0 for any windows.
        bits: size of a position, packed one after the other; 0: positions are not wanted. A position is the number of
            the first largest value among those inside the map, row by row.
    """
    step, per_word = 4 * lanes, 32 // max(1, bits)

    def body(args: int, first: int, last: int) -> None:
        (x, y, positions, positions_plane, window_rows, window_columns, out_rows, out_columns, x_plane, y_plane, y_row,
         tap_row, tap_column) = arguments(args, 13)  # fmt: skip
        none = whole(0, lanes)
        for plane in range(first, last):
            word, packed, place = none, 0, positions + plane * positions_plane
            for r in range(out_rows):
                start = x + plane * x_plane + load_i64(window_rows + 24 * r)
                high = height if height else load_i64(window_rows + 24 * r + 8)
                for c in range(out_columns):
                    corner = start + load_i64(window_columns + 24 * c)
                    wide = width if width else load_i64(window_columns + 24 * c + 8)
                    best, position = load(corner, lanes), none
                    for i in range(high):
                        for j in range(wide):
                            value = load(corner + i * tap_row + j * tap_column, lanes)
                            if bits:
                                position = select_gt(value, best, whole(i * wide + j, lanes), position)
                            best = maximum(best, value)
                    store(y + plane * y_plane + r * y_row + c * step, best)
                    if bits:
                        word = pack(word, position, packed * bits)
                        packed += 1
                        if packed == per_word:
                            store(place, word)
                            word, packed, place = none, 0, place + step
            if packed:
                store(place, word)

    return body


@kernel(
    "positions", "grad_out", "grad_x", "rows", "columns", "grad_x_row", "positions_plane", "kept", "kept_count",
    "channels", *_WINDOWS,
)  # fmt: skip
def max_pool_gradient(lanes: int, height: int, width: int, bits: int) -> Body:
    """Give each window's gradient to the pixel at its position. Job: plane.

    Here ``x`` is ``grad_x`` and ``y`` is ``grad_out``. With a ``kept_count`` the planes are those of the channels whose
    numbers (float32) ``kept`` holds, and the others are not written.

    Args:
        lanes: samples in a vector.
        height, width: of windows that cover the map, side by side; 0 and 0 for any windows.
        bits: size of a position in the packed positions that ``max_pool`` wrote.
    """
    step, per_word = 4 * lanes, 32 // bits

    def body(args: int, first: int, last: int) -> None:
        (positions, grad_out, grad_x, rows, columns, grad_x_row, positions_plane, kept, kept_count, channels,
         window_rows, window_columns, out_rows, out_columns, x_plane, y_plane, y_row, tap_row,
         tap_column) = arguments(args, 19)  # fmt: skip
        zero = broadcast(0.0, lanes)
        for job in range(first, last):
            plane = job
            if kept_count:
                plane = job // kept_count * channels + int(load_f32(kept + 4 * (job % kept_count)))
            if not height:
                for r in range(rows):
                    for c in range(columns):
                        store(grad_x + plane * x_plane + r * grad_x_row + c * step, zero)
            packed, place = 0, positions + plane * positions_plane
            word = load(place, lanes)
            for r in range(out_rows):
                start = grad_x + plane * x_plane + load_i64(window_rows + 24 * r)
                high = height if height else load_i64(window_rows + 24 * r + 8)
                for c in range(out_columns):
                    corner = start + load_i64(window_columns + 24 * c)
                    wide = width if width else load_i64(window_columns + 24 * c + 8)
                    if packed == per_word:
                        packed, place = 0, place + step
                        word = load(place, lanes)
                    position = unpack(word, packed * bits, bits)
                    packed += 1
                    grad = load(grad_out + plane * y_plane + r * y_row + c * step, lanes)
                    for i in range(high):
                        for j in range(wide):
                            target = corner + i * tap_row + j * tap_column
                            share = select_same(position, whole(i * wide + j, lanes), grad, zero)
                            if not height:
                                share = share + load(target, lanes)
                            store(target, share)

    return body


@kernel("x", "y", *_WINDOWS)
def average_pool(lanes: int) -> Body:
    """Write the sum of every window over its divisors. Job: plane."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, window_rows, window_columns, out_rows, out_columns, x_plane, y_plane, y_row, tap_row,
         tap_column) = arguments(args, 11)  # fmt: skip
        for plane in range(first, last):
            for r in range(out_rows):
                start = x + plane * x_plane + load_i64(window_rows + 24 * r)
                height, high = load_i64(window_rows + 24 * r + 8), load_i64(window_rows + 24 * r + 16)
                for c in range(out_columns):
                    corner = start + load_i64(window_columns + 24 * c)
                    width, wide = load_i64(window_columns + 24 * c + 8), load_i64(window_columns + 24 * c + 16)
                    total = broadcast(0.0, lanes)
                    for i in range(height):
                        for j in range(width):
                            total = total + load(corner + i * tap_row + j * tap_column, lanes)
                    store(y + plane * y_plane + r * y_row + c * step, total * broadcast(1.0 / (high * wide), lanes))

    return body


@kernel("grad_out", "grad_x", "rows", "columns", "grad_x_row", *_WINDOWS)
def average_pool_gradient(lanes: int) -> Body:
    """Spread each output gradient over its window; here ``x`` is ``grad_x`` and ``y`` is ``grad_out``. Job: plane."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (grad_out, grad_x, rows, columns, grad_x_row, window_rows, window_columns, out_rows, out_columns, x_plane,
         y_plane, y_row, tap_row, tap_column) = arguments(args, 14)  # fmt: skip
        zero = broadcast(0.0, lanes)
        for plane in range(first, last):
            for r in range(rows):
                for c in range(columns):
                    store(grad_x + plane * x_plane + r * grad_x_row + c * step, zero)
            for r in range(out_rows):
                start = grad_x + plane * x_plane + load_i64(window_rows + 24 * r)
                height, high = load_i64(window_rows + 24 * r + 8), load_i64(window_rows + 24 * r + 16)
                for c in range(out_columns):
                    corner = start + load_i64(window_columns + 24 * c)
                    width, wide = load_i64(window_columns + 24 * c + 8), load_i64(window_columns + 24 * c + 16)
                    grad = load(grad_out + plane * y_plane + r * y_row + c * step, lanes)
                    grad = grad * broadcast(1.0 / (high * wide), lanes)
                    for i in range(height):
                        for j in range(width):
                            target = corner + i * tap_row + j * tap_column
                            store(target, load(target, lanes) + grad)

    return body
