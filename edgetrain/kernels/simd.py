"""Vector type and intrinsics that the kernels are written with.

``Vec(n)`` is an LLVM vector of ``n`` float32 as a Numba type: a local variable of
a kernel lives in one SIMD register (or in several, or in a part of one, when the
machine's registers have another width). Addresses are plain int64 numbers of
bytes; every load and store of a vector expects an address that is a multiple of
four bytes only, and is fast when it is a multiple of the vector.

Widths are compile-time constants: pass a module global or a closure variable.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils, extending, types
from numba.core.errors import TypingError
from numba.core.extending import models, register_model
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature

intrinsic: Any = extending.intrinsic  # numba describes it as a plain class; it is a decorator with options

F32 = ir.FloatType()
I32 = ir.IntType(32)
I64 = ir.IntType(64)


class Vec(types.Type):
    """Numba type of a vector of ``width`` float32 lanes."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(name=f"Vec({width})")


@register_model(Vec)
class VecModel(models.PrimitiveModel):
    """A ``Vec`` is an LLVM vector, in registers and in memory."""

    def __init__(self, dmm: Any, fe_type: Vec) -> None:
        super().__init__(dmm, fe_type, ir.VectorType(F32, fe_type.width))


def literal(value: types.Type) -> int:
    """Return the compile-time integer behind a Numba literal type.

    Raises:
        TypingError: the value is not known when the kernel is compiled.
    """
    if not isinstance(value, types.IntegerLiteral):
        raise TypingError(f"a compile-time integer was expected, found {value}")
    return int(value.literal_value)


def pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    """Turn an int64 address into a typed LLVM pointer."""
    return builder.inttoptr(address, element.as_pointer())


def splat(builder: ir.IRBuilder, scalar: ir.Value, width: int) -> ir.Value:
    """Return a vector with ``scalar`` in all lanes."""
    vector = ir.VectorType(scalar.type, width)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), scalar, ir.Constant(I32, 0))
    mask = ir.Constant(ir.VectorType(I32, width), [0] * width)
    return builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), mask)


def call_llvm(builder: ir.IRBuilder, name: str, *operands: ir.Value, result: ir.Type | None = None) -> ir.Value:
    """Call an LLVM intrinsic by its full name; the result has the first operand's type by default."""
    kind = ir.FunctionType(result or operands[0].type, [operand.type for operand in operands])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), operands)


def suffix(vector: ir.Type) -> str:
    """Return LLVM's overload suffix of a float vector or of a float."""
    return f"v{vector.count}f32" if isinstance(vector, ir.VectorType) else "f32"


# --- memory -----------------------------------------------------------------


