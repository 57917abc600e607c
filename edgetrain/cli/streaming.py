"""``fit --stream`` and resuming it: a run folder, and instances in order, once."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from edgetrain._version import __version__
from edgetrain.checkpoint import load_checkpoint, save_checkpoint
from edgetrain.cli.config import Config, dense
from edgetrain.cli.output import count, duration, emit
from edgetrain.cli.progress import CompileNotice, Display, resident_mib
from edgetrain.cli.savings import savings_of, savings_text, time_dense
from edgetrain.cli.signals import StopOnSignal
from edgetrain.cli.sources import image_size_of, make_learner
from edgetrain.data import Dataset, available_splits, load_dataset
from edgetrain.data.images import deviation_to_divide_by
from edgetrain.data.streaming import STANDARD_INPUT, InstanceSource, open_stream
from edgetrain.devices import DeviceProfile, host_facts
from edgetrain.errors import DataError, EdgetrainError, InterruptedRunError, UsageError
from edgetrain.fitting import block_size, evaluate_dataset
from edgetrain.graph import Normalization
from edgetrain.history import EpochRecord, Totals
from edgetrain.runs import Run, create_run

if TYPE_CHECKING:
    from edgetrain.graph import Graph
    from edgetrain.learner import Learner
    from edgetrain.stream import InstanceStream

# Images whose deviation is below one grey level are as good as dark: their noise says nothing about what comes later.
_GREY_LEVEL = 1 / 255


def fit_stream(flags: Mapping[str, Any], config: Config, profile: DeviceProfile, display: Display) -> None:
    """Learn from a stream in a new run folder."""
    if flags["baseline"] and config.data.source == STANDARD_INPUT:
        raise UsageError("--baseline needs the data twice, standard input comes once; use a file or a folder")
    graph = stream_graph(config)
    source = stream_source(config, graph)
    learner = _new_learner(config, graph, source, profile, display)
    run = create_run(flags["out"], "fit")
    save_checkpoint(learner, run.last)
    environment = {"edgetrain": __version__, "host": host_facts(), "data": {"name": source.name, "count": source.count}}
    run.write_environment(environment)
    _begin(run, config)
    display.say(
        f"{run.path}: {config.model.name} ({graph.parameter_count:,} parameters) learns from the stream {source.name}, "
        f"micro-batches of {learner.batch_size}, instance filter {config.methods.filter}"
    )
    session = StreamSession(run, learner, config, display, source)
    session.train()
    session.conclude()
    session.tell(flags["json"], _baseline(session, profile) if flags["baseline"] else None)


def resume_stream(run: Run, config: Config, display: Display, as_json: bool) -> None:
    """Go on in a run folder: a file or a folder where the stream was left, standard input with what comes now."""
    with CompileNotice(display.compiling):
        learner = load_checkpoint(run.last)
        learner.threads = config.device.threads
        learner.training_plan()
    done = learner.stream.position // config.stream.window
    run.keep_metrics(done)
    source = stream_source(config, learner.graph)
    over = source.count is not None and learner.stream.position >= source.count
    if over and run.status() == "finished" and run.model.exists():
        raise UsageError(f"{run.path}: all {source.count:,} instances of the stream are done, nothing is left")
    run.log("resumed", instances=learner.stream.position)
    display.say(f"resuming {run.path} after {learner.stream.position:,} instances")
    session = StreamSession(run, learner, config, display, source)
    if not over:
        session.train()
    session.conclude()
    session.tell(as_json)


def baseline_run(run: Run, config: Config) -> Run:
    """Make the folder of the dense twin of a run, inside the run's folder."""
    twin = Run(run.path / "baseline")
    twin.path.mkdir()
    twin.lock()
    _begin(twin, config)
    return twin


def _begin(run: Run, config: Config) -> None:
    # The configuration comes last: a folder that has one can be resumed, even if the power fails right now.
    run.write_metrics(())
    run.write_config(config.to_dict())
    run.log("started", edgetrain=__version__)


