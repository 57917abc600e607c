"""What config.toml and the last checkpoint of a run both say: a resumed run trains by the checkpoint.

Epochs, threads, augmentation and the time between checkpoints are the file's alone, so they may be edited.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgetrain.checkpoint import read_checkpoint
from edgetrain.cli.advice import without_checkpoint
from edgetrain.cli.config import ARGUMENTS, Config, is_onnx_file
from edgetrain.cli.sources import make_optimizer
from edgetrain.errors import CheckpointError, UsageError
from edgetrain.optim import Optimizer
from edgetrain.policies import NONE, agrees, parse_policy
from edgetrain.runs import Run
from edgetrain.units import MIB


def check_unchanged(run: Run, config: Config) -> None:
    """Refuse a configuration that was edited where the checkpoint decides.

    Raises:
        UsageError: it was; the message names every changed setting.
        CheckpointError: the checkpoint is missing or damaged.
    """
    if not run.last.exists():
        raise CheckpointError(without_checkpoint(run, run.last))
    _, table = read_checkpoint(run.last)
    model = table["graph"]["name"]
    old, new = _by_key(table["settings"], model), _by_key(_settings(config), _graph_name(config, model))
    # Settings of another optimizer are left out: its own name says it all.
    changes = [f"{key} was {old[key]}, is now {new[key]}" for key in old if key in new and old[key] != new[key]]
    changes += _changed_methods(table["settings"], config)
    if changes:
        raise UsageError(
            f"{run.config_file}: {'; '.join(changes)}; a run goes on with what it began with: put that back, or start "
            f"a new run with: edgetrain fit --config {run.config_file}"
        )


def _settings(config: Config) -> dict[str, Any]:
    """Return what a checkpoint of a run with this configuration would say, methods aside."""
    return {
        "batch_size": config.device.batch_size,
        "memory_budget": round(config.device.memory_budget_mib * MIB),
        "seed": config.training.seed,
        "label_smoothing": config.training.label_smoothing,
        "optimizer": make_optimizer(config).to_dict(),
    }


def _changed_methods(settings: Mapping[str, Any], config: Config) -> list[str]:
    """Return what the text of a method says otherwise than the checkpoint, one sentence per method.

    Keys that the text does not name are the checkpoint's alone: an older version may have had another default.
    """
    changes = []
    for kind, argument in ARGUMENTS.items():
        stored, text = settings.get(argument, NONE), getattr(config.methods, kind)
        if not agrees(kind, text, parse_policy(kind, stored)):
            changes.append(f"methods.{kind} was {stored}, is now {text}")
    return changes


def _graph_name(config: Config, of_file: str) -> str:
    from edgetrain.catalog import build_model

    # An .onnx file may be gone by now, or be another one: its name is taken as it is.
    return of_file if is_onnx_file(config.model.name) else build_model(config.model.name).name


def _by_key(settings: Mapping[str, Any], model: str) -> dict[str, Any]:
    """Return settings of a checkpoint by key of config.toml, methods aside."""
    optimizer = Optimizer.from_dict(settings["optimizer"]).to_dict()  # with what an older version did not know
    schedule = optimizer.pop("schedule")
    return {
        "model.name": model,
        "device.batch_size": settings["batch_size"],
        "device.memory_budget_mib": settings["memory_budget"] / MIB,
        "training.seed": settings["seed"],
        "training.label_smoothing": settings["label_smoothing"],
        "training.optimizer": optimizer.pop("name"),
        **{f"training.{name}": value for name, value in optimizer.items()},
        "training.schedule": schedule["kind"],
        "training.warmup_fraction": schedule["warmup"],
    }
