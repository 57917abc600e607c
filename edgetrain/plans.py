"""The plans of one network: made once per number of samples, checked against the memory budget, kept for reuse.

A plan is a training step or a prediction lowered to a table of kernel calls: ``autodiff.training_graph``, then
``lowering.Lowering``, then ``memory.place``. All plans of a network share one arena and one team of threads.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from edgetrain.accounting import StepResult
from edgetrain.autodiff import TrainingGraph, training_graph
from edgetrain.choice import simd_lanes
from edgetrain.combining import combine_gradients
from edgetrain.errors import MemoryBudgetError
from edgetrain.executor import Arena, Executor, Team
from edgetrain.graph import Graph
from edgetrain.kernels.codes import UPDATE_JOB
from edgetrain.kernels.registry import KernelKey
from edgetrain.lanes import channels_pay, sample_lanes
from edgetrain.lowering import Lowering
from edgetrain.lowering_channels import ChannelLowering, fits
from edgetrain.lowering_sparse import (
    SKIPS_WEIGHTS,
    is_read_by_bits,
    most_entries,
    moves_by_bits,
    vectors_of,
)
from edgetrain.memory import Lifetime, place
from edgetrain.ops import get_op
from edgetrain.ops.conv import Product, ProductOp, weights_of
from edgetrain.optim import Optimizer
from edgetrain.parameters import Parameters
from edgetrain.plan import Plan, Ref
from edgetrain.pooled_errors import list_pooled_errors
from edgetrain.pruning import ErrorPruning, check_error_maps
from edgetrain.sparse_index import SparseIndex
from edgetrain.sparsity import Topology
from edgetrain.units import MIB

# Plans kept for other batch sizes: full and last batch, training and prediction, and some for a stream. Where lanes
# hold channels every number of samples has a plan of its own: with 8 of them 60 predictions of 1 to 12 samples in turn
# made 60 (cnn1d; tests/test_lanes.py). A plan of MobileNetV1 has tables of 0.2 to 0.4 MiB.
_KEPT_PLANS, _KEPT_OF_CHANNELS = 8, 16
# Products that skip the zeros of an error map.
_SKIPS_ERRORS = ("ListedInputGrad", "ListedWeightGrad", "PooledInputGrad", "PooledWeightGrad")
# Batches so small nevertheless have lists of weights, and mostly empty lanes, where the lists leave at most this share
# of the operations, by batch size (a step against dense, lists and channels in the lanes, uniform densities, a tenth
# of ResNet-8's weights: at batch 1 1.29 and 1.01, 2 0.68 and 1.01, 3 0.46 and 1.00, 4 0.35 and 1.00; a fifth at batch 2
# 0.98 and 1.01; three tenths at batch 3 1.00 and 1.01, 4 0.75 and 1.00; a hundredth at batch 1 0.75 and 1.01). Or,
# where weights have few operations each, at most this share of the weights (LeNet-5 with a tenth, a twentieth and a
# hundredth of them: at batch 1 1.16, 0.88, 0.62 and 0.84, 0.84, 0.83; with three tenths and a fifth at batch 2 0.89,
# 0.79 and 0.89, 0.87). Layers with a larger share of their weights count as dense: about there lists stop being faster
# (``lowering_sparse``). So do fully connected ones that are read by bits: four of them, 512 wide, with a tenth of their
# weights took 0.90 by lists and 0.51 (batch 4).
_DENSE_SHARE = 0.33
_LEFT, _FEW_OPERATIONS = {1: 0.03, 2: 0.17, 3: 0.3, 4: 0.7}, 10
_FEW_WEIGHTS = {1: 0.03, 2: 0.22, 3: 0.3, 4: 0.3}
# Of fewer weights bits take more memory than they are worth, but where few samples read weights by them: writing out a
# tenth of 30,720 takes 4.4 us by bits and 5.4 number by number, gathering 5.1 and 3.9 (one thread).
_BITS_SHARE = 0.0625


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that training needs beyond the interpreter and the data set.

    Attributes:
        parts: bytes by purpose.
        notes: what a sparsity policy makes of a part, such as ``{"weights": "non-zeros only"}``.
    """

    parts: dict[str, int]
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """Sum of all parts."""
        return sum(self.parts.values())


