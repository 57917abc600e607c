"""The two register tiles in which nearly all arithmetic of training happens.

Both work on lanes of samples: a "vector" holds one pixel of ``L`` samples. They
are LLVM IR builders and not loops over ``Vec`` because the accumulators must be
an array that is unrolled into registers.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from edgetrain.kernels.codes import CHANNELS, ROWS, SAMPLES
from edgetrain.kernels.simd import F32, I32, I64, call_llvm, intrinsic, literal, pointer, splat, suffix

# NEON multiplies by one lane of a register (fmla by element), so there the weights of a tile are loaded
# as one vector; x86 broadcasts straight from memory. Cross-compiled for Cortex-A72 the vector form needs
# 165 instructions for 144 fma and no spill, the scalar form 209 and 23 spills.
_WEIGHTS_AS_VECTOR = platform.machine() in ("aarch64", "arm64")


def _weights(builder: Any, address: Any, count: int, lanes: int) -> list[Any]:
    """Load ``count`` consecutive floats and return each in all lanes of a vector."""
    if _WEIGHTS_AS_VECTOR and count in (2, 4, 8):
        vector = builder.load(pointer(builder, address, ir.VectorType(F32, count)), align=4)
        undefined = ir.Constant(vector.type, ir.Undefined)
        masks = [ir.Constant(ir.VectorType(I32, lanes), [i] * lanes) for i in range(count)]
        return [builder.shuffle_vector(vector, undefined, mask) for mask in masks]
    base = pointer(builder, address, F32)
    return [splat(builder, builder.load(builder.gep(base, [ir.Constant(I64, i)])), lanes) for i in range(count)]


def _vectors(builder: Any, address: Any, count: int, lanes: int) -> list[Any]:
    """Load ``count`` consecutive floats as vectors of ``lanes``."""
    places = [builder.add(address, ir.Constant(I64, 4 * i)) for i in range(0, count, lanes)]
    return [builder.load(pointer(builder, place, ir.VectorType(F32, lanes)), align=4) for place in places]


def _pixel(builder: Any, address: Any, lanes: int, kind: int, runs: int, apart: Any) -> Any:
    """Load a pixel of the input: a vector that lies in ``runs``, or one channel's number in all lanes."""
    if kind == CHANNELS:
        return splat(builder, builder.load(pointer(builder, address, F32)), lanes)
    places = _places(builder, address, runs, apart)
    return _joined(builder, [_vector_load(builder, place, lanes // runs) for place in places])


def _places(builder: Any, address: Any, runs: int, apart: Any) -> list[Any]:
    """Return where ``runs`` runs begin that are ``apart`` bytes."""
    return [address] + [builder.add(address, builder.mul(apart, ir.Constant(I64, i))) for i in range(1, runs)]


def _joined(builder: Any, parts: list[Any]) -> Any:
    """Return the vector that consists of ``parts``, a power of 2 of them."""
    while len(parts) > 1:
        mask = ir.Constant(ir.VectorType(I32, 2 * parts[0].type.count), list(range(2 * parts[0].type.count)))
        parts = [builder.shuffle_vector(a, b, mask) for a, b in zip(parts[0::2], parts[1::2], strict=True)]
    return parts[0]


def _store_runs(builder: Any, value: Any, address: Any, runs: int, apart: Any) -> None:
    """Store a vector in ``runs`` equal runs that begin ``apart`` bytes from each other."""
    lanes = value.type.count // runs
    for i, place in enumerate(_places(builder, address, runs, apart)):
        mask = ir.Constant(ir.VectorType(I32, lanes), list(range(i * lanes, (i + 1) * lanes)))
        part = value if runs == 1 else builder.shuffle_vector(value, value, mask)
        builder.store(part, pointer(builder, place, part.type), align=4)


def _offsets(builder: Any, table: Any, count: int) -> list[Any]:
    """Load ``count`` consecutive int64 from a table."""
    base = pointer(builder, table, I64)
    return [builder.load(builder.gep(base, [ir.Constant(I64, i)])) for i in range(count)]


def _vector_load(builder: Any, address: Any, lanes: int) -> Any:
    return builder.load(pointer(builder, address, ir.VectorType(F32, lanes)), align=4)


def _fma(builder: Any, a: Any, b: Any, slot: Any) -> None:
    """Add ``a * b`` to the accumulator in ``slot`` (a register after LLVM's mem2reg)."""
    builder.store(call_llvm(builder, f"llvm.fma.{suffix(a.type)}", a, b, builder.load(slot)), slot)


def _accumulators(builder: Any, count: int, lanes: int) -> list[Any]:
    zero = ir.Constant(ir.VectorType(F32, lanes), [0.0] * lanes)
    slots = [cgutils.alloca_once(builder, zero.type) for _ in range(count)]
    for slot in slots:
        builder.store(zero, slot)
    return slots


@intrinsic(prefer_literal=True)
def multiply_tile(
    typingctx: Any, x: Any, y: Any, w: Any, w_step: Any, w_channel: Any, bias: Any, pixels: Any, terms: Any, count: Any,
    y_channel: Any, rows: Any, x_apart: Any, y_apart: Any, low: Any, high: Any, channels: Any, width: Any, lanes: Any,
    kind: Any, x_runs: Any, y_runs: Any,
) -> Any:  # fmt: skip
    """Compute ``channels`` x ``width`` outputs: ``y[c][p] = bias[c] + sum_k w[k][c] * x[pixel p + term k]``.

    Args:
        x, y: addresses of the input and of the first output channel of the tile.
        w, w_step: address of the weights of the first term, ``channels`` consecutive float32, and bytes to the next.
        w_channel: bytes between the weights of channels, for ``ROWS``.
        bias: address of ``channels`` float32.
        pixels: table of ``width`` pairs (input, output) of int64 byte offsets.
        terms: table of ``count`` int64 byte offsets into the input.
        y_channel: bytes between output channels.
        rows: how many of the ``channels`` exist; the rest is computed and not stored.
        x_apart, y_apart: bytes between the runs of samples that make a vector of the input, and of the output.
        low, high: float32 bounds of the result (activation fused into the store).
        channels, width, lanes: compile-time sizes; the accumulators must fit the registers.
        kind: which operand is a vector of lanes, see ``kernels.codes``.
        x_runs, y_runs: compile-time numbers of runs in a vector, 1 where it lies in one piece.
    """
    cr, pr, n, how = literal(channels), literal(width), literal(lanes), literal(kind)
    xr, yr = literal(x_runs), literal(y_runs)
    step = 1 if how in (SAMPLES, ROWS) else n  # channels per accumulator

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, y_, w_, w_step_, w_channel_, bias_, pixels_, terms_, count_, y_channel_, rows_ = args[:11]
        x_apart_, y_apart_, low_, high_ = args[11:15]
        operands = _weights if how in (SAMPLES, ROWS) else _vectors
        starts = [builder.mul(w_channel_, i) for i in _existing(builder, rows_, cr, 1)] if how == ROWS else []
        table = _offsets(builder, pixels_, 2 * pr)
        inputs = [builder.add(x_, offset) for offset in table[0::2]]
        slots = _accumulators(builder, cr // step * pr, n)
        with cgutils.for_range(builder, count_) as loop:
            term = _offsets(builder, builder.add(terms_, builder.mul(loop.index, ir.Constant(I64, 8))), 1)[0]
            source = builder.add(w_, builder.mul(loop.index, w_step_))
            if how == ROWS:
                scalars = [builder.load(pointer(builder, builder.add(source, start), F32)) for start in starts]
                weights = [splat(builder, scalar, n) for scalar in scalars]
            else:
                weights = operands(builder, source, cr, n)
            values = [_pixel(builder, builder.add(base, term), n, how, xr, x_apart_) for base in inputs]
            for c in range(cr // step):
                for p in range(pr):
                    _fma(builder, weights[c], values[p], slots[c * pr + p])
        biases = operands(builder, bias_, cr, n)
        lows, highs = splat(builder, low_, n), splat(builder, high_, n)
        for c in range(cr // step):
            with builder.if_then(builder.icmp_signed(">", rows_, ir.Constant(I64, c * step)), likely=True):
                channel = builder.add(y_, builder.mul(y_channel_, ir.Constant(I64, c)))
                for p in range(pr):
                    value = builder.fadd(builder.load(slots[c * pr + p]), biases[c])
                    value = builder.select(builder.fcmp_ordered("<", value, lows), lows, value)
                    value = builder.select(builder.fcmp_ordered(">", value, highs), highs, value)
                    target = builder.add(channel, table[2 * p + 1])
                    _store_runs(builder, value, target, yr, y_apart_)
        return context.get_dummy_value()

    integers, numbers = [types.int64] * 13, [types.float32] * 2
    return types.void(*integers, *numbers, channels, width, lanes, kind, x_runs, y_runs), codegen


@intrinsic(prefer_literal=True)
def correlate_tile(
    typingctx: Any, x: Any, dy: Any, dw: Any, pixels: Any, terms: Any, count: Any, dy_channel: Any, dw_channel: Any,
    rows: Any, columns: Any, keep: Any, x_apart: Any, channels: Any, width: Any, lanes: Any, kind: Any, x_runs: Any,
) -> Any:  # fmt: skip
    """Add to ``dw[c][k]`` the sum over pixels and lanes of ``dy[c][pixel] * x[pixel + term k]``.

    Args:
        x, dy: addresses of the input and of the first output-gradient channel of the tile.
        dw: address of the first weight gradient of the tile (float32, read and written).
        pixels: table of ``count`` pairs (input, output) of int64 byte offsets.
        terms: table of ``width`` pairs of int64: byte offset into the input, byte offset into ``dw``.
        dy_channel, dw_channel: bytes between channels of ``dy`` and of ``dw``.
        rows, columns: how many of the ``channels`` and of the ``width`` terms exist.
        keep: 0 to start from nothing instead of what ``dw`` holds.
        channels, width, lanes: compile-time sizes; the accumulators must fit the registers.
        x_apart, x_runs: as in ``multiply_tile``.
        kind: as in ``multiply_tile``; unless lanes hold samples, each lane is a weight of its own.
    """
    cr, kr, n, how = literal(channels), literal(width), literal(lanes), literal(kind)
    step = 1 if how == SAMPLES else n  # channels per accumulator

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, dy_, dw_, pixels_, terms_, count_, dy_channel_, dw_channel_, rows_, columns_, keep_, x_apart_ = args[:12]
        kept = builder.icmp_signed("!=", keep_, ir.Constant(I64, 0))
        table = _offsets(builder, terms_, 2 * kr)
        index = _existing(builder, rows_, cr // step, step)
        outputs = [builder.add(dy_, builder.mul(dy_channel_, i)) for i in index]
        sums = _correlation(builder, x_, outputs, table[0::2], pixels_, count_, n, how, literal(x_runs), x_apart_)
        if how != SAMPLES:
            _scatter(builder, sums, kr, dw_, dw_channel_, table[1::2], rows_, columns_, kept)
            return context.get_dummy_value()
        places = [builder.add(dw_, builder.mul(dw_channel_, ir.Constant(I64, c))) for c in range(cr)]
        _store_sums(builder, sums, places, table[1::2], rows_, columns_, kept)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 12), channels, width, lanes, kind, x_runs), codegen


@intrinsic(prefer_literal=True)
def correlate_listed_tile(
    typingctx: Any, x: Any, dy: Any, dw: Any, listed: Any, pixels: Any, terms: Any, count: Any, dy_channel: Any,
    dw_channel: Any, rows: Any, columns: Any, keep: Any, x_apart: Any, channels: Any, width: Any, lanes: Any,
    x_runs: Any,
) -> Any:  # fmt: skip
    """Do as ``correlate_tile`` for the channels of a list, lanes holding samples.

    ``listed``: ``rows`` numbers of channels as float32; ``dy`` and ``dw`` are the addresses of channel 0.
    """
    cr, kr, n = literal(channels), literal(width), literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, dy_, dw_, listed_, pixels_, terms_, count_, dy_channel_, dw_channel_, rows_, columns_, keep_ = args[:12]
        runs, apart = literal(x_runs), args[12]
        kept = builder.icmp_signed("!=", keep_, ir.Constant(I64, 0))
        table = _offsets(builder, terms_, 2 * kr)
        places = [builder.gep(pointer(builder, listed_, F32), [i]) for i in _existing(builder, rows_, cr, 1)]
        numbers = [builder.fptosi(builder.load(place), I64) for place in places]
        outputs = [builder.add(dy_, builder.mul(dy_channel_, number)) for number in numbers]
        sums = _correlation(builder, x_, outputs, table[0::2], pixels_, count_, n, SAMPLES, runs, apart)
        places = [builder.add(dw_, builder.mul(dw_channel_, number)) for number in numbers]
        _store_sums(builder, sums, places, table[1::2], rows_, columns_, kept)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 13), channels, width, lanes, x_runs), codegen


def _existing(builder: Any, rows: Any, count: int, step: int) -> list[Any]:
    """Return 0, 1, ... below ``count``; rows that do not exist read the last one that does: no branch inside the loop.

    ``step``: channels per row of the tile, of which ``rows`` exist.
    """
    last = builder.sdiv(builder.sub(rows, ir.Constant(I64, 1)), ir.Constant(I64, step))
    numbers = [ir.Constant(I64, c) for c in range(count)]
    return [builder.select(builder.icmp_signed("<", number, last), number, last) for number in numbers]


def _correlation(
    builder: Any, x: Any, outputs: list[Any], offsets: list[Any], pixels: Any, count: Any, lanes: int, kind: int,
    runs: int, apart: Any,
) -> list[Any]:  # fmt: skip
    """Return the vectors ``[channel][term]``: sums over pixels of ``outputs[channel][pixel] * x[pixel + offset]``."""
    inputs = [builder.add(x, offset) for offset in offsets]
    slots = _accumulators(builder, len(outputs) * len(inputs), lanes)
    with cgutils.for_range(builder, count) as loop:
        pair = _offsets(builder, builder.add(pixels, builder.mul(loop.index, ir.Constant(I64, 16))), 2)
        grads = [_vector_load(builder, builder.add(base, pair[1]), lanes) for base in outputs]
        values = [_pixel(builder, builder.add(base, pair[0]), lanes, kind, runs, apart) for base in inputs]
        for c, grad in enumerate(grads):
            for k, value in enumerate(values):
                _fma(builder, grad, value, slots[c * len(values) + k])
    return [builder.load(slot) for slot in slots]


def _store_sums(
    builder: Any, vectors: list[Any], places: list[Any], offsets: list[Any], rows: Any, columns: Any, kept: Any
) -> None:
    """Add the sum of the lanes of every vector ``[channel][term]`` to its weight gradient.

    ``offsets`` must ascend: where the last is ``width - 1`` numbers behind the first, all are neighbours.
    """
    width, sums = len(offsets), _lane_sums(builder, vectors)
    # Terms of consecutive weights are stored as one vector: fc1 of LeNet-5, whose weight gradient is all
    # storing at batch 8, went from 83 to 49 us.
    dense = builder.icmp_signed("==", builder.sub(offsets[-1], offsets[0]), ir.Constant(I64, 4 * (width - 1)))
    whole = builder.and_(dense, builder.icmp_signed(">=", columns, ir.Constant(I64, width)))
    with builder.if_else(whole, likely=True) as (then, otherwise):
        with then:
            _store_rows(builder, sums, [builder.add(place, offsets[0]) for place in places], width, rows, kept)
        with otherwise:
            _store_scalars(builder, sums, places, offsets, rows, columns, kept)


def _store_rows(builder: Any, sums: list[Any], places: list[Any], width: int, rows: Any, kept: Any) -> None:
    """Add ``width`` consecutive sums to each row's weights, as vectors."""
    kind = ir.VectorType(F32, width)
    for c, place in enumerate(places):
        with builder.if_then(builder.icmp_signed(">", rows, ir.Constant(I64, c)), likely=True):
            _add_to(builder, pointer(builder, place, kind), _part(builder, sums, c * width, width), kept)


def _store_scalars(
    builder: Any, sums: list[Any], places: list[Any], offsets: list[Any], rows: Any, columns: Any, kept: Any
) -> None:
    """Add the sums one by one, where rows or terms are missing or weights lie apart."""
    for c, place in enumerate(places):
        for k, offset in enumerate(offsets):
            inside = builder.and_(builder.icmp_signed(">", rows, ir.Constant(I64, c)),
                                  builder.icmp_signed(">", columns, ir.Constant(I64, k)))  # fmt: skip
            with builder.if_then(inside):
                number = builder.extract_element(_part(builder, sums, c * len(offsets) + k, 1), ir.Constant(I32, 0))
                _add_to(builder, pointer(builder, builder.add(place, offset), F32), number, kept)


def _part(builder: Any, vectors: list[Any], start: int, count: int) -> Any:
    """Return ``count`` consecutive numbers of a list of vectors read as one, as a vector."""
    lanes = vectors[0].type.count
    part = ir.Constant(ir.VectorType(F32, count), ir.Undefined)
    for i in range(count):  # LLVM makes shuffles of it
        number = builder.extract_element(vectors[(start + i) // lanes], ir.Constant(I32, (start + i) % lanes))
        part = builder.insert_element(part, number, ir.Constant(I32, i))
    return part


def _lane_sums(builder: Any, vectors: list[Any]) -> list[Any]:
    """Return the sum of the lanes of every vector, in order, as vectors again.

    Vectors are added in pairs, even lanes to odd lanes, until one vector holds the
    sums of ``lanes`` vectors: three instructions a sum instead of ten.
    """
    lanes = vectors[0].type.count
    zero = ir.Constant(vectors[0].type, [0.0] * lanes)
    totals = []
    for start in range(0, len(vectors), lanes):
        part = vectors[start : start + lanes]
        part += [zero] * (lanes - len(part))
        while len(part) > 1:
            part = [_add_neighbours(builder, a, b) for a, b in zip(part[0::2], part[1::2], strict=True)]
        totals.append(part[0])
    return totals


def _add_neighbours(builder: Any, a: Any, b: Any) -> Any:
    """Return ``[a0 + a1, a2 + a3, ..., b0 + b1, ...]``."""
    lanes = a.type.count
    even = ir.Constant(ir.VectorType(I32, lanes), list(range(0, 2 * lanes, 2)))
    odd = ir.Constant(ir.VectorType(I32, lanes), list(range(1, 2 * lanes, 2)))
    return builder.fadd(builder.shuffle_vector(a, b, even), builder.shuffle_vector(a, b, odd))


def _scatter(
    builder: Any, vectors: list[Any], width: int, target: Any, channel: Any, offsets: list[Any], rows: Any,
    columns: Any, kept: Any,
) -> None:  # fmt: skip
    """Add vectors ``[channel / lanes][term]``, whose lanes are channels, to ``target``; loops, for small code."""
    lanes = vectors[0].type.count
    sums = cgutils.alloca_once(builder, vectors[0].type, size=len(vectors))
    for i, vector in enumerate(vectors):
        builder.store(vector, builder.gep(sums, [ir.Constant(I64, i)]))
    places = cgutils.alloca_once(builder, I64, size=width)
    for i, offset in enumerate(offsets):
        builder.store(offset, builder.gep(places, [ir.Constant(I64, i)]))
    flat = builder.bitcast(sums, F32.as_pointer())
    inside = builder.icmp_signed("<", columns, ir.Constant(I64, width))
    terms = builder.select(inside, columns, ir.Constant(I64, width))
    for group in range(len(vectors) // width):
        left = builder.sub(rows, ir.Constant(I64, group * lanes))
        count = builder.select(builder.icmp_signed("<", left, ir.Constant(I64, lanes)), left, ir.Constant(I64, lanes))
        with cgutils.for_range(builder, terms) as term, cgutils.for_range(builder, count) as lane:
            index = builder.add(term.index, ir.Constant(I64, group * width))
            source = builder.add(builder.mul(index, ir.Constant(I64, lanes)), lane.index)
            row = builder.mul(channel, builder.add(lane.index, ir.Constant(I64, group * lanes)))
            place = builder.add(builder.add(target, row), builder.load(builder.gep(places, [term.index])))
            _add_to(builder, pointer(builder, place, F32), builder.load(builder.gep(flat, [source])), kept)


def _add_to(builder: Any, target: Any, value: Any, kept: Any) -> None:
    """Store ``value``, added to what is there when ``kept`` (which may be anything otherwise, even NaN)."""
    nothing = ir.Constant(value.type, [0.0] * value.type.count if isinstance(value.type, ir.VectorType) else 0.0)
    before = builder.select(kept, builder.load(target, align=4), nothing)
    builder.store(builder.fadd(before, value), target, align=4)
