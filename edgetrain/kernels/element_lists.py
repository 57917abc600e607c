"""Lists of numbers: the operand of a weight gradient of which single numbers are kept (SWAT as published).

Lanes of samples cannot skip single numbers: at 90 % zeros four of five vectors of 16 still hold one that counts. So
the other operand is turned first, output channels next to each other (``turn_maps``); then one number of the input
meets a vector of channels at every kernel position (``correlate_elements``).

A *segment* lists the kept numbers of one channel, of all samples: an int32 byte offset into the turned maps and the
float32 itself, in two arrays. ``segments`` holds int64 pairs (first number, how many). Lists that only save memory
tell the places in the map itself (``expand_elements``).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit
from numba.core import cgutils, types

from edgetrain.kernels.codes import DENSITY, THRESHOLD
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    F32,
    I32,
    I64,
    absolute,
    arguments,
    broadcast,
    call_llvm,
    intrinsic,
    literal,
    load,
    load_f32,
    load_i32,
    load_i64,
    pointer,
    repeat,
    select_ge,
    select_gt,
    splat,
    store,
    store_f32,
    store_i32,
    store_i64,
    suffix,
    sum_lanes,
)
from edgetrain.kernels.tiles import _accumulators, _fma, _offsets, _scatter, _vector_load
from edgetrain.kernels.turning import turn_tile
from edgetrain.kernels.vector_lists import SMALLEST, float_of, kth_largest, share_of

_MAPS = ("channels", "rows", "columns", "x_block", "x_channel", "x_row")


@njit
def _count_plane(x: Any, limit: Any, alive: Any, rows: Any, columns: Any, x_row: Any, width: Any) -> Any:
    """Return how many numbers of a plane reach the limit, lanes without a sample left out."""
    zero, one, count = broadcast(0.0, width), broadcast(1.0, width), 0
    for row in range(rows):
        part = zero
        for i in range(columns):
            size = absolute(load(x + row * x_row + i * 4 * width, width)) * alive
            part = part + select_ge(size, limit, one, zero)  # a NaN does not reach it, nor does anything a NaN
        count += int(sum_lanes(part))
    return count


@kernel("x", "counts", "record", "mask", "mask_block", "mask_channel", *_MAPS)
def count_elements(lanes: int) -> Body:
    """Write how many numbers of every plane reach the record's threshold, int64. Job: (block, channel).

    ``mask``: 1 for lanes that count, else 0, of every block or channel.
    """

    def body(args: int, first: int, last: int) -> None:
        (x, counts, record, mask, mask_block, mask_channel, channels, rows, columns, x_block, x_channel,
         x_row) = arguments(args, 12)  # fmt: skip
        limit = broadcast(load_f32(record + 4 * THRESHOLD), lanes)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            alive = load(mask + block * mask_block + channel * mask_channel, lanes)
            plane = x + block * x_block + channel * x_channel
            store_i64(counts + 8 * job, _count_plane(plane, limit, alive, rows, columns, x_row, lanes))

    return body


@njit
def _count_planes(
    x: Any, counts: Any, limit: Any, mask: Any, mask_block: Any, mask_channel: Any, blocks: Any, channels: Any,
    rows: Any, columns: Any, x_block: Any, x_channel: Any, x_row: Any, width: Any,
) -> Any:  # fmt: skip
    """Write how many numbers of every plane reach the limit; return the sum."""
    total = 0
    for plane in range(blocks * channels):
        alive = load(mask + plane // channels * mask_block + plane % channels * mask_channel, width)
        source = x + plane // channels * x_block + plane % channels * x_channel
        count = _count_plane(source, broadcast(limit, width), alive, rows, columns, x_row, width)
        store_i64(counts + 8 * plane, count)
        total += count
    return total


@njit
def limit_of_step(record: Any, state: Any, refresh: Any) -> Any:
    """Return the record's threshold, or 0 in steps that choose one anew, whose maps must be whole until then."""
    limit = load_f32(record + 4 * THRESHOLD)
    return np.float32(0.0) if limit <= 0.0 or load_i64(state + 8) % refresh == 0 else limit


