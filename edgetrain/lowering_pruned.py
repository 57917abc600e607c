"""How the operators of ``ops/pruning.py`` become kernel calls."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from edgetrain import lowering_winograd as winograd
from edgetrain.arrays import ALIGNMENT, Layout, aligned
from edgetrain.choice import Sizes
from edgetrain.graph import Node, Value
from edgetrain.kernels.codes import (
    BY_CHANCE,
    BY_ERROR_AND_WEIGHTS,
    ERRORS,
    KEPT,
    PARTS,
    RECORD,
    SAMPLES,
    SUMS,
    TALLY_BYTES,
)
from edgetrain.lowering_core import Pair, lanes_of
from edgetrain.lowering_products import ProductLowering
from edgetrain.ops.normalization import epsilon_of
from edgetrain.ops.pruning import IMPORTANCE
from edgetrain.plan import Plan, Ref

if TYPE_CHECKING:
    from edgetrain.ops.conv import Phase, Product

COUNTERS = 1 << 14  # bytes of the counters of a digit when a threshold is selected
_LISTED_TERMS = 16  # accumulators of a product over lists: each term one
_PARTS = 4  # parts of a channel's terms that different threads may take


class PrunedLowering(ProductLowering):
    """Lowers products of a part of the error maps; lanes hold samples."""

    def kept_channels(self, node: Node, g: Product) -> None:
        """Emit the scores of an error map's channels, and the choice of the best."""
        scores = self.workspace(8 * g.channels_out)
        counts = IMPORTANCE[node.get("importance")] == BY_ERROR_AND_WEIGHTS
        weight = self.dense_weight(node.input(1), g) if counts else 0
        self._score(node, node.x, scores, weight=weight, weight_channel=g.weight_out,
                    sources=g.forward_sources())  # fmt: skip
        self._choose(scores, node.y, g.channels_out)

    def in_stages(self, node: Node, channels: int, kept: Value, emit: Callable[..., None]) -> None:
        """Call ``emit`` with each stage of a normalisation's gradient whose sums tell which channels to choose.

        First come the sums, and the input gradient of the channels chosen in the last step, whose maps are in the cache
        then; next the choice; last the input gradient of the channels that are new in it. The normalisations of
        ResNet-20 took 1.40 ms so and 1.54 when all waited for the choice (batch 32, keep 0.7, one thread).
        """
        scores, chosen = self.workspace(8 * channels), self.address(kept)
        if IMPORTANCE[node.get("importance")] == BY_CHANCE:  # needs no sums
            self._score(node, node.x, scores)
            self._choose(scores, kept, channels)
            emit(SUMS, scores=scores, kept=chosen, kept_count=kept.size)
            return
        numbers = aligned(kept.size, np.float32)
        numbers[:] = -1
        expected, missed = self.lasting(f"expected:{kept.name}", numbers), self.workspace(4 * kept.size)
        emit(SUMS, scores=scores, kept=expected, kept_count=kept.size)
        self._choose(scores, kept, channels, expected, missed)
        emit(ERRORS, scores=scores, kept=missed, kept_count=kept.size)

    def in_blocks(self, node: Node, grads: Sequence[Value], kept: Value, parts: Ref | int,
                  emit: Callable[..., None]) -> None:  # fmt: skip
        """Do as ``in_stages`` by blocks: all sums first, then the choice.

        ``grads``: of scale and bias. ``parts``: where the sums of blocks belong.
        """
        x, scores = self.layout(node.x), self.workspace(8 * self.layout(node.x).channels)
        emit(PARTS)
        self.emit(
            "settle_channels", (), x.channels, parts=parts, scale=self.address(node.input(2)),
            inverse_std=self.address(node.input(5)), grad_scale=self.address(grads[0]),
            grad_bias=self.address(grads[1]), scores=scores, state=Ref("state"), blocks=self.blocks,
            pixels=x.rows * x.columns, f_epsilon=epsilon_of(node),
        )  # fmt: skip
        if IMPORTANCE[node.get("importance")] == BY_CHANCE:
            self._score(node, node.x, scores)
        self._choose(scores, kept, x.channels)
        emit(KEPT, scores=scores, kept=self.address(kept), kept_count=kept.size)

    def _score(self, node: Node, grad_out: Value, scores: Ref, weight: Ref | int = 0, weight_channel: int = 0,
               sources: Sequence[int] = ()) -> None:  # fmt: skip
        grad, how = self.layout(grad_out), IMPORTANCE[node.get("importance")]
        self.emit(
            "channel_scores", (self.lanes, how), grad.channels, grad_out=self.address(grad_out), weight=weight,
            scores=scores, state=Ref("state"), stream=int(node.get("stream")), channels=grad.channels,
            blocks=self.blocks, rows=grad.rows, columns=grad.columns, grad_block=grad.block,
            grad_channel=grad.channel, grad_row=grad.row, weight_channel=weight_channel,
            sources=self.table(sources), source_count=len(sources),
        )  # fmt: skip

    def _choose(self, scores: Ref, kept: Value, channels: int, expected: Ref | int = 0, missed: Ref | int = 0) -> None:
        self.emit("keep_channels", (), 1, scores=scores, kept=self.address(kept), channels=channels,
                  kept_count=kept.size, expected=expected, missed=missed)  # fmt: skip

    def pruned_input_grad(self, node: Node, g: Product) -> None:
        """As the dense gradient: Winograd, or one gather-multiply per phase over terms that are listed at run time."""
        kept = replace(g, channels_out=node.input(2).size)
        if self._winograd(kept, node.input(1), g.size):
            winograd.input_grad(self, node, kept, self.address(node.input(2)))
            return
        if self.runs_sparse(node.input(1), g):
            self.sparse_input_grad(node, g, node.input(2))
            return
        grad, out = self.layout(node.x), self.layout(node.y)
        weight = self.dense_weight(node.input(1), g)
        for phase, few in zip(g.phases(), kept.phases(), strict=True):
            pixels, blocks, lanes, places, runs = self.result_vectors(phase.pixels(grad, out), grad, out)
            terms, sources, count = self._listed_terms(node, g, phase)
            with self.chosen(Sizes("multiply", SAMPLES, lanes, g.channels_in, len(pixels), count, 1)) as tile:
                width, tiles = tile[0], -(-g.channels_in // tile[0])
                packed = self.workspace(4 * tiles * width * max(1, count))
                self.emit(
                    "pack_weights", (width,), tiles, weight=weight, packed=packed, sources=sources, term_count=count,
                    channel_count=g.channels_in, group_bytes=0, packed_group=0, channel_bytes=g.weight_in, tiles=tiles,
                    groups=1,
                )  # fmt: skip
                self.emit_multiply(
                    self.address(node.x), self.address(node.y), pixels, tile, terms=terms, term_count=count,
                    kind=SAMPLES, lanes=lanes, blocks=blocks, groups=1, channel_count=g.channels_in, runs=runs,
                    weight=packed, weight_group=0, weight_tile=4 * width * count, weight_step=4 * width,
                    bias=self.zeros(g.channels_in + width), x_block=grad.block, y_block=out.block, x_group=0, y_group=0,
                    y_channel=out.channel,
                    ranges=self.ranges(few.ranges(), blocks, places, tile[1]),
                )  # fmt: skip

    def _listed_terms(self, node: Node, g: Product, phase: Phase) -> tuple[Ref, Ref, int]:
        """Emit the tables of a phase for the kept channels; return terms, sources, and how many they are."""
        grad, kept, taps = self.layout(node.x), node.input(2), len(phase.taps)
        count = kept.size * taps
        terms, sources = self.workspace(8 * max(1, count)), self.workspace(8 * max(1, count))
        if count:
            first = [(a * grad.row + b * grad.pixel, (i * g.kernel[1] + j) * g.weight_tap) for i, j, a, b in phase.taps]
            self.emit(
                "listed_terms", (), kept.size, kept=self.address(kept), kept_count=kept.size, taps=self.table(first),
                tap_count=taps, row_taps=sum(tap[0] == phase.taps[0][0] for tap in phase.taps),
                grad_channel=grad.channel, weight_channel=g.weight_out, terms=terms, sources=sources,
            )  # fmt: skip
        return terms, sources, count

    def pruned_weight_grad(self, node: Node, g: Product) -> None:
        """Zeros for the channels that are not kept; for the others as the gradient of all."""
        few = replace(g, channels_out=node.input(2).size)
        if self.keeps_lists(node.get("like"), g, winograd.suits(self, few, g.out)):
            self.sparse_weight_grad(node, g, node.input(2))
            return
        kept, sources = node.input(2), g.forward_sources()
        lanes = lanes_of(sources) or 1
        with self.whole_gradient(node, g) as target:
            self._pruned_weight_grad(node, g, few, target)
            self.emit(
                "zero_unlisted", (lanes,), g.channels_out, target=target, kept=self.address(kept),
                kept_count=kept.size, weight_channel=g.weight_out, sources=self.table(sources[::lanes]),
                source_count=len(sources) // lanes,
            )  # fmt: skip

    def _pruned_weight_grad(self, node: Node, g: Product, few: Product, target: Ref) -> None:
        """Emit the gradients of the channels that are kept, ``few``; what stands for the others means nothing."""
        x, grad, kept, sources = self.layout(node.x), self.layout(node.input(1)), node.input(2), g.forward_sources()
        if self._winograd(few, node.get("like"), g.out):
            winograd.weight_grad(self, node, few, target, self.address(kept))
            return
        pixels, terms = g.forward_pixels(x, grad), list(zip(g.forward_terms(x), sources, strict=True))
        pixels, blocks, lanes, runs = self.vectors(pixels, x, grad)
        with self.chosen(Sizes("correlate", SAMPLES, lanes, kept.size, len(pixels), len(terms), 1)) as tile:
            self.emit_correlate(
                self.address(node.x), x, self.address(node.input(1)), grad, target, pixels, terms, tile,
                lanes=lanes, kind=SAMPLES, blocks=blocks, groups=1, channel_count=kept.size, kernel="correlate_listed",
                kept=self.address(kept), weight_channel=g.weight_out, area=math.prod(g.strides),
                nbytes=g.channels_out * g.weight_out, runs=runs,
            )  # fmt: skip

    def pruned_bias_grad(self, node: Node) -> None:
        """The sums of the kept channels."""
        grad, kept = self.layout(node.x), node.input(1)
        self.emit(
            "bias_gradient_listed", (self.lanes,), grad.channels, grad_out=self.address(node.x),
            grad_bias=self.address(node.y), kept=self.address(kept), kept_count=kept.size, blocks=self.blocks,
            rows=grad.rows, columns=grad.columns, grad_block=grad.block, grad_channel=grad.channel, grad_row=grad.row,
        )  # fmt: skip

    # --- saved activations ---

    def compress_activation(self, node: Node, g: Product) -> None:
        """Emit norms, the choice of a threshold, and the lists of the vectors that reach it."""
        x, pixels, lists = self.layout(node.x), g.size[0] * g.size[1], self._vector_lists(node, g)
        self.plan.sizes[self.plan.buffer(node.y.name)] = lists.nbytes
        grad = self.layout(node.get("grad_out"))
        norms, starts, threshold = self._vector_threshold(node, pixels, lists.capacity)
        tables = [_places(phase, grad, x) for phase in lists.phases]
        ends = [sum(len(table) for table in tables[:i]) for i in range(len(tables) + 1)]
        base = self.address(node.y)
        self.emit(
            "list_vectors", (self.lanes,), x.channels, x=self.address(node.x), norms=norms, starts=starts,
            threshold=threshold, segments=base, pairs=base + lists.pairs, values=base + lists.values,
            pixels=self.table([number for table in tables for place in table for number in place]),
            phase_starts=self.table(ends), phases=len(tables), blocks=self.blocks, channels=x.channels,
            x_block=x.block, x_channel=x.channel, other_block=grad.block, pixel_count=pixels,
        )  # fmt: skip

    def _vector_threshold(self, node: Node, pixels: int, capacity: int) -> tuple[Ref, Ref, Ref]:
        """Emit the norms of a plane's ``pixels`` vectors and the choice; return norms, channels' starts, threshold."""
        x, record = self.layout(node.x), self.record_of(node)
        norms, counts = self.workspace(4 * pixels * x.planes), self.workspace(8 * x.planes)
        starts, threshold = self.workspace(8 * x.channels), self.threshold_of(node)
        self.emit(
            "vector_norms", (self.lanes,), x.planes, x=self.address(node.x), norms=norms, counts=counts, record=record,
            mask=Ref("mask"), channels=x.channels, rows=x.rows, columns=x.columns, x_block=x.block,
            x_channel=x.channel, x_row=x.row,
        )  # fmt: skip
        self.emit(
            "choose_threshold", (), 1, norms=norms, counts=counts, starts=starts, counters=self.workspace(COUNTERS),
            record=record, threshold=threshold, tally=self.tally_of(node),
            state=Ref("state"), blocks=self.blocks, channels=x.channels, pixels=pixels, capacity=capacity,
            refresh=int(node.get("refresh")),
        )  # fmt: skip
        return norms, starts, threshold

    def record_of(self, node: Node) -> Ref:
        """Return what a layer remembers from step to step, see ``kernels.codes.RECORD``."""
        return Ref("records", 4 * RECORD * int(node.get("record")))

    def tally_of(self, node: Node) -> Ref:
        """Return where a layer counts what it keeps in a step, see ``kernels.codes.TALLY_BYTES``."""
        return Ref("tally", TALLY_BYTES * int(node.get("record")))

    def threshold_of(self, node: Node) -> Ref:
        """Return where a layer's threshold of this step is until the update copies it to the record."""
        number, name = int(node.get("record")), "thresholds"
        if not self._thresholds:
            self.kept(name, self._parameters.buffers["records"].nbytes)
        self._thresholds.append(number)
        return Ref(name, 4 * RECORD * number)

    def finish(self) -> Plan:
        """Also let the update remember all thresholds, in one row.

        With one for each of 18 a step of ResNet-20 with SWAT took 0.7 % longer (half of the weights, batch 4, two
        threads; test_sparsity_swat.py counts rows).
        """
        if self._thresholds:
            with self.stage("update"):
                self.emit("remember_thresholds", (), 1, thresholds=Ref("thresholds"), records=Ref("records"),
                          numbers=self.table(self._thresholds), count=len(self._thresholds))  # fmt: skip
        return super().finish()

    def compressed_weight_grad(self, node: Node, g: Product) -> None:
        """Emit one correlation over lists per phase of the stride: a phase meets kernel positions of its own."""
        with self.whole_gradient(node, g) as target:
            self._compressed_weight_grad(node, g, target)

    def _compressed_weight_grad(self, node: Node, g: Product, target: Ref) -> None:
        grad, base, lists = self.layout(node.input(1)), self.address(node.x), self._vector_lists(node, g)
        self.clear_unmet(node, g, target)
        for number, phase in enumerate(lists.phases):
            # In the order of the weights, as ``kernels.tiles`` expects.
            terms = sorted(zip(phase.terms(grad), phase.sources(), strict=True), key=lambda term: term[1])
            self.correlate_lists(
                terms, _LISTED_TERMS, g.channels_in, other=self.address(node.input(1)), values=base + lists.values,
                target=target, segments=base + number * lists.phase_bytes, pairs=base + lists.pairs, value_channel=0,
                target_channel=g.weight_in,
            )  # fmt: skip

    def correlate_lists(self, terms: list[Pair], width: int, count: int, **arguments: int | Ref) -> None:
        """Emit correlations with ``count`` lists; see ``kernels.vector_lists.correlate_lists``.

        ``width``: most terms at a time, each in an accumulator. ``arguments``: those of the kernel but for its terms.
        """
        width = min(width, len(terms))
        chunk = -(-len(terms) // (width * _PARTS)) * width
        chunks = -(-len(terms) // chunk)
        self.emit(
            "correlate_lists", (self.lanes, width), count * chunks, term_count=len(terms), term_chunk=chunk,
            term_chunks=chunks, terms=self.table(terms + [terms[-1]] * (-len(terms) % width)), **arguments,
        )  # fmt: skip

    def clear_unmet(self, node: Node, g: Product, target: Ref) -> None:
        """Emit zeros where kernel positions meet nothing but padding: no phase computes their gradient."""
        if sum(len(phase.taps) for phase in g.phases()) < len(g.taps):
            self.emit("fill", (1,), 1, y=target, channels=1, rows=1, vectors=node.y.size, f_value=0.0,
                      y_block=0, y_channel=0, y_row=0)  # fmt: skip

    def _vector_lists(self, node: Node, g: Product) -> _VectorLists:
        vectors = self.blocks * g.channels_in * g.size[0] * g.size[1]
        capacity = min(vectors, max(1, math.ceil(float(node.get("capacity")) * vectors)))
        return _VectorLists([phase for phase in g.phases() if phase.taps], g.channels_in, capacity, 4 * self.lanes)


@dataclass(frozen=True)
class _VectorLists:
    """Where the parts of a compressed activation lie: segments, pairs of offsets, vectors.

    Attributes:
        phases: of the stride that meet a kernel position; each has its own segments.
        channels: each is a segment of a phase.
        capacity: vectors there is room for.
        vector_bytes: of one vector.
    """

    phases: list[Phase]
    channels: int
    capacity: int
    vector_bytes: int

    @property
    def phase_bytes(self) -> int:
        """Bytes of the segments of a phase."""
        return 16 * self.channels

    @property
    def pairs(self) -> int:
        """Byte offset of the pairs."""
        return len(self.phases) * self.phase_bytes

    @property
    def values(self) -> int:
        """Byte offset of the vectors."""
        return -(-(self.pairs + 16 * self.capacity) // ALIGNMENT) * ALIGNMENT

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        return self.values + self.vector_bytes * self.capacity


def _places(phase: Phase, grad: Layout, x: Layout) -> list[tuple[int, int, int]]:
    """Return (number of the pixel, offset in the output gradient, offset in x) of every pixel of a phase."""
    numbers = [h * phase.product.size[1] + w for h in phase.rows for w in phase.columns]
    return [(number, *pair) for number, pair in zip(numbers, phase.pixels(grad, x), strict=True)]
