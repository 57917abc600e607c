"""``fit`` over epochs and resuming it: what is particular to data that are seen again and again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetrain.checkpoint import read_checkpoint, save_checkpoint
from edgetrain.cli.advice import how_to_go_on
from edgetrain.cli.config import Config, is_onnx_file
from edgetrain.cli.estimate import Work
from edgetrain.cli.output import count
from edgetrain.cli.progress import CompileNotice, Display, resident_mib
from edgetrain.cli.savings import layers_of
from edgetrain.cli.sessions import Session, going_on, new_learner, taken_up
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.sources import check_classes, classes_of_file, describe_data, load_splits, make_graph
from edgetrain.data import Augmentation, Dataset, batch_count
from edgetrain.data.batches import Batch
from edgetrain.devices import DeviceProfile
from edgetrain.errors import DataError, NumericalError, UsageError
from edgetrain.fitting import StepEvent, block_size, check_fits, fit_loop, training_batches
from edgetrain.history import COUNTED, EpochRecord
from edgetrain.runs import Run

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner


def prepare_epochs(
    config: Config, profile: DeviceProfile, display: Display
) -> tuple[Learner, dict[str, Any], Callable[..., Session]]:
    """Return what a new run over epochs begins with, before there is a run folder.

    Returns:
        The learner, what the run remembers about its data, and what makes a session of ``Session``'s arguments.

    Raises:
        UsageError, DataError, ModelError, MemoryBudgetError: model, data and settings do not fit together.
    """
    training, validation, held_out = load_splits(config, classes_of_file(config))
    learner = _new_learner(config, training, validation, profile, display)
    session = functools.partial(EpochSession, training=training, validation=validation, held_out=held_out)
    return learner, describe_data(training, validation), session


def _new_learner(
    config: Config, training: Dataset, validation: Dataset, profile: DeviceProfile, display: Display
) -> Learner:
    """Return the learner of a new run.

    Raises:
        UsageError, DataError, ModelError, MemoryBudgetError: model, data and settings do not fit together.
    """

    def network() -> Graph:
        graph = make_graph(config, training)
        check_classes(graph, training)
        for dataset in (training, validation):
            check_fits(graph, dataset)
        _check_augmentation(config, training)
        return graph

    return new_learner(config, profile, display, network)


def resume_epochs(run: Run, config: Config, changes: list[str], display: Display, began: float) -> EpochSession:
    """Return a session that goes on where a run stopped, after a look at whether it can.

    Args:
        run: its folder, locked.
        config: of the run, as it is now.
        changes: what of it is new, a sentence each.
        display: told what happens.
        began: when the command did, of ``time.monotonic``.

    Raises:
        UsageError, DataError: it cannot.
    """
    # Those of the checkpoint, as an .onnx file may be gone by now, or be another one.
    names = read_checkpoint(run.last)[1]["graph"]["class_names"] if is_onnx_file(config.model.name) else None
    training, validation, held_out = load_splits(config, None if names is None else tuple(names))
    _check_same_data(run, training, validation)
    _refuse_finished(run, config)
    learner = _taken_up(run, config, display)
    run.log("resumed", epoch=learner.position.epoch, batch=learner.position.batch, changes=changes)
    stop = StopOnSignal(display)
    session = EpochSession(run, learner, config, display, stop, began, training, validation, held_out)
    display.say(f"resuming {run.path} {'to write its last files' if session.is_over else session.where()}")
    for change in changes:
        display.say(f"changed: {change}")
    return session


def _taken_up(run: Run, config: Config, display: Display) -> Learner:
    """Return the learner of a run's last checkpoint, and take back what the run folder has beyond it."""
    learner = taken_up(run, config, display)
    # A finished run that gets more epochs goes on as if it had been asked for them from the start.
    learner.history.finished = False
    _renew_best(run, learner)
    run.write_config(config.to_dict())
    run.write_metrics(learner.history.epochs)
    return learner


