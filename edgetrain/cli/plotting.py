"""The plot of a run: accuracy over operations and over time, beside its baseline."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

from edgetrain.errors import UsageError
from edgetrain.runs import Run

PLOT = "accuracy.svg"


def plot_runs(run: Run, others: list[Run]) -> Path:
    """Draw accuracy over operations and over training time into the run folder; return the file.

    Args:
        run: gets the file ``accuracy.svg``.
        others: runs to compare with, such as the baseline.

    Raises:
        UsageError: matplotlib is not installed, or a run has no rows yet.
    """
    figure, axes = _axes()
    for one in (run, *others):
        rows = one.read_metrics()
        if not rows:
            raise UsageError(f"{one.path}: no finished epoch to plot; train with: edgetrain resume {one.path}")
        accuracy = [_accuracy(row) for row in rows]
        for axis, column, unit in ((axes[0], "macs_done", 1e9), (axes[1], "seconds", 1.0)):
            done = list(accumulate((row.get(column) or 0.0) / unit for row in rows))
            axis.plot(done, accuracy, marker="o", markersize=3, label=_label(one))
    axes[0].set_xlabel("operations done, 10^9 multiply-accumulates")
    axes[1].set_xlabel("training time on the machine of the run, s")
    axes[0].set_ylabel("validation accuracy" if rows[-1].get("validation_accuracy") is not None else "accuracy")
    axes[0].legend()
    path = run.path / PLOT
    figure.savefig(path, metadata={"Date": None})
    return path


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure  # here: matplotlib is an extra that only plots need
    except ImportError:
        raise UsageError("plots need matplotlib, which is not installed; use pip install edgetrain[plots]") from None
    # Not pyplot: that keeps figures and chooses a display.
    figure = Figure(figsize=(10, 4), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def _accuracy(row: dict[str, float | None]) -> float:
    validation = row.get("validation_accuracy")
    return (row.get("accuracy") or 0.0) if validation is None else validation


def _label(run: Run) -> str:
    methods = run.read_config().get("methods", {})
    active = [text for text in methods.values() if text != "none"]
    return f"{run.path.name}: {', '.join(active) or 'dense'}"
