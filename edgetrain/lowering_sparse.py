"""Products whose weights are lists of non-zeros: the lists, the tiles of pixels, the kernel calls (``kernels/csr.py``).

The lists are expanded from the weight's ``SparseIndex`` by rows of the program that run when the topology has changed,
so a new one needs no new plan; in every step only where error maps are pruned, whose channels change.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgetrain.arrays import Layout
from edgetrain.choice import simd_lanes, target
from edgetrain.graph import Node, Value
from edgetrain.kernels.codes import ABSENT, ALL_COUNT, FLAGGED_COLUMNS, FLAGGED_ROWS, SAMPLES
from edgetrain.lowering_core import LoweringCore, Pair
from edgetrain.plan import LISTS, Ref
from edgetrain.sparse_index import WORD, SparseIndex

if TYPE_CHECKING:
    from edgetrain.ops.conv import Phase, Product

# Per kernel call, so that four threads find work. With 16, rows are cut into pieces that read the same error maps: the
# one-pass gradients of ResNet-20 at density 0.1 took 1.57 ms instead of 1.48 (batch 32, two threads).
_WANTED_JOBS = 8
_ROWS_PER_JOB = 8  # of expanding a list
_ENTRIES_PER_JOB = 128  # of summing gradients; a step of ResNet-20 at density 0.1 took 1 % longer with 1024 (2 threads)
_COPIES_PER_JOB = 512  # of putting weights into a list's order
_MOST_RUNS = 8  # of a tile: each keeps an address in a register
_LATENCY = 8  # multiply-accumulates that must be under way to hide one's latency
# Vectors of partial sums that a weight gradient may have, in bytes: a part of the second-level cache.
_SUMS = 1 << 19
# What a tile reads of a part's channels, in bytes, and the fewest entries of a row in a part: a row's accumulators are
# loaded and stored once per part. Layer 64@8x8 at density 0.2, 1 part of 164 KB: 1.50 ms for the three products on one
# thread, 4 of 41 KB 1.20, 8 of 20 KB 1.23, 16 1.38; 128@8x8 at 0.1 likewise, 8 parts 2.81 ms for 3.59.
# Asking for the next tile's gathered pixels beforehand did not pay: 16@32x32 at 0.1 went from 0.455 to 0.496 ms on
# two threads.
_NEAR = 40 << 10
_ENTRIES_PER_PART = 12
# Kernels whose multiply-accumulates are those of the weights that exist.
SKIPS_WEIGHTS = ("multiply_csr", "correlate_csr", "gradients_csr")
# Weights run on lists of non-zeros if a row's entries, and what a row costs besides, are at most this share of a dense
# row; else they are written out for dense kernels. Of direct kernels by the vectors of the output's pixels (one pixel
# of a full vector of samples is one), since an entry costs some 25 cycles however few vectors it meets. Measured where
# both were equally fast, writing out included (forward and both gradients, one thread, batch 8 to 128, AVX-512): 0.12
# to 0.14 for one vector (fully connected, batch 16), 0.18 for two, 0.34 for four, 0.43 for eight, from 0.44 on for
# more. With a fixed share of 0.45 fully connected layers with 0.4 of their weights took 2.9 times as long as dense.
# Less than a vector, of fully connected layers at batch 4 and 8: dense ones put samples apart, lists cannot. A step of
# LeNet-5 with a tenth of its weights (uniform) took 0.80 and 0.81 of the dense one with 0.12, takes 0.66 and 0.74 so.
_VECTORS, _DIRECT_SHARES = (0.25, 0.5, 1, 2, 4, 8, 16), (0.05, 0.08, 0.12, 0.18, 0.33, 0.42, 0.45)
# With strides vectors stay as empty as samples leave them, and lists pay later: as if there were at most so many
# vectors. Strided convolutions of ResNet-20 were equally fast at shares of 0.25 (batch 4), 0.38 (8) and above 0.45 (16,
# 32); a step with 0.4 of the weights took 1.037 of a dense one's time at batch 4, takes 1.00 so (static).
_STRIDED_VECTORS = 12
# Of Winograd's kernels: 0.28 to 0.4 in layers of ResNet-20 at batch 32, 0.27 at batch 8.
_WINOGRAD_SHARE = 0.27
_ROW_ENTRIES = 2.5


@dataclass(frozen=True)
class Grid:
    """The pixels of a product: rows of neighbours, as byte offsets in what is gathered and in what goes with it.

    Attributes:
        rows: (gathered, other) offset of the first pixel of every row.
        columns: pixels of a row.
        steps: (gathered, other) bytes from a pixel to the next.
        blocks: how often the grid is repeated, once per block of samples; 1 when the rows of all blocks are in it.
        lanes: numbers of a pixel's vector.
    """

    rows: list[Pair]
    columns: int
    steps: Pair
    blocks: int
    lanes: int = 1

    def widened(self, widest: int) -> Grid:
        """Return the same pixels with as many neighbours of a row in one vector as fit ``widest`` lanes.

        Where samples fill part of a vector: a step of ResNet-20 with a tenth of its weights (RigL, uniform) at batch 4
        took 2.44 ms with vectors of samples alone and takes 1.57 so (AVX-512, one thread).

        Example:
            >>> Grid([(0, 0), (192, 128)], 6, (16, 16), 1, 4).widened(16)
            Grid(rows=[(0, 0), (192, 128)], columns=3, steps=(32, 32), blocks=1, lanes=8)
        """
        together = max(1, widest // self.lanes)
        while together > 1 and (self.columns % together or self.steps != (4 * self.lanes, 4 * self.lanes)):
            together //= 2
        steps = self.steps[0] * together, self.steps[1] * together
        return Grid(self.rows, self.columns // together, steps, self.blocks, self.lanes * together)


@dataclass(frozen=True)
class _Flags:
    """Which part of a list counts: see ``kernels.csr.expand_csr``."""

    kind: int = ALL_COUNT
    address: Ref | int = 0
    taps: int = 1


@dataclass(frozen=True)
class Lists:
    """Where a list of non-zeros stands, see ``kernels.csr``.

    Attributes:
        offsets, order: of its entries.
        bounds: of its rows, part by part.
        parts: number of parts.
        reordered: whether weights are stored in another order than that of the list, so that a step copies them.
    """

    offsets: Ref
    order: Ref
    bounds: Ref
    parts: int
    reordered: bool

    @property
    def places(self) -> dict[str, Ref | int]:
        """What a kernel needs that does not ask for weights."""
        return {"offsets": self.offsets, "bounds": self.bounds, "parts": self.parts}


@dataclass(frozen=True)
class Tiling:
    """A grid cut into tiles of ``runs`` runs of ``columns`` pixels.

    Attributes:
        table: (gathered, other) offset of the first pixel of every run, ``runs`` per tile.
        together: so many tiles, one after another, have pixels in common with each other and with no further tile.
    """

    runs: int
    columns: int
    table: list[Pair]
    together: int = 1

    @property
    def tiles(self) -> int:
        """Number of tiles of a block."""
        return len(self.table) // self.runs


def tiling(grid: Grid, pixels: int) -> Tiling:
    """Cut a grid into tiles of at most ``pixels`` pixels, all of one shape.

    Runs at the end of a row that is no multiple of a run overlap the one before (see ``Tiling.together``), and the last
    tile may repeat a run: these pixels are computed twice, with the same result.

    Example:
        >>> made = tiling(Grid([(0, 0), (100, 100)], 11, (4, 4), 1), 8)
        >>> made.runs, made.columns, made.table, made.together
        (2, 4, [(0, 0), (100, 100), (16, 16), (116, 116), (28, 28), (128, 128)], 3)
    """
    columns, runs = _tile(len(grid.rows), grid.columns, pixels)
    starts = [min(first, grid.columns - columns) for first in range(0, grid.columns, columns)]
    rows = grid.rows + grid.rows[-1:] * (-len(grid.rows) % runs)
    return Tiling(runs, columns, _table(grid, rows, runs, starts), len(starts) if grid.columns % columns else 1)


def tilings(grid: Grid, pixels: int) -> list[Tiling]:
    """Cut a grid into tiles of at most ``pixels`` pixels, each pixel in exactly one; the most frequent shape first.

    Example:
        >>> made = tilings(Grid([(0, 0), (100, 100)], 11, (4, 4), 1), 8)
        >>> [(cut.runs, cut.columns, cut.tiles) for cut in made]
        [(2, 4, 2), (2, 3, 1)]
    """
    parts = -(-grid.columns // _tile(len(grid.rows), grid.columns, pixels)[0])
    narrow, wider = divmod(grid.columns, parts)
    made = []
    for columns, first, last in ((narrow + 1, 0, wider), (narrow, wider, parts)):
        starts = [p * narrow + min(p, wider) for p in range(first, last)]
        runs = _runs(len(grid.rows), pixels // columns)
        whole = len(grid.rows) // runs * runs
        for size, rows in ((runs, grid.rows[:whole]), (len(grid.rows) - whole, grid.rows[whole:])):
            if rows and starts:
                made.append(Tiling(size, columns, _table(grid, rows, size, starts)))
    return sorted(made, key=lambda cut: -cut.tiles)


def _tile(rows: int, columns: int, pixels: int) -> Pair:
    """Return (columns, runs) of the tile that computes least; of equal ones the squarest, whose windows overlap most.

    A tile costs about three pixels besides its own.

    Example:
        >>> _tile(32, 32, 16), _tile(7, 7, 16), _tile(1, 50, 16), _tile(2, 1, 16)
        ((4, 4), (7, 2), (13, 1), (1, 2))
    """

    def cost(shape: Pair) -> tuple[int, int, int]:
        wide, runs = shape
        return -(-columns // wide) * -(-rows // runs) * (wide * runs + 3), (wide + 2) * (runs + 2), runs

    return min(((wide, _runs(rows, pixels // wide)) for wide in range(1, min(pixels, columns) + 1)), key=cost)


def _runs(rows: int, wanted: int) -> int:
    """Return how many rows a tile takes: about ``wanted``, so that few are left over."""
    most = min(max(1, wanted), _MOST_RUNS, rows)
    return -(-rows // -(-rows // most))


def _table(grid: Grid, rows: list[Pair], runs: int, starts: list[int]) -> list[Pair]:
    """Return the first pixels of all runs, tile by tile."""
    groups = [rows[first : first + runs] for first in range(0, len(rows), runs)]
    (x_step, y_step) = grid.steps
    return [(a + s * x_step, b + s * y_step) for group in groups for s in starts for a, b in group]


def vectors_of(g: Product, blocks: int, lanes: int) -> float:
    """Return how many full vectors of the machine the output's pixels of all samples make, or pass for.

    Where samples fill half a vector, neighbouring pixels of a row fill the rest (``Grid.widened``), but for strides.
    """
    filled = lanes / simd_lanes()
    vectors = math.prod(g.out) * blocks * filled
    return min(vectors, _STRIDED_VECTORS * filled) if g.strides[1] > 1 else vectors


def suits_lists(index: SparseIndex, winograd: bool, vectors: float) -> bool:
    """Whether products with these weights run on lists of non-zeros; plans are made anew when the answer changes.

    Args:
        index: of the weights.
        winograd: whether the dense kernels would be Winograd's, which are faster than direct ones.
        vectors: see ``vectors_of``.

    Example:
        >>> index = SparseIndex((16, 16, 3, 3), capacity=16 * 16 * 9 * 3 // 10)
        >>> [suits_lists(index, *case) for case in ((False, 64), (True, 64), (False, 2))]
        [True, False, False]
    """
    count = index.capacity if index.compact else index.count  # what there is room for, where that cannot change
    return count <= index.rows * most_entries(index, winograd, vectors)


def most_entries(index: SparseIndex, winograd: bool, vectors: float) -> float:
    """Return how many entries a row may have on average for ``suits_lists``."""
    share = float(np.interp(vectors, _VECTORS, _DIRECT_SHARES))
    return (min(share, _WINOGRAD_SHARE) if winograd else share) * index.row_size - _ROW_ENTRIES


def moves_by_bits() -> bool:
    """Whether the machine spreads numbers over the lanes of a vector that a word of bits tells of: with AVX-512."""
    return simd_lanes() == WORD


def is_read_by_bits(g: Product) -> bool:
    """Whether few samples read a product's sparse weights by bits: it is fully connected, its rows lie side by side."""
    return moves_by_bits() and g.out == g.size == (1, 1) and g.groups == 1 and g.weight_in == 4


class SparseLowering(LoweringCore):
    """Lowers products with sparse weights; ``g`` is the product's ``ops.conv.Product``."""

    def runs_sparse(self, weight: Value, g: Product, winograd: bool = False) -> bool:
        """Whether a weight's products run on its list of non-zeros; else they are dense, see ``suits_lists``."""
        index = self.sparse.get(weight.name)
        if index is None or self.kind != SAMPLES:
            return False
        return suits_lists(index, winograd, vectors_of(g, self.blocks, self.lanes))

    def sparse_forward(self, node: Node, g: Product) -> None:
        """Emit ``y = weights * x + bias``."""
        x, y = self.layout(node.x), self.layout(node.y)
        index, bias = self.sparse[node.input(1).name], node.optional(2)
        pixels = g.forward_pixels(x, y)
        grid = self._grid(pixels, g.out[1], (g.strides[1] * x.pixel, y.pixel), x, y)
        phases = [(g.forward_terms(x), grid)]
        (lists,) = self._expand(node.input(1), phases, index.rows, g.outputs, g.inputs * x.channel)
        bias_ref = self.zeros(index.rows) if bias is None else self.address(bias)
        self._multiply(node, x, y, grid, lists, self._gather(node.input(1), lists), index.rows, bias_ref)

    def sparse_input_grad(self, node: Node, g: Product, kept: Value | None = None) -> None:
        """Emit the gradient of the input: one product on the transposed list per phase of the stride.

        ``kept``: numbers of the output channels that count, all by default.
        """
        flags = _Flags() if kept is None else _Flags(FLAGGED_COLUMNS, self._flags(kept, g), len(g.taps))
        grad, out = self.layout(node.x), self.layout(node.y)
        phases = [
            (_phase_terms(phase, grad), self._grid(phase.pixels(grad, out), len(phase.columns),
                                                   (grad.pixel, g.strides[1] * out.pixel), grad, out))
            for phase in g.phases()
        ]  # fmt: skip
        lists = self._expand(node.input(1), phases, g.channels_in, g.inputs, g.outputs * grad.channel, "input_", flags)
        weights = self._gather(node.input(1), lists[0])
        for (_, grid), own in zip(phases, lists, strict=True):
            self._multiply(node, grad, out, grid, own, weights, g.channels_in, self.zeros(g.channels_in))

    def sparse_weight_grad(self, node: Node, g: Product, kept: Value | None = None) -> None:
        """Emit the gradients of the weights that exist: vectors of partial sums, then their sums.

        ``kept``: numbers of the output channels that count, all by default; the others' weights get 0.
        """
        x, grad = self.layout(node.x), self.layout(node.input(1))
        weight = node.get("like")
        index: SparseIndex = self.sparse[weight.name]
        grid = self._grid(g.forward_pixels(x, grad), g.out[1], (g.strides[1] * x.pixel, grad.pixel), x, grad)
        flags = _Flags() if kept is None else _Flags(FLAGGED_ROWS, self._flags(kept, g))
        (lists,) = self._expand(weight, [(g.forward_terms(x), grid)], index.rows, g.outputs, g.inputs * x.channel,
                                flags=flags)  # fmt: skip
        cuts = tilings(grid, _pixels())
        part_sums = 4 * grid.lanes * max(1, index.capacity)
        chunks = _pixel_chunks(cuts[0].tiles, grid.blocks, part_sums)
        row_chunk = _chunk(index.rows, grid.blocks * chunks)
        row_chunks = -(-index.rows // row_chunk)
        sums = self.workspace(part_sums * grid.blocks * chunks)
        for number, cut in enumerate(cuts):
            self.emit(
                "correlate_csr", (grid.lanes, cut.runs, cut.columns, grid.steps[0], 2),
                grid.blocks * chunks * row_chunks, x=self.address(node.x), grad_out=self.address(node.input(1)),
                tiles=self.table(cut.table), **lists.places, sums=sums, keep=int(number > 0), row_count=index.rows,
                x_block=x.block, grad_block=grad.block, grad_channel=grad.channel, grad_step=grid.steps[1],
                part_sums=part_sums, tile_count=cut.tiles, tile_chunk=-(-cut.tiles // chunks), tile_chunks=chunks,
                row_chunk=row_chunk, row_chunks=row_chunks,
            )  # fmt: skip
        if kept is None:
            self._sum(weight, node.y, sums, grid.lanes, grid.blocks * chunks, lists.order)
        else:
            self.emit("sum_csr_listed", (grid.lanes,), -(-index.rows // _ROWS_PER_JOB), sums=sums,
                      grad_weight=self.address(node.y), capacity=index.capacity, part_sums=part_sums,
                      chunks=grid.blocks * chunks, starts=self.index(weight, "starts"), flags=flags.address,
                      row_count=index.rows, rows_per_job=_ROWS_PER_JOB)  # fmt: skip

    def sparse_grads(self, node: Node, g: Product, bounds: tuple[float, float]) -> None:
        """Emit both gradients in one pass over the output gradient per phase of the stride.

        A weight meets one phase alone, so all phases have their part of the same sums. ``bounds``: what the
        normalisation that comes before, if there is one, clips to. An addend is there already.
        """
        x, grad, out = (self.layout(value) for value in (node.x, node.input(1), node.y))
        weight, index = node.input(2), self.sparse[node.input(2).name]
        grids = [self._phase_grids(phase, grad, x, out) for phase in g.phases()]
        cuts = [[tilings(grid, _pixels_of_both()) for grid in pair] for pair in grids]
        blocks, lanes = self.blocks, grids[0][0].lanes
        part_sums = 4 * lanes * max(1, index.capacity)
        tiles = {with_x[0].tiles for with_x, _ in cuts}
        chunks = _pixel_chunks(tiles.pop(), blocks, part_sums) if len(tiles) == 1 else 1
        row_chunk = _chunk(index.input_rows, blocks * chunks)
        phases = [(_phase_terms(phase, grad), pair[0]) for phase, pair in zip(g.phases(), grids, strict=True)]
        lists = self._expand(weight, phases, index.input_rows, g.inputs, g.outputs * grad.channel, "input_",
                             pixels=_pixels_of_both())  # fmt: skip
        sums = self.workspace(part_sums * blocks * chunks)
        names, normalised = ("scale", "bias", "mean", "inverse_std"), len(node.inputs) > 4
        common: dict[str, int | float | Ref] = {
            "x": self.address(node.x), "grad_out": self.address(node.input(1)), "grad_x": self.address(node.y),
            **{name: self.address(node.input(4 + i)) if normalised else 0 for i, name in enumerate(names)},
            "weight": self._gather(weight, lists[0]), "sums": sums,
            "row_count": index.input_rows, "x_block": x.block, "x_channel": x.channel,
            "x_step": grids[0][0].steps[1], "grad_block": grad.block, "grad_x_block": out.block,
            "grad_x_channel": out.channel, "part_sums": part_sums, "tile_chunks": chunks, "row_chunk": row_chunk,
            "row_chunks": -(-index.input_rows // row_chunk), "f_low": bounds[0], "f_high": bounds[1],
            "adds": int(node.optional(3) is not None),
        }  # fmt: skip
        for own, pair in zip(lists, cuts, strict=True):
            for number, (cut, other) in enumerate(zip(*pair, strict=True)):
                table = [(a, b, c) for (a, b), (_, c) in zip(cut.table, other.table, strict=True)]
                self.emit(
                    "gradients_csr", (lanes, cut.runs, cut.columns, int(normalised)),
                    blocks * chunks * -(-index.input_rows // row_chunk), tiles=self.table(table), **own.places,
                    keep=int(number > 0), tile_count=cut.tiles, tile_chunk=-(-cut.tiles // chunks), **common,
                )  # fmt: skip
        self._sum(weight, node.outputs[1], sums, lanes, blocks * chunks, lists[0].order)

    def _phase_grids(self, phase: Phase, grad: Layout, x: Layout, out: Layout) -> list[Grid]:
        """Return the pixels of a phase with those of the input, and with those of its gradient."""
        columns, stride = len(phase.columns), phase.product.strides[1]
        grids = [
            Grid(phase.pixels(grad, other)[::columns], columns, (grad.pixel, stride * other.pixel), self.blocks,
                 self.lanes)
            for other in (x, out)
        ]  # fmt: skip
        return [grid.widened(simd_lanes()) for grid in grids]

    def _sum(self, weight: Value, target: Value, sums: Ref, lanes: int, chunks: int, order: Ref) -> None:
        """Emit the sums of all chunks' vectors into the gradients of the weights that exist."""
        index = self.sparse[weight.name]
        self.emit("sum_csr", (lanes,), -(-index.capacity // _ENTRIES_PER_JOB), sums=sums, order=order,
                  grad_weight=self.address(target), count=self.index(weight, "starts") + 4 * index.rows,
                  capacity=index.capacity, part_sums=4 * lanes * max(1, index.capacity), chunks=chunks,
                  entries_per_job=_ENTRIES_PER_JOB)  # fmt: skip

    def _flags(self, kept: Value, g: Product) -> Ref:
        """Emit which output channels count; return where that stands, int32 per channel."""
        flags = self.workspace(4 * g.channels_out)
        self.emit("channel_flags", (), 1, kept=self.address(kept), kept_count=kept.size, channels=g.channels_out,
                  flags=flags)  # fmt: skip
        return flags

    def _grid(self, pixels: list[Pair], columns: int, steps: Pair, gathered: Layout, other: Layout) -> Grid:
        """Return the pixels as rows; those of all blocks are in one grid where a block's would not fill a tile."""
        rows = pixels[::columns]
        if len(pixels) >= _pixels() or self.blocks == 1:
            return Grid(rows, columns, steps, self.blocks, self.lanes).widened(simd_lanes())
        rows = [(a + b * gathered.block, c + b * other.block) for b in range(self.blocks) for a, c in rows]
        return Grid(rows, columns, steps, 1, self.lanes)

    def _expand(self, weight: Value, phases: list[tuple[list[int], Grid]], rows: int, group_rows: int, group_bytes: int,
                rows_of: str = "", flags: _Flags = _Flags(), pixels: int = 0) -> list[Lists]:  # fmt: skip
        """Emit the expansion of a weight's list, one part of each row per phase of a stride; return the phases' lists.

        Where all entries count it lasts until the topology changes: expanding in every step took 5 % of one of
        ResNet-20 with a tenth of its weights (batch 4, two threads; 2 % at batch 32).

        Args:
            weight: whose list it is.
            phases: byte offsets by column, and pixels.
            rows, group_rows, group_bytes: see ``kernels.csr.expand_csr``.
            rows_of: "" for rows of output channels, "input_" for rows of input channels.
            flags: which entries count.
            pixels: most of a tile, see ``_pixels``.
        """
        index, lasts = self.sparse[weight.name], flags.kind == ALL_COUNT
        arrays = {part: self.index(weight, rows_of + part) for part in ("starts", "columns", "places")}
        name = f"list:{weight.name}:{rows_of}{group_bytes}:{hash(tuple(tuple(terms) for terms, _ in phases))}"
        complete, size = _is_complete(phases, flags), max(1, index.capacity)
        offsets = self._list_memory(lasts, name, size)
        # Places of weights in any case: ``gather_csr`` reads also what stands between the listed entries.
        order = arrays["places"] if complete else self.shared(f"{name}:{flags.kind}", size)
        reordered = not (complete and index.compact and not rows_of)
        made: list[Lists] = []
        after: Ref | int = 0
        for number, (terms, grid) in enumerate(phases):
            limits = _limits(index, terms, rows, tiling(grid, pixels or _pixels()), grid.steps[0], grid.lanes)
            place = f"{name}:{number}:{limits}"
            known = lasts and place in self.plan.fixed  # another product reads the same list
            bounds = self._list_memory(lasts, place, 2 * rows * len(limits))
            if not known:
                with self.stage(LISTS if lasts else self._stage):
                    self.emit(
                        "expand_csr", (flags.kind,), -(-rows // _ROWS_PER_JOB), **arrays, terms=self.table(terms),
                        limits=self.table(limits), bounds=bounds, offsets=offsets, order=0 if complete else order,
                        row_count=rows, group_rows=group_rows, group_bytes=group_bytes, parts=len(limits),
                        rows_per_job=_ROWS_PER_JOB, flags=flags.address, taps=flags.taps, after=after,
                    )  # fmt: skip
            made.append(Lists(offsets, order, bounds, len(limits), reordered))
            after = bounds + 8 * rows * (len(limits) - 1)
        return made

    def _list_memory(self, lasts: bool, name: str, count: int) -> Ref:
        """Return memory for int32 numbers of a list."""
        return self.shared(name, count) if lasts else self.workspace(4 * count)

    def _gather(self, weight: Value, lists: Lists) -> Ref:
        """Return where a list's weights stand one after another; emit the copy unless they are stored so."""
        if not lists.reordered:
            return self.address(weight)
        index = self.sparse[weight.name]
        values = self.workspace(4 * max(1, index.capacity))
        self.emit("gather_csr", (), -(-index.capacity // _COPIES_PER_JOB), weight=self.address(weight),
                  order=lists.order, values=values, count=self.index(weight, "starts") + 4 * index.rows,
                  entries_per_job=_COPIES_PER_JOB)  # fmt: skip
        return values

    def _multiply(self, node: Node, x: Layout, y: Layout, grid: Grid, lists: Lists, weight: Ref, rows: int,
                  bias: Ref) -> None:  # fmt: skip
        """Emit ``y[row][p] = bias[row] + sum over the row's entries of w * x[p + offset]``."""
        cut = tiling(grid, _pixels())
        sets = max(1, _LATENCY // (cut.runs * cut.columns))
        # A tile adds part after part to what it has stored: no other thread may store the same pixels meanwhile.
        together = cut.together if lists.parts != 1 else 1
        groups = cut.tiles // together
        chunks = min(groups, max(1, -(-_WANTED_JOBS // grid.blocks)))
        tile_chunk = -(-groups // chunks) * together
        chunks = -(-cut.tiles // tile_chunk)
        row_chunk = _chunk(rows, grid.blocks * chunks)
        row_chunks = -(-rows // row_chunk)
        self.emit(
            # ``sets`` entries per turn of the loop, mostly one: two left a rest that was predicted wrongly every
            # other time, and took 0.81 ms instead of 0.69 for the forward products of six layers 16@32x32 at density
            # 0.1 (one thread).
            "multiply_csr", (grid.lanes, cut.runs, cut.columns, grid.steps[0], sets),
            grid.blocks * chunks * row_chunks, x=self.address(node.x), y=self.address(node.y), bias=bias,
            tiles=self.table(cut.table), weight=weight, **lists.places,
            row_count=rows, x_block=x.block, y_block=y.block, y_channel=y.channel, y_step=grid.steps[1],
            tile_count=cut.tiles, tile_chunk=tile_chunk, tile_chunks=chunks, row_chunk=row_chunk,
            row_chunks=row_chunks,
        )  # fmt: skip


def _is_complete(phases: list[tuple[list[int], Grid]], flags: _Flags) -> bool:
    """Whether nothing is left out in the middle of a list's rows.

    A single phase may leave out weights, too: those that meet the border alone, where the stride is above the size.
    """
    return len(phases) == 1 and flags.kind != FLAGGED_COLUMNS and ABSENT not in phases[0][0]


def _limits(index: SparseIndex, terms: list[int], rows: int, cut: Tiling, step: int, lanes: int) -> list[int]:
    """Return the column behind each part of a list: as many parts as make the channels of one fit the cache.

    ``step``: bytes from a pixel of a tile to the next.
    """
    taps = [term for term in terms[: index.taps] if term != ABSENT]
    if not taps:
        return [len(terms)]
    # A tile reads, for every tap, a rectangle of pixels; the rectangles of a channel overlap.
    run = cut.columns * step
    places = {(a + tap) // (4 * lanes) + p for a, _ in cut.table[: cut.runs] for tap in taps
              for p in range(0, run // (4 * lanes), max(1, step // (4 * lanes)))}  # fmt: skip
    channels = len(terms) // index.taps
    # By the capacity, not by how many entries there are now: parts fix the order of summation, and a plan made later
    # (by a resumed run) must give the same bits.
    fewest = index.capacity // rows // _ENTRIES_PER_PART
    parts = min(-(-channels * 4 * lanes * len(places) // _NEAR), fewest, channels)
    return [-(-channels * (part + 1) // parts) * index.taps for part in range(parts)] if parts > 1 else [len(terms)]


def _pixels() -> int:
    """Return the most pixels of a tile: five eighths of the registers.

    Of 12, 16, 20, 24 and 28 with 32 registers 20 took least over all layers of ResNet-20 at density 0.1.
    """
    return 5 * target().registers // 8


def _pixels_of_both() -> int:
    """Return the most pixels of a tile of both gradients: a quarter of the registers holds ``x``, another ``dx``."""
    return target().registers // 4


def _pixel_chunks(tiles: int, blocks: int, part_sums: int) -> int:
    """Return into how many chunks of pixels to cut the tiles of a block, each with sums of its own."""
    chunks = max(1, min(-(-_WANTED_JOBS // blocks), tiles, _SUMS // (part_sums * blocks)))
    return -(-tiles // -(-tiles // chunks))


def _chunk(rows: int, jobs: int) -> int:
    """Return into how many rows at a time to cut a product that has so many jobs without cutting rows."""
    return -(-rows // min(rows, -(-_WANTED_JOBS // jobs)))


def _phase_terms(phase: Phase, grad: Layout) -> list[int]:
    """Return the byte offset into ``grad`` of every (output channel of a group, kernel position), or ``ABSENT``."""
    g = phase.product
    terms = np.full((g.outputs, len(g.taps)), ABSENT, np.int64)
    for i, j, a, b in phase.taps:
        channels = np.arange(g.outputs) * grad.channel
        terms[:, i * g.kernel[1] + j] = channels + a * grad.row + b * grad.pixel
    return [int(term) for term in terms.ravel()]
