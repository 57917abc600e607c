"""The plot of a run: accuracy over operations and over time, beside its baseline."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from edgetrain.checkpoint import write_file
from edgetrain.cli.advice import resuming
from edgetrain.cli.progress import Display
from edgetrain.errors import CheckpointError, EdgetrainError, UsageError
from edgetrain.runs import Run

Rows = list[dict[str, float | None]]


def plot_runs(run: Run, others: Sequence[Run] = ()) -> Path:
    """Draw accuracy over operations and over training time into the run folder, beside its dense twin if it has one.

    Args:
        run: gets the file ``accuracy.svg``.
        others: further runs to compare with.

    Returns:
        The file.

    Raises:
        UsageError: matplotlib is not installed, a run has no rows yet, the runs have no measure in common, or the file
            cannot be written.
    """
    figure, axes = _axes()
    runs = {one: one.read_metrics() for one in (run, *_twins(run), *others)}
    for one, rows in runs.items():
        if not rows:
            raise UsageError(f"{one.path}: no finished epoch or window to plot; train with: {resuming(one)}")
    measure, title = _measure(runs)
    for one, rows in runs.items():
        for axis, column, unit in ((axes[0], "macs_done", 1e9), (axes[1], "seconds", 1.0)):
            done = accumulate((row.get(column) or 0.0) / unit for row in rows)
            points = [(x, row[measure]) for x, row in zip(done, rows, strict=True) if _is_known(row.get(measure))]
            axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=_label(one))
    axes[0].set_xlabel("operations done, 10^9 multiply-accumulates")
    axes[1].set_xlabel("training time on the machine of the run, s")
    axes[0].set_ylabel(title)
    axes[0].legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    try:
        write_file(run.plot, picture.getvalue())
    except CheckpointError as error:
        raise UsageError(str(error)) from error
    return run.plot


def draw(run: Run, display: Display) -> None:
    """Draw a run beside its baseline into its folder; where that fails, say so: the run is done all the same."""
    try:
        display.say(f"plot: {plot_runs(run)}")
    except EdgetrainError as error:
        display.say(f"no plot: {error}")
    except Exception as error:  # whatever a drawing library raises
        display.say(f"no plot: {type(error).__name__}: {error}; try again with: edgetrain report {run.path} --plot")


def _twins(run: Run) -> list[Run]:
    """Return the dense twin of a run where there is one that has rows, finished or not."""
    twin = run.baseline
    return [twin] if twin.config_file.exists() and twin.read_metrics() else []


def _measure(runs: Mapping[Run, Rows]) -> tuple[str, str]:
    """Return the column that all runs have figures in, and what these are.

    Raises:
        UsageError: the runs have no measure in common.
    """
    if all(any(_is_known(row.get("validation_accuracy")) for row in rows) for rows in runs.values()):
        return "validation_accuracy", "accuracy on test or validation data"
    for one, rows in runs.items():
        if not any(_is_known(row.get("accuracy")) for row in rows):
            raise UsageError(f"{one.path}: no step was taken yet, so there is no accuracy to plot")
    settings = {one: one.read_config().get("stream", {}) for one in runs}
    streams = [one for one in runs if settings[one].get("enabled")]
    if 0 < len(streams) < len(runs):
        raise UsageError(
            f"{', '.join(str(one.path) for one in streams)} ran on a stream, others over epochs, and not all have "
            "figures on test data: their accuracies are of other instances; compare runs of one kind, or streams that "
            "have test data and --baseline"
        )
    kinds = {bool(stream.get("predict")) for stream in settings.values()}
    if len(kinds) > 1:
        raise UsageError(
            "some of the runs predict before they learn, others do not: their accuracies are of other instances; "
            "compare runs that all have --predict-first, or none"
        )
    return "accuracy", "accuracy before learning" if kinds == {True} else "accuracy of the instances trained on"


def _is_known(value: float | None) -> bool:
    return value is not None and not math.isnan(value)


def _axes() -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure  # here: matplotlib is an extra that only plots need
    except ImportError:
        raise UsageError("plots need matplotlib, which is not installed; use pip install edgetrain[plots]") from None
    # Not pyplot: that keeps figures and chooses a display.
    figure = Figure(figsize=(10, 4), layout="constrained")
    return figure, figure.subplots(1, 2, sharey=True)


def _label(run: Run) -> str:
    methods = run.read_config().get("methods", {})
    active = [text for text in methods.values() if text != "none"]
    return f"{run.path.name}: {', '.join(active) or 'dense'}"
