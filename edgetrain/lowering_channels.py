"""Lowering for batches smaller than a vector: lanes hold channels, a block is one sample.

A step of ResNet-20 at batch 1 took 12.4 ms with one of four sample lanes in use and takes
2.3 ms so (2 threads). Operators and most kernels are the same; only what mixes
channels, or indexes them, differs. ``fits`` says which graphs can be lowered so.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from edgetrain import lowering_few as few
from edgetrain.arrays import Layout, map_sizes
from edgetrain.choice import Sizes, channel_lanes
from edgetrain.errors import GraphError
from edgetrain.graph import Node, Value
from edgetrain.kernels.codes import CHANNELS, DEPTHWISE
from edgetrain.lowering import Lowering, Place, maps_of
from edgetrain.lowering_core import NEIGHBOURS, GatherCorrelate, GatherMultiply, Pair, lanes_of, strides
from edgetrain.ops import Border, describe, get_op
from edgetrain.ops.conv import ProductGrad, ProductOp
from edgetrain.plan import Ref

# Operators that move single numbers: they leave the lanes behind the last channel alone.
_COPIES = ("ChannelShuffle", "Concat", "Flatten", "Pad", "Reshape", "Transpose")
# Operators whose kernels do not care what lanes hold, or have a twin here, whatever the shapes. A list instead of a
# class attribute, for what derives from one of them (``PrunedMaxPoolGrad`` from ``MaxPoolGrad``) is for samples only.
_PLAIN = (
    *_COPIES, "ActivationGrad", "AveragePool", "AveragePoolGrad", "BatchNormalization", "BatchNormalizationAgain",
    "BatchNormalizationGrad", "BatchNormalizationGradAgain", "BatchNormalizationTraining", "Clip", "Dropout",
    "DropoutTraining", "Elu", "GlobalAveragePool", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
    "MaskActivation", "MaxPool", "MaxPoolGrad", "MaxPoolTraining", "MeanSquaredErrorLoss", "MeanSquaredErrorLossGrad",
    "Relu", "ReluMask", "ReluMaskGrad", "ResidualNormalizationGrad", "Sigmoid", "SoftmaxCrossEntropyLoss",
    "SoftmaxCrossEntropyLossGrad", "Tanh",
)  # fmt: skip


def fits(nodes: Sequence[Node]) -> bool:
    """Whether all nodes can be lowered with channels in the lanes."""
    return all(_fits(node) for node in nodes)


def _fits(node: Node) -> bool:
    op = get_op(node.op_type)
    if isinstance(op, ProductOp | ProductGrad):
        g = op.product(node)
        return g.groups == 1 or g.inputs == g.outputs == 1
    if node.op_type in ("Add", "Mul"):
        return all(v is None or not v.batched or v.shape[:1] == node.y.shape[:1] for v in node.inputs)
    if node.op_type == "SumTo":
        like: Value = node.get("like")
        return not like.batched or like.shape[:1] == node.x.shape[:1]
    return node.op_type in _PLAIN


class ChannelLowering(Lowering):
    """Lowers a graph that ``fits``; ``lanes`` is the widest vector, ``blocks`` the number of samples.

    A network that fits has a training graph that fits: gradients keep the channels of what they are gradients of.
    """

    kind = CHANNELS

    def run(self, forward_count: int) -> None:
        """Lower all nodes.

        Raises:
            GraphError: a node cannot be lowered so (a bug: ``fits`` was not asked, or an operator is new).
        """
        strange = [describe(node) for node in self._nodes if not _fits(node)]
        if strange:
            raise GraphError(f"{strange[0]}: cannot be lowered with channels in the lanes")
        super().run(forward_count)

    def make_layout(self, value: Value, border: Border) -> Layout:
        """Return how a batched value lies in memory."""
        sizes = map_sizes(value.shape)
        return Layout(self.blocks, channel_lanes(sizes[0], self.lanes), *sizes, border, by_channel=True)

    def written_borders(self, node: Node) -> tuple[int, ...]:
        """See ``LoweringCore.written_borders``; of the kernels here one writes any, that of all lanes."""
        return super().written_borders(node) if node.op_type == "MaskActivation" else ()

    def shares(self, x: Value, y: Value) -> bool:
        """A reshape that keeps the channels moves nothing."""
        return map_sizes(x.shape) == map_sizes(y.shape)

    def _start(self, value: Value) -> None:
        """Copies of single numbers leave the lanes behind the last channel alone: those become 0 before."""
        fresh = self.plan.buffer(value.name) not in self._lifetimes
        super()._start(value)
        if fresh and value.batched and self.node.op_type in _COPIES:
            y = self.layout(value)
            if y.channels % y.lanes:
                self.fill(value, 0.0)

    def input(self, value: Value, source: str, scale: Ref, shift: Ref) -> None:
        """Copy an input's samples into lanes."""
        self._start(value)
        y = self.layout(value)
        self.emit(
            "pack_channels", (y.lanes,), y.planes, x=Ref(source), y=self.address(value), scale=scale, shift=shift,
            channels=y.channels, maps=y.maps, rows=y.rows, columns=y.columns, y_block=y.block, y_map=y.channel,
            y_row=y.row,
        )  # fmt: skip

    def alive(self, x: Layout) -> dict[str, int | Ref]:
        """See ``ElementLowering.alive``: lanes that hold a channel count, in every sample."""
        numbers = np.zeros(x.maps * x.lanes + x.maps * x.lanes % 2, np.float32)
        numbers[: x.channels] = 1
        return {"mask": self.table(numbers.view(np.int64)), "mask_block": 0, "mask_channel": x.pixel}

    def multiply(self, x: Ref, x_layout: Layout, y: Ref, y_layout: Layout, product: GatherMultiply) -> None:
        """See ``Lowering.multiply``. A depthwise product runs over maps of vectors, its weights packed alike.

        Results of groups always lie side by side.
        """
        pixels, terms, sources, weight = product.pixels, product.terms, product.sources, product.weight
        weight_channel, groups, outputs, bias = product.weight_channel, product.groups, product.outputs, product.bias
        lanes = lanes_of(sources)
        if groups == 1 and few.is_vector(y_layout) and lanes and terms == sources:
            samples = few.Apart(x + pixels[0][0], self.blocks, x_layout.block)
            few.rows_times_samples(self, samples, few.Apart(y, self.blocks, y_layout.block), lanes, len(terms), weight,
                                   weight_channel, outputs)  # fmt: skip
            self.emit(
                "add_bias_channels", (y_layout.lanes,), self.blocks * y_layout.maps, y=y, maps=y_layout.maps,
                bias=bias or self.zeros(y_layout.maps * y_layout.lanes), channels=outputs, y_block=y_layout.block,
            )  # fmt: skip
            return
        pixels, blocks = self.merge_blocks(pixels, x_layout, y_layout)
        lanes, depthwise, places = y_layout.lanes, groups > 1, [range(i, i + 1) for i in range(len(pixels))]
        kind, channel_count, maps = (DEPTHWISE, lanes, y_layout.maps) if depthwise else (CHANNELS, outputs, 1)
        channels, channel_bytes = (groups, product.weight_group) if depthwise else (outputs, weight_channel)
        with self.chosen(Sizes("multiply", kind, lanes, channel_count, len(pixels), len(terms), maps)) as tile:
            weights = self.weights(weight, sources, tile[0], channels, channel_bytes)
            if depthwise:
                weights["weight_group"] = 4 * lanes * len(terms)
            self.emit_multiply(
                x, y, pixels, tile, terms=self.table(terms), term_count=len(terms), kind=kind, lanes=lanes,
                runs=NEIGHBOURS, ranges=self.ranges(product.ranges or [], blocks, places, tile[1]), blocks=blocks,
                groups=maps, channel_count=channel_count, bias=bias or self.zeros(channels + tile[0]),
                x_block=x_layout.block, y_block=y_layout.block, x_group=x_layout.channel, y_group=y_layout.channel,
                y_channel=y_layout.channel, **weights,
            )  # fmt: skip

    def reads_rows(self, channels: int) -> bool:
        """Vectors are stored whole: lanes behind the last channel must meet zeros."""
        return channels % channel_lanes(channels, self.lanes) == 0

    def correlate(self, x: Ref, x_layout: Layout, grad: Ref, grad_layout: Layout, target: Ref,
                  product: GatherCorrelate) -> None:  # fmt: skip
        """See ``Lowering.correlate``. A depthwise product has one tile per map of vectors, with its own input map.

        Strides do not shorten the chunks of pixels here: sums of lanes that are weights cost more to store than the
        cache saves. The weight gradients of MobileNetV1 0.25 at batch 4 took 0.37 ms with shorter ones, 0.32 so.
        """
        pixels, terms, groups, outputs = product.pixels, product.terms, product.groups, product.outputs
        weight_channel, weight_group = product.weight_channel, product.weight_group
        columns, places = [a for a, _ in terms], [place for _, place in terms]
        if groups == 1 and few.is_vector(grad_layout) and lanes_of(places) and columns == places:
            start = x + pixels[0][0]
            self._outer_of_samples(start, x_layout, grad, grad_layout, target, lanes_of(places), len(terms), outputs,
                                   weight_channel)  # fmt: skip
            return
        pixels, blocks = self.merge_blocks(pixels, x_layout, grad_layout)
        lanes, count = grad_layout.lanes, len(pixels)
        if groups == 1:
            with self.chosen(Sizes("correlate", CHANNELS, lanes, outputs, count, len(terms))) as tile:
                self.emit_correlate(
                    x, x_layout, grad, grad_layout, target, pixels, terms, tile, lanes=lanes, kind=CHANNELS,
                    blocks=blocks, groups=1, channel_count=outputs, x_group=0, grad_group=0, weight_group=0,
                    weight_channel=weight_channel, area=1, keep=0,
                )  # fmt: skip
            return
        whole, rest = divmod(groups, lanes)
        with self.chosen(Sizes("correlate", DEPTHWISE, lanes, lanes, count, len(terms), grad_layout.maps)) as tile:
            for first, maps, channels in ((0, whole, lanes), (whole, 1 if rest else 0, rest)):
                if maps:
                    self.emit_correlate(
                        x + first * x_layout.channel, x_layout, grad + first * grad_layout.channel, grad_layout,
                        target + first * lanes * weight_group, pixels, terms, tile, lanes=lanes, kind=DEPTHWISE,
                        blocks=blocks, groups=maps, channel_count=channels, x_group=x_layout.channel,
                        grad_group=grad_layout.channel, weight_group=lanes * weight_group, weight_channel=weight_group,
                        area=1, keep=0,
                    )  # fmt: skip

    def _outer_of_samples(
        self, x: Ref, x_layout: Layout, grad: Ref, grad_layout: Layout, target: Ref, lanes: int, inputs: int,
        outputs: int, weight_channel: int,
    ) -> None:  # fmt: skip
        """Emit ``target[o][i] = sum over samples of grad[o] * x[i]``; see ``ProductLowering._outer``.

        The samples are the terms, and their inputs the weights. The weight gradient of LeNet-5's fc1 at batch 1 took
        25.2 us with the output channels in the lanes, whose numbers then went to memory one by one, and takes 5.2 so.
        """
        vectors = next(n for n in (8, 4, 2, 1) if inputs // lanes % n == 0)  # no tile reads behind the last input
        rows = [(grad_layout.at(channel), channel * weight_channel) for channel in range(outputs)]
        self.emit_multiply(
            grad, target, rows, (vectors * lanes, few.ACCUMULATORS // vectors), kind=CHANNELS, lanes=lanes, blocks=1,
            groups=1, channel_count=inputs, terms=self.table([s * grad_layout.block for s in range(self.blocks)]),
            term_count=self.blocks, weight=x, weight_group=0, weight_tile=4 * vectors * lanes,
            weight_step=x_layout.block, bias=self.zeros(inputs + vectors * lanes), x_block=0, y_block=0, x_group=0,
            y_group=0, y_channel=4 * lanes,
        )  # fmt: skip

    def sum_to(self, x: Value, y: Value, target: tuple[int, ...]) -> None:
        """See ``Lowering.sum_to``; channels are never summed here."""
        if y.batched:
            source, out = self.layout(x), self.layout(y)
            self.emit(
                "sum_maps", (source.lanes,), out.planes, x=self.address(x), y=self.address(y), channels=source.maps,
                rows=source.rows, columns=source.columns, y_channels=out.maps, y_rows=out.rows, y_columns=out.columns,
                **strides(x=source, y=out),
            )  # fmt: skip
            return
        source, sizes = self.layout(x), map_sizes(target)
        if sizes != (source.channels, 1, 1):
            self.emit(
                "sum_samples_scalars", (source.lanes,), sizes[0], x=self.address(x), y=self.address(y),
                blocks=self.blocks, channels=source.channels, rows=source.rows, columns=source.columns,
                y_channels=sizes[0], y_rows=sizes[1], y_columns=sizes[2], x_block=source.block,
                x_channel=source.channel, x_row=source.row,
            )  # fmt: skip
            return
        self.emit(
            "sum_samples_channels", (source.lanes,), source.maps, x=self.address(x), y=self.address(y),
            blocks=self.blocks, rows=source.rows, columns=source.columns, x_block=source.block, x_map=source.channel,
            x_row=source.row,
        )  # fmt: skip

    def expand(self, value: Value, y: Layout, sizes: Place, steps: Place) -> tuple[Ref, tuple[int, int, int, int]]:
        """See ``Lowering.expand``; a number for all channels is repeated over the lanes."""
        maps = 1 if sizes[0] == 1 else y.maps
        target = self.workspace(4 * maps * y.lanes * sizes[1] * sizes[2])
        self.emit(
            "expand_channels", (y.lanes,), maps, x=self.address(value), y=target, channels=y.channels, rows=sizes[1],
            columns=sizes[2], x_channel=steps[0], x_row=steps[1], x_pixel=steps[2],
        )  # fmt: skip
        row = 4 * y.lanes * sizes[2]
        wide = (0 if maps == 1 else sizes[1] * row, 0 if sizes[1] == 1 else row, 0 if sizes[2] == 1 else 4 * y.lanes)
        return target, (0, *wide)

    def dropout(self, x: Value, y: Value, ratio: float, stream: int) -> None:
        """See ``Lowering.dropout``."""
        source, out = self.layout(x), self.layout(y)
        self.emit(
            "dropout_channels", (source.lanes,), source.planes, x=self.address(x), y=self.address(y),
            state=Ref("state"), stream=stream, channels=source.channels, maps=source.maps, rows=source.rows,
            columns=source.columns,
            f_ratio=ratio, **strides(x=source, y=out),
        )  # fmt: skip

    def batch_norm(self, node: Node, epsilon: float, momentum: float, bounds: tuple[float, float]) -> None:
        """See ``Lowering.batch_norm``."""
        x, y, outs, addend = self.layout(node.x), self.layout(node.y), node.outputs, node.optional(5)
        other = node.x if addend is None else addend
        self.emit(
            "batch_norm_channels", (x.lanes, int(addend is not None)), x.maps, x=self.address(node.x),
            y=self.address(node.y), addend=self.address(other), scale=self.address(node.input(1)),
            bias=self.address(node.input(2)), mean=self.address(outs[1]), variance=self.address(outs[2]),
            inverse_std=self.address(outs[3]), f_epsilon=epsilon, f_low=bounds[0], f_high=bounds[1], **maps_of(x),
            **strides(x=x, y=y, addend=self.layout(other)),
        )  # fmt: skip
        self.move_running_averages(node, momentum)

    def batch_norm_inference(
        self, node: Node, epsilon: float, bounds: tuple[float, float], inverted: bool = False
    ) -> None:
        """See ``Lowering.batch_norm_inference``."""
        x, y = self.layout(node.x), self.layout(node.y)
        self.emit(
            "batch_norm_inference_channels", (x.lanes, int(inverted)), x.maps, x=self.address(node.x),
            y=self.address(node.y), scale=self.address(node.input(1)), bias=self.address(node.input(2)),
            mean=self.address(node.input(3)),
            spread=self.address(node.input(4)), f_epsilon=epsilon, f_low=bounds[0], f_high=bounds[1], **maps_of(x),
            **strides(x=x, y=y),
        )  # fmt: skip

    def batch_norm_gradient(
        self, node: Node, bounds: tuple[float, float], again: Value | None = None, kept: Value | None = None
    ) -> None:
        """See ``Lowering.batch_norm_gradient``; channels are never chosen here."""
        x = self.layout(node.x)
        self.emit("batch_norm_gradient_channels", (x.lanes, int(again is not None)), x.maps,
                  **self.gradient_arguments(node, bounds, again))  # fmt: skip

    def residual_norm_gradient(
        self, node: Node, bounds: tuple[float, float], bits: int = 0, kept: Value | None = None
    ) -> None:
        """See ``Lowering.residual_norm_gradient``; outputs are never bits here, nor channels chosen."""
        x, more = self.layout(node.x), node.optional(6)
        self.emit("residual_norm_gradient_channels", (x.lanes, int(more is not None)), x.maps,
                  **self.residual_arguments(node, bounds))  # fmt: skip

    def emit_copy(self, x: Value, y: Value, table: list[Pair]) -> None:
        """See ``Lowering.emit_copy``; numbers move one by one, since a channel may change its lane."""
        self.emit(
            "copy_scalars", (), self.blocks, x=self.address(x), y=self.address(y), table=self.table(table),
            count=len(table), x_block=self.layout(x).block, y_block=self.layout(y).block,
        )  # fmt: skip

    def emit_box(self, x: Value, y: Value, box: Place, source: Place, to: Place) -> None:
        """See ``Lowering.emit_box``; whole values of one layout are copied by maps."""
        a, b = self.layout(x), self.layout(y)
        if box == (a.channels, a.rows, a.columns) == (b.channels, b.rows, b.columns):
            self.emit(
                "copy_maps", (a.lanes,), a.planes, x=self.address(x), y=self.address(y), channels=a.maps, rows=a.rows,
                vectors=a.columns, **strides(x=a, y=b),
            )  # fmt: skip
            return
        offsets = [(c, h, w) for c in range(box[0]) for h in range(box[1]) for w in range(box[2])]
        self.emit_copy(x, y, [(_at(a, place, source), _at(b, place, to)) for place in offsets])

    def shuffle_channels(self, x: Value, y: Value, group: int) -> None:
        """See ``Lowering.shuffle_channels``; numbers move one by one."""
        a, b = self.layout(x), self.layout(y)
        per = a.channels // group
        self.emit_copy(x, y, [
            (a.offset((c, row, column)), b.offset((c % per * group + c // per, row, column)))
            for c in range(a.channels) for row in range(a.rows) for column in range(a.columns)
        ])  # fmt: skip

    def transpose(self, x: Value, y: Value, order: Sequence[int]) -> None:
        """See ``Lowering.transpose``; numbers move one by one."""
        a, b = self.layout(x), self.layout(y)
        self.emit_copy(x, y, [
            (a.offset(place), b.offset((place[order[0]], place[order[1]], place[order[2]])))
            for place in itertools.product(range(a.channels), range(a.rows), range(a.columns))
        ])  # fmt: skip

    def squared_error(self, node: Node) -> None:
        """See ``Lowering.squared_error``."""
        y, target = self.layout(node.x), self.layout(node.input(1))
        losses, correct = node.outputs
        self.emit(
            "squared_error_channels", (y.lanes,), self.blocks, y=self.address(node.x),
            target=self.address(node.input(1)), losses=self.address(losses), correct=self.address(correct),
            channels=y.channels, rows=y.rows, columns=y.columns, **strides(y=y, target=target),
        )  # fmt: skip
        self.mean_loss(losses, correct)

    def squared_error_gradient(self, node: Node) -> None:
        """See ``Lowering.squared_error_gradient``."""
        y, target, out = self.layout(node.x), self.layout(node.input(1)), self.layout(node.y)
        self.emit(
            "squared_error_gradient_channels", (y.lanes,), y.planes, y=self.address(node.x),
            target=self.address(node.input(1)), grad_y=self.address(node.y), samples=self.blocks, channels=y.channels,
            maps=y.maps, rows=y.rows, columns=y.columns, **strides(y=y, target=target, grad=out),
        )  # fmt: skip

    def cross_entropy(self, node: Node, smoothing: float) -> None:
        """See ``Lowering.cross_entropy``."""
        x, (probabilities, losses, correct) = self.layout(node.x), node.outputs
        self.emit(
            "cross_entropy_channels", (), self.blocks, logits=self.address(node.x),
            probabilities=self.address(probabilities), labels=Ref("labels"), losses=self.address(losses),
            correct=self.address(correct), classes=x.channels, logits_block=x.block, f_smoothing=smoothing,
        )  # fmt: skip
        self.mean_loss(losses, correct)

    def cross_entropy_gradient(self, node: Node, smoothing: float) -> None:
        """See ``Lowering.cross_entropy_gradient``."""
        x = self.layout(node.x)
        self.emit(
            "cross_entropy_gradient_channels", (), self.blocks, probabilities=self.address(node.x),
            labels=Ref("labels"), grad_logits=self.address(node.y), classes=x.channels, padded=x.maps * x.lanes,
            samples=self.blocks,
            logits_block=x.block, f_smoothing=smoothing,
        )  # fmt: skip


def _at(layout: Layout, place: Place, start: Place) -> int:
    """Return the byte offset of a (channel, row, column) counted from ``start``."""
    return layout.offset((place[0] + start[0], place[1] + start[1], place[2] + start[2]))
