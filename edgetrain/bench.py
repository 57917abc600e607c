"""Timing training steps side by side: every contender in a process of its own, taking turns.

Thread pools that spin after their work slow down whoever shares the process with
them; so contenders never share one. In one run they take turns, with idle gaps, and
the median of many turns is compared. Ratios mean: the other's time over ours.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from edgetrain.bench_load import Load, Watch
from edgetrain.bench_process import Case, ContenderProcess, Timing
from edgetrain.errors import UnsupportedError, UsageError

__all__ = [
    "BATCH_SIZES", "CONTENDERS", "DEFAULT_CONTENDERS", "MODELS", "PEERS", "THREADS", "Case", "Comparison", "Timing",
    "against", "available", "compare", "decayed", "geometric_mean", "is_torch", "measure", "race", "ratio", "result_of",
    "scaling", "start_up", "time_ops",
]  # fmt: skip

# The models' own input shapes: 1x28x28, 3x32x32, 3x96x96, 1x49x10, 6x128.
MODELS = ("lenet5", "resnet20", "mobilenet_v1_0.25", "ds_cnn", "cnn1d")
BATCH_SIZES, THREADS = (1, 8, 32, 128), (1, 2)
DEFAULT_CONTENDERS = ("edgetrain", "torch", "torch-channels-last")
# Further contenders, each an extra of this package, named as the distribution that it installs.
PEERS = ("jax", "tinygrad", "mnn", "onert", "onnxruntime-training")
# Contender -> the package that it needs; "edgetrain" itself always takes part.
CONTENDERS = {
    "edgetrain": "edgetrain", "torch": "torch", "torch-channels-last": "torch", "jax": "jax", "tinygrad": "tinygrad",
    "mnn": "MNN", "onert": "onert", "onnxruntime-training": "onnxruntime.training",
}  # fmt: skip
TURNS = 15
# Idle between turns: longer than most thread pools spin (libgomp a few milliseconds).
_GAP_SECONDS = 0.05


@dataclass
class Comparison:
    """Timings of one case.

    Attributes:
        timings: one per contender that took part, in order.
        left_out: why a contender did not take part.
        load: what others took of the machine meanwhile; ``None`` where the system does not tell.
    """

    timings: list[Timing] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    load: Load | None = None

    def timing(self, contender: str) -> Timing | None:
        """Return one contender's timing, or ``None`` if it did not take part."""
        return next((timing for timing in self.timings if timing.contender == contender), None)


def available(contenders: Iterable[str] = DEFAULT_CONTENDERS) -> list[str]:
    """Return those contenders whose packages are installed; nothing is imported.

    Raises:
        UsageError: unknown contender.
    """
    wanted = list(contenders)
    for name in wanted:
        if name not in CONTENDERS:
            raise UsageError(f"contender '{name}' is unknown; expected one of {', '.join(CONTENDERS)}")
    return [name for name in wanted if _is_installed(CONTENDERS[name])]


def _is_installed(package: str) -> bool:
    """Return whether there is a package, or a folder of that name inside one: onnxruntime comes with it or without."""
    top, *inner = package.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not inner:
        return spec is not None
    return any(Path(place, *inner).is_dir() for place in spec.submodule_search_locations or ())


def compare(
    case: Case, contenders: Sequence[str] = DEFAULT_CONTENDERS, turns: int = TURNS, turn_seconds: float = 0.1
) -> Comparison:
    """Time all contenders in one case, taking turns.

    Args:
        case: what to time.
        contenders: names; one that lacks what the model needs is left out, edgetrain excepted.
        turns: how often each one has its turn, at least 1; a turn is one step at least.
        turn_seconds: steps are repeated within a turn for about so long.

    Raises:
        BenchmarkError: a contender died or did not answer.
        UsageError: a contender is unknown or not installed.
        UnsupportedError: edgetrain lacks what the model needs.
    """
    return race([(name, case) for name in contenders], turns, turn_seconds)


def race(entries: Sequence[tuple[str, Case]], turns: int = TURNS, turn_seconds: float = 0.1) -> Comparison:
    """Time contenders that each have a case of their own, taking turns; otherwise as ``compare``.

    Args:
        entries: (contender, case) each.
        turns, turn_seconds: as for ``compare``.

    Returns:
        The timings in the order of ``entries``, but for those that were left out.
    """
    result, watch = Comparison(), Watch()
    with ExitStack() as stack:
        processes = []
        for name, case in entries:
            try:
                processes.append(stack.enter_context(ContenderProcess(name, case)))
            except UnsupportedError as error:
                if name.startswith("edgetrain"):
                    raise
                result.left_out[name] = str(error)
        _take_turns(processes, turns, turn_seconds)
        result.timings = [process.finish() for process in processes]
    result.load = watch.load()  # only now are the contenders' own times known
    return result


def _take_turns(processes: Sequence[ContenderProcess], turns: int, turn_seconds: float) -> None:
    counts = [_warm_up(process, turn_seconds) for process in processes]
    for _ in range(turns):
        for process, count in zip(processes, counts, strict=True):
            time.sleep(_GAP_SECONDS)
            process.turn(count)


