"""Lists of vectors: the operand of a product that is mostly zero, and products that walk its list.

A *segment* lists vectors of one channel, of all blocks: pairs of int64 byte offsets, (in the other operand, in the
memory of the vectors themselves). ``segments`` holds int64 pairs (first pair, number of pairs). With one channel and
many terms a tile of the gather-correlate loads a listed vector once and multiplies straight from memory.

A *record* is what a layer remembers from step to step, float32 ``RECORD`` long: see ``codes``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from edgetrain.kernels.codes import DENSITY, RECORD, SAMPLES, THRESHOLD
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    fma,
    load,
    load_f32,
    load_i32,
    load_i64,
    store,
    store_f32,
    store_i64,
    sum_lanes,
)
from edgetrain.kernels.tiles import correlate_tile

_MAPS = ("channels", "rows", "columns", "x_block", "x_channel", "x_row")
SMALLEST = 0x00800000  # bits of the smallest number that is not subnormal: below, all compare as 0
_DIGIT = 2048  # values of a digit of the radix selection: 11 bits


@kernel("x", "norms", "counts", "record", "mask", *_MAPS)
def vector_norms(lanes: int) -> Body:
    """Write the sum of squares of every vector, lanes without a sample left out. Job: (block, channel).

    Where some are without one the sum is as much larger as if all had one: else one threshold would drop nearly all
    vectors of the last samples of a batch. ``counts``: int64, vectors of the job that reach the record's threshold.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, norms, counts, record, mask, channels, rows, columns, x_block, x_channel, x_row) = arguments(args, 11)
        threshold = load_f32(record + 4 * THRESHOLD)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            alive = load(mask + block * step, lanes)
            scale = np.float32(lanes) / max(np.float32(1.0), sum_lanes(alive))
            target, count = norms + 4 * job * rows * columns, 0
            for row in range(rows):
                source = x + block * x_block + channel * x_channel + row * x_row
                for i in range(columns):
                    value = load(source + i * step, lanes) * alive
                    norm = scale * sum_lanes(fma(value, value, broadcast(0.0, lanes)))
                    store_f32(target, norm)
                    target += 4
                    count += norm >= threshold
            store_i64(counts + 8 * job, count)

    return body


@njit
def share_of(total: Any, density: Any) -> Any:
    """Return ``total * density`` rounded up, at least 1; not by what a float32 lies above the number that was meant."""
    return max(1, math.ceil(total * density * (1.0 - 2.0**-23)))


@njit
def kth_largest(norms: Any, total: Any, wanted: Any, counters: Any) -> Any:
    """Return the bits of the ``wanted``-th largest of ``total`` float32 that are not negative.

    Radix selection by digits of 11, 11 and 10 bits: three passes, whatever the numbers.
    """
    prefix, left = 0, wanted
    for digit in range(3):
        shift = (21, 10, 0)[digit]
        above = (63, 21, 10)[digit]
        for i in range(_DIGIT):
            store_i64(counters + 8 * i, 0)
        for i in range(total):
            bits = int(load_i32(norms + 4 * i))
            if bits >> above == prefix:
                place = counters + 8 * ((bits >> shift) & (2047 if digit < 2 else 1023))
                store_i64(place, load_i64(place) + 1)
        value = 2047 if digit < 2 else 1023
        while value > 0 and load_i64(counters + 8 * value) < left:
            left -= load_i64(counters + 8 * value)
            value -= 1
        prefix = (prefix << (11 if digit < 2 else 10)) + value
    return prefix


@njit
def float_of(bits: Any, scratch: Any) -> Any:
    """Return the float32 with these bits."""
    store_i64(scratch, bits)
    return load_f32(scratch)


@njit
def _count(norms: Any, threshold: Any, counts: Any, planes: Any, pixels: Any) -> Any:
    """Write how many norms of every plane reach the threshold; return the sum."""
    total = 0
    for plane in range(planes):
        count = 0
        for i in range(pixels):
            count += load_f32(norms + 4 * (plane * pixels + i)) >= threshold
        store_i64(counts + 8 * plane, count)
        total += count
    return total


@njit
def _drop_last(norms: Any, limit: Any, above: Any, total: Any, wanted: Any) -> None:
    """Clear the last norms from ``limit`` up to ``above``, of which only the first complete the wanted ones."""
    spare = wanted
    for i in range(total):
        spare -= load_f32(norms + 4 * i) >= above
    for i in range(total):
        norm = load_f32(norms + 4 * i)
        if norm >= limit and not norm >= above:  # above is NaN where the limit is infinite
            spare -= 1
            if spare < 0:
                store_f32(norms + 4 * i, 0.0)


