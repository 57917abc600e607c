"""What to do where a run ended early or lacks a file: commands that can be copied from a message."""

from __future__ import annotations

from pathlib import Path

from edgetrain.cli.config import Config
from edgetrain.data.streaming import STANDARD_INPUT
from edgetrain.errors import EdgetrainError
from edgetrain.runs import Run


def resuming(run: Run) -> str:
    """Return the command that goes on with a run; of a dense twin, that of the run that wants it."""
    return f"edgetrain resume {run.path.parent if run.comparison() == 'baseline' else run.path}"


def without_checkpoint(run: Run, missing: Path) -> str:
    """Return what to say of a run that lacks a checkpoint: what is there, and what that is good for."""
    resume, fit = f"edgetrain resume {run.path}", f"edgetrain fit --config {run.config_file}"
    advice = {
        run.last: f"to train on: {resume}",
        run.best: f"to train on from the best epoch: cp {run.best} {run.last}, then {resume}",
        run.model: f"to train anew from its weights: {fit} --initial-weights {run.model}",
    }
    for file, how in advice.items():
        if file != missing and file.exists():
            return (
                f"{run.path}: no {missing.name} in it, but {file.name}; evaluate, predict and export take {file}; {how}"
            )
    return f"{run.path}: no {missing.name} in it, and nothing else that was trained; begin anew with: {fit}"


def how_to_go_on(error: EdgetrainError, run: Run, config: Config) -> str:
    """Return what to do after a step that was not finite, where the same step again would fail again."""
    return (
        f"{error}; the state before it is saved in {run.last}, but the same step would fail again. "
        f"{starting_anew(run, config)}"
    )


def starting_anew(run: Run, config: Config) -> str:
    """Return how to train again with a lower learning rate, perhaps from the weights of this run."""
    weights, source = run.path / "start.onnx", config.data.source
    judge = f"edgetrain evaluate {run.path}" + ("" if source == STANDARD_INPUT else f" --data {source}")
    return (
        f"Start a new run with a lower learning rate: edgetrain fit --config {run.config_file} "
        f"--lr {config.training.lr / 10:g} (or with --clip-norm 1); where the saved weights are good ({judge}), "
        f"go on from them: edgetrain export {run.path} -o {weights}, and fit with --initial-weights {weights}"
    )
