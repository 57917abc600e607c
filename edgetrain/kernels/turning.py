"""Register tiles that turn: what was the lane becomes the vector, and the other way round."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types

from edgetrain.kernels.simd import F32, I32, I64, call_llvm, intrinsic, literal, pointer, suffix
from edgetrain.kernels.tiles import _existing, _offsets, _vector_load


def _turned(builder: Any, x: Any, step: Any, count: Any, lanes: int) -> list[Any]:
    """Load ``lanes`` vectors that are ``step`` bytes apart, of which ``count`` exist, and turn them.

    The vectors that do not exist are copies of the last one that does.
    """
    rows = [
        _vector_load(builder, builder.add(x, builder.mul(step, number)), lanes)
        for number in _existing(builder, count, lanes, 1)
    ]
    return _columns(builder, rows)


def _columns(builder: Any, rows: list[Any]) -> list[Any]:
    """Return the columns of a square of vectors."""
    rows, lanes = list(rows), len(rows)
    half = lanes // 2
    while half:  # blocks of half x half beside the diagonal change places
        for i in (i for i in range(lanes) if not i & half):
            a, b = rows[i], rows[i + half]
            upper = [lane if not lane & half else lanes + lane - half for lane in range(lanes)]
            lower = [lane + half if not lane & half else lanes + lane for lane in range(lanes)]
            masks = [ir.Constant(ir.VectorType(I32, lanes), order) for order in (upper, lower)]
            rows[i], rows[i + half] = (builder.shuffle_vector(a, b, mask) for mask in masks)
        half //= 2
    return rows


@intrinsic(prefer_literal=True)
def turn_tile(
    typingctx: Any, x: Any, x_channel: Any, channels: Any, y: Any, y_sample: Any, width: Any, lanes: Any
) -> Any:
    """Turn ``lanes`` channels x ``lanes`` samples: ``y[sample][channel] = x[channel][sample]``.

    Of the channels ``channels`` exist, the others get copies of the last one; the first ``width`` are written.
    """
    kept, n = literal(width), literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, x_channel_, channels_, y_, y_sample_ = args[:5]
        first = ir.Constant(ir.VectorType(I32, kept), list(range(kept)))
        for sample, row in enumerate(_turned(builder, x_, x_channel_, channels_, n)):
            place = builder.add(y_, builder.mul(y_sample_, ir.Constant(I64, sample)))
            part = builder.shuffle_vector(row, ir.Constant(row.type, ir.Undefined), first)
            builder.store(part, pointer(builder, place, part.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, width, lanes), codegen


@intrinsic(prefer_literal=True)
def turn_back_tile(typingctx: Any, x: Any, x_sample: Any, y: Any, y_channel: Any, channels: Any, lanes: Any) -> Any:
    """Turn ``lanes`` samples x ``lanes`` channels: ``y[channel][sample] = x[sample][channel]``.

    Of the channels ``channels`` exist in ``y``; the numbers of the others, which may be anything, are not kept.
    """
    n = literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, x_sample_, y_, y_channel_, channels_ = args[:5]
        turned = _turned(builder, x_, x_sample_, ir.Constant(I64, n), n)
        # Those that do not exist go to the place of the last one that does, which is written after them.
        for row, number in reversed(list(zip(turned, _existing(builder, channels_, n, 1), strict=True))):
            place = builder.add(y_, builder.mul(y_channel_, number))
            builder.store(row, pointer(builder, place, row.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 5, lanes), codegen


@intrinsic(prefer_literal=True)
def pack_tile(
    typingctx: Any, x: Any, x_sample: Any, samples: Any, y: Any, left: Any, gap: Any, scale: Any, shift: Any,
    lanes: Any,
) -> Any:  # fmt: skip
    """Interleave ``lanes`` pixels of ``lanes`` samples: ``y[pixel][sample] = x[sample][pixel] * scale + shift``.

    Args:
        x, x_sample: address of the first sample's pixels, bytes between samples.
        samples: how many of them exist; the others get numbers of the last one.
        y: address of the first pixel.
        left, gap: how many pixels are left in the row of the first one, and the bytes between the end of a row and the
            beginning of the next; the pixels lie in two rows at most.
        scale, shift: vectors, 0 in lanes without a sample.
    """
    n = literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, x_sample_, samples_, y_, left_, gap_, scale_, shift_ = args[:8]
        for pixel, row in enumerate(_turned(builder, x_, x_sample_, samples_, n)):
            below = builder.icmp_signed("<=", left_, ir.Constant(I64, pixel))
            place = builder.add(y_, builder.select(below, gap_, ir.Constant(I64, 0)))
            target = pointer(builder, builder.add(place, ir.Constant(I64, 4 * n * pixel)), row.type)
            builder.store(call_llvm(builder, f"llvm.fma.{suffix(row.type)}", row, scale_, shift_), target, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, scale, scale, lanes), codegen


@intrinsic(prefer_literal=True)
def pack_run(typingctx: Any, x: Any, x_channel: Any, y: Any, places: Any, columns: Any, lanes: Any) -> Any:
    """Turn a run of ``columns`` weights of ``lanes`` channels: ``y[places[column]][channel] = x[channel][column]``.

    Args:
        x, x_channel: address of the first channel's weights, which lie side by side; bytes between channels.
        y, places: address, and a table of int64 byte offsets.
        columns, lanes: compile-time; at most ``lanes`` columns. No other weights are read.
    """
    wanted, n = literal(columns), literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, x_channel_, y_, places_ = args[:4]
        starts = [builder.add(x_, builder.mul(x_channel_, ir.Constant(I64, channel))) for channel in range(n)]
        rows = [_part(builder, start, wanted, n) for start in starts]
        for offset, column in zip(_offsets(builder, places_, wanted), _columns(builder, rows), strict=False):
            builder.store(column, pointer(builder, builder.add(y_, offset), column.type), align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4, columns, lanes), codegen


def _part(builder: Any, address: Any, count: int, lanes: int) -> Any:
    """Load the first ``count`` numbers of a vector; what lies behind them is not read."""
    if count == lanes:
        return _vector_load(builder, address, lanes)
    kind, flags = ir.VectorType(F32, lanes), ir.VectorType(ir.IntType(1), lanes)
    name = f"llvm.masked.load.{suffix(kind)}.p0{suffix(kind)}"
    exist, zeros = ir.Constant(flags, [lane < count for lane in range(lanes)]), ir.Constant(kind, [0.0] * lanes)
    return call_llvm(builder, name, pointer(builder, address, kind), ir.Constant(I32, 4), exist, zeros, result=kind)
