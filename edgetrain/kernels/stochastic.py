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
    store_i64,
    sum_lanes,
)

KEPT_MEANS = MEAN_COUNT - MEANS  # thresholds that a new one is the mean of; until there are so many nothing is pruned
_U64 = np.uint64
_UNIT = 2.0**-40  # of a random number of 40 bits
_TINY = 1e-30  # instead of a size of 0 below a fraction


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


_ARGUMENTS = ("grad", "y", "magnitudes", "counts", "record", "state", "stream", "channels", "rows", "columns",
              "grad_block", "grad_channel", "grad_row", "y_block", "y_channel", "y_row", "f_factor")  # fmt: skip


@kernel(*_ARGUMENTS)
def prune_elements(lanes: int) -> Body:
    """Prune every number. Job: (block, channel).

    Per job: ``magnitudes``: float64 sum of the sizes before; ``counts``: int64 pairs, how many are not 0 afterwards
    and before.
    """
    step_bytes = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (grad, y, magnitudes, counts, record, state, stream, channels, rows, columns, grad_block, grad_channel,
         grad_row, y_block, y_channel, y_row) = arguments(args, 16)  # fmt: skip
        limit = np.float32(_threshold(record, load_f32(args + 128)))
        key = stream_key(load_i64(state + 16), load_i64(state + 8), stream)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            total, kept, before = broadcast(0.0, lanes), 0, 0
            for row in range(rows):
                source = grad + block * grad_block + channel * grad_channel + row * grad_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for column in range(columns):
                    total = total + absolute(load(source + column * step_bytes, lanes))
                    for lane in range(lanes):
                        value = load_f32(source + column * step_bytes + 4 * lane)
                        counter = ((block * lanes + lane) * channels + channel) * rows + row
                        size = abs(value)
                        chosen = size > limit * _chance(key, counter * columns + column)
                        pruned = math.copysign(limit, value) * np.float32(chosen)
                        pruned = pruned if size < limit else value  # a NaN stays one
                        before += value != 0.0
                        kept += pruned != 0.0
                        store_f32(target + column * step_bytes + 4 * lane, pruned)
            store_f64(magnitudes + 8 * job, sum_lanes(total))
            store_i64(counts + 16 * job, kept)
            store_i64(counts + 16 * job + 8, before)

    return body


@kernel(*_ARGUMENTS)
def prune_vectors(lanes: int) -> Body:
    """Prune every vector of samples by its L2 norm.

    Job: (block, channel). ``magnitudes``, ``counts``: as for ``prune_elements``.
    """
    step_bytes = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (grad, y, magnitudes, counts, record, state, stream, channels, rows, columns, grad_block, grad_channel,
         grad_row, y_block, y_channel, y_row) = arguments(args, 16)  # fmt: skip
        limit = _threshold(record, load_f32(args + 128))
        key = stream_key(load_i64(state + 16), load_i64(state + 8), stream)
        zero = broadcast(0.0, lanes)
        # Counted along: dividing for every job 512 maps of one pixel took 19.0 us, and take 5.8 so (one thread).
        block, channel = first // channels, first % channels
        for job in range(first, last):
            total, kept, before = 0.0, 0, 0
            for row in range(rows):
                source = grad + block * grad_block + channel * grad_channel + row * grad_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for column in range(columns):
                    value = load(source + column * step_bytes, lanes)
                    size = math.sqrt(sum_lanes(fma(value, value, zero)))
                    total += size
                    # No branch: which it would be is by chance, and a wrong guess costs more than the arithmetic.
                    # LeNet-5, batch 32, rate 0.8: 28 us for both maps with one, 16 without (one thread).
                    counter = (job * rows + row) * columns + column
                    chosen = size > limit * _chance(key, counter)
                    larger = limit / max(size, _TINY) * chosen
                    scale = np.float32(1.0 if size >= limit else larger)
                    before += size != 0.0
                    kept += (size != 0.0) & (scale != np.float32(0.0))
                    store(target + column * step_bytes, value * broadcast(scale, lanes))
            store_f64(magnitudes + 8 * job, total)
            store_i64(counts + 16 * job, kept)
            store_i64(counts + 16 * job + 8, before)
            channel += 1
            if channel == channels:
                block, channel = block + 1, 0

    return body


@kernel("magnitudes", "counts", "record", "tally", "state", "parts", "count", "per_sample")
def record_mean() -> Body:
    """Add the mean size of this step's gradients to the record, in place of the oldest, and add up counts. One job.

    ``count``: of the magnitudes; of those of one sample when ``per_sample``.
    """

    def body(args: int, first: int, last: int) -> None:
        magnitudes, counts, record, tally, state, parts, count, per_sample = arguments(args, 8)
        total, kept, before = 0.0, 0, 0
        for part in range(parts):
            total += load_f64(magnitudes + 8 * part)
            kept += load_i64(counts + 16 * part)
            before += load_i64(counts + 16 * part + 8)
        store_i64(tally, kept)
        store_i64(tally + 8, before)
        numbers = count * load_i64(state) if per_sample != 0 else count
        for i in range(KEPT_MEANS - 1):
            store_f32(record + 4 * (MEANS + i), load_f32(record + 4 * (MEANS + i + 1)))
        store_f32(record + 4 * (MEAN_COUNT - 1), total / numbers)
        known = load_f32(record + 4 * MEAN_COUNT)
        store_f32(record + 4 * MEAN_COUNT, min(known + 1.0, float(KEPT_MEANS)))

    return body
