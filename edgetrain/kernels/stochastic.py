"""Unbiased stochastic pruning of gradients (Ye et al. 2020, arXiv 1908.00173).

What is smaller than a threshold is set to 0 or to the threshold by chance, so that its expectation stays; what is
larger stays. "It" is a number, or a whole vector of samples measured by its L2 norm. The threshold is a factor
times the mean size in the latest steps: nothing has to be known of the present gradient before the pass over it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from edgetrain.kernels.codes import MEAN_COUNT, MEANS
from edgetrain.kernels.random import mixed, stream_key
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    absolute,
    arguments,
    broadcast,
    fma,
    load,
    load_f32,
    load_f64,
    load_i64,
    store,
    store_f32,
    store_f64,
    sum_lanes,
)

KEPT_MEANS = MEAN_COUNT - MEANS  # thresholds that a new one is the mean of; until there are so many nothing is pruned
_U64 = np.uint64
_UNIT = 2.0**-40  # of a random number of 40 bits


@njit
def _threshold(record: Any, factor: Any) -> Any:
    """Return ``factor`` times the mean of the recorded means, 0 while there are too few."""
    total = 0.0
    for i in range(KEPT_MEANS):
        total += load_f32(record + 4 * (MEANS + i))
    return factor * total / KEPT_MEANS if load_f32(record + 4 * MEAN_COUNT) >= KEPT_MEANS else 0.0


@njit
def _chance(key: Any, counter: Any) -> Any:
    """Return a random number from 0 to below 1."""
    return float(mixed(key + _U64(counter)) >> _U64(24)) * _UNIT


_ARGUMENTS = ("grad", "y", "magnitudes", "record", "state", "stream", "channels", "rows", "columns", "grad_block",
              "grad_channel", "grad_row", "y_block", "y_channel", "y_row", "f_factor")  # fmt: skip


@kernel(*_ARGUMENTS)
def prune_elements(lanes: int) -> Body:
    """Prune every number. Job: (block, channel). ``magnitudes``: float64 sum of the sizes before, per job."""
    step_bytes = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (grad, y, magnitudes, record, state, stream, channels, rows, columns, grad_block, grad_channel, grad_row,
         y_block, y_channel, y_row) = arguments(args, 15)  # fmt: skip
        limit = np.float32(_threshold(record, load_f32(args + 120)))
        key = stream_key(load_i64(state + 16), load_i64(state + 8), stream)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            total = broadcast(0.0, lanes)
            for row in range(rows):
                source = grad + block * grad_block + channel * grad_channel + row * grad_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for column in range(columns):
                    total = total + absolute(load(source + column * step_bytes, lanes))
                    for lane in range(lanes):
                        value = load_f32(source + column * step_bytes + 4 * lane)
                        if abs(value) < limit:
                            counter = ((block * lanes + lane) * channels + channel) * rows + row
                            if abs(value) > limit * _chance(key, counter * columns + column):
                                value = math.copysign(limit, value)
                            else:
                                value = np.float32(0.0)
                        store_f32(target + column * step_bytes + 4 * lane, value)
            store_f64(magnitudes + 8 * job, sum_lanes(total))

    return body


@kernel(*_ARGUMENTS)
def prune_vectors(lanes: int) -> Body:
    """Prune every vector of samples by its L2 norm.

    Job: (block, channel). ``magnitudes``: as for ``prune_elements``.
    """
    step_bytes = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (grad, y, magnitudes, record, state, stream, channels, rows, columns, grad_block, grad_channel, grad_row,
         y_block, y_channel, y_row) = arguments(args, 15)  # fmt: skip
        limit = _threshold(record, load_f32(args + 120))
        key = stream_key(load_i64(state + 16), load_i64(state + 8), stream)
        zero = broadcast(0.0, lanes)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            total = 0.0
            for row in range(rows):
                source = grad + block * grad_block + channel * grad_channel + row * grad_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for column in range(columns):
                    value = load(source + column * step_bytes, lanes)
                    size = math.sqrt(sum_lanes(fma(value, value, zero)))
                    total += size
                    if size < limit:
                        counter = (job * rows + row) * columns + column
                        chosen = size > limit * _chance(key, counter)
                        value = value * broadcast(np.float32(limit / size), lanes) if chosen else zero
                    store(target + column * step_bytes, value)
            store_f64(magnitudes + 8 * job, total)

    return body


@kernel("magnitudes", "record", "state", "parts", "count", "per_sample")
def record_mean() -> Body:
    """Add the mean size of this step's gradients to the record, in place of the oldest. One job.

    ``count``: of the magnitudes; of those of one sample when ``per_sample``.
    """

    def body(args: int, first: int, last: int) -> None:
        magnitudes, record, state, parts, count, per_sample = arguments(args, 6)
        total = 0.0
        for part in range(parts):
            total += load_f64(magnitudes + 8 * part)
        numbers = count * load_i64(state) if per_sample != 0 else count
        for i in range(KEPT_MEANS - 1):
            store_f32(record + 4 * (MEANS + i), load_f32(record + 4 * (MEANS + i + 1)))
        store_f32(record + 4 * (MEAN_COUNT - 1), total / numbers)
        known = load_f32(record + 4 * MEAN_COUNT)
        store_f32(record + 4 * MEAN_COUNT, min(known + 1.0, float(KEPT_MEANS)))

    return body
