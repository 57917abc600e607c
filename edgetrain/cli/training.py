"""``fit`` and ``resume``: one run folder, from the first step to the last line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetrain._version import __version__
from edgetrain.cli.baseline import check_baseline, train_baseline
from edgetrain.cli.config import Config, check_stream, from_flags, from_run, why_dense
from edgetrain.cli.epochs import prepare_epochs, resume_epochs
from edgetrain.cli.progress import Display, choose_display
from edgetrain.cli.sessions import Session, begin
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.sources import with_usable_methods
from edgetrain.cli.streaming import prepare_stream, resume_stream
from edgetrain.cli.unchanged import check_unchanged
from edgetrain.devices import DeviceProfile, load_profile
from edgetrain.hostinfo import host_facts
from edgetrain.runs import create_run, open_run, runs_released

if TYPE_CHECKING:
    from edgetrain.learner import Learner


def fit_command(flags: Mapping[str, Any]) -> None:
    """Train in a new run folder; ``flags`` are the parameters of the command.

    Raises:
        UsageError, ProfileError, ModelError, DataError: flags, model and data are bad, or do not fit together.
        MemoryBudgetError, NumericalError, InterruptedRunError, CheckpointError: as ``Session.train``.
    """
    began = time.monotonic()
    config, profile, by_recipe = from_flags(flags)
    config, left_out = with_usable_methods(config, by_recipe)
    if flags["baseline"]:
        check_baseline(config)
    display = choose_display(flags["quiet"], flags["json"], config.device.memory_budget_mib)
    for sentence in [*left_out, *why_dense(config, profile, flags["recipe"], by_recipe)]:
        display.say(sentence)
    prepare = prepare_stream if config.stream.enabled else prepare_epochs
    with runs_released(), closing(display):
        learner, data, session_of = prepare(config, profile, display)
        with StopOnSignal(display) as stop:
            run = create_run(flags["out"], "fit")
            run.write_environment({"edgetrain": __version__, "host": host_facts(), "data": data})
            begin(run, learner, config, comparison="wanted" if flags["baseline"] else "")
            session = session_of(run, learner, config, display, stop, began)
            session.introduce()
            _tell_surprises(display, profile, learner, config)
            session.finish()
            session.tell(flags["json"], train_baseline(session, profile) if flags["baseline"] else None)


def resume_command(path: Path, *, epochs: int | None, threads: int | None, quiet: bool, as_json: bool) -> None:
    """Go on in an existing run folder.

    Args:
        path: of the folder.
        epochs, threads: take the place of those of the run; ``None`` for these.
        quiet: say nothing on the way.
        as_json: print the last lines for machines.

    Raises:
        UsageError: no run, one that another process goes on with, settings edited that must not be, or nothing left.
        DataError: the data are bad, or not those that the run began with.
        CheckpointError, MemoryBudgetError, NumericalError, InterruptedRunError: as ``fit_command``.
    """
    began, run = time.monotonic(), open_run(path)
    with runs_released():
        run.lock()
        before = from_run(run.read_config(), run.config_file)
        config = _changed(before, epochs, threads)
        check_unchanged(run, config)
        display = choose_display(quiet, as_json, config.device.memory_budget_mib)
        with closing(display):
            session: Session
            if config.stream.enabled:
                session = resume_stream(run, config, display, began)
            else:
                session = resume_epochs(run, config, _differences(before, config), display, began)
            with session.stop:
                session.finish()
                wanted = run.comparison() == "wanted"  # for which alone the profile's file, if it is one, is needed
                session.tell(as_json, train_baseline(session, load_profile(config.device.profile)) if wanted else None)


def _tell_surprises(display: Display, profile: DeviceProfile, learner: Learner, config: Config) -> None:
    """Say what of another machine's profile is used and what is not, and what becomes of a network's inputs."""
    if learner.graph.trained and learner.graph.normalization is None and config.data.normalize:
        display.say(
            "inputs are normalised with statistics of the data, which the given weights know nothing of; if they were "
            "trained on inputs as they are: --no-normalize"
        )
    if profile.name != "host":
        display.say(
            f"profile {profile.name}: its batch size, memory budget and recipe are used; all times are this machine's, "
            "not the device's"
        )


def _changed(config: Config, epochs: int | None, threads: int | None) -> Config:
    device, training = config.device, config.training
    if epochs is not None:
        training = replace(training, epochs=epochs)
    if threads is not None:
        device = replace(device, threads=threads)
    changed = from_run(replace(config, device=device, training=training).to_dict(), Path("settings"))
    check_stream(changed)
    return changed


def _differences(before: Config, after: Config) -> list[str]:
    old, new = before.to_dict(), after.to_dict()
    return [
        f"{section}.{key} was {old[section].get(key)}, is now {value}"
        for section, values in new.items()
        for key, value in values.items()
        if value != old[section].get(key)
    ]
