"""What runs over epochs and streams do alike: their beginning, going on, the dense twin, the plot, advice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from edgetrain._version import __version__
from edgetrain.checkpoint import load_checkpoint, save_checkpoint
from edgetrain.cli.advice import resuming
from edgetrain.cli.config import Config, dense
from edgetrain.cli.plotting import draw
from edgetrain.cli.progress import CompileNotice, Display
from edgetrain.cli.signals import StopOnSignal, interrupts_kept
from edgetrain.cli.sources import make_learner, take_initial_weights
from edgetrain.data.batches import Batch
from edgetrain.data.streaming import STANDARD_INPUT
from edgetrain.devices import DeviceProfile
from edgetrain.errors import CheckpointError, InterruptedRunError, NumericalError, UsageError
from edgetrain.runs import Run

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner


class Session(Protocol):
    """One process' part of a run, over epochs or of a stream."""

    run: Run
    learner: Learner
    config: Config
    display: Display
    stop: StopOnSignal

    @property
    def is_over(self) -> bool:
        """Whether no step is left."""

    def finish(self) -> None:
        """Train to the end and write the last files."""


def begin(run: Run, config: Config, *, comparison: str = "") -> None:
    """Write the files of a run that has its first checkpoint.

    The configuration comes last: a folder that has one can be resumed, even if the power fails right now.

    Args:
        run: whose folder it is.
        config: of the run.
        comparison: as ``Run.comparison`` returns it.
    """
    run.log("started", edgetrain=__version__, comparison=comparison)
    run.write_metrics(())
    run.write_config(config.to_dict())


def new_learner(config: Config, profile: DeviceProfile, display: Display, network: Callable[[], Graph]) -> Learner:
    """Return the learner of a new run, with its kernels compiled and its memory checked: before there is a run folder.

    Args:
        config, profile: of the run.
        display: told which initial weights matched, and that kernels are compiled.
        network: builds the graph, which must be kept by nobody else: it has all weights once more, and goes before
            compiling takes memory, too.

    Raises:
        ModelError: the initial weights are bad.
        UsageError: settings and network do not fit together.
        MemoryBudgetError: a training step does not fit into the budget.
    """
    graph = network()
    matched = take_initial_weights(config, graph)
    if matched is not None:
        display.say(str(matched))
    with CompileNotice(display.compiling):
        learner = make_learner(config, graph, profile)
        del graph
        with interrupts_kept():
            learner.prepare()
    return learner


def taken_up(run: Run, config: Config, display: Display) -> Learner:
    """Return the learner of a run's last checkpoint, with its kernels compiled.

    Raises:
        CheckpointError: the file is missing or damaged.
        MemoryBudgetError: a training step does not fit into the budget.
    """
    with CompileNotice(display.compiling):
        learner = load_checkpoint(run.last)
        learner.threads = config.device.threads
        with interrupts_kept():
            learner.prepare()
    return learner


def tell_surprises(display: Display, profile: DeviceProfile, learner: Learner, config: Config) -> None:
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


def train_baseline(
    main: Session, go_on: Callable[[Run, Config, float], Session], begin_anew: Callable[[Run, Config, float], Session]
) -> dict[str, Any]:
    """Train the dense twin of a finished run in a folder inside the run's, or go on with it, and draw both.

    Args:
        main: the finished run.
        go_on: returns the twin at its last checkpoint, of folder, configuration, and when it began.
        begin_anew: the same before its first step; its checkpoint and files are written here.

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
        twin = go_on(run, config, began)
    else:
        twin = begin_anew(run, config, began)
        save_checkpoint(twin.learner, run.last)
        begin(run, config, comparison="baseline")
    try:
        if not (twin.is_over and run.is_done()):
            twin.finish()
    except NumericalError:
        # The same step would fail again, and the run itself is none the worse for it.
        facts = {"seconds": None, "how": f"the dense run was not finite at step {twin.learner.step_count + 1:,}"}
        main.display.say(f"{run.path}: {facts['how']}")
    else:
        facts = _baseline_facts(run)
    draw(main.run, main.display)
    return facts


def _baseline_facts(run: Run) -> dict[str, Any]:
    """Return times and accuracy of the finished dense twin in this folder."""
    finished = [event for event in run.read_events() if event["event"] == "finished"]
    return {
        "seconds": sum(row["seconds"] or 0.0 for row in run.read_metrics()), "whole_seconds": run.whole_seconds(),
        "accuracy": finished[-1]["accuracy"] if finished else None, "run": str(run.path),
        "how": "measured, the same data without the methods",
    }  # fmt: skip


@contextmanager
def going_on(display: Display) -> Iterator[None]:
    """Say that a file on the way cannot be written, and go on: there may be space again at the next time."""
    try:
        yield
    except (CheckpointError, UsageError) as error:
        display.say(f"{error}; training goes on, and the next checkpoint is tried as usual")


def save_at_last(save: Callable[[], None], why: str, run: Run) -> None:
    """Save the state of a run that ends early.

    Raises:
        CheckpointError: it cannot be written; the message tells ``why`` the run ends, too.
    """
    try:
        save()
    except (CheckpointError, UsageError) as error:
        kept = f"{run.last} holds an earlier state, go on with: {resuming(run)}"
        raise CheckpointError(f"{why}; {error}; {kept}") from error


def heed_stop(session: Session) -> None:
    """End the command where a signal came after the last step: the run's files are there, its account is not.

    Raises:
        InterruptedRunError: a signal came.
    """
    if session.stop.requested():
        raise InterruptedRunError(
            f"stopped after the last step; {session.run.model} is written, what the run tells at its end is not; go on "
            f"with: {resuming(session.run)}"
        )


def until_stopped(session: Session, batches: Iterable[Batch]) -> Iterator[Batch]:
    """Yield batches of an estimate, which may take a while; raises what ``heed_stop`` does."""
    for batch in batches:
        heed_stop(session)
        yield batch
