"""``fit`` and ``resume``: one run folder, from the first step to the last line."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgetrain
from edgetrain.checkpoint import read_checkpoint, save_checkpoint
from edgetrain.cli.advice import how_to_go_on, resuming
from edgetrain.cli.config import Config, MethodSettings, check_stream, from_flags, from_run, is_onnx_file, why_dense
from edgetrain.cli.estimate import Work, time_dense
from edgetrain.cli.output import count, emit
from edgetrain.cli.progress import CompileNotice, Display, choose_display, resident_mib
from edgetrain.cli.savings import account_of, account_text, itself, layers_of, savings_of
from edgetrain.cli.sessions import (
    begin,
    check_baseline,
    going_on,
    heed_stop,
    new_learner,
    save_at_last,
    taken_up,
    tell_surprises,
    train_baseline,
    until_stopped,
)
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.sources import (
    check_classes,
    classes_of_file,
    describe_data,
    load_splits,
    make_graph,
    with_usable_methods,
)
from edgetrain.cli.streaming import fit_stream, resume_stream
from edgetrain.cli.unchanged import check_unchanged
from edgetrain.data import Augmentation, Dataset, batch_count
from edgetrain.data.batches import Batch
from edgetrain.devices import DeviceProfile, load_profile
from edgetrain.errors import DataError, InterruptedRunError, NumericalError, UsageError
from edgetrain.fitting import StepEvent, block_size, check_fits, fit_loop, training_batches
from edgetrain.history import COUNTED, EpochRecord
from edgetrain.hostinfo import host_facts
from edgetrain.runs import Run, create_run, open_run, runs_released

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner


def fit_command(flags: Mapping[str, Any]) -> None:
    """Train in a new run folder; ``flags`` are the parameters of the command.

    Raises:
        UsageError, ProfileError, ModelError, DataError: flags, model and data are bad, or do not fit together.
        MemoryBudgetError, NumericalError, InterruptedRunError, CheckpointError: as ``_Session.train`` and
            ``StreamSession.train``.
    """
    began = time.monotonic()
    config, profile, by_recipe = from_flags(flags)
    config, left_out = with_usable_methods(config, by_recipe)
    if flags["baseline"]:
        check_baseline(config)
    display = choose_display(flags["quiet"], flags["json"], config.device.memory_budget_mib)
    for sentence in [*left_out, *why_dense(config, profile, flags["recipe"], by_recipe)]:
        display.say(sentence)
    with runs_released(), closing(display):
        if config.stream.enabled:
            fit_stream(flags, config, profile, display, began)
            return
        training, validation, held_out = load_splits(config, classes_of_file(config))
        learner = _new_learner(config, training, validation, profile, display)
        with StopOnSignal(display) as stop:
            run = create_run(flags["out"], "fit")
            save_checkpoint(learner, run.last)
            run.write_environment(_environment(training, validation))
            begin(run, config, comparison="wanted" if flags["baseline"] else "")
            _introduce(display, run, learner, config, profile)
            session = _Session(run, learner, config, display, stop, training, validation, held_out, began)
            session.finish()
            session.tell(flags["json"], _baseline(session, profile) if flags["baseline"] else None)


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


def _baseline(session: _Session, profile: DeviceProfile) -> dict[str, Any]:
    """Train the same run densely, or go on with that; return times and accuracy, and draw both runs."""

    def begin_anew(run: Run, config: Config, began: float) -> _Session:
        learner = _new_learner(config, session.training, session.validation, profile, session.display)
        return replace(session, run=run, learner=learner, config=config, began=began)

    def go_on(run: Run, config: Config, began: float) -> _Session:
        learner = _taken_up(run, config, session.display)
        return replace(session, run=run, learner=learner, config=config, began=began)

    return train_baseline(session, go_on, begin_anew)


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
            if config.stream.enabled:
                resume_stream(run, config, display, as_json, began)
                return
            session = _resumed(run, before, config, display, began)
            with session.stop:
                session.finish()
                wanted = run.comparison() == "wanted"  # for which alone the profile's file, if it is one, is needed
                session.tell(as_json, _baseline(session, load_profile(config.device.profile)) if wanted else None)


def _resumed(run: Run, before: Config, config: Config, display: Display, began: float) -> _Session:
    """Return a session that goes on where a run stopped, after a look at whether it can.

    Raises:
        UsageError, DataError: it cannot.
    """
    # Those of the checkpoint, as an .onnx file may be gone by now, or be another one.
    names = read_checkpoint(run.last)[1]["graph"]["class_names"] if is_onnx_file(config.model.name) else None
    training, validation, held_out = load_splits(config, None if names is None else tuple(names))
    _check_same_data(run, training, validation)
    _refuse_finished(run, config)
    learner = _taken_up(run, config, display)
    changes = _differences(before, config)
    run.log("resumed", epoch=learner.position.epoch, batch=learner.position.batch, changes=changes)
    stop = StopOnSignal(display)
    session = _Session(run, learner, config, display, stop, training, validation, held_out, began)
    display.say(f"resuming {run.path} {'to write its last files' if session.is_over else _where(learner, training)}")
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
class _Session:
    """One process' part of a run."""

    run: Run
    learner: Learner
    config: Config
    display: Display
    stop: StopOnSignal
    training: Dataset
    validation: Dataset
    held_out: str
    began: float
    _saved_at: float = field(default_factory=time.monotonic, init=False)
    _lacks_rows: bool = field(default=False, init=False)  # whether metrics.csv could not be written
    _lacks_best: bool = field(default=False, init=False)  # whether the best epoch's checkpoint could not be written

    def __post_init__(self) -> None:
        self._first_step = self.learner.step_count

    @property
    def is_over(self) -> bool:
        """Whether all epochs are done."""
        return self.learner.position.epoch >= self.config.training.epochs

    def finish(self) -> None:
        """Train to the last epoch and write the last files; raises what ``train`` and ``heed_stop`` do."""
        self.train()
        self.conclude()
        heed_stop(self)

    def train(self) -> None:
        """Train to the last epoch.

        Raises:
            InterruptedRunError: a signal asked to stop; the state is saved.
            NumericalError: a step was not finite; the state before it is saved.
            CheckpointError: the state of an interrupted run cannot be written.
            MemoryBudgetError: a step does not fit into the budget.
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
                if self.learner.step_count > self._first_step:
                    save_at_last(self._save, str(error), self.run)
                with suppress(UsageError):  # the message tells it in any case
                    self._log("failed", error=str(error))
                raise NumericalError(how_to_go_on(error, self.run, self.config)) from error
            if not history.finished:
                self._interrupt()

    def conclude(self) -> None:
        """Write the last checkpoint and the ONNX file: the run is then finished, whatever becomes of its account.

        Raises:
            CheckpointError, UsageError: a file cannot be written.
        """
        with self.stop.unbroken():
            save_checkpoint(self.learner, self.run.last)
            if not self.run.best.exists():
                save_checkpoint(self.learner, self.run.best)
            if self._lacks_best:
                self.display.say(f"{self.run.best} is of another epoch than the best one, when it could not be written")
            self.learner.export_onnx(self.run.model)
            if self._lacks_rows:
                self.run.write_metrics(self.learner.history.epochs)
        last = self.learner.history.epochs[-1]
        self._log("finished", accuracy=last.validation_accuracy, loss=last.validation_loss)

    def tell(self, as_json: bool, baseline: Mapping[str, Any] | None = None) -> None:
        """Print the last lines, with what was saved; ``baseline``: time and accuracy of the same run, dense."""
        result = self._result(baseline)
        self.run.log("account", **account_of(result))
        self.display.close()
        emit(result, f"{account_text(result)}\n{_last_line(result, self.held_out)}", as_json)

    def _on_step(self, event: StepEvent) -> None:
        self.display.step(event)
        if time.monotonic() - self._saved_at > 60 * self.config.training.save_every_minutes:
            self._saved_at = time.monotonic()
            with going_on(self.display):
                self._save()
                self._log("saved", epoch=self.learner.position.epoch, batch=self.learner.position.batch)

    def _on_epoch(self, record: EpochRecord) -> None:
        lacks_rows, self._lacks_rows = self._lacks_rows, True
        self._lacks_best |= self.learner.history.best() is record
        with going_on(self.display):
            self._save()
            if self.learner.history.best() is record:
                save_checkpoint(self.learner, self.run.best)
                self._lacks_best = False
            if lacks_rows:
                self.run.write_metrics(self.learner.history.epochs)
            else:
                self.run.add_metrics(record)
            self._lacks_rows = False
            self._log("epoch", epoch=record.epoch, validation_accuracy=record.validation_accuracy)
        self.display.epoch(record)

    def _save(self) -> None:
        save_checkpoint(self.learner, self.run.last)
        self._saved_at = time.monotonic()

    def _log(self, event: str, **details: Any) -> None:
        self.run.log(event, whole_seconds=time.monotonic() - self.began, **details)

    def _interrupt(self) -> None:
        save_at_last(self._save, "stopped by a signal", self.run)
        where = _where(self.learner, self.training)
        with suppress(UsageError):
            self._log("interrupted", epoch=self.learner.position.epoch, batch=self.learner.position.batch)
        raise InterruptedRunError(
            f"stopped {where}; the state is saved in {self.run.last}, go on with: {resuming(self.run)}"
        )

    def _result(self, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        history = self.learner.history
        last, best = history.epochs[-1], history.best() or history.epochs[-1]
        seconds, whole = sum(history.column("seconds")), self.run.whole_seconds()
        counts = {name: sum(history.column(name)) for name in COUNTED}
        counts["instances_waiting"] = self.learner.stream.waiting
        savings = savings_of(counts, seconds, whole, baseline or self._dense(seconds, counts))
        return layers_of(self.learner) | {
            "savings": savings,
            "run": str(self.run.path),
            "model": self.config.model.name,
            "data": self.config.data.source,
            "profile": self.config.device.profile,
            "timed_on": "this machine",
            "epochs": len(history),
            "validated_on": self.held_out,
            "loss": last.validation_loss,
            "accuracy": last.validation_accuracy,
            "best_epoch": best.epoch,
            "best_accuracy": best.validation_accuracy,
            "seconds": seconds,
            "whole_seconds": whole,
            "images_per_second": sum(history.column("instances_seen")) / seconds if seconds else 0.0,
            "memory_mib": resident_mib(),
            "files": {"model": str(self.run.model), "last": str(self.run.last), "best": str(self.run.best)},
        }

    def _dense(self, seconds: float, counts: Mapping[str, int]) -> dict[str, Any]:
        """Estimate how long the same run takes densely; a run that skips nothing is that dense run."""
        if self.config.methods == MethodSettings():
            return itself(seconds)
        work = Work(seconds, counts["macs_done"], counts["instances_seen"], block_size(self.learner))
        return time_dense(self.learner, work, self._batches_again)

    def _batches_again(self, size: int) -> Iterable[Batch]:
        """Return batches of so many instances, prepared as those of the run."""
        augmentation = Augmentation.parse(self.config.data.augment)
        batches = training_batches(self.learner, self.training, size, augmentation=augmentation)
        return until_stopped(self, batches)


def _check_augmentation(config: Config, training: Dataset) -> None:
    """Try the augmentation on one image of the data's shape, before there is a run folder."""
    augmentation = Augmentation.parse(config.data.augment)
    augmentation(np.zeros((1, *training.input_shape), np.float32), np.random.default_rng(0))


