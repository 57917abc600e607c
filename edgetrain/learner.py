"""The learner: one network, one training step, predictions. This is where the floors below meet.

A training step: check x and y at the door, hand their addresses to the program, run
it (forward, backward, check, update), report. ``plans.py`` makes the program, once per
number of samples.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.accounting import StepResult
from edgetrain.arguments import graph_of, integer_of, loss_of, optimizer_of, profile_of, smoothing_of, threads_of
from edgetrain.arrays import Checked, batch_of, labels_of, sample_count, targets_of
from edgetrain.autodiff import TARGET
from edgetrain.checkpoint import load_checkpoint, save_checkpoint
from edgetrain.data import Augmentation
from edgetrain.devices import DeviceProfile
from edgetrain.diagnosis import explain_outputs, explain_step
from edgetrain.errors import CheckpointError, DataError, UsageError
from edgetrain.executor import Executor, Team
from edgetrain.filters import InstanceFilter
from edgetrain.fitting import Data, StepEvent, fit_loop
from edgetrain.forking import ForkLock, NotCopied
from edgetrain.graph import FixedNames, Graph
from edgetrain.history import EpochRecord, History, Position
from edgetrain.kernels.registry import KernelKey, compile_kernels, interpreter, working_clock
from edgetrain.learner_state import restore_state, state_of
from edgetrain.losses import probabilities_of, sample_losses
from edgetrain.lowering_products import whole_gradient_name
from edgetrain.optim import SGD, Optimizer
from edgetrain.parameters import Parameters
from edgetrain.plan import Plan
from edgetrain.plans import MemoryPlan, Objective, Plans
from edgetrain.policies import as_policy
from edgetrain.pruning import ErrorPruning
from edgetrain.sparsity import SparsityPolicy, Topology
from edgetrain.stream import InstanceStream
from edgetrain.units import MIB, parse_bytes

if TYPE_CHECKING:
    from edgetrain.onnx_io import MatchReport


Inputs = ArrayLike | Mapping[str, ArrayLike]
Arrays = dict[str, NDArray[np.float32]]


class Learner(NotCopied):
    """Trains a graph and predicts with it.

    Args:
        graph: the network; it stays as it is, and its arrays take memory of their own until it is dropped.
        profile: name of a device profile, path to a TOML file, ``"host"``, or a profile.
        batch_size: samples of a usual step; the profile's by default. Any number is accepted later.
        seed: of shuffling, augmentation and dropout; 0 to 2**63 - 1.
        threads: 1 to 64, or to the number of processors if that is more; the profile's by default, at most the
            processors of this machine.
        memory_budget: bytes (or text such as ``"64MiB"``) that the plan may need, 0 for no limit; the profile's by
            default. It is checked when a plan is made: by ``prepare``, ``fit`` and the first step.
        optimizer: ``SGD``, ``Adam`` or ``AdamW``; ``SGD(lr=0.05, momentum=0.9)`` by default.
        loss: ``"cross_entropy"`` (integer labels) or ``"mse"`` (targets of the output's shape).
        label_smoothing: share of the uniform distribution in the targets (cross-entropy).
        sparsity: which weights exist: ``SWAT``, ``RigL``, ``SET`` or ``StaticSparse``; all of them by default.
        instance_filter: which instances ``fit`` and ``observe`` train on: ``EarlyInstanceFilter``,
            ``SelectiveBackprop`` or ``RandomFilter``; all of them by default. ``partial_fit`` never filters.
        error_pruning: which part of the error maps the backward pass uses: ``ErrorMapPruning`` or
            ``GradientPruning``; all of them by default.

    These three may be given as text, too: ``"rigl:weights=0.9"``, as on the command line (``policies.parse_policy``).

    Raises:
        UsageError: an argument of a wrong kind or out of range, a network that the instance filter is too large for or
            the others find no layer in, or the graph of a sparse learner (no values: ``export_onnx`` gives them).
        GraphError: ``loss="mse"`` with a file that ended in a Softmax.
        ProfileError: the profile is not there or bad.

    Example:
        >>> import edgetrain as et, numpy as np
        >>> learner = et.Learner(et.models.lenet5(), batch_size=4, threads=1)
        >>> step = learner.partial_fit(np.zeros((4, 1, 28, 28), np.float32), np.array([0, 1, 2, 3]))
        >>> step.instances_trained, learner.predict(np.zeros((2, 1, 28, 28), np.float32)).shape
        (4, (2,))
    """

    def __init__(
        self, graph: Graph, profile: str | os.PathLike[str] | DeviceProfile = "host", *, batch_size: int | None = None,
        seed: int = 0, threads: int | None = None, memory_budget: int | str | None = None,
        optimizer: Optimizer | None = None, loss: str = "cross_entropy", label_smoothing: float = 0.0,
        sparsity: SparsityPolicy | str | None = None, instance_filter: InstanceFilter | str | None = None,
        error_pruning: ErrorPruning | str | None = None,
    ) -> None:  # fmt: skip
        self.profile, self.graph = profile_of(profile), graph_of(graph).copy(share=True)
        self.graph.trainable = FixedNames(self.graph.trainable)
        self.batch_size = self.profile.batch_size if batch_size is None else integer_of("batch_size", batch_size, 1)
        self.seed, self.loss = integer_of("seed", seed, 0), loss_of(loss, self.graph)
        self.label_smoothing = smoothing_of(label_smoothing)
        budget = None if memory_budget is None else parse_bytes(memory_budget)
        self.memory_budget = self.profile.memory_budget_mib * MIB if budget is None else budget
        self._optimizer = optimizer_of(SGD(lr=0.05, momentum=0.9) if optimizer is None else optimizer)
        self.error_pruning: ErrorPruning | None = as_policy("error_pruning", error_pruning)
        self.instance_filter: InstanceFilter | None = as_policy("filter", instance_filter)
        self.position, self.history, self.step_count = Position(), History(), 0
        self.topology = Topology(self.graph, as_policy("sparsity", sparsity), self._optimizer, self.seed)
        self._parameters = Parameters(self.graph, self._optimizer, self.topology.indices)
        self.topology.attach(self._parameters)
        # The graph's arrays are the trained ones, not a second copy; until here they are those of the given one.
        self.graph.arrays = {name: self._parameters.shared(name) for name in self._parameters.names()}
        objective = Objective(self.loss, self.label_smoothing)
        self._lock = ForkLock()
        self._prepared = False
        self.plans = Plans(
            self.graph, self._parameters, self._optimizer, objective, self.batch_size, self.memory_budget,
            threads_of(threads, self.profile), self.topology, self.error_pruning,
        )  # fmt: skip
        self.stream = InstanceStream(self)
        self.plans.beside = self.stream, self.topology

    # --- settings ---

    @property
    def threads(self) -> int:
        """Number of threads; results do not depend on it."""
        return self.plans.team.threads

    @threads.setter
    def threads(self, threads: int | None) -> None:
        with self._lock:
            self.plans.use_team(Team(threads_of(threads, self.profile)))

    @property
    def averages(self) -> bool:
        """Whether averaged parameters predict: the optimizer averages them, and steps have been taken."""
        return bool(self._optimizer.averaging and self.step_count)

    @property
    def sparsity(self) -> SparsityPolicy | None:
        """The policy that decides which weights exist."""
        return self.topology.policy

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer; another one that keeps the same state may be set between steps."""
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: Optimizer) -> None:
        if optimizer_of(optimizer).kept != self._optimizer.kept:
            names = f"{self._optimizer.name} to {optimizer.name}"
            differ = "their state differs (moments, averaging or decay_bias_and_norm)"
            raise UsageError(f"cannot go from {names}: {differ}; make a new Learner")
        self._optimizer = optimizer

    # --- training ---

    def partial_fit(self, x: Inputs, y: ArrayLike) -> StepResult:
        """Take one optimizer step on exactly this batch.

        Args:
            x: float32 ``(N, *input_shape)``, or a dict of inputs by name. Integers are pixels from 0 to 255 and become
                float32 from 0 to 1, here and in all other methods. A signal ``(C, W)`` may have a row of its own, an
                image of one channel none for the channel.
            y: integer labels ``(N,)``, or float32 targets ``(N, *output_shape)`` for ``"mse"``.

        Raises:
            DataError: arrays that do not fit the network.
            NumericalError: loss or gradients are not finite; parameters are those before the step (behind the choice of
                weights that ``SWAT`` made before it, if it did; that is not made again).
            UsageError: the optimizer's schedule has no end.
            MemoryBudgetError: this batch does not fit into the memory budget.
        """
        start = working_clock()
        with self._lock:
            executor, sources, count = self._begin_step(x, y)
            if not executor.step(sources, self._end_step):
                raise explain_step(executor, count, self.step_count + 1)
            return self.plans.result(count, executor.plan, working_clock() - start)

    def observe(self, x: Inputs, y: ArrayLike, predict: bool = False) -> StepResult:
        """Take instances of a stream: the filter decides, a training step happens whenever a micro-batch is full.

        Any number of instances at a time; every call costs a look of the filter, so dozens are cheaper than one, but
        thousands take memory that the plan does not know (``memory_plan``). Filters decide by what comes together.

        Args:
            x: as for ``partial_fit``, but for networks with one input only.
            y: as for ``partial_fit``.
            predict: predict all of them before learning; ``loss`` and ``correct`` of the result are then those of the
                predictions, and ``stream.accuracy`` follows. Else they are those of the instances trained on.

        Returns:
            What happened: ``instances_kept`` of them, ``instances_trained`` now (0 until a micro-batch is full).

        Raises:
            DataError, NumericalError, UsageError, MemoryBudgetError: as ``partial_fit``. ``stream.position`` and
                ``stream.totals`` tell what was done until then (``stream.InstanceStream``).
        """
        with self._lock:
            self.stream.latest = None  # also where a check fails
            arrays = self._inputs(x)
            if len(arrays) > 1:
                raise DataError(f"observe takes networks with one input, '{self.graph.name}' has {sorted(arrays)}")
            images = arrays[self.graph.inputs[0]]
            return self.stream.observe(images, self._targets(y, len(images)), predict)

    def flush(self) -> StepResult | None:
        """Train on the instances that ``observe`` left waiting, a smaller batch than usual: where a stream ends.

        Return what happened, counted in ``stream.totals`` with the instances observed last; ``None`` when none wait.

        Raises:
            NumericalError, MemoryBudgetError: as ``partial_fit``.
        """
        with self._lock:
            return self.stream.flush(observed=True)

    def time_rows(self, x: Inputs, y: ArrayLike) -> NDArray[np.float64]:
        """Take one optimizer step like ``partial_fit`` and return the seconds of every kernel call, for diagnosis.

        Args:
            x, y: as for ``partial_fit``.

        Returns:
            float64 in the order of ``training_plan().rows``; one more at the end, that timing adds to each.

        Raises:
            DataError, NumericalError, MemoryBudgetError: as ``partial_fit``.
        """
        with self._lock:
            executor, sources, count = self._begin_step(x, y)
            seconds = executor.time_rows(sources)
            if seconds is None:
                raise explain_step(executor, count, self.step_count + 1)
            self._end_step(executor)
            return seconds

    def gradients(self, x: Inputs, y: ArrayLike) -> Arrays:
        """Return the gradients of the mean loss by parameter name, in training mode; nothing changes.

        They are those of the parameters that the next step begins with, not of averaged ones; where ``SWAT`` is about
        to choose its weights anew, of those chosen last. Weights that do not exist have the gradient 0 where nothing
        is stored for them (``RigL``, ``SET``, ``StaticSparse``).

        Args:
            x, y: as for ``partial_fit``.

        Raises:
            DataError, MemoryBudgetError: as ``partial_fit``.
        """
        with self._lock:
            executor, sources, _ = self._take_batch(x, y)
            records = self._parameters.buffers["records"].copy()
            executor.run(sources, until="backward")
            self._parameters.buffers["records"][:] = records
            trained = [name for name in self.graph.arrays if name in self.graph.trainable]
            return {name: self._parameters.dense(name, "gradients") for name in trained}

    def fit(
        self, data: Data, epochs: int = 5, *, validation: Data | None = None,
        augmentation: Augmentation | str | None = None, shuffle: bool = True, normalize: bool = True,
        on_step: Callable[[StepEvent], None] | None = None, on_epoch: Callable[[EpochRecord], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> History:  # fmt: skip
        """Train for a number of epochs; ``edgetrain.fitting.fit_loop`` tells what arguments mean and what it raises.

        ``data``: a Dataset, or a pair (x, y) as for ``partial_fit``; with ``"mse"`` a pair.
        """
        return fit_loop(
            self, data, epochs, validation=validation, augmentation=augmentation, shuffle=shuffle, normalize=normalize,
            on_step=on_step, on_epoch=on_epoch, should_stop=should_stop,
        )  # fmt: skip

    # --- predictions ---

    def logits(self, x: Inputs, averaged: bool = True) -> NDArray[np.float32]:
        """Return the network's raw outputs float32 ``(N, *output_shape)`` in inference mode.

        Args:
            x: as for ``partial_fit``, any N.
            averaged: with the averaged parameters if the optimizer averages them (``averaging``), as all methods that
                predict; ``False``: with those that the next step begins with.

        Raises:
            DataError: arrays that do not fit the network.
            NumericalError: an output is not finite, here and in all methods that predict.
        """
        arrays = self._inputs(x)
        total, size = sample_count(arrays), self.batch_size
        with self._lock:
            buffer = "average" if averaged and self.averages else "weights"
            starts = range(0, total, size)
            parts = [self._forward({n: a[i : i + size] for n, a in arrays.items()}, buffer) for i in starts]
        outputs = parts[0] if len(parts) == 1 else np.concatenate(parts)
        if not np.isfinite(outputs).all():
            raise explain_outputs(self.graph.name, outputs, self._arrays(buffer))
        return outputs

    def predict(self, x: Inputs) -> NDArray[np.int64]:
        """Return the most probable class of every sample, int64 ``(N,)``; x as for ``partial_fit``.

        Raises:
            GraphError: the network's outputs are no vectors of logits, here and in ``predict_proba`` and ``evaluate``.
        """
        classes = self.graph.num_classes
        labels: NDArray[np.int64] = self.logits(x).reshape(-1, classes).argmax(1)
        return labels

    def predict_proba(self, x: Inputs) -> NDArray[np.float32]:
        """Return class probabilities float32 ``(N, num_classes)``; x as for ``partial_fit``."""
        classes = self.graph.num_classes
        return probabilities_of(self.logits(x).reshape(-1, classes))

    def evaluate(self, x: Inputs, y: ArrayLike) -> dict[str, float]:
        """Return ``{"loss": mean loss, "accuracy": share of right predictions}`` in inference mode.

        Args:
            x: as for ``partial_fit``.
            y: as for ``partial_fit``. With ``"mse"`` there is no accuracy: it is NaN.
        """
        logits = self.logits(x)
        targets = self._targets(y, len(logits))
        accuracy = math.nan if self.loss == "mse" else float((logits.argmax(1) == targets).mean())
        return {"loss": float(sample_losses(logits, targets, self.loss).mean()), "accuracy": accuracy}

    def score(self, x: Inputs, y: ArrayLike) -> float:
        """Return the accuracy, as scikit-learn does; x and y as for ``partial_fit``."""
        return self.evaluate(x, y)["accuracy"]

    # --- parameters and state ---

    def parameters(self) -> Arrays:
        """Return copies of all arrays (running averages included) by ONNX initializer name, in ONNX layout.

        They are those of the network that predicts: weights that do not exist are 0, and all are averaged if the
        optimizer does that (``averaging``).
        """
        with self._lock:  # never the middle of a step of another thread
            return self._arrays("average" if self.averages else "weights")

    def load_parameters(self, source: str | os.PathLike[str] | Mapping[str, ArrayLike]) -> MatchReport:
        """Take initial values from arrays by name, or from an ONNX file; return what matched.

        Arrays are matched by name and shape; those of the same network under other names by their order, if all of
        them pair up (``onnx_io.match_parameters``). Arrays with another name or shape, such as another last layer,
        keep their values; the report lists them. In sparse layers the largest of the given weights exist from now on,
        unless the policy says otherwise (``initial_pattern``, ``rescale``). How many is fixed when the learner is made:
        weights with other densities lose some (``MatchReport.thinned``), even if they are sparse enough in all. To go
        on with their pattern, make the learner from a graph that has them: of ``load_onnx``, or with its ``arrays``
        replaced and ``trained`` set. An average of the parameters goes on from the given values.
        A file of edgetrain's brings its normalisation of inputs; beside arrays set ``learner.graph.normalization``.

        Raises:
            ModelError: nothing or next to nothing matches, or an array holds NaN or infinite numbers; nothing has
                changed then.
        """
        from edgetrain.onnx_io import match_parameters

        arrays, report = match_parameters(self.graph, source)
        with self._lock:
            self._parameters.load(self.topology.adopt(arrays))
            report.mark(self.graph)
            return replace(report, thinned=self.topology.thinned(arrays))

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return (tensors, plain data): all that training changes but the graph's own, as normalisation of inputs."""
        with self._lock:
            return state_of(self)

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
        """Take the state that ``state`` returned.

        Raises:
            CheckpointError: it belongs to another network, optimizer or instance filter; nothing has changed.
        """
        with self._lock:
            try:
                restore_state(self, tensors, meta)
            except KeyError as error:
                raise CheckpointError(f"the state is not whole: it has no {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a checkpoint: everything needed to go on exactly.

        Raises:
            CheckpointError: the file cannot be written.
        """
        with self._lock:
            save_checkpoint(self, path)

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Learner:
        """Return the learner of a checkpoint.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return load_checkpoint(path)

    def export_onnx(self, path: str | os.PathLike[str]) -> None:
        """Write the network that predicts (``parameters``), input normalisation included.

        Weights that do not exist are zeros; the file's metadata tell the policy and the share of non-zeros of every
        sparse layer, without a policy that of layers that have zeros. Weights that have just grown are zeros, too.

        Raises:
            UsageError: the file cannot be written there.
        """
        from edgetrain.onnx_io import save_onnx

        arrays = self.parameters()
        save_onnx(self.graph, path, arrays=arrays, metadata=self.topology.describe(self.graph, arrays))

    # --- plans ---

    def memory_plan(self, batch_size: int | None = None) -> MemoryPlan:
        """Return the bytes that training steps of ``batch_size`` samples need, the instance filter's included.

        Of what waits for a step, and for the filter to learn from, they are the bytes between calls. While one call
        works through many instances, copies of those that are kept and of those that the filter puts aside come on top.

        Raises:
            UsageError: ``batch_size`` is no integer of at least 1.
        """
        with self._lock:
            return self.plans.memory(self.plans.budget_plan(self._samples(batch_size)))

    def training_plan(self, batch_size: int | None = None) -> Plan:
        """Return the plan of a training step: its rows, layouts and offsets, to look at.

        Raises:
            UsageError: ``batch_size`` is no integer of at least 1.
            MemoryBudgetError: the plan does not fit into the budget.
        """
        with self._lock:
            return self.plans.executor(True, self._samples(batch_size)).plan

    def kernels(self) -> list[KernelKey]:
        """Return the kernels that training steps and predictions of ``batch_size`` samples need, and of very few.

        With dense weights they serve any number up to ``batch_size``. Lists of weights may take others for numbers in
        between, such as a smaller last batch. Those of the instance filter's own network are among them. Nothing is
        compiled; ``prepare`` does that.
        """
        with self._lock:
            return list(dict.fromkeys([*self.plans.kernels(), *self.stream.kernels()]))

    def prepare(self) -> None:
        """Compile all of ``kernels``, so that the steps and predictions they are for wait for no compiler.

        ``fit`` begins with it. What another number of samples needs is compiled when it first comes.

        Raises:
            MemoryBudgetError: a training step does not fit into the budget.
        """
        if self._prepared:
            return
        with self._lock:
            self.training_plan()  # the budget first: compiling takes long
            interpreter()
            compile_kernels(self.kernels())
            self._prepared = True

    def _samples(self, batch_size: int | None) -> int:
        return self.batch_size if batch_size is None else integer_of("batch_size", batch_size, 1)

    # --- inside a step ---

    def _begin_step(self, x: Inputs, y: ArrayLike) -> tuple[Executor, Arrays, int]:
        """Make an optimizer step ready: the batch, the topology, the optimizer's numbers."""
        whole = self.topology.wants_gradients_at(self.step_count)
        taken = self._take_batch(x, y, whole)
        if self.topology.begin_step(self.step_count):
            taken = self._take_batch(x, y, whole)  # which products run on lists may be another matter now
        settings: NDArray[np.float32] = self._parameters.buffers["settings"]  # type: ignore[assignment]  # float32
        self._optimizer.fill(settings, self.step_count)
        return taken

    def _end_step(self, executor: Executor) -> None:
        """Count a step that was taken; the topology may change after it."""
        step, values = self.step_count, self.graph.values
        self.step_count, self.graph.trained = step + 1, True  # first: whatever breaks in finds it counted
        self.topology.end_step(step, lambda n: executor.kept(whole_gradient_name(n), values[n].shape))

    def _take_batch(self, x: Inputs, y: ArrayLike, whole_gradients: bool = False) -> tuple[Executor, Arrays, int]:
        """Check a batch, and put its labels and all that belongs to it where kernels read them."""
        arrays = self._inputs(x)
        count = sample_count(arrays)
        targets = self._targets(y, count)  # before a plan is made for a bad batch
        executor = self.plans.executor(True, count, whole_gradients)
        if self.loss == "mse":
            arrays[TARGET] = targets
        else:
            executor.plan.fixed["labels"][:count] = targets
        self._tell_kernels(executor, count)
        return executor, {f"source:{name}": array for name, array in arrays.items()}, count

    def _targets(self, y: ArrayLike, count: int) -> NDArray[Any]:
        """Check the labels or targets of ``count`` samples."""
        if self.loss == "mse":
            return targets_of(y, count, self.graph.output_shape)
        return labels_of(y, count, self.graph.num_classes)

    def _tell_kernels(self, executor: Executor, count: int) -> None:
        """Put the number of samples, the counters and the scaling of the first input where kernels read them."""
        executor.mask(count)
        self._parameters.buffers["state"][:3] = count, self.step_count, self.seed
        self._parameters.scale_input(self.graph.normalization)

    def _forward(self, arrays: Arrays, buffer: str) -> NDArray[np.float32]:
        count = sample_count(arrays)
        executor = self.plans.executor(False, count, buffer=buffer)
        self._tell_kernels(executor, count)
        executor.run({f"source:{name}": array for name, array in arrays.items()})
        return executor.value(self.graph.values[self.graph.outputs[0]], count)

    def _inputs(self, x: Inputs) -> Arrays:
        if isinstance(x, Checked):
            return dict(x)
        names, values = self.graph.inputs, self.graph.values
        if len(names) == 1 and not isinstance(x, Mapping):  # what most steps do, 3 us sooner
            return {names[0]: batch_of(x, values[names[0]].shape)}
        given = x if isinstance(x, Mapping) else {names[0]: x}
        if set(given) != set(names):
            raise DataError(f"x: inputs {sorted(given)} given, the network '{self.graph.name}' expects {sorted(names)}")
        return {n: batch_of(given[n], values[n].shape, "x" if len(names) == 1 else n) for n in names}

    def _arrays(self, buffer: str) -> Arrays:
        return {name: self._parameters.dense(name, buffer) for name in self._parameters.names()}