@kernel(
    "x", "magnitudes", "counts", "quotas", "starts", "counters", "record", "mask", "mask_block", "mask_channel",
    "threshold", "tally", "state", "blocks", *_MAPS, "capacity", "refresh", "sample_numbers", "parts",
)  # fmt: skip
def element_threshold(lanes: int) -> Body:
    """Do as ``vector_lists.choose_threshold`` for single numbers, whose sizes it computes only when it needs them.

    That is one job of up to six passes over all numbers, once in ``refresh`` steps, and in every step where the
    capacity does not hold all equal ones; else it adds up the counts.

    ``magnitudes``: scratch for all of them. ``starts`` has one entry more than there are channels. ``sample_numbers``:
    how many a sample has. ``threshold``: the limit, and the number from which on all are kept: where the capacity does
    not hold all that are equal to the limit, that is the next one, and of the equal ones every plane keeps the first
    ``quotas`` (int64). ``parts``: counts per plane; ``starts`` means something with one only. One job.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, magnitudes, counts, quotas, starts, counters, record, mask, mask_block, mask_channel, threshold, tally,
         state, blocks, channels, rows, columns, x_block, x_channel, x_row, capacity, refresh, sample_numbers,
         parts) = arguments(args, 24)  # fmt: skip
        planes = blocks * channels
        total, limit, room = 0, load_f32(record + 4 * THRESHOLD), planes * rows * columns * lanes
        numbers = load_i64(state) * sample_numbers  # without those of lanes that hold no sample
        for part in range(planes * parts):
            total += load_i64(counts + 8 * part)
        above = limit
        if limit_of_step(record, state, refresh) == 0.0 or total > capacity:
            target = magnitudes
            for plane in range(planes):
                alive = load(mask + plane // channels * mask_block + plane % channels * mask_channel, lanes)
                for row in range(rows):
                    source = x + plane // channels * x_block + plane % channels * x_channel + row * x_row
                    for i in range(columns):
                        store(target, absolute(load(source + i * step, lanes)) * alive)
                        target += step
            wanted = min(capacity, share_of(numbers, load_f32(record + 4 * DENSITY)))
            bits = max(SMALLEST, kth_largest(magnitudes, room, wanted, counters))
            above = limit = float_of(bits, counters)
            total = _count_planes(x, counts, limit, mask, mask_block, mask_channel, blocks, channels, rows, columns,
                                  x_block, x_channel, x_row, lanes)  # fmt: skip
            if total > capacity:
                above = float_of(bits + 1, counters)
                spare = wanted - _count_planes(x, quotas, above, mask, mask_block, mask_channel, blocks, channels, rows,
                                               columns, x_block, x_channel, x_row, lanes)  # fmt: skip
                for plane in range(planes):
                    larger = load_i64(quotas + 8 * plane)
                    quota = min(spare, load_i64(counts + 8 * plane) - larger)
                    spare -= quota
                    store_i64(quotas + 8 * plane, quota)
                    store_i64(counts + 8 * plane, larger + quota)
                total = wanted
        store_f32(threshold, limit)
        store_f32(threshold + 4, above)
        store_i64(tally, total)
        store_i64(tally + 8, numbers)
        start = 0
        for channel in range(channels):
            store_i64(starts + 8 * channel, start)
            for block in range(blocks):
                start += load_i64(counts + 8 * (block * channels + channel))
        store_i64(starts + 8 * channels, start)

    return body


@kernel(
    "x", "y", "counts", "record", "mask", "mask_block", "mask_channel", *_MAPS, "y_block", "y_channel", "y_row", "top",
    "left", "bottom", "right", "row_chunk", "parts",
)  # fmt: skip
def copy_elements(lanes: int, width: int) -> Body:
    """Do the work of ``count_elements``; copy the numbers that are counted, 0 for the others, zeros around them.

    Counted apart, in a pass of its own, SWAT of half the weights and activations took 2 % more of a step of ResNet-20
    (batch 32, two threads). Job: (block, channel, part), ``row_chunk`` rows with a count of their own, the border's
    counted as rows. ``width``: lanes of the vectors in which rows without their border are read, a multiple of
    ``lanes``.
    """
    step, wide = 4 * lanes, 4 * width

    def body(args: int, first: int, last: int) -> None:
        (x, y, counts, record, mask, mask_block, mask_channel, channels, rows, columns, x_block, x_channel, x_row,
         y_block, y_channel, y_row, top, left, bottom, right, row_chunk, parts) = arguments(args, 22)  # fmt: skip
        limit = broadcast(load_f32(record + 4 * THRESHOLD), width)
        nothing, zero, one = broadcast(0.0, lanes), broadcast(0.0, width), broadcast(1.0, width)
        for job in range(first, last):
            plane, part, count = job // parts, job % parts, 0
            block, channel = plane // channels, plane % channels
            alive = repeat(load(mask + block * mask_block + channel * mask_channel, lanes), width)
            begin = part * row_chunk - top
            for row in range(begin, min(begin + row_chunk, rows + bottom)):
                source = x + block * x_block + channel * x_channel + row * x_row
                target = y + block * y_block + channel * y_channel + row * y_row
                inside, found = columns if 0 <= row < rows else 0, zero
                for i in range(-left, 0):
                    store(target + i * step, nothing)
                for place in range(0, inside * step, wide):
                    value = load(source + place, width)
                    size = absolute(value)
                    store(target + place, select_gt(limit, size, zero, value))
                    found = found + select_ge(size * alive, limit, one, zero)
                for i in range(inside, columns + right):
                    store(target + i * step, nothing)
                count += int(sum_lanes(found))
            store_i64(counts + 8 * job, count)

    return body


@kernel(
    "x", "y", "threshold", "quotas", "record", "mask", "mask_block", "mask_channel", *_MAPS, "y_block", "y_channel",
    "y_row",
)  # fmt: skip
def keep_elements(lanes: int) -> Body:
    """Copy the numbers that ``element_threshold`` keeps, if others than ``copy_elements`` has kept.

    Job: (block, channel).
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, threshold, quotas, record, mask, mask_block, mask_channel, channels, rows, columns, x_block, x_channel,
         x_row, y_block, y_channel, y_row) = arguments(args, 17)  # fmt: skip
        least, above = load_f32(threshold), load_f32(threshold + 4)
        if least == above == load_f32(record + 4 * THRESHOLD):
            return
        limit, zero = broadcast(above, lanes), broadcast(0.0, lanes)
        for job in range(first, last):
            block, channel = job // channels, job % channels
            for row in range(rows):
                source = x + block * x_block + channel * x_channel + row * x_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for i in range(columns):
                    value = load(source + i * step, lanes)
                    store(target + i * step, select_gt(limit, absolute(value), zero, value))
                if above > least:
                    alive, quota = mask + block * mask_block + channel * mask_channel, load_i64(quotas + 8 * job)
                    for i in range(0, columns * step, 4):
                        number = load_f32(source + i)
                        if quota > 0 and least <= abs(number) * load_f32(alive + i % step) < above:
                            store_f32(target + i, number)
                            quota -= 1
                    store_i64(quotas + 8 * job, quota)

    return body


