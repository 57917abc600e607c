"""What every lowering needs: buffers and their lifetimes, constant tables, rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.arrays import Layout, aligned, map_sizes
from edgetrain.autodiff import LABELS
from edgetrain.choice import Sizes, Tile, TileChoice, choose, simd_lanes
from edgetrain.errors import GraphError
from edgetrain.graph import Graph, Node, Value
from edgetrain.kernels.codes import CHANNELS, SAMPLES
from edgetrain.kernels.registry import argument_names
from edgetrain.ops import NO_BORDER, Border
from edgetrain.plan import LISTS, Plan, Ref, Row, borders_to_clear, share_memory, wanted_borders, written_borders

if TYPE_CHECKING:
    from edgetrain.parameters import Parameters
    from edgetrain.sparse_index import SparseIndex

Pair = tuple[int, int]

# Jobs that a kernel call has at least, one for each of four threads: what leaves less is cut along pixels, too. With 16
# as the aim LeNet-5 at batch 8 takes 2 % more. At batch 4 its second convolution's input gradient was one job, and a
# step took 78 us, 73.5 so (two threads; test_products.py counts jobs).
FEWEST_JOBS = 4
# Pixels from one to the next of a vector at most: strides of usual convolutions.
FARTHEST = 4


@dataclass(frozen=True)
class Runs:
    """In how many runs the vectors of two operands lie, and the bytes from one to the next."""

    x: int = 1
    y: int = 1
    x_apart: int = 0
    y_apart: int = 0

    @classmethod
    def of(cls, together: int, steps: Pair, lanes: int) -> Runs:
        """Return those of vectors of so many pixels that are ``steps`` apart, ``lanes`` samples each.

        A stride parts the pixels of one operand at most; those of the other are neighbours, and its bytes unused.
        """
        x, y = (together if step != 4 * lanes else 1 for step in steps)
        return cls(x, y, *steps) if x != y else NEIGHBOURS


NEIGHBOURS = Runs()


@dataclass(frozen=True, kw_only=True)
class GatherMultiply:
    """What a gather-multiply ``y[c][p] = bias[c] + sum_k weight[k][c] * x[p + term k]`` computes; places are in bytes.

    Attributes:
        pixels: where every ``p`` is in ``x`` and in ``y``.
        terms, sources: where every ``k`` is in ``x`` from there, and in the weights of an output channel.
        weight: of the first output channel of the first group.
        weight_channel, weight_group: to the weights of the next output channel, and of the next group.
        groups: how many there are; ``inputs`` and ``outputs`` are channels of one.
        bias: of all outputs; ``None`` for none.
        ranges: the (first, behind last) term of every pixel that is not known to be 0; ``None`` for all.
        y_group: between the results of groups; ``None`` for those of their channels.
    """

    pixels: list[Pair]
    terms: list[int]
    sources: list[int]
    weight: Ref
    weight_channel: int
    weight_group: int
    groups: int
    inputs: int
    outputs: int
    bias: Ref | None = None
    ranges: list[Pair] | None = None
    y_group: int | None = None


@dataclass(frozen=True, kw_only=True)
class GatherCorrelate:
    """What a gather-correlate ``target[c][k] = sum_p grad[c][p] * x[p + term k]`` computes; places are in bytes.

    Attributes:
        pixels: where every ``p`` is in ``x`` and in ``grad``.
        terms: where every ``k`` is in ``x`` from there, and in the weights of an output channel.
        groups, inputs, outputs, weight_channel, weight_group: as of ``GatherMultiply``.
        area: pixels of ``x`` per pixel of ``grad``, the product of the strides.
    """

    pixels: list[Pair]
    terms: list[Pair]
    groups: int
    inputs: int
    outputs: int
    weight_channel: int
    weight_group: int
    area: int


class LoweringCore:
    """Rows of one plan, and the buffers that they read and write; ``kind``: what the lanes hold, see ``codes``."""

    kind = SAMPLES

    def __init__(self, graph: Graph, nodes: Sequence[Node], lanes: int, blocks: int, parameters: Parameters,
                 keep: set[str], sparse: Mapping[str, SparseIndex] | None = None,
                 whole_gradients: bool = False) -> None:  # fmt: skip
        self.sparse = {} if sparse is None else sparse  # by the weight's name; products with other weights are dense
        self.whole_gradients = whole_gradients  # whether the gradients of weights that do not exist are kept too
        self.plan = Plan(graph, lanes, blocks, by_channel=self.kind == CHANNELS)
        self.lanes, self.blocks = lanes, blocks
        self._nodes, self._parameters, self._keep = nodes, parameters, keep
        sharing = share_memory(nodes, keep, self.shares)
        self.plan.root = sharing.root
        self._wanted = wanted_borders(nodes)
        for name, value in graph.values.items():
            if name in sharing.root and value.batched and name != LABELS:
                self.plan.layouts[name] = self.make_layout(value, sharing.border[name])
        self._to_clear = borders_to_clear(nodes, sharing.root, self.written_borders)
        self.plan.fixed.update(parameters.buffers)
        for name, size, dtype in (("labels", self.plan.capacity, np.int64), ("mask", self.plan.capacity, np.float32)):
            self.plan.fixed[name] = aligned(size, dtype)
        self._stage, self._position = "forward", 0
        self._lifetimes: dict[str, tuple[int, int]] = {}
        self._workspaces = 0
        self._thresholds: list[int] = []  # records of layers whose threshold a step may move
        self._masked: set[str] = set()  # weights of which a copy lies where their gradient will be
        self._written: dict[str, Ref] = {}  # where weights are written out for nodes to come, by name
        self._choice: TileChoice | None = None
        self.threads = 1  # that will run the plan: scratch memory is theirs, results are not

    def make_layout(self, value: Value, border: Border) -> Layout:
        """Return how a batched value lies in memory."""
        return Layout(self.blocks, self.lanes, *map_sizes(value.shape), border)

    def written_borders(self, node: Node) -> tuple[int, ...]:
        """See ``plan.written_borders``, for this kind of lanes."""
        return written_borders(node)

    def shares(self, x: Value, y: Value) -> bool:
        """Whether a reshape from ``x`` to ``y`` moves nothing."""
        return True

    def finish(self) -> Plan:
        """Place the buffers and return the plan."""
        for name in self._keep:
            buffer = self.plan.buffer(name)
            if buffer in self._lifetimes:
                self._lifetimes[buffer] = (self._lifetimes[buffer][0], len(self._nodes))
        self.plan.settle(self._lifetimes)
        return self.plan

    # --- buffers ---

    @property
    def node(self) -> Node:
        """The node that is being lowered."""
        return self._nodes[self._position]

    def layout(self, value: Value) -> Layout:
        """Return the layout of a batched value."""
        return self.plan.layouts[value.name]

    def zeros_around(self, value: Value) -> Border:
        """Return the border of a value that is known to be 0 while nodes read it; its memory may have a wider one."""
        return self._wanted.get(value.name, NO_BORDER)

    def address(self, value: Value) -> Ref:
        """Return where a value's first pixel inside the border (or first number) will be."""
        if not value.batched:
            known = self._parameters.find(value.name)
            return Ref(*known) if known else Ref(self.plan.buffer(value.name))
        return Ref(self.plan.buffer(value.name), self.layout(value).origin)

    def same_memory(self, a: Value, b: Value) -> bool:
        """Whether two values share memory."""
        return self.plan.buffer(a.name) == self.plan.buffer(b.name)

    def _touch(self, value: Value | None) -> None:
        """Keep a value's memory until the current node."""
        if value is not None:
            buffer = self.plan.buffer(value.name)
            if buffer in self._lifetimes:
                self._lifetimes[buffer] = (self._lifetimes[buffer][0], self._position)

    def _start(self, value: Value) -> None:
        """Begin a value's memory at the current node, its border zero, unless it took over another's."""
        buffer = self.plan.buffer(value.name)
        if buffer in self._lifetimes:
            self._lifetimes[buffer] = (self._lifetimes[buffer][0], self._position)
        elif not value.batched:
            if self._parameters.find(value.name) is None:
                self._reserve(buffer, 4 * value.size)
        else:
            self._reserve(buffer, self.layout(value).nbytes)
            if self.plan.root[value.name] in self._to_clear:
                self._clear_border(value)

    def _reserve(self, name: str, nbytes: int) -> None:
        self.plan.sizes[name] = nbytes
        self._lifetimes[name] = (self._position, self._position)

    def workspace(self, nbytes: int) -> Ref:
        """Return memory for the current node, and for those to come that ask for it ``again``."""
        name = f"workspace:{self._workspaces}"
        self._workspaces += 1
        self._reserve(name, nbytes)
        return Ref(name)

    def again(self, memory: Ref) -> Ref:
        """Return an earlier node's workspace with what that left there."""
        self._lifetimes[memory.buffer] = (self._lifetimes[memory.buffer][0], self._position)
        return memory

    def table(self, numbers: Any) -> Ref:
        """Return the address of constant int64 numbers; equal tables are stored once."""
        array = np.asarray(numbers, np.int64).ravel()
        name = f"table:{hash(array.tobytes())}:{array.size}"
        if name not in self.plan.fixed:
            self.plan.fixed[name] = aligned(array.size, np.int64)
            self.plan.fixed[name][:] = array
        return Ref(name)

    def index(self, weight: Value, part: str) -> Ref:
        """Return where kernels find an array of a sparse weight's index, such as ``starts``."""
        name = f"index:{weight.name}:{part}"
        self.plan.fixed[name] = getattr(self.sparse[weight.name], part)
        return Ref(name)

    def kept(self, name: str, nbytes: int) -> Ref:
        """Return memory in the arena that lasts to the end of the step, for ``Executor.kept`` to read."""
        self.plan.sizes[name] = nbytes
        self._lifetimes[name] = (self._position, len(self._nodes))
        return Ref(name)

    def lasting(self, name: str, array: NDArray[np.float32]) -> Ref:
        """Return memory that lasts from step to step, with what it holds before the first."""
        self.plan.fixed[name] = array
        return Ref(name)

    def shared(self, name: str, count: int) -> Ref:
        """Return ``count`` int32 numbers that last; the plans that ask for this name have them together."""
        lists = self._parameters.lists
        array = lists.get(name)
        self.plan.fixed[name] = lists[name] = aligned(count, np.int32) if array is None else array
        return Ref(name)

    def idle_gradient(self, weight: Value) -> Ref | None:
        """Return where a weight's gradient will be if a later node makes it: nothing else lies there until then."""
        name = self._parameters.gradient(weight.name)
        later = (value.name for node in self._nodes[self._position + 1 :] for value in node.outputs)
        return Ref("gradients", self.address(weight).offset) if name is not None and name in later else None

    def zeros(self, count: int) -> Ref:
        """Return ``count`` float32 zeros."""
        return self.table(np.zeros(-(-count // 2), np.int64))

    # --- rows ---

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Rows emitted inside belong to another stage than the node's own."""
        before, self._stage = self._stage, name
        yield
        self._stage = before

    @contextmanager
    def chosen(self, sizes: Sizes) -> Iterator[Tile]:
        """Yield the tile of a product; rows emitted inside tell why they have it."""
        self._choice = choose(sizes)
        yield self._choice.tile
        self._choice = None

    def emit(self, kernel: str, sizes: tuple[int, ...], jobs: int, **arguments: int | float | Ref) -> None:
        """Append a kernel call.

        Raises:
            GraphError: the arguments are not those of the kernel (a bug in an operator).
        """
        names = argument_names(kernel)
        if set(names) != set(arguments):
            raise GraphError(f"kernel '{kernel}': arguments {sorted(set(names) ^ set(arguments))} missing or unknown")
        values = tuple(arguments[name] for name in names)
        rows = self.plan.list_rows if self._stage == LISTS else self.plan.rows
        rows.append(Row((kernel, sizes), values, jobs, self._stage, self._position, self._choice))

    def _clear_border(self, value: Value) -> None:
        y = self.layout(value)
        if y.bordered:
            top, left, bottom, right = y.border
            self.emit(
                "fill_border", (y.lanes,), y.planes, y=self.address(value) + -y.origin, rows=y.rows,
                columns=y.columns, top=top, left=left, bottom=bottom, right=right, y_plane=y.channel, f_value=0.0,
            )  # fmt: skip


def border_of(y: Layout, prefix: str = "") -> dict[str, int]:
    """Return the pixels around the maps of a layout: ``top``, ``left``, ``bottom``, ``right``, with a prefix."""
    return {f"{prefix}{side}": n for side, n in zip(("top", "left", "bottom", "right"), y.border, strict=True)}


def strides(**layouts: Layout) -> dict[str, int]:
    """Return ``{name}_block``, ``{name}_channel``, ``{name}_row`` for every layout."""
    parts = ("block", "channel", "row")
    return {f"{name}_{part}": getattr(layout, part) for name, layout in layouts.items() for part in parts}


def steps_of(pixels: list[Pair], lanes: int) -> Pair:
    """Return the bytes from a pixel to the next of its vector, in both operands.

    They are neighbours in one at least; a stride may part them in the other.
    """
    size = 4 * lanes
    found = (pixels[1][0] - pixels[0][0], pixels[1][1] - pixels[0][1]) if len(pixels) > 1 else (size, size)
    return found if size in found and size <= min(found) and max(found) <= FARTHEST * size else (size, size)


def widened(pixels: list[Pair], lanes: int, widest: int, steps: Pair | None = None) -> tuple[list[Pair], int]:
    """Put as many neighbouring pixels into a vector as fit ``widest`` lanes; return the first of each, and the lanes.

    ``steps``: see ``steps_of``; without them neighbours in both operands count.

    Example:
        >>> widened([(0, 32), (16, 48), (64, 96), (80, 112)], lanes=4, widest=16)
        ([(0, 32), (64, 96)], 8)
    """
    together, steps = max(1, widest // lanes), steps or (4 * lanes, 4 * lanes)
    while together > 1 and not _runs(pixels, together, steps):
        together //= 2
    return pixels[::together], together * lanes


def row_lanes(x: Layout, words: int | None = None) -> int:
    """Return the lanes of the widest vectors that rows are whole numbers of: neighbouring pixels side by side.

    Normalisations, copies of pruned activations and bits of Relus work so. By vectors of 4 samples a step of ResNet-20
    at batch 4 took 4.17 ms, and takes 3.94 so; with a tenth of its weights 2.21 and 1.99 (AVX-512, one thread;
    test_row_vectors.py looks at the kernels). ``words``: per lane of ``x``, in which the bits of a map's vectors must
    have room, 32 in a word.

    Example:
        >>> row_lanes(Layout(blocks=1, lanes=4, channels=3, rows=5, columns=7))
        4
    """
    lanes = simd_lanes()
    while lanes > x.lanes:
        vectors = x.rows * x.columns * x.lanes // lanes
        if x.columns * x.lanes % lanes == 0 and (words is None or -(-vectors // 32) * lanes <= words * x.lanes):
            return lanes
        lanes //= 2
    return x.lanes


def overlapping(pixels: list[Pair], lanes: int, widest: int, steps: Pair | None = None) -> tuple[list[int], int]:
    """As ``widened``, for results that may be written twice; return the places of the first pixels, and the lanes.

    The last vector of a run that they do not fill begins sooner: the fewest vectors count.

    Example:
        >>> overlapping([(16 * i, 16 * i) for i in (0, 1, 2, 3, 4, 10, 11, 12, 13)], lanes=4, widest=16)
        ([0, 1, 5], 16)
    """
    a, c = steps or (4 * lanes, 4 * lanes)
    breaks = [i for i in range(1, len(pixels)) if pixels[i] != (pixels[i - 1][0] + a, pixels[i - 1][1] + c)]
    runs = list(zip([0, *breaks], [*breaks, len(pixels)], strict=True)) if pixels else []
    together, shortest = max(1, widest // lanes), min((end - start for start, end in runs), default=1)
    sizes = [n for n in (1, 2, 4) if n <= min(together, shortest)]
    best = min(sizes, key=lambda n: (sum(-(-(end - start) // n) for start, end in runs), n))
    return [min(i, end - best) for start, end in runs for i in range(start, end, best)], best * lanes


def _runs(pixels: list[Pair], together: int, steps: Pair) -> bool:
    """Whether the pixels are runs of ``together`` that are ``steps`` apart in both operands."""
    firsts = [first for first in pixels[::together] for _ in range(together)]
    return pixels == [(a + steps[0] * (i % together), c + steps[1] * (i % together))
                      for i, (a, c) in enumerate(firsts)]  # fmt: skip


def lanes_of(places: list[int]) -> int:
    """Return the widest vector that ``places``, byte offsets of float32, consist of; 0 if there is no such."""
    lanes = next((lanes for lanes in (16, 8, 4) if lanes <= simd_lanes() and len(places) % lanes == 0), 0)
    return lanes if places and places == list(range(0, 4 * len(places), 4)) else 0
