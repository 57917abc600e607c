"""How the products of training become kernel calls: convolutions, fully connected layers and their gradients.

A product is *direct* (one gather-multiply or gather-correlate over offset tables, ``kernels/dense.py``); the choice
of its kernel is made here and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgetrain import lowering_few as few
from edgetrain import lowering_winograd as winograd
from edgetrain.arrays import READ_BEHIND, Layout
from edgetrain.choice import Sizes, simd_lanes
from edgetrain.graph import Node, Value
from edgetrain.kernels.codes import CHANNELS, ROWS, SAMPLES
from edgetrain.lowering_core import (
    FEWEST_JOBS,
    NEIGHBOURS,
    GatherCorrelate,
    GatherMultiply,
    Pair,
    Runs,
    lanes_of,
    overlapping,
    steps_of,
    widened,
)
from edgetrain.lowering_sparse import SparseLowering, moves_by_bits
from edgetrain.plan import Ref
from edgetrain.sparse_index import WORD, SparseIndex

if TYPE_CHECKING:
    from edgetrain.ops.conv import Product


def whole_gradient_name(weight: str) -> str:
    """Return the name of the memory that keeps the gradient of all of a sparse product's weights."""
    return f"whole gradient:{weight}"


# Jobs are the grain that threads share. Below this number per kernel call a product is cut further, so that
# four threads find work; results do not depend on it.
_WANTED_JOBS = 16
_PIXELS_PER_JOB = 64
# Input pixels over which a weight gradient stays in registers: a channel's fit the first-level cache. It fixes the
# order of summation, so it must not depend on threads. 256 measured best of 32, 64, 128, 256 on three layers of
# ResNet-20 (docs/performance.md); with stride 2 that are 64 pixels of the output: 0.51 ms, with 256 0.64 (layer2.0).
_PIXELS_PER_SUM = 256
# A vector per pixel is wasted on maps smaller than this: there the pixels of all blocks form one list.
_SMALL_MAP = 16
# Terms are left out where at most this share of them remains.
_WORTHWHILE = 0.9
_NUMBERS_PER_JOB = 512  # of adding up the parts of a gradient
# Weight gradients with sums for each group of blocks: most groups, and the least bytes of a block. Threads read what
# they wrote themselves then, and each its own samples only: dense steps of ResNet-20, ResNet-8 and MobileNetV1 0.25
# take 6, 6 and 2 % less (batch 32, two threads, Intel); by one thread up to 0.6 % more.
_MOST_PARTS, _PART_BYTES = 4, 1 << 19
# Weights of a fully connected layer, in bytes, from which its input gradient is the sum of two, each of half of the
# outputs, if there are blocks for two threads. A thread reads then what it updates: where both read all of fc1, the
# update of LeNet-5 took 37 us and takes 16, a step 5 to 6 % less (batch 32, two threads; by one thread no difference).
_HALVED_BYTES = 1 << 16
# Bytes of all weights of a step that are written out once for both passes.
_MOST_COPIED = 1 << 19
# Up to so many pixels a product reads its weights where they are.
_FEW_PIXELS = 2