def _environment(training: Dataset, validation: Dataset) -> dict[str, Any]:
    return {"edgetrain": edgetrain.__version__, "host": host_facts(), "data": describe_data(training, validation)}


def _introduce(display: Display, run: Run, learner: Learner, config: Config, profile: DeviceProfile) -> None:
    device, recipe = config.device, config.training
    display.say(
        f"{run.path}: {config.model.name} ({learner.graph.parameter_count:,} parameters) on {config.data.source}, "
        f"{count(recipe.epochs, 'epoch')}, batch size {device.batch_size}, {recipe.optimizer} with lr {recipe.lr:g}, "
        f"{count(device.threads, 'thread')}, seed {recipe.seed}"
    )
    if learner.sparsity is not None:
        display.say(f"sparsity {config.methods.sparsity}: {learner.topology.beginning}")
    tell_surprises(display, profile, learner, config)


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


def _where(learner: Learner, training: Dataset) -> str:
    position, batches = learner.position, batch_count(len(training), block_size(learner))
    return f"in epoch {position.epoch + 1} after batch {position.batch} of {batches}"


def _last_line(result: dict[str, Any], held_out: str) -> str:
    return (
        f"{held_out} accuracy {result['accuracy']:.4f} after {count(result['epochs'], 'epoch')} "
        f"({result['images_per_second']:,.0f} images/s on this machine); "
        f"model: {result['files']['model']}, run: {result['run']}"
    )