@intrinsic(prefer_literal=True)
def load(typingctx: Any, address: Any, width: Any) -> Any:
    """Load ``width`` float32 from ``address``."""
    lanes = literal(width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load(pointer(builder, args[0], ir.VectorType(F32, lanes)), align=4)

    return Vec(lanes)(types.int64, width), codegen


@intrinsic
def store(typingctx: Any, address: Any, vector: Any) -> Any:
    """Store a vector at ``address``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        builder.store(args[1], pointer(builder, args[0], args[1].type), align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), codegen


def _scalar_load(element: ir.Type, result: types.Type) -> Callable[..., Any]:
    @intrinsic
    def load_scalar(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.load(pointer(builder, args[0], element))

        return result(types.int64), codegen

    return load_scalar


def _scalar_store(element: ir.Type, kind: types.Type) -> Callable[..., Any]:
    @intrinsic
    def store_scalar(typingctx: Any, address: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            builder.store(args[1], pointer(builder, args[0], element))
            return context.get_dummy_value()

        return types.void(types.int64, kind), codegen

    return store_scalar


load_f32 = _scalar_load(F32, types.float32)
load_i32 = _scalar_load(I32, types.int32)
load_u16 = _scalar_load(ir.IntType(16), types.uint16)
load_f64 = _scalar_load(ir.DoubleType(), types.float64)
load_i64 = _scalar_load(I64, types.int64)
store_f32 = _scalar_store(F32, types.float32)
store_i32 = _scalar_store(I32, types.int32)
store_f64 = _scalar_store(ir.DoubleType(), types.float64)
store_i64 = _scalar_store(I64, types.int64)


@intrinsic(prefer_literal=True)
def arguments(typingctx: Any, address: Any, count: Any) -> Any:
    """Load ``count`` int64 arguments of a kernel as a tuple."""
    number = literal(count)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        base = pointer(builder, args[0], I64)
        values = [builder.load(builder.gep(base, [ir.Constant(I64, i)])) for i in range(number)]
        return context.make_tuple(builder, sig.return_type, values)

    return types.UniTuple(types.int64, number)(types.int64, count), codegen


# --- arithmetic -------------------------------------------------------------


@intrinsic(prefer_literal=True)
def broadcast(typingctx: Any, scalar: Any, width: Any) -> Any:
    """Return a vector with the float32 ``scalar`` in all lanes."""
    lanes = literal(width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return splat(builder, args[0], lanes)

    return Vec(lanes)(types.float32, width), codegen


@intrinsic(prefer_literal=True)
def lane_numbers(typingctx: Any, width: Any) -> Any:
    """Return the vector 0, 1, 2, ..."""
    lanes = literal(width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return ir.Constant(ir.VectorType(F32, lanes), [float(lane) for lane in range(lanes)])

    return Vec(lanes)(width), codegen


def _vector_operator(function: Any, build: Callable[[Any, Any, Any], Any]) -> None:
    """Let ``Vec op Vec`` mean a lane-wise operation."""

    @infer_global(function)
    class VecOperator(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            if len(args) == 2 and isinstance(args[0], Vec) and args[0] == args[1]:
                return signature(args[0], *args)
            return None

    @lower_builtin(function, Vec, Vec)
    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return build(builder, args[0], args[1])


_vector_operator(operator.add, lambda builder, a, b: builder.fadd(a, b))
_vector_operator(operator.sub, lambda builder, a, b: builder.fsub(a, b))
_vector_operator(operator.mul, lambda builder, a, b: builder.fmul(a, b))
_vector_operator(operator.truediv, lambda builder, a, b: builder.fdiv(a, b))


def _unary(name: str) -> Callable[..., Any]:
    @intrinsic
    def function(typingctx: Any, a: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return call_llvm(builder, f"llvm.{name}.{suffix(args[0].type)}", args[0])

        return a(a), codegen

    return function


sqrt = _unary("sqrt")
absolute = _unary("fabs")
floor = _unary("floor")


@intrinsic
def fma(typingctx: Any, a: Any, b: Any, c: Any) -> Any:
    """Return ``a * b + c`` with one rounding."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_llvm(builder, f"llvm.fma.{suffix(args[0].type)}", *args)

    return a(a, a, a), codegen


def _comparison(predicate: str) -> Callable[..., Any]:
    """Return ``select_<predicate>(a, b, yes, no)``: per lane ``yes`` where ``a predicate b``."""

    @intrinsic
    def select(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            return builder.select(builder.fcmp_ordered(predicate, args[0], args[1]), args[2], args[3])

        return yes(a, a, yes, yes), codegen

    return select


select_gt = _comparison(">")
select_ge = _comparison(">=")


@intrinsic
def maximum(typingctx: Any, a: Any, b: Any) -> Any:
    """Lane-wise maximum; a NaN in ``a`` is passed on, so that a broken step is noticed."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[1], args[0])

    return a(a, a), codegen


@intrinsic
def minimum(typingctx: Any, a: Any, b: Any) -> Any:
    """Lane-wise minimum; a NaN in ``a`` is passed on."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered(">", args[0], args[1]), args[1], args[0])

    return a(a, a), codegen


@intrinsic(prefer_literal=True)
def repeat(typingctx: Any, vector: Any, width: Any) -> Any:
    """Return a vector of ``width`` lanes in which those of ``vector`` follow each other again and again."""
    lanes = literal(width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        order = ir.Constant(ir.VectorType(I32, lanes), [lane % kind.count for lane in range(lanes)])
        return builder.shuffle_vector(args[0], ir.Constant(kind, ir.Undefined), order)

    return Vec(lanes)(vector, width), codegen


@intrinsic
def sum_lanes(typingctx: Any, a: Any) -> Any:
    """Return the sum of all lanes, added pairwise in a fixed order."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = args[0]
        while vector.type.count > 1:
            half = vector.type.count // 2
            undefined = ir.Constant(vector.type, ir.Undefined)
            low = ir.Constant(ir.VectorType(I32, half), list(range(half)))
            high = ir.Constant(ir.VectorType(I32, half), list(range(half, 2 * half)))
            vector = builder.fadd(
                builder.shuffle_vector(vector, undefined, low), builder.shuffle_vector(vector, undefined, high)
            )
        return builder.extract_element(vector, ir.Constant(I32, 0))

    return types.float32(a), codegen


@intrinsic
def power_of_two(typingctx: Any, a: Any) -> Any:
    """Return ``2 ** a`` for integral lanes ``-126 <= a <= 127``, by writing the exponent bits."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        integers = ir.VectorType(I32, args[0].type.count)
        biased = builder.add(builder.fptosi(args[0], integers), ir.Constant(integers, [127] * integers.count))
        shifted = builder.shl(biased, ir.Constant(integers, [23] * integers.count))
        return builder.bitcast(shifted, args[0].type)

    return a(a), codegen


# --- bits -------------------------------------------------------------------
# Vectors that hold whole numbers of 32 bits per lane, or several short ones, packed. Nothing calculates with them as
# floats; they only share the registers.


@intrinsic(prefer_literal=True)
def whole(typingctx: Any, number: Any, width: Any) -> Any:
    """Return a vector with the whole ``number`` in all lanes."""
    lanes = literal(width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = splat(builder, builder.trunc(args[0], I32), lanes)
        return builder.bitcast(vector, ir.VectorType(F32, lanes))

    return Vec(lanes)(types.int64, width), codegen


def _as_whole(builder: Any, vector: ir.Value) -> ir.Value:
    return builder.bitcast(vector, ir.VectorType(I32, vector.type.count))


@intrinsic
def add_whole(typingctx: Any, vector: Any, number: Any) -> Any:
    """Return the whole numbers of ``vector``, each plus ``number``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = _as_whole(builder, args[0])
        more = splat(builder, builder.trunc(args[1], I32), words.type.count)
        return builder.bitcast(builder.add(words, more), args[0].type)

    return vector(vector, types.int64), codegen


@intrinsic
def pack(typingctx: Any, word: Any, number: Any, shift: Any) -> Any:
    """Return ``word`` with ``number`` put above its ``shift`` lowest bits, which were free."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words, numbers = _as_whole(builder, args[0]), _as_whole(builder, args[1])
        bits = splat(builder, builder.trunc(args[2], I32), words.type.count)
        return builder.bitcast(builder.or_(words, builder.shl(numbers, bits)), args[0].type)

    return word(word, word, types.int64), codegen


@intrinsic(prefer_literal=True)
def unpack(typingctx: Any, word: Any, shift: Any, bits: Any) -> Any:
    """Return the number of ``bits`` bits that lies above the ``shift`` lowest ones."""
    mask = (1 << literal(bits)) - 1

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        words = _as_whole(builder, args[0])
        down = builder.lshr(words, splat(builder, builder.trunc(args[1], I32), words.type.count))
        masks = ir.Constant(words.type, [ir.Constant(I32, mask)] * words.type.count)
        return builder.bitcast(builder.and_(down, masks), args[0].type)

    return word(word, types.int64, bits), codegen


@intrinsic
def select_same(typingctx: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """Return, per lane, ``yes`` where the whole numbers ``a`` and ``b`` are the same, else ``no``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        same = builder.icmp_signed("==", _as_whole(builder, args[0]), _as_whole(builder, args[1]))
        return builder.select(same, args[2], args[3])

    return yes(a, a, yes, yes), codegen


# --- a bit per lane ---------------------------------------------------------


def _lanes_of_bits(builder: Any, bits: ir.Value, lanes: int) -> ir.Value:
    return builder.bitcast(builder.trunc(bits, ir.IntType(lanes)), ir.VectorType(ir.IntType(1), lanes))


@intrinsic
def count_bits(typingctx: Any, bits: Any) -> Any:
    """Return how many bits of an int64 are 1."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return call_llvm(builder, "llvm.ctpop.i64", args[0])

    return types.int64(types.int64), codegen


@intrinsic(prefer_literal=True)
def load_expanded(typingctx: Any, address: Any, bits: Any, width: Any) -> Any:
    """Return a vector with the numbers that follow ``address`` in the lanes whose bit is 1, in order, and 0 elsewhere.

    A whole vector is read and spread in a register: a load that spreads is slower. ``multiply_bits`` at batch 1 took
    5.2 us and takes 4.2 so (fc1 of LeNet-5, AMD). 16 lanes of AVX-512.
    """
    lanes = literal(width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(F32, lanes)
        zeros, mask = ir.Constant(vector, [0.0] * lanes), _lanes_of_bits(builder, args[1], lanes)
        numbers = builder.load(pointer(builder, args[0], vector), align=4)
        return call_llvm(builder, f"llvm.x86.avx512.mask.expand.{suffix(vector)}", numbers, zeros, mask)

    return Vec(lanes)(types.int64, types.int64, width), codegen


@intrinsic
def store_where(typingctx: Any, address: Any, vector: Any, bits: Any) -> Any:
    """Store at ``address`` the lanes whose bit is 1, each in its place; the others' memory is not touched."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[1].type
        place, mask = pointer(builder, args[0], kind), _lanes_of_bits(builder, args[2], kind.count)
        name = f"llvm.masked.store.{suffix(kind)}.p0{suffix(kind)}"
        call_llvm(builder, name, args[1], place, ir.Constant(I32, 4), mask, result=ir.VoidType())
        return context.get_dummy_value()

    return types.void(types.int64, vector, types.int64), codegen


@intrinsic(prefer_literal=True)
def load_where(typingctx: Any, address: Any, bits: Any, width: Any) -> Any:
    """Return a vector with the numbers at ``address`` in the lanes whose bit is 1, 0 elsewhere; no others are read."""
    lanes = literal(width)

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        vector = ir.VectorType(F32, lanes)
        zeros, mask = ir.Constant(vector, [0.0] * lanes), _lanes_of_bits(builder, args[1], lanes)
        name = f"llvm.masked.load.{suffix(vector)}.p0{suffix(vector)}"
        operands = pointer(builder, args[0], vector), ir.Constant(I32, 4), mask, zeros
        return call_llvm(builder, name, *operands, result=vector)

    return Vec(lanes)(types.int64, types.int64, width), codegen


@intrinsic
def keep_where(typingctx: Any, vector: Any, bits: Any) -> Any:
    """Return the lanes whose bit is 1, in their places, and 0 elsewhere."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        mask = _lanes_of_bits(builder, args[1], kind.count)
        return builder.select(mask, args[0], ir.Constant(kind, [0.0] * kind.count))

    return vector(vector, types.int64), codegen


@intrinsic
def compress(typingctx: Any, vector: Any, bits: Any) -> Any:
    """Return the lanes whose bit is 1, in order, in the first lanes, and 0 behind; 16 lanes of AVX-512.

    In a register: a store that compresses is slow on some machines.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        kind = args[0].type
        zeros, mask = ir.Constant(kind, [0.0] * kind.count), _lanes_of_bits(builder, args[1], kind.count)
        return call_llvm(builder, f"llvm.x86.avx512.mask.compress.{suffix(kind)}", args[0], zeros, mask)

    return vector(vector, types.int64), codegen


# --- threads and machine state ----------------------------------------------


def ask_for(builder: ir.IRBuilder, place: ir.Value) -> None:
    """Ask for a cache line that will be read."""
    line = builder.bitcast(place, ir.PointerType(ir.IntType(8)))
    reading, everywhere, data = (ir.Constant(I32, number) for number in (0, 3, 1))
    call_llvm(builder, "llvm.prefetch.p0i8", line, reading, everywhere, data, result=ir.VoidType())


@intrinsic
def call_kernel(typingctx: Any, function: Any, args: Any, first: Any, last: Any) -> Any:
    """Call the compiled kernel at address ``function`` for the jobs ``first <= job < last``."""

    def codegen(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [I64, I64, I64])
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), values[1:])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic
def atomic_add(typingctx: Any, address: Any, value: Any) -> Any:
    """Add to the int64 at ``address`` and return its old value, sequentially consistent."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", pointer(builder, args[0], I64), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), codegen


@intrinsic
def atomic_load(typingctx: Any, address: Any) -> Any:
    """Read the int64 at ``address``, acquiring what its writer wrote before."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.load_atomic(pointer(builder, args[0], I64), "acquire", 8)

    return types.int64(types.int64), codegen


@intrinsic
def float_state(typingctx: Any) -> Any:
    """Return the calling thread's floating-point control register (0 where unknown)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        machine = str(builder.module.triple)
        if machine.startswith("x86_64"):
            slot = cgutils.alloca_once(builder, I32)
            raw = builder.bitcast(slot, ir.IntType(8).as_pointer())
            call_llvm(builder, "llvm.x86.sse.stmxcsr", raw, result=ir.VoidType())
            return builder.zext(builder.load(slot), I64)
        if machine.startswith("aarch64"):
            # Not inline assembly, here and below: Numba loads no parser for it, and LLVM ends the process without one.
            return call_llvm(builder, "llvm.aarch64.get.fpcr", result=I64)
        return ir.Constant(I64, 0)

    return types.int64(), codegen


@intrinsic
def set_float_state(typingctx: Any, state: Any) -> Any:
    """Write the calling thread's floating-point control register."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        machine = str(builder.module.triple)
        if machine.startswith("x86_64"):
            slot = cgutils.alloca_once(builder, I32)
            builder.store(builder.trunc(args[0], I32), slot)
            raw = builder.bitcast(slot, ir.IntType(8).as_pointer())
            call_llvm(builder, "llvm.x86.sse.ldmxcsr", raw, result=ir.VoidType())
        elif machine.startswith("aarch64"):
            call_llvm(builder, "llvm.aarch64.set.fpcr", args[0], result=ir.VoidType())
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def pause(typingctx: Any) -> Any:
    """Tell the processor that this is a loop of waiting: a thread on the same core gets its resources meanwhile."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        machine = str(builder.module.triple)
        if machine.startswith("x86_64"):
            call_llvm(builder, "llvm.x86.sse2.pause", result=ir.VoidType())
        elif machine.startswith("aarch64"):
            # What other runtimes wait with: the hint that is meant for it takes no time on Cortex-A.
            call_llvm(builder, "llvm.aarch64.isb", ir.Constant(I32, 15), result=ir.VoidType())
        return context.get_dummy_value()

    return types.void(), codegen


@intrinsic
def flush_bits(typingctx: Any) -> Any:
    """Return the bits that make this machine treat subnormal numbers as zero (x86 FTZ and DAZ, Arm FZ)."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        machine = str(builder.module.triple)
        bits = 0x8040 if machine.startswith("x86_64") else (1 << 24 if machine.startswith("aarch64") else 0)
        return ir.Constant(I64, bits)

    return types.int64(), codegen
