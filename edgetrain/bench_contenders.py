"""The contenders, each inside a process of its own: what they compute, and how they answer.

``bench_process.py`` is the other end and describes the protocol.
"""

from __future__ import annotations

import json
import os
import queue
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from edgetrain.bench_process import Case
from edgetrain.errors import EdgetrainError, UsageError
from edgetrain.graph import Graph

_SGEMM_SIZE = 512
_DECAYED = 1e-40  # subnormal in float32


class Step(Protocol):
    """What a contender is: calling it takes one training step."""

    def __call__(self) -> Any:
        """Take one step, and return when it is finished."""

    def facts(self) -> dict[str, Any]:
        """Return JSON-able facts, known after the steps."""


def batch_for(shape: Sequence[int], classes: int, count: int) -> tuple[Any, Any]:
    """Return a seeded random batch: float32 ``(count, *shape)`` and int64 ``(count,)``."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, *shape)).astype(np.float32), rng.integers(0, classes, count)


class SgemmStep:
    """A product of two square matrices by NumPy's BLAS: the rate that this machine reaches."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._a, self._b = rng.standard_normal((2, _SGEMM_SIZE, _SGEMM_SIZE)).astype(np.float32)
        self._out = np.empty_like(self._a)

    def __call__(self) -> Any:
        """Multiply."""
        return np.matmul(self._a, self._b, out=self._out)

    def facts(self) -> dict[str, Any]:
        """Return multiply-accumulates per step, and the library."""
        found: Any = np.show_config(mode="dicts")
        blas = found.get("Build Dependencies", {}).get("blas", {})
        return {"macs": _SGEMM_SIZE**3, "library": f"NumPy, {blas.get('name')} {blas.get('version')}"}


def _own(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    from edgetrain.bench_ops import OwnStep

    return OwnStep(graph, case, x, y)


def _rows(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    from edgetrain.bench_ops import RowsStep

    return RowsStep(graph, case, x, y)


def _restored(graph: Graph, case: Case, x: Any, y: Any, decayed: float | None = None) -> Step:
    from edgetrain.bench_ops import RestoredStep

    return RestoredStep(graph, case, x, y, decayed)


def _decayed(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    return _restored(graph, case, x, y, _DECAYED)


def _torch(graph: Graph, case: Case, x: Any, y: Any, channels_last: bool = False) -> Step:
    from edgetrain.bench_torch import TorchStep, import_torch

    import_torch().set_num_threads(case.threads)
    return TorchStep(graph, x, y, channels_last=channels_last)


def _torch_channels_last(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    return _torch(graph, case, x, y, channels_last=True)


def _jax(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    from edgetrain.bench_jax import JaxStep

    return JaxStep(graph, x, y, threads=case.threads)


def _tinygrad(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    from edgetrain.bench_tinygrad import TinygradStep

    return TinygradStep(graph, x, y, threads=case.threads)


def _mnn(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    from edgetrain.bench_mnn import MnnStep

    return MnnStep(graph, x, y, threads=case.threads)


def _onnxruntime(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    from edgetrain.bench_onnxruntime import OnnxruntimeStep

    return OnnxruntimeStep(graph, x, y, threads=case.threads)


def _onert(graph: Graph, case: Case, x: Any, y: Any) -> Step:
    from edgetrain.bench_onert import OnertStep

    return OnertStep(graph, x, y, threads=case.threads)


Maker = Callable[[Graph, Case, Any, Any], Step]
_MAKERS: dict[str, Maker] = {
    "edgetrain": _own, "edgetrain-rows": _rows, "edgetrain-restored": _restored, "edgetrain-decayed": _decayed,
    "torch": _torch, "torch-channels-last": _torch_channels_last, "jax": _jax, "tinygrad": _tinygrad,
    "mnn": _mnn, "onert": _onert, "onnxruntime-training": _onnxruntime,
}  # fmt: skip


def make_step(contender: str, case: Case) -> Step:
    """Return a contender, ready for its first step.

    Raises:
        UsageError: unknown contender, or its framework is not installed.
        UnsupportedError: the contender lacks something that the model needs.
    """
    from edgetrain.catalog import build_model

    if contender == "sgemm":
        return SgemmStep()
    if contender not in _MAKERS:
        raise UsageError(f"contender '{contender}' is unknown; expected one of {', '.join([*_MAKERS, 'sgemm'])}")
    graph = build_model(case.model, input_shape=case.input_shape)
    x, y = batch_for(graph.input_shape, graph.num_classes, case.batch_size)
    return _MAKERS[contender](graph, case, x, y)


def serve() -> None:
    """Be a contender: answer orders on standard input until it ends."""
    answers = _claim_output()
    orders = _orders()
    try:
        step = _first_step(next(orders))
    except EdgetrainError as error:
        _answer(answers, {"error": str(error), "kind": type(error).__name__})
        return
    _answer(answers, {"ready": True})
    for order in orders:
        if "facts" in order:
            _answer(answers, {"facts": step.facts()})
        else:
            seconds = [_timed(step) for _ in range(order["steps"])]
            _answer(answers, {"seconds": seconds, "resident_bytes": peak_resident()})


def _first_step(order: dict[str, Any]) -> Step:
    step = make_step(order["contender"], Case(**order["case"]))
    step()
    return step


def _claim_output() -> TextIO:
    """Keep standard output for answers alone; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def _orders() -> Iterator[dict[str, Any]]:
    """Yield orders. When the parent has gone, the process ends at once, in the middle of a step too."""
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    while True:
        yield json.loads(lines.get())


def _timed(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def peak_resident() -> int:
    """Return the peak resident memory of this process in bytes.

    Not ``ru_maxrss`` where it can be helped: Linux starts that with the peak of the parent that forked us.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _answer(stream: TextIO, message: dict[str, Any]) -> None:
    stream.write(json.dumps(message) + "\n")
    stream.flush()
