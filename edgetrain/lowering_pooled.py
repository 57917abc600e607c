"""How the operators of ``ops/pooled_gradient.py`` become kernel calls; see ``kernels/pooled_errors.py``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetrain.arrays import Layout
from edgetrain.choice import channel_lanes, target
from edgetrain.errors import GraphError
from edgetrain.graph import Node
from edgetrain.lowering_elements import ElementLowering
from edgetrain.plan import Ref

if TYPE_CHECKING:
    from edgetrain.ops.conv import Product
    from edgetrain.ops.pooling import Pool

# Of turned maps that a strip may have: most of the first-level cache. LeNet-5 at batch 32, one thread: both products
# take 61 us with 28 KiB (two samples), 72 to 75 us with 7, 14, 56 and 112 KiB.
_STRIP_BYTES = 28 << 10
_LISTING_JOBS = 16  # each has scratch of its own
# Registers besides those of a tile: all 25 positions of LeNet-5's kernel fit. With a quarter of the registers free they
# were two tiles, and its weight gradient at batch 32 took 58 us instead of 41 (one thread).
_FREE = 4


@dataclass(frozen=True)
class _PooledLists:
    """Where the parts of an error map's lists lie: segments, places, numbers.

    Attributes:
        strips: of samples.
        samples: of a strip.
        channels: of the error map.
        capacity: numbers that a channel has room for.
    """

    strips: int
    samples: int
    channels: int
    capacity: int

    @property
    def places(self) -> int:
        """Byte offset of the places."""
        return 16 * self.strips * self.channels

    @property
    def values(self) -> int:
        """Byte offset of the numbers."""
        return self.places + 4 * self.channels * self.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.values + 4 * self.channels * self.capacity

    def parts(self, base: Ref) -> dict[str, int | Ref]:
        """Return what kernels call them."""
        return {"segments": base, "places": base + self.places, "values": base + self.values}


class PooledLowering(ElementLowering):
    """Lowers the gradients of convolutions before max pools; lanes hold samples."""

    def pooled_errors(self, node: Node, g: Product, pool: Pool) -> None:
        """Emit the lists."""
        positions, grad, kept = self.layout(node.x), self.layout(node.input(1)), node.optional(2)
        windows, maps = grad.rows * grad.columns, self._maps(g)
        lists, base = self._pooled_lists(g, windows), self.address(node.y)
        self.plan.sizes[self.plan.buffer(node.y.name)] = lists.nbytes
        (down, right), (row, column) = g.strides, pool.strides
        corners = [r * row * down * maps.row + c * column * right * maps.pixel
                   for r in range(grad.rows) for c in range(grad.columns)]  # fmt: skip
        taps = [i * down * maps.row + j * right * maps.pixel for i, j in pool.taps]
        channels = -(-g.channels_out // _LISTING_JOBS)
        jobs = -(-g.channels_out // channels)
        scratch = 8 * self.lanes * (self.lanes + -(-windows // self.lanes) * self.lanes)
        self.emit(
            "list_pooled", (self.lanes, len(pool.taps), pool.position_bits), jobs, positions=self.address(node.x),
            grad_out=self.address(node.input(1)), **lists.parts(base), scratch=self.workspace(jobs * scratch),
            corners=self.table(corners), taps=self.table(taps), blocks=self.blocks, channels=g.channels_out,
            channels_per_job=channels, out_rows=grad.rows, out_columns=grad.columns, positions_block=positions.block,
            positions_channel=positions.channel, grad_block=grad.block, grad_channel=grad.channel, grad_row=grad.row,
            scratch_bytes=scratch, strip_samples=lists.samples, sample_step=maps.block, capacity=lists.capacity,
            kept=0 if kept is None else self.address(kept), kept_count=0 if kept is None else kept.size,
        )  # fmt: skip

    def pooled_weight_grad(self, node: Node, g: Product) -> None:
        """Emit the turned input, its correlation with the lists, and the weights' own order."""
        with self.whole_gradient(node, g) as place:
            maps, tiles = self._maps(g), self._tiles(g)
            lists = self._pooled_lists(g, int(node.get("windows")))
            sums_channel = 4 * maps.lanes * len(tiles.order)
            sums = self.workspace(g.channels_out * sums_channel)
            self.emit(
                "correlate_pooled", tiles.sizes, g.channels_out, other=self.turn(node.x, maps),
                **lists.parts(self.address(node.input(1))), sums=sums, starts=self.table(tiles.starts),
                parts=tiles.parts, channels=g.channels_out, channel_parts=maps.lanes // tiles.channels,
                strips=lists.strips, sums_channel=sums_channel,
            )  # fmt: skip
            self.emit(
                "unpack_sums", (), g.channels_out, sums=sums, target=place,
                order=self.table([tap * g.weight_tap for tap in tiles.order]), taps=len(tiles.order),
                inputs=g.channels_in, tile=tiles.channels, sums_channel=sums_channel, weight_out=g.weight_out,
                weight_in=g.weight_in,
            )  # fmt: skip

    def pooled_input_grad(self, node: Node, g: Product) -> None:
        """Emit the input gradient with its channels next to each other, and turn it back."""
        out, maps, lists = self.layout(node.y), self._maps(g), self._pooled_lists(g, int(node.get("windows")))
        tiles = self._tiles(g)
        sources = [c * g.weight_out + tap * g.weight_tap for c in range(g.channels_out) for tap in tiles.order]
        weight = self.dense_weight(node.input(1), g)
        packed, _ = self.pack_weights(weight, sources, tiles.channels, g.channels_in, g.weight_in, 1, 0)
        memory = self.workspace(maps.nbytes + 4 * self.lanes)  # whole vectors are read
        self.emit(
            "spread_elements", tiles.sizes, lists.strips, maps=memory, target=memory + maps.origin,
            **lists.parts(self.address(node.x)), weight=packed, starts=self.table(tiles.starts), parts=tiles.parts,
            channels=g.channels_out, channel_parts=maps.lanes // tiles.channels,
            strip_bytes=lists.samples * maps.block, weight_tile=4 * tiles.channels * len(sources),
            weight_channel=4 * tiles.channels * len(tiles.order),
        )  # fmt: skip
        self.emit(
            "turn_back", (self.lanes,), self.blocks * out.rows, x=memory + maps.origin, y=self.address(node.y),
            channels=out.channels, rows=out.rows, columns=out.columns, x_sample=maps.block, x_row=maps.row,
            x_pixel=maps.pixel, y_block=out.block, y_channel=out.channel, y_row=out.row,
        )  # fmt: skip

    def _maps(self, g: Product) -> Layout:
        """Return the layout of the convolution's input, or of its gradient, with the channels next to each other."""
        return self.turned_layout(g.channels_in, self._vector(g), g.size, g.border)

    def _vector(self, g: Product) -> int:
        return channel_lanes(g.channels_in, self.lanes, narrowest=4)

    def _tiles(self, g: Product) -> _Tiles:
        return _Tiles.of(g, self._maps(g), self._vector(g))

    def _pooled_lists(self, g: Product, windows: int) -> _PooledLists:
        if self._maps(g).nbytes >= 2**31:  # places are int32
            raise GraphError(f"node '{self.node.name}': a batch of {self.plan.capacity} needs maps of 2 GiB and more; "
                             "use a smaller batch size")  # fmt: skip
        samples = self.lanes
        while samples > 1 and samples * self._maps(g).block > _STRIP_BYTES:
            samples //= 2
        capacity = self.plan.capacity * windows + self.lanes  # a whole vector is written behind the last number
        return _PooledLists(self.plan.capacity // samples, samples, g.channels_out, capacity)


@dataclass(frozen=True)
class _Tiles:
    """How the kernel positions and input channels are cut into tiles of vectors that stay in the registers.

    Sizes are divisors: nothing may be added twice, and the maps have no channels for a tile to reach behind.

    Attributes:
        sizes: compile-time sizes of the kernels: lanes, vectors, rows, columns, bytes between neighbours.
        starts: byte offset of every row of every part from the pixel that a window begins at.
        order: numbers of the kernel positions, part after part.
    """

    sizes: tuple[int, int, int, int, int]
    starts: list[int]
    order: list[int]

    @classmethod
    def of(cls, g: Product, maps: Layout, lanes: int) -> _Tiles:
        """Cut a convolution's kernel; ``maps`` is the layout of the turned input, in whole vectors of ``lanes``."""
        room = target().registers - _FREE
        columns = _divisor(g.kernel[1], room)
        rows = _divisor(g.kernel[0], room // columns)
        vectors = _divisor(maps.lanes // lanes, room // (columns * rows))
        (down, right), (before, left), starts, order = g.dilations, g.pads[:2], list[int](), list[int]()
        for top in range(0, g.kernel[0], rows):
            for j in range(0, g.kernel[1], columns):
                for i in range(top, top + rows):
                    starts.append((i * down - before) * maps.row + (j * right - left) * maps.pixel)
                    order += range(i * g.kernel[1] + j, i * g.kernel[1] + j + columns)
        return cls((lanes, vectors, rows, columns, right * maps.pixel), starts, order)

    @property
    def channels(self) -> int:
        """Input channels of a tile."""
        return self.sizes[0] * self.sizes[1]

    @property
    def parts(self) -> int:
        """Of the kernel."""
        return len(self.starts) // self.sizes[2]


def _divisor(number: int, most: int) -> int:
    """Return the largest divisor of a number that is not larger than ``most``.

    Example:
        >>> _divisor(5, 28), _divisor(9, 5), _divisor(7, 6)
        (5, 3, 1)
    """
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
