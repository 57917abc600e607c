"""Error maps behind max pools, as lists: of all pixels of a window one has a gradient, and behind a Relu often none.

``list_pooled`` reads what comes to the pool and where each largest number was; the error map itself, most of it zeros,
is never written. A *strip* is a few neighbouring samples, whose turned maps fit the first-level cache; a *segment*
lists the numbers of one strip and one channel: an int32 byte offset into the maps, with their channels next to each
other (``element_lists.turn_maps``), and the float32 itself, in two arrays. ``segments`` holds int64 pairs (first
number, how many), ``[strip][channel]``.

Both products meet, for every number of a list, the positions of the convolution's kernel, cut into ``parts`` of
``rows`` x ``columns`` positions whose vectors stay in registers. ``starts``: table of the int64 offsets, ``rows`` for
each part, from the pixel that a window begins at; neighbours in a row are ``apart`` bytes apart.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types

from edgetrain.kernels.element_lists import append_where, listed
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    I32,
    I64,
    add_whole,
    arguments,
    broadcast,
    call_llvm,
    intrinsic,
    literal,
    load,
    load_f32,
    load_i64,
    pointer,
    select_same,
    store,
    store_f32,
    store_i64,
    suffix,
    unpack,
    whole,
)
from edgetrain.kernels.tiles import _accumulators, _add_to, _fma, _offsets, _vector_load
from edgetrain.kernels.turning import turn_back_tile, turn_tile


@intrinsic
def append_numbers(typingctx: Any, values: Any, places: Any, vector: Any, numbers: Any) -> Any:
    """Write the lanes of ``vector`` that are not 0 to ``values``, those of ``numbers`` to ``places``; return how many.

    A NaN is not 0: what is broken must be noticed. See ``append_where`` for what is overwritten behind them.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        values_, places_, vector_, numbers_ = args
        counted = builder.fcmp_unordered("!=", vector_, ir.Constant(vector_.type, [0.0] * vector_.type.count))
        integers = builder.bitcast(numbers_, ir.VectorType(I32, vector_.type.count))
        return append_where(context, builder, values_, places_, vector_, integers, counted)

    return types.int64(types.int64, types.int64, vector, vector), codegen