@kernel("x", "threshold", "record", "state", "refresh", *_MAPS)
def drop_elements(lanes: int, width: int) -> Body:
    """Set to 0 what a threshold that ``element_threshold`` has chosen anew does not keep: in ``limit_of_step``'s steps.

    For maps that were written by that limit (``normalization.batch_norm_gradient``), and capacities that hold all.
    Job: (block, channel).
    """
    wide = 4 * width

    def body(args: int, first: int, last: int) -> None:
        x, threshold, record, state, refresh, channels, rows, columns, x_block, x_channel, x_row = arguments(args, 11)
        if limit_of_step(record, state, refresh) > 0.0:
            return
        limit, zero = broadcast(load_f32(threshold), width), broadcast(0.0, width)
        for job in range(first, last):
            for row in range(rows):
                place = x + job // channels * x_block + job % channels * x_channel + row * x_row
                for i in range(0, columns * 4 * lanes, wide):
                    value = load(place + i, width)
                    store(place + i, select_gt(limit, absolute(value), zero, value))

    return body


def _packs(context: Any, builder: Any, lanes: int) -> bool:
    """Whether the machine that is compiled for can pack the lanes of such a vector (AVX-512)."""
    _, _, features = context.codegen().magic_tuple()
    return lanes >= 4 and str(builder.module.triple).startswith("x86_64") and "+avx512vl" in features


