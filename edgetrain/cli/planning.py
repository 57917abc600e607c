"""``plan`` and ``verify``: what one wants to know before training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from edgetrain.cli.output import emit, mebibytes, parse_sizes, table
from edgetrain.errors import MemoryBudgetError, VerificationError
from edgetrain.graph import Graph
from edgetrain.policies import NONE
from edgetrain.units import MIB, parse_bytes


def plan_command(
    model: str, batch_size: int | None, profile_name: str | None, memory_budget: str | None,
    training: Mapping[str, Any],
    input_shape: str | None, classes: int | None, threads: int | None, methods: Mapping[str, str | None], *,
    stream: bool, as_json: bool,
) -> None:  # fmt: skip
    """Print the bytes of every part; over the budget is an error after the table.

    Args:
        training: settings of the section of that name.
        methods: policies as text by kind, ``None`` for what the profile's recipe says.
        model, batch_size, profile_name, memory_budget, input_shape, classes, threads, stream, as_json: the flags.

    Raises:
        MemoryBudgetError: the plan needs more than the budget.
        UsageError, ModelError, ProfileError: a flag is bad, or names what is not there.
    """
    from edgetrain.cli.config import effective
    from edgetrain.cli.sources import make_learner, with_usable_methods

    device = {"profile": profile_name or "host", "batch_size": batch_size, "threads": threads}
    given: dict[str, Any] = {
        "model": {"name": model},
        "device": {key: value for key, value in device.items() if value is not None},
        "training": dict(training),
        "stream": {"enabled": stream},
        "methods": {kind: text for kind, text in methods.items() if text is not None},
    }
    graph = _graph(model, input_shape, classes)
    budget = None if memory_budget is None else parse_bytes(memory_budget)
    config, profile, by_recipe = effective(given)
    config, left_out = with_usable_methods(config, by_recipe)
    learner = make_learner(config, graph, profile)
    plan = learner.memory_plan()
    limit = budget or round(config.device.memory_budget_mib * MIB)
    result = {"model": model, "batch_size": learner.batch_size, "methods": asdict(config.methods),
              "parts": plan.parts, "notes": plan.notes, "peak_bytes": plan.peak_bytes, "budget_bytes": limit,
              "fits": plan.peak_bytes <= limit}  # fmt: skip
    emit(result, "\n".join([*left_out, _plan_text(result)]), as_json)
    if plan.peak_bytes > limit:
        raise MemoryBudgetError(
            f"{model} with batch size {learner.batch_size} needs {mebibytes(plan.peak_bytes)}, the budget is "
            f"{mebibytes(limit)}; use a smaller --batch-size or a larger --memory-budget"
        )


def verify_command(
    model: str, steps: int, batch_size: int, input_shape: str | None, classes: int | None, seed: int, *, as_json: bool
) -> None:
    """Print the comparison; a disagreement is an error after the table.

    Raises:
        VerificationError: edgetrain and PyTorch disagree.
        UsageError, ModelError: a flag is bad, the model is not there, or PyTorch is not.
    """
    from edgetrain.verify import verify

    report = verify(_graph(model, input_shape, classes, seed), steps=steps, batch_size=batch_size, seed=seed)
    result = {"model": model, "passed": report.passed, "steps": steps, "batch_size": batch_size, "seed": seed,
              "notes": list(report.notes), "rows": [asdict(row) for row in report.rows]}  # fmt: skip
    emit(result, report.table(), as_json)
    if not report.passed:
        worst = max((row for row in report.rows if not row.ok), key=lambda row: row.error)
        raise VerificationError(
            f"{model} disagrees with PyTorch: {worst.quantity} differs by {worst.error:.1e}, "
            f"the tolerance is {worst.tolerance:.0e}; do not trust its training, and report the model"
        )


def _graph(model: str, input_shape: str | None, classes: int | None, seed: int = 0) -> Graph:
    from edgetrain.catalog import build_model

    shape = None if input_shape is None else parse_sizes(input_shape, "--input-shape", (1, 2, 3))
    return build_model(model, shape, classes, seed)


def _plan_text(result: dict[str, Any]) -> str:
    notes = result["notes"]
    rows = [(f"{part} ({notes[part]})" if part in notes else part, mebibytes(count))
            for part, count in result["parts"].items()]  # fmt: skip
    rows += [("peak", mebibytes(result["peak_bytes"])), ("budget", mebibytes(result["budget_bytes"]))]
    methods = "".join(f", {text}" for text in result["methods"].values() if text != NONE)
    return f"{result['model']}, batch size {result['batch_size']}{methods}\n{table(rows)}"
