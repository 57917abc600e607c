"""From a Python function to an ELF object that stands alone; the one place that talks to Numba's compiler.

Relied on, in Numba 0.60 to 0.68: ``compiler.compile_extra`` and its flags; ``get_function_type`` and ``call_function``
of the calling convention; a code library's ``get_llvm_str``, and that linking to a library completes it. What Numba
compiles has a calling convention of its own (a status as result, places for the result and for an exception), so
each object gets a wrapper with that of C. Kernels raise nothing, so the status is not looked at.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba.core import compiler as numba_compiler
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock
from numba.core.registry import cpu_target

from edgetrain.errors import GraphError

# What an object may need from the process: Python itself is linked with libc and libm.
LIBRARY_FUNCTIONS = frozenset(
    {"clock_gettime", "exp", "expf", "log", "logf", "sqrt", "sqrtf", "memcpy", "memset", "sched_yield"}
)
compiler: Any = numba_compiler  # its flags are descriptors, which it does not type
_I64 = ir.IntType(64)


def compile_object(function: Callable[..., Any], symbol: str, parameters: int, result: Any = types.void) -> bytes:
    """Compile a function of int64 numbers to an ELF object with the C function ``symbol``.

    Raises:
        GraphError: compilation is switched off, or the code needs more than the C library.
    """
    if os.environ.get("NUMBA_DISABLE_JIT", "0") != "0":
        raise GraphError("NUMBA_DISABLE_JIT is set, but kernels run compiled only; unset it")
    with global_compiler_lock:
        module = _compile(function, symbol, parameters, result)
    _isolate(module, symbol)
    return bytes(_target_machine().emit_object(module))


@functools.cache
def _target_machine() -> Any:
    """Return LLVM's description of this machine; code that can lie anywhere, its parts near each other (``loader``)."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(
        cpu=binding.get_host_cpu_name(), features=binding.get_host_cpu_features().flatten(), opt=3, reloc="pic",
        codemodel="small",
    )  # fmt: skip


def _compile(function: Callable[..., Any], symbol: str, parameters: int, result: Any) -> Any:
    typing, target = cpu_target.typing_context, cpu_target.target_context
    typing.refresh()
    target.refresh()
    flags = compiler.Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.no_compile = True  # machine code is made below, once
    flags.error_model = "numpy"  # a ZeroDivisionError must not leave a compiled thread while others wait for it
    done = compiler.compile_extra(typing, target, function, (types.int64,) * parameters, result, flags, {})
    target.codegen().create_library(symbol).add_linking_library(done.library)  # links and optimises done.library
    module = binding.parse_assembly(done.library.get_llvm_str())
    module.link_in(binding.parse_assembly(_wrapper(target, done.fndesc, symbol)))
    return module


def _wrapper(target: Any, description: Any, symbol: str) -> str:
    """Return LLVM code of a C function that calls Numba's."""
    module, convention = ir.Module(symbol), target.call_conv
    kind = convention.get_function_type(description.restype, description.argtypes)
    callee = ir.Function(module, kind, description.llvm_func_name)
    nothing = description.restype == types.void
    signature = ir.FunctionType(ir.VoidType() if nothing else _I64, [_I64] * len(description.argtypes))
    wrapper = ir.Function(module, signature, symbol)
    builder = ir.IRBuilder(wrapper.append_basic_block())
    _, value = convention.call_function(builder, callee, description.restype, description.argtypes, wrapper.args)
    if nothing:
        builder.ret_void()
    else:
        builder.ret(value)
    return str(module)


def _isolate(module: Any, symbol: str) -> None:
    """Hide every name but one: Numba numbers its names per process, so equal names may mean different code."""
    for value in (*module.functions, *module.global_variables):
        if not value.is_declaration:
            if value.name != symbol:
                value.linkage = "internal"
        elif not value.name.startswith("llvm.") and value.name not in LIBRARY_FUNCTIONS:
            raise GraphError(f"compiled code of '{symbol}' needs '{value.name}', which is not in the C library")