def _new_learner(
    config: Config, graph: Graph, source: InstanceSource, profile: DeviceProfile, display: Display
) -> Learner:
    if source.class_names and not graph.class_names and len(source.class_names) == graph.output_shape[0]:
        graph.class_names = source.class_names
    with CompileNotice(display.compiling):
        learner = make_learner(config, graph, profile)
        learner.training_plan()
    if config.model.initial_weights is not None:
        display.say(str(learner.load_parameters(config.model.initial_weights)))
    if learner.sparsity is not None:
        display.say(f"sparsity {config.methods.sparsity}: {learner.topology.start}")
    return learner


def _baseline(session: StreamSession, profile: DeviceProfile) -> dict[str, Any]:
    """Learn from the same stream densely; return time and accuracy."""
    config = dense(session.config)
    graph = stream_graph(config)
    learner = _new_learner(config, graph, session.source, profile, session.display)
    twin = StreamSession(baseline_run(session.run, config), learner, config, session.display, session.source)
    session.display.say(f"{twin.run.path}: the same stream, dense")
    twin.train()
    twin.conclude()
    seconds = sum(total.seconds for total in learner.stream.totals.values())
    return {"seconds": seconds, "accuracy": twin.test_metrics.get("accuracy"), "run": str(twin.run.path),
            "how": "measured, the same stream without the methods"}  # fmt: skip


def stream_source(config: Config, graph: Graph) -> InstanceSource:
    """Return the instances of a run, after a look at whether they fit the network.

    Raises:
        DataError: they do not, or the source is bad.
    """
    source = open_stream(
        config.data.source, graph.input_shape, graph.output_shape[0], graph.class_names, image_size_of(config)
    )
    expected = graph.input_shape if len(graph.input_shape) == 3 else (graph.input_shape[0], 1, *graph.input_shape[1:])
    if source.input_shape not in (None, expected):
        raise DataError(
            f"stream '{source.name}' has instances of shape {source.input_shape}, but the network '{graph.name}' "
            f"expects {expected}"
        )
    if len(source.class_names) > graph.output_shape[0]:
        raise DataError(
            f"stream '{source.name}' has {len(source.class_names)} classes, but the network '{graph.name}' has "
            f"{graph.output_shape[0]} outputs"
        )
    return source


def stream_graph(config: Config) -> Graph:
    """Build the network: for the shape and the classes that the source tells, or in its own shape.

    Raises:
        UsageError, ModelError, DataError: unknown or unsuitable model, or a bad source.
    """
    from edgetrain.catalog import build_model

    name = config.model.name
    if name.lower().endswith(".onnx") or config.data.source == STANDARD_INPUT:
        return build_model(name, seed=config.training.seed)
    shape = build_model(name).input_shape
    source = open_stream(config.data.source, shape, 2, image_size=image_size_of(config))
    told = source.input_shape or shape
    fitted = (told[0], told[2]) if len(told) == 3 and told[1] == 1 and len(shape) == 2 else told
    return build_model(name, fitted, len(source.class_names), config.training.seed)


