"""Products of the backward pass on some channels of the output gradient (Wu et al. 2020, "error map pruning").

``channel_scores`` and ``keep_channels`` choose, ``listed_terms`` makes the tables with which the dense
gather-multiply reads the kept channels only, ``correlate_listed`` is the gather-correlate over them. Nothing is
copied together: offsets are as good as neighbours.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from edgetrain.kernels.codes import BY_CHANCE, BY_ERROR_AND_WEIGHTS
from edgetrain.kernels.random import mixed, stream_key
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    absolute,
    arguments,
    broadcast,
    load,
    load_f32,
    load_i64,
    store,
    store_f32,
    store_i64,
    sum_lanes,
)
from edgetrain.kernels.tiles import correlate_listed_tile


@kernel(
    "grad_out", "weight", "scores", "state", "stream", "channels", "blocks", "rows", "columns", "grad_block",
    "grad_channel", "grad_row", "weight_channel", "sources", "source_count",
)  # fmt: skip
def channel_scores(lanes: int, how: int) -> Body:
    """Write two numbers per channel: the L1 norm of its error map over the batch, and of its weights. Job: channel.

    ``how``, see ``codes``: by chance the first is a random number instead, a function of (seed, step, stream,
    channel); the second is 0 unless weights count. ``sources``: offsets of a channel's weights.
    """
    step_bytes = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (grad_out, weight, scores, state, stream, _channels, blocks, rows, columns, grad_block, grad_channel, grad_row,
         weight_channel, sources, source_count) = arguments(args, 15)  # fmt: skip
        for channel in range(first, last):
            error, size = 0.0, 0.0
            if how == BY_CHANCE:
                key = stream_key(load_i64(state + 16), load_i64(state + 8), stream)
                error = float(mixed(key + np.uint64(channel)) >> np.uint64(40))
            else:
                total = broadcast(0.0, lanes)
                for block in range(blocks):
                    for row in range(rows):
                        source = grad_out + block * grad_block + channel * grad_channel + row * grad_row
                        for i in range(columns):
                            total = total + absolute(load(source + i * step_bytes, lanes))
                error = sum_lanes(total)
            if how == BY_ERROR_AND_WEIGHTS:
                for k in range(source_count):
                    size += abs(load_f32(weight + channel * weight_channel + load_i64(sources + 8 * k)))
            store_f32(scores + 8 * channel, error)
            store_f32(scores + 8 * channel + 4, size)

    return body


@njit
def _combined(scores: Any, channel: Any, error_unit: Any, size_unit: Any) -> Any:
    """Return a channel's score; what is not finite counts most, so that the step's check meets it."""
    score = load_f32(scores + 8 * channel) * error_unit + load_f32(scores + 8 * channel + 4) * size_unit
    return score if score < math.inf else math.inf


@njit
def is_kept(kept: Any, kept_count: Any, channel: Any) -> bool:
    """Whether a list of numbers (float32) holds a channel's."""
    found = False
    for i in range(kept_count):
        found = found or int(load_f32(kept + 4 * i)) == channel
    return found


@kernel("scores", "kept", "channels", "kept_count", "expected", "missed")
def keep_channels() -> Body:
    """Write the numbers (float32) of the ``kept_count`` channels with the highest scores, ascending. One job.

    ``expected``: the ``kept_count`` numbers that the last call wrote; ``missed`` takes those kept that are not among
    them, and -1 behind. Both may be 0, for nothing.

    The score is twice the share of the error maps' norm plus the share of the weights' norm (Wu et al. with gamma1 = 1
    and gamma2 = 2, each norm relative to the layer's sum: the errors shrink during training, the weights do not).
    Of equal scores the first channel's counts more.
    """

    def body(args: int, first: int, last: int) -> None:
        scores, kept, channels, kept_count, expected, missed = arguments(args, 6)
        errors, sizes = 0.0, 0.0
        for channel in range(channels):
            errors += load_f32(scores + 8 * channel)
            sizes += load_f32(scores + 8 * channel + 4)
        error_unit = 2.0 / errors if errors > 0.0 else 0.0
        size_unit = 1.0 / sizes if sizes > 0.0 else 0.0
        count = 0
        for channel in range(channels):
            own, above = _combined(scores, channel, error_unit, size_unit), 0
            for other in range(channels):
                score = _combined(scores, other, error_unit, size_unit)
                if score > own or (score == own and other < channel):
                    above += 1
            if above < kept_count:
                store_f32(kept + 4 * count, float(channel))
                count += 1
        if expected != 0:
            fill = 0
            for i in range(kept_count):
                if not is_kept(expected, kept_count, int(load_f32(kept + 4 * i))):
                    store_f32(missed + 4 * fill, load_f32(kept + 4 * i))
                    fill += 1
            for i in range(kept_count):
                store_f32(expected + 4 * i, load_f32(kept + 4 * i))
                if i >= fill:
                    store_f32(missed + 4 * i, -1.0)

    return body


