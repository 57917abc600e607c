"""How the operators of ``ops/gradient_pruning.py`` become kernel calls."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetrain.arrays import ALIGNMENT, Layout
from edgetrain.choice import target
from edgetrain.graph import Node
from edgetrain.lowering_pooled import PooledLowering
from edgetrain.plan import Ref

if TYPE_CHECKING:
    from edgetrain.ops.conv import Product
    from edgetrain.ops.pooling import Pool

_PIXELS_PER_JOB = 64
# Accumulators of a tile: one vector per term, or per channel. The 16 registers of AVX2 hold 12 of them.
_ACCUMULATORS = {32: 16, 16: 12}


@dataclass(frozen=True)
class _ErrorLists:
    """Where the parts of an error map's lists lie, see ``kernels.error_lists``.

    Attributes:
        channels, pixels, blocks: of the error map.
    """

    channels: int
    pixels: int
    blocks: int

    @property
    def vectors(self) -> int:
        """Vectors of the error map."""
        return self.channels * self.pixels * self.blocks

    @property
    def pairs(self) -> int:
        """Byte offset of the pairs of every channel's pixels; segments come before."""
        return 16 * self.channels

    @property
    def entries(self) -> int:
        """Byte offset of the channels of every pixel."""
        return self.pairs + 16 * self.vectors

    @property
    def counts(self) -> int:
        """Byte offset of the numbers of channels of every pixel."""
        return self.entries + 4 * self.vectors

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.counts + 4 * self.pixels * self.blocks + ALIGNMENT


