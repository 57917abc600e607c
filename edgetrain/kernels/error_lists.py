"""Lists of the vectors of an error map that are not zero, and the products that skip the others.

Two lists of the same vectors: of every channel the pixels (for the weight gradient, see ``vector_lists``), and of every
pixel the channels (for the input gradient: a pixel of it gathers from few pixels of the error map). Where a max pool
lies behind and nobody wants the input gradient, the first is made without the map, with copies of the vectors.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit
from numba.core import cgutils, types

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    F32,
    I32,
    I64,
    arguments,
    broadcast,
    intrinsic,
    literal,
    load,
    load_i32,
    load_i64,
    pointer,
    select_same,
    store,
    store_i32,
    store_i64,
    unpack,
    whole,
)
from edgetrain.kernels.tiles import _accumulators, _fma, _offsets, _vector_load, _weights


@intrinsic
def is_nonzero(typingctx: Any, vector: Any) -> Any:
    """Return 1 if any lane is not 0 (a NaN is not), else 0."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        lanes = args[0].type.count
        different = builder.fcmp_unordered("!=", args[0], ir.Constant(args[0].type, [0.0] * lanes))
        bits = builder.bitcast(different, ir.IntType(lanes))
        return builder.zext(builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0)), I64)

    return types.int64(vector), codegen