def append_where(
    context: Any, builder: Any, values: Any, places: Any, vector: Any, numbers: Any, counted: Any
) -> Any:
    """Emit the writing of the lanes of ``vector`` and ``numbers`` that are ``counted``; return how many these are.

    What is behind the lanes that count is overwritten by up to a whole vector.

    Where no instruction packs lanes, every lane is stored, and the next one over it if it does not count: no branch
    that could be guessed wrong.
    """
    lanes = vector.type.count
    if _packs(context, builder, lanes):
        for operand, target in ((vector, values), (numbers, places)):
            kind = "f32" if operand is vector else "i32"
            name = f"llvm.x86.avx512.mask.compress.v{lanes}{kind}"
            kept = call_llvm(builder, name, operand, ir.Constant(operand.type, ir.Undefined), counted)
            builder.store(kept, pointer(builder, target, kept.type), align=4)
        bits = builder.bitcast(counted, ir.IntType(lanes))
        return builder.zext(call_llvm(builder, f"llvm.ctpop.i{lanes}", bits), I64)
    count: Any = ir.Constant(I64, 0)
    for lane in range(lanes):
        number, place = (builder.extract_element(v, ir.Constant(I32, lane)) for v in (vector, numbers))
        behind = builder.mul(count, ir.Constant(I64, 4))
        builder.store(number, pointer(builder, builder.add(values, behind), F32))
        builder.store(place, pointer(builder, builder.add(places, behind), I32))
        flag = builder.extract_element(counted, ir.Constant(I32, lane))
        count = builder.add(count, builder.zext(flag, I64))
    return count


