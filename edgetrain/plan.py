"""From a graph to a table of kernel calls: layouts, shared memory, offsets, addresses.

``Lowering.run`` (file ``lowering.py``) walks the nodes in order; every operator's ``lower`` emits rows of a ``Plan``.
``settle`` then places the buffers (``memory.place``), and ``bind`` makes of the rows a program for the interpreter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from edgetrain.arrays import Layout, aligned
from edgetrain.autodiff import LABELS, node_users
from edgetrain.choice import TileChoice
from edgetrain.graph import Graph, Node, Value
from edgetrain.kernels.registry import KernelKey, argument_names
from edgetrain.memory import Lifetime, place
from edgetrain.ops import NO_BORDER, Border, get_op
from edgetrain.ops.shape import RESHAPES
from edgetrain.sparse_index import SparseIndex

# Stages of a step, in the order in which they run.
STAGES = ("forward", "backward", "check", "update")
# Stage of the rows that run before a step where the topology of sparse weights has changed.
LISTS = "lists"


@dataclass(frozen=True)
class Ref:
    """An address to be: a byte offset into a buffer."""

    buffer: str
    offset: int = 0

    def __add__(self, offset: int) -> Ref:
        return Ref(self.buffer, self.offset + offset)


@dataclass(frozen=True)
class Row:
    """One kernel call: arguments in the kernel's order, as integers, floats or references.

    ``stage`` is one of ``STAGES``, or ``LISTS``; ``node`` is the position of the node it belongs to; ``choice`` is why
    a product has this kernel and tile, its packing of weights included.
    """

    kernel: KernelKey
    arguments: tuple[int | float | Ref, ...]
    jobs: int
    stage: str
    node: int
    choice: TileChoice | None = None

    @property
    def guard(self) -> bool:
        """Whether the threads look at the status word after this row."""
        return self.kernel[0] == "check_step"


@dataclass
class Sharing:
    """Which values share memory, and the border that the shared memory has."""

    root: dict[str, str]
    border: dict[str, Border]


def share_memory(
    nodes: Sequence[Node], keep: set[str], shares: Callable[[Value, Value], bool] = lambda x, y: True
) -> Sharing:
    """Decide which outputs take over an input's memory, and how wide every value's border is.

    An output takes over the memory of the input that its operator names if nobody
    reads that memory afterwards; a reshape shares it in any case. Values in ``keep``
    must survive to the end and are never overwritten; ``shares`` tells whether a reshape
    leaves all numbers where they are.
    """
    users, wanted = node_users(nodes), wanted_borders(nodes)
    values = {v.name: v for node in nodes for v in (*node.inputs, *node.outputs) if v is not None}
    root = {name: name for name in values}
    border = {name: wanted.get(name, NO_BORDER) for name in values}
    members: dict[str, list[str]] = {name: [name] for name in values}
    reshaped: set[str] = set()
    for position, node in enumerate(nodes):
        source = _takes_over(node)
        if source is None or node.y.name in keep:
            continue
        old, new = root[source.name], root[node.y.name]
        is_reshape = node.op_type in RESHAPES
        if is_reshape:
            fits = not any(border[old]) and not any(border[new]) and shares(source, node.y)
        else:
            quiet = all(max(users.get(m, [-1])) <= position for m in members[old]) and not keep & set(members[old])
            fits = quiet and source.size == node.y.size and not (old in reshaped and any(border[new]))
            if get_op(node.op_type).in_place_alone:
                fits = fits and sum(root.get(v.name) == old for v in node.inputs if v is not None) == 1
        if not fits:
            continue
        for member in members.pop(new):
            root[member] = old
            members[old].append(member)
        border[old] = _wider(border[old], border.pop(new))
        if is_reshape:
            reshaped.add(old)
    return Sharing(root, {name: border[root[name]] for name in values})


def written_borders(node: Node) -> tuple[int, ...]:
    """Return the indices of the outputs around which a node's kernel writes the zeros, too."""
    return get_op(node.op_type).writes_border


def borders_to_clear(
    nodes: Sequence[Node], root: Mapping[str, str], writes: Callable[[Node], tuple[int, ...]] = written_borders
) -> set[str]:
    """Return the roots of memory whose border is read before an operator has written it along with its output.

    ``writes``: see ``written_borders``.
    """
    made: dict[str, int] = {}
    written: dict[str, int] = {}
    for position, node in enumerate(nodes):
        own = writes(node)
        for i, value in enumerate(node.outputs):
            made[value.name] = position
            if i in own:
                written.setdefault(root[value.name], position)
    wanted = [name for name, border in wanted_borders(nodes).items() if any(border)]
    return {root[name] for name in wanted if made.get(name, -1) < written.get(root[name], len(nodes))}


def _takes_over(node: Node) -> Value | None:
    """Return the batched input whose memory the first output may take over."""
    index = 0 if node.op_type in RESHAPES else get_op(node.op_type).in_place
    value = None if index is None else node.optional(index)
    return value if value is not None and value.batched and node.y.batched and value.name != LABELS else None


