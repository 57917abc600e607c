"""The register tiles of products whose weights are lists of non-zeros.

A tile is a few *runs* of neighbouring pixels, all lanes holding samples, of several pixels where the samples of one
fill a part of a vector (``lowering_sparse.Grid.widened``): so vectors may begin at any float32. Offsets between pixels
of a run are compile-time constants, so that every multiply-accumulate reads its input by one addressing mode; with an
address per pixel, as in ``tiles``, the sixteen integer registers of x86 would not hold a tile.

Entry i of a list: ``offsets[i]``, the input's byte offset (int32), and ``weight[i]`` (float32).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types

from edgetrain.kernels.simd import F32, I32, I64, ask_for, call_llvm, intrinsic, literal, pointer, splat, suffix


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


def _item(builder: Any, address: Any, number: Any, kind: Any = I32) -> Any:
    """Return number ``number`` of an array of 4-byte numbers; integers as int64."""
    item = builder.load(builder.gep(pointer(builder, address, kind), [number]))
    return builder.sext(item, I64) if kind == I32 else item


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call_llvm(builder, f"llvm.fma.{suffix(a.type)}", a, b, c)


@intrinsic(prefer_literal=True)
def csr_multiply_tile(
    typingctx: Any, x: Any, y: Any, weight: Any, offsets: Any, first: Any, last: Any, bias: Any, table: Any, keep: Any,
    y_step: Any, runs: Any, columns: Any, x_step: Any, sets: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Compute the pixels of a tile of one output channel: ``y[p] = bias + sum over entries of w * x[p + offset]``.

    Args:
        x, y: addresses of the input and of the output channel.
        weight, offsets: addresses of the list.
        first, last: the first entry, and the one behind the last.
        bias: float32.
        table: ``runs`` pairs (input, output) of int64 byte offsets, those of the first pixel of each run.
        keep: 0 to start from nothing instead of what ``y`` holds.
        y_step: bytes between output pixels.
        runs, columns: compile-time; runs of a tile and pixels of a run.
        x_step: compile-time; bytes between input pixels.
        sets: compile-time; sets of accumulators, for tiles with fewer pixels than a multiply-accumulate has latency,
            and entries per turn of the loop.
        lanes: compile-time.
    """
    nr, nc, step, ns, n = (literal(size) for size in (runs, columns, x_step, sets, lanes))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, y_, weight_, offsets_, first_, last_, bias_, table_, keep_, y_step_ = args[:10]
        sources, targets = _runs(builder, table_, nr, x_, y_)
        places = _tile(builder, targets, y_step_, nc, n)
        zero = ir.Constant(ir.VectorType(F32, n), [0.0] * n)
        slots = [[cgutils.alloca_once(builder, zero.type) for _ in places] for _ in range(ns)]
        for slot in (slot for part in slots for slot in part):
            builder.store(zero, slot)
        with builder.if_then(builder.icmp_signed("!=", keep_, _constant(0))):
            for slot, place in zip(slots[0], places, strict=True):
                builder.store(builder.load(place, align=4), slot)

        def add(entry: Any, part: list[Any]) -> None:
            offset = _item(builder, offsets_, entry)
            weight = splat(builder, _item(builder, weight_, entry, F32), n)
            pixels = _tile(builder, [builder.add(source, offset) for source in sources], step, nc, n)
            for slot, pixel in zip(part, pixels, strict=True):
                builder.store(_fma(builder, builder.load(pixel, align=4), weight, builder.load(slot)), slot)

        count = builder.sub(last_, first_)
        whole = builder.sdiv(count, _constant(ns))
        with cgutils.for_range(builder, whole) as loop:
            entry = builder.add(first_, builder.mul(loop.index, _constant(ns)))
            for s in range(ns):
                add(builder.add(entry, _constant(s)), slots[s])
        if ns > 1:
            rest = builder.add(first_, builder.mul(whole, _constant(ns)))
            with cgutils.for_range(builder, builder.srem(count, _constant(ns))) as loop:
                add(builder.add(rest, loop.index), slots[0])
        shift = splat(builder, bias_, n)
        for i, place in enumerate(places):
            total = builder.load(slots[0][i])
            for part in slots[1:]:
                total = builder.fadd(total, builder.load(part[i]))
            builder.store(builder.fadd(total, shift), place, align=4)
        return context.get_dummy_value()

    kinds = [types.int64] * 6 + [types.float32] + [types.int64] * 3
    return types.void(*kinds, runs, columns, x_step, sets, lanes), codegen