@intrinsic
def append(
    typingctx: Any, values: Any, places: Any, vector: Any, alive: Any, limit: Any, base: Any, lane_step: Any
) -> Any:
    """Write the lanes of ``vector`` that count to ``values``, and their places; return how many these are.

    A lane counts where ``alive`` is 1 and its size reaches ``limit``; its place is ``base + lane * lane_step``, int32.
    See ``append_where`` for what is overwritten behind them.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values_, places_, vector_, alive_, limit_, base_, step_ = args[:7]
        lanes = vector_.type.count
        size = builder.fmul(call_llvm(builder, f"llvm.fabs.{suffix(vector_.type)}", vector_), alive_)
        counted = builder.fcmp_ordered(">=", size, splat(builder, limit_, lanes))
        lane_numbers = ir.Constant(ir.VectorType(I32, lanes), list(range(lanes)))
        steps = builder.mul(splat(builder, builder.trunc(step_, I32), lanes), lane_numbers)
        numbers = builder.add(splat(builder, builder.trunc(base_, I32), lanes), steps)
        return append_where(context, builder, values_, places_, vector_, numbers, counted)

    return types.int64(types.int64, types.int64, vector, vector, types.float32, types.int64, types.int64), codegen


@kernel(
    "x", "starts", "threshold", "quotas", "mask", "segments", "places", "values", "pixels", "strip_starts", "strips",
    "blocks", "channels", "x_block", "x_channel", "other_block", "other_sample",
)  # fmt: skip
def list_elements(lanes: int) -> Body:
    """List the numbers that ``element_threshold`` keeps. Job: channel.

    ``pixels``: table of int64 pairs (offset in a sample of the maps that places are told in, offset in ``x``), strip
    after strip from ``strip_starts`` on. Segments are ``[strip][channel]``.
    """

    def body(args: int, first: int, last: int) -> None:
        (x, starts, threshold, quotas, mask, segments, places, values, pixels, strip_starts, strips, blocks, channels,
         x_block, x_channel, other_block, other_sample) = arguments(args, 17)  # fmt: skip
        least, limit = load_f32(threshold), load_f32(threshold + 4)
        for channel in range(first, last):
            at, end = load_i64(starts + 8 * channel), load_i64(starts + 8 * channel + 8)
            for strip in range(strips):
                segment = segments + 16 * (strip * channels + channel)
                store_i64(segment, at)
                for block in range(blocks):
                    alive = load(mask + block * 4 * lanes, lanes)
                    source, sample = x + block * x_block + channel * x_channel, block * other_block
                    for i in range(load_i64(strip_starts + 8 * strip), load_i64(strip_starts + 8 * strip + 8)):
                        pixel, base = source + load_i64(pixels + 16 * i + 8), sample + load_i64(pixels + 16 * i)
                        if at + lanes <= end:
                            at += append(values + 4 * at, places + 4 * at, load(pixel, lanes), alive, limit, base,
                                         other_sample)  # fmt: skip
                        else:  # a whole vector would reach into the next channel's segment
                            for lane in range(lanes):
                                number = load_f32(pixel + 4 * lane)
                                if abs(number) * load_f32(mask + 4 * (block * lanes + lane)) >= limit:
                                    store_f32(values + 4 * at, number)
                                    store_i32(places + 4 * at, base + lane * other_sample)
                                    at += 1
                    if limit > least:
                        place = quotas + 8 * (block * channels + channel)
                        for i in range(load_i64(strip_starts + 8 * strip), load_i64(strip_starts + 8 * strip + 8)):
                            pixel, base = source + load_i64(pixels + 16 * i + 8), sample + load_i64(pixels + 16 * i)
                            for lane in range(lanes):
                                number, left = load_f32(pixel + 4 * lane), load_i64(place)
                                size = abs(number) * load_f32(mask + 4 * (block * lanes + lane))
                                if left > 0 and least <= size < limit:
                                    store_f32(values + 4 * at, number)
                                    store_i32(places + 4 * at, base + lane * other_sample)
                                    store_i64(place, left - 1)
                                    at += 1
                store_i64(segment + 8, at - load_i64(segment))

    return body


@kernel("segments", "places", "values", "y", "blocks", "rows", "columns", "y_block", "y_channel", "y_row")
def expand_elements(lanes: int) -> Body:
    """Write the listed numbers of a channel to their places in ``y``, zeros to all others. Job: channel."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        segments, places, values, y, blocks, rows, columns, y_block, y_channel, y_row = arguments(args, 10)
        zero = broadcast(0.0, lanes)
        for channel in range(first, last):
            for block in range(blocks):
                for row in range(rows):
                    target = y + block * y_block + channel * y_channel + row * y_row
                    for i in range(columns):
                        store(target + i * step, zero)
            start, count = load_i64(segments + 16 * channel), load_i64(segments + 16 * channel + 8)
            for i in range(start, start + count):
                store_f32(y + channel * y_channel + load_i32(places + 4 * i), load_f32(values + 4 * i))

    return body


@kernel(
    "x", "y", "channels", "rows", "columns", "top", "left", "bottom", "right", "x_block", "x_channel", "x_row",
    "y_sample", "y_pixel",
)  # fmt: skip
def turn_maps(lanes: int, width: int) -> Body:
    """Write ``y[sample][top + row][left + column][channel]`` from lanes of samples, zeros around. Job: (block, row).

    ``y_pixel`` is a whole number of vectors of ``width`` channels, as many as lanes if there is more than one; what is
    behind the last channel is anything finite.
    """
    step = 4 * width

    def body(args: int, first: int, last: int) -> None:
        (x, y, channels, rows, columns, top, left, bottom, right, x_block, x_channel, x_row, y_sample,
         y_pixel) = arguments(args, 14)  # fmt: skip
        height, y_row, zero = top + rows + bottom, (left + columns + right) * y_pixel, broadcast(0.0, width)
        for job in range(first, last):
            block, row = job // height, job % height - top
            start = y + block * lanes * y_sample + job % height * y_row
            if row < 0 or row >= rows:
                for sample in range(lanes):
                    for i in range(0, y_row, step):
                        store(start + sample * y_sample + i, zero)
                continue
            for sample in range(lanes):
                for i in range(0, left * y_pixel, step):
                    store(start + sample * y_sample + i, zero)
                for i in range((left + columns) * y_pixel, y_row, step):
                    store(start + sample * y_sample + i, zero)
            for column in range(columns):
                source = x + block * x_block + row * x_row + column * 4 * lanes
                target = start + (left + column) * y_pixel
                for c in range(0, channels, width):
                    turn_tile(source + c * x_channel, x_channel, channels - c, target + 4 * c, y_sample, width, lanes)

    return body


