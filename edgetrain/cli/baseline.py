"""``--baseline``: the dense twin of a run, and what it tells."""

from __future__ import annotations

import time
from typing import Any

from edgetrain.cli.config import Config, dense
from edgetrain.cli.plotting import draw
from edgetrain.cli.sessions import Session, begin
from edgetrain.data.streaming import STANDARD_INPUT
from edgetrain.devices import DeviceProfile
from edgetrain.errors import NumericalError, UsageError
from edgetrain.runs import Run


def check_baseline(config: Config) -> None:
    """Refuse a dense twin that cannot be, or that tells nothing.

    Raises:
        UsageError: the data come once, or the run is dense itself.
    """
    if config.data.source == STANDARD_INPUT:
        raise UsageError("--baseline needs the data twice, standard input comes once; use a file or a folder")
    if config == dense(config):
        raise UsageError(
            "--baseline: nothing is skipped, so the baseline would be the same run; name a method (such as "
            "--error-pruning channels:keep=0.85) or leave --baseline out"
        )


def train_baseline(main: Session, profile: DeviceProfile) -> dict[str, Any]:
    """Train the dense twin of a finished run in a folder inside the run's, or go on with it, and draw both.

    Args:
        main: the finished run.
        profile: of both.

    Returns:
        What ``savings.savings_of`` takes; ``seconds`` are ``None`` where a dense step was not finite.

    Raises:
        InterruptedRunError: a signal asked to stop; the state is saved.
    """
    run, config, began = main.run.baseline, dense(main.config), time.monotonic()
    run.path.mkdir(exist_ok=True)
    run.lock()
    main.display.say(f"{main.run.path} is done; {run.path}: the same run, dense")
    if run.config_file.exists():
        twin = main.begun_twin(run, config, began)
    else:
        twin = main.new_twin(run, config, began, profile)
        begin(run, twin.learner, config, comparison="baseline")
    try:
        if not (twin.is_over and run.is_done()):
            twin.finish()
    except NumericalError:
        # The same step would fail again, and the run itself is none the worse for it.
        facts = {"seconds": None, "how": f"the dense run was not finite at step {twin.learner.step_count + 1:,}"}
        main.display.say(f"{run.path}: {facts['how']}")
    else:
        facts = _facts(run)
    draw(main.run, main.display)
    return facts


def _facts(run: Run) -> dict[str, Any]:
    """Return times and accuracy of the finished dense twin in this folder."""
    finished = [event for event in run.read_events() if event["event"] == "finished"]
    return {
        "seconds": sum(row["seconds"] or 0.0 for row in run.read_metrics()), "whole_seconds": run.whole_seconds(),
        "accuracy": finished[-1]["accuracy"] if finished else None, "run": str(run.path),
        "how": "measured, the same data without the methods",
    }  # fmt: skip