@dataclass
class StreamSession:
    """One process' part of a streaming run."""

    run: Run
    learner: Learner
    config: Config
    display: Display
    source: InstanceSource
    _saved_at: float = field(default_factory=time.monotonic)
    _rate: float = 0.0

    def train(self) -> None:
        """Learn until the stream ends.

        Raises:
            InterruptedRunError: a signal asked to stop; the state is saved.
            DataError, NumericalError, MemoryBudgetError: an instance is bad or a step failed; the state is
                saved.
        """
        learner, settings = self.learner, self.config.stream
        size = settings.block or block_size(learner)
        self.display.begin(self.config.training.epochs, "test")
        with StopOnSignal(self.display) as stop, CompileNotice(self.display.compiling):
            start = time.perf_counter()
            try:
                for x, y in self.source.blocks(size, learner.stream.position, stop.requested):
                    self._normalize(x)
                    try:
                        learner.observe(x, y, predict=settings.predict)
                    finally:
                        start = self._count(start)
                    self.display.instances(learner.stream.position, self.source.count, learner.history.running)
                    self._after(len(y))
                    # A live source ends by itself, after the instances that it has taken: nobody could give them again.
                    if self.source.count is not None and stop.requested():
                        break
            except EdgetrainError as error:
                self._fail(error)
            if stop.requested():
                self._interrupt()
            if not learner.stream.position:
                self.run.log("failed", error="no instance")
                raise DataError(
                    f"{self.source.name}: ended without an instance, expected at least one; nothing was learned; when "
                    f"there are some, go on with: edgetrain resume {self.run.path}"
                )
            self._end()

    @functools.cached_property
    def test_metrics(self) -> dict[str, float]:
        """Loss and accuracy on the test data of the source, after the stream; empty when it has none."""
        test = self._test_data()
        return {} if test is None else evaluate_dataset(self.learner, test)

    def result(self, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return what the run gave; ``baseline``: time and accuracy of the same stream, dense."""
        learner, stream, metrics = self.learner, self.learner.stream, self.test_metrics
        total = stream.totals["predict" if self.config.stream.predict else "train"]
        # Those that wait cost nothing yet, so dense training must not be charged for them.
        done = total.instances_seen - stream.waiting
        account = savings_of(total.counts(), total.seconds, baseline or time_dense(learner, done))
        return {
            "run": str(self.run.path), "model": self.config.model.name, "data": self.config.data.source,
            "profile": self.config.device.profile, "instances": stream.position,
            "instances_waiting": stream.waiting,
            "mode": "predict and train" if self.config.stream.predict else "train only",
            "running_accuracy": stream.accuracy, "recent_accuracy": stream.recent_accuracy,
            "loss": metrics.get("loss"), "accuracy": metrics.get("accuracy"), "seconds": total.seconds,
            "images_per_second": total.images_per_second, "memory_mib": resident_mib(), "savings": account,
            "filter": stream.facts,
            "files": {"model": str(self.run.model), "last": str(self.run.last), "best": str(self.run.best)},
        }  # fmt: skip

    def conclude(self) -> None:
        """Write the last checkpoint and the ONNX file: the run is then finished, whatever becomes of its account."""
        save_checkpoint(self.learner, self.run.last)
        save_checkpoint(self.learner, self.run.best)
        self.learner.export_onnx(self.run.model)
        accuracy = self.test_metrics.get("accuracy")
        self.run.log("finished", instances=self.learner.stream.position, accuracy=accuracy)

    def tell(self, as_json: bool, baseline: Mapping[str, Any] | None = None) -> None:
        """Print the last lines, with what was saved; ``baseline``: time and accuracy of the same stream, dense."""
        result = self.result(baseline)
        self.display.close()
        emit(result, f"{savings_text(result['savings'])}\n{_last_line(result)}", as_json)

    def _normalize(self, x: NDArray[np.float32]) -> None:
        """Give a network without input normalisation that of the first block; a stream cannot be looked at twice."""
        learner = self.learner
        if not self.config.data.normalize or learner.graph.normalization is not None or learner.stream.position:
            return
        axes = (0, *range(2, x.ndim))
        mean, deviation = x.mean(axes, dtype=np.float64), x.std(axes, dtype=np.float64)
        std = deviation_to_divide_by(mean, deviation, _GREY_LEVEL if _are_pixels(x) else 0.0)
        learner.graph.normalization = Normalization(mean.astype(np.float32), std)

    def _count(self, start: float) -> float:
        """Count what the latest ``observe`` did, whose data came from ``start`` on; return the time now."""
        now, result = time.perf_counter(), self.learner.stream.latest
        if result is not None:
            judged = result.instances_seen if self.config.stream.predict else result.instances_trained
            self.learner.history.running.add(result, now - start, judged)
        return now

    def _after(self, count: int) -> None:
        position, window = self.learner.stream.position, self.config.stream.window
        if position // window > (position - count) // window:
            self._row(position // window)
        if time.monotonic() - self._saved_at > 60 * self.config.training.save_every_minutes:
            self._save()

    def _row(self, number: int) -> None:
        """Write a row about the instances since the last one."""
        learner, total = self.learner, self.learner.history.running
        learner.history.running = Totals()
        record = EpochRecord(
            epoch=number, steps=learner.step_count, loss=total.mean_loss if total.judged else math.nan,
            accuracy=total.accuracy if total.judged else math.nan, validation_loss=None, validation_accuracy=None,
            lr=float(learner.optimizer.lr_at(max(learner.step_count - 1, 0))), seconds=total.seconds,
            images_per_second=total.images_per_second, **total.counts(),
        )  # fmt: skip
        # The row comes first: one that its checkpoint does not know is taken back on resuming.
        self.run.add_metrics(record)
        self._save()
        self.display.say(stream_line(learner.stream, self.source.count, record, self.config.stream.predict))

    def _end(self) -> None:
        # What waits for its micro-batch stays in the checkpoint: the source may have grown when the run is resumed.
        if self.learner.history.running.instances_seen:
            self._row(self.learner.stream.position // self.config.stream.window + 1)

    def _save(self) -> None:
        save_checkpoint(self.learner, self.run.last)
        self._saved_at = time.monotonic()

    def _fail(self, error: EdgetrainError) -> NoReturn:
        self._save()
        position = self.learner.stream.position
        self.run.log("failed", error=str(error), instances=position)
        raise type(error)(
            f"{error}; the state after {position:,} instances is saved in {self.run.last}, go on with: "
            f"edgetrain resume {self.run.path}"
        ) from error

    def _interrupt(self) -> None:
        self._save()
        position = self.learner.stream.position
        self.run.log("interrupted", instances=position)
        raise InterruptedRunError(
            f"stopped after {position:,} instances; the state is saved in {self.run.last}, go on with: "
            f"edgetrain resume {self.run.path}"
        )

    def _test_data(self) -> Dataset | None:
        source = self.config.data.source
        if source == STANDARD_INPUT or "test" not in available_splits(source):
            return None
        return load_dataset(source, split="test", **self._image_options())

    def _image_options(self) -> dict[str, Any]:
        from edgetrain.data.readers import is_image_folder

        shape, path = self.learner.graph.input_shape, Path(self.config.data.source)
        if not path.is_dir() or not is_image_folder(path):
            return {}
        return {"image_size": shape[1:], "channels": shape[0]}


def _are_pixels(x: NDArray[np.float32]) -> bool:
    """Tell whether all values are whole numbers of grey levels, as those of 8-bit images are."""
    return x.min() >= 0 and x.max() <= 1 and np.array_equal(x, np.rint(x * 255) / np.float32(255))


def stream_line(stream: InstanceStream, length: int | None, record: EpochRecord, predict: bool) -> str:
    """Return a line about a window of a stream of so many instances, ``None`` when that is unknown."""
    parts = [f"{stream.position:,}" if length is None else f"{stream.position:,}/{length:,}"]
    if math.isnan(record.loss):
        parts.append(f"no step, {_waiting(stream.waiting)}")
    else:
        what = "accuracy before learning" if predict else "accuracy of those trained on"
        parts += [f"loss {record.loss:.4f}", f"{what} {record.accuracy:.4f}"]
    parts.append(f"kept {record.instances_kept / max(record.instances_seen, 1):.0%}")
    if record.macs_dense:
        parts.append(f"computed {record.macs_done / record.macs_dense:.0%}")
    return "  ".join([*parts, f"{record.images_per_second:,.0f} images/s"])


def _waiting(number: int) -> str:
    return f"{count(number, 'instance')} waiting for a full micro-batch"


def _last_line(result: dict[str, Any]) -> str:
    parts = [f"{count(result['instances'], 'instance')} in {duration(result['seconds'])}, {result['mode']}"]
    if result["mode"] == "predict and train":
        running, recent = result["running_accuracy"], result["recent_accuracy"]
        parts.append(f"accuracy before learning {running:.4f}, of late {recent:.4f}")
    if result["accuracy"] is not None:
        parts.append(f"test accuracy {result['accuracy']:.4f}")
    if result["instances_waiting"]:
        parts.append(_waiting(result["instances_waiting"]))
    return "; ".join([*parts, f"model: {result['files']['model']}, run: {result['run']}"])
