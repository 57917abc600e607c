"""Linking of compiled code: what is refused, and code of another processor linked here and run by an emulator."""

from __future__ import annotations

import ctypes
import re
import struct

import numpy as np
import pytest
import unicorn
from llvmlite import binding, ir
from unicorn import arm64_const

from edgetrain.errors import GraphError
from edgetrain.kernels import compiler, loader, registry, simd, tiles
from edgetrain.kernels.codes import SAMPLES, SIGMOID
from edgetrain.kernels.loader import ElfObject

CODE, DATA, STACK, OUTSIDE = 0x7F0012345000, 0x100000000, 0x200000000, 0x300000000
LAYOUT = "e-m:e-i8:8:32-i16:16:32-i64:64-i128:128-n32:64-S128"
# Doubles its argument and returns: stands for every function of the C library.
DOUBLE = bytes.fromhex("0028201e c0035fd6")
CALL = f"""
target datalayout = "{LAYOUT}"
target triple = "aarch64-unknown-linux-gnu"
declare float @expf(float)
define void @code(ptr %arguments, i64 %first, i64 %last) {{
  %place = load ptr, ptr %arguments
  %before = load float, ptr %place
  %after = call float @expf(float %before)
  store float %after, ptr %place
  ret void
}}
"""


ADDRESS = CALL.replace("""  %before = load float, ptr %place
  %after = call float @expf(float %before)
  store float %after, ptr %place
""", """  store ptr @expf, ptr %place
""")


