"""What every layer of a network with sparse weights did: density, kernels, operations and time of a training step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.graph import Node
from edgetrain.lowering_sparse import SKIPS_WEIGHTS
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductGrad, ProductOp, weights_of
from edgetrain.plan import Plan

if TYPE_CHECKING:
    from edgetrain.learner import Learner

# Steps that are timed; their median counts.
_TIMED_STEPS = 7
# What a product of a kind of operator skips by lists, unless it runs on lists of its weights.
_LISTS = {
    "CompressedWeightGrad": "lists of activations",
    **dict.fromkeys(("ListedInputGrad", "ListedWeightGrad", "PooledInputGrad", "PooledWeightGrad"), "lists of errors"),
}


@dataclass(frozen=True)
class LayerUse:
    """One layer in one training step.

    Attributes:
        name: of the weights.
        density: share of weights that exist.
        kernels: how forward product, input gradient and weight gradient were computed.
        macs_dense, macs_done: multiply-accumulates of all three, of a batch.
        seconds: of all kernel calls of all three, in a batch of the learner's usual size.
    """

    name: str
    density: float
    kernels: tuple[str, ...]
    macs_dense: int
    macs_done: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)


def layer_report(learner: Learner) -> list[LayerUse]:
    """Time a few training steps on random images and return what every product did; the learner stays as it is.

    Raises:
        NumericalError: the learner's state gives numbers that are not finite.
    """
    state = learner.state()
    rng = np.random.default_rng(0)
    x = rng.random((learner.batch_size, *learner.graph.input_shape), np.float32)
    y: NDArray[Any]
    if learner.loss == "mse":
        y = rng.random((learner.batch_size, *learner.graph.output_shape), np.float32)
    else:
        y = rng.integers(0, learner.graph.num_classes, learner.batch_size)
    try:
        with learner.topology.held():  # kernels, densities and times are those of one pattern
            times = [learner.time_rows(x, y)[:-1] for _ in range(_TIMED_STEPS)]
    finally:
        learner.restore(*state)
    assert learner.plans.latest is not None
    plan, median = learner.plans.latest.plan, np.median(times, axis=0)
    layers: dict[str, list[int]] = {}
    for position, node in enumerate(plan.graph.nodes):
        weight = weights_of(node)
        if weight is not None:
            layers.setdefault(weight.name, []).append(position)
    return [_use(learner, plan, name, nodes, median) for name, nodes in layers.items()]


def _use(learner: Learner, plan: Plan, name: str, nodes: Sequence[int], seconds: Any) -> LayerUse:
    index = learner.topology.indices.get(name)
    density = 1.0 if index is None else index.density
    dense = done = 0
    kernels = []
    for position in nodes:
        node = plan.graph.nodes[position]
        op = get_op(node.op_type)
        assert isinstance(op, (ProductOp, ProductGrad))
        kernels += [method_of(plan, position)] * op.products
        dense += learner.batch_size * op.products * op.product(node).macs
        share = density if kernels[-1] == "lists of weights" else _kept(learner, node)
        done += round(learner.batch_size * op.macs(node) * share)
    rows = [
        number for number, row in enumerate(plan.rows) if row.node in nodes and row.stage in ("forward", "backward")
    ]
    return LayerUse(name, density, tuple(kernels), dense, done, float(seconds[rows].sum()))


def method_of(plan: Plan, position: int) -> str:
    """Return how a plan computes the product at a node: its kernels in words.

    Returns:
        ``direct``, ``winograd``, or which numbers that are 0, or pruned, it leaves out: ``lists of weights``,
        ``lists of activations``, ``lists of errors``.
    """
    kernels = {row.kernel[0] for row in plan.rows if row.node == position}
    if kernels & set(SKIPS_WEIGHTS):
        return "lists of weights"
    if kernels & {"winograd", "winograd_transform"}:
        return "winograd"
    return _LISTS.get(plan.graph.nodes[position].op_type, "direct")


def _kept(learner: Learner, node: Node) -> float:
    """Return the share of a product's saved activations, or of its error map, that it read in the latest step."""
    if node.op_type not in _LISTS or node.get("record") is None:
        return 1.0
    kept, total = learner.topology.tally(int(node.get("record")))
    return kept / max(1, total)