@dataclass
class EpochSession(Session):
    """One process' part of a run over epochs.

    Attributes:
        training, validation: the data.
        held_out: what the validation data are called.
    """

    training: Dataset
    validation: Dataset
    held_out: str
    _lacks_rows: bool = field(default=False, init=False)  # whether metrics.csv could not be written
    _lacks_best: bool = field(default=False, init=False)  # whether the best epoch's checkpoint could not be written

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done."""
        return self.learner.position.epoch >= self.config.training.epochs

    def introduce(self) -> None:
        """Say what a new run is going to do."""
        config, learner, recipe = self.config, self.learner, self.config.training
        self.display.say(
            f"{self.run.path}: {config.model.name} ({learner.graph.parameter_count:,} parameters) on "
            f"{config.data.source}, {count(recipe.epochs, 'epoch')}, batch size {config.device.batch_size}, "
            f"{recipe.optimizer} with lr {recipe.lr:g}, {count(config.device.threads, 'thread')}, seed {recipe.seed}"
        )
        if learner.sparsity is not None:
            self.display.say(f"sparsity {config.methods.sparsity}: {learner.topology.beginning}")

    def train(self) -> None:
        """Train to the last epoch.

        Raises:
            NumericalError: a step was not finite; the state before it is saved.
            InterruptedRunError, CheckpointError, MemoryBudgetError: as ``Session.train``.
        """
        self.display.begin(self.config.training.epochs, self.held_out)
        with CompileNotice(self.display.compiling):
            try:
                history = fit_loop(
                    self.learner, self.training, self.config.training.epochs, validation=self.validation,
                    augmentation=self.config.data.augment, normalize=self.config.data.normalize,
                    on_step=self._on_step, on_epoch=self._on_epoch, should_stop=self.stop.requested,
                )  # fmt: skip
            except NumericalError as error:
                # A filter's block is not repeated. Where no step was taken, the checkpoint stays as it was: else every
                # vain attempt to go on would cost another block.
                self._note_failure(error, save=self.learner.step_count > self._first_step)
                raise NumericalError(how_to_go_on(error, self.run, self.config)) from error
            if not history.finished:
                self._interrupt()

    def conclude(self) -> None:
        """Write the last files; raises what ``Session.conclude`` does."""
        with self.stop.unbroken():
            self._save()
            if not self.run.best.exists():
                self._save_best()
            if self._lacks_best:
                self.display.say(f"{self.run.best} is of another epoch than the best one, when it could not be written")
            self.learner.export_onnx(self.run.model)
            if self._lacks_rows:
                self.run.write_metrics(self.learner.history.epochs)
        last = self.learner.history.epochs[-1]
        self._log("finished", accuracy=last.validation_accuracy, loss=last.validation_loss)

    def result(self, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what the run gave; ``baseline``: time and accuracy of the same run, dense."""
        history = self.learner.history
        last, best = history.epochs[-1], history.best() or history.epochs[-1]
        seconds, counts = sum(history.column("seconds")), {name: sum(history.column(name)) for name in COUNTED}
        work = Work(seconds, counts["macs_done"], counts["instances_seen"], block_size(self.learner))
        account = self._savings(counts, work, baseline)
        return layers_of(self.learner) | {
            "savings": account, **self._described(), "epochs": len(history), "validated_on": self.held_out,
            "loss": last.validation_loss, "accuracy": last.validation_accuracy,
            "best_epoch": best.epoch, "best_accuracy": best.validation_accuracy,
            "seconds": seconds, "whole_seconds": account["whole_seconds"],
            "images_per_second": counts["instances_seen"] / seconds if seconds else 0.0,
            "memory_mib": resident_mib(), "files": self._files(),
        }  # fmt: skip

    def last_line(self, result: Mapping[str, Any]) -> str:
        """Return the last line for people, of the result."""
        return (
            f"{self.held_out} accuracy {result['accuracy']:.4f} after {count(result['epochs'], 'epoch')} "
            f"({result['images_per_second']:,.0f} images/s on this machine); "
            f"model: {result['files']['model']}, run: {result['run']}"
        )

    def begun_twin(self, run: Run, config: Config, began: float) -> EpochSession:
        """Return a session on the same data that goes on at the last checkpoint of a run."""
        return replace(self, run=run, learner=_taken_up(run, config, self.display), config=config, began=began)

    def where(self) -> str:
        """Return the epoch and the batch that the run stands at."""
        position, batches = self.learner.position, batch_count(len(self.training), block_size(self.learner))
        return f"in epoch {position.epoch + 1} after batch {position.batch} of {batches}"

    def _on_step(self, event: StepEvent) -> None:
        self.display.step(event)
        self._save_if_due()

    def _on_epoch(self, record: EpochRecord) -> None:
        lacks_rows, self._lacks_rows = self._lacks_rows, True
        self._lacks_best |= self.learner.history.best() is record
        with going_on(self.display):
            self._save()
            if self.learner.history.best() is record:
                self._save_best()
                self._lacks_best = False
            if lacks_rows:
                self.run.write_metrics(self.learner.history.epochs)
            else:
                self.run.add_metrics(record)
            self._lacks_rows = False
            self._log("epoch", epoch=record.epoch, validation_accuracy=record.validation_accuracy)
        self.display.epoch(record)

    def _position(self) -> dict[str, Any]:
        return {"epoch": self.learner.position.epoch, "batch": self.learner.position.batch}

    def _new_learner(self, config: Config, profile: DeviceProfile) -> Learner:
        return _new_learner(config, self.training, self.validation, profile, self.display)

    def _batches_again(self, size: int) -> Iterable[Batch]:
        augmentation = Augmentation.parse(self.config.data.augment)
        return training_batches(self.learner, self.training, size, augmentation=augmentation)


def _check_augmentation(config: Config, training: Dataset) -> None:
    """Try the augmentation on one image of the data's shape, before there is a run folder."""
    augmentation = Augmentation.parse(config.data.augment)
    augmentation(np.zeros((1, *training.input_shape), np.float32), np.random.default_rng(0))


def _check_same_data(run: Run, training: Dataset, validation: Dataset) -> None:
    stored, found = run.read_environment().get("data"), describe_data(training, validation)
    if not isinstance(stored, Mapping) or stored == found:
        return
    key = next(key for key in found if found[key] != stored.get(key))
    raise DataError(
        f"{run.path}: the data changed since the run began ({key} was {stored.get(key)}, is {found[key]}); "
        "bring the old data back, or start a new run with: edgetrain fit"
    )


def _refuse_finished(run: Run, config: Config) -> None:
    """Refuse a run with nothing left; one whose ending was cut off still lacks its last files, or its baseline."""
    position, epochs = read_checkpoint(run.last)[1]["position"], config.training.epochs
    done = position["epoch"]
    if done < epochs or (done == epochs and not position["batch"] and not run.is_done()):
        return
    raise UsageError(
        f"{run.path}: {done} of {epochs} epochs are done, nothing is left; "
        f"for more use: edgetrain resume {run.path} --epochs {done + 1}"
    )


def _renew_best(run: Run, learner: Learner) -> None:
    """Write the best checkpoint if the last one is it: the process may have ended between the two."""
    best = learner.history.best()
    if best is not None and best.epoch == learner.position.epoch and not learner.position.batch:
        save_checkpoint(learner, run.best)