@intrinsic(prefer_literal=True)
def csr_correlate_tile(
    typingctx: Any, x: Any, dy: Any, offsets: Any, first: Any, last: Any, sums: Any, table: Any, keep: Any, y_step: Any,
    runs: Any, columns: Any, x_step: Any, chains: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Add to every entry's vector in ``sums`` what a tile contributes: ``sum over p of dy[p] * x[p + offset]``.

    The tile of ``dy`` stays in registers while all entries of its channel pass.

    Args:
        x, dy: addresses of the input and of the channel of the output gradient.
        offsets, first, last: as in ``csr_multiply_tile``.
        sums: address of the vector of entry 0.
        table, y_step, runs, columns, x_step, lanes: as in ``csr_multiply_tile``.
        keep: 0 to start from nothing instead of what ``sums`` holds.
        chains: compile-time; sums that are kept apart, since a multiply-accumulate waits for the one before.
    """
    nr, nc, step, nk, n = (literal(size) for size in (runs, columns, x_step, chains, lanes))

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        x_, dy_, offsets_, first_, last_, sums_, table_, keep_, y_step_ = args[:9]
        sources, targets = _runs(builder, table_, nr, x_, dy_)
        grads = [builder.load(place, align=4) for place in _tile(builder, targets, y_step_, nc, n)]
        zero = ir.Constant(grads[0].type, [0.0] * n)
        kept = builder.icmp_signed("!=", keep_, _constant(0))
        with cgutils.for_range(builder, builder.sub(last_, first_)) as loop:
            entry = builder.add(first_, loop.index)
            offset = _item(builder, offsets_, entry)
            target = pointer(builder, builder.add(sums_, builder.mul(entry, _constant(4 * n))), zero.type)
            totals = [builder.select(kept, builder.load(target, align=4), zero)] + [zero] * (nk - 1)
            pixels = _tile(builder, [builder.add(source, offset) for source in sources], step, nc, n)
            for i, (grad, pixel) in enumerate(zip(grads, pixels, strict=True)):
                totals[i % nk] = _fma(builder, builder.load(pixel, align=4), grad, totals[i % nk])
            while len(totals) > 1:
                pairs = zip(totals[0::2], [*totals[1::2], None], strict=False)
                totals = [a if b is None else builder.fadd(a, b) for a, b in pairs]
            builder.store(totals[0], target, align=4)
        return context.get_dummy_value()

    return types.void(*[types.int64] * 9, runs, columns, x_step, chains, lanes), codegen


@intrinsic(prefer_literal=True)
def csr_gradients_tile(
    typingctx: Any, dy: Any, x: Any, dx: Any, weight: Any, offsets: Any, first: Any, last: Any, sums: Any, table: Any,
    part: Any, keep: Any, following: Any, x_step: Any, middle: Any, factor: Any, offset: Any, low: Any, high: Any,
    runs: Any, columns: Any, normalised: Any, lanes: Any,
) -> Any:  # fmt: skip
    """Compute both gradients at the pixels of a tile of one input channel: each vector of ``dy`` is loaded once.

    ``dx[p] = sum over entries of w * dy[p + offset]``, and to every entry's vector in ``sums`` is added
    ``sum over p of x[p] * dy[p + offset]``. The tiles of ``x`` and ``dx`` stay in registers.

    Args:
        dy, x, dx: addresses of the output gradient and of the channel of input and input gradient.
        weight, offsets, first, last, sums: as in ``csr_multiply_tile`` and ``csr_correlate_tile``.
        x_step: bytes between pixels of ``x``, and of ``dx``; those of ``dy`` lie side by side.
        table: ``runs`` triples (``dy``, ``x``, ``dx``) of int64 byte offsets, those of the first pixel of each run.
        part: 0 to start from nothing instead of what ``dx`` holds.
        keep: 0 to start from nothing instead of what ``sums`` holds.
        following: the table of the tile that this channel meets next, whose part of ``x`` is asked for, and of ``dx``
            if it holds something; or 0.
        middle, factor, offset, low, high: float32; the input is ``clip((x - middle) * factor + offset)`` if
            ``normalised``.
        runs, columns, normalised, lanes: compile-time.
    """
    nr, nc, norm, n = (literal(size) for size in (runs, columns, normalised, lanes))
    step, vector = 4 * n, ir.VectorType(F32, n)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        dy_, x_, dx_, weight_, offsets_, first_, last_, sums_, table_, part_, keep_, following_, x_step_ = args[:13]
        base = pointer(builder, table_, I64)
        offsets = [builder.load(builder.gep(base, [_constant(i)])) for i in range(3 * nr)]
        with builder.if_then(builder.icmp_signed("!=", following_, _constant(0))):
            coming = pointer(builder, following_, I64)
            coming = [builder.load(builder.gep(coming, [_constant(i)])) for i in range(3 * nr)]
            for place in _tile(builder, [builder.add(x_, o) for o in coming[1::3]], x_step_, nc, n):
                ask_for(builder, place)
            with builder.if_then(builder.icmp_signed("!=", part_, _constant(0))):
                for place in _tile(builder, [builder.add(dx_, o) for o in coming[2::3]], x_step_, nc, n):
                    ask_for(builder, place)
        sources, inputs, targets = (
            [builder.add(address, o) for o in offsets[i::3]] for i, address in enumerate((dy_, x_, dx_))
        )
        pixels = [builder.load(place, align=4) for place in _tile(builder, inputs, x_step_, nc, n)]
        if norm:
            middle_, factor_, offset_, low_, high_ = (splat(builder, number, n) for number in args[13:18])
            for i, pixel in enumerate(pixels):
                value = _fma(builder, builder.fsub(pixel, middle_), factor_, offset_)
                value = builder.select(builder.fcmp_ordered("<", value, low_), low_, value)
                pixels[i] = builder.select(builder.fcmp_ordered(">", value, high_), high_, value)
        zero = ir.Constant(vector, [0.0] * n)
        places = _tile(builder, targets, x_step_, nc, n)
        slots = [cgutils.alloca_once(builder, vector) for _ in places]
        for slot in slots:
            builder.store(zero, slot)
        with builder.if_then(builder.icmp_signed("!=", part_, _constant(0))):
            for slot, place in zip(slots, places, strict=True):
                builder.store(builder.load(place, align=4), slot)
        kept = builder.icmp_signed("!=", keep_, _constant(0))
        with cgutils.for_range(builder, builder.sub(last_, first_)) as loop:
            entry = builder.add(first_, loop.index)
            at = _item(builder, offsets_, entry)
            weight = splat(builder, _item(builder, weight_, entry, F32), n)
            target = pointer(builder, builder.add(sums_, builder.mul(entry, _constant(step))), vector)
            totals = [builder.select(kept, builder.load(target, align=4), zero), zero]
            errors = _tile(builder, [builder.add(source, at) for source in sources], step, nc, n)
            for i, (slot, pixel, place) in enumerate(zip(slots, pixels, errors, strict=True)):
                error = builder.load(place, align=4)
                builder.store(_fma(builder, error, weight, builder.load(slot)), slot)
                totals[i % 2] = _fma(builder, error, pixel, totals[i % 2])
            builder.store(builder.fadd(*totals), target, align=4)
        for slot, place in zip(slots, places, strict=True):
            builder.store(builder.load(slot), place, align=4)
        return context.get_dummy_value()

    kinds = [types.int64] * 13 + [types.float32] * 5
    return types.void(*kinds, runs, columns, normalised, lanes), codegen