class ProductLowering(SparseLowering):
    """Lowers products; ``g`` is the product's ``ops.conv.Product``, sizes and strides of its weights."""

    # --- the three products of a layer ---

    def product(self, node: Node, g: Product) -> None:
        """Emit ``y = weights * x + bias`` of a Conv, Gemm or MatMul."""
        if self._winograd(g, node.input(1), g.out):
            winograd.forward(self, node, g)
        elif self.runs_sparse(node.input(1), g):
            self.sparse_forward(node, g)
        elif few.suits(self, node.input(1), g, node.x, node.y):
            few.forward(self, node, g)
        else:
            self._direct_forward(node, g)

    def product_input_grad(self, node: Node, g: Product) -> None:
        """Emit the gradient of a product's input, from (grad_out, weights)."""
        if self._winograd(g, node.input(1), g.size):
            winograd.input_grad(self, node, g)
        elif self.runs_sparse(node.input(1), g):
            self.sparse_input_grad(node, g)
        elif few.suits(self, node.input(1), g, node.y, node.x):
            few.input_grad(self, node, g)
        else:
            self._direct_input_grad(node, g)

    def product_weight_grad(self, node: Node, g: Product) -> None:
        """Emit the gradient of a product's weights, from (x, grad_out)."""
        weight = node.get("like")
        if self.keeps_lists(weight, g, winograd.suits(self, g, g.out)):
            self.sparse_weight_grad(node, g)
            return
        if self._is_compact(weight) and few.suits(self, weight, g, node.x, node.input(1), gradient=True):
            few.weight_grad(self, node, g)
            return
        with self.whole_gradient(node, g) as target:
            if winograd.suits(self, g, g.out):
                winograd.weight_grad(self, node, g, target)
            else:
                self._direct_weight_grad(node, g, target)

    def keeps_lists(self, weight: Value, g: Product, winograd: bool) -> bool:
        """Whether only the gradients of weights that exist are wanted, and computed by lists; see ``runs_sparse``."""
        return self._is_compact(weight) and self.runs_sparse(weight, g, winograd)

    def _is_compact(self, weight: Value) -> bool:
        """Whether gradients are wanted, and stored, for the weights that exist only."""
        index = self.sparse.get(weight.name)
        return index is not None and index.compact and not self.whole_gradients

    @contextmanager
    def whole_gradient(self, node: Node, g: Product) -> Iterator[Ref]:
        """Yield where the gradient of all weights is to be written, also of those that do not exist.

        Afterwards the gradients of compact weights are gathered from there.
        """
        weight = node.get("like")
        index = self.sparse.get(weight.name)
        if index is None or not index.compact:
            yield self.address(node.y)
            return
        nbytes = 4 * index.size
        whole = self.kept(whole_gradient_name(weight.name), nbytes) if self.whole_gradients else self.workspace(nbytes)
        yield whole
        self._move(("gather_bits", "gather_sparse"), weight, g, values=self.address(node.y), dense=whole)

    def _winograd(self, g: Product, weight: Value, size: Pair) -> bool:
        """Whether a product over output maps of ``size`` needs fewer multiplications so."""
        return winograd.suits(self, g, size) and not self.runs_sparse(weight, g, winograd=True)

    # --- direct kernels ---

    def _direct_forward(self, node: Node, g: Product) -> None:
        """Pack the weights, then one gather-multiply."""
        x, y = self.layout(node.x), self.layout(node.y)
        bias = node.optional(2)
        self.multiply(self.address(node.x), x, self.address(node.y), y, GatherMultiply(
            pixels=g.forward_pixels(x, y), terms=g.forward_terms(x), sources=g.forward_sources(),
            weight=self.dense_weight(node.input(1), g), weight_channel=g.weight_out,
            weight_group=g.outputs * g.weight_out, groups=g.groups, inputs=g.inputs, outputs=g.outputs,
            bias=self.address(bias) if bias is not None else None,
        ))  # fmt: skip

    def _direct_input_grad(self, node: Node, g: Product) -> None:
        """One gather-multiply per phase of the stride; a phase that no window meets becomes 0."""
        grad, out = self.layout(node.x), self.layout(node.y)
        weight = self.dense_weight(node.input(1), g)
        if self._halves_rows(g, out):
            self._input_grad_by_halves(node, g, weight)
            return
        for phase in g.phases():
            self.multiply(self.address(node.x), grad, self.address(node.y), out, GatherMultiply(
                pixels=phase.pixels(grad, out), terms=phase.terms(grad), sources=phase.sources(),
                ranges=phase.ranges(), weight=weight, weight_channel=g.weight_in,
                weight_group=g.outputs * g.weight_out, groups=g.groups, inputs=g.outputs, outputs=g.inputs,
            ))  # fmt: skip

    def _halves_rows(self, g: Product, out: Layout) -> bool:
        """Whether an input gradient is the sum of two, of half of the outputs each: of large fully connected layers.

        Not by threads, as it fixes the order of summation.
        """
        pixel = g.out == g.size == g.kernel == (1, 1)
        connected = self.kind == SAMPLES and pixel and g.groups == 1 and not out.bordered
        even = self.blocks > 1 and g.outputs % 2 == 0
        return connected and even and 4 * g.inputs * g.outputs >= _HALVED_BYTES

    def _input_grad_by_halves(self, node: Node, g: Product, weight: Ref) -> None:
        """Emit two gather-multiplies as if they were groups of one, and their sum."""
        grad, out, (phase,), half = self.layout(node.x), self.layout(node.y), g.phases(), g.outputs // 2
        sums = self.workspace(2 * out.nbytes)
        terms, sources = phase.terms(grad)[:half], phase.sources()[:half]
        self.multiply(self.address(node.x), grad, sums, out, GatherMultiply(
            pixels=phase.pixels(grad, out), terms=terms, sources=sources, weight=weight, weight_channel=g.weight_in,
            weight_group=half * g.weight_out, groups=2, inputs=half, outputs=g.inputs, y_group=out.nbytes,
        ))  # fmt: skip
        self.sum_parts(sums, self.address(node.y), 2, out.nbytes)

    def dense_weight(self, weight: Value, g: Product) -> Ref:
        """Return where a product's dense weights are; those of sparse weights are written out within the step.

        For this node alone, but for some of fully connected layers, which are kept for the input gradient. Written once
        for both, half of its weights cost LeNet-5 3 % less time of a step at batch 8 and 1 % at 32; its plan takes 2 %
        more memory at batch 8, none at 32 (``_MOST_COPIED``: of twelve layers of 256 all copies would take 23 %).
        """
        index = self.sparse.get(weight.name)
        if index is None:
            return self.address(weight)
        if not index.compact:
            return self._masked_weight(weight, index)
        if weight.name in self._written:
            return self.again(self._written[weight.name])
        nbytes = 4 * index.size + READ_BEHIND
        dense = self.workspace(nbytes)
        if g.out == (1, 1) and nbytes + sum(self.plan.sizes[r.buffer] for r in self._written.values()) <= _MOST_COPIED:
            self._written[weight.name] = dense
        self._move(("expand_bits", "expand_sparse"), weight, g, values=self.address(weight), dense=dense,
                   row_size=index.row_size)  # fmt: skip
        return dense

    def _move(self, kernels: tuple[str, str], weight: Value, g: Product, **arguments: int | Ref) -> None:
        """Emit a move between compact weights and a dense array of them: by bits, or number by number.

        ``kernels``: for the one and for the other. ``arguments``: those that both have.
        """
        rows, bits = self.sparse[weight.name].rows, self.rows_of_bits(weight, g)
        if bits:
            self.emit(kernels[0], (WORD,), rows, dense_row=g.weight_out, **bits, **arguments)
            return
        column = g.weight_tap if len(g.taps) > 1 else g.weight_in
        self.emit(kernels[1], (), rows, dense_row=g.weight_out, dense_column=column,
                  starts=self.index(weight, "starts"), columns=self.index(weight, "columns"), **arguments)  # fmt: skip

    def _masked_weight(self, weight: Value, index: SparseIndex) -> Ref:
        """Return where a copy of dense weights is in which those that do not exist are 0.

        It is written once for the forward pass and the input gradient, where the weights' gradient comes later: the
        kernels of LeNet-5 at batch 8 with half of its weights (SWAT) took 185 us with a copy each, take 175 so (where
        ``executor.Pace`` chooses between one thread and two).
        """
        dense = self.idle_gradient(weight)
        if dense is None:
            dense = self.workspace(4 * index.size + READ_BEHIND)
        elif weight.name in self._masked:
            return dense
        else:
            self._masked.add(weight.name)
        lines, size = (index.row_size, index.rows) if index.inputs_first else (index.rows, index.row_size)
        self.emit("mask_bits", (WORD,), lines, values=self.address(weight), dense=dense, row_size=size,
                  bits=self._bits(weight), row_words=index.row_words)  # fmt: skip
        return dense

    def rows_of_bits(self, weight: Value, g: Product) -> dict[str, int | Ref]:
        """Return where the rows of a sparse weight are and their bits, if vectors can move by them; else nothing."""
        index = self.sparse.get(weight.name)
        side_by_side = (g.weight_tap if len(g.taps) > 1 else g.weight_in) == 4
        if index is None or index.bits is None or index.inputs_first or not side_by_side or not moves_by_bits():
            return {}
        return {"starts": self.index(weight, "starts"), "bits": self._bits(weight), "row_words": index.row_words}

    def _bits(self, weight: Value) -> Ref:
        name, bits = f"index:{weight.name}:bits", self.sparse[weight.name].bits
        assert bits is not None
        self.plan.fixed[name] = bits
        return Ref(name)

    def _direct_weight_grad(self, node: Node, g: Product, target: Ref) -> None:
        """One gather-correlate, or an outer product where there is one pixel."""
        x, grad = self.layout(node.x), self.layout(node.input(1))
        self.correlate(self.address(node.x), x, self.address(node.input(1)), grad, target, GatherCorrelate(
            pixels=g.forward_pixels(x, grad), terms=list(zip(g.forward_terms(x), g.forward_sources(), strict=True)),
            groups=g.groups, inputs=g.inputs, outputs=g.outputs, weight_channel=g.weight_out,
            weight_group=g.outputs * g.weight_out, area=math.prod(g.strides),
        ))  # fmt: skip

    def multiply(self, x: Ref, x_layout: Layout, y: Ref, y_layout: Layout, product: GatherMultiply) -> None:
        """Emit a product; see ``kernels.dense.multiply``."""
        if few.multiply_apart(self, x, y, y_layout.channel, product):
            return
        pixels, blocks, lanes, places, runs = self.result_vectors(product.pixels, x_layout, y_layout)
        terms, sources, groups, outputs = product.terms, product.sources, product.groups, product.outputs
        weight, weight_channel, weight_group = product.weight, product.weight_channel, product.weight_group
        with self.chosen(Sizes("multiply", SAMPLES, lanes, outputs, len(pixels), len(terms), groups)) as tile:
            # Packed weights pay when many pixels use them. LeNet-5's fc1 at batch 8 (its forward pass) took 32 us with
            # packing, and takes 10 us so (2 threads, ``edgetrain bench --per-op``).
            by_row = len(pixels) <= _FEW_PIXELS and sources == list(range(0, 4 * len(sources), 4))
            if by_row:
                weights: dict[str, int | Ref] = {
                    "weight": weight, "weight_group": weight_group, "weight_tile": tile[0] * weight_channel,
                    "weight_step": 4, "weight_channel": weight_channel,
                }  # fmt: skip
            else:
                weights = self.weights(weight, sources, tile[0], outputs, weight_channel, groups, weight_group)
            self.emit_multiply(
                x, y, pixels, tile, terms=self.table(terms), term_count=len(terms), lanes=lanes,
                ranges=self.ranges(product.ranges or [], blocks, places, tile[1]),
                kind=ROWS if by_row else SAMPLES, blocks=blocks, groups=groups, channel_count=outputs, runs=runs,
                bias=product.bias or self.zeros(groups * outputs + tile[0]), **weights, x_block=x_layout.block,
                y_block=y_layout.block, x_group=product.inputs * x_layout.channel, y_channel=y_layout.channel,
                y_group=outputs * y_layout.channel if product.y_group is None else product.y_group,
            )  # fmt: skip

    def ranges(self, ranges: list[Pair], blocks: int, places: list[range], width: int) -> Ref | int:
        """Return the table of the terms that tiles of ``width`` vectors need; 0 if that would save less than a tenth.

        ``ranges``: (first, behind the last) term of every pixel of a block; ``places``: of the pixels of every vector,
        in each of ``blocks`` blocks (one where the pixels of all are one list).

        A convolution's input gradient without padding: the windows of a pixel near the edge lie partly outside.
        LeNet-5's second convolution at batch 8 took 28.7 us and takes 20.9 us so (one thread).
        """
        if not ranges:
            return 0
        ranges = ranges * (self.blocks // blocks)
        tiles = [[ranges[i] for place in places[n : n + width] for i in place] for n in range(0, len(places), width)]
        needed = [(min(a for a, _ in tile), max(b for _, b in tile)) for tile in tiles]
        most = max(b for _, b in ranges)
        if sum(b - a for a, b in needed) > _WORTHWHILE * most * len(needed):
            return 0
        return self.table(needed)

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
        """Emit the packing of weights to ``[group][tile][k][width]``; return its address and the bytes of a group.

        Runs of weights that lie side by side are turned by whole vectors. Number by number, a tile by one thread, steps
        at batch 1 of ResNet-20 took 889 us and take 851 so, of MobileNetV1 0.25 532 and 504 (two threads).
        """
        lanes, tiles, tile_bytes = _lanes_to_turn(width), -(-channels // width), 4 * width * len(sources)
        packed = self.workspace(groups * tiles * tile_bytes)
        shared: dict[str, int | Ref] = {
            "weight": weight, "packed": packed, "packed_group": tiles * tile_bytes, "group_bytes": weight_group,
            "channel_bytes": channel_bytes, "tiles": tiles, "groups": groups,
        }  # fmt: skip
        columns, runs = _runs(sources, lanes) if lanes and channels % width == 0 else (0, [])
        if not runs:
            self.emit("pack_weights", (width,), groups * tiles, sources=self.table(sources), term_count=len(sources),
                      channel_count=channels, **shared)  # fmt: skip
            return packed, tiles * tile_bytes
        place = {source: 4 * width * k for k, source in enumerate(sources)}
        places = [place[run + 4 * column] for run in runs for column in range(columns)]
        chunk = _chunk(len(runs), len(runs) * groups * tiles // _WANTED_JOBS, 1)
        chunks = -(-len(runs) // chunk)
        self.emit(
            "pack_runs", (lanes, width, columns), groups * tiles * chunks, runs=self.table(runs),
            places=self.table(places), run_count=len(runs), run_chunk=chunk, run_chunks=chunks, tile_bytes=tile_bytes,
            **shared,
        )  # fmt: skip
        return packed, tiles * tile_bytes

    def emit_multiply(self, x: Ref, y: Ref, pixels: list[Pair], tile: Pair, *, kind: int, lanes: int, blocks: int,
                      groups: int, channel_count: int, runs: Runs = NEIGHBOURS,
                      **arguments: int | Ref) -> None:  # fmt: skip
        """Emit a gather-multiply, cut into jobs; ``arguments`` are those of the kernel that are not sizes of jobs."""
        apart = () if runs == NEIGHBOURS else (runs.x, runs.y)
        (channels, width), count = tile, len(pixels)
        tiles = -(-channel_count // channels)
        wanted, pixel_chunk = -(-FEWEST_JOBS // (blocks * groups * tiles)), _chunk(count, _PIXELS_PER_JOB, width)
        if wanted > 1:
            pixel_chunk = min(pixel_chunk, max(1, count // wanted // width) * width)
        pixel_chunks = -(-count // pixel_chunk)
        parts = min(tiles, -(-_WANTED_JOBS // (blocks * groups * pixel_chunks)))
        channel_chunk = -(-tiles // parts) * channels
        channel_chunks = -(-channel_count // channel_chunk)
        self.emit(
            "multiply", (lanes, channels, width, kind, *apart), blocks * groups * pixel_chunks * channel_chunks,
            x=x, y=y, pixels=self.table(pixels + [pixels[-1]] * (-count % width)), pixel_count=count,
            channel_count=channel_count, groups=groups, pixel_chunk=pixel_chunk, pixel_chunks=pixel_chunks,
            channel_chunk=channel_chunk, channel_chunks=channel_chunks, x_apart=runs.x_apart, y_apart=runs.y_apart,
            f_low=-math.inf, f_high=math.inf,
            **{"weight_channel": 4, "ranges": 0, **arguments},
        )  # fmt: skip

    def correlate(self, x: Ref, x_layout: Layout, grad: Ref, grad_layout: Layout, target: Ref,
                  product: GatherCorrelate) -> None:  # fmt: skip
        """Emit a weight gradient; see ``kernels.dense.correlate`` and ``_outer``."""
        pixels, terms, groups, outputs = product.pixels, product.terms, product.groups, product.outputs
        weight_channel, weight_group = product.weight_channel, product.weight_group
        if len(pixels) == 1 and groups == 1:
            columns, rows = [a for a, _ in terms], [grad_layout.at(c) for c in range(outputs)]
            across = [place for _, place in terms], [c * weight_channel for c in range(outputs)]
            if lanes_of(across[0]):
                self._outer(x, x_layout, columns, grad, grad_layout, list(zip(rows, across[1], strict=True)), target)
                return
            if lanes_of(across[1]):
                self._outer(grad, grad_layout, rows, x, x_layout, list(zip(columns, across[0], strict=True)), target)
                return
        pixels, blocks, lanes, runs = self.vectors(pixels, x_layout, grad_layout)
        with self.chosen(Sizes("correlate", SAMPLES, lanes, outputs, len(pixels), len(terms), groups)) as tile:
            self.emit_correlate(
                x, x_layout, grad, grad_layout, target, pixels, terms, tile, lanes=lanes, kind=SAMPLES, blocks=blocks,
                nbytes=groups * weight_group, keep=0, groups=groups, channel_count=outputs,
                x_group=product.inputs * x_layout.channel, grad_group=outputs * grad_layout.channel,
                weight_group=weight_group, weight_channel=weight_channel, area=product.area, runs=runs,
            )  # fmt: skip

    def _outer(self, a: Ref, a_layout: Layout, columns: list[int], b: Ref, b_layout: Layout, rows: list[Pair],
               target: Ref) -> None:  # fmt: skip
        """Emit ``target[row][column] = sum over samples of b[row] * a[column]``: the gradient of a layer of one pixel.

        The numbers of a row are neighbours in ``target``, so the lanes hold them and no lanes are summed: a
        gather-multiply whose terms are samples. LeNet-5's fc1 at batch 8 took 15.7 us as a gather-correlate and takes
        4.0 us so (2 threads, ``edgetrain bench --per-op``).
        """
        count, samples = len(columns), self.blocks * self.lanes
        lanes = lanes_of(list(range(0, 4 * count, 4)))
        terms = [block * b_layout.block + 4 * lane for block in range(self.blocks) for lane in range(self.lanes)]
        with self.chosen(Sizes("multiply", CHANNELS, lanes, count, len(rows), samples)) as tile:
            turned = few.turn(self, a, columns, a_layout.block, behind=tile[0])
            self.emit_multiply(
                b, target, rows, tile, kind=CHANNELS, lanes=lanes, blocks=1, groups=1, channel_count=count,
                terms=self.table(terms), term_count=samples, weight=turned.start, weight_group=0,
                weight_tile=4 * tile[0], weight_step=4 * count, bias=self.zeros(count + tile[0]), x_block=0,
                y_block=0, x_group=0, y_group=0, y_channel=4 * lanes,
            )  # fmt: skip

    def emit_correlate(self, x: Ref, x_layout: Layout, grad: Ref, grad_layout: Layout, target: Ref, pixels: list[Pair],
                       terms: list[Pair], tile: Pair, *, lanes: int, kind: int, blocks: int, groups: int,
                       channel_count: int, area: int, kernel: str = "correlate", nbytes: int = 0,
                       runs: Runs = NEIGHBOURS, **arguments: int | Ref) -> None:  # fmt: skip
        """Emit a gather-correlate, cut into jobs; ``arguments``: those of the kernel that are not sizes of jobs.

        ``nbytes``: of ``target``, to allow for parts of the batch with sums of their own.
        """
        (channels, width), count = tile, len(terms)
        apart = () if runs == NEIGHBOURS else (runs.x,)
        parts = self.parts_of_batch(x_layout.block + grad_layout.block, nbytes) if nbytes and blocks > 1 else 1
        tiles = -(-channel_count // channels)
        term_chunk = _chunk(count, -(-count // -(-_WANTED_JOBS // (parts * groups * tiles))), width)
        term_chunks = -(-count // term_chunk)
        sums = target if parts == 1 else self.workspace(parts * nbytes)
        # A tile of its own for the channels left over: a step of ResNet-20 that keeps the error maps of 11, 22 and 45
        # channels takes 1 to 2 % less (direct kernels, batch 32, two threads).
        few = channel_count % channels if kind == SAMPLES else 0
        self.emit(
            kernel, (lanes, channels, width, kind, few, *apart), parts * groups * tiles * term_chunks, x=x,
            grad_out=grad, grad_weight=sums, pixels=self.table(pixels),
            terms=self.table(terms + [terms[-1]] * (-count % width)), pixel_count=len(pixels), term_count=count,
            channel_count=channel_count, x_block=x_layout.block, grad_block=grad_layout.block,
            grad_channel=grad_layout.channel, blocks=blocks, groups=groups, pixel_chunk=-(-_PIXELS_PER_SUM // area),
            term_chunk=term_chunk, term_chunks=term_chunks, channel_tiles=tiles, parts=parts, part_bytes=nbytes,
            x_apart=runs.x_apart, **arguments,
        )  # fmt: skip
        if parts > 1:
            self.sum_parts(sums, target, parts, nbytes)

    def sum_parts(self, parts: Ref, target: Ref, count: int, nbytes: int) -> None:
        """Emit the sum of ``count`` arrays of float32 that lie one behind the other."""
        self.emit("sum_parts", (simd_lanes(),), -(-nbytes // (4 * _NUMBERS_PER_JOB)), parts=parts, target=target,
                  count=count, part_bytes=nbytes, size=nbytes // 4, chunk=_NUMBERS_PER_JOB)  # fmt: skip

    def parts_of_batch(self, block_bytes: int, sums_bytes: int) -> int:
        """Return into how many groups of blocks, each with sums of its own, a weight gradient cuts the batch.

        It does not depend on threads, as it fixes the order of summation. ``block_bytes``: that a block is read from.
        """
        if block_bytes < max(_PART_BYTES, 8 * sums_bytes):
            return 1
        return next(parts for parts in range(_MOST_PARTS, 0, -1) if self.blocks % parts == 0)

    def merge_blocks(self, pixels: list[Pair], x: Layout, y: Layout) -> tuple[list[Pair], int]:
        """Treat all blocks' pixels as one list where maps are small (a fully connected layer has one pixel)."""
        if len(pixels) >= _SMALL_MAP or self.blocks == 1:
            return pixels, self.blocks
        return [(a + b * x.block, c + b * y.block) for b in range(self.blocks) for a, c in pixels], 1

    def vectors(self, pixels: list[Pair], x: Layout, y: Layout) -> tuple[list[Pair], int, int, Runs]:
        """Return (pixels that vectors begin with, blocks, lanes of a vector, its runs), lanes holding samples.

        Where a batch fills only part of the widest vector, neighbouring pixels fill the rest: in memory they are one
        run. LeNet-5's convolutions at batch 8 took twice as long with half a vector of AVX-512 (docs/performance.md).
        Where a stride parts the pixels of ``x``, there are several runs: of a strided convolution of ResNet-20 at batch
        4 the weight gradient took 145 us with vectors of 4, the forward pass and the input gradient 140 us each, and
        they take 63, 50 and 43 us so (AVX-512, one thread; test_products.py).
        """
        pixels, blocks = self.merge_blocks(pixels, x, y)
        steps, size = steps_of(pixels, self.lanes), 4 * self.lanes
        steps = steps if steps[1] == size else (size, size)
        firsts, lanes = widened(pixels, self.lanes, simd_lanes(), steps)
        return firsts, blocks, lanes, Runs.of(lanes // self.lanes, steps, self.lanes)

    def result_vectors(
        self, pixels: list[Pair], x: Layout, y: Layout
    ) -> tuple[list[Pair], int, int, list[range], Runs]:
        """See ``vectors``, for pixels that are results; also return the places of every vector's pixels, and its runs.

        They may be written twice (``overlapping``).
        """
        pixels, blocks = self.merge_blocks(pixels, x, y)
        steps = steps_of(pixels, self.lanes)
        firsts, lanes = overlapping(pixels, self.lanes, simd_lanes(), steps)
        together = lanes // self.lanes
        places = [range(i, i + together) for i in firsts]
        return [pixels[i] for i in firsts], blocks, lanes, places, Runs.of(together, steps, self.lanes)


def _chunk(count: int, wanted: int, multiple: int) -> int:
    """Cut ``count`` into equal chunks of about ``wanted``; return a chunk's size, a multiple of ``multiple``."""
    parts = max(1, round(count / max(1, wanted)))
    return max(multiple, -(-count // (parts * multiple)) * multiple)


def _lanes_to_turn(width: int) -> int:
    """Return the lanes of the vectors by which ``width`` channels are packed; 0 if no vector fits."""
    return next((lanes for lanes in (16, 8, 4) if width % lanes == 0 and lanes <= simd_lanes()), 0)


def _runs(sources: list[int], lanes: int) -> tuple[int, list[int]]:
    """Return the length of the runs of a channel's weights, at most ``lanes``, and where each begins.

    They may overlap, so that all are equally long. There are none where neighbours are too few.
    """
    stretches: list[list[int]] = []
    for source in sorted(sources):
        if stretches and source == stretches[-1][-1] + 4:
            stretches[-1].append(source)
        else:
            stretches.append([source])
    length = len(stretches[0]) if stretches else 0
    # With 4 lanes a machine may have no loads of parts of a vector.
    if length < (2 if lanes > 4 else 4) or any(len(stretch) != length for stretch in stretches):
        return 0, []
    columns = min(length, lanes)
    firsts = [4 * min(column, length - columns) for column in range(0, length, columns)]
    return columns, [stretch[0] + first for stretch in stretches for first in firsts]