@kernel(
    "grad", "flags", "segments", "pairs", "pixels", "pixel_count", "blocks", "grad_block", "grad_channel", "x_block",
)  # fmt: skip
def list_pixels(lanes: int, flagged: int) -> Body:
    """List the pixels of a channel whose vector is not zero, and flag them if ``flagged``. Job: channel.

    ``pixels``: table of int64 pairs (offset in x, offset in the error map). Segments are ``[channel]``.
    ``flags``: int32 ``[block][channel][pixel]``.
    """

    def body(args: int, first: int, last: int) -> None:
        (grad, flags, segments, pairs, pixels, pixel_count, blocks, grad_block, grad_channel,
         x_block) = arguments(args, 10)  # fmt: skip
        channels = grad_block // grad_channel
        for channel in range(first, last):
            start = channel * blocks * pixel_count
            at = pairs + 16 * start
            for block in range(blocks):
                source = grad + block * grad_block + channel * grad_channel
                flag = flags + 4 * (block * channels + channel) * pixel_count
                for i in range(pixel_count):
                    offset = load_i64(pixels + 16 * i + 8)
                    found = is_nonzero(load(source + offset, lanes))
                    store_i64(at, load_i64(pixels + 16 * i) + block * x_block)
                    store_i64(at + 8, offset + block * grad_block)
                    at += 16 * found
                    if flagged:
                        store_i32(flag + 4 * i, found)
            store_i64(segments + 16 * channel, start)
            store_i64(segments + 16 * channel + 8, (at - pairs) // 16 - start)

    return body


@kernel(
    "positions", "grad_out", "segments", "pairs", "values", "corners", "taps", "channels", "capacity", "out_rows",
    "out_columns", "positions_block", "positions_channel", "grad_block", "grad_channel", "grad_row", "x_block",
)  # fmt: skip
def list_pool_vectors(lanes: int, tap_count: int, bits: int) -> Body:
    """Do the work of ``list_pixels`` on what a max pool's gradient would write, which is copied to ``values``.

    Job: (block, channel), with room for ``capacity`` vectors; segments are ``[block][channel]``, so that who lists a
    block may multiply it. ``grad_out`` comes to the pool, whose windows do not overlap; ``positions`` as for
    ``pooling.max_pool_gradient``. ``corners``: table of the int64 offset in x of every window's first pixel; ``taps``:
    of every pixel of a window, from there.
    """
    step, per_word = 4 * lanes, 32 // bits

    def body(args: int, first: int, last: int) -> None:
        (positions, grad_out, segments, pairs, values, corners, taps, channels, capacity, out_rows, out_columns,
         positions_block, positions_channel, grad_block, grad_channel, grad_row, x_block) = arguments(args, 17)
        zero = broadcast(0.0, lanes)
        for job in range(first, last):
            block, channel, at = job // channels, job % channels, job * capacity
            source, corner = grad_out + block * grad_block + channel * grad_channel, corners
            packed, place = 0, positions + block * positions_block + channel * positions_channel
            for row in range(out_rows):
                for column in range(out_columns):
                    grad = load(source + row * grad_row + column * step, lanes)
                    if is_nonzero(grad):
                        position = unpack(load(place, lanes), packed * bits, bits)
                        for k in range(tap_count):
                            share = select_same(position, whole(k, lanes), grad, zero)
                            store(values + at * step, share)
                            store_i64(pairs + 16 * at, load_i64(corner) + load_i64(taps + 8 * k) + block * x_block)
                            store_i64(pairs + 16 * at + 8, at * step)
                            at += is_nonzero(share)
                    corner += 8
                    packed += 1
                    if packed == per_word:
                        packed, place = 0, place + step
            store_i64(segments + 16 * job, job * capacity)
            store_i64(segments + 16 * job + 8, at - job * capacity)

    return body


@kernel("flags", "entries", "counts", "pixel_count", "channels", "pixel_chunk", "pixel_chunks")
def list_channels() -> Body:
    """List the channels of a pixel whose vector is not zero. Job: (block, chunk of pixels).

    ``entries``: int32 ``[block][pixel][channels]``; ``counts``: int32 ``[block][pixel]``.
    """

    def body(args: int, first: int, last: int) -> None:
        flags, entries, counts, pixel_count, channels, pixel_chunk, pixel_chunks = arguments(args, 7)
        for job in range(first, last):
            block, start = job // pixel_chunks, job % pixel_chunks * pixel_chunk
            end = min(pixel_count, start + pixel_chunk)
            count, entry = counts + 4 * block * pixel_count, entries + 4 * block * pixel_count * channels
            for i in range(start, end):
                store_i32(count + 4 * i, 0)
            for channel in range(channels):
                flag = flags + 4 * (block * channels + channel) * pixel_count
                for i in range(start, end):
                    number = load_i32(count + 4 * i)
                    store_i32(entry + 4 * (i * channels + number), channel)
                    store_i32(count + 4 * i, number + load_i32(flag + 4 * i))

    return body


@njit
def _listed(segments: Any, channels: Any, parts: Any, first: Any, last: Any) -> Any:
    """Return how many vectors are listed of some channels, in all parts."""
    total = 0
    for part in range(parts):
        for channel in range(first, last):
            total += load_i64(segments + 16 * (part * channels + channel) + 8)
    return total


@njit
def _counted(counts: Any, planes: Any, blocks: Any, first: Any, last: Any) -> Any:
    """Return how many vectors of some planes of every block were not zero after and before pruning."""
    kept, before = 0, 0
    for block in range(blocks):
        for plane in range(block * planes + first, block * planes + last):
            kept += load_i64(counts + 16 * plane)
            before += load_i64(counts + 16 * plane + 8)
    return kept, before


@kernel("segments", "counts", "tally", "channels", "planes", "groups", "blocks", "vectors", "parts")
def count_listed() -> Body:
    """Write how many vectors there are, less those that are zero because of pruning, and how many there are. One job.

    Segments are ``[part][channel]``.

    ``counts``: of the gradient that was pruned, see ``stochastic``, which has ``planes`` in a block. Both are cut into
    ``groups`` that belong together. Where an activation lies between, vectors may be zero anyway: as large a share of
    those behind what was pruned away as of those behind what was kept in the same group (and, for groups that kept
    next to nothing, in the whole map). That needs no mask, and hardly overestimates: after 60 steps of the plain
    network of docs/pruning.md it found 42.6 % of the vectors pruned and not zero anyway where 42.1 were (rate 0.75:
    60.0, 59.7). One share for all groups found 43.2 (60.7), and far too many where a channel is always zero.
    """

    def body(args: int, first: int, last: int) -> None:
        segments, counts, tally, channels, planes, groups, blocks, vectors, parts = arguments(args, 9)
        wide, high = channels // groups, planes // groups
        total = _listed(segments, channels, parts, 0, channels)
        everywhere = total / max(1, _counted(counts, planes, blocks, 0, planes)[0])
        pruned = 0.0
        for group in range(groups):
            kept, before = _counted(counts, planes, blocks, group * high, (group + 1) * high)
            listed = _listed(segments, channels, parts, group * wide, (group + 1) * wide)
            pruned += (before - kept) * (listed + everywhere) / (kept + 1)
        store_i64(tally, vectors - min(int(pruned), vectors - total))
        store_i64(tally + 8, vectors)

    return body


@intrinsic(prefer_literal=True)
def gather_tile(
    typingctx: Any, grad: Any, y: Any, weight: Any, entries: Any, counts: Any, meets: Any, meet_count: Any,
    entry_step: Any, grad_channel: Any, weight_channel: Any, y_channel: Any, rows: Any, channels: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Compute ``channels`` input gradients of one pixel from the listed channels of the pixels that it meets.

    Args:
        grad, y: addresses of the block of the error map, and of the pixel of the first channel to compute.
        weight: packed ``[channel of the error map][kernel position][channels]``.
        entries, counts: of the block, see ``list_channels``.
        meets: table of ``meet_count`` int64 triples: pixel of the error map, its offset, offset of the weights.
        entry_step: bytes between the entries of two pixels.
        grad_channel, weight_channel, y_channel: bytes between channels.
        rows: how many of the ``channels`` exist.
    """
    cr, n = literal(channels), literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (grad_, y_, weight_, entries_, counts_, meets_, meet_count_, entry_step_, grad_channel_, weight_channel_,
         y_channel_, rows_) = args[:12]  # fmt: skip
        slots = _accumulators(builder, cr, n)
        with cgutils.for_range(builder, meet_count_) as meet:
            place = builder.add(meets_, builder.mul(meet.index, ir.Constant(I64, 24)))
            pixel, offset, position = _offsets(builder, place, 3)
            listed = builder.gep(pointer(builder, counts_, I32), [pixel])
            count = builder.zext(builder.load(listed), I64)
            first = pointer(builder, builder.add(entries_, builder.mul(pixel, entry_step_)), I32)
            source, factors = builder.add(grad_, offset), builder.add(weight_, position)
            with cgutils.for_range(builder, count) as entry:
                channel = builder.zext(builder.load(builder.gep(first, [entry.index])), I64)
                value = _vector_load(builder, builder.add(source, builder.mul(channel, grad_channel_)), n)
                own = builder.add(factors, builder.mul(channel, weight_channel_))
                for c, factor in enumerate(_weights(builder, own, cr, n)):
                    _fma(builder, factor, value, slots[c])
        for c, slot in enumerate(slots):
            with builder.if_then(builder.icmp_signed(">", rows_, ir.Constant(I64, c)), likely=True):
                target = builder.add(y_, builder.mul(y_channel_, ir.Constant(I64, c)))
                vector = ir.VectorType(F32, n)
                builder.store(builder.load(slot), pointer(builder, target, vector), align=4 * n)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 12), channels, lanes), codegen


@kernel(
    "grad", "y", "weight", "entries", "counts", "meets", "meet_starts", "targets", "pixel_count", "grad_pixels",
    "grad_channels", "channel_count", "grad_block", "grad_channel", "y_block", "y_channel", "weight_tile",
    "weight_channel", "pixel_chunk", "pixel_chunks", "tiles",
)  # fmt: skip
def multiply_lists(lanes: int, channels: int) -> Body:
    """Write the input gradient from the listed vectors of the error map.

    Job: (block, chunk of pixels, tile of channels). ``meets``: see ``gather_tile``, those of pixel p from
    ``meet_starts[p]`` on; ``targets``: its offset in ``y``.
    """

    def body(args: int, first: int, last: int) -> None:
        (grad, y, weight, entries, counts, meets, meet_starts, targets, pixel_count, grad_pixels, grad_channels,
         channel_count, grad_block, grad_channel, y_block, y_channel, weight_tile, weight_channel, pixel_chunk,
         pixel_chunks, tiles) = arguments(args, 21)  # fmt: skip
        for job in range(first, last):
            tile, rest = job % tiles, job // tiles
            chunk, block = rest % pixel_chunks, rest // pixel_chunks
            own = counts + 4 * block * grad_pixels
            listed = entries + 4 * block * grad_pixels * grad_channels
            target = y + block * y_block + tile * channels * y_channel
            for p in range(chunk * pixel_chunk, min(pixel_count, (chunk + 1) * pixel_chunk)):
                start = load_i64(meet_starts + 8 * p)
                gather_tile(
                    grad + block * grad_block, target + load_i64(targets + 8 * p), weight + tile * weight_tile, listed,
                    own, meets + 24 * start, load_i64(meet_starts + 8 * p + 8) - start, 4 * grad_channels,
                    grad_channel, weight_channel, y_channel, channel_count - tile * channels, channels, lanes,
                )  # fmt: skip

    return body
