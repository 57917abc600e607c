"""How saved activations of which single numbers are kept become kernel calls; see ``kernels/element_lists.py``."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetrain.arrays import Layout
from edgetrain.choice import simd_lanes, target
from edgetrain.errors import GraphError
from edgetrain.graph import Node, Value
from edgetrain.lowering_core import FEWEST_JOBS, Pair, border_of, row_lanes, strides
from edgetrain.lowering_pruned import COUNTERS, PrunedLowering
from edgetrain.ops.registry import Border
from edgetrain.plan import Ref

if TYPE_CHECKING:
    from edgetrain.ops.conv import Phase, Product

# Of turned error maps that one strip of a list meets. Measured for ResNet-20 (batch 32, 90 % zeros, L2 of 1 MiB): all
# correlations take 2.5 ms with 800 KiB, 2.9 with 400 KiB and with whole maps.
_STRIP_BYTES = 800 << 10


@dataclass(frozen=True)
class _ElementLists:
    """Where the parts of a list of numbers lie: segments, places, numbers.

    Attributes:
        strips: each has a segment per channel; the phase of the stride, and pixels of it (offset in a sample of the
            turned maps, offset in the activation). A list that only saves memory has none, and one segment per channel.
        channels: of the activation.
        capacity: numbers there is room for.
    """

    strips: list[tuple[Phase, list[Pair]]]
    channels: int
    capacity: int

    @property
    def strip_bytes(self) -> int:
        """Bytes of the segments of a strip."""
        return 16 * self.channels

    @property
    def places(self) -> int:
        """Byte offset of the places."""
        return max(1, len(self.strips)) * self.strip_bytes

    @property
    def values(self) -> int:
        """Byte offset of the numbers."""
        return self.places + 4 * self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.values + 4 * self.capacity


class ElementLowering(PrunedLowering):
    """Lowers weight gradients from the largest numbers of an activation."""

    def list_elements(self, node: Node, g: Product) -> None:
        """Emit the choice of a threshold, and the list of the numbers that reach it."""
        lists, sample = self._element_lists(node, g, node.x), self._turned(g).block
        self._list(node, lists, [pixels for _, pixels in lists.strips], self.lanes * sample, sample)

    def store_elements(self, node: Node) -> None:
        """Emit the same, with places in the map that ``expand_elements`` makes.

        Raises:
            GraphError: the map is too large for places of 32 bits.
        """
        x, y = self.layout(node.x), self.layout(node.get("expanded"))
        if y.nbytes >= 2**31:
            raise GraphError(f"node '{node.name}': no lists of numbers for maps of 2 GiB and more; use a smaller batch "
                             "size")  # fmt: skip
        pixels = [(0, row, column) for row in range(x.rows) for column in range(x.columns)]
        places = [(y.offset(pixel), x.offset(pixel)) for pixel in pixels]
        self._list(node, self._stored_lists(node, x), [places], y.block, 4)

    def expand_elements(self, node: Node) -> None:
        """Emit the map that a list was made of, zeros where nothing was listed."""
        y, base = self.layout(node.y), self.address(node.x)
        lists = self._stored_lists(node, y)
        self.emit(
            "expand_elements", (y.lanes,), y.channels, segments=base, places=base + lists.places,
            values=base + lists.values, y=self.address(node.y), blocks=y.blocks, rows=y.rows, columns=y.columns,
            **strides(y=y),
        )  # fmt: skip

    def _stored_lists(self, node: Node, x: Layout) -> _ElementLists:
        numbers = self.plan.capacity * x.channels * x.rows * x.columns
        return _ElementLists([], x.channels, _capacity(node, numbers))

    def _list(self, node: Node, lists: _ElementLists, strips: list[list[Pair]], block: int, sample: int) -> None:
        """Emit a threshold and lists; ``block``, ``sample``: bytes between those of the maps that places are in."""
        x = self.layout(node.x)
        self.plan.sizes[self.plan.buffer(node.y.name)] = lists.nbytes
        counts = self.workspace(8 * x.planes)
        self.emit("count_elements", (x.lanes,), x.planes, counts=counts, **self._chosen_from(node, node.x))
        starts, choice = self._element_threshold(node, node.x, lists.capacity, counts)
        ends = list(itertools.accumulate(map(len, strips), initial=0))
        base = self.address(node.y)
        self.emit(
            "list_elements", (self.lanes,), x.channels, x=self.address(node.x), starts=starts, **choice,
            mask=Ref("mask"), segments=base, places=base + lists.places, values=base + lists.values,
            pixels=self.table([pair for pixels in strips for pair in pixels]), strip_starts=self.table(ends),
            strips=len(strips), blocks=self.blocks, channels=x.channels, x_block=x.block, x_channel=x.channel,
            other_block=block, other_sample=sample,
        )  # fmt: skip

    def mask_activation(self, node: Node) -> None:
        """Emit the copy of the numbers that reach the threshold, and a choice of another one."""
        x, y = self.layout(node.x), self.layout(node.y)
        numbers = self.plan.capacity * x.channels * x.rows * x.columns
        room = _capacity(node, numbers)
        copy: dict[str, int | Ref] = {"y": self.address(node.y), **strides(y=y)}
        lines = y.border[0] + x.rows + y.border[2]
        chunk = -(-lines // -(-FEWEST_JOBS // x.planes))
        parts = -(-lines // chunk)
        counts, source = self.workspace(8 * x.planes * parts), self._chosen_from(node, node.x)
        self.emit("copy_elements", (x.lanes, row_lanes(x)), x.planes * parts, counts=counts, row_chunk=chunk,
                  parts=parts, **source, **copy, **border_of(y))  # fmt: skip
        _, choice = self._element_threshold(node, node.x, room, counts, parts)
        self.emit("keep_elements", (x.lanes,), x.planes, **source, **choice, **copy)

    def drop_elements(self, node: Node, value: Value, counts: Ref | int) -> None:
        """Emit the choice of another threshold for a map that was written with its largest numbers alone."""
        x = self.layout(value)
        numbers = self.plan.capacity * x.channels * x.rows * x.columns
        _, choice = self._element_threshold(node, value, numbers, counts)
        self.emit(
            "drop_elements", (x.lanes, row_lanes(x)), x.planes, x=self.address(value), threshold=choice["threshold"],
            record=self.record_of(node), state=Ref("state"), refresh=int(node.get("refresh")), **_planes(x),
        )  # fmt: skip

    def _chosen_from(self, node: Node, value: Value) -> dict[str, int | Ref]:
        """Return the arguments that tell which numbers are chosen from, and the threshold of the step before."""
        x = self.layout(value)
        return {"x": self.address(value), "record": self.record_of(node), **self.alive(x), **_planes(x)}

    def _element_threshold(
        self, node: Node, value: Value, capacity: int, counts: Ref | int, parts: int = 1
    ) -> tuple[Ref, dict[str, Ref]]:
        """Emit the choice; return where every channel's numbers go, and the arguments that tell what was chosen.

        ``counts``: of the numbers that reach the threshold of the step before, in so many ``parts`` of a plane: 1 where
        it matters where they go.
        """
        x, starts = self.layout(value), self.workspace(8 * (self.layout(value).maps + 1))
        choice = {"threshold": self.threshold_of(node), "quotas": self.workspace(8 * x.planes)}
        self.emit(
            "element_threshold", (x.lanes,), 1, **self._chosen_from(node, value), **choice, counts=counts,
            starts=starts, capacity=capacity, counters=self.workspace(COUNTERS),
            magnitudes=self.workspace(4 * x.lanes * x.columns * x.rows * x.planes), tally=self.tally_of(node),
            state=Ref("state"), blocks=self.blocks, refresh=int(node.get("refresh")),
            sample_numbers=x.channels * x.rows * x.columns, parts=parts,
        )  # fmt: skip
        return starts, choice

    def alive(self, x: Layout) -> dict[str, int | Ref]:
        """Return where a 1 stands for every lane that holds what counts, else 0, and how a plane finds its lanes."""
        return {"mask": Ref("mask"), "mask_block": x.pixel, "mask_channel": 0}

    def element_weight_grad(self, node: Node, g: Product) -> None:
        """Emit the turned error map, and a correlation per phase of the stride, which meets positions of its own."""
        with self.whole_gradient(node, g) as place:
            self.clear_unmet(node, g, place)
            turned, lists = self._turn(node, g), self._element_lists(node, g, node.get("source"))
            for phase in dict.fromkeys(phase for phase, _ in lists.strips):
                strips = [number for number, (of, _) in enumerate(lists.strips) if of == phase]
                self._correlate_phase(node, place, turned, lists, strips)

    def _turn(self, node: Node, g: Product) -> Ref:
        """Emit the error map with its channels next to each other; return the address of the first pixel."""
        turned = self._turned(g)
        # The last tile of channels may read behind those of the last pixel; what it finds there is not stored.
        tiles = [_tile(g, len(phase.taps))[0] * simd_lanes() for phase in g.phases() if phase.taps]
        return self.turn(node.input(1), turned, max((-turned.lanes % tile for tile in tiles), default=0))

    def turn(self, value: Value, turned: Layout, more: int = 0) -> Ref:
        """Emit a copy of a value with its channels next to each other; return the address of the first pixel.

        ``more``: numbers that may be read behind the last pixel.
        """
        x, (top, left, bottom, right) = self.layout(value), turned.border
        memory = self.workspace(turned.nbytes + 4 * more)
        self.emit(
            "turn_maps", (self.lanes, min(self.lanes, turned.lanes)), self.blocks * (top + x.rows + bottom),
            x=self.address(value), y=memory, channels=x.channels, rows=x.rows, columns=x.columns, top=top, left=left,
            bottom=bottom, right=right, x_block=x.block, x_channel=x.channel, x_row=x.row, y_sample=turned.block,
            y_pixel=turned.pixel,
        )  # fmt: skip
        return memory + turned.origin

    def _correlate_phase(self, node: Node, place: Ref, other: Ref, lists: _ElementLists, strips: list[int]) -> None:
        """Emit the correlation of a phase, whose strips follow one another."""
        phase, base = lists.strips[strips[0]][0], self.address(node.x)
        g, turned = phase.product, self._turned(phase.product)
        terms = [(a * turned.row + b * turned.pixel, (i * g.kernel[1] + j) * g.weight_tap) for i, j, a, b in phase.taps]
        lanes, (vectors, width) = simd_lanes(), _tile(g, len(terms))
        parts, channel_parts = -(-len(terms) // width), -(-g.channels_out // (vectors * lanes))
        self.emit(
            "correlate_elements", (lanes, vectors, width), g.channels_in * channel_parts * parts, other=other,
            segments=base + strips[0] * lists.strip_bytes, places=base + lists.places, values=base + lists.values,
            target=place, terms=self.table(terms + [terms[-1]] * (-len(terms) % width)), term_count=len(terms),
            term_parts=parts, channel_count=g.channels_out, channel_parts=channel_parts, weight_out=g.weight_out,
            weight_in=g.weight_in, strips=len(strips), strip_segments=lists.strip_bytes,
        )  # fmt: skip

    def _turned(self, g: Product) -> Layout:
        """Return the layout of the turned error map."""
        return self.turned_layout(g.channels_out, max(simd_lanes(), self.lanes), g.out, g.grad_border)

    def turned_layout(self, channels: int, vector: int, size: Pair, border: Border) -> Layout:
        """Return the layout of turned maps: a block is a sample, lanes are all channels, in whole vectors."""
        return Layout(self.plan.capacity, -(-channels // vector) * vector, 1, *size, border)

    def _element_lists(self, node: Node, g: Product, x: Value) -> _ElementLists:
        numbers = self.plan.capacity * g.channels_in * g.size[0] * g.size[1]
        if self._turned(g).nbytes >= 2**31:
            raise GraphError(f"node '{node.name}': no lists of numbers for error maps of 2 GiB and more; use a smaller "
                             "batch size, or group='lanes'")  # fmt: skip
        strips = [strip for phase in g.phases() if phase.taps for strip in self._strips(phase, self.layout(x))]
        return _ElementLists(strips, g.channels_in, _capacity(node, numbers))

    def _strips(self, phase: Phase, x: Layout) -> list[tuple[Phase, list[Pair]]]:
        """Return a phase's pixels in strips of columns, so narrow that what they meet stays in the L2 cache.

        One channel's numbers meet a vector of the error map hardly twice; only the next channel's meet it again.
        """
        turned = self._turned(phase.product)
        pixels, columns = phase.pixels(turned, x), len(phase.columns)
        reach = max(b for *_, b in phase.taps) - min(b for *_, b in phase.taps)
        width = max(1, min(columns, _STRIP_BYTES // (turned.nbytes // turned.row * turned.pixel) - reach))
        starts = range(0, columns, -(-columns // -(-columns // width)))
        return [
            (phase, [pair for i, pair in enumerate(pixels) if start <= i % columns < start + starts.step])
            for start in starts
        ]


def _planes(x: Layout) -> dict[str, int]:
    return {"channels": x.maps, "rows": x.rows, "columns": x.columns, **strides(x=x)}


def _capacity(node: Node, numbers: int) -> int:
    """Return how many of so many numbers a list has room for."""
    return min(numbers, max(1, math.ceil(float(node.get("capacity")) * numbers)))


def _tile(g: Product, terms: int) -> Pair:
    """Return the accumulators of a correlation: vectors of output channels, terms."""
    room = 3 * target().registers // 4
    parts = -(-terms // room)
    width = -(-terms // parts)
    return max(1, min(room // width, -(-g.channels_out // simd_lanes()))), width
