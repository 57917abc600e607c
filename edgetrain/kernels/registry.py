"""The table of kernels: each compiled, cached and loaded on its own, when a plan first needs it.

Numba and the modules that hold the kernels are imported only to compile (see ``cache``).

A kernel is a *factory*: called with compile-time sizes (lanes, tile sizes) it
returns the function to compile. All compiled kernels have one signature,
``(address of int64 arguments, first job, last job)``, so a plan is a table of
addresses. A job is the unit that threads share; two jobs never write the same
memory, so results do not depend on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from edgetrain.errors import GraphError
from edgetrain.forking import ForkLock
from edgetrain.kernels import cache
from edgetrain.kernels.loader import load

Body = Callable[[int, int, int], None]
_Call = Callable[[int, int, int, int, int], int]
Factory = Callable[..., Body]
KernelKey = tuple[str, tuple[int, ...]]  # name, compile-time sizes

# Called with (kernel name, number of this kernel, number of kernels wanted) before a kernel is compiled;
# not called for kernels that come from the cache on disk.
on_compile: list[Callable[[str, int, int], None]] = []

_MODULES = (
    "bits", "channels", "clock", "csr", "dense", "element_lists", "elementwise", "error_lists", "layout", "loss",
    "normalization", "pooled_errors", "pooling", "pruned", "random", "sparse_storage", "stochastic", "update",
    "vector_lists", "winograd",
)  # fmt: skip
_FACTORIES: dict[str, tuple[Factory, tuple[str, ...]]] = {}
_ADDRESSES: dict[KernelKey, int] = {}
_LOCK = ForkLock()
_compiling = threading.local()  # the seconds that a thread has waited for compilers
_NAMES = "arguments.json"  # the kernels' arguments, in the cache beside the kernels


def kernel(*arguments: str) -> Callable[[Factory], Factory]:
    """Decorator: enter a kernel factory under its own name, with the names of its arguments in order.

    A name that starts with ``f_`` is a float32, all others are int64 (addresses and sizes).

    Raises:
        GraphError: the name is taken.
    """

    def enter(factory: Factory) -> Factory:
        name = factory.__name__
        if name in _FACTORIES:
            raise GraphError(f"kernel '{name}' is registered twice")
        _FACTORIES[name] = (factory, arguments)
        return factory

    return enter


def argument_names(name: str) -> tuple[str, ...]:
    """Return the names of a kernel's arguments, in order.

    Raises:
        GraphError: unknown kernel.
    """
    names = _cached_names()
    if name not in names:
        names = {known: arguments for known, (_, arguments) in load_factories().items()}
    if name not in names:
        raise GraphError(f"unknown kernel '{name}'; known: {', '.join(sorted(names))}")
    return names[name]


def compile_kernels(wanted: list[KernelKey]) -> dict[KernelKey, int]:
    """Return the address of every wanted kernel, compiling what is missing."""
    for number, key in enumerate(wanted, 1):
        with _standing_clock(), _LOCK:  # for one kernel, so that a fork need not wait for all
            if key not in _ADDRESSES:
                _ADDRESSES[key] = _kernel_address(key, number, len(wanted))
    return {key: _ADDRESSES[key] for key in wanted}


@functools.cache
def interpreter() -> tuple[_Call, _Call]:
    """Return ``program.lead`` and ``program.follow`` compiled; other Python threads run while they do."""
    functions = []
    for name, parameters in (("lead", 5), ("follow", 5)):
        key = (name, ())
        # Another thread may be compiling it, and the lock waits for that: 0.3 s, where a step takes 0.02.
        with _standing_clock(), _LOCK:
            if key not in _ADDRESSES:
                _ADDRESSES[key] = _interpreter_address(name, parameters)
        functions.append(ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * parameters)(_ADDRESSES[key]))
    return functions[0], functions[1]


def _kernel_address(key: KernelKey, number: int, total: int) -> int:
    """Load one kernel, after compiling it if it is not in the cache."""
    label = "x".join([key[0], *map(str, key[1])])
    symbol = f"edgetrain_{label}"
    content = cache.read(cache.file_name(label))
    if content is None:
        for callback in on_compile:
            callback(label, number, total)
        from edgetrain.kernels.compiler import compile_object

        content = compile_object(load_factories()[key[0]][0](*key[1]), symbol, 3)
        cache.write(cache.file_name(label), content)
    return load(symbol, content)


def working_clock() -> float:
    """Return the seconds of a clock that stands still while this thread waits for compilers: steps are timed with it.

    ``Learner.prepare`` compiles beforehand what can be foreseen; an odd number of samples may still need a kernel.
    """
    return time.perf_counter() - getattr(_compiling, "seconds", 0.0)


@contextmanager
def _standing_clock() -> Iterator[None]:
    """Stop ``working_clock`` of this thread meanwhile; may be nested."""
    before, start = getattr(_compiling, "seconds", 0.0), time.perf_counter()
    try:
        yield
    finally:
        _compiling.seconds = before + time.perf_counter() - start


def _interpreter_address(function: str, parameters: int) -> int:
    name, symbol = cache.file_name(function), f"edgetrain_{function}"
    content = cache.read(name)
    if content is None:
        from numba import types

        from edgetrain.kernels import program
        from edgetrain.kernels.compiler import compile_object

        content = compile_object(getattr(program, function), symbol, parameters, types.int64)
        cache.write(name, content)
    return load(symbol, content)


@functools.cache
def _cached_names() -> dict[str, tuple[str, ...]]:
    """Return the arguments of all kernels as the cache has them; they change only with its fingerprint."""
    content = cache.read(_NAMES)
    return {} if content is None else {name: tuple(names) for name, names in json.loads(content).items()}


@functools.cache
def load_factories() -> dict[str, tuple[Factory, tuple[str, ...]]]:
    """Import the modules of the kernels, and return factories and argument names by kernel.

    The names are kept in the cache, for processes that do not need the factories.
    """
    with _standing_clock():
        for module in _MODULES:
            importlib.import_module(f"edgetrain.kernels.{module}")
    if cache.read(_NAMES) is None:
        names = {name: arguments for name, (_, arguments) in _FACTORIES.items()}
        cache.write(_NAMES, json.dumps(names).encode())
    return _FACTORIES