@njit(inline="always")
def _turn_windows(
    positions: Any, grad: Any, grad_row: Any, corners: Any, taps: Any, out_rows: Any, out_columns: Any, tile: Any,
    turned: Any, sample_bytes: Any, per_word: Any, bits: Any, tap_count: Any, width: Any,
) -> None:  # fmt: skip
    """Write a plane's gradients and the places they belong to, sample by sample: ``turned[sample][window]``.

    Places follow ``width * sample_bytes`` behind the gradients. ``tile``: scratch for two tiles.
    """
    step, behind = 4 * width, 4 * width * width
    number, total = 0, out_rows * out_columns
    while number < total:
        for i in range(width):
            window = number + i
            value, place = broadcast(0.0, width), whole(0, width)
            if window < total:
                row = window // out_columns
                value = load(grad + row * grad_row + (window - row * out_columns) * step, width)
                word = load(positions + window // per_word * step, width)
                position = unpack(word, window % per_word * bits, bits)
                for k in range(1, tap_count):
                    place = select_same(position, whole(k, width), whole(load_i64(taps + 8 * k), width), place)
                place = add_whole(place, load_i64(corners + 8 * window))
            store(tile + i * step, value)
            store(tile + behind + i * step, place)
        turn_tile(tile, step, width, turned + 4 * number, sample_bytes, width, width)
        turn_tile(tile + behind, step, width, turned + width * sample_bytes + 4 * number, sample_bytes, width, width)
        number += width


@kernel(
    "positions", "grad_out", "segments", "places", "values", "scratch", "corners", "taps", "blocks", "channels",
    "channels_per_job", "out_rows", "out_columns", "positions_block", "positions_channel", "grad_block", "grad_channel",
    "grad_row", "scratch_bytes", "strip_samples", "sample_step", "capacity", "kept", "kept_count",
)  # fmt: skip
def list_pooled(lanes: int, tap_count: int, bits: int) -> Body:
    """List the gradients that are not 0 of all windows, and the places of the pixels that they belong to.

    Job: some channels. ``corners``: table of the byte offset of every window's first pixel; ``taps``: of every pixel in
    a window, from there; ``sample_step``: bytes from a sample to the next. ``capacity``: numbers a channel has room
    for, a vector more than there can be. ``scratch``: of ``scratch_bytes`` for every job. ``kept``: float32 numbers of
    ``kept_count`` channels, the lists of all others are empty; all are listed if ``kept_count`` is 0.

    Args:
        lanes: samples in a vector.
        tap_count: pixels of a window.
        bits: size of a position in the packed positions that ``max_pool`` wrote.
    """
    step, per_word = 4 * lanes, 32 // bits

    def body(args: int, first: int, last: int) -> None:
        (positions, grad_out, segments, places, values, scratch, corners, taps, blocks, channels, channels_per_job,
         out_rows, out_columns, positions_block, positions_channel, grad_block, grad_channel, grad_row, scratch_bytes,
         strip_samples, sample_step, capacity, kept, kept_count) = arguments(args, 24)  # fmt: skip
        windows = -(-out_rows * out_columns // lanes) * lanes
        for job in range(first, last):
            tile = scratch + job * scratch_bytes
            turned = tile + 2 * step * lanes
            for channel in range(job * channels_per_job, min(channels, (job + 1) * channels_per_job)):
                at = begin = channel * capacity
                wanted = kept_count == 0
                for i in range(kept_count):
                    wanted = wanted or load_f32(kept + 4 * i) == channel
                if not wanted:
                    for strip in range(blocks * lanes // strip_samples):
                        store_i64(segments + 16 * (strip * channels + channel), begin)
                        store_i64(segments + 16 * (strip * channels + channel) + 8, 0)
                    continue
                for block in range(blocks):
                    _turn_windows(
                        positions + block * positions_block + channel * positions_channel,
                        grad_out + block * grad_block + channel * grad_channel, grad_row, corners, taps, out_rows,
                        out_columns, tile, turned, 4 * windows, per_word, bits, tap_count, lanes,
                    )  # fmt: skip
                    for lane in range(lanes):
                        sample = block * lanes + lane
                        base, source = sample * sample_step, turned + lane * 4 * windows
                        for i in range(0, 4 * windows, step):
                            numbers = add_whole(load(source + lanes * 4 * windows + i, lanes), base)
                            at += append_numbers(values + 4 * at, places + 4 * at, load(source + i, lanes), numbers)
                        if (sample + 1) % strip_samples == 0:
                            segment = segments + 16 * (sample // strip_samples * channels + channel)
                            store_i64(segment, begin)
                            store_i64(segment + 8, at - begin)
                            begin = at

    return body


def _tile(builder: Any, bases: list[Any], place: Any, columns: int, apart: int, vectors: int, lanes: int) -> list[Any]:
    """Return the addresses ``[rows][columns][vectors]`` that a number meets."""
    lines = [builder.add(base, place) for base in bases]
    steps = [apart * j + 4 * lanes * v for j in range(columns) for v in range(vectors)]
    return [builder.add(line, ir.Constant(I64, step)) for line in lines for step in steps]


def _addresses(builder: Any, address: Any, count: int, lanes: int) -> list[Any]:
    """Return the addresses of neighbouring vectors."""
    return [builder.add(address, ir.Constant(I64, 4 * lanes * i)) for i in range(count)]


@intrinsic(prefer_literal=True)
def sum_tile(
    typingctx: Any, other: Any, places: Any, values: Any, count: Any, starts: Any, sums: Any, adds: Any, vectors: Any,
    rows: Any, columns: Any, apart: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Write ``sums[i][j][c] = sum over a list of value * other[place + start i + j * apart][c]``.

    Args:
        other: address of the turned maps, first channel of the tile.
        places, values: the list: int32 byte offsets and float32, ``count`` of each.
        starts: table of ``rows`` int64 offsets in ``other``.
        sums: address of ``[rows][columns][vectors]`` vectors.
        adds: whether the sums are added to what is there.
        vectors, rows, columns, apart, lanes: compile-time sizes.
    """
    cv, kh, kw, step, n = (literal(size) for size in (vectors, rows, columns, apart, lanes))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        other_, places_, values_, count_, starts_, sums_, adds_ = args[:7]
        bases = [builder.add(other_, offset) for offset in _offsets(builder, starts_, kh)]
        targets, slots = _addresses(builder, sums_, kh * kw * cv, n), _accumulators(builder, kh * kw * cv, n)
        with cgutils.for_range(builder, count_) as loop:
            place, value = listed(builder, places_, values_, loop.index, n)
            for slot, source in zip(slots, _tile(builder, bases, place, kw, step, cv, n), strict=True):
                _fma(builder, value, _vector_load(builder, source, n), slot)
        kept = builder.icmp_signed("!=", adds_, ir.Constant(I64, 0))
        for slot, target in zip(slots, targets, strict=True):
            total = builder.load(slot)
            _add_to(builder, pointer(builder, target, total.type), total, kept)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 7, vectors, rows, columns, apart, lanes), codegen


@intrinsic(prefer_literal=True)
def spread_tile(
    typingctx: Any, target: Any, places: Any, values: Any, count: Any, starts: Any, weight: Any, vectors: Any,
    rows: Any, columns: Any, apart: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Add a list's numbers times weights: ``target[place + start i + j * apart][c] += value * weight[i][j][c]``.

    Args:
        target: address of the turned maps, first channel of the tile.
        weight: address of ``[rows][columns][vectors]`` vectors of weights, which stay in registers.
        places, values, count, starts, vectors, rows, columns, apart, lanes: as in ``sum_tile``.
    """
    cv, kh, kw, step, n = (literal(size) for size in (vectors, rows, columns, apart, lanes))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        target_, places_, values_, count_, starts_, weight_ = args[:6]
        bases = [builder.add(target_, offset) for offset in _offsets(builder, starts_, kh)]
        weights = [_vector_load(builder, source, n) for source in _addresses(builder, weight_, kh * kw * cv, n)]
        with cgutils.for_range(builder, count_) as loop:
            place, value = listed(builder, places_, values_, loop.index, n)
            for weight, address in zip(weights, _tile(builder, bases, place, kw, step, cv, n), strict=True):
                old = _vector_load(builder, address, n)
                total = call_llvm(builder, f"llvm.fma.{suffix(value.type)}", value, weight, old)
                builder.store(total, pointer(builder, address, value.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, vectors, rows, columns, apart, lanes), codegen


@kernel(
    "other", "segments", "places", "values", "sums", "starts", "parts", "channels", "channel_parts", "strips",
    "sums_channel",
)  # fmt: skip
def correlate_pooled(lanes: int, vectors: int, rows: int, columns: int, apart: int) -> Body:
    """Write the weight gradients of an output channel in vectors of input channels. Job: output channel.

    ``other``: first pixel of the turned input; ``sums``: ``[output channel][part of the input channels][part][rows]
    [columns]`` in ``vectors``, an output channel ``sums_channel`` bytes. All output channels of a strip follow one
    another, as what they meet is in the cache.
    """
    channels_bytes = 4 * lanes * vectors
    part_bytes = rows * columns * channels_bytes

    def body(args: int, first: int, last: int) -> None:
        (other, segments, places, values, sums, starts, parts, channels, channel_parts, strips,
         sums_channel) = arguments(args, 11)  # fmt: skip
        for strip in range(strips):
            for channel in range(first, last):
                segment = segments + 16 * (strip * channels + channel)
                start, count = load_i64(segment), load_i64(segment + 8)
                target = sums + channel * sums_channel
                for c in range(channel_parts):
                    for part in range(parts):
                        sum_tile(
                            other + c * channels_bytes, places + 4 * start, values + 4 * start, count,
                            starts + 8 * rows * part, target + (c * parts + part) * part_bytes, strip, vectors, rows,
                            columns, apart, lanes,
                        )  # fmt: skip

    return body


@kernel("sums", "target", "order", "taps", "inputs", "tile", "sums_channel", "weight_out", "weight_in")
def unpack_sums() -> Body:
    """Write an output channel's weight gradients from the sums of ``correlate_pooled``. Job: output channel.

    ``order``: table of the int64 byte offset of every kernel position in an output channel's weights, in the order of
    the sums; ``tile``: input channels of a part.
    """

    def body(args: int, first: int, last: int) -> None:
        sums, target, order, taps, inputs, tile, sums_channel, weight_out, weight_in = arguments(args, 9)
        for channel in range(first, last):
            for c in range(inputs):
                source = sums + channel * sums_channel + 4 * (c // tile * tile * taps + c % tile)
                place = target + channel * weight_out + c * weight_in
                for k in range(taps):
                    store_f32(place + load_i64(order + 8 * k), load_f32(source + 4 * tile * k))

    return body


@kernel(
    "maps", "target", "segments", "places", "values", "weight", "starts", "parts", "channels", "channel_parts",
    "strip_bytes", "weight_tile", "weight_channel",
)  # fmt: skip
def spread_elements(lanes: int, vectors: int, rows: int, columns: int, apart: int) -> Body:
    """Write the input gradient of a strip, turned: every listed number meets all kernel positions. Job: strip.

    ``maps``: of all strips, ``strip_bytes`` each, which become 0 first; ``target``: the first pixel in it. ``weight``:
    packed ``[part of the input channels][output channel][part][rows][columns]`` in ``vectors``, ``weight_tile`` and
    ``weight_channel`` bytes apart.
    """
    step, channels_bytes = 4 * lanes, 4 * lanes * vectors
    part_bytes = rows * columns * channels_bytes

    def body(args: int, first: int, last: int) -> None:
        (maps, target, segments, places, values, weight, starts, parts, channels, channel_parts, strip_bytes,
         weight_tile, weight_channel) = arguments(args, 13)  # fmt: skip
        zero = broadcast(0.0, lanes)
        for strip in range(first, last):
            for i in range(0, strip_bytes, step):
                store(maps + strip * strip_bytes + i, zero)
            for channel in range(channels):
                segment = segments + 16 * (strip * channels + channel)
                start, count = load_i64(segment), load_i64(segment + 8)
                for c in range(channel_parts):
                    for part in range(parts):
                        spread_tile(
                            target + c * channels_bytes, places + 4 * start, values + 4 * start, count,
                            starts + 8 * rows * part,
                            weight + c * weight_tile + channel * weight_channel + part * part_bytes, vectors, rows,
                            columns, apart, lanes,
                        )  # fmt: skip

    return body


@kernel("x", "y", "channels", "rows", "columns", "x_sample", "x_row", "x_pixel", "y_block", "y_channel", "y_row")
def turn_back(lanes: int) -> Body:
    """Write lanes of samples from maps whose channels are next to each other. Job: (block, row)."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, channels, rows, columns, x_sample, x_row, x_pixel, y_block, y_channel,
         y_row) = arguments(args, 11)  # fmt: skip
        for job in range(first, last):
            block, row = job // rows, job % rows
            for column in range(columns):
                source = x + block * lanes * x_sample + row * x_row + column * x_pixel
                target = y + block * y_block + row * y_row + column * step
                for c in range(0, channels, lanes):
                    turn_back_tile(source + 4 * c, x_sample, target + c * y_channel, y_channel, channels - c, lanes)

    return body
