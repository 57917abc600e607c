"""What operators emit their kernel calls through: the one place that knows kernels' arguments and job sizes.

It is one class in several files, each the base of the next: buffers and rows (``lowering_core``), products on lists of
weights (``lowering_sparse``), all products (``lowering_products``), pruned error maps and lists of vectors
(``lowering_pruned``), lists of numbers (``lowering_elements``), exact zeros behind max pools (``lowering_pooled``),
pruned gradients (``lowering_listed``). Everything else is here; ``lowering_channels`` has what differs with channels in
the lanes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from edgetrain.arrays import Layout, map_sizes
from edgetrain.choice import target
from edgetrain.graph import Node, Value
from edgetrain.kernels.codes import ALL, ERRORS, KEPT, LARGEST, PARTS, REST, WHOLE
from edgetrain.lowering_core import Pair, border_of, row_lanes, strides
from edgetrain.lowering_listed import ListedLowering
from edgetrain.ops import get_op
from edgetrain.ops.normalization import epsilon_of
from edgetrain.plan import Ref

if TYPE_CHECKING:
    from edgetrain.ops.pooling import Pool

Place = tuple[int, int, int]
_LARGEST_UNROLLED = 9  # pixels of a pool's window
_PART_BYTES, _GRADIENT_PART_BYTES = 16, 24  # of a channel and block in a normalisation and its gradient: float64


class Lowering(ListedLowering):
    """Collects the rows of one plan. Operators see addresses (``Ref``) and layouts, never memory."""

    def run(self, forward_count: int) -> None:
        """Lower all nodes; those from ``forward_count`` on are the backward pass."""
        for position, node in enumerate(self._nodes):
            self._position, self._stage = position, "forward" if position < forward_count else "backward"
            for value in node.inputs:
                self._touch(value)
            for value in node.outputs:
                self._start(value)
            get_op(node.op_type).lower(node, self)

    def input(self, value: Value, source: str, scale: Ref, shift: Ref) -> None:
        """Interleave an input's samples, read from the address that the learner puts into buffer ``source``."""
        self._start(value)
        y = self.layout(value)
        self.emit(
            "pack_input", (self.lanes,), y.planes, x=Ref(source), y=self.address(value), scale=scale, shift=shift,
            state=Ref("state"), channels=y.channels, rows=y.rows, columns=y.columns, y_block=y.block,
            y_channel=y.channel, y_row=y.row,
        )  # fmt: skip

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

    def keep_mask(self, y: Value, mask: Value) -> None:
        """Emit one bit per number of ``y``: whether it is positive."""
        x, out = self.layout(y), self.layout(mask)
        width = row_lanes(x, out.rows * out.columns)
        self.emit(
            "keep_mask", (width,), x.planes, y=self.address(y), mask=self.address(mask), rows=x.rows,
            vectors=x.columns * x.lanes // width, y_plane=x.channel, y_row=x.row, mask_plane=out.channel,
        )  # fmt: skip

    def apply_mask(self, mask: Value, grad: Value, y: Value) -> None:
        """Emit ``y = grad`` where the bit is set, else 0."""
        source, g, out = self.layout(mask), self.layout(grad), self.layout(y)
        width = row_lanes(out, source.rows * source.columns)
        self.emit(
            "apply_mask", (width,), out.planes, mask=self.address(mask), grad_out=self.address(grad),
            grad_x=self.address(y), rows=out.rows, vectors=out.columns * out.lanes // width, mask_plane=source.channel,
            grad_plane=g.channel, grad_row=g.row, grad_x_plane=out.channel, grad_x_row=out.row,
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
            **strides(x=source),
        }  # fmt: skip
        if y.batched:
            self.emit("sum_maps", (self.lanes,), self.blocks * sizes[0], **shared, **strides(y=self.layout(y)))
        else:
            self.emit("sum_samples", (self.lanes,), sizes[0], blocks=self.blocks, **shared)

    def max_pool(self, x: Value, y: Value, pool: Pool, positions: Value | None = None) -> None:
        """Emit a max pool, and the positions of what it found; see ``kernels.pooling``."""
        source, out = self.layout(x), self.layout(y)
        kept, bits = (y, 0) if positions is None else (positions, pool.position_bits)
        self.emit(
            "max_pool", (source.lanes, *_unrolled(pool, pool.inside), bits), source.planes, x=self.address(x),
            y=self.address(y), positions=self.address(kept), positions_plane=self.layout(kept).channel,
            **self._windows(pool, source, out),
        )  # fmt: skip

    def max_pool_gradient(
        self, positions: Value, grad: Value, target: Value, pool: Pool, kept: Value | None = None
    ) -> None:
        """Emit the max pool's input gradient, of the ``kept`` channels alone if there is a choice."""
        t, count = self.layout(target), 0 if kept is None else kept.size
        self.emit(
            "max_pool_gradient", (t.lanes, *_unrolled(pool, pool.tiles), pool.position_bits),
            self.blocks * count or t.planes, kept=0 if kept is None else self.address(kept), kept_count=count,
            channels=t.channels,
            positions=self.address(positions), grad_out=self.address(grad), grad_x=self.address(target), rows=t.rows,
            columns=t.columns, grad_x_row=t.row, positions_plane=self.layout(positions).channel,
            **self._windows(pool, t, self.layout(grad)),
        )  # fmt: skip

    def average_pool(self, x: Value, y: Value, pool: Pool) -> None:
        """Emit an average pool."""
        source, out = self.layout(x), self.layout(y)
        self.emit(
            "average_pool", (source.lanes,), source.planes, x=self.address(x), y=self.address(y),
            **self._windows(pool, source, out),
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
        x, y, outs, addend = self.layout(node.x), self.layout(node.y), node.outputs, node.optional(5)
        other = node.x if addend is None else addend
        parts = self.workspace(_PART_BYTES * x.planes)
        for stage in (PARTS, REST) if self._by_blocks(x) else (WHOLE,):
            self.emit(
                "batch_norm", (self.lanes, row_lanes(x), int(addend is not None and stage != PARTS), stage),
                x.channels if stage == WHOLE else x.planes, x=self.address(node.x), y=self.address(node.y),
                addend=self.address(other), scale=self.address(node.input(1)), bias=self.address(node.input(2)),
                mean=self.address(outs[1]), variance=self.address(outs[2]), inverse_std=self.address(outs[3]),
                mask=Ref("mask"), parts=parts, channels=x.channels, f_epsilon=epsilon, f_low=bounds[0],
                f_high=bounds[1], **maps_of(x), **border_of(y), **strides(x=x, y=y, addend=self.layout(other)),
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
            "batch_norm_inference", (self.lanes, row_lanes(x), int(inverted)), x.channels, x=self.address(node.x),
            y=self.address(node.y), scale=self.address(node.input(1)), bias=self.address(node.input(2)),
            mean=self.address(node.input(3)),
            spread=self.address(node.input(4)), f_epsilon=epsilon, f_low=bounds[0], f_high=bounds[1], **maps_of(x),
            **border_of(y), **strides(x=x, y=y),
        )  # fmt: skip

    def batch_norm_gradient(
        self, node: Node, bounds: tuple[float, float], again: Value | None = None, kept: Value | None = None
    ) -> None:
        """Emit the gradients of input, scale and bias.

        Args:
            node: (x, grad_out, scale, bias, mean, 1 / std) -> (grad_x, grad_scale, grad_bias, ...). With a record, of
                ``again`` the largest numbers alone are written, see ``ops.pruning.MaskActivation``.
            bounds: what the output was clipped to.
            again: the output, if it is to be computed once more.
            kept: where the numbers of the channels belong that are chosen; the input gradient is theirs alone.
        """
        out, arguments = self.layout(node.y), self.gradient_arguments(node, bounds, again)
        borders = border_of(out) | border_of(self.layout(again) if again is not None else out, "y_")
        some = node.get("record") is not None
        written = 0 if again is None else LARGEST if some else ALL
        counts = self.workspace(8 * out.planes) if some else 0
        largest = {"record": self.record_of(node) if some else 0, "counts": counts, "refresh": node.get("refresh", 0)}

        def emit(stage: int, jobs: int, **choice: Ref | int) -> None:
            repeats = 0 if stage in (ERRORS, REST, KEPT) else written  # along with the sums
            self.emit("batch_norm_gradient", (self.lanes, row_lanes(out), repeats, stage), jobs, mask=Ref("mask"),
                      state=Ref("state"), **borders, **arguments, **largest, **choice)  # fmt: skip

        self._emit_gradient(node, node.outputs[1:3], kept, emit)
        if again is not None and some:
            self.drop_elements(node, again, counts)

    def _emit_gradient(
        self, node: Node, grads: Sequence[Value], kept: Value | None, emit: Callable[..., None]
    ) -> None:
        """Call ``emit`` with each stage of a normalisation's gradient, its jobs and the arguments that go with it.

        ``grads``: of scale and bias; ``kept`` as for ``batch_norm_gradient``.
        """
        x, by_blocks = self.layout(node.x), self._by_blocks(self.layout(node.x))
        parts: Ref | int = self.workspace(_GRADIENT_PART_BYTES * x.planes) if by_blocks else 0
        none = {"scores": 0, "kept": 0, "kept_count": 0}

        def emit_stage(stage: int, **choice: Ref | int) -> None:
            jobs = x.planes if stage in (PARTS, REST, KEPT) else x.channels
            emit(stage, jobs, parts=parts, channels=x.channels, f_epsilon=epsilon_of(node), **(choice or none))

        if kept is None:
            for stage in (PARTS, REST) if by_blocks else (WHOLE,):
                emit_stage(stage)
        elif by_blocks:
            self.in_blocks(node, grads, kept, parts, emit_stage)
        else:
            self.in_stages(node, x.channels, kept, emit_stage)

    def _by_blocks(self, x: Layout) -> bool:
        """Whether threads keep to their blocks of samples in a normalisation, which takes two passes over ``x``.

        As products do; a normalisation that goes by channels hands half of what a thread wrote to another, and back:
        a step of ResNet-20 with a tenth of its weights took 10.5 ms so, and takes 9.8; dense steps take less, too, of
        ResNet-20 2 %, of DS-CNN 9 % (batch 32, two threads, Intel, 2 MiB of cache a core). What a thread reads twice,
        in the backward pass with as many gradients, must fit its cache: at batch 128 dense steps of ResNet-20 and
        MobileNetV1 took 3 and 6 % longer without that condition.
        """
        share = x.block * self.blocks // self.threads
        return 1 < self.threads <= self.blocks and 2 * share <= 1024 * target().l2_kib

    def gradient_arguments(
        self, node: Node, bounds: tuple[float, float], again: Value | None
    ) -> dict[str, float | Ref]:
        """Return what the kernels of both kinds of lanes share."""
        maps = {"x": node.x, "y": again or node.x, "grad_x": node.y}
        values = {**maps, "grad_out": node.input(1), "scale": node.input(2), "bias": node.input(3),
                  "mean": node.input(4), "inverse_std": node.input(5), "grad_scale": node.outputs[1],
                  "grad_bias": node.outputs[2]}  # fmt: skip
        sizes = strides(**{name: self.layout(value) for name, value in maps.items()}, grad=self.layout(node.input(1)))
        addresses = {name: self.address(value) for name, value in values.items()}
        return {**addresses, **maps_of(self.layout(node.x)), **sizes, "f_low": bounds[0], "f_high": bounds[1]}

    def residual_norm_gradient(
        self, node: Node, bounds: tuple[float, float], bits: int = 0, kept: Value | None = None
    ) -> None:
        """Emit the gradients of a normalisation with an addend; ``kept`` as for ``batch_norm_gradient``.

        ``bits``: 1 where those of ``ReluMask`` take the place of the output.
        """
        out, sums = self.layout(node.outputs[1]), int(node.optional(6) is not None)
        arguments, mask = self.residual_arguments(node, bounds), self.layout(node.input(3))
        width = row_lanes(out, mask.rows * mask.columns if bits else None)

        def emit(stage: int, jobs: int, **choice: Ref | int) -> None:
            variant = (0, 0) if stage in (ERRORS, REST, KEPT) else (sums, bits)  # which play no part then
            self.emit("residual_norm_gradient", (self.lanes, width, *variant, stage), jobs, mask=Ref("mask"),
                      state=Ref("state"), **border_of(out), **arguments, **choice)  # fmt: skip

        self._emit_gradient(node, node.outputs[2:4], kept, emit)

    def residual_arguments(self, node: Node, bounds: tuple[float, float]) -> dict[str, float | Ref]:
        """Return what the kernels of both kinds of lanes share."""
        grad, more, (grad_sum, grad_x, grad_scale, grad_bias) = node.input(1), node.optional(6), node.outputs[:4]
        values = {"x": node.x, "y": node.input(3), "grad_out": grad, "more": more or grad, "grad_sum": grad_sum,
                  "grad_x": grad_x, "scale": node.input(2), "mean": node.input(4), "inverse_std": node.input(5),
                  "grad_scale": grad_scale, "grad_bias": grad_bias}  # fmt: skip
        layouts = {name: self.layout(values[name]) for name in ("x", "y", "more", "grad_sum", "grad_x")}
        addresses = {name: self.address(value) for name, value in values.items()}
        sizes = maps_of(layouts["x"]) | strides(**layouts, grad=self.layout(grad))
        return {**addresses, **sizes, "f_low": bounds[0], "f_high": bounds[1]}

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

    def shuffle_channels(self, x: Value, y: Value, group: int) -> None:
        """Emit a copy of channels dealt out, see ``ops.shape.ChannelShuffle``: a kernel call per run of either side."""
        a, b = self.layout(x), self.layout(y)
        per = a.channels // group
        runs, far = (group, "y") if group <= per else (per, "x")  # on the far side a run's channels are ``runs`` apart
        beside, apart = a.channels // runs, {f"{far}_channel": runs * (b if far == "y" else a).channel}
        for run in range(runs):
            near = run * beside
            source, target = (near, run) if far == "y" else (run, near)
            self.emit(
                "copy_maps", (self.lanes,), self.blocks * beside, x=self.address(x) + source * a.channel,
                y=self.address(y) + target * b.channel, channels=beside, rows=a.rows, vectors=a.columns,
                **(strides(x=a, y=b) | apart),
            )  # fmt: skip

    def transpose(self, x: Value, y: Value, order: Sequence[int]) -> None:
        """Emit a copy with other axes: ``order`` tells which of x's (channels, rows, columns) each of y's is.

        A kernel call per index of the shortest axis, whose rows are runs of single pixels along another one.
        """
        a, b = self.layout(x), self.layout(y)
        sources, targets = (a.channel, a.row, a.pixel), (b.channel, b.row, b.pixel)
        sizes = (b.channels, b.rows, b.columns)
        run, *(outer, inner) = sorted(range(3), key=lambda axis: sizes[axis])
        for i in range(sizes[run]):
            self.emit(
                "copy_maps", (self.lanes,), self.blocks * sizes[outer], vectors=1, channels=sizes[outer],
                rows=sizes[inner], x=self.address(x) + i * sources[order[run]], x_block=a.block,
                x_channel=sources[order[outer]], x_row=sources[order[inner]], y=self.address(y) + i * targets[run],
                y_block=b.block, y_channel=targets[outer], y_row=targets[inner],
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


def _unrolled(pool: Pool, possible: bool) -> tuple[int, int]:
    """Return the window of a kernel that is compiled for it, or 0 and 0 for one that reads it from its tables."""
    return pool.kernel if possible and math.prod(pool.kernel) <= _LARGEST_UNROLLED else (0, 0)


def maps_of(x: Layout) -> dict[str, int]:
    """Return ``blocks``, ``rows``, ``columns`` of a layout."""
    return {"blocks": x.blocks, "rows": x.rows, "columns": x.columns}


def _sizes_for(value: Value, rank: int) -> tuple[int, int, int]:
    """Return (channels, rows, columns) of a parameter aligned with per-sample shapes of ``rank`` dimensions."""
    shape = value.shape[1:] if len(value.shape) > rank else value.shape
    return map_sizes((1,) * (rank - len(shape)) + shape)
