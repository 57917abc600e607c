"""What operators emit their kernel calls through: the one place that knows kernels' arguments and job sizes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetrain.arrays import Layout, aligned, map_sizes
from edgetrain.autodiff import LABELS
from edgetrain.choice import TILES
from edgetrain.errors import GraphError
from edgetrain.graph import Graph, Node, Value
from edgetrain.kernels.codes import CHANNELS, SAMPLES
from edgetrain.kernels.registry import argument_names
from edgetrain.ops import Border, get_op
from edgetrain.plan import Plan, Ref, Row, share_memory

if TYPE_CHECKING:
    from edgetrain.ops.pooling import Pool
    from edgetrain.parameters import Parameters

Pair = tuple[int, int]
Place = tuple[int, int, int]

# Jobs are the grain that threads share. Below this number per kernel call a product is cut further, so that
# four threads find work; results do not depend on it.
_WANTED_JOBS = 16
_PIXELS_PER_JOB = 64
# Pixels over which a weight gradient stays in registers. It fixes the order of summation, so it must not depend
# on threads. 256 measured best of 32, 64, 128, 256 on three layers of ResNet-20 (docs/performance.md).
_PIXELS_PER_SUM = 256
# A vector per pixel is wasted on maps smaller than this: there the pixels of all blocks form one list.
_SMALL_MAP = 16


class Lowering:
    """Collects the rows of one plan. Operators see addresses (``Ref``) and layouts, never memory."""

    def __init__(self, graph: Graph, nodes: Sequence[Node], lanes: int, blocks: int, parameters: Parameters,
                 keep: set[str]) -> None:  # fmt: skip
        self.plan = Plan(graph, lanes, blocks, by_channel=self.kind == CHANNELS)
        self.lanes, self.blocks = lanes, blocks
        self._nodes, self._parameters, self._keep = nodes, parameters, keep
        sharing = share_memory(nodes, keep, self.shares)
        self.plan.root = sharing.root
        for name, value in graph.values.items():
            if name in sharing.root and value.batched and name != LABELS:
                self.plan.layouts[name] = self.make_layout(value, sharing.border[name])
        self.plan.fixed.update(parameters.buffers)
        for name, size, dtype in (("labels", self.plan.capacity, np.int64), ("mask", self.plan.capacity, np.float32)):
            self.plan.fixed[name] = aligned(size, dtype)
        self._stage, self._position = "forward", 0
        self._lifetimes: dict[str, tuple[int, int]] = {}
        self._workspaces = 0

    kind = SAMPLES

    def make_layout(self, value: Value, border: Border) -> Layout:
        """Return how a batched value lies in memory."""
        return Layout(self.blocks, self.lanes, *map_sizes(value.shape), border)

    def shares(self, x: Value, y: Value) -> bool:
        """Whether a reshape from ``x`` to ``y`` moves nothing."""
        return True

    def run(self, forward_count: int) -> None:
        """Lower all nodes; those from ``forward_count`` on are the backward pass."""
        for position, node in enumerate(self._nodes):
            self._position, self._stage = position, "forward" if position < forward_count else "backward"
            for value in node.inputs:
                self._touch(value)
            for value in node.outputs:
                self._start(value)
            get_op(node.op_type).lower(node, self)

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
            self._clear_border(value)

    def _reserve(self, name: str, nbytes: int) -> None:
        self.plan.sizes[name] = nbytes
        self._lifetimes[name] = (self._position, self._position)

    def workspace(self, nbytes: int) -> Ref:
        """Return memory for the current node alone."""
        name = f"workspace:{self._workspaces}"
        self._workspaces += 1
        self._reserve(name, nbytes)
        return Ref(name)

    def table(self, numbers: Any) -> Ref:
        """Return the address of constant int64 numbers; equal tables are stored once."""
        array = np.asarray(numbers, np.int64).ravel()
        name = f"table:{hash(array.tobytes())}:{array.size}"
        if name not in self.plan.fixed:
            self.plan.fixed[name] = aligned(array.size, np.int64)
            self.plan.fixed[name][:] = array
        return Ref(name)

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

    def emit(self, kernel: str, sizes: tuple[int, ...], jobs: int, **arguments: int | float | Ref) -> None:
        """Append a kernel call.

        Raises:
            GraphError: the arguments are not those of the kernel (a bug in an operator).
        """
        names = argument_names(kernel)
        if set(names) != set(arguments):
            raise GraphError(f"kernel '{kernel}': arguments {sorted(set(names) ^ set(arguments))} missing or unknown")
        values = tuple(arguments[name] for name in names)
        self.plan.rows.append(Row((kernel, sizes), values, jobs, self._stage, self._position))

    def input(self, value: Value, source: str, scale: Ref, shift: Ref) -> None:
        """Interleave an input's samples, read from the address that the learner puts into buffer ``source``."""
        self._start(value)
        y = self.layout(value)
        self.emit(
            "pack_input", (self.lanes,), y.planes, x=Ref(source), y=self.address(value), scale=scale, shift=shift,
            state=Ref("state"), channels=y.channels, rows=y.rows, columns=y.columns, y_block=y.block,
            y_channel=y.channel, y_row=y.row,
        )  # fmt: skip

    def _clear_border(self, value: Value) -> None:
        y = self.layout(value)
        if y.bordered:
            top, left, bottom, right = y.border
            self.emit(
                "fill_border", (y.lanes,), y.planes, y=self.address(value) + -y.origin, rows=y.rows,
                columns=y.columns, top=top, left=left, bottom=bottom, right=right, y_plane=y.channel, f_value=0.0,
            )  # fmt: skip

    def multiply(self, x: Ref, x_layout: Layout, y: Ref, y_layout: Layout, *, pixels: list[Pair], terms: list[int],
                 weight: Ref, sources: list[int], weight_channel: int, weight_group: int, groups: int, inputs: int,
                 outputs: int, bias: Ref | None) -> None:  # fmt: skip
        """Emit ``y[c][p] = bias[c] + sum_k weight[k][c] * x[p + term k]``; see ``kernels.dense.multiply``."""
        pixels, blocks = self.merge_blocks(pixels, x_layout, y_layout)
        tile = TILES.multiply(outputs, len(pixels))
        weights = self.weights(weight, sources, tile[0], outputs, weight_channel, groups, weight_group)
        self.emit_multiply(
            x, y, pixels, terms, tile, kind=SAMPLES, lanes=self.lanes, blocks=blocks, groups=groups,
            channel_count=outputs, bias=bias or self.zeros(groups * outputs + tile[0]), **weights,
            x_block=x_layout.block, y_block=y_layout.block, x_group=inputs * x_layout.channel,
            y_group=outputs * y_layout.channel, y_channel=y_layout.channel,
        )  # fmt: skip

    def weights(self, weight: Ref, sources: list[int], width: int, channels: int, channel_bytes: int, groups: int = 1,
                weight_group: int = 0) -> dict[str, int | Ref]:  # fmt: skip
        """Return where a gather-multiply finds its weights: where they are, or packed for its tiles."""
        step = sources[1] - sources[0] if len(sources) > 1 else 4
        if channel_bytes == 4 and sources == list(range(0, step * len(sources), step)) and self.reads_rows(channels):
            # A fully connected layer's input gradient: a row of weights is a term's. LeNet-5's fc1 at batch 8 takes
            # 10 us so; its forward pass, as large but packed first, 32 us (``edgetrain bench --per-op``).
            return {"weight": weight, "weight_group": weight_group, "weight_tile": 4 * width, "weight_step": step}
        packed, packed_group = self.pack_weights(weight, sources, width, channels, channel_bytes, groups, weight_group)
        tile_bytes = 4 * width * len(sources)
        return {"weight": packed, "weight_group": packed_group, "weight_tile": tile_bytes, "weight_step": 4 * width}

    def reads_rows(self, channels: int) -> bool:
        """Whether a tile may read numbers behind the last channel of a row, which are other weights."""
        return True

    def pack_weights(self, weight: Ref, sources: list[int], width: int, channels: int, channel_bytes: int,
                     groups: int, weight_group: int) -> tuple[Ref, int]:  # fmt: skip
        """Emit the packing of weights to ``[group][tile][k][width]``; return its address and the bytes of a group."""
        tiles = -(-channels // width)
        packed_group = 4 * tiles * width * len(sources)
        packed = self.workspace(groups * packed_group)
        self.emit(
            "pack_weights", (width,), groups * tiles, weight=weight, packed=packed, sources=self.table(sources),
            term_count=len(sources), channel_count=channels, group_bytes=weight_group, packed_group=packed_group,
            channel_bytes=channel_bytes, tiles=tiles, groups=groups,
        )  # fmt: skip
        return packed, packed_group

    def emit_multiply(self, x: Ref, y: Ref, pixels: list[Pair], terms: list[int], tile: Pair, *, kind: int, lanes: int,
                      blocks: int, groups: int, channel_count: int, **arguments: int | Ref) -> None:  # fmt: skip
        """Emit a gather-multiply, cut into jobs; ``arguments`` are those of the kernel that are not sizes of jobs."""
        (channels, width), count = tile, len(pixels)
        pixel_chunk = _chunk(count, _PIXELS_PER_JOB, width)
        pixel_chunks = -(-count // pixel_chunk)
        tiles = -(-channel_count // channels)
        parts = min(tiles, -(-_WANTED_JOBS // (blocks * groups * pixel_chunks)))
        channel_chunk = -(-tiles // parts) * channels
        channel_chunks = -(-channel_count // channel_chunk)
        self.emit(
            "multiply", (lanes, channels, width, kind), blocks * groups * pixel_chunks * channel_chunks, x=x, y=y,
            pixels=self.table(pixels + [pixels[-1]] * (-count % width)), terms=self.table(terms), pixel_count=count,
            term_count=len(terms), channel_count=channel_count, groups=groups, pixel_chunk=pixel_chunk,
            pixel_chunks=pixel_chunks, channel_chunk=channel_chunk, channel_chunks=channel_chunks, f_low=-math.inf,
            f_high=math.inf, **arguments,
        )  # fmt: skip

    def correlate(self, x: Ref, x_layout: Layout, grad: Ref, grad_layout: Layout, target: Ref, *, pixels: list[Pair],
                  terms: list[Pair], groups: int, inputs: int, outputs: int, weight_channel: int,
                  weight_group: int) -> None:  # fmt: skip
        """Emit ``target[c][k] = sum grad[c][p] * x[p + term k]``; see ``kernels.dense.correlate``."""
        self.emit_correlate(
            x, x_layout, grad, grad_layout, target, pixels, terms, TILES.correlate(outputs, len(terms)), kind=SAMPLES,
            groups=groups, channel_count=outputs, x_group=inputs * x_layout.channel,
            grad_group=outputs * grad_layout.channel, weight_group=weight_group, weight_channel=weight_channel,
        )  # fmt: skip

    def emit_correlate(self, x: Ref, x_layout: Layout, grad: Ref, grad_layout: Layout, target: Ref, pixels: list[Pair],
                       terms: list[Pair], tile: Pair, *, kind: int, groups: int, channel_count: int,
                       **arguments: int) -> None:  # fmt: skip
        """Emit a gather-correlate, cut into jobs; ``arguments``: those of the kernel that are not sizes of jobs."""
        pixels, blocks = self.merge_blocks(pixels, x_layout, grad_layout)
        (channels, width), count = tile, len(terms)
        tiles = -(-channel_count // channels)
        term_chunk = _chunk(count, -(-count // -(-_WANTED_JOBS // (groups * tiles))), width)
        term_chunks = -(-count // term_chunk)
        self.emit(
            "correlate", (grad_layout.lanes, channels, width, kind), groups * tiles * term_chunks, x=x, grad_out=grad,
            grad_weight=target, pixels=self.table(pixels), terms=self.table(terms + [terms[-1]] * (-count % width)),
            pixel_count=len(pixels), term_count=count, channel_count=channel_count, x_block=x_layout.block,
            grad_block=grad_layout.block, grad_channel=grad_layout.channel, blocks=blocks, groups=groups,
            pixel_chunk=_PIXELS_PER_SUM, term_chunk=term_chunk, term_chunks=term_chunks, channel_tiles=tiles,
            **arguments,
        )  # fmt: skip

    def merge_blocks(self, pixels: list[Pair], x: Layout, y: Layout) -> tuple[list[Pair], int]:
        """Treat all blocks' pixels as one list where maps are small (a fully connected layer has one pixel)."""
        if len(pixels) >= _SMALL_MAP or self.blocks == 1:
            return pixels, self.blocks
        return [(a + b * x.block, c + b * y.block) for b in range(self.blocks) for a, c in pixels], 1

    def unary(self, x: Value, y: Value, code: int, a: float, b: float) -> None:
        """Emit ``y = function(x)``; see ``kernels.elementwise.unary``."""
        planes, rows, vectors, strides = self._walk(x, y)
        self.emit(
            "unary", (self.layout(x).lanes, code), planes, x=self.address(x), y=self.address(y), rows=rows,
            vectors=vectors, x_plane=strides[0][0], x_row=strides[0][1], y_plane=strides[1][0], y_row=strides[1][1],
            f_a=a, f_b=b,
        )  # fmt: skip

    def unary_gradient(self, saved: Value, grad: Value, y: Value, code: int, a: float, b: float) -> None:
        """Emit ``y = grad * function'``; see ``kernels.elementwise.unary_gradient``."""
        planes, rows, vectors, strides = self._walk(saved, grad, y)
        self.emit(
            "unary_gradient", (self.layout(y).lanes, code), planes, saved=self.address(saved),
            grad_out=self.address(grad),
            grad_x=self.address(y), rows=rows, vectors=vectors, saved_plane=strides[0][0], saved_row=strides[0][1],
            grad_plane=strides[1][0], grad_row=strides[1][1], grad_x_plane=strides[2][0], grad_x_row=strides[2][1],
            f_a=a, f_b=b,
        )  # fmt: skip

    def _walk(self, *values: Value) -> tuple[int, int, int, list[Pair]]:
        """Return planes, rows, vectors and every value's (plane, row) strides for a walk over all pixels."""
        layouts = [self.layout(v) for v in values]
        first = layouts[0]
        if any(layout.bordered for layout in layouts):
            return first.planes, first.rows, first.columns, [(layout.channel, layout.row) for layout in layouts]
        total = first.nbytes // first.pixel
        length = next(n for n in range(min(256, total), 0, -1) if total % n == 0)
        return total // length, 1, length, [(length * first.pixel, 0)] * len(layouts)

    def binary(self, node: Node, code: int) -> None:
        """Emit ``y = a op b`` with broadcasting; parameters are expanded to lanes first."""
        if not node.y.batched:
            self._binary_parameters(node, code)
            return
        y = self.layout(node.y)
        (a, sa), (b, sb) = (self._operand(value, y, len(node.y.shape)) for value in (node.x, node.input(1)))
        self.emit(
            "binary", (y.lanes, code), y.planes, a=a, b=b, y=self.address(node.y), channels=y.maps, rows=y.rows,
            vectors=y.columns, a_block=sa[0], a_channel=sa[1], a_row=sa[2], a_pixel=sa[3], b_block=sb[0],
            b_channel=sb[1], b_row=sb[2], b_pixel=sb[3], y_block=y.block, y_channel=y.channel, y_row=y.row,
        )  # fmt: skip

    def _binary_parameters(self, node: Node, code: int) -> None:
        """Add or multiply two arrays of parameters of equal shape: whole vectors, then the rest one by one.

        What follows an array of gradients in its buffer must stay 0: the gradient norm reads it.
        """
        a, b, y = self.address(node.x), self.address(node.input(1)), self.address(node.y)
        whole = node.y.size // self.lanes * self.lanes
        for lanes, first, last in ((self.lanes, 0, whole), (1, whole, node.y.size)):
            if first == last:
                continue
            self.emit(
                "binary", (lanes, code), 1, a=a + 4 * first, b=b + 4 * first, y=y + 4 * first, channels=1, rows=1,
                vectors=(last - first) // lanes, a_block=0, a_channel=0, a_row=0, a_pixel=4 * lanes, b_block=0,
                b_channel=0, b_row=0, b_pixel=4 * lanes, y_block=0, y_channel=0, y_row=0,
            )  # fmt: skip

    def _operand(self, value: Value, y: Layout, rank: int) -> tuple[Ref, tuple[int, int, int, int]]:
        """Return an operand's address and its strides (block, channel, row, pixel), 0 where it is repeated."""
        if value.batched:
            x = self.layout(value)
            repeat = (x.channels == 1 < y.channels, x.rows == 1 < y.rows, x.columns == 1 < y.columns)
            strides = (0 if repeat[0] else x.channel, 0 if repeat[1] else x.row, 0 if repeat[2] else x.pixel)
            return self.address(value), (x.block, *strides)
        sizes = _sizes_for(value, rank)
        dense = (4 * sizes[1] * sizes[2], 4 * sizes[2], 4)
        steps = tuple(0 if n == 1 else s for n, s in zip(sizes, dense, strict=True))
        return self.expand(value, y, sizes, (steps[0], steps[1], steps[2]))

    def expand(self, value: Value, y: Layout, sizes: Place, steps: Place) -> tuple[Ref, tuple[int, int, int, int]]:
        """Emit the copy of a parameter to lanes; return its address and strides (block, channel, row, pixel).

        Args:
            value: the parameter.
            y: layout of the result that it is combined with.
            sizes, steps: its sizes as (channels, rows, columns) and its byte strides, 0 where it is repeated.
        """
        target = self.workspace(4 * self.lanes * math.prod(sizes))
        self.emit(
            "expand", (self.lanes,), sizes[0], x=self.address(value), y=target, rows=sizes[1], columns=sizes[2],
            x_channel=steps[0], x_row=steps[1], x_pixel=steps[2],
        )  # fmt: skip
        return target, (0, steps[0] * self.lanes, steps[1] * self.lanes, steps[2] * self.lanes)

    def copy_parameter(self, x: Value, y: Value) -> None:
        """Emit a copy of a value that is not batched."""
        self.emit("expand", (1,), 1, x=self.address(x), y=self.address(y), rows=1, columns=x.size, x_channel=0, x_row=0,
                  x_pixel=4)  # fmt: skip

    def sum_to(self, x: Value, y: Value, target: tuple[int, ...]) -> None:
        """Emit the sum of ``x`` down to per-sample sizes ``target``, and over the batch for a parameter."""
        source, sizes = self.layout(x), map_sizes(target)
        shared: dict[str, int | Ref] = {
            "x": self.address(x), "y": self.address(y), "channels": source.channels, "rows": source.rows,
            "columns": source.columns, "y_channels": sizes[0], "y_rows": sizes[1], "y_columns": sizes[2],
            "x_block": source.block, "x_channel": source.channel, "x_row": source.row,
        }  # fmt: skip
        if y.batched:
            out = self.layout(y)
            strides = {"y_block": out.block, "y_channel": out.channel, "y_row": out.row}
            self.emit("sum_maps", (self.lanes,), self.blocks * sizes[0], **shared, **strides)
        else:
            self.emit("sum_samples", (self.lanes,), sizes[0], blocks=self.blocks, **shared)

    def pool(self, kernel: str, x: Value, y: Value, pool: Pool) -> None:
        """Emit a forward pool; see ``kernels.pooling``."""
        source, out = self.layout(x), self.layout(y)
        self.emit(
            kernel, (source.lanes,), source.planes, x=self.address(x), y=self.address(y),
            **self._windows(pool, source, out),
        )  # fmt: skip

    def max_pool_gradient(self, x: Value, y: Value, grad: Value, target: Value, pool: Pool) -> None:
        """Emit the max pool's input gradient."""
        source, out, g, t = self.layout(x), self.layout(y), self.layout(grad), self.layout(target)
        self.emit(
            "max_pool_gradient", (source.lanes,), source.planes, x=self.address(x), y=self.address(y),
            grad_out=self.address(grad), grad_x=self.address(target), rows=source.rows, columns=source.columns,
            x_row=source.row, grad_plane=g.channel, grad_row=g.row, grad_x_plane=t.channel, grad_x_row=t.row,
            grad_tap_row=pool.dilations[0] * t.row, **self._windows(pool, source, out),
        )  # fmt: skip

    def average_pool_gradient(self, grad: Value, target: Value, pool: Pool) -> None:
        """Emit the average pool's input gradient."""
        t = self.layout(target)
        self.emit(
            "average_pool_gradient", (t.lanes,), t.planes, grad_out=self.address(grad), grad_x=self.address(target),
            rows=t.rows, columns=t.columns, grad_x_row=t.row, **self._windows(pool, t, self.layout(grad)),
        )  # fmt: skip

    def _windows(self, pool: Pool, x: Layout, y: Layout) -> dict[str, int | Ref]:
        rows = [(first * x.row, count, max(1, divisor)) for first, count, divisor in pool.spans(0)]
        columns = [(first * x.pixel, count, max(1, divisor)) for first, count, divisor in pool.spans(1)]
        return {
            "window_rows": self.table(rows), "window_columns": self.table(columns), "out_rows": y.rows,
            "out_columns": y.columns, "x_plane": x.channel, "y_plane": y.channel, "y_row": y.row,
            "tap_row": pool.dilations[0] * x.row, "tap_column": pool.dilations[1] * x.pixel,
        }  # fmt: skip

    def batch_norm(self, node: Node, epsilon: float, momentum: float, bounds: tuple[float, float]) -> None:
        """Emit training batch normalisation, and the move of the running statistics in the update."""
        x, y, outs = self.layout(node.x), self.layout(node.y), node.outputs
        self.emit(
            "batch_norm", (self.lanes,), x.channels, x=self.address(node.x), y=self.address(node.y),
            scale=self.address(node.input(1)), bias=self.address(node.input(2)), mean=self.address(outs[1]),
            variance=self.address(outs[2]), inverse_std=self.address(outs[3]), mask=Ref("mask"), state=Ref("state"),
            f_epsilon=epsilon, f_low=bounds[0], f_high=bounds[1], **maps_of(x), **strides(x=x, y=y),
        )  # fmt: skip
        self.move_running_averages(node, momentum)

    def move_running_averages(self, node: Node, momentum: float) -> None:
        """Emit, in the update, the move of the running statistics towards the batch's."""
        x, outs = self.layout(node.x), node.outputs
        self._keep.update((outs[1].name, outs[2].name))
        with self.stage("update"):
            for running, current, unbiased in ((node.input(3), outs[1], 0), (node.input(4), outs[2], 1)):
                self.emit(
                    "running_average", (), x.channels, running=self.address(running), current=self.address(current),
                    state=Ref("state"), pixels=x.rows * x.columns, f_keep=momentum, unbiased=unbiased,
                )  # fmt: skip

    def batch_norm_inference(
        self, node: Node, epsilon: float, bounds: tuple[float, float], inverted: bool = False
    ) -> None:
        """Emit batch normalisation with given statistics, the last being the variance or ``1 / std``."""
        x, y = self.layout(node.x), self.layout(node.y)
        self.emit(
            "batch_norm_inference", (self.lanes, int(inverted)), x.channels, x=self.address(node.x),
            y=self.address(node.y), scale=self.address(node.input(1)), bias=self.address(node.input(2)),
            mean=self.address(node.input(3)),
            spread=self.address(node.input(4)), f_epsilon=epsilon, f_low=bounds[0], f_high=bounds[1], **maps_of(x),
            **strides(x=x, y=y),
        )  # fmt: skip

    def batch_norm_gradient(self, node: Node, bounds: tuple[float, float]) -> None:
        """Emit the gradients of input, scale and bias."""
        x, grad, out = self.layout(node.x), self.layout(node.input(1)), self.layout(node.y)
        self.emit(
            "batch_norm_gradient", (self.lanes,), x.channels, x=self.address(node.x),
            grad_out=self.address(node.input(1)), grad_x=self.address(node.y), scale=self.address(node.input(2)),
            bias=self.address(node.input(3)), mean=self.address(node.input(4)), inverse_std=self.address(node.input(5)),
            grad_scale=self.address(node.outputs[1]), grad_bias=self.address(node.outputs[2]), mask=Ref("mask"),
            state=Ref("state"), f_low=bounds[0], f_high=bounds[1], **maps_of(x),
            **strides(x=x, grad=grad, grad_x=out),
        )  # fmt: skip

    def dropout(self, x: Value, y: Value, ratio: float, stream: int) -> None:
        """Emit dropout, of values or of gradients."""
        source, out = self.layout(x), self.layout(y)
        self.emit(
            "dropout", (self.lanes,), source.planes, x=self.address(x), y=self.address(y), state=Ref("state"),
            stream=stream, channels=source.channels, rows=source.rows, columns=source.columns, f_ratio=ratio,
            **strides(x=source, y=out),
        )  # fmt: skip

    def copy(self, x: Value, y: Value) -> None:
        """Emit a copy of all elements in order, whatever the shapes; nothing when both share memory."""
        if self.same_memory(x, y):
            return
        source, out = self.layout(x), self.layout(y)
        if (source.channels, source.rows, source.columns) == (out.channels, out.rows, out.columns):
            self.copy_part(x, y)
            return
        table = list(zip(source.elements(), out.elements(), strict=True))
        self.emit_copy(x, y, table)

    def emit_copy(self, x: Value, y: Value, table: list[Pair]) -> None:
        """Emit a copy by a table of (input, output) byte offsets, the same for every block."""
        self.emit(
            "copy_table", (self.lanes,), self.blocks, x=self.address(x), y=self.address(y), table=self.table(table),
            count=len(table), x_block=self.layout(x).block, y_block=self.layout(y).block,
        )  # fmt: skip

    def copy_part(
        self, x: Value, y: Value, sizes: Place | None = None, source: Place = (0, 0, 0), to: Place = (0, 0, 0)
    ) -> None:
        """Emit a copy of a box; sizes and places are (channels, rows, columns), by default what both values have."""
        a, b = self.layout(x), self.layout(y)
        smaller = (min(a.channels, b.channels), min(a.rows, b.rows), min(a.columns, b.columns))
        box = sizes or smaller
        if min(box) > 0:
            self.emit_box(x, y, box, source, to)

    def emit_box(self, x: Value, y: Value, box: Place, source: Place, to: Place) -> None:
        """Emit a copy of a box that is not empty."""
        a, b = self.layout(x), self.layout(y)
        self.emit(
            "copy_maps", (self.lanes,), self.blocks * box[0], x=self.address(x) + a.offset(source),
            y=self.address(y) + b.offset(to), channels=box[0], rows=box[1], vectors=box[2], **strides(x=a, y=b),
        )  # fmt: skip

    def fill(self, y: Value, value: float) -> None:
        """Emit a constant for all pixels."""
        out = self.layout(y)
        self.emit(
            "fill", (out.lanes,), out.planes, y=self.address(y), channels=out.maps, rows=out.rows,
            vectors=out.columns, f_value=value, **strides(y=out),
        )  # fmt: skip

    def cross_entropy(self, node: Node, smoothing: float) -> None:
        """Emit softmax, per-sample loss and accuracy, and their mean."""
        x, (probabilities, losses, correct) = self.layout(node.x), node.outputs
        self.emit(
            "cross_entropy", (self.lanes,), self.blocks, logits=self.address(node.x),
            probabilities=self.address(probabilities), labels=Ref("labels"), losses=self.address(losses),
            correct=self.address(correct), state=Ref("state"), classes=x.channels, logits_block=x.block,
            f_smoothing=smoothing,
        )  # fmt: skip
        self.mean_loss(losses, correct)

    def mean_loss(self, losses: Value, correct: Value) -> None:
        """Emit the mean of the losses and the number of right answers."""
        places = {"losses": self.address(losses), "correct": self.address(correct)}
        self.emit("mean_loss", (), 1, result=Ref("result"), state=Ref("state"), **places)

    def cross_entropy_gradient(self, node: Node, smoothing: float) -> None:
        """Emit the gradient of the logits."""
        x = self.layout(node.x)
        self.emit(
            "cross_entropy_gradient", (self.lanes,), self.blocks, probabilities=self.address(node.x),
            labels=Ref("labels"), grad_logits=self.address(node.y), mask=Ref("mask"), state=Ref("state"),
            classes=x.channels, logits_block=x.block, f_smoothing=smoothing,
        )  # fmt: skip

    def squared_error(self, node: Node) -> None:
        """Emit the per-sample squared error and its mean."""
        y, target = self.layout(node.x), self.layout(node.input(1))
        losses, correct = node.outputs
        self.emit(
            "squared_error", (self.lanes,), self.blocks, y=self.address(node.x), target=self.address(node.input(1)),
            losses=self.address(losses), correct=self.address(correct), channels=y.channels, rows=y.rows,
            columns=y.columns, mask=Ref("mask"), **strides(y=y, target=target),
        )  # fmt: skip
        self.mean_loss(losses, correct)

    def squared_error_gradient(self, node: Node) -> None:
        """Emit the gradient of the network's output."""
        y, target, out = self.layout(node.x), self.layout(node.input(1)), self.layout(node.y)
        self.emit(
            "squared_error_gradient", (self.lanes,), self.blocks, y=self.address(node.x),
            target=self.address(node.input(1)), grad_y=self.address(node.y), channels=y.channels, rows=y.rows,
            columns=y.columns, mask=Ref("mask"), state=Ref("state"), **strides(y=y, target=target, grad=out),
        )  # fmt: skip


def _chunk(count: int, wanted: int, multiple: int) -> int:
    """Cut ``count`` into equal chunks of about ``wanted``; return a chunk's size, a multiple of ``multiple``."""
    parts = max(1, round(count / max(1, wanted)))
    return max(multiple, -(-count // (parts * multiple)) * multiple)


def maps_of(x: Layout) -> dict[str, int]:
    """Return ``blocks``, ``rows``, ``columns`` of a layout."""
    return {"blocks": x.blocks, "rows": x.rows, "columns": x.columns}


def strides(**layouts: Layout) -> dict[str, int]:
    """Return ``{name}_block``, ``{name}_channel``, ``{name}_row`` for every layout."""
    parts = ("block", "channel", "row")
    return {f"{name}_{part}": getattr(layout, part) for name, layout in layouts.items() for part in parts}


def _sizes_for(value: Value, rank: int) -> tuple[int, int, int]:
    """Return (channels, rows, columns) of a parameter aligned with per-sample shapes of ``rank`` dimensions."""
    shape = value.shape[1:] if len(value.shape) > rank else value.shape
    return map_sizes((1,) * (rank - len(shape)) + shape)
