"""Pooling and its gradients.

Windows come as two tables of int64 triples ``(byte offset of the first pixel inside
the map, how many inside, divisor)``, one row of the table per output row and per
output column; so padding costs nothing in the loops.
"""

from __future__ import annotations

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import arguments, broadcast, load, load_i64, maximum, select_eq, store

_WINDOWS = (
    "window_rows", "window_columns", "out_rows", "out_columns", "x_plane", "y_plane", "y_row", "tap_row", "tap_column",
)  # fmt: skip


@kernel("x", "y", *_WINDOWS)
def max_pool(lanes: int) -> Body:
    """Write the largest value of every window. Job: plane."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, window_rows, window_columns, out_rows, out_columns, x_plane, y_plane, y_row, tap_row,
         tap_column) = arguments(args, 11)  # fmt: skip
        for plane in range(first, last):
            for r in range(out_rows):
                start = x + plane * x_plane + load_i64(window_rows + 24 * r)
                height = load_i64(window_rows + 24 * r + 8)
                for c in range(out_columns):
                    corner = start + load_i64(window_columns + 24 * c)
                    width = load_i64(window_columns + 24 * c + 8)
                    best = load(corner, lanes)
                    for i in range(height):
                        for j in range(width):
                            best = maximum(best, load(corner + i * tap_row + j * tap_column, lanes))
                    store(y + plane * y_plane + r * y_row + c * step, best)

    return body


@kernel("x", "y", "grad_out", "grad_x", "rows", "columns", "x_row", "grad_plane", "grad_row", "grad_x_plane",
        "grad_x_row", "grad_tap_row", *_WINDOWS)  # fmt: skip
def max_pool_gradient(lanes: int) -> Body:
    """Give each window's gradient to the first pixel that holds its maximum. Job: plane.

    ``grad_x`` has its own row stride; its column offsets equal those of ``x``, its row
    offsets are ``x`` row offsets scaled to its stride.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, grad_out, grad_x, rows, columns, x_row, grad_plane, grad_row, grad_x_plane, grad_x_row, grad_tap_row,
         window_rows, window_columns, out_rows, out_columns, x_plane, y_plane, y_row, tap_row,
         tap_column) = arguments(args, 21)  # fmt: skip
        zero, one = broadcast(0.0, lanes), broadcast(1.0, lanes)
        for plane in range(first, last):
            for r in range(rows):
                for c in range(columns):
                    store(grad_x + plane * grad_x_plane + r * grad_x_row + c * step, zero)
            for r in range(out_rows):
                offset = load_i64(window_rows + 24 * r)
                height = load_i64(window_rows + 24 * r + 8)
                start = x + plane * x_plane + offset
                grad_start = grad_x + plane * grad_x_plane + offset // x_row * grad_x_row
                for c in range(out_columns):
                    shift = load_i64(window_columns + 24 * c)
                    width = load_i64(window_columns + 24 * c + 8)
                    best = load(y + plane * y_plane + r * y_row + c * step, lanes)
                    grad = load(grad_out + plane * grad_plane + r * grad_row + c * step, lanes)
                    for i in range(height):
                        for j in range(width):
                            value = load(start + shift + i * tap_row + j * tap_column, lanes)
                            target = grad_start + shift + i * grad_tap_row + j * tap_column
                            hit = select_eq(value, best, one, zero)
                            store(target, load(target, lanes) + hit * grad)
                            grad = grad - hit * grad

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