@kernel(
    "norms", "counts", "starts", "counters", "record", "threshold", "tally", "state", "blocks", "channels", "pixels",
    "capacity", "refresh",
)  # fmt: skip
def choose_threshold() -> Body:
    """Write the threshold of this step, where every channel's vectors go, and how many are kept. One job.

    Every ``refresh`` steps, and whenever more than ``capacity`` vectors reach the old one, the threshold becomes the
    norm of the last of the ``density`` (of the record) largest. Vectors of zeros are never kept. Of equal norms that
    the capacity does not hold, the first are kept, up to that share. ``tally``: int64 kept, and all vectors.
    """

    def body(args: int, first: int, last: int) -> None:
        (norms, counts, starts, counters, record, threshold, tally, state, blocks, channels, pixels, capacity,
         refresh) = arguments(args, 13)  # fmt: skip
        planes = blocks * channels
        total, limit, all_norms = 0, load_f32(record + 4 * THRESHOLD), planes * pixels
        for plane in range(planes):
            total += load_i64(counts + 8 * plane)
        if limit <= 0.0 or total > capacity or load_i64(state + 8) % refresh == 0:
            wanted = min(capacity, share_of(all_norms, load_f32(record + 4 * DENSITY)))
            bits = max(SMALLEST, kth_largest(norms, all_norms, wanted, counters))
            limit = float_of(bits, counters)
            total = _count(norms, limit, counts, planes, pixels)
            if total > capacity:
                _drop_last(norms, limit, float_of(bits + 1, counters), all_norms, wanted)
                total = _count(norms, limit, counts, planes, pixels)
        store_f32(threshold, limit)
        store_i64(tally, total)
        store_i64(tally + 8, all_norms)
        start = 0
        for channel in range(channels):
            store_i64(starts + 8 * channel, start)
            for block in range(blocks):
                start += load_i64(counts + 8 * (block * channels + channel))

    return body


@kernel("thresholds", "records", "numbers", "count")
def remember_thresholds() -> Body:
    """Copy the thresholds of a step, a record's size apart, to the records of these ``numbers`` (int64). One job."""

    def body(args: int, first: int, last: int) -> None:
        thresholds, records, numbers, count = arguments(args, 4)
        for i in range(count):
            place = 4 * RECORD * load_i64(numbers + 8 * i)
            store_f32(records + place + 4 * THRESHOLD, load_f32(thresholds + place))

    return body


@kernel(
    "x", "norms", "starts", "threshold", "segments", "pairs", "values", "pixels", "phase_starts", "phases", "blocks",
    "channels", "x_block", "x_channel", "other_block", "pixel_count",
)  # fmt: skip
def list_vectors(lanes: int) -> Body:
    """Copy the vectors whose norm reaches the threshold, and list them. Job: channel.

    ``pixels``: table of int64 triples (pixel, offset in the other operand, offset in ``x``), phase after phase from
    ``phase_starts`` on. Segments are ``[phase][channel]``.
    """
    size = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, norms, starts, threshold, segments, pairs, values, pixels, phase_starts, phases, blocks, channels, x_block,
         x_channel, other_block, pixel_count) = arguments(args, 16)  # fmt: skip
        limit = load_f32(threshold)
        for channel in range(first, last):
            at = load_i64(starts + 8 * channel)
            for phase in range(phases):
                segment = segments + 16 * (phase * channels + channel)
                store_i64(segment, at)
                for block in range(blocks):
                    source = x + block * x_block + channel * x_channel
                    own = norms + 4 * (block * channels + channel) * pixel_count
                    for i in range(load_i64(phase_starts + 8 * phase), load_i64(phase_starts + 8 * phase + 8)):
                        if load_f32(own + 4 * load_i64(pixels + 24 * i)) >= limit:
                            store_i64(pairs + 16 * at, load_i64(pixels + 24 * i + 8) + block * other_block)
                            store_i64(pairs + 16 * at + 8, at * size)
                            store(values + at * size, load(source + load_i64(pixels + 24 * i + 16), lanes))
                            at += 1
                store_i64(segment + 8, at - load_i64(segment))

    return body


@kernel(
    "other", "values", "target", "segments", "pairs", "terms", "term_count", "term_chunk", "term_chunks",
    "value_channel", "target_channel",
)  # fmt: skip
def correlate_lists(lanes: int, width: int) -> Body:
    """Write ``target[c][k] = sum over the listed vectors of channel c of vector * other[its place + term k]``.

    Job: (channel, chunk of terms). ``terms``: int64 pairs (offset in ``other``, offset in ``target``), whole multiples
    of ``width``. ``value_channel``: bytes between the places from which channels' offsets count, 0 for copies.
    """

    def body(args: int, first: int, last: int) -> None:
        (other, values, target, segments, pairs, terms, term_count, term_chunk, term_chunks, value_channel,
         target_channel) = arguments(args, 11)  # fmt: skip
        for job in range(first, last):
            channel, chunk = job // term_chunks, job % term_chunks
            start, count = load_i64(segments + 16 * channel), load_i64(segments + 16 * channel + 8)
            last_term = min(term_count, (chunk + 1) * term_chunk)
            for k in range(chunk * term_chunk, last_term, width):
                correlate_tile(
                    other, values + channel * value_channel, target + channel * target_channel, pairs + 16 * start,
                    terms + 16 * k, count, 0, 0, 1, last_term - k, 0, 0, 1, width, lanes, SAMPLES, 1,
                )  # fmt: skip

    return body
