"""Results as text for people or as one JSON document for machines; small conversions of flags.

The keys of the JSON documents are part of the interface; later versions may add keys, and rename none.

- fit, resume: run, model, data, profile, timed_on, epochs, validated_on, loss, accuracy, best_epoch, best_accuracy,
  seconds, whole_seconds, images_per_second, memory_mib, files {model, last, best}, savings; with sparsity: layers [of
  layer_report.LayerUse.to_dict], topology {changes, seconds}
- savings: of the columns of metrics.csv instances_* and macs_* and saved_*, instances_waiting, share_done, shares
  {saved_*}, seconds, whole_seconds, dense {seconds, how; of a baseline: accuracy, whole_seconds, run; of a run that is
  dense: itself}, time_saved; dense.seconds and time_saved are null where dense training cannot be timed, or nothing was
  trained on
- fit --stream: run, model, data, profile, timed_on, instances, instances_waiting, mode, running_accuracy,
  recent_accuracy, loss, accuracy, seconds, whole_seconds, steps, batch_size, images_per_second, memory_mib, savings,
  filter {of eif: threshold, filter_share}, files; with sparsity: layers, topology
- evaluate: model, data, images, loss, accuracy
- predict: model, data, predictions [{index, label, class, probability, of an image file: file}]
- export: from, model, bytes
- plan: model, batch_size, methods {filter, sparsity, error_pruning}, parts {name: bytes}, notes {name: text},
  peak_bytes, budget_bytes, fits
- verify: model, passed, steps, batch_size, seed, notes, rows [{quantity, error, tolerance, ok}]
- bench: cases [of bench.result_of], start_up {model: {contender: {warm_seconds, cold_seconds}}}, geometric_mean_ratio,
  notes; with --per-op: per_op [of bench.time_ops], notes
- report: run, status, config, environment, epochs [columns of metrics.csv], best, seconds, whole_seconds,
  account {of a finished run: savings, perhaps layers and topology}, lacks, operations {instances_*, macs_*, saved_*},
  files {name: bytes}; best is null of a stream, lacks is "account" or "baseline" where a finished run was cut off
- doctor: edgetrain, host, cache {folder, writable, kernels}, calibration {file, state, products, replaced},
  disk_free_mib, healthy, advice; with --kernels: profile, batch_size, calibration, models {name: [of
  kernel_table.KernelUse.to_dict]}; with --calibrate: profile, batch_size, models, products, replaced [{product, rule,
  tile, gain}], seconds, file, busy
- warmup: profile, kernels, compiled, seconds, cache {folder, writable, kernels}
- profiles list: profiles [{name, description}]; profiles show: the profile; version: version

A number that is not finite is null, and so is whole_seconds where an earlier version did not note it. With an exit code
other than 0, 1 or 4 standard output is empty.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

import typer

from edgetrain.errors import UsageError
from edgetrain.units import MIB


def emit(result: dict[str, Any], text: str, as_json: bool) -> None:
    """Print a result on standard output."""
    write_line(json.dumps(finite(result), indent=2) if as_json else text, sys.stdout)


def write_line(text: str, stream: TextIO) -> None:
    """Write a line at once; if nobody reads the stream any more, this line and all later ones are lost.

    Raises:
        OSError: it cannot be written for another reason; ``progress.Unfailing`` is for what may be lost then, too.
    """
    try:
        typer.echo(text, file=stream)
    except BrokenPipeError:  # as of ``| head -1``
        silence(stream)


def silence(stream: TextIO) -> None:
    """Lose what is written from now on; not the stream but its descriptor, for lines are still in its buffer."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def finite(value: Any) -> Any:
    """Return JSON-able data with ``None`` in place of NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(rows: Iterable[Sequence[str]]) -> str:
    """Return aligned columns: the first left, the others right.

    Example:
        >>> print(table([("weights", "12"), ("peak", "345")]))
        weights   12
        peak     345
    """
    cells = list(rows)
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    lines = (
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                  for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    )  # fmt: skip
    return "\n".join(line.rstrip() for line in lines)


def parse_sizes(text: str, what: str, counts: Sequence[int]) -> tuple[int, ...]:
    """Return the sizes in a text such as "1x28x28".

    Args:
        text: whole numbers with "x" or "," between them.
        what: names the flag in the error.
        counts: how many numbers are accepted.

    Raises:
        UsageError: not such a text.

    Example:
        >>> parse_sizes("1x28x28", "--input-shape", (2, 3))
        (1, 28, 28)
    """
    parts = text.lower().replace(",", "x").split("x")
    if len(parts) not in counts or not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        example = "x".join(["1", "28", "28"][-max(counts) :])
        raise UsageError(f"{what} is '{text}', expected sizes such as {example}")
    return tuple(int(part) for part in parts)


def mebibytes(count: float) -> str:
    """Return a number of bytes in MiB.

    Example:
        >>> mebibytes(1 << 20)
        '1.00 MiB'
    """
    return f"{count / MIB:,.2f} MiB"


def count(number: int, thing: str) -> str:
    """Return a number of things.

    Example:
        >>> count(1, "epoch"), count(2000, "epoch")
        ('1 epoch', '2,000 epochs')
    """
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def duration(seconds: float) -> str:
    """Return a time span.

    Example:
        >>> duration(3), duration(75), duration(3700)
        ('3.0 s', '1 min 15 s', '1 h 01 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
