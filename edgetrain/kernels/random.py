"""Random numbers from counters: the same for any number of lanes, threads and batches."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import arguments, load_f32, load_i64, store_f32

_U64 = np.uint64


@njit
def mixed(counter: Any) -> Any:
    """Return 64 well-mixed bits of a uint64 counter (splitmix64, Steele et al. 2014, figure 17)."""
    z = counter * _U64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> _U64(30))) * _U64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> _U64(27))) * _U64(0x94D049BB133111EB)
    return z ^ (z >> _U64(31))


@njit
def stream_key(seed: Any, step: Any, stream: Any) -> Any:
    """Return the key of one node's random numbers in one step."""
    return mixed(mixed(mixed(_U64(seed) + _U64(1)) + _U64(step)) + _U64(stream))


@kernel(
    "x", "y", "state", "stream", "channels", "rows", "columns", "x_block", "x_channel", "x_row", "y_block", "y_channel",
    "y_row", "f_ratio",
)  # fmt: skip
def dropout(lanes: int) -> Body:
    """Zero a share ``ratio`` of the elements, scale the others by ``1 / (1 - ratio)``. Job: (block, channel).

    The decision is a function of (seed, step, stream, sample, element); so the backward
    pass calls the same kernel on the gradient and no mask is saved. ``state``: int64
    samples, step, seed.
    """
    step_bytes = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, state, stream, channels, rows, columns, x_block, x_channel, x_row, y_block, y_channel,
         y_row) = arguments(args, 13)  # fmt: skip
        ratio = load_f32(args + 104)
        keep = 1.0 / (1.0 - ratio) if ratio < 1.0 else 0.0
        threshold = _U64(ratio * 4294967296.0)
        key = stream_key(load_i64(state + 16), load_i64(state + 8), stream)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            for row in range(rows):
                source = x + block * x_block + channel * x_channel + row * x_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for column in range(columns):
                    element = (channel * rows + row) * columns + column
                    for lane in range(lanes):
                        sample = block * lanes + lane
                        counter = _U64(sample * channels * rows * columns + element)
                        bits = mixed(key + counter) >> _U64(32)
                        value = load_f32(source + column * step_bytes + 4 * lane) * keep
                        store_f32(target + column * step_bytes + 4 * lane, value if bits >= threshold else 0.0)

    return body