@pytest.fixture(scope="module")
def cortex():
    """Return LLVM's description of the processor of a Raspberry Pi 4, set up as for kernels of this machine."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    return target.create_target_machine(cpu="cortex-a72", opt=3, reloc="pic", codemodel="small")


def arm_kernel(cortex, name: str, *sizes: int) -> bytes:
    """Compile a kernel for the other processor."""
    body = registry.load_factories()[name][0](*sizes)
    with compiler.global_compiler_lock:
        module = compiler._compile(body, "code", 3, compiler.types.void)
    compiler._isolate(module, "code")
    text = re.sub(r'target triple = ".*"', 'target triple = "aarch64-unknown-linux-gnu"', str(module))
    text = re.sub(r'target datalayout = ".*"', f'target datalayout = "{LAYOUT}"', text)
    text = re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)
    return cortex.emit_object(binding.parse_assembly(text))


class Emulator:
    """Runs one linked object; arrays are put at addresses that count from ``DATA``."""

    def __init__(self, content: bytes) -> None:
        self._machine = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        linked = ElfObject(content)
        image = linked.link(CODE, lambda name: OUTSIDE)
        for start, size in ((CODE, len(image)), (DATA, 1 << 20), (STACK, 1 << 20), (OUTSIDE, 4096)):
            self._machine.mem_map(start, -(-size // 4096) * 4096)
        self._machine.mem_write(CODE, image)
        self._machine.mem_write(OUTSIDE, DOUBLE)
        self._entry, self._next = CODE + linked.address("code"), DATA + 4096

    def put(self, array: np.ndarray) -> int:
        """Copy an array into the machine; return its address."""
        place, self._next = self._next, self._next + -(-array.nbytes // 64) * 64
        self._machine.mem_write(place, array.tobytes())
        return place

    def get(self, place: int, *shape: int) -> np.ndarray:
        """Return float32 numbers from the machine."""
        return np.frombuffer(bytes(self._machine.mem_read(place, 4 * int(np.prod(shape)))), np.float32).reshape(shape)

    def run(self, arguments: list[int], jobs: int) -> None:
        """Call the function for all jobs."""
        self._machine.mem_write(DATA, struct.pack(f"<{len(arguments)}q", *arguments))
        for register, value in ((arm64_const.UC_ARM64_REG_SP, STACK + (1 << 20) - 64),
                                (arm64_const.UC_ARM64_REG_X0, DATA), (arm64_const.UC_ARM64_REG_X1, 0),
                                (arm64_const.UC_ARM64_REG_X2, jobs),
                                (arm64_const.UC_ARM64_REG_LR, OUTSIDE + 2048)):  # fmt: skip
            self._machine.reg_write(register, value)
        self._machine.emu_start(self._entry, OUTSIDE + 2048)


def state_kernel(swapped: int) -> str:
    """Return LLVM code for the other processor that stores its floating-point state and sets ``swapped`` bits of it."""
    module = ir.Module("state")
    module.triple, module.data_layout = "aarch64-unknown-linux-gnu", LAYOUT
    number = ir.IntType(64)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [number.as_pointer(), number, number]), "code")
    builder = ir.IRBuilder(function.append_basic_block())

    def call(intrinsic, *arguments):
        return intrinsic._defn(None, *arguments)[1](compiler.cpu_target.target_context, builder, None, arguments)

    before = call(simd.float_state)
    call(simd.set_float_state, builder.xor(before, ir.Constant(number, swapped)))
    call(simd.pause)
    place = builder.inttoptr(builder.load(function.args[0]), number.as_pointer())
    builder.store(before, place)
    builder.store(call(simd.flush_bits), builder.gep(place, [ir.Constant(number, 1)]))
    builder.ret_void()
    return str(module)


def in_order(kernel: str, **values: int) -> list[int]:
    names = registry.argument_names(kernel)
    assert values.keys() <= set(names)
    return [values.get(name, 0) for name in names]


# ---- code for ARM, executed


def test_arm_code_calls_functions_of_the_process(cortex):
    machine = Emulator(cortex.emit_object(binding.parse_assembly(CALL)))
    place = machine.put(np.float32([1.5]))
    machine.run([place], 1)
    assert machine.get(place, 1) == 3


def test_arm_code_finds_addresses_in_its_table(cortex):
    machine = Emulator(cortex.emit_object(binding.parse_assembly(ADDRESS)))
    place = machine.put(np.zeros(2, np.int32))
    machine.run([place], 1)
    assert machine.get(place, 2).tobytes() == struct.pack("<Q", OUTSIDE)


def test_arm_code_reads_its_constants(cortex):
    machine, x = Emulator(arm_kernel(cortex, "unary", 4, SIGMOID)), np.linspace(-5, 5, 16, dtype=np.float32)
    place = machine.put(x)
    machine.run(in_order("unary", x=place, y=place, rows=1, vectors=4), 1)
    np.testing.assert_allclose(machine.get(place, 16), 1 / (1 + np.exp(-x)), rtol=1e-6)


def test_arm_code_flushes_subnormals_without_inline_assembly(cortex):
    """LLVM ends the process at inline assembly for a processor whose assembler nobody loaded, and Numba loads none."""
    flush = 1 << 24
    text = state_kernel(flush)
    assert " asm " not in text
    machine = Emulator(cortex.emit_object(binding.parse_assembly(text)))
    place = machine.put(np.zeros(2, np.int64))
    machine.run([place], 1)
    assert machine.get(place, 4).view(np.int64).tolist() == [0, flush]
    machine.run([place], 1)  # sees what the first call set
    assert machine.get(place, 4).view(np.int64).tolist() == [flush, flush]


@pytest.mark.parametrize("count", [1, 5, 16])
def test_arm_code_packs_samples(cortex, count):
    machine, x = Emulator(arm_kernel(cortex, "pack_input", 16)), np.arange(count * 12, dtype=np.float32)
    y = machine.put(np.full((2, 6, 16), np.nan, np.float32))
    machine.run(in_order(
        "pack_input", x=machine.put(x), y=y, scale=machine.put(np.float32([2, 3])), rows=2, columns=3, channels=2,
        shift=machine.put(np.float32([1, -1])), state=machine.put(np.int64([count])), y_block=768, y_channel=384,
        y_row=192,
    ), 2)  # fmt: skip
    wanted = np.zeros((2, 6, 16), np.float32)
    scaled = x.reshape(count, 2, 6) * np.float32([[[2], [3]]]) + np.float32([[[1], [-1]]])
    wanted[..., :count] = np.moveaxis(scaled, 0, 2)
    np.testing.assert_array_equal(machine.get(y, 2, 6, 16), wanted)


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_arm_code_correlates(cortex, rows):
    rng, pixels = np.random.default_rng(0), 9
    x, grad = rng.normal(size=(4, pixels, 4)).astype(np.float32), rng.normal(size=(4, pixels, 4)).astype(np.float32)
    machine = Emulator(arm_kernel(cortex, "correlate", 4, 4, 4, SAMPLES, rows % 4))
    target = machine.put(np.zeros(16, np.float32))
    machine.run(in_order(
        "correlate", x=machine.put(x), grad_out=machine.put(grad), grad_weight=target, pixel_count=pixels,
        pixels=machine.put(np.int64([[16 * p, 16 * p] for p in range(pixels)])), term_count=4, channel_count=rows,
        terms=machine.put(np.int64([[16 * pixels * t, 4 * t] for t in range(4)])), grad_channel=16 * pixels,
        weight_channel=16, blocks=1, groups=1, pixel_chunk=256, term_chunk=4, term_chunks=1, channel_tiles=1, parts=1,
    ), 1)  # fmt: skip
    wanted = np.einsum("cpl,tpl->ct", grad, x)
    wanted[rows:] = 0
    np.testing.assert_allclose(machine.get(target, 4, 4), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weights_as_vector", [True, False])
def test_arm_code_multiplies_by_lanes_of_a_register(cortex, monkeypatch, weights_as_vector):
    monkeypatch.setattr(tiles, "_WEIGHTS_AS_VECTOR", weights_as_vector)
    rng, pixels, terms = np.random.default_rng(0), 8, 5
    x, w = rng.normal(size=(terms, pixels, 4)).astype(np.float32), rng.normal(size=(terms, 4)).astype(np.float32)
    machine = Emulator(arm_kernel(cortex, "multiply", 4, 4, 4, SAMPLES))
    y, bounds = machine.put(np.full((4, pixels, 4), np.nan, np.float32)), np.float32([-1, 1]).view(np.uint32)
    machine.run(in_order(
        "multiply", x=machine.put(x), y=y, weight=machine.put(w), bias=machine.put(np.float32([0, 1, 2, 3])),
        pixels=machine.put(np.int64([[16 * p, 16 * p] for p in range(pixels)])), pixel_count=pixels,
        terms=machine.put(np.int64([16 * pixels * t for t in range(terms)])), term_count=terms, channel_count=4,
        weight_step=16, y_channel=16 * pixels, groups=1, pixel_chunk=pixels, pixel_chunks=1, channel_chunk=4,
        channel_chunks=1, f_low=int(bounds[0]), f_high=int(bounds[1]),
    ), 1)  # fmt: skip
    wanted = np.einsum("tc,tpl->cpl", w, x) + np.arange(4).reshape(4, 1, 1)
    np.testing.assert_allclose(machine.get(y, 4, pixels, 4), wanted.clip(-1, 1), rtol=1e-5, atol=1e-5)


# ---- what is refused


def test_another_file_and_another_machine_are_refused(cortex):
    content = cortex.emit_object(binding.parse_assembly(CALL))
    with pytest.raises(GraphError, match="no ELF object of 64 bits"):
        ElfObject(b"MZ" + content[2:])
    with pytest.raises(GraphError, match=r"for machine 243, expected x86-64 \(62\) or AArch64 \(183\)"):
        ElfObject(content[:18] + struct.pack("<H", 243) + content[20:])


def test_a_function_that_is_not_there_is_named(cortex):
    linked = ElfObject(cortex.emit_object(binding.parse_assembly(CALL)))
    with pytest.raises(GraphError, match="no function 'cod'"):
        linked.address("cod")
    with pytest.raises(GraphError, match="needs 'no_such_function', which this process does not have"):
        loader._library_address("no_such_function")


@pytest.mark.parametrize(("refused", "message"), [("mmap", "no memory for"), ("mprotect", "refuses executable memory")])
def test_a_system_that_refuses_memory_for_code_is_named(monkeypatch, refused, message):
    content = compiler.compile_object(lambda args, first, last: None, "nothing", 3)
    library = ctypes.CDLL(None, use_errno=True)
    setattr(library, refused, ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_long] * 5)(lambda *a: -1)
            if refused == "mmap" else ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_long, ctypes.c_int)(
                lambda *a: -1))  # fmt: skip
    monkeypatch.setattr(loader.ctypes, "CDLL", lambda *a, **b: library)
    with pytest.raises(GraphError, match=message):
        loader.load("nothing", content)


def test_a_relocation_that_is_not_known_is_named(cortex):
    content = cortex.emit_object(binding.parse_assembly(CALL))
    call, other = (struct.pack("<Q", kind)[:4] for kind in (283, 258))  # the low half of the entry's second word
    assert content.count(call) == 1
    with pytest.raises(GraphError, match="relocation 258 of machine 183 is not known"):
        ElfObject(content.replace(call, other)).link(CODE, lambda name: OUTSIDE)
