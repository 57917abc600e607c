"""edgetrain as a contender, and where the time of its step goes: seconds, GFLOP/s and GB/s of every node.

Every pass is a whole training step with a look at the clock between the rows of its program; what that adds is
measured by two looks in a row and taken off. The sum is compared with the whole step.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.bench_process import Case
from edgetrain.graph import Graph, Node, Value
from edgetrain.learner import Learner
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductGrad, ProductOp
from edgetrain.optim import SGD
from edgetrain.plan import Plan, Ref, Row

if TYPE_CHECKING:
    from edgetrain.ops.conv import Product

_INPUT_KERNEL = "pack_input"
# Below this, what is left after taking off the overhead is noise, and a rate made of it is nonsense.
_SHORTEST_SECONDS = 5e-7


@dataclass(frozen=True)
class OpTiming:
    """What one node of a training step costs.

    Attributes:
        name: of the node, or of a kernel that belongs to no node (packing the input, the update).
        op_type: operator.
        stage: ``forward``, ``backward``, ``check`` or ``update``.
        shape: the layer's sizes in words; a product and its two gradients have the same ones.
        rows: kernel calls.
        seconds: median.
        macs: multiply-accumulates per step.
        nbytes: size of the inputs and outputs, borders included, each counted once.
    """

    name: str
    op_type: str
    stage: str
    shape: str
    rows: int
    seconds: float
    macs: int
    nbytes: int

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, with ``gflops`` and ``gigabytes_per_second``.

        Rates are ``None`` where a node is too short to be timed; ``gflops`` also where nothing is multiplied.
        """
        timed = self.seconds >= _SHORTEST_SECONDS
        gflops = 2e-9 * self.macs / self.seconds if timed and self.macs else None
        return {**asdict(self), "gflops": gflops,
                "gigabytes_per_second": 1e-9 * self.nbytes / self.seconds if timed else None}  # fmt: skip


class OwnStep:
    """A training step of edgetrain: SGD with momentum, as all contenders do."""

    def __init__(self, graph: Graph, case: Case, x: Any, y: Any) -> None:
        self.learner = Learner(
            graph, batch_size=case.batch_size, threads=case.threads, memory_budget=0,
            optimizer=SGD(lr=0.01, momentum=0.9), sparsity=case.sparsity,
        )  # fmt: skip
        self._x, self._y = x, y

    def __call__(self) -> Any:
        """Take one step."""
        return self.learner.partial_fit(self._x, self._y)

    def facts(self) -> dict[str, Any]:
        """Return multiply-accumulates per step, and planned bytes by purpose."""
        return {"macs": self().macs_done, "planned_bytes": self.learner.memory_plan().parts}


class RestoredStep(OwnStep):
    """A contender whose every step starts from the same weights: those of the model, or decayed ones.

    Args:
        decayed: what all weights of products are instead, such as a subnormal number.
    """

    def __init__(self, graph: Graph, case: Case, x: Any, y: Any, decayed: float | None = None) -> None:
        super().__init__(graph, case, x, y)
        arrays = {name: array for name, array in self.learner.graph.arrays.items() if array.ndim > 1}
        self._start = {
            name: array.copy() if decayed is None else np.full_like(array, decayed) for name, array in arrays.items()
        }

    def __call__(self) -> Any:
        """Put the weights back and take one step."""
        for name, array in self._start.items():
            self.learner.graph.arrays[name][...] = array  # the trained arrays themselves; load_parameters takes longer
        return super().__call__()


