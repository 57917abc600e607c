"""Which kernel and tile every product of a training step has, and why: the table that ``edgetrain doctor`` prints."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetrain.bench_ops import describe_sizes
from edgetrain.choice import planning_for
from edgetrain.devices import DeviceProfile
from edgetrain.graph import Graph, Node
from edgetrain.kernels.codes import CHANNELS
from edgetrain.layer_report import method_of
from edgetrain.learner import Learner
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductGrad, ProductInputGrad, ProductOp
from edgetrain.plan import Plan, Row
from edgetrain.pruning import ErrorPruning
from edgetrain.sparsity import SparsityPolicy

# Kernels that multiply, with the place of (lanes, rows and columns of the tile) among the sizes that they are compiled
# for; other kernels of a product's node prepare operands or collect sums.
_MULTIPLYING = {"multiply": 0, "correlate": 0, "correlate_listed": 0, "winograd": 1}
# Compiled for lanes and the cut of the maps, no tile of channels.
_LIST_KERNELS = ("multiply_csr", "correlate_csr", "gradients_csr", "multiply_lists", "correlate_lists")
# Compiled for lanes of channels, vectors of them, and terms, or rows and columns of the kernel.
_NUMBERS = ("correlate_elements", "correlate_pooled", "spread_elements")


@dataclass(frozen=True)
class KernelUse:
    """One kernel of one product, or of several equal ones.

    Attributes:
        nodes: names of the products.
        product: ``forward``, ``input gradient``, ``weight gradient`` or ``both gradients``.
        sizes: the layer's sizes in words.
        method: see ``layer_report.method_of``; by rules alone, since it changes results.
        kernel: its name.
        lanes, lanes_hold: numbers in a vector, and what they are.
        tile: (channels, vectors of pixels) of a multiply, (channels, terms) of a correlate and of lists of
            numbers, (channels, vectors of 4x4 tiles) of winograd.
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


def kernel_table(graph: Graph, profile: DeviceProfile, batch_size: int, sparsity: SparsityPolicy | None = None,
                 error_pruning: ErrorPruning | None = None) -> list[KernelUse]:  # fmt: skip
    """Return the kernels of all products of a training step, equal ones once; nothing is compiled.

    Args:
        graph: the network.
        profile: of the device; for another than ``host`` the table is what the rules do there.
        batch_size: samples of the step.
        sparsity, error_pruning: as for a ``Learner``.
    """
    with planning_for(profile):
        threads = min(64, profile.threads)  # more are refused, and Winograd kernels have a job per thread
        learner = Learner(graph, profile, batch_size=batch_size, threads=threads, memory_budget=0, sparsity=sparsity,
                          error_pruning=error_pruning)  # fmt: skip
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
    return product and row.kernel[0] in (*_MULTIPLYING, *_LIST_KERNELS, *_NUMBERS)


def _use(plan: Plan, row: Row) -> KernelUse:
    node, (name, sizes) = plan.graph.nodes[row.node], row.kernel
    lanes, *tile = sizes[_MULTIPLYING.get(name, 0) :]
    return KernelUse(
        nodes=(node.name,), product=_product(node), sizes=describe_sizes(node), method=method_of(plan, row.node),
        kernel=name,
        lanes=lanes, lanes_hold=_lanes_hold(plan, row),
        tile=_tile(name, lanes, tile), jobs=row.jobs,
        reason=row.choice.reason if row.choice else "rule",
    )  # fmt: skip


def _tile(name: str, lanes: int, sizes: list[int]) -> tuple[int, int] | None:
    if name in _NUMBERS:
        return lanes * sizes[0], math.prod(sizes[1:3])
    return (sizes[0], sizes[1]) if name in _MULTIPLYING else None


def _lanes_hold(plan: Plan, row: Row) -> str:
    if plan.by_channel or row.kernel[0] in _NUMBERS:
        return "channels"
    outer = row.kernel[0] == "multiply" and row.kernel[1][3] == CHANNELS
    return "weights" if outer else "samples"


def _product(node: Node) -> str:
    op = get_op(node.op_type)
    if not isinstance(op, ProductGrad):
        return "forward"
    if op.products == 2:
        return "both gradients"
    return "input gradient" if isinstance(op, ProductInputGrad) else "weight gradient"