def _warm_up(process: ContenderProcess, turn_seconds: float) -> int:
    """Return how many steps a turn has, after two turns that do not count.

    By their median: SWAT chooses weights in every tenth of its first steps, and by the mean it had turns a quarter as
    long as others at batch 1, in which the first steps after a gap weigh more.
    """
    count = 1
    for _ in range(2):
        time.sleep(_GAP_SECONDS)
        count = max(1, round(turn_seconds / process.turn(count, keep=False)))
    return count


def measure(
    case: Case, contenders: Sequence[str] = DEFAULT_CONTENDERS, turns: int = TURNS, turn_seconds: float = 0.1
) -> dict[str, Any]:
    """Compare the contenders, with the machine's sgemm rate measured in the same run, and return plain data.

    The kernels are compiled before: what a compiler needs is no part of a step's memory.

    Args:
        case, contenders, turns, turn_seconds: as for ``compare``.

    Returns:
        See ``result_of``.

    Raises:
        BenchmarkError, UsageError, UnsupportedError: as ``compare``.
    """
    with ContenderProcess("edgetrain", case):
        pass
    return result_of(case, compare(case, [*contenders, "sgemm"], turns, turn_seconds))


def result_of(case: Case, comparison: Comparison) -> dict[str, Any]:
    """Return a comparison as plain data.

    Returns:
        ``model, batch_size, threads``; ``ratio`` (PyTorch's better time over ours, ``None`` without PyTorch) and
        ``best_torch``; ``memory_share`` (our peak over PyTorch's smaller one); ``sgemm {gflops, library}``;
        ``planned_bytes`` by purpose; ``contenders`` by name; ``left_out``; ``load`` and ``busy``. Seconds are per
        step, bytes are peak resident memory of a fresh process.
    """
    own, sgemm = comparison.timing("edgetrain"), comparison.timing("sgemm")
    timings = [timing for timing in comparison.timings if timing.contender != "sgemm"]
    torch = [timing for timing in timings if is_torch(timing.contender)]
    rate = _gflops(sgemm.facts["macs"], sgemm.median) if sgemm else None
    macs = own.facts["macs"] if own else None
    return {
        "model": case.model, "batch_size": case.batch_size, "threads": case.threads,
        "ratio": ratio(timings), "best_torch": min(torch, key=lambda t: t.median).contender if torch else None,
        "memory_share": own.resident_bytes / min(t.resident_bytes for t in torch) if own and torch else None,
        "sgemm": {"gflops": rate, "library": sgemm.facts["library"]} if sgemm else None,
        "planned_bytes": own.facts["planned_bytes"] if own else None,
        "contenders": {t.contender: _numbers(t, case.batch_size, macs, rate) for t in timings},
        "left_out": comparison.left_out, **_load_of(comparison),
    }  # fmt: skip


def _numbers(timing: Timing, batch_size: int, macs: int | None, rate: float | None) -> dict[str, Any]:
    """Return a contender's numbers; its rate counts the multiply-accumulates that edgetrain's step has."""
    gflops = _gflops(macs, timing.median) if macs else None
    return {
        "median_seconds": timing.median, "p95_seconds": timing.p95, "steps": len(timing.seconds),
        "images_per_second": batch_size / timing.median, "gflops": gflops,
        "sgemm_share": gflops / rate if gflops and rate else None, "resident_bytes": timing.resident_bytes,
        "first_step_seconds": timing.first_step_seconds,
    }  # fmt: skip


def _gflops(macs: int, seconds: float) -> float:
    return 2e-9 * macs / seconds


def is_torch(contender: str) -> bool:
    """Whether a contender is PyTorch in one of its memory formats."""
    return contender.partition("-")[0] == "torch"


def ratio(timings: Sequence[Timing]) -> float | None:
    """Return the median of PyTorch's better memory format over edgetrain's, or ``None`` if one is missing."""
    own = [timing.median for timing in timings if timing.contender == "edgetrain"]
    others = [timing.median for timing in timings if is_torch(timing.contender)]
    return min(others) / own[0] if own and others else None


def geometric_mean(numbers: Iterable[float]) -> float:
    """Return the geometric mean of positive numbers.

    Example:
        >>> geometric_mean([2.0, 8.0])
        4.0
    """
    logarithms = [math.log(number) for number in numbers]
    return round(math.exp(statistics.fmean(logarithms)), 12)


def start_up(case: Case, contenders: Sequence[str] = DEFAULT_CONTENDERS, repeats: int = 3) -> dict[str, Any]:
    """Measure the time from the start of a process to the end of its first training step.

    edgetrain starts once with an empty kernel cache in a folder of its own, then with the cache that this left.

    Args:
        case, contenders: as for ``compare``.
        repeats: warm starts, of which the median is taken.

    Returns:
        By contender ``{"warm_seconds", "cold_seconds"}``; only edgetrain has a cold start.

    Raises:
        BenchmarkError, UsageError: as ``compare``.
    """
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = {"NUMBA_CACHE_DIR": folder}
        for name in contenders:
            try:
                cold = _first_step(name, case, cache) if name == "edgetrain" else None
                warm = statistics.median(_first_step(name, case, cache) for _ in range(repeats))
            except UnsupportedError:
                if name == "edgetrain":
                    raise
                continue
            found[name] = {"warm_seconds": warm, "cold_seconds": cold}
    return found


