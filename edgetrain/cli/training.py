"""``fit`` and ``resume``: one run folder, from the first step to the last line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import edgetrain
from edgetrain.checkpoint import load_checkpoint, save_checkpoint
from edgetrain.cli.config import Config, MethodSettings, check_stream, dense, from_flags, from_run
from edgetrain.cli.output import count, duration, emit
from edgetrain.cli.progress import CompileNotice, Display, choose_display, resident_mib
from edgetrain.cli.savings import layers_text, savings_of, savings_text, time_dense
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.sources import check_classes, describe_data, load_splits, make_graph, make_learner
from edgetrain.cli.streaming import baseline_run, fit_stream, resume_stream
from edgetrain.cli.unchanged import check_unchanged
from edgetrain.data import Augmentation, Dataset, batch_count
from edgetrain.devices import DeviceProfile, host_facts
from edgetrain.errors import DataError, InterruptedRunError, NumericalError, UsageError
from edgetrain.fitting import StepEvent, block_size, check_fits, fit_loop
from edgetrain.history import COUNTED, EpochRecord
from edgetrain.layer_report import layer_report
from edgetrain.runs import Run, create_run, open_run, runs_released

if TYPE_CHECKING:
    from edgetrain.learner import Learner


def fit_command(flags: Mapping[str, Any]) -> None:
    """Train in a new run folder; ``flags`` are the parameters of the command."""
    config, profile = from_flags(flags)
    display = choose_display(flags["quiet"], flags["json"], config.device.memory_budget_mib)
    with runs_released(), _Closing(display):
        if config.stream.enabled:
            fit_stream(flags, config, profile, display)
            return
        training, validation, held_out = load_splits(config)
        graph = make_graph(config, training)
        check_classes(graph, training)
        for dataset in (training, validation):
            check_fits(graph, dataset)
        _check_augmentation(config, training)
        with CompileNotice(display.compiling):
            learner = make_learner(config, graph, profile)
            learner.training_plan()  # compiles, and checks the memory budget, before there is a run folder
        if config.model.initial_weights is not None:
            display.say(str(learner.load_parameters(config.model.initial_weights)))
        run = create_run(flags["out"], "fit")
        # The configuration comes last: a folder that has one can be resumed, even if the power fails right now.
        save_checkpoint(learner, run.last)
        run.write_environment(_environment(training, validation))
        run.write_metrics(())
        run.write_config(config.to_dict())
        run.log("started", edgetrain=edgetrain.__version__)
        _introduce(display, run, learner, config, profile)
        session = _Session(run, learner, config, display, training, validation, held_out)
        session.train()
        session.conclude()
        session.tell(flags["json"], _baseline(session, profile) if flags["baseline"] else None)


def _baseline(session: _Session, profile: DeviceProfile) -> dict[str, Any]:
    """Train the same run densely in a folder inside the run folder; return its time and accuracy."""
    config = dense(session.config)
    learner = make_learner(config, make_graph(config, session.training), profile)
    if config.model.initial_weights is not None:
        learner.load_parameters(config.model.initial_weights)
    run = baseline_run(session.run, config)
    save_checkpoint(learner, run.last)
    session.display.say(f"{session.run.path} is done; {run.path}: the same run, dense")
    twin = _Session(run, learner, config, session.display, session.training, session.validation, session.held_out)
    twin.train()
    twin.conclude()
    return {
        "seconds": sum(learner.history.column("seconds")), "accuracy": learner.history.epochs[-1].validation_accuracy,
        "how": "measured, the same run without the methods", "run": str(run.path),
    }  # fmt: skip


def resume_command(path: Path, *, epochs: int | None, threads: int | None, quiet: bool, as_json: bool) -> None:
    """Go on in an existing run folder."""
    run = open_run(path)
    with runs_released():
        run.lock()
        before = from_run(run.read_config(), run.config_file)
        config = _changed(before, epochs, threads)
        check_unchanged(run, config)
        display = choose_display(quiet, as_json, config.device.memory_budget_mib)
        with _Closing(display):
            if config.stream.enabled:
                resume_stream(run, config, display, as_json)
            else:
                _resume(run, before, config, display, as_json)


def _resume(run: Run, before: Config, config: Config, display: Display, as_json: bool) -> None:
    with CompileNotice(display.compiling):
        learner = load_checkpoint(run.last)
        learner.threads = config.device.threads
        learner.training_plan()
    training, validation, held_out = load_splits(config)
    _check_same_data(run, training, validation)
    _refuse_finished(run, learner, config)
    _renew_best(run, learner)
    # A finished run that gets more epochs goes on as if it had been asked for them from the start.
    learner.history.finished = False
    run.write_config(config.to_dict())
    run.write_metrics(learner.history.epochs)
    changes = _differences(before, config)
    run.log("resumed", epoch=learner.position.epoch, batch=learner.position.batch, changes=changes)
    has_epochs_left = learner.position.epoch < config.training.epochs
    display.say(f"resuming {run.path} {_where(learner, training) if has_epochs_left else 'to write its last files'}")
    for change in changes:
        display.say(f"changed: {change}")
    session = _Session(run, learner, config, display, training, validation, held_out)
    session.train()
    session.conclude()
    session.tell(as_json)


@dataclass
class _Session:
    """One process' part of a run."""

    run: Run
    learner: Learner
    config: Config
    display: Display
    training: Dataset
    validation: Dataset
    held_out: str
    _saved_at: float = field(default_factory=time.monotonic)

    def train(self) -> None:
        """Train to the last epoch.

        Raises:
            InterruptedRunError: a signal asked to stop; the state is saved.
        """
        self.display.begin(self.config.training.epochs, self.held_out)
        with StopOnSignal(self.display) as stop, CompileNotice(self.display.compiling):
            try:
                history = fit_loop(
                    self.learner, self.training, self.config.training.epochs, validation=self.validation,
                    augmentation=self.config.data.augment, normalize=self.config.data.normalize,
                    on_step=self._on_step, on_epoch=self._on_epoch, should_stop=stop.requested,
                )  # fmt: skip
            except NumericalError as error:
                self._save()
                self.run.log("failed", error=str(error))
                raise NumericalError(f"{error}; the state before it is saved in {self.run.last}") from error
            if not history.finished:
                self._interrupt()

    def conclude(self) -> None:
        """Write the last checkpoint and the ONNX file: the run is then finished, whatever becomes of its account."""
        save_checkpoint(self.learner, self.run.last)
        if not self.run.best.exists():
            save_checkpoint(self.learner, self.run.best)
        self.learner.export_onnx(self.run.model)
        last = self.learner.history.epochs[-1]
        self.run.log("finished", accuracy=last.validation_accuracy, loss=last.validation_loss)

    def tell(self, as_json: bool, baseline: Mapping[str, Any] | None = None) -> None:
        """Print the last lines, with what was saved; ``baseline``: time and accuracy of the same run, dense."""
        result = self._result(baseline)
        account = {key: result[key] for key in ("savings", "layers", "topology") if key in result}
        if account:
            self.run.log("account", **account)
        self.display.close()
        lines = [layers_text(result["layers"], result["topology"])] if "layers" in result else []
        lines += [savings_text(result["savings"])] if "savings" in result else []
        emit(result, "\n".join([*lines, _last_line(result, self.held_out)]), as_json)

    def _on_step(self, event: StepEvent) -> None:
        self.display.step(event)
        if time.monotonic() - self._saved_at > 60 * self.config.training.save_every_minutes:
            self._save()

    def _on_epoch(self, record: EpochRecord) -> None:
        self._save()
        if self.learner.history.best() is record:
            save_checkpoint(self.learner, self.run.best)
        self.run.add_metrics(record)
        self.run.log("epoch", epoch=record.epoch, validation_accuracy=record.validation_accuracy)
        self.display.epoch(record)

    def _save(self) -> None:
        save_checkpoint(self.learner, self.run.last)
        self._saved_at = time.monotonic()

    def _interrupt(self) -> None:
        self._save()
        where = _where(self.learner, self.training)
        self.run.log("interrupted", epoch=self.learner.position.epoch, batch=self.learner.position.batch)
        raise InterruptedRunError(
            f"stopped {where}; the state is saved in {self.run.last}, go on with: edgetrain resume {self.run.path}"
        )

    def _result(self, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        history = self.learner.history
        last, best = history.epochs[-1], history.best() or history.epochs[-1]
        seconds = sum(history.column("seconds"))
        savings: dict[str, Any] = {}
        if baseline is not None or self.config.methods != MethodSettings():
            counts = {name: sum(history.column(name)) for name in COUNTED}
            dense_run = baseline or time_dense(self.learner, counts["instances_seen"])
            savings = {"savings": savings_of(counts, seconds, dense_run)}
        if self.learner.sparsity is not None:
            savings["layers"] = [layer.to_dict() for layer in layer_report(self.learner)]
            savings["topology"] = self.learner.topology.account()
        return savings | {
            "run": str(self.run.path),
            "model": self.config.model.name,
            "data": self.config.data.source,
            "profile": self.config.device.profile,
            "epochs": len(history),
            "validated_on": self.held_out,
            "loss": last.validation_loss,
            "accuracy": last.validation_accuracy,
            "best_epoch": best.epoch,
            "best_accuracy": best.validation_accuracy,
            "seconds": seconds,
            "images_per_second": sum(history.column("instances_seen")) / seconds if seconds else 0.0,
            "memory_mib": resident_mib(),
            "files": {"model": str(self.run.model), "last": str(self.run.last), "best": str(self.run.best)},
        }


class _Closing:
    def __init__(self, display: Display) -> None:
        self._display = display

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        self._display.close()


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
        display.say(f"sparsity {config.methods.sparsity}: {learner.topology.start}")
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


def _check_same_data(run: Run, training: Dataset, validation: Dataset) -> None:
    stored, found = run.read_environment().get("data"), describe_data(training, validation)
    if not isinstance(stored, Mapping) or stored == found:
        return
    key = next(key for key in found if found[key] != stored.get(key))
    raise DataError(
        f"{run.path}: the data changed since the run began ({key} was {stored.get(key)}, is {found[key]}); "
        "bring the old data back, or start a new run with: edgetrain fit"
    )


def _refuse_finished(run: Run, learner: Learner, config: Config) -> None:
    """Refuse a run with nothing left; one whose ending was cut off still lacks its last files."""
    done, epochs = learner.position.epoch, config.training.epochs
    is_whole = run.status() == "finished" and run.model.exists()
    if done < epochs or (done == epochs and not learner.position.batch and not is_whole):
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
        f"in {duration(result['seconds'])} ({result['images_per_second']:,.0f} images/s on this machine); "
        f"model: {result['files']['model']}, run: {result['run']}"
    )
