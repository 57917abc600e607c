"""The register tiles of products whose weights are lists of non-zeros.

A tile is a few *runs* of neighbouring pixels, all lanes holding samples. Offsets between pixels of a run are
compile-time constants, so that every multiply-accumulate reads its input by one addressing mode; with an address
per pixel, as in ``tiles``, the sixteen integer registers of x86 would not hold a tile.

An entry of a list is 8 bytes: the input's byte offset (int32), the weight (float32).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from edgetrain.kernels.simd import F32, I32, I64, call_llvm, intrinsic, literal, pointer, splat, suffix

ENTRY = 8  # bytes


def _constant(number: int) -> Any:
    return ir.Constant(I64, number)


def _runs(builder: Any, table: Any, count: int, x: Any, y: Any) -> tuple[list[Any], list[Any]]:
    """Return the addresses of the first input and output pixel of every run."""
    base = pointer(builder, table, I64)
    offsets = [builder.load(builder.gep(base, [_constant(i)])) for i in range(2 * count)]
    return [builder.add(x, o) for o in offsets[0::2]], [builder.add(y, o) for o in offsets[1::2]]


def _place(builder: Any, address: Any, step: Any, number: int, lanes: int) -> Any:
    """Return the pointer to pixel ``number`` of a run."""
    offset = _constant(step * number) if isinstance(step, int) else builder.mul(step, _constant(number))
    return pointer(builder, builder.add(address, offset), ir.VectorType(F32, lanes))


def _tile(builder: Any, addresses: list[Any], step: Any, columns: int, lanes: int) -> list[Any]:
    """Return pointers to all pixels of a tile."""
    return [_place(builder, address, step, c, lanes) for address in addresses for c in range(columns)]


def _offset(builder: Any, entry: Any) -> Any:
    return builder.sext(builder.load(pointer(builder, entry, I32)), I64)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, f"llvm.fma.{suffix(a.type)}", a, b, c)


@intrinsic(prefer_literal=True)
def csr_multiply_tile(
    typingctx: Any, x: Any, y: Any, entries: Any, last: Any, bias: Any, table: Any, keep: Any, y_step: Any, runs: Any,
    columns: Any, x_step: Any, sets: Any, unroll: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Compute the pixels of a tile of one output channel: ``y[p] = bias + sum over entries of w * x[p + offset]``.

    Args:
        x, y: addresses of the input and of the output channel.
        entries, last: addresses of the first entry and behind the last one.
        bias: float32.
        table: ``runs`` pairs (input, output) of int64 byte offsets, those of the first pixel of each run.
        keep: 0 to start from nothing instead of what ``y`` holds.
        y_step: bytes between output pixels.
        runs, columns: compile-time; runs of a tile and pixels of a run.
        x_step: compile-time; bytes between input pixels.
        sets: compile-time; sets of accumulators, for tiles with fewer pixels than a multiply-accumulate has latency.
        unroll: compile-time; entries per turn of the loop, a multiple of ``sets``.
        lanes: compile-time.
    """
    nr, nc, step, ns, nu, n = (literal(size) for size in (runs, columns, x_step, sets, unroll, lanes))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, y_, entries_, last_, bias_, table_, keep_, y_step_ = args[:8]
        sources, targets = _runs(builder, table_, nr, x_, y_)
        places = _tile(builder, targets, y_step_, nc, n)
        zero = ir.Constant(ir.VectorType(F32, n), [0.0] * n)
        slots = [[cgutils.alloca_once(builder, zero.type) for _ in places] for _ in range(ns)]
        for slot in (slot for part in slots for slot in part):
            builder.store(zero, slot)
        with builder.if_then(builder.icmp_signed("!=", keep_, _constant(0))):
            for slot, place in zip(slots[0], places, strict=True):
                builder.store(builder.load(place, align=4 * n), slot)

        def add(entry: Any, part: list[Any]) -> None:
            offset = _offset(builder, entry)
            weight = splat(builder, builder.load(pointer(builder, builder.add(entry, _constant(4)), F32)), n)
            pixels = _tile(builder, [builder.add(source, offset) for source in sources], step, nc, n)
            for slot, pixel in zip(part, pixels, strict=True):
                builder.store(_fma(builder, builder.load(pixel, align=4 * n), weight, builder.load(slot)), slot)

        count = builder.sdiv(builder.sub(last_, entries_), _constant(ENTRY))
        whole = builder.sdiv(count, _constant(nu))
        with cgutils.for_range(builder, whole) as loop:
            first = builder.add(entries_, builder.mul(loop.index, _constant(ENTRY * nu)))
            for u in range(nu):
                add(builder.add(first, _constant(ENTRY * u)), slots[u % ns])
        if nu > 1:
            rest = builder.add(entries_, builder.mul(whole, _constant(ENTRY * nu)))
            with cgutils.for_range(builder, builder.srem(count, _constant(nu))) as loop:
                add(builder.add(rest, builder.mul(loop.index, _constant(ENTRY))), slots[0])
        shift = splat(builder, bias_, n)
        for i, place in enumerate(places):
            total = builder.load(slots[0][i])
            for part in slots[1:]:
                total = builder.fadd(total, builder.load(part[i]))
            builder.store(builder.fadd(total, shift), place, align=4 * n)
        return context.get_dummy_value()

    integer = types.int64
    kinds = (integer, integer, integer, integer, types.float32, integer, integer, integer)
    return types.void(*kinds, runs, columns, x_step, sets, unroll, lanes), codegen


