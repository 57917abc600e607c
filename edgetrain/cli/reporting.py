"""``report``: what a run folder tells."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgetrain.cli.output import emit, table
from edgetrain.cli.plotting import plot_runs
from edgetrain.cli.savings import account_text, times_text
from edgetrain.history import COUNTED
from edgetrain.runs import Run, open_run

_COLUMNS = (("epoch", "epoch"), ("loss", "loss"), ("accuracy", "accuracy"), ("validation_loss", "val. loss"),
            ("validation_accuracy", "val. acc."), ("lr", "lr"), ("images_per_second", "images/s"))  # fmt: skip


def report_command(path: Path, *, as_json: bool, plot: bool = False, against: Sequence[Path] = ()) -> None:
    """Print settings, epochs and files of a run; draw it beside its baseline and the runs of ``against``.

    Raises:
        UsageError: a folder is no run, or nothing can be drawn.
    """
    run = open_run(path)
    if plot or against:
        plot_runs(run, [*map(open_run, against)])
    result = summarise(run)
    emit(result, _text(result), as_json)


def summarise(run: Run) -> dict[str, Any]:
    """Return the content of a run folder as one table."""
    metrics = run.read_metrics()
    config = run.read_config()
    # The checkpoint called best is that of the best epoch; of a stream it is that of the end.
    rated = [] if config.get("stream", {}).get("enabled") else metrics
    known = [row for row in rated if row.get("validation_accuracy") is not None]
    files = (run.last, run.best, run.model, run.plot, run.metrics_file, run.events_file, run.environment_file,
             run.config_file)  # fmt: skip
    return {
        "run": str(run.path),
        "status": run.status(),
        "config": config,
        "environment": run.read_environment(),
        "epochs": metrics,
        "best": max(known, key=lambda row: row["validation_accuracy"] or 0.0, default=None),
        "seconds": sum(row["seconds"] or 0.0 for row in metrics),
        "whole_seconds": run.whole_seconds(),
        "account": run.account(),
        "lacks": _lacking(run),
        "operations": {name: sum(row.get(name) or 0.0 for row in metrics) for name in COUNTED},
        "files": {file.name: file.stat().st_size for file in files if file.exists()},
    }


def _lacking(run: Run) -> str | None:
    """Return what a finished run lacks because its process ended too soon, ``None`` if nothing."""
    if not run.lacks_account():
        return None
    return "account" if run.comparison() != "wanted" or run.baseline.is_done() else "baseline"


def _text(result: dict[str, Any]) -> str:
    settings = result["config"]
    model, data = settings.get("model", {}).get("name"), settings.get("data", {}).get("source")
    profile = settings.get("device", {}).get("profile")
    lines = [f"{result['run']}: {result['status']}, {model} on {data}, profile {profile}"]
    if result["epochs"]:
        lines.append(_table(result["epochs"], bool(settings.get("stream", {}).get("enabled"))))
    if result["best"] is not None:
        best = result["best"]
        lines.append(f"best: epoch {best['epoch']:g}, validation accuracy {best['validation_accuracy']:.4f}")
    lines += [account_text(result["account"])] if result["account"] else _so_far(result)
    if result["lacks"] is not None:
        lines.append(f"the {result['lacks']} is unfinished; go on with: edgetrain resume {result['run']}")
    lines += [f"  {name:<20} {size:>12,} bytes" for name, size in result["files"].items()]
    return "\n".join(lines)


def _so_far(result: dict[str, Any]) -> list[str]:
    """Return what an unfinished run has computed and skipped."""
    lines, operations = [], result["operations"]
    if operations["macs_done"] < operations["macs_dense"]:
        share = operations["macs_done"] / operations["macs_dense"]
        kept = operations["instances_kept"] / max(operations["instances_seen"], 1)
        lines.append(f"computed {share:.1%} of the operations of dense training, instances kept: {kept:.1%}")
    times = times_text(result["seconds"], result["whole_seconds"])
    return [*lines, f"training time {times} on the machine of the run"]


def _table(rows: Sequence[Mapping[str, float | None]], stream: bool) -> str:
    """Return a line per epoch, or per window of a stream, which has columns of validation only if it was judged."""
    columns = [(key, "window" if stream and key == "epoch" else title) for key, title in _COLUMNS]
    if stream:
        columns = [(key, title) for key, title in columns if any(row.get(key) is not None for row in rows)]
    keys = [key for key, _ in columns]
    return table([tuple(title for _, title in columns), *(_cells(row, keys) for row in rows)])


def _cells(row: Mapping[str, float | None], keys: Sequence[str]) -> tuple[str, ...]:
    shapes = {"epoch": "{:g}", "lr": "{:.4g}", "images_per_second": "{:,.0f}"}
    values = [(key, row.get(key)) for key in keys]
    return tuple("-" if value is None else shapes.get(key, "{:.4f}").format(value) for key, value in values)