class RowsStep(OwnStep):
    """A contender whose steps are timed row by row and as a whole, in turn."""

    def __init__(self, graph: Graph, case: Case, x: Any, y: Any) -> None:
        super().__init__(graph, case, x, y)
        self._count = case.batch_size
        self._whole: list[float] = []
        self._rows: list[NDArray[np.float64]] = []

    def __call__(self) -> Any:
        """Take one step with a look at every row, and one without."""
        self._rows.append(self.learner.time_rows(self._x, self._y))
        result = super().__call__()
        self._whole.append(result.seconds)
        return result

    def facts(self) -> dict[str, Any]:
        """Return the table of nodes, the whole step and what timing added to a row, all in seconds."""
        # The first passes compile and warm up; the median would forgive them, but a short run has few others.
        rows = np.median(self._rows[2:] or self._rows, 0)
        ops = timings(self.learner.training_plan(), rows[:-1] - rows[-1], self._count)
        return {
            "ops": [op.to_dict() for op in ops], "sum_seconds": sum(op.seconds for op in ops),
            "step_seconds": statistics.median(self._whole), "overhead_seconds": float(rows[-1]),
        }  # fmt: skip


def timings(plan: Plan, seconds: Sequence[float] | NDArray[np.float64], count: int) -> list[OpTiming]:
    """Return one entry per node in the order of execution.

    Args:
        plan: of a training step.
        seconds: of every row; less than nothing counts as nothing.
        count: samples per step.
    """
    return [_timing(plan, rows, max(0.0, sum(spent)), count) for rows, spent in _groups(plan.rows, seconds)]


def _groups(rows: Sequence[Row], seconds: Any) -> Iterator[tuple[list[Row], list[float]]]:
    groups: dict[tuple[str, str | int], tuple[list[Row], list[float]]] = {}
    for row, spent in zip(rows, seconds, strict=True):
        key = (row.stage, row.kernel[0] if _is_alone(row) else row.node)
        members = groups.setdefault(key, ([], []))
        members[0].append(row)
        members[1].append(float(spent))
    yield from groups.values()


def _is_alone(row: Row) -> bool:
    """Whether a row belongs to no node; the borders of the input are counted with the first node."""
    return row.stage in ("check", "update") or row.kernel[0] == _INPUT_KERNEL


def _timing(plan: Plan, rows: list[Row], seconds: float, count: int) -> OpTiming:
    first = rows[0]
    if _is_alone(first):
        name = first.kernel[0]
        return OpTiming(name, name, first.stage, "", len(rows), seconds, 0, _touched(plan, rows))
    node = plan.graph.nodes[first.node]
    macs = count * get_op(node.op_type).macs(node)
    return OpTiming(node.name, node.op_type, first.stage, describe_sizes(node), len(rows), seconds, macs,
                    _node_bytes(plan, node))  # fmt: skip


def describe_sizes(node: Node) -> str:
    """Return a node's sizes: of a product "channels x size -> channels, kernel", else those of its output."""
    op = get_op(node.op_type)
    if not isinstance(op, (ProductOp, ProductGrad)):
        return "x".join(map(str, node.y.shape)) or "1"
    g: Product = op.product(node)
    parts = [f"{g.channels_in}@{g.size[0]}x{g.size[1]} -> {g.channels_out}@{g.out[0]}x{g.out[1]}"]
    parts += [f"{g.kernel[0]}x{g.kernel[1]}"] * (max(g.kernel) > 1)
    parts += [f"stride {max(g.strides)}"] * (max(g.strides) > 1) + [f"groups {g.groups}"] * (g.groups > 1)
    return ", ".join(parts)


def _node_bytes(plan: Plan, node: Node) -> int:
    return sum(_value_bytes(plan, value) for value in (*node.inputs, *node.outputs) if value is not None)


def _value_bytes(plan: Plan, value: Value) -> int:
    if value.name in plan.layouts:
        return plan.layouts[value.name].nbytes
    if value.batched:
        return 4 * value.size * plan.capacity
    return plan.sizes.get(plan.buffer(value.name), 4 * value.size)  # a list's size is not that of its shape


def _touched(plan: Plan, rows: list[Row]) -> int:
    """Return the bytes of all arrays that some rows refer to; of the packed input, what is written."""
    names = {argument.buffer for row in rows for argument in row.arguments if isinstance(argument, Ref)}
    return sum(int(plan.fixed[name].nbytes) if name in plan.fixed else plan.sizes.get(name, 0) for name in names)