@intrinsic(prefer_literal=True)
def csr_correlate_tile(
    typingctx: Any, x: Any, dy: Any, entries: Any, last: Any, sums: Any, table: Any, keep: Any, y_step: Any, runs: Any,
    columns: Any, x_step: Any, chains: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Add to every entry's vector in ``sums`` what a tile contributes: ``sum over p of dy[p] * x[p + offset]``.

    The tile of ``dy`` stays in registers while all entries of its channel pass.

    Args:
        x, dy: addresses of the input and of the channel of the output gradient.
        entries, last: addresses of the first entry and behind the last one; the weights are not read.
        sums: address of the first entry's vector.
        table, y_step, runs, columns, x_step, lanes: as in ``csr_multiply_tile``.
        keep: 0 to start from nothing instead of what ``sums`` holds.
        chains: compile-time; sums that are kept apart, since a multiply-accumulate waits for the one before.
    """
    nr, nc, step, nk, n = (literal(size) for size in (runs, columns, x_step, chains, lanes))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, dy_, entries_, last_, sums_, table_, keep_, y_step_ = args
        sources, targets = _runs(builder, table_, nr, x_, dy_)
        grads = [builder.load(place, align=4 * n) for place in _tile(builder, targets, y_step_, nc, n)]
        zero = ir.Constant(grads[0].type, [0.0] * n)
        kept = builder.icmp_signed("!=", keep_, _constant(0))
        count = builder.sdiv(builder.sub(last_, entries_), _constant(ENTRY))
        with cgutils.for_range(builder, count) as loop:
            offset = _offset(builder, builder.add(entries_, builder.mul(loop.index, _constant(ENTRY))))
            target = pointer(builder, builder.add(sums_, builder.mul(loop.index, _constant(4 * n))), zero.type)
            totals = [builder.select(kept, builder.load(target, align=4 * n), zero)] + [zero] * (nk - 1)
            pixels = _tile(builder, [builder.add(source, offset) for source in sources], step, nc, n)
            for i, (grad, pixel) in enumerate(zip(grads, pixels, strict=True)):
                totals[i % nk] = _fma(builder, builder.load(pixel, align=4 * n), grad, totals[i % nk])
            while len(totals) > 1:
                pairs = zip(totals[0::2], [*totals[1::2], None], strict=False)
                totals = [a if b is None else builder.fadd(a, b) for a, b in pairs]
            builder.store(totals[0], target, align=4 * n)
        return context.get_dummy_value()

    def generate(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return codegen(context, builder, sig, args[:8])

    return types.void(*[types.int64] * 8, runs, columns, x_step, chains, lanes), generate
