"""Which kernel and tile every product of a training step has, and why: the table that ``edgetrain doctor`` prints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from edgetrain.bench_ops import describe_sizes
from edgetrain.choice import planning_for
from edgetrain.devices import DeviceProfile
from edgetrain.graph import Graph
from edgetrain.kernels.codes import CHANNELS, DEPTHWISE, SAMPLES
from edgetrain.learner import Learner
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductGrad, ProductOp
from edgetrain.plan import Plan, Row

_PRODUCTS = {"ProductInputGrad": "input gradient", "ProductWeightGrad": "weight gradient"}
_LANES = {SAMPLES: "samples", CHANNELS: "channels", DEPTHWISE: "channels, depthwise"}
_PREPARING = (
    "pack_weights",
    "pack_input",
    "pack_channels",
    "fill_border",
)  # rows of a product's node that multiply nothing


@dataclass(frozen=True)
class KernelUse:
    """One kernel of one product, or of several equal ones.

    Attributes:
        nodes: names of the products.
        product: ``forward``, ``input gradient`` or ``weight gradient``.
        sizes: the layer's sizes in words.
        kernel: its name.
        lanes, lanes_hold: numbers in a vector, and what they are; of a kernel that tells.
        tile: (channels, pixels) of a multiply, (channels, terms) of a correlate; ``None`` where there is no choice.
        compiled_for: the kernel's compile-time sizes.
        jobs: parts that threads share.
        reason: ``rule`` or ``calibration``.
    """

    nodes: tuple[str, ...]
    product: str
    sizes: str
    kernel: str
    lanes: int | None
    lanes_hold: str | None
    tile: tuple[int, int] | None
    compiled_for: tuple[int, ...]
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
        learner = Learner(graph, profile, batch_size=batch_size, threads=1, memory_budget=0)
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
    return product and row.stage in ("forward", "backward") and row.kernel[0] not in _PREPARING


def _use(plan: Plan, row: Row) -> KernelUse:
    node, (name, compiled_for), choice = plan.graph.nodes[row.node], row.kernel, row.choice
    return KernelUse(
        nodes=(node.name,), product=_PRODUCTS.get(node.op_type, "forward"), sizes=describe_sizes(node), kernel=name,
        lanes=choice.sizes.lanes if choice else None, lanes_hold=_LANES[choice.sizes.kind] if choice else None,
        tile=choice.tile if choice else None, compiled_for=compiled_for, jobs=row.jobs,
        reason=choice.reason if choice else "rule",
    )  # fmt: skip
