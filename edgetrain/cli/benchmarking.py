"""``bench``: training steps of edgetrain and of others side by side, and where edgetrain's time goes."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from edgetrain import bench
from edgetrain.bench_load import Watch
from edgetrain.cli.output import count, duration, emit, finite, mebibytes, table, write_line
from edgetrain.errors import UsageError
from edgetrain.files import file_meant, not_written, replace_file

Result = dict[str, Any]


def bench_command(
    models: Sequence[str], batch_sizes: Sequence[int], threads: Sequence[int], contenders: Sequence[str], *, turns: int,
    per_op: bool, start_up: bool, as_json: bool, out: Path | None,
) -> None:  # fmt: skip
    """Time every combination and print one document; progress goes to standard error.

    Args:
        models, batch_sizes, threads, contenders: those of ``bench`` where nothing is given.
        turns: times that every contender has its turn.
        per_op: time the nodes of edgetrain's steps instead, without contenders.
        start_up: time the first step of a process, too.
        as_json: print the document for machines.
        out: file that the document is written to as well.

    Raises:
        UsageError: more threads than processors, a contender that is not installed, or a file that cannot be written.
        BenchmarkError, UnsupportedError: as ``bench.compare``.
    """
    cores = len(os.sched_getaffinity(0))
    threads = threads or [number for number in bench.THREADS if number <= cores]
    if max(threads) > cores:
        raise UsageError(f"--threads is {max(threads)}, this machine has {count(cores, 'processor')}")
    if out is not None:
        _check_writable(out)
    cases = [
        bench.Case(model, batch_size, number)
        for model in models or bench.MODELS
        for batch_size in batch_sizes or bench.BATCH_SIZES
        for number in threads
    ]
    notes = _machine_notes()
    result = _per_op(cases, turns) if per_op else _compare(cases, _contenders(contenders, notes), turns, start_up)
    result["notes"] = notes
    emit(result, _text(result), as_json)  # first, whatever becomes of the file
    if out is not None:
        try:
            replace_file(out, (json.dumps(finite(result), indent=1) + "\n").encode())
        except OSError as error:
            raise UsageError(not_written(out, error)) from error


def _check_writable(file: Path) -> None:
    """Refuse a file that could not be written when all is timed; one that is there keeps its content until then.

    Raises:
        UsageError: it could not.
    """
    there = file.exists()
    try:
        file_meant(file).open("a").close()
    except OSError as error:
        raise UsageError(f"--out is '{file}', which cannot be written ({error.strerror}); choose another") from error
    if not there:
        file_meant(file).unlink()


def _contenders(given: Sequence[str], notes: list[str]) -> list[str]:
    """Return who takes part; of those not asked for by name, the installed ones."""
    wanted = list(dict.fromkeys(["edgetrain", *(given or bench.DEFAULT_CONTENDERS)]))
    found = bench.available(wanted)
    missing = [name for name in wanted if name not in found]
    if missing and given:
        raise UsageError(f"contender '{missing[0]}' needs the package '{bench.CONTENDERS[missing[0]]}', "
                         "which is not installed")  # fmt: skip
    if missing:
        notes.append("PyTorch is not installed: edgetrain is timed alone (for the comparison: pip install torch)")
        _say(notes[-1])
    return found


def _machine_notes() -> list[str]:
    """Watch the machine for a second; a busy one is told at once, not after an hour."""
    watch = Watch()
    time.sleep(1.0)
    load = watch.load()
    if load is None or not load.busy:
        return []
    names = f" ({', '.join(load.names)})" if load.names else ""
    note = f"this machine is busy: others use {load.others:.1f} cores{names}; do not trust these times"
    _say(note)
    return [note]


def _compare(cases: Sequence[bench.Case], contenders: Sequence[str], turns: int, start_up: bool) -> Result:
    results = _each(cases, lambda case: bench.measure(case, contenders, turns), _case_line)
    starts = {}
    # One start per model says it all: the same kernels are compiled whatever the number of threads.
    for case in {case.model: case for case in cases}.values() if start_up else ():
        _say(f"start-up of {case}: with an empty kernel cache, then with a full one")
        sizes = {"batch_size": case.batch_size, "threads": case.threads}
        starts[case.model] = {**sizes, **bench.start_up(case, contenders)}
    ratios = [result["ratio"] for result in results if result["ratio"]]
    mean = bench.geometric_mean(ratios) if ratios else None
    return {"cases": results, "start_up": starts, "geometric_mean_ratio": mean}


def _per_op(cases: Sequence[bench.Case], turns: int) -> Result:
    def describe(result: Result) -> str:
        return _milliseconds(result["step_seconds"])

    return {"per_op": _each(cases, lambda case: bench.time_ops(case, turns), describe)}


def _each(
    cases: Sequence[bench.Case], work: Callable[[bench.Case], Result], describe: Callable[[Result], str]
) -> list[Result]:
    results = []
    for number, case in enumerate(cases, 1):
        start = time.perf_counter()
        results.append(work(case))
        busy = ", machine busy" if results[-1]["busy"] else ""
        _say(f"[{number}/{len(cases)}] {case}: {describe(results[-1])}{busy} ({duration(time.perf_counter() - start)})")
    return results


def _say(text: str) -> None:
    write_line(text, sys.stderr)


def _case_line(result: Result) -> str:
    own = _milliseconds(result["contenders"]["edgetrain"]["median_seconds"])
    return own if result["ratio"] is None else f"{own}, {result['ratio']:.2f} times as fast as PyTorch"


# --- text ---


def _text(result: Result) -> str:
    if "per_op" in result:
        return "\n\n".join(_ops_text(entry) for entry in result["per_op"])
    parts = [_cases_text(result["cases"])]
    if result["geometric_mean_ratio"] is not None:
        parts.append(f"geometric mean of the ratios: {result['geometric_mean_ratio']:.2f}")
    parts += [_start_text(model, start) for model, start in result["start_up"].items()]
    reasons = {f"{name}: {why}" for case in result["cases"] for name, why in case["left_out"].items()}
    return "\n".join([*parts, *(f"left out {reason}" for reason in sorted(reasons)), *result["notes"]])


def _cases_text(cases: Sequence[Result]) -> str:
    rows = [("model", "batch", "threads", "contender", "ms/step", "images/s", "GFLOP/s", "of sgemm", "peak memory",
             "planned", "first step", "slower by")]  # fmt: skip
    for case in cases:
        own = case["contenders"]["edgetrain"]["median_seconds"]
        for name, numbers in case["contenders"].items():
            planned = mebibytes(sum(case["planned_bytes"].values())) if name == "edgetrain" else ""
            rows.append((
                case["model"], str(case["batch_size"]), str(case["threads"]), name,
                f"{1e3 * numbers['median_seconds']:.3f}", f"{numbers['images_per_second']:,.0f}",
                f"{numbers['gflops']:.1f}", f"{numbers['sgemm_share']:.0%}", mebibytes(numbers["resident_bytes"]),
                planned, f"{numbers['first_step_seconds']:.2f} s", f"{numbers['median_seconds'] / own:.2f}",
            ))  # fmt: skip
    return table(rows)


def _start_text(model: str, start: Result) -> str:
    words = [
        f"{name} {times['warm_seconds']:.2f} s"
        + (f" ({times['cold_seconds']:.2f} s with an empty kernel cache)" if times["cold_seconds"] else "")
        for name, times in start.items()
        if isinstance(times, dict)
    ]
    return f"{model}, batch {start['batch_size']}, from process start to first step: {', '.join(words)}"


def _ops_text(result: Result) -> str:
    total = max(result["sum_seconds"], 1e-12)
    heads = ("node", "operator", "sizes", "us", "share", "GFLOP/s", "of sgemm", "GB/s")
    rows = [
        (op["name"], op["op_type"], op["shape"], f"{1e6 * op['seconds']:.1f}", f"{op['seconds'] / total:.1%}",
         _number(op["gflops"]), "" if op["sgemm_share"] is None else f"{op['sgemm_share']:.0%}",
         _number(op["gigabytes_per_second"]))
        for op in result["ops"]
    ]  # fmt: skip
    head = f"{result['model']}, batch {result['batch_size']}, {count(result['threads'], 'thread')}"
    foot = (
        f"sum of the nodes {_milliseconds(result['sum_seconds'])}, whole step {_milliseconds(result['step_seconds'])}; "
        f"{1e6 * result['overhead_seconds']:.2f} us of timing per kernel call are taken off; "
        f"sgemm {result['sgemm']['gflops']:.1f} GFLOP/s ({result['sgemm']['library']})"
    )
    return "\n".join([head, table([heads, *rows]), foot, *["machine busy: do not trust these times"] * result["busy"]])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.3f} ms"