def wanted_borders(nodes: Sequence[Node]) -> dict[str, Border]:
    """Return the border of zeros that nodes read around values, by the name of the value.

    Around others there may be anything: the border of what took over their memory has its zeros only later.
    """
    wanted: dict[str, Border] = {}
    for node in nodes:
        for value, border in zip(node.inputs, get_op(node.op_type).borders(node), strict=False):
            if value is not None and value.batched:
                wanted[value.name] = _wider(wanted.get(value.name, NO_BORDER), border)
    return wanted


def _wider(a: Border, b: Border) -> Border:
    return (max(a[0], b[0]), max(a[1], b[1]), max(a[2], b[2]), max(a[3], b[3]))


@dataclass
class Plan:
    """A program and the memory it needs.

    Attributes:
        graph: what is computed.
        lanes, blocks: samples in a vector; vectors of samples (single samples when lanes hold channels).
        by_channel: whether lanes hold channels.
        rows: kernel calls of a step in order.
        list_rows: those that run before a step where the topology of sparse weights has changed.
        layouts: of every batched value.
        root: by the name of a value, the value whose memory it shares; itself if it has its own.
        fixed: arrays that outlive a step, by buffer name (parameters, tables, state).
        offsets: place of every other buffer in the arena.
        sizes, lifetimes: bytes of every buffer in the arena; first and last node that needs it.
        arena_bytes: size of the arena.
        sparse_products: of the products that skip weights: dense multiply-accumulates per sample, and index.
        skipped: numbers of weights of these products, and the multiply-accumulates per sample that they skip then.
    """

    graph: Graph
    lanes: int
    blocks: int
    by_channel: bool = False
    rows: list[Row] = field(default_factory=list)
    list_rows: list[Row] = field(default_factory=list)
    layouts: dict[str, Layout] = field(default_factory=dict)
    root: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    lifetimes: dict[str, tuple[int, int]] = field(default_factory=dict)
    arena_bytes: int = 0
    sparse_products: list[tuple[int, SparseIndex]] = field(default_factory=list)
    skipped: tuple[list[int], int] = field(default_factory=lambda: ([], 0))

    def buffer(self, value: str) -> str:
        """Return the buffer of a value; the prefix keeps users' names apart from the fixed buffers'."""
        return f"value:{self.root.get(value, value)}"

    @property
    def capacity(self) -> int:
        """Largest number of samples."""
        return self.blocks if self.by_channel else self.lanes * self.blocks

    @property
    def program(self) -> list[Row]:
        """``list_rows``, then ``rows``: what ``bind`` makes a program of."""
        return [*self.list_rows, *self.rows]

    @property
    def kernels(self) -> list[KernelKey]:
        """Distinct kernels in order of first use."""
        return list(dict.fromkeys(row.kernel for row in self.program))

    @property
    def table_bytes(self) -> int:
        """Bytes of the constant offset tables and of the program itself."""
        arguments = sum(8 * len(row.arguments) + 32 for row in self.program)
        return arguments + sum(a.nbytes for name, a in self.fixed.items() if name.startswith("table:"))

    @property
    def list_bytes(self) -> int:
        """Bytes of the lists of sparse weights' entries."""
        return sum(a.nbytes for name, a in self.fixed.items() if name.startswith("list:"))

    def settle(self, lifetimes: dict[str, tuple[int, int]]) -> None:
        """Order the rows by stage and place all buffers that have a lifetime."""
        self.rows.sort(key=lambda row: STAGES.index(row.stage))
        self.lifetimes = lifetimes
        names = list(lifetimes)
        offsets, self.arena_bytes = place([Lifetime(n, self.sizes[n], *lifetimes[n]) for n in names])
        self.offsets = dict(zip(names, offsets, strict=True))

    def bind(
        self, arena: int, addresses: dict[KernelKey, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], dict[str, list[int]]]:
        """Resolve all addresses, with the arena at address ``arena``.

        Returns:
            The program int64 ``(rows, 4)``, its arguments, and where in the arguments the
            addresses of each input (``source:...``) belong, which change at every step.
        """
        rows = self.program
        *starts, total = accumulate((len(row.arguments) for row in rows), initial=0)
        arguments = aligned(total, np.int64)
        program = aligned(4 * len(rows), np.int64).reshape(-1, 4)
        sources: dict[str, list[int]] = {}
        for number, (row, start) in enumerate(zip(rows, starts, strict=True)):
            names = argument_names(row.kernel[0])
            for slot, argument in enumerate(row.arguments, start):
                if isinstance(argument, Ref) and argument.buffer.startswith("source:"):
                    sources.setdefault(argument.buffer, []).append(slot)
                elif names[slot - start].startswith("f_"):
                    arguments[slot] = int(np.array(argument, np.float32).view(np.uint32))
                else:
                    arguments[slot] = self.address(argument, arena) if isinstance(argument, Ref) else int(argument)
            program[number] = (addresses[row.kernel], arguments.ctypes.data + 8 * start, row.jobs, int(row.guard))
        return program, arguments, sources

    def address(self, ref: Ref, arena: int) -> int:
        """Return the address of a reference."""
        if ref.buffer in self.fixed:
            return int(self.fixed[ref.buffer].ctypes.data) + ref.offset
        return arena + self.offsets[ref.buffer] + ref.offset