class HasMemory(Protocol):
    """Something that takes memory."""

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by purpose."""


@dataclass(frozen=True)
class Objective:
    """What training minimises: ``"cross_entropy"`` or ``"mse"``, and the label smoothing of the former."""

    loss: str
    label_smoothing: float


class Plans:
    """Makes and keeps the executors of one network.

    Args:
        graph: the network; its arrays are views of ``parameters``.
        parameters: where weights, gradients and optimizer state live.
        optimizer: whose kernel updates the parameters.
        objective: the loss.
        batch_size: samples of a usual step; it decides what the lanes hold.
        budget: bytes that a training step may need; 0 for no limit.
        threads: of the team that runs the plans.
        topology: which weights exist; it may rewrite the training graph so that saved activations are thinned out.
        error_pruning: rewrites the training graph so that error maps are thinned out.

    Attributes:
        beside: what works beside the network within the same budget: the filtering of instances, changes of topology.
        latest: the executor of the latest training step, or of one that is about to begin.

    Raises:
        UsageError: the error pruning has nothing to prune.
    """

    def __init__(
        self, graph: Graph, parameters: Parameters, optimizer: Optimizer, objective: Objective, batch_size: int,
        budget: int, threads: int, topology: Topology, error_pruning: ErrorPruning | None,
    ) -> None:  # fmt: skip
        self.graph, self.parameters, self._optimizer, self._objective = graph, parameters, optimizer, objective
        self._batch_size, self._budget, self._error_pruning = batch_size, budget, error_pruning
        if error_pruning is not None:
            check_error_maps(error_pruning, training_graph(graph, objective.loss))
        self.arena, self.team, self._topology = Arena(), Team(threads), topology
        self.beside: tuple[HasMemory, ...] = ()
        self.latest: Executor | None = None
        self._executors: dict[tuple[bool, int, bool, str, tuple[bool, ...]], Executor] = {}
        self._forward_plans: dict[tuple[bool, ...], Plan] = {}  # the latest, by which weights run on lists
        self._listed: dict[int, tuple[int, tuple[bool, ...]]] = {}  # by blocks, see ``_on_lists``
        # Of one sample's step, before and after every policy has rewritten the training graph; 0 until it is made.
        self._dense_macs = self._step_macs = 0

    def use_team(self, team: Team) -> None:
        """Run the plans with another team from now on; it may be one that runs other plans too, in turns."""
        self.team = team
        self._executors.clear()

    @functools.cached_property
    def lanes(self) -> int:
        """Samples in a vector: this machine's SIMD width, less for small batches."""
        if self.by_channel:
            return simd_lanes()
        return sample_lanes(self._batch_size)

    @functools.cached_property
    def by_channel(self) -> bool:
        """Whether lanes hold channels: for batches that would leave many sample lanes empty.

        Kernels that skip something exist for lanes of samples only; with channels in the lanes sparse weights are
        written out, or read whole by bits.
        """
        pruned = self._error_pruning is not None and not self._error_pruning.idle
        if self._topology.needs_lists or pruned or not fits(self.graph.nodes):
            return False
        sparse, size = self.parameters.sparse, self._batch_size
        if size > max(_LEFT):
            return channels_pay(self.graph, size, {name: _share(index) for name, index in sparse.items()})
        return channels_pay(self.graph, size) and not _lists_pay(self.graph, sparse, size)

    @functools.cached_property
    def training(self) -> TrainingGraph:
        """The training graph; making it also makes the buffers that only training needs."""
        made = training_graph(self.graph, self._objective.loss, self._objective.label_smoothing)
        self.parameters.start_training(made.gradients, self._optimizer)
        self._dense_macs = _macs(made)
        made.densities = {name: _share(index) for name, index in self.parameters.sparse.items()}
        if self._pools_first:
            self._list_pooled_errors(made)
        self._topology.rewrite(made, 0 if self.by_channel else self.lanes)
        if self._error_pruning is not None:
            self._error_pruning.rewrite(made)
        if not self._pools_first:
            self._list_pooled_errors(made)
        if self._error_pruning is not None:
            self._error_pruning.skip(made)
        self.parameters.start_records(made.graph.nodes, made.records)
        self._step_macs = _macs(made)
        return made

    @functools.cached_property
    def _combined(self) -> TrainingGraph:
        """The training graph of steps that need no gradients of weights that do not exist."""
        if self.by_channel:
            return self.training
        return combine_gradients(self.training, self.parameters.sparse, self._blocks(self._batch_size), self.lanes)

    @property
    def step_macs(self) -> int:
        """Multiply-accumulates of one sample's training step: what the nodes of the training graph execute.

        Counted once: counting took 0.2 ms, a third of a step of LeNet-5 with batch size 8.
        """
        _ = self.training
        return self._step_macs

    @property
    def dense_macs(self) -> int:
        """Multiply-accumulates of one sample's training step without any method."""
        _ = self.training
        return self._dense_macs

    @property
    def forward_macs(self) -> int:
        """Multiply-accumulates that one sample's forward pass executes with the present topology."""
        dense = self._dense_forward_macs
        if not self.parameters.sparse:
            return dense
        key = self._on_lists(self._batch_size)
        if key not in self._forward_plans:
            self._forward_plans = {key: self.plan(False, self._batch_size)}  # to be looked at, not run
        return dense - _skipped_weights(self._forward_plans[key])

    @functools.cached_property
    def _dense_forward_macs(self) -> int:
        """Counted once: counting took a fifteenth of a filtered stream's time (LeNet-5)."""
        return self.graph.macs()

    def result(self, count: int, plan: Plan, seconds: float) -> StepResult:
        """Return what a plan's latest step of ``count`` samples gave and executed; it took ``seconds``."""
        loss, correct = self.parameters.buffers["result"][:2].tolist()
        done, saved = self.macs(count, plan)
        dense = done + sum(saved.values())
        return StepResult(loss, int(correct), count, count, dense, done, seconds, instances_kept=count, **saved)

    def macs(self, count: int, plan: Plan) -> tuple[int, dict[str, int]]:
        """Return the multiply-accumulates that a plan's latest step of ``count`` samples executed, and those saved.

        The latter by what saved them (``accounting.SAVERS``), with the names of the fields of ``StepResult``.
        """
        errors, activations = self._skipped()
        saved = {
            "saved_error_maps": self._dense_macs - self._step_macs + errors,
            "saved_weights": _skipped_weights(plan),
            "saved_activations": activations,
        }
        done = self._dense_macs - sum(saved.values())
        return count * done, {name: count * macs for name, macs in saved.items()}

    def _skipped(self) -> tuple[int, int]:
        """Return what products on lists of error maps, and of activations, skipped of a sample in the latest step.

        In plain integers, since every step does it: with those of NumPy it took 30 us where 18 products count, and
        takes 10 so.
        """
        errors = activations = 0
        tally = self.parameters.buffers["tally"].tolist() if self._counted else []
        for op_type, macs, record in self._counted:
            kept, total = tally[2 * record : 2 * record + 2]
            skipped = macs - macs * kept // max(1, total)
            if op_type == "CompressedWeightGrad":
                activations += skipped
            else:
                errors += skipped
        return errors, activations

    @functools.cached_property
    def _counted(self) -> list[tuple[str, int, int]]:
        """Operator, dense multiply-accumulates per sample and record of products that count what they skip."""
        kinds = ("CompressedWeightGrad", *_SKIPS_ERRORS)
        nodes = [n for n in self.training.graph.nodes if n.op_type in kinds and n.get("record") is not None]
        return [(node.op_type, get_op(node.op_type).macs(node), int(node.get("record"))) for node in nodes]

    def executor(
        self, training: bool, count: int, whole_gradients: bool = False, buffer: str = "weights"
    ) -> Executor:
        """Return the executor of a training step or a prediction of ``count`` samples; arguments as for ``plan``.

        Raises:
            MemoryBudgetError: the plan does not fit into the budget.
        """
        key = (training, self._blocks(count), whole_gradients, buffer, self._on_lists(count))
        executor = self._executors.pop(key, None)
        if executor is None:
            plan = self.plan(training, count, whole_gradients, buffer)
            moves = not self._executors and bool(self._moving())  # looked at once: it takes three plans
            more = training and not whole_gradients and (self._topology.wants_gradients or moves)
            self._check_budget(self.budget_plan(count) if more else plan, count)
            executor = Executor(plan, self.parameters, self.arena, self.team)
            while len(self._executors) >= (_KEPT_OF_CHANNELS if self.by_channel else _KEPT_PLANS):
                del self._executors[next(iter(self._executors))]
        self._executors[key] = executor  # the one used last stands last
        if training:
            self.latest = executor
        return executor

    def _on_lists(self, count: int) -> tuple[bool, ...]:
        """Return which products of ``count`` samples run on lists of non-zeros now, of those where that may change."""
        blocks, patterns = self._blocks(count), self.parameters.patterns
        if self._listed.get(blocks, (-1, ()))[0] != patterns:
            found = tuple(index.count <= most for index, most in self._limits(blocks))
            self._listed[blocks] = patterns, found
        # Asked in every step. Looking at every index took 5 of the 41 us of Python in a step of LeNet-5 with SWAT.
        return self._listed[blocks][1]

    @property
    def _pools_first(self) -> bool:
        """Whether exact zeros of error maps are listed before a policy lists weights and single activations.

        Those lists leave more operations, and take longer: steps of LeNet-5 with SWAT take 1.11, 1.07, 0.96 and 0.82 of
        a dense one's time with 0.2, 0.1, 0.05 and 0.01 of its weights and activations, and 0.94, 0.98, 0.95 and 0.74
        so (batch 32; 1.09, 0.97, 0.83, 0.75 and 1.00, 0.94, 0.83, 0.68 at batch 8; two threads).
        """
        return self._error_pruning is None and not self._topology.needs_lists

    def _list_pooled_errors(self, made: TrainingGraph) -> None:
        if not self.by_channel:
            list_pooled_errors(made, self.lanes, self._stays_listed)

    def _stays_listed(self, weight: str, g: Product) -> bool:
        """Return whether a product's gradients are to be made from lists of its weights, not of exact zeros.

        Also where their number may change (SWAT's momentum variant); else it goes by how many there can be. Lists of
        exact zeros leave about as much as Winograd's kernels do.
        """
        index = self.parameters.sparse.get(weight)
        if index is None or (self._pools_first and not index.compact):
            return False
        if _may_move(index):
            return True
        vectors = vectors_of(g, self._blocks(self._batch_size), self.lanes)
        return index.capacity <= index.rows * most_entries(index, True, vectors)

    def _limits(self, blocks: int) -> Iterator[tuple[SparseIndex, float]]:
        """Yield index and most weights for lists, of the products with weights whose number may change."""
        for node in self.graph.nodes:
            op = get_op(node.op_type)
            if isinstance(op, ProductOp):
                index = self.parameters.sparse.get(node.input(1).name)
                if index is not None and not index.compact:
                    vectors = vectors_of(op.product(node), blocks, self.lanes)
                    for winograd in (False, True):
                        yield index, index.rows * most_entries(index, winograd, vectors)

    def budget_plan(self, count: int) -> Plan:
        """Return the plan that the budget is checked against: of the steps of ``count`` samples what needs most memory.

        Where weights may move from layer to layer (SWAT's momentum variant), also of those with lists of all weights
        and of none.
        """
        kinds, moving = (False, True) if self._topology.wants_gradients else (False,), self._moving()
        none, every, present = [1] * len(moving), [i.size for i in moving], [i.count for i in moving]
        plans = []
        try:
            for counts in (none, every, present) if moving else (present,):
                for index, number in zip(moving, counts, strict=True):
                    index.count = number
                plans += [self.plan(True, count, whole) for whole in kinds]
        finally:
            for index, number in zip(moving, present, strict=True):
                index.count = number
        return max(plans, key=lambda plan: self.memory(plan).peak_bytes)

    def _moving(self) -> list[SparseIndex]:
        """Return the indices whose number of weights may change."""
        sparse = self.parameters.sparse.values()
        return [index for index in sparse if _may_move(index)]

    def plan(self, training: bool, count: int, whole_gradients: bool = False, buffer: str = "weights") -> Plan:
        """Lower the training graph, or the network for inference, for ``count`` samples.

        Args:
            training: whether it is a training step.
            count: samples.
            whole_gradients: keep the gradients of weights that do not exist to the end of the step.
            buffer: of the parameters to predict with: ``weights`` or ``average``.
        """
        train = None
        if training:
            train = self.training if whole_gradients else self._combined
        graph = train.graph if train else self.graph
        keep = {train.logits, train.losses, train.correct} if train else set(graph.outputs)
        if moves_by_bits():
            for index in self.parameters.sparse.values():
                if self.by_channel or index.capacity >= _BITS_SHARE * index.size:
                    index.keep_bits()
        lowering = ChannelLowering if self.by_channel else Lowering
        low = lowering(graph, graph.nodes, self.lanes, self._blocks(count), self.parameters, keep,
                       sparse=self.parameters.sparse, whole_gradients=whole_gradients)  # fmt: skip
        low.plan.fixed["sync"], low.threads = self.team.sync, self.team.threads
        low.plan.fixed["weights"] = self.parameters.buffers[buffer]
        for name in graph.inputs:
            scale, shift = self._input_scaling(name, low)
            low.input(graph.values[name], f"source:{name}", scale, shift)
        low.run(train.forward_count if train else len(graph.nodes))
        if train:
            self._lower_update(low)
        plan = low.finish()
        plan.sparse_products = self._sparse_products(plan)
        return plan

    def _sparse_products(self, plan: Plan) -> list[tuple[int, SparseIndex]]:
        """Return dense multiply-accumulates per sample and index of the products that skip weights in this plan."""
        nodes = {row.node for row in plan.rows if row.kernel[0] in SKIPS_WEIGHTS}
        found = []
        for node in (plan.graph.nodes[position] for position in sorted(nodes)):
            weight = weights_of(node)
            assert weight is not None
            found.append((get_op(node.op_type).macs(node), self.parameters.sparse[weight.name]))
        return found

    def kernels(self) -> list[KernelKey]:
        """Return the kernels that training steps and predictions of a batch need, and of fewer blocks.

        Products with dense weights need no others for any number in between (with channels in the lanes up to four
        samples have tiles of their own); lists of weights may.
        """
        # With channels in the lanes fully connected layers take up to four samples at once.
        some = {self._blocks(count): count for count in (self._batch_size, self.lanes + 1, 4, 3, 2, 1)}
        counts = [count for blocks, count in sorted(some.items()) if blocks <= self._blocks(self._batch_size)]
        plans = [self.plan(training, count) for training in (True, False) for count in counts]
        plans += [self.plan(True, count, True) for count in counts if self._topology.wants_gradients]
        return list(dict.fromkeys(key for plan in plans for key in plan.kernels))

    def memory(self, plan: Plan) -> MemoryPlan:
        """Return the bytes that a plan needs, by purpose."""
        buffers, sparse = self.parameters.buffers, list(self.parameters.sparse.values())
        lasting = [n for n in plan.offsets if not n.startswith("workspace:")]
        ends = {n: plan.lifetimes[n] for n in lasting}
        _, activations = place([Lifetime(n, plan.sizes[n], *ends[n]) for n in lasting])
        moments = sum(buffers[m].nbytes for m in (*self._optimizer.moments, "average") if m in buffers)
        parts = {
            "weights": buffers["weights"].nbytes,
            "gradients": buffers["gradients"].nbytes if "gradients" in buffers else 0,
            "optimizer": moments,
            "activations": activations,
            "workspace": max(0, plan.arena_bytes - activations),
            **({"sparse index": sum(index.nbytes for index in sparse) + plan.list_bytes} if sparse else {}),
            "tables": plan.table_bytes,
            **{purpose: nbytes for each in self.beside for purpose, nbytes in each.memory.items()},
        }
        lists = any(node.op_type == "CompressActivation" for node in plan.graph.nodes)
        return MemoryPlan(parts, _notes(sparse, self._topology.wants_gradients, lists))

    def _blocks(self, count: int) -> int:
        return count if self.by_channel else -(-count // self.lanes)

    def _input_scaling(self, name: str, low: Lowering) -> tuple[Ref, Ref]:
        """The first input is normalised as the model says; other inputs and targets are taken as they are."""
        if name == self.graph.inputs[0]:
            return Ref("scale"), Ref("shift")
        channels = max(1, low.layout(low.plan.graph.values[name]).channels)
        ones = np.ones(channels + channels % 2, np.float32)
        return low.table(ones.view(np.int64)), low.zeros(channels)

    def _lower_update(self, low: Lowering) -> None:
        """Emit the check of loss and gradients, then the optimizer over both ranges of parameters."""
        parameters, optimizer = self.parameters, self._optimizer
        jobs = -(-parameters.trained // UPDATE_JOB)
        partial = low.workspace(8 * jobs)
        with low.stage("check"):
            low.emit("sum_of_squares", (), jobs, grad=Ref("gradients"), count=parameters.trained, partial=partial)
            low.emit("check_step", (), 1, partial=partial, parts=jobs, result=Ref("result"), settings=Ref("settings"),
                     sync=Ref("sync"))  # fmt: skip
        with low.stage("update"):
            for first, last, decay in ((0, parameters.decayed, 1), (parameters.decayed, parameters.trained, 0)):
                if first < last:
                    low.emit(
                        optimizer.kernel, (), -(-(last - first) // UPDATE_JOB), weight=Ref("weights", 4 * first),
                        grad=Ref("gradients", 4 * first), count=last - first, settings=Ref("settings"), decay=decay,
                        **_moments(optimizer, 4 * first),
                    )  # fmt: skip
            if optimizer.averaging:
                low.emit("average", (), -(-parameters.total // UPDATE_JOB), weight=Ref("weights"),
                         average=Ref("average"), count=parameters.total, settings=Ref("settings"))  # fmt: skip

    def _check_budget(self, plan: Plan, count: int) -> None:
        need = self.memory(plan)
        if self._budget and need.peak_bytes > self._budget:
            parts = ", ".join(f"{name} {size / MIB:.1f}" for name, size in need.parts.items())
            raise MemoryBudgetError(
                f"a step of {count} samples needs {need.peak_bytes / MIB:,.3f} MiB ({parts}), the budget"
                f" is {self._budget / MIB:,.3f} MiB; use a smaller batch size or network, or a larger budget"
            )


def _notes(sparse: Sequence[SparseIndex], whole_gradients: bool, lists: bool) -> dict[str, str]:
    """Return what of the weights and of what belongs to them is stored, by part of the memory plan."""
    if not sparse:
        return {}
    if not all(index.compact for index in sparse):
        notes = {"weights": "dense master", "gradients": "dense", "optimizer": "dense", "sparse index": "the pattern"}
        return notes | ({"activations": "pruned ones as lists"} if lists else {})
    notes = dict.fromkeys(("weights", "gradients", "optimizer"), "non-zeros only")
    refresh = {"activations": "whole gradients at a refresh"} if whole_gradients else {}
    return notes | refresh | {"sparse index": "the pattern"}


def _lists_pay(graph: Graph, sparse: Mapping[str, SparseIndex], batch_size: int) -> bool:
    """Whether lists of weights beat channels in the lanes for a batch of few samples, see ``_LEFT``.

    Depthwise convolutions, which have no lists, are several times slower in empty lanes.
    """
    operations = left = weights = existing = 0.0
    for node in graph.nodes:
        op = get_op(node.op_type)
        if isinstance(op, ProductOp):
            g, index = op.product(node), sparse.get(node.input(1).name)
            if g.groups > 1:
                return False
            share = 1.0 if index is None else _share(index)
            operations += g.macs
            left += g.macs * (1.0 if share > _DENSE_SHARE or is_read_by_bits(g) else share)
            weights += node.input(1).size
            existing += share * node.input(1).size
    few = operations <= _FEW_OPERATIONS * weights and existing <= _FEW_WEIGHTS[batch_size] * weights
    return left < operations and (few or left <= _LEFT[batch_size] * operations)


def _may_move(index: SparseIndex) -> bool:
    """Whether the number of weights may change: they move from layer to layer (SWAT's momentum variant)."""
    return not index.compact and index.capacity == index.size


def _share(index: SparseIndex) -> float:
    """Return the share of the weights that there is room for.

    What a resumed run computes must not depend on how many weights there are now.
    """
    return index.capacity / index.size


def _skipped_weights(plan: Plan) -> int:
    """Return the multiply-accumulates of a sample that products skip now because weights do not exist."""
    counts = [index.count for _, index in plan.sparse_products]
    if counts != plan.skipped[0]:  # few steps change a number
        skipped = sum(macs * (index.size - index.count) // index.size for macs, index in plan.sparse_products)
        plan.skipped = counts, skipped
    return plan.skipped[1]


def _macs(train: TrainingGraph) -> int:
    return sum(get_op(node.op_type).macs(node) for node in train.graph.nodes)


def _moments(optimizer: Optimizer, offset: int) -> dict[str, Ref | int]:
    if optimizer.kernel == "sgd":
        return {"velocity": Ref("velocity", offset) if optimizer.moments else 0}
    return {name: Ref(name, offset) for name in optimizer.moments}
