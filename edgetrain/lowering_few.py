"""Fully connected layers of few samples: vectors run along the rows of weights, and each sample stands by itself.

Where lanes hold channels it does so anyway. Where lanes hold samples that fill a part of the widest vector, they are
put apart before (``turn_samples``) and into lanes again behind (``join_samples``): a step of LeNet-5 takes 9 % less so
at batch 4 by one thread, 5 % by two; at batch 8 2 and 3 % (AVX-512). Weights that are sparse but too dense for lists
are read by a bit each (``kernels/bits.py``) instead of from a copy with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetrain.choice import Sizes, simd_lanes
from edgetrain.graph import Node, Value
from edgetrain.kernels.codes import CHANNELS, SAMPLES
from edgetrain.lowering_core import GatherMultiply, lanes_of
from edgetrain.lowering_sparse import is_read_by_bits
from edgetrain.plan import Ref
from edgetrain.sparse_index import WORD

if TYPE_CHECKING:
    from edgetrain.arrays import Layout
    from edgetrain.lowering_products import ProductLowering
    from edgetrain.ops.conv import Product

# Vectors in registers, and samples that a tile takes at once.
ACCUMULATORS, MOST_SAMPLES = 8, 4
_ROWS_PER_JOB, _WORDS_PER_JOB, _COLUMNS_PER_JOB = 16, 4, 64  # the words are those of ``multiply_bits_back``
# Weights from which samples are put apart. LeNet-5's fc2 has 10,080: a step takes 1 to 3 % less with it (batch 4).
_APART = 8192


@dataclass(frozen=True)
class Apart:
    """Samples one behind the other: where the first is, how many there are, and bytes from one to the next."""

    start: Ref
    count: int
    block: int


def is_vector(layout: Layout) -> bool:
    """Whether a sample's maps are of one pixel."""
    return layout.rows == layout.columns == 1 and not layout.bordered


# --- sparse weights, by a bit each ---


def suits(low: ProductLowering, weight: Value, g: Product, x: Value, y: Value, gradient: bool = False) -> bool:
    """Whether a product from ``x`` to ``y``, or its weights' ``gradient``, goes by the bits of a sparse weight.

    Compact weights that two products read from lanes of samples are better written out once, for both: half of
    LeNet-5's fc1 at batch 4 in 8.3 us, by bits 11.4 (one thread).
    """
    if not is_read_by_bits(g) or not low.rows_of_bits(weight, g):
        return False
    source, out = low.layout(x), low.layout(y)
    if not is_vector(source) or not is_vector(out):
        return False
    if low.kind == SAMPLES:
        pays = gradient or not low.sparse[weight.name].compact
        return pays and low.blocks == 1 and puts_apart(g, low.lanes)
    return low.blocks <= MOST_SAMPLES and source.lanes == WORD