def listed(builder: Any, places: Any, values: Any, number: Any, lanes: int) -> tuple[Any, Any]:
    """Return a listed number's place, and the number in all lanes."""
    at = builder.mul(number, ir.Constant(I64, 4))
    place = builder.sext(builder.load(pointer(builder, builder.add(places, at), I32)), I64)
    return place, splat(builder, builder.load(pointer(builder, builder.add(values, at), F32)), lanes)


@intrinsic(prefer_literal=True)
def element_tile(
    typingctx: Any, other: Any, places: Any, values: Any, count: Any, terms: Any, target: Any, channel: Any, rows: Any,
    columns: Any, adds: Any, vectors: Any, width: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Write ``target[c][k] = sum over a list of value * other[its place + term k][c]``, channels in the lanes.

    Args:
        other: address of the turned maps, first channel of the tile.
        places, values: the list: int32 byte offsets and float32, ``count`` of each.
        terms: table of ``width`` int64 pairs (offset in ``other``, offset in ``target``).
        target, channel: address of the first channel's weights, bytes between channels.
        rows, columns: how many channels and terms exist.
        adds: whether the sums are added to what is there.
        vectors, width, lanes: compile-time sizes: ``vectors * width`` accumulators of ``lanes``.
    """
    cv, kw, n = literal(vectors), literal(width), literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        other_, places_, values_, count_, terms_, target_, channel_, rows_, columns_, adds_ = args[:10]
        table = _offsets(builder, terms_, 2 * kw)
        inputs = [builder.add(other_, offset) for offset in table[0::2]]
        slots = _accumulators(builder, cv * kw, n)
        with cgutils.for_range(builder, count_) as loop:
            place, value = listed(builder, places_, values_, loop.index, n)
            for k, base in enumerate(inputs):
                for v in range(cv):
                    source = builder.add(builder.add(base, place), ir.Constant(I64, 4 * n * v))
                    _fma(builder, value, _vector_load(builder, source, n), slots[v * kw + k])
        sums = [builder.load(slot) for slot in slots]
        kept = builder.icmp_signed("!=", adds_, ir.Constant(I64, 0))
        _scatter(builder, sums, kw, target_, channel_, table[1::2], rows_, columns_, kept)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 10, vectors, width, lanes), codegen


@kernel(
    "other", "segments", "places", "values", "target", "terms", "term_count", "term_parts", "channel_count",
    "channel_parts", "weight_out", "weight_in", "strips", "strip_segments",
)  # fmt: skip
def correlate_elements(lanes: int, vectors: int, width: int) -> Body:
    """Write ``target[c][i][k] = sum over the listed numbers of input channel i of number * other[place + term k][c]``.

    Job: (input channel, part of the output channels, part of the terms). ``terms``: table of int64 pairs (offset in
    ``other``, offset in ``target``), whole multiples of ``width``. ``strips`` of the list, whose segments are
    ``strip_segments`` bytes apart, follow one another, so that what a strip meets stays in the cache.
    """
    channels = lanes * vectors

    def body(args: int, first: int, last: int) -> None:
        (other, segments, places, values, target, terms, term_count, term_parts, channel_count, channel_parts,
         weight_out, weight_in, strips, strip_segments) = arguments(args, 14)  # fmt: skip
        for strip in range(strips):
            for job in range(first, last):
                k, part = job % term_parts * width, job // term_parts
                c, channel = part % channel_parts * channels, part // channel_parts
                segment = segments + strip * strip_segments + 16 * channel
                start, count = load_i64(segment), load_i64(segment + 8)
                element_tile(
                    other + 4 * c, places + 4 * start, values + 4 * start, count, terms + 16 * k,
                    target + channel * weight_in + c * weight_out, weight_out, channel_count - c, term_count - k,
                    strip, vectors, width, lanes,
                )  # fmt: skip

    return body