def _first_step(contender: str, case: Case, environment: Mapping[str, str]) -> float:
    with ContenderProcess(contender, case, environment) as process:
        return process.timing.first_step_seconds


def scaling(model: str, batch_size: int, turns: int = TURNS, turn_seconds: float = 0.5) -> dict[str, Any]:
    """Compare edgetrain's step with 1 and with 2 threads, and the machine's sgemm likewise, in one run.

    Args:
        model, batch_size: what to time.
        turns, turn_seconds: as for ``compare``; turns are longer, since the rate of a long run is compared.

    Returns:
        ``gain`` and ``sgemm_gain`` (time with 1 thread over that with 2), ``seconds`` of the two steps, ``load``,
        ``busy``.

    Raises:
        BenchmarkError, UnsupportedError: as ``compare``.
    """
    cases = [Case(model, batch_size, threads) for threads in (1, 2)]
    comparison = race([(name, case) for name in ("edgetrain", "sgemm") for case in cases], turns, turn_seconds)
    one, two, sgemm_one, sgemm_two = (timing.median for timing in comparison.timings)
    return {"model": model, "batch_size": batch_size, "gain": one / two, "sgemm_gain": sgemm_one / sgemm_two,
            "seconds": [one, two], **_load_of(comparison)}  # fmt: skip


def decayed(case: Case, turns: int = TURNS, turn_seconds: float = 0.1) -> dict[str, Any]:
    """Compare a step on the usual weights with one on weights that have decayed to subnormal numbers (1e-40).

    Args:
        case, turns, turn_seconds: as for ``compare``.

    Returns:
        ``ratio`` (decayed over usual), ``seconds`` of both, ``load``, ``busy``; in both steps the weights are put
        back first, since an update writes zeros in the place of subnormal numbers.

    Raises:
        BenchmarkError, UnsupportedError: as ``compare``.
    """
    comparison = compare(case, ["edgetrain-restored", "edgetrain-decayed"], turns, turn_seconds)
    usual, faint = (timing.median for timing in comparison.timings)
    return {"model": case.model, "batch_size": case.batch_size, "threads": case.threads, "ratio": faint / usual,
            "seconds": [usual, faint], **_load_of(comparison)}  # fmt: skip


def against(peer: str, case: Case, turns: int = TURNS, turn_seconds: float = 0.1) -> dict[str, Any]:
    """Compare a step of edgetrain with one of a single other contender.

    Args:
        peer: the other contender.
        case, turns, turn_seconds: as for ``compare``.

    Returns:
        ``ratio`` (the peer's time over ours) and ``seconds`` (ours, the peer's), both ``None`` when it cannot train the
        model, and ``left_out`` says why then; ``load``, ``busy``.

    Raises:
        BenchmarkError, UsageError, UnsupportedError: as ``compare``.
    """
    with ContenderProcess("edgetrain", case):  # compiles the kernels
        pass
    comparison = compare(case, ["edgetrain", peer], turns, turn_seconds)
    seconds = [timing.median for timing in comparison.timings]
    took_part = len(seconds) == 2
    return {"peer": peer, "model": case.model, "batch_size": case.batch_size, "threads": case.threads,
            "ratio": seconds[1] / seconds[0] if took_part else None, "seconds": seconds if took_part else None,
            "left_out": comparison.left_out.get(peer), **_load_of(comparison)}  # fmt: skip


def _load_of(comparison: Comparison) -> dict[str, Any]:
    load = comparison.load
    return {"load": asdict(load) if load else None, "busy": bool(load and load.busy)}


def time_ops(case: Case, turns: int = TURNS) -> dict[str, Any]:
    """Time every node of edgetrain's training step, and the machine's sgemm rate in the same run.

    Args:
        case, turns: as for ``compare``.

    Returns:
        ``model, batch_size, threads, sgemm, load, busy`` as ``result_of``; ``ops``, a list of
        ``bench_ops.OpTiming.to_dict()`` with ``sgemm_share``; ``sum_seconds`` of all of them, ``step_seconds`` of the
        whole step, ``overhead_seconds`` that the time of each kernel call was reduced by.

    Raises:
        BenchmarkError, UsageError, UnsupportedError: as ``compare``.
    """
    comparison = compare(case, ["edgetrain-rows", "sgemm"], turns)
    rows, sgemm = comparison.timings
    rate = _gflops(sgemm.facts["macs"], sgemm.median)
    ops = [{**op, "sgemm_share": op["gflops"] and op["gflops"] / rate} for op in rows.facts["ops"]]
    return {
        "model": case.model, "batch_size": case.batch_size, "threads": case.threads,
        "sgemm": {"gflops": rate, "library": sgemm.facts["library"]}, **_load_of(comparison), **rows.facts, "ops": ops,
    }  # fmt: skip