@kernel("kept", "kept_count", "taps", "tap_count", "row_taps", "grad_channel", "weight_channel", "terms", "sources")
def listed_terms() -> Body:
    """Write the tables of a gather-multiply over listed channels: int64 offsets of terms and of their weights.

    Job: a listed channel. ``taps``: table of int64 pairs (offset of the term, offset of its weight) for channel 0,
    ``row_taps`` of them per row of the kernel. The order is that of ``ops.conv.Phase.terms``.
    """

    def body(args: int, first: int, last: int) -> None:
        (kept, kept_count, taps, tap_count, row_taps, grad_channel, weight_channel, terms,
         sources) = arguments(args, 9)  # fmt: skip
        for job in range(first, last):
            channel = int(load_f32(kept + 4 * job))
            for tap in range(tap_count):
                place = 8 * ((tap // row_taps * kept_count + job) * row_taps + tap % row_taps)
                store_i64(terms + place, channel * grad_channel + load_i64(taps + 16 * tap))
                store_i64(sources + place, channel * weight_channel + load_i64(taps + 16 * tap + 8))

    return body


@kernel("target", "kept", "kept_count", "weight_channel", "sources", "source_count")
def zero_unlisted(lanes: int) -> Body:
    """Set the weights of all channels that are not listed to 0. Job: a channel.

    ``sources``: byte offsets of a channel's weights; only where the first of each ``lanes`` neighbours lies.
    """

    def body(args: int, first: int, last: int) -> None:
        target, kept, kept_count, weight_channel, sources, source_count = arguments(args, 6)
        for channel in range(first, last):
            if not is_kept(kept, kept_count, channel):
                for k in range(source_count):
                    store(target + channel * weight_channel + load_i64(sources + 8 * k), broadcast(0.0, lanes))

    return body


@kernel(
    "x", "grad_out", "grad_weight", "kept", "pixels", "terms", "pixel_count", "term_count", "channel_count",
    "x_block", "grad_block", "grad_channel", "weight_channel", "blocks", "groups", "pixel_chunk", "term_chunk",
    "term_chunks", "channel_tiles", "parts", "part_bytes", "x_apart",
)  # fmt: skip
def correlate_listed(lanes: int, channels: int, width: int, kind: int, few: int, x_runs: int = 1) -> Body:
    """Do as ``dense.correlate`` for the channels whose numbers ``kept`` holds; lanes hold samples.

    Job: (part of the blocks, tile of listed channels, chunk of terms).
    """
    fewer = few or channels

    def body(args: int, first: int, last: int) -> None:
        (x, grad_out, grad_weight, kept, pixels, terms, pixel_count, term_count, channel_count, x_block, grad_block,
         grad_channel, weight_channel, blocks, _groups, pixel_chunk, term_chunk, term_chunks, channel_tiles, parts,
         part_bytes, x_apart) = arguments(args, 22)  # fmt: skip
        jobs = channel_tiles * term_chunks
        for part in range(first // jobs, (last - 1) // jobs + 1):
            begin, target = part * blocks // parts, grad_weight + part * part_bytes
            for block in range(begin, (part + 1) * blocks // parts):
                source, grad = x + block * x_block, grad_out + block * grad_block
                for p in range(0, pixel_count, pixel_chunk):
                    count = min(pixel_chunk, pixel_count - p)
                    for job in range(max(0, first - part * jobs), min(jobs, last - part * jobs)):
                        chunk_k, c = job % term_chunks, job // term_chunks * channels
                        last_term = min(term_count, (chunk_k + 1) * term_chunk)
                        rows = min(channels, channel_count - c)
                        for k in range(chunk_k * term_chunk, last_term, width):
                            if rows == few:
                                correlate_listed_tile(
                                    source, grad, target, kept + 4 * c, pixels + 16 * p, terms + 16 * k, count,
                                    grad_channel, weight_channel, rows, last_term - k, block - begin + p, x_apart,
                                    fewer, width, lanes, x_runs,
                                )  # fmt: skip
                            else:
                                correlate_listed_tile(
                                    source, grad, target, kept + 4 * c, pixels + 16 * p, terms + 16 * k, count,
                                    grad_channel, weight_channel, rows, last_term - k, block - begin + p, x_apart,
                                    channels, width, lanes, x_runs,
                                )  # fmt: skip

    return body


@kernel("grad_out", "grad_bias", "kept", "kept_count", "blocks", "rows", "columns", "grad_block", "grad_channel",
        "grad_row")  # fmt: skip
def bias_gradient_listed(lanes: int) -> Body:
    """Write the sum of the output gradient of every listed channel, 0 for the others. Job: a channel."""
    step_bytes = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (grad_out, grad_bias, kept, kept_count, blocks, rows, columns, grad_block, grad_channel,
         grad_row) = arguments(args, 10)  # fmt: skip
        for channel in range(first, last):
            total = broadcast(0.0, lanes)
            for block in range(blocks if is_kept(kept, kept_count, channel) else 0):
                for row in range(rows):
                    source = grad_out + block * grad_block + channel * grad_channel + row * grad_row
                    for i in range(columns):
                        total = total + load(source + i * step_bytes, lanes)
            store_f32(grad_bias + 4 * channel, sum_lanes(total))

    return body
