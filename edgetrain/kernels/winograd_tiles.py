"""Register-level parts of Winograd's minimal filtering F(4x4, 3x3): transforms of one tile, and the product between.

``Y = A^T [(G g G^T) * (B^T d B)] A`` with the interpolation points 0, 1, -1, 2, -2 and infinity: Lavin and Gray, Fast
Algorithms for Convolutional Neural Networks (CVPR 2016), section 4.3. The weight gradient is the same bilinear form
differentiated by the weights: ``G^T [(A dY A^T) * (B^T d B)] G``. Vectors hold samples (data) or channels (weights).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from edgetrain.kernels.simd import F32, I32, I64, call_llvm, intrinsic, literal, pointer, splat, suffix
from edgetrain.kernels.tiles import _accumulators as accumulators
from edgetrain.kernels.tiles import _fma as accumulate
from edgetrain.kernels.tiles import _vector_load as load_vector
from edgetrain.kernels.tiles import _weights as load_weights

Transform = Callable[["Arithmetic", Sequence[Any]], list[Any]]


class Arithmetic:
    """Lane-wise arithmetic on vectors of one type."""

    def __init__(self, builder: Any, kind: Any) -> None:
        self._builder, self._kind = builder, kind

    def add(self, a: Any, b: Any) -> Any:
        """Return ``a + b``."""
        return self._builder.fadd(a, b)

    def sub(self, a: Any, b: Any) -> Any:
        """Return ``a - b``."""
        return self._builder.fsub(a, b)

    def times(self, factor: float, a: Any) -> Any:
        """Return ``factor * a``."""
        return self._builder.fmul(self._constant(factor), a)

    def fma(self, factor: float, a: Any, b: Any) -> Any:
        """Return ``factor * a + b``."""
        return call_llvm(self._builder, f"llvm.fma.{suffix(self._kind)}", self._constant(factor), a, b)

    def _constant(self, factor: float) -> Any:
        return ir.Constant(self._kind, [factor] * self._kind.count)


def data_transform(v: Arithmetic, d: Sequence[Any]) -> list[Any]:
    """Return ``B^T d``: 6 to 6."""
    a, b = v.fma(-4.0, d[2], d[4]), v.fma(-4.0, d[1], d[3])
    c, e = v.sub(d[4], d[2]), v.sub(d[3], d[1])
    return [
        v.fma(4.0, d[0], v.fma(-5.0, d[2], d[4])), v.add(a, b), v.sub(a, b), v.fma(2.0, e, c), v.fma(-2.0, e, c),
        v.fma(4.0, d[1], v.fma(-5.0, d[3], d[5])),
    ]  # fmt: skip


def output_transform(v: Arithmetic, m: Sequence[Any]) -> list[Any]:
    """Return ``A^T m``: 6 to 4."""
    s, d, t, e = v.add(m[1], m[2]), v.sub(m[1], m[2]), v.add(m[3], m[4]), v.sub(m[3], m[4])
    return [v.add(v.add(m[0], s), t), v.fma(2.0, e, d), v.fma(4.0, t, s), v.add(v.fma(8.0, e, d), m[5])]


def gradient_transform(v: Arithmetic, y: Sequence[Any]) -> list[Any]:
    """Return ``A y``: 4 to 6."""
    e, o = v.add(y[0], y[2]), v.add(y[1], y[3])
    e2, o2 = v.fma(4.0, y[2], y[0]), v.fma(4.0, y[3], y[1])
    return [y[0], v.add(e, o), v.sub(e, o), v.fma(2.0, o2, e2), v.fma(-2.0, o2, e2), y[3]]


def weight_transform(v: Arithmetic, g: Sequence[Any]) -> list[Any]:
    """Return ``G g``: 3 to 6."""
    s, t = v.add(g[0], g[2]), v.fma(4.0, g[2], g[0])
    return [
        v.times(1 / 4, g[0]), v.times(-1 / 6, v.add(s, g[1])), v.times(-1 / 6, v.sub(s, g[1])),
        v.times(1 / 24, v.fma(2.0, g[1], t)), v.times(1 / 24, v.fma(-2.0, g[1], t)), g[2],
    ]  # fmt: skip


def weight_gradient_transform(v: Arithmetic, q: Sequence[Any]) -> list[Any]:
    """Return ``G^T q``: 6 to 3."""
    s, d, t, e = v.add(q[1], q[2]), v.sub(q[2], q[1]), v.add(q[3], q[4]), v.sub(q[3], q[4])
    return [
        v.fma(1 / 4, q[0], v.fma(-1 / 6, s, v.times(1 / 24, t))), v.fma(1 / 6, d, v.times(1 / 12, e)),
        v.fma(-1 / 6, s, v.fma(1 / 6, t, q[5])),
    ]  # fmt: skip


def _both_ways(v: Arithmetic, grid: list[list[Any]], transform: Transform) -> list[list[Any]]:
    """Transform the columns of a square grid, then its rows."""
    columns = [transform(v, column) for column in zip(*grid, strict=True)]
    return [transform(v, row) for row in zip(*columns, strict=True)]


def _grid(builder: Any, address: Any, row: Any, column: Any, size: int, lanes: int) -> list[list[Any]]:
    """Load ``size`` x ``size`` vectors."""

    def at(i: int, j: int) -> Any:
        place = builder.add(address, builder.mul(row, ir.Constant(I64, i)))
        return load_vector(builder, builder.add(place, builder.mul(column, ir.Constant(I64, j))), lanes)

    return [[at(i, j) for j in range(size)] for i in range(size)]


def _store_grid(builder: Any, grid: list[list[Any]], address: Any, row: Any, column: Any) -> None:
    for i, values in enumerate(grid):
        for j, value in enumerate(values):
            place = builder.add(address, builder.mul(row, ir.Constant(I64, i)))
            place = builder.add(place, builder.mul(column, ir.Constant(I64, j)))
            builder.store(value, pointer(builder, place, value.type), align=4 * value.type.count)


def _tile_transform(transform: Transform, size: int) -> Any:
    """Return an intrinsic that loads a grid of ``size`` x ``size`` vectors, transforms and stores it."""

    @intrinsic(prefer_literal=True)
    def apply(typingctx: Any, x: Any, x_row: Any, x_column: Any, y: Any, y_row: Any, y_column: Any, lanes: Any) -> Any:
        """Strides in bytes."""
        n = literal(lanes)

        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            x_, x_row_, x_column_, y_, y_row_, y_column_ = args[:6]
            grid = _grid(builder, x_, x_row_, x_column_, size, n)
            made = _both_ways(Arithmetic(builder, ir.VectorType(F32, n)), grid, transform)
            _store_grid(builder, made, y_, y_row_, y_column_)
            return context.get_dummy_value()

        return types.void(*([types.int64] * 6), lanes), codegen

    return apply


transform_data = _tile_transform(data_transform, 6)
transform_gradient = _tile_transform(gradient_transform, 4)


@intrinsic(prefer_literal=True)
def transform_output(
    typingctx: Any, m: Any, m_row: Any, m_column: Any, y: Any, y_row: Any, y_column: Any, bias: Any, lanes: Any
) -> Any:
    """Write a tile of 4 x 4 outputs ``A^T m A + bias``; strides in bytes."""
    n = literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        m_, m_row_, m_column_, y_, y_row_, y_column_, bias_ = args[:7]
        grid = _grid(builder, m_, m_row_, m_column_, 6, n)
        made = _both_ways(Arithmetic(builder, ir.VectorType(F32, n)), grid, output_transform)
        biases = splat(builder, bias_, n)
        _store_grid(builder, [[builder.fadd(v, biases) for v in row] for row in made], y_, y_row_, y_column_)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 6), types.float32, lanes), codegen


@intrinsic(prefer_literal=True)
def transform_weights(
    typingctx: Any, w: Any, w_channel: Any, rows: Any, tap: Any, tap_step: Any, u: Any, u_position: Any, channels: Any
) -> Any:  # fmt: skip
    """Write ``G g G^T`` of the 3x3 kernels of ``channels`` channels, channel by channel in the lanes.

    Args:
        w, w_channel: address of the first channel's kernel, and bytes to the next channel's.
        rows: how many of the channels exist; the rest repeat the last one.
        tap, tap_step: byte offset of the kernel's first number, and bytes to the next (negative for a flipped kernel).
        u, u_position: where the first of 36 vectors belongs, and bytes to the next.
        channels: compile-time number of channels.
    """
    n = literal(channels)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        w_, w_channel_, rows_, tap_, tap_step_, u_, u_position_ = args[:7]
        last = builder.sub(rows_, ir.Constant(I64, 1))
        numbers = [ir.Constant(I64, c) for c in range(n)]
        index = [builder.select(builder.icmp_signed("<", number, last), number, last) for number in numbers]
        bases = [builder.add(builder.add(w_, tap_), builder.mul(w_channel_, i)) for i in index]
        grid = [[_gather(builder, bases, builder.mul(tap_step_, ir.Constant(I64, 3 * i + j))) for j in range(3)]
                for i in range(3)]  # fmt: skip
        made = _both_ways(Arithmetic(builder, ir.VectorType(F32, n)), grid, weight_transform)
        _store_grid(builder, made, u_, builder.mul(u_position_, ir.Constant(I64, 6)), u_position_)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 7), channels), codegen


def _gather(builder: Any, bases: list[Any], offset: Any) -> Any:
    """Return the floats at ``base + offset`` as a vector."""
    vector = ir.Constant(ir.VectorType(F32, len(bases)), ir.Undefined)
    for i, base in enumerate(bases):
        number = builder.load(pointer(builder, builder.add(base, offset), F32))
        vector = builder.insert_element(vector, number, ir.Constant(I32, i))
    return vector


@intrinsic(prefer_literal=True)
def transform_weight_gradient(
    typingctx: Any, q: Any, q_position: Any, parts: Any, q_part: Any, dw: Any, channels: Any, flipped: Any
) -> Any:
    """Write ``G^T (sum of parts of q) G``, or that backwards, to the 3x3 kernels of ``channels`` input channels.

    Stored number by number, four channels at a time, they took 300 us of a step of ResNet-20 at batch 4, and take 68 us
    as vectors of 16 (AVX-512, one thread).

    Args:
        q, q_position: where the first of 36 vectors is, and bytes to the next.
        parts, q_part: how many such sums there are, and bytes to the next.
        dw: address of ``9 * channels`` float32.
        channels: compile-time number of channels.
        flipped: 1 to write each kernel backwards, else 0.
    """
    n, order = literal(channels), -1 if literal(flipped) else 1

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        q_, q_position_, parts_, q_part_, dw_ = args[:5]
        slots = accumulators(builder, 36, n)
        kind = ir.VectorType(F32, n)
        with cgutils.for_range(builder, parts_) as loop:
            source = builder.add(q_, builder.mul(loop.index, q_part_))
            for p, slot in enumerate(slots):
                place = builder.add(source, builder.mul(q_position_, ir.Constant(I64, p)))
                value = builder.load(pointer(builder, place, kind), align=4)
                builder.store(builder.fadd(builder.load(slot), value), slot)
        grid = [[builder.load(slots[6 * i + j]) for j in range(6)] for i in range(6)]
        made = _both_ways(Arithmetic(builder, kind), grid, weight_gradient_transform)
        _store_side_by_side(builder, [vector for row in made for vector in row][::order], dw_)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 5), channels, flipped), codegen


def _store_side_by_side(builder: Any, vectors: list[Any], address: Any) -> None:
    """Store the first lanes of all vectors side by side, then the second ones, and so on."""
    count, lanes = len(vectors), vectors[0].type.count
    for number in range(count):
        places = [divmod(number * lanes + i, count) for i in range(lanes)]  # (lane, vector) of every number
        made = ir.Constant(vectors[0].type, ir.Undefined)
        for v, vector in enumerate(vectors):
            mask = [lanes + lane if of == v else i for i, (lane, of) in enumerate(places)]
            made = builder.shuffle_vector(made, vector, ir.Constant(ir.VectorType(I32, lanes), mask))
        place = builder.add(address, ir.Constant(I64, 4 * number * lanes))
        builder.store(made, pointer(builder, place, made.type), align=4)


@intrinsic(prefer_literal=True)
def product_tile(
    typingctx: Any, v: Any, v_step: Any, u: Any, u_step: Any, m: Any, m_channel: Any, count: Any, channels: Any,
    width: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Write ``m[c][t] = sum_k u[k][c] * v[k][t]`` for ``channels`` x ``width`` vectors."""
    cr, tr, n = literal(channels), literal(width), literal(lanes)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        v_, v_step_, u_, u_step_, m_, m_channel_, count_ = args[:7]
        slots = accumulators(builder, cr * tr, n)
        with cgutils.for_range(builder, count_) as loop:
            source = builder.add(v_, builder.mul(loop.index, v_step_))
            values = [load_vector(builder, builder.add(source, ir.Constant(I64, 4 * n * t)), n) for t in range(tr)]
            weights = load_weights(builder, builder.add(u_, builder.mul(loop.index, u_step_)), cr, n)
            for c in range(cr):
                for t in range(tr):
                    accumulate(builder, weights[c], values[t], slots[c * tr + t])
        for c in range(cr):
            row = builder.add(m_, builder.mul(m_channel_, ir.Constant(I64, c)))
            for t in range(tr):
                place = builder.add(row, ir.Constant(I64, 4 * n * t))
                value = builder.load(slots[c * tr + t])
                builder.store(value, pointer(builder, place, value.type), align=4)
        return context.get_dummy_value()

    return types.void(*([types.int64] * 7), channels, width, lanes), codegen
