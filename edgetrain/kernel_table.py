"""Which kernel and tile every product of a training step has, and why: the table that ``edgetrain doctor`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetrain.bench_ops import describe_sizes
from edgetrain.choice import planning_for
from edgetrain.devices import DeviceProfile
from edgetrain.graph import Graph
from edgetrain.learner import Learner
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductGrad, ProductOp
from edgetrain.plan import Plan, Row

_PRODUCTS = {"ProductInputGrad": "input gradient", "ProductWeightGrad": "weight gradient"}
# Kernels that multiply, compiled for (lanes, rows and columns of the tile, ...); others of a product's node prepare
# operands or collect sums.
_MULTIPLYING = ("multiply", "correlate", "correlate_listed", "winograd")
_LISTED = ("multiply_csr", "correlate_csr")  # compiled for lanes and the cut of the maps, no tile of channels


@dataclass(frozen=True)
class KernelUse:
    """One kernel of one product, or of several equal ones.

    Attributes:
        nodes: names of the products.
        product: ``forward``, ``input gradient`` or ``weight gradient``.
        sizes: the layer's sizes in words.
        method: ``direct``, ``winograd``, or ``csr`` (lists of non-zeros); by rules alone, since it changes results.
        kernel: its name.
        lanes, lanes_hold: numbers in a vector, and what they are.
        tile: (channels, pixels) of a multiply, (channels, terms) of a correlate, (channels, 4x4 tiles) of winograd.
        jobs: parts that threads share.
        reason: of the tile, ``rule`` or ``calibration``.
    """

    nodes: tuple[str, ...]
    product: str
    sizes: str
    method: str
    kernel: str
    lanes: int
    lanes_hold: str
    tile: tuple[int, int] | None
    jobs: int
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data."""
        return asdict(self)


def kernel_table(graph: Graph, profile: DeviceProfile, batch_size: int) -> list[KernelUse]:
    """Return the kernels of all products of a training step, equal ones once; nothing is compiled.

    Args:
        graph: the network.
        profile: of the device; for another than ``host`` the table is what the rules do there.
        batch_size: samples of the step.
    """
    with planning_for(profile):
        threads = min(64, profile.threads)  # more are refused, and Winograd kernels have a job per thread
        learner = Learner(graph, profile, batch_size=batch_size, threads=threads, memory_budget=0)
        plan = learner.plans.plan(True, batch_size)
    return merged(_use(plan, row) for row in plan.rows if _multiplies(plan, row))


def merged(uses: Iterable[KernelUse]) -> list[KernelUse]:
    """Return equal uses once, with the names of all their nodes."""
    found: dict[KernelUse, list[str]] = {}
    for use in uses:
        found.setdefault(replace(use, nodes=()), []).extend(use.nodes)
    return [replace(use, nodes=tuple(dict.fromkeys(nodes))) for use, nodes in found.items()]


def _multiplies(plan: Plan, row: Row) -> bool:
    product = isinstance(get_op(plan.graph.nodes[row.node].op_type), (ProductOp, ProductGrad))
    return product and row.kernel[0] in _MULTIPLYING + _LISTED


def _use(plan: Plan, row: Row) -> KernelUse:
    node, (name, (lanes, *sizes)) = plan.graph.nodes[row.node], row.kernel
    return KernelUse(
        nodes=(node.name,), product=_PRODUCTS.get(node.op_type, "forward"), sizes=describe_sizes(node),
        method=_method(plan, row), kernel=name, lanes=lanes, lanes_hold="channels" if plan.by_channel else "samples",
        tile=(sizes[0], sizes[1]) if name in _MULTIPLYING else None, jobs=row.jobs,
        reason=row.choice.reason if row.choice else "rule",
    )  # fmt: skip


def _method(plan: Plan, row: Row) -> str:
    names = [other.kernel[0] for other in plan.rows if other.node == row.node]
    found = [method for method in ("winograd", "csr") if any(method in name for name in names)]
    return found[0] if found else "direct"
