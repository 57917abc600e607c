"""What runs over epochs and streams do alike: a session, its beginning, going on, and its end."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NoReturn, Self

from edgetrain._version import __version__
from edgetrain.checkpoint import load_checkpoint, save_checkpoint
from edgetrain.cli.advice import resuming
from edgetrain.cli.config import Config, MethodSettings
from edgetrain.cli.estimate import Work, time_dense
from edgetrain.cli.output import emit
from edgetrain.cli.progress import CompileNotice, Display
from edgetrain.cli.savings import account_of, account_text, itself, savings_of
from edgetrain.cli.signals import StopOnSignal, interrupts_kept
from edgetrain.cli.sources import make_learner, take_initial_weights
from edgetrain.data.batches import Batch
from edgetrain.devices import DeviceProfile
from edgetrain.errors import CheckpointError, EdgetrainError, InterruptedRunError, UsageError
from edgetrain.runs import Run

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner


@dataclass
class Session(ABC):
    """One process' part of a run, over epochs or of a stream.

    Attributes:
        run, learner, config: what is trained, how, and the folder that gets it.
        display: told what happens.
        stop: tells whether a signal asked for an end.
        began: when this part began, of ``time.monotonic``.
    """

    run: Run
    learner: Learner
    config: Config
    display: Display
    stop: StopOnSignal
    began: float
    _saved_at: float = field(default_factory=time.monotonic, init=False)

    def __post_init__(self) -> None:
        self._first_step = self.learner.step_count

    @property
    @abstractmethod
    def is_over(self) -> bool:
        """Whether no step is left."""

    @abstractmethod
    def introduce(self) -> None:
        """Say what a new run is going to do."""

    @abstractmethod
    def train(self) -> None:
        """Take all steps that are left.

        Raises:
            InterruptedRunError: a signal asked to stop; the state is saved.
            NumericalError: a step was not finite; the state before it is saved.
            DataError: an instance is bad; the state before it is saved.
            CheckpointError: the state of a run that ends early cannot be written.
            MemoryBudgetError: a step does not fit into the budget.
        """

    @abstractmethod
    def conclude(self) -> None:
        """Write the last checkpoint and the ONNX file: the run is then finished, whatever becomes of its account.

        Raises:
            CheckpointError, UsageError: a file cannot be written.
        """

    @abstractmethod
    def result(self, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what the run gave; ``baseline``: time and accuracy of the same run, dense."""

    @abstractmethod
    def last_line(self, result: Mapping[str, Any]) -> str:
        """Return the last line for people, of the result."""

    @abstractmethod
    def begun_twin(self, run: Run, config: Config, began: float) -> Self:
        """Return a session on the same data that goes on at the last checkpoint of a run."""

    @abstractmethod
    def where(self) -> str:
        """Return where the run stands, as a person reads it."""

    @abstractmethod
    def _new_learner(self, config: Config, profile: DeviceProfile) -> Learner:
        """Return a learner before its first step, for the data of the run."""

    @abstractmethod
    def _batches_again(self, size: int) -> Iterable[Batch]:
        """Return batches of so many instances, prepared as those of the run."""

    def finish(self) -> None:
        """Train to the end and write the last files; raises what ``train``, ``conclude`` and ``heed_stop`` do."""
        self.train()
        self.conclude()
        self.heed_stop()

    def tell(self, as_json: bool, baseline: Mapping[str, Any] | None) -> None:
        """Print the last lines, with what was saved; ``baseline`` as for ``result``."""
        result = self.result(baseline)
        self.run.log("account", **account_of(result))
        self.display.close()
        emit(result, f"{account_text(result)}\n{self.last_line(result)}", as_json)

    def new_twin(self, run: Run, config: Config, began: float, profile: DeviceProfile) -> Self:
        """Return a session on the same data before its first step; its run folder is still empty."""
        return replace(self, run=run, learner=self._new_learner(config, profile), config=config, began=began)

    def heed_stop(self) -> None:
        """End the command where a signal came after the last step: the run's files are there, its account is not.

        Raises:
            InterruptedRunError: a signal came.
        """
        if self.stop.requested():
            raise InterruptedRunError(
                f"stopped after the last step; {self.run.model} is written, what the run tells at its end is not; go "
                f"on with: {resuming(self.run)}"
            )

    def _described(self) -> dict[str, Any]:
        """Return what the results of all runs say about settings."""
        config = self.config
        return {
            "run": str(self.run.path), "model": config.model.name, "data": config.data.source,
            "profile": config.device.profile, "timed_on": "this machine",
        }  # fmt: skip

    def _files(self) -> dict[str, str]:
        return {"model": str(self.run.model), "last": str(self.run.last), "best": str(self.run.best)}

    def _savings(self, counts: Mapping[str, int], work: Work, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the account of the run: ``counts`` as in ``savings_of``, but for the instances that wait."""
        waiting = {"instances_waiting": self.learner.stream.waiting}
        return savings_of({**counts, **waiting}, work.seconds, self.run.whole_seconds(), baseline or self._dense(work))

    def _dense(self, work: Work) -> dict[str, Any]:
        """Estimate how long the same run takes densely; a run that skips nothing is that dense run."""
        if self.config.methods == MethodSettings():
            return itself(work.seconds)
        return time_dense(self.learner, work, lambda size: self._until_stopped(self._batches_again(size)))

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches of an estimate, which may take a while; raises what ``heed_stop`` does."""
        for batch in batches:
            self.heed_stop()
            yield batch

    def _is_due(self) -> bool:
        return time.monotonic() - self._saved_at > 60 * self.config.training.save_every_minutes

    def _save_if_due(self, is_new: bool = True) -> None:
        """Save the state where it is time to, unless it is the one that was saved last."""
        if not self._is_due():
            return
        self._saved_at = time.monotonic()
        if is_new:
            with going_on(self.display):
                self._save()
                self._log("saved", **self._position())

    def _save(self) -> None:
        save_checkpoint(self.learner, self.run.last)
        self._saved_at = time.monotonic()

    def _save_best(self) -> None:
        save_checkpoint(self.learner, self.run.best)

    def _save_at_last(self, why: str) -> None:
        """Save the state of a run that ends early.

        Raises:
            CheckpointError: it cannot be written; the message tells ``why`` the run ends, too.
        """
        try:
            self._save()
        except (CheckpointError, UsageError) as error:
            kept = f"{self.run.last} holds an earlier state, go on with: {resuming(self.run)}"
            raise CheckpointError(f"{why}; {error}; {kept}") from error

    def _note_failure(self, error: EdgetrainError, save: bool) -> None:
        """Save the state of a run that fails, if that is of use, and note why it does."""
        if save:
            self._save_at_last(str(error))
        with suppress(UsageError):  # the message tells it in any case
            self._log("failed", error=str(error))

    def _interrupt(self) -> NoReturn:
        self._save_at_last("stopped by a signal")
        with suppress(UsageError):
            self._log("interrupted", **self._position())
        raise InterruptedRunError(
            f"stopped {self.where()}; the state is saved in {self.run.last}, go on with: {resuming(self.run)}"
        )

    def _position(self) -> dict[str, Any]:
        """Return what the events of a saved state tell about it, beside what all events do."""
        return {}

    def _log(self, event: str, **details: Any) -> None:
        self.run.log(event, whole_seconds=self._whole_seconds(), **details)

    def _whole_seconds(self) -> float:
        return time.monotonic() - self.began


def begin(run: Run, learner: Learner, config: Config, *, comparison: str) -> None:
    """Write the first checkpoint and the files of a run.

    The configuration comes last: a folder that has one can be resumed, even if the power fails right now.

    Args:
        run: whose folder it is.
        learner: before its first step.
        config: of the run.
        comparison: as ``Run.comparison`` returns it.
    """
    save_checkpoint(learner, run.last)
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


@contextmanager
def going_on(display: Display) -> Iterator[None]:
    """Say that a file on the way cannot be written, and go on: there may be space again at the next time."""
    try:
        yield
    except (CheckpointError, UsageError) as error:
        display.say(f"{error}; training goes on, and the next checkpoint is tried as usual")
