"""Timing training steps side by side: every contender in a process of its own, taking turns.

Thread pools that spin after their work slow down whoever shares the process with
them; so contenders never share one. In one run they take turns, with idle gaps, and
the median of many turns is compared. Ratios mean: the other's time over ours.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from edgetrain.errors import UsageError

CONTENDERS = ("edgetrain", "torch", "torch-channels-last")
_GAP_SECONDS = 0.02  # idle between turns: longer than a thread pool spins


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        model: a name that ``catalog.build_model`` knows.
        batch_size: samples per step.
        threads: of every contender.
        input_shape: without the batch dimension; the model's default if ``None``.
    """

    model: str
    batch_size: int
    threads: int
    input_shape: tuple[int, ...] | None = None


@dataclass
class Timing:
    """What one contender did in one case.

    Attributes:
        seconds: of every timed step.
        first_step_seconds: from the start of the process to the end of the first step.
        resident_bytes: peak resident memory of the process.
        facts: more that the contender tells of itself (planned bytes, multiply-accumulates).
    """

    contender: str
    seconds: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0
    resident_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return {**asdict(self), "median_seconds": self.median}


def batch_for(shape: Sequence[int], classes: int, count: int) -> tuple[Any, Any]:
    """Return a seeded random batch: float32 ``(count, *shape)`` and int64 ``(count,)``."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((count, *shape)).astype(np.float32), rng.integers(0, classes, count)


# --- inside a contender's process ---


def make_step(contender: str, case: Case) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Return a function that takes one training step, and facts about it.

    Raises:
        UsageError: unknown contender, or its framework is not installed.
    """
    from edgetrain.catalog import build_model

    graph = build_model(case.model, input_shape=case.input_shape)
    x, y = batch_for(graph.input_shape, graph.output_shape[0], case.batch_size)
    if contender == "edgetrain":
        return _own_step(graph, case, x, y)
    if contender not in CONTENDERS:
        raise UsageError(f"contender '{contender}' is unknown; expected one of {', '.join(CONTENDERS)}")
    from edgetrain.bench_torch import TorchStep, import_torch

    import_torch().set_num_threads(case.threads)
    return TorchStep(graph, x, y, channels_last=contender.endswith("channels-last")), {}


def _own_step(graph: Any, case: Case, x: Any, y: Any) -> tuple[Callable[[], Any], dict[str, Any]]:
    from edgetrain.learner import Learner
    from edgetrain.optim import SGD

    learner = Learner(
        graph, batch_size=case.batch_size, threads=case.threads, memory_budget=0, optimizer=SGD(lr=0.01, momentum=0.9)
    )
    learner.partial_fit(x, y)
    facts = {"macs": learner.partial_fit(x, y).macs_done, "planned_bytes": learner.memory_plan().parts}
    return lambda: learner.partial_fit(x, y), facts


def serve() -> None:
    """Be a contender: read a case, then counts of steps to take, one JSON line each; answer with seconds."""
    start = time.time() - float(sys.argv[2])
    order = json.loads(sys.stdin.readline())
    case = Case(**order["case"])
    step, facts = make_step(order["contender"], case)
    step()
    _answer({"first_step_seconds": time.time() - float(sys.argv[2]), "spawn_seconds": start, "facts": facts})
    for line in sys.stdin:
        _answer({"seconds": [_timed(step) for _ in range(int(line))], "resident_bytes": _peak_resident()})


def _timed(step: Callable[[], Any]) -> float:
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def _peak_resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _answer(message: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


# --- in the parent ---


class _Process:
    """A contender's process."""

    def __init__(self, contender: str, case: Case) -> None:
        threads = str(case.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        command = [sys.executable, "-c", "from edgetrain.bench import serve; serve()", contender, repr(time.time())]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.timing = Timing(contender)
        ready = self._ask(json.dumps({"contender": contender, "case": asdict(case)}))
        self.timing.first_step_seconds, self.timing.facts = ready["first_step_seconds"], ready["facts"]

    def turn(self, steps: int, keep: bool = True) -> float:
        """Let the contender take some steps; return their total seconds."""
        answer = self._ask(str(steps))
        if keep:
            self.timing.seconds += answer["seconds"]
        self.timing.resident_bytes = answer["resident_bytes"]
        return float(sum(answer["seconds"]))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def _ask(self, line: str) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise UsageError(f"the benchmark's contender '{self.timing.contender}' ended early; see its message above")
        return json.loads(answer)


def compare(
    case: Case, contenders: Sequence[str] = CONTENDERS, turns: int = 15, turn_seconds: float = 0.1
) -> list[Timing]:
    """Time all contenders in one case, taking turns.

    Args:
        case: what to time.
        contenders: of ``CONTENDERS``.
        turns: how often each one has its turn; a turn is one step at least.
        turn_seconds: steps are repeated within a turn for about so long.

    Returns:
        One timing per contender, in order.
    """
    processes = [_Process(contender, case) for contender in contenders]
    try:
        steps = [max(1, round(turn_seconds / process.turn(2, keep=False) * 2)) for process in processes]
        for _ in range(turns):
            for process, count in zip(processes, steps, strict=True):
                time.sleep(_GAP_SECONDS)
                process.turn(count)
    finally:
        for process in processes:
            process.close()
    return [process.timing for process in processes]


def ratio(timings: Sequence[Timing]) -> float:
    """Return the best other contender's median over edgetrain's."""
    own = next(t.median for t in timings if t.contender == "edgetrain")
    return min(t.median for t in timings if t.contender != "edgetrain") / own