def forward(low: ProductLowering, node: Node, g: Product) -> None:
    """Emit ``y = weights * x + bias``."""
    weight, bias, y = node.input(1), node.optional(2), low.layout(node.y)
    x = _apart(low, node.x, g.channels_in)
    padded = -(-g.channels_out // y.lanes) * y.lanes if low.kind == CHANNELS else g.channels_out
    out, samples, groups = _beside(low, node.y, padded), *_together(x)
    low.emit(
        "multiply_bits", (WORD, samples, _compact(low, weight)), groups * -(-padded // _ROWS_PER_JOB), x=x.start,
        values=low.address(weight), y=out.start, padded=padded, x_block=x.block, y_block=out.block,
        row_chunk=_ROWS_PER_JOB, groups=groups, row_size=g.inputs, rows=g.channels_out,
        bias=low.zeros(g.channels_out) if bias is None else low.address(bias), **low.rows_of_bits(weight, g),
    )  # fmt: skip
    _join(low, out, node.y)


def input_grad(low: ProductLowering, node: Node, g: Product) -> None:
    """Emit the gradient of the input, from (grad_out, weights)."""
    weight = node.input(1)
    words = low.sparse[weight.name].row_words
    errors, out = _apart(low, node.x, g.channels_out), _beside(low, node.y, words * WORD)
    samples, groups = _together(errors)
    low.emit(
        "multiply_bits_back", (WORD, samples, _compact(low, weight)), groups * -(-words // _WORDS_PER_JOB),
        values=low.address(weight), grad_out=errors.start, grad_x=out.start, grad_block=errors.block,
        grad_x_block=out.block, groups=groups, row_size=g.inputs, rows=g.channels_out,
        **low.rows_of_bits(weight, g),
    )  # fmt: skip
    _join(low, out, node.y)


def weight_grad(low: ProductLowering, node: Node, g: Product) -> None:
    """Emit the gradients of weights in compact storage, from (x, grad_out)."""
    weight = node.get("like")
    samples, errors = _apart(low, node.x, g.channels_in), _apart(low, node.input(1), g.channels_out)
    low.emit(
        "correlate_bits", (WORD, samples.count), -(-g.channels_out // _ROWS_PER_JOB), values=low.address(node.y),
        x=samples.start, grad_out=errors.start, x_block=samples.block, grad_block=errors.block,
        row_chunk=_ROWS_PER_JOB, rows=g.channels_out, **low.rows_of_bits(weight, g),
    )  # fmt: skip


def _together(samples: Apart) -> tuple[int, int]:
    """Return how many samples a kernel takes at once, 4 or all if there are fewer, and how often. Lanes hold 4 or 8."""
    together = min(MOST_SAMPLES, samples.count)
    return together, samples.count // together


def _compact(low: ProductLowering, weight: Value) -> int:
    return int(low.sparse[weight.name].compact)


def _apart(low: ProductLowering, value: Value, channels: int) -> Apart:
    """Return where a value's samples are apart, put there if lanes hold samples.

    Vectors may be read behind the last channel: there the last is repeated.
    """
    layout = low.layout(value)
    if low.kind == CHANNELS:
        return Apart(low.address(value), low.blocks, layout.block)
    columns = [layout.at(min(channel, channels - 1)) for channel in range(-(-channels // WORD) * WORD)]
    return turn(low, low.address(value), columns)


def _beside(low: ProductLowering, value: Value, channels: int) -> Apart:
    """Return where to write a value's samples one behind the other; see ``_join``."""
    if low.kind == CHANNELS:
        return Apart(low.address(value), low.blocks, low.layout(value).block)
    return Apart(low.workspace(4 * channels * low.lanes), low.lanes, 4 * channels)


def _join(low: ProductLowering, samples: Apart, value: Value) -> None:
    """Put a value's samples into lanes, if lanes hold samples."""
    if low.kind == SAMPLES:
        layout = low.layout(value)
        join(low, samples, low.address(value), layout.channels, layout.channel, None)


# --- dense weights ---


def puts_apart(g: Product, lanes: int) -> bool:
    """Whether a fully connected layer is so large that its samples are put apart, where lanes hold so many samples."""
    return g.out == g.size == (1, 1) and g.groups == 1 and lanes < simd_lanes() and g.macs >= _APART


def multiply_apart(low: ProductLowering, x: Ref, y: Ref, y_channel: int, product: GatherMultiply) -> bool:
    """Emit a product of one pixel with its samples apart, if that fills wider vectors; return whether it does.

    See ``ProductLowering.multiply``. The lanes run along an output's weights, or along the outputs.
    """
    terms, sources, outputs = product.terms, product.sources, product.outputs
    weight, weight_channel = product.weight, product.weight_channel
    single = len(product.pixels) == product.groups == low.blocks == 1
    narrow = low.kind == SAMPLES and single and low.lanes < simd_lanes()
    if not narrow or len(terms) * outputs < _APART:
        return False
    along, step = lanes_of(sources), sources[1] - sources[0] if len(sources) > 1 else 4
    across = weight_channel == 4 and sources == list(range(0, step * len(sources), step))
    if along <= low.lanes and not across:
        return False
    ((x_pixel, y_pixel),) = product.pixels
    samples = turn(low, x + x_pixel, terms)
    if along > low.lanes:
        sums = Apart(low.workspace(4 * outputs * low.lanes), low.lanes, 4 * outputs)
        rows_times_samples(low, samples, sums, along, len(terms), weight, weight_channel, outputs)
    else:
        sums = _outputs_in_lanes(low, samples, len(terms), weight, step, outputs)
    join(low, sums, y + y_pixel, outputs, y_channel, product.bias)
    return True


def _outputs_in_lanes(low: ProductLowering, samples: Apart, terms: int, weight: Ref, step: int, outputs: int) -> Apart:
    """Emit a gather-multiply whose pixels are samples and whose lanes hold outputs; return where those are apart.

    ``step``: bytes from the weights of a term to those of the next. Vectors are stored whole.
    """
    lanes = simd_lanes()
    row = 4 * -(-outputs // lanes) * lanes
    sums = Apart(low.workspace(row * samples.count), samples.count, row)
    rows = [(sample * samples.block, sample * row) for sample in range(samples.count)]
    with low.chosen(Sizes("multiply", CHANNELS, lanes, outputs, samples.count, terms)) as tile:
        low.emit_multiply(
            samples.start, sums.start, rows, tile, kind=CHANNELS, lanes=lanes, blocks=1, groups=1,
            channel_count=outputs, terms=low.table(range(0, 4 * terms, 4)), term_count=terms, weight=weight,
            weight_group=0, weight_tile=4 * tile[0], weight_step=step, bias=low.zeros(outputs + tile[0]), x_block=0,
            y_block=0, x_group=0, y_group=0, y_channel=4 * lanes,
        )  # fmt: skip
    return sums


def rows_times_samples(low: ProductLowering, x: Apart, y: Apart, lanes: int, inputs: int, weight: Ref,
                       weight_channel: int, outputs: int) -> None:  # fmt: skip
    """Emit a fully connected layer without bias: the lanes run along an output's weights, which lie side by side.

    That is a gather-correlate whose output gradient are the weights, and whose terms are the samples. The weights
    are read once and not packed: LeNet-5's fc1 at batch 1 took 17.3 us with packing, and takes 2.4 so (one thread).
    """
    width = min(x.count, MOST_SAMPLES)
    channels = ACCUMULATORS // width
    tiles, chunks = -(-outputs // channels), -(-x.count // width)
    samples = [(sample * x.block, sample * y.block) for sample in range(x.count)]
    vectors = [(place, place) for place in range(0, 4 * inputs, 4 * lanes)]
    low.emit(
        "correlate", (lanes, channels, width, SAMPLES, 0), tiles * chunks, x=x.start, grad_out=weight,
        grad_weight=y.start, pixels=low.table(vectors), terms=low.table(samples + samples[-1:] * (-x.count % width)),
        pixel_count=len(vectors), term_count=x.count, channel_count=outputs, x_block=0, grad_block=0, x_group=0,
        grad_group=0, weight_group=0, grad_channel=weight_channel, weight_channel=4, blocks=1, groups=1,
        pixel_chunk=len(vectors), term_chunk=width, term_chunks=chunks, channel_tiles=tiles, parts=1, part_bytes=0,
        keep=0, x_apart=0,
    )  # fmt: skip


# --- samples put apart and into lanes ---


def turn(low: ProductLowering, x: Ref, columns: list[int], x_block: int = 0, behind: int = 0) -> Apart:
    """Put samples apart, those of all lanes: the pixels at ``columns``, byte offsets, in this order.

    ``x_block``: bytes between blocks of samples; ``behind``: numbers that may be read behind the last.
    """
    count, samples = len(columns), low.blocks * low.lanes
    turned = low.workspace(4 * (samples * count + behind))
    low.emit(
        "turn_samples", (low.lanes,), low.blocks * -(-count // _COLUMNS_PER_JOB), x=x, y=turned,
        columns=low.table(columns), count=count, chunk=_COLUMNS_PER_JOB, x_block=x_block,
    )  # fmt: skip
    return Apart(turned, samples, 4 * count)


def join(low: ProductLowering, x: Apart, y: Ref, channels: int, y_channel: int, bias: Ref | None) -> None:
    """Put samples that are apart into lanes, a bias added to each."""
    low.emit(
        "join_samples", (low.lanes,), -(-channels // _COLUMNS_PER_JOB), x=x.start, y=y,
        bias=low.zeros(channels) if bias is None else bias, count=channels, chunk=_COLUMNS_PER_JOB, x_sample=x.block,
        y_channel=y_channel,
    )  # fmt: skip
