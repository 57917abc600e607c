"""The table of kernels: each compiled, cached and loaded on its own, when a plan first needs it.

A kernel is a *factory*: called with compile-time sizes (lanes, tile sizes) it
returns the function to compile. All compiled kernels have one signature,
``(address of int64 arguments, first job, last job)``, so a plan is a table of
addresses. A job is the unit that threads share; two jobs never write the same
memory, so results do not depend on the number of threads.
"""

from __future__ import annotations

import functools
import importlib
import threading
from collections.abc import Callable
from typing import Any

from edgetrain.errors import GraphError

Body = Callable[[int, int, int], None]
Factory = Callable[..., Body]

# Called with (kernel name, number of this kernel, number of kernels wanted) before a kernel is compiled;
# not called for kernels that come from the cache on disk.
on_compile: list[Callable[[str, int, int], None]] = []

_MODULES = ("channels", "dense", "elementwise", "layout", "loss", "normalization", "pooling", "random", "update")
_FACTORIES: dict[str, tuple[Factory, tuple[str, ...]]] = {}
_COMPILED: dict[tuple[str, tuple[int, ...]], Any] = {}
_LOCK = threading.Lock()


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
    _load()
    if name not in _FACTORIES:
        raise GraphError(f"unknown kernel '{name}'; known: {', '.join(sorted(_FACTORIES))}")
    return _FACTORIES[name][1]


def compile_kernels(wanted: list[tuple[str, tuple[int, ...]]]) -> dict[tuple[str, tuple[int, ...]], int]:
    """Return the address of every wanted ``(name, compile-time sizes)``, compiling what is missing."""
    _load()
    with _LOCK:
        for number, key in enumerate(wanted, 1):
            if key not in _COMPILED:
                _COMPILED[key] = _compile(key, number, len(wanted))
        return {key: int(_COMPILED[key].address) for key in wanted}


def _compile(key: tuple[str, tuple[int, ...]], number: int, total: int) -> Any:
    """Compile one kernel, or load it from the cache; Numba finds the folder (``NUMBA_CACHE_DIR`` first)."""
    from numba import types
    from numba.core import ccallback

    base: Any = ccallback.CFunc

    class AnnouncedCFunc(base):  # type: ignore[misc]  # numba describes CFunc as a plain function
        def _compile_uncached(self) -> Any:
            label = "x".join([key[0], *map(str, key[1])])
            for callback in on_compile:
                callback(label, number, total)
            return super()._compile_uncached()

    signature = ((types.int64, types.int64, types.int64), types.void)
    # error_model: a ZeroDivisionError must not leave a compiled thread while the others wait for it.
    compiled = AnnouncedCFunc(_FACTORIES[key[0]][0](*key[1]), signature, {}, {"error_model": "numpy"})
    compiled.enable_caching()
    compiled.compile()
    return compiled


@functools.cache
def _load() -> None:
    """Import the kernel modules; they enter their factories."""
    for module in _MODULES:
        importlib.import_module(f"edgetrain.kernels.{module}")
