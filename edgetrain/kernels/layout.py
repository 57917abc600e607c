"""Kernels that move data: into lanes, between layouts, and the zeros around maps."""

from __future__ import annotations

from typing import Any

from numba import njit

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    lane_numbers,
    load,
    load_f32,
    load_i64,
    select_gt,
    store,
    store_f32,
)
from edgetrain.kernels.turning import pack_tile


@njit
def _existing_lanes(value: Any, count: Any, width: Any) -> Any:
    """Return a vector with ``value`` in the first ``count`` lanes, 0 in the others."""
    limit, zero = broadcast(float(count), width), broadcast(0.0, width)
    return select_gt(limit, lane_numbers(width), broadcast(value, width), zero)


@kernel(
    "x", "y", "scale", "shift", "state", "channels", "rows", "columns", "y_block", "y_channel", "y_row",
)  # fmt: skip
def pack_input(lanes: int) -> Body:
    """Interleave samples: ``y[block][c][h][w][lane] = x[block * lanes + lane][c][h][w] * scale[c] + shift[c]``.

    ``x`` is dense float32 ``(N, C, H, W)``; lanes without a sample become 0. Job: (block,
    channel). ``state`` starts with the number of samples N (int64). ``x`` is finite: there a lane without a sample is
    that of the last sample, times 0.

    By tiles that turn ``lanes`` pixels of ``lanes`` samples where rows are long enough, the last one over the one
    before: 128 images of 28x28 take 9 us, 31 number by number.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        x, y, scale, shift, state, channels, rows, columns, y_block, y_channel, y_row = arguments(args, 11)
        count, pixels, gap = load_i64(state), rows * columns, y_row - columns * step
        for job in range(first, last):
            block, channel = job // channels, job % channels
            factor, offset = load_f32(scale + 4 * channel), load_f32(shift + 4 * channel)
            samples = min(lanes, count - block * lanes)
            source = x + 4 * pixels * (block * lanes * channels + channel)
            target = y + block * y_block + channel * y_channel
            if samples > 0 and pixels >= lanes and (columns >= lanes or gap == 0):
                factors, offsets = _existing_lanes(factor, samples, lanes), _existing_lanes(offset, samples, lanes)
                for tile in range(0, pixels, lanes):
                    pixel = min(tile, pixels - lanes)
                    row, column = pixel // columns, pixel % columns
                    pack_tile(source + 4 * pixel, 4 * pixels * channels, samples, target + row * y_row + column * step,
                              columns - column, gap, factors, offsets, lanes)  # fmt: skip
                continue
            for lane in range(lanes):
                for row in range(rows):
                    for column in range(columns):
                        value = 0.0
                        if lane < samples:
                            place = source + 4 * (lane * pixels * channels + row * columns + column)
                            value = load_f32(place) * factor + offset
                        store_f32(target + row * y_row + column * step + 4 * lane, value)

    return body


@kernel("y", "rows", "columns", "top", "left", "bottom", "right", "y_plane", "f_value")
def fill_border(lanes: int) -> Body:
    """Write ``value`` around maps of ``rows`` x ``columns``; ``y``: address of a border's first pixel. Job: plane."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        y, rows, columns, top, left, bottom, right, y_plane = arguments(args, 8)
        value = broadcast(load_f32(args + 64), lanes)
        pitch = left + columns + right
        for plane in range(first, last):
            start = y + plane * y_plane
            for i in range(top * pitch):
                store(start + i * step, value)
            for row in range(top, top + rows):
                line = start + row * pitch * step
                for i in range(left):
                    store(line + i * step, value)
                for i in range(left + columns, pitch):
                    store(line + i * step, value)
            for i in range((top + rows) * pitch, (top + rows + bottom) * pitch):
                store(start + i * step, value)

    return body


@kernel("y", "channels", "rows", "vectors", "y_block", "y_channel", "y_row", "f_value")
def fill(lanes: int) -> Body:
    """Write ``value`` to all pixels of a value. Job: (block, channel)."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        y, channels, rows, vectors, y_block, y_channel, y_row = arguments(args, 7)
        value = broadcast(load_f32(args + 56), lanes)
        for job in range(first, last):
            for row in range(rows):
                line = y + (job // channels) * y_block + (job % channels) * y_channel + row * y_row
                for i in range(vectors):
                    store(line + i * step, value)

    return body


@kernel(
    "x", "y", "channels", "rows", "vectors", "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row",
)  # fmt: skip
def copy_maps(lanes: int) -> Body:
    """Copy maps between two values or parts of values. Job: (block, channel)."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        x, y, channels, rows, vectors, x_block, x_channel, x_row, y_block, y_channel, y_row = arguments(args, 11)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            for row in range(rows):
                source = x + block * x_block + channel * x_channel + row * x_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for i in range(vectors):
                    store(target + i * step, load(source + i * step, lanes))

    return body


@kernel("x", "y", "columns", "count", "chunk", "x_block")
def turn_samples(lanes: int) -> Body:
    """Put the samples apart: ``y[block * lanes + lane][i] = x[block][column i][lane]``, all of them, real or not.

    ``columns``: table of ``count`` int64 byte offsets. Job: (block, ``chunk`` columns).
    """

    def body(args: int, first: int, last: int) -> None:
        x, y, columns, count, chunk, x_block = arguments(args, 6)
        chunks = -(-count // chunk)
        for job in range(first, last):
            block, start = job // chunks, job % chunks * chunk
            for i in range(start, min(count, start + chunk)):
                source = x + block * x_block + load_i64(columns + 8 * i)
                for lane in range(lanes):
                    store_f32(y + 4 * ((block * lanes + lane) * count + i), load_f32(source + 4 * lane))

    return body


@kernel("x", "y", "bias", "count", "chunk", "x_sample", "y_channel")
def join_samples(lanes: int) -> Body:
    """Put samples that are apart into lanes: ``y[i][lane] = x[lane][i] + bias[i]``. Job: ``chunk`` channels."""

    def body(args: int, first: int, last: int) -> None:
        x, y, bias, count, chunk, x_sample, y_channel = arguments(args, 7)
        for i in range(first * chunk, min(count, last * chunk)):
            target, shift = y + i * y_channel, load_f32(bias + 4 * i)
            for lane in range(lanes):
                store_f32(target + 4 * lane, load_f32(x + lane * x_sample + 4 * i) + shift)

    return body


@kernel("x", "y", "table", "count", "x_block", "y_block")
def copy_table(lanes: int) -> Body:
    """Copy the pixels of a table of int64 pairs (input, output byte offset). Job: block."""

    def body(args: int, first: int, last: int) -> None:
        x, y, table, count, x_block, y_block = arguments(args, 6)
        for block in range(first, last):
            for i in range(count):
                source = x + block * x_block + load_i64(table + 16 * i)
                store(y + block * y_block + load_i64(table + 16 * i + 8), load(source, lanes))

    return body