@dataclass(frozen=True)
class _ErrorCopies:
    """Where the parts of lists with copies of their vectors lie, see ``kernels.error_lists.list_pool_vectors``.

    Attributes:
        planes: of the error map, each with a list.
        capacity: vectors of a plane that there is room for.
        vector_bytes: of one vector.
    """

    planes: int
    capacity: int
    vector_bytes: int

    @property
    def pairs(self) -> int:
        """Byte offset of the pairs; segments come before."""
        return 16 * self.planes

    @property
    def values(self) -> int:
        """Byte offset of the vectors."""
        return -(-(self.pairs + 16 * self.planes * self.capacity) // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.values + self.vector_bytes * self.planes * self.capacity


class ListedLowering(PooledLowering):
    """Lowers gradient pruning, and products that skip vectors of zeros; lanes hold samples."""

    def pruned_gradient(self, node: Node) -> None:
        """Emit the pruning, and the record of this step's mean and counts in the update."""
        x, y, by_element = self.layout(node.x), self.layout(node.y), node.get("group") == "element"
        magnitudes = self.kept(f"magnitudes:{node.y.name}", 8 * x.planes)
        counts, record = self.kept(f"counts:{node.y.name}", 16 * x.planes), self.record_of(node)
        self.emit(
            "prune_elements" if by_element else "prune_vectors", (self.lanes,), x.planes, grad=self.address(node.x),
            y=self.address(node.y), magnitudes=magnitudes, counts=counts, record=record, state=Ref("state"),
            stream=int(node.get("stream")), channels=x.channels, rows=x.rows, columns=x.columns, grad_block=x.block,
            grad_channel=x.channel, grad_row=x.row, y_block=y.block, y_channel=y.channel, y_row=y.row,
            f_factor=float(node.get("factor")),
        )  # fmt: skip
        pixels = x.rows * x.columns
        with self.stage("update"):
            self.emit("record_mean", (), 1, magnitudes=magnitudes, counts=counts, record=record,
                      tally=self.tally_of(node), state=Ref("state"), parts=x.planes,
                      count=pixels * (x.channels if by_element else x.planes), per_sample=int(by_element))  # fmt: skip

    def error_lists(self, node: Node, g: Product) -> None:
        """Emit the lists that are read, and how many vectors are in none because of pruning."""
        x, grad, by_pixel = self.layout(node.get("like")), self.layout(node.x), bool(node.get("by_pixel"))
        lists, base = self._error_lists(g), self.address(node.y)
        self.plan.sizes[self.plan.buffer(node.y.name)] = lists.nbytes if by_pixel else lists.entries
        flags = self.workspace(4 * lists.vectors) if by_pixel else base
        self.emit(
            "list_pixels", (self.lanes, int(by_pixel)), g.channels_out, grad=self.address(node.x), flags=flags,
            segments=base, pairs=base + lists.pairs, pixels=self.table(g.forward_pixels(x, grad)),
            pixel_count=lists.pixels, blocks=self.blocks, grad_block=grad.block, grad_channel=grad.channel,
            x_block=x.block,
        )  # fmt: skip
        if by_pixel:
            chunks = -(-lists.pixels // _PIXELS_PER_JOB)
            self.emit(
                "list_channels", (), self.blocks * chunks, flags=flags, entries=base + lists.entries,
                counts=base + lists.counts, pixel_count=lists.pixels, channels=g.channels_out,
                pixel_chunk=_PIXELS_PER_JOB, pixel_chunks=chunks,
            )  # fmt: skip
        self._count_listed(node, g, base)

    def pooled_error_lists(self, node: Node, g: Product, pool: Pool) -> None:
        """Emit the lists of what a max pool's gradient would write, and how many vectors pruning left out.

        In LeNet-5 at batch 32 and rate 0.8 the map of 6,912 vectors took 15.8 us to write and 12.4 to read again.
        """
        x, positions, grad = self.layout(node.get("x")), self.layout(node.x), self.layout(node.input(1))
        base, (down, right) = self.address(node.y), g.strides
        lists = self._pooled_vectors(g, len(pool.taps) * grad.rows * grad.columns)
        self.plan.sizes[self.plan.buffer(node.y.name)] = lists.nbytes
        firsts = [(h * pool.strides[0], w * pool.strides[1]) for h in range(grad.rows) for w in range(grad.columns)]
        corners, taps = ([h * down * x.row + w * right * x.pixel for h, w in places] for places in (firsts, pool.taps))
        self.emit(
            "list_pool_vectors", (self.lanes, len(pool.taps), pool.position_bits), lists.planes,
            positions=self.address(node.x), grad_out=self.address(node.input(1)), segments=base,
            pairs=base + lists.pairs, values=base + lists.values, corners=self.table(corners),
            taps=self.table(taps), channels=g.channels_out, capacity=lists.capacity, out_rows=grad.rows,
            out_columns=grad.columns, positions_block=positions.block, positions_channel=positions.channel,
            grad_block=grad.block, grad_channel=grad.channel, grad_row=grad.row, x_block=x.block,
        )  # fmt: skip
        self._count_listed(node, g, base, self.blocks)

    def _count_listed(self, node: Node, g: Product, segments: Ref, parts: int = 1) -> None:
        """Emit how many vectors of an error map are in no list because of pruning."""
        pruned = node.get("pruned")
        planes = self.layout(pruned).channels
        self.emit(
            "count_listed", (), 1, segments=segments, counts=Ref(f"counts:{pruned.name}"),
            tally=self.tally_of(node), channels=g.channels_out, planes=planes,
            groups=math.gcd(planes, g.channels_out), blocks=self.blocks, vectors=self._error_lists(g).vectors,
            parts=parts,
        )  # fmt: skip

    def listed_input_grad(self, node: Node, g: Product) -> None:
        """Pack the weights, then one gathering product; the stride is in its tables."""
        grad, out, lists = self.layout(node.x), self.layout(node.y), self._error_lists(g)
        base, taps = self.address(node.input(2)), len(g.taps)
        width = min(_ACCUMULATORS[target().registers], g.channels_in)
        weight, tiles = self.dense_weight(node.input(1), g), -(-g.channels_in // width)
        sources = [c * g.weight_out + t * g.weight_tap for c in range(g.channels_out) for t in range(taps)]
        packed, _ = self.pack_weights(weight, sources, width, g.channels_in, g.weight_in, 1, 0)
        starts, meets, targets = _meets(g, grad, out, 4 * width)
        chunks = -(-len(targets) // _PIXELS_PER_JOB)
        self.emit(
            "multiply_lists", (self.lanes, width), self.blocks * chunks * tiles, grad=self.address(node.x),
            y=self.address(node.y), weight=packed, entries=base + lists.entries, counts=base + lists.counts,
            meets=self.table(meets), meet_starts=self.table(starts), targets=self.table(targets),
            pixel_count=len(targets), grad_pixels=lists.pixels, grad_channels=g.channels_out,
            channel_count=g.channels_in, grad_block=grad.block, grad_channel=grad.channel, y_block=out.block,
            y_channel=out.channel, weight_tile=4 * width * len(sources), weight_channel=4 * width * taps,
            pixel_chunk=_PIXELS_PER_JOB, pixel_chunks=chunks, tiles=tiles,
        )  # fmt: skip

    def listed_weight_grad(self, node: Node, g: Product) -> None:
        """One correlation over the lists of every channel's pixels."""
        with self.whole_gradient(node, g) as target:
            self._listed_weight_grad(node, g, target)

    def _listed_weight_grad(self, node: Node, g: Product, place: Ref) -> None:
        if len(node.inputs) > 2:
            grad, lists = node.input(1), self.address(node.input(2))
            self._correlate_error_lists(node, g, place, lists, lists + self._error_lists(g).pairs, self.address(grad),
                                        g.channels_out, self.layout(grad).channel)  # fmt: skip
            return
        copies, lists = self._pooled_vectors(g, int(node.get("covered"))), self.address(node.input(1))
        # A thread meets the blocks that it listed: a part of the input that another one used last comes slowly. With a
        # list per channel LeNet-5's first layer took 18 us on two threads, as on one (batch 32, rate 0.8).
        part_bytes = g.channels_out * g.weight_out
        sums = place if self.blocks == 1 else self.workspace(self.blocks * part_bytes)
        self._correlate_error_lists(node, g, sums, lists, lists + copies.pairs, lists + copies.values, copies.planes, 0)
        if self.blocks > 1:
            self.sum_parts(sums, place, self.blocks, part_bytes)

    def _correlate_error_lists(
        self, node: Node, g: Product, place: Ref, segments: Ref, pairs: Ref, values: Ref, count: int,
        value_channel: int,
    ) -> None:  # fmt: skip
        """Emit the correlation of x with ``count`` lists, each of which gives the gradients of a channel's weights."""
        x = self.layout(node.x)
        terms = list(zip(g.forward_terms(x), g.forward_sources(), strict=True))
        self.correlate_lists(
            terms, _ACCUMULATORS[target().registers], count, other=self.address(node.x), values=values, target=place,
            segments=segments, pairs=pairs, value_channel=value_channel, target_channel=g.weight_out,
        )  # fmt: skip

    def _pooled_vectors(self, g: Product, pixels: int) -> _ErrorCopies:
        """Return where lists and vectors of a map are, of which windows of a pool cover so many pixels."""
        return _ErrorCopies(self.blocks * g.channels_out, pixels, 4 * self.lanes)

    def _error_lists(self, g: Product) -> _ErrorLists:
        return _ErrorLists(g.channels_out, g.out[0] * g.out[1], self.blocks)


def _meets(
    g: Product, grad: Layout, out: Layout, position_bytes: int
) -> tuple[list[int], list[tuple[int, int, int]], list[int]]:
    """Return, for every pixel of the input gradient, the pixels of the error map that it gathers from.

    Returns:
        Where each pixel's triples start (one more at the end), the triples (pixel of the error map, its byte offset,
        byte offset of the weights), and the pixel's own byte offset.
    """
    starts, meets, targets = [0], [], []
    for phase in g.phases():
        for n, h in enumerate(phase.rows):
            for m, w in enumerate(phase.columns):
                for i, j, a, b in phase.taps:
                    row, column = n + a, m + b
                    if 0 <= row < g.out[0] and 0 <= column < g.out[1]:
                        offset, tap = row * grad.row + column * grad.pixel, i * g.kernel[1] + j
                        meets.append((row * g.out[1] + column, offset, tap * position_bytes))
                starts.append(len(meets))
                targets.append(h * out.row + w * out.pixel)
    return starts, meets, targets
