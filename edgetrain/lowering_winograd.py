"""3x3 convolutions of stride 1 by Winograd's minimal filtering; see ``kernels/winograd.py``.

Forward and input gradient are one kernel: a slot of scratch memory per thread, each taking an equal share of the tiles.
The weight gradient is four: transform input and output gradient, 36 products of matrices (the gather-correlate of
``kernels/dense.py`` with the positions as groups), transform back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgetrain.arrays import Layout
from edgetrain.choice import fuller, simd_lanes, target, winograd_cuts, winograd_tile
from edgetrain.graph import Node, Value
from edgetrain.kernels.codes import SAMPLES
from edgetrain.lowering_core import widened
from edgetrain.plan import Ref

if TYPE_CHECKING:
    from edgetrain.lowering_core import LoweringCore
    from edgetrain.lowering_products import ProductLowering
    from edgetrain.ops.conv import Product

_TILE, _POSITIONS = 4, 36
# Transformed input and output gradients of one part of the batch: more would leave the cache. 2.5 MiB measured best of
# 1.2, 2.5 and 5 MiB on three layers of ResNet-20 at batch 32; of one part of each group of blocks, 1.2 MiB of 0.6, 1.2,
# 2.5, 3.5 and 5: a step takes 0.93 times as long as without groups, with 2.5 MiB 0.95 (two threads, Intel).
_PART_BYTES, _GROUPS_BYTES = 5 << 19, 5 << 18
# Tile of the products of a weight gradient where four output channels at a time compute many that do not exist: of
# ResNet-20's 16, 32 and 64 channels 30 % are 5, 10 and 19.
_ODD = (5, 4)
# A direct product must need so many times the multiplications and transforms that Winograd needs.
_GAIN = 1.4


def suits(low: LoweringCore, g: Product, size: tuple[int, int]) -> bool:
    """Whether a product over output maps of ``size`` is computed so: lanes hold samples, and it ``pays``."""
    return low.kind == SAMPLES and pays(g, size)


def pays(g: Product, size: tuple[int, int]) -> bool:
    """Whether a product over output maps of ``size`` is worth it: whole tiles, enough channels."""
    simple = g.kernel == (3, 3) and g.strides == g.dilations == (1, 1) and g.groups == 1
    if not simple or size[0] % _TILE or size[1] % _TILE or g.inputs % 4:
        return False
    products = g.inputs * g.outputs
    # Instructions per tile: 144 for the data of a channel, 100 for an output; as many loads and stores again.
    return _GAIN * (_POSITIONS * products + 220 * g.inputs + 150 * g.outputs) < 9 * _TILE**2 * products


@dataclass(frozen=True)
class _Filter:
    """A product as seen from its result: input channels, output channels, where the weights' numbers are."""

    inputs: int
    outputs: int
    weight_in: int
    weight_out: int
    tap: int
    tap_step: int


def forward(low: ProductLowering, node: Node, g: Product) -> None:
    """Emit a convolution."""
    start, bias = _start(g, low.layout(node.x)), node.optional(2)
    taps = _Filter(g.inputs, g.outputs, g.weight_in, g.weight_out, 0, g.weight_tap)
    weight = low.dense_weight(node.input(1), g)
    _emit(low, node.x, start, node.y, taps, weight, low.address(bias) if bias is not None else None)


def input_grad(low: ProductLowering, node: Node, g: Product, kept: Ref | None = None) -> None:
    """Emit the gradient of a convolution's input: the convolution of the output gradient with flipped kernels.

    ``kept``: where the numbers (float32) of the output channels that count are; ``g`` has so many.
    """
    start = _flipped_start(g, low.layout(node.x))
    taps = _Filter(g.outputs, g.inputs, g.weight_out, g.weight_in, 8 * g.weight_tap, -g.weight_tap)
    _emit(low, node.x, start, node.y, taps, low.dense_weight(node.input(1), g), None, kept)


def _start(g: Product, x: Layout) -> int:
    """Return where the inputs begin that the first output meets, in bytes from the first one."""
    return -g.pads[0] * x.row - g.pads[1] * x.pixel


def _flipped_start(g: Product, grad: Layout) -> int:
    """Return where the output gradients begin that the first input meets, in bytes from the first one."""
    return (g.pads[0] - 2) * grad.row + (g.pads[1] - 2) * grad.pixel


def _emit(
    low: LoweringCore, x: Value, start: int, y: Value, f: _Filter, weight: Ref, bias: Ref | None,
    kept: Ref | None = None,
) -> None:  # fmt: skip
    source, out, size = low.layout(x), low.layout(y), 4 * low.lanes
    rows, columns = out.rows // _TILE, out.columns // _TILE
    chunk, wide, (channels, width) = winograd_tile(rows * columns, low.blocks, low.threads, low.lanes)
    tiles = -(-f.outputs // channels)
    cuts = winograd_cuts(low.blocks * rows * columns // chunk, tiles, low.threads)
    slots = min(low.threads, low.blocks * rows * columns // chunk * cuts)
    packed_position = _apart(4 * tiles * channels * f.inputs)
    v, m = _apart(f.inputs * chunk * size), _apart(tiles * channels * chunk * size)
    packed, scratch = low.workspace(_POSITIONS * packed_position), low.workspace(slots * _POSITIONS * (v + m))
    low.emit(
        "winograd_weights", (channels,), tiles, weight=weight, packed=packed, listed=kept or 0,
        inputs=f.inputs, outputs=f.outputs, weight_in=f.weight_in, weight_out=f.weight_out, tap=f.tap,
        tap_step=f.tap_step, packed_position=packed_position,
    )  # fmt: skip
    low.emit(
        "winograd", (low.lanes, wide, channels, width, cuts), slots, x=low.address(x) + start, y=low.address(y),
        packed=packed, bias=bias or low.zeros(f.outputs), listed=kept or 0, scratch=scratch,
        scratch_bytes=_POSITIONS * (v + m), slots=slots, blocks=low.blocks, tile_rows=rows, tile_columns=columns,
        inputs=f.inputs, outputs=f.outputs, chunk=chunk, x_block=source.block, x_channel=source.channel,
        x_row=source.row, y_block=out.block, y_channel=out.channel, y_row=out.row, packed_position=packed_position,
        v_position=v, m_position=m,
    )  # fmt: skip


@dataclass(frozen=True)
class _Part:
    """What is transformed at a time: whole blocks, or rows of tiles of one block, or of one block of each group."""

    block: int
    blocks: int
    row: int
    rows: int


def weight_grad(low: ProductLowering, node: Node, g: Product, target: Ref, kept: Ref | None = None) -> None:
    """Emit the gradient of a convolution's weights, part by part of the batch; ``kept`` as for ``input_grad``.

    Where sums are small beside what is summed, every group of blocks has its own, for threads that keep to their
    blocks. The tiles of one of the operands overlap, 36 numbers for 16: those of the output gradient where it has the
    border, which gives the gradient of flipped kernels. It was written last, so it is in the cache, and less of it is
    left where error maps are pruned: a step of ResNet-20 takes 0.98 times as long as with overlapping tiles of the
    input, with 0.3 of the error maps 0.96 (batch 32, one and two threads).
    """
    x, grad, size = low.layout(node.x), low.layout(node.input(1)), 4 * low.lanes
    rows, columns = g.out[0] // _TILE, g.out[1] // _TILE
    position = 4 * g.inputs * g.outputs
    row_bytes = _POSITIONS * columns * size * (g.inputs + g.outputs)
    groups = low.parts_of_batch(rows * row_bytes, _POSITIONS * position)
    parts = _parts(low.blocks // groups, groups, rows, row_bytes)
    most = max(part.blocks * part.rows for part in parts) * columns
    channel = _apart(most * size)
    v_position, z_position = _apart(g.inputs * channel), _apart(g.outputs * channel)
    v, z = (low.workspace(groups * _POSITIONS * bytes_) for bytes_ in (v_position, z_position))
    sums = low.workspace(groups * _POSITIONS * position)
    x_start, grad_start, flipped = low.address(node.x), low.address(node.input(1)), _can_flip(low, g, node.input(1))
    if flipped:
        grad_start = grad_start + _flipped_start(g, grad)
    else:
        x_start = x_start + _start(g, x)
    for number, part in enumerate(parts):
        _transform(low, int(flipped), x_start, x, part, groups, columns, v, channel, v_position, g.inputs,
                   None)  # fmt: skip
        _transform(low, int(not flipped), grad_start, grad, part, groups, columns, z, channel, z_position, g.outputs,
                   kept)  # fmt: skip
        _correlate(low, g, v, z, sums, part.blocks * part.rows * columns, (channel, v_position, z_position), groups,
                   keep=int(number > 0))  # fmt: skip
    columns = next(n for n in (16, 8, 4) if n <= simd_lanes() and g.inputs % n == 0)
    low.emit(
        "winograd_weight_gradient", (columns, int(flipped)), g.outputs, sums=sums, grad_weight=target,
        listed=kept or 0, parts=groups, inputs=g.inputs, sums_part=_POSITIONS * position, sums_position=position,
        weight_out=g.weight_out,
    )  # fmt: skip


def _can_flip(low: LoweringCore, g: Product, grad: Value) -> bool:
    """Whether the tiles of the output gradient can overlap: no tile is cut off, and the zeros around it are there."""
    border = low.zeros_around(grad)
    return g.size == g.out and all(has >= wants for has, wants in zip(border, g.grad_border, strict=True))


def _parts(blocks: int, groups: int, rows: int, row_bytes: int) -> list[_Part]:
    """Cut each group's ``blocks`` so that a part of all of them takes ``_PART_BYTES``, or ``_GROUPS_BYTES``."""
    together = _PART_BYTES // (rows * row_bytes)
    if together and groups == 1:
        return [_Part(b, min(together, blocks - b), 0, rows) for b in range(0, blocks, together)]
    some = max(1, (_PART_BYTES if groups == 1 else _GROUPS_BYTES) // (groups * row_bytes))
    return [_Part(b, 1, r, min(some, rows - r)) for b in range(blocks) for r in range(0, rows, some)]


def _transform(
    low: LoweringCore, gradient: int, x: Ref, layout: Layout, part: _Part, groups: int, columns: int, v: Ref,
    channel: int, position: int, channels: int, kept: Ref | None,
) -> None:  # fmt: skip
    """Emit the transforms of a part's tiles."""
    together = {"x_block": layout.block, "v_block": part.rows * columns * 4 * low.lanes}
    apart = {"x_block": low.blocks // groups * layout.block, "v_block": _POSITIONS * position}
    low.emit(
        "winograd_transform", (low.lanes, gradient), groups * part.blocks * channels, v=v, listed=kept or 0,
        channels=channels, tile_rows=part.rows, tile_columns=columns,
        x=x + part.block * layout.block + _TILE * part.row * layout.row, x_channel=layout.channel, x_row=layout.row,
        v_channel=channel, v_position=position, **(together if groups == 1 else apart),
    )  # fmt: skip


def _correlate(
    low: LoweringCore, g: Product, v: Ref, z: Ref, sums: Ref, tiles: int, strides: tuple[int, int, int], groups: int,
    keep: int,
) -> None:  # fmt: skip
    """Emit ``sums[group][position][o][c] = sum over tiles and lanes of z[position][o] * v[position][c]``."""
    (channel, v_position, z_position), size = strides, 4 * low.lanes
    rows, width = fuller(g.outputs, (4, 4), _ODD if target().registers > 16 else None)
    vectors, lanes = widened([(t * size, t * size) for t in range(tiles)], low.lanes, simd_lanes())
    tiles_of_channels = -(-g.outputs // rows)
    low.emit(
        "correlate", (lanes, rows, width, SAMPLES, g.outputs % rows), groups * _POSITIONS * tiles_of_channels, x=v,
        grad_out=z, grad_weight=sums, pixels=low.table(vectors), pixel_count=len(vectors),
        terms=low.table([(c * channel, 4 * c) for c in range(g.inputs)]), term_count=g.inputs,
        channel_count=g.outputs, x_block=_POSITIONS * v_position, grad_block=_POSITIONS * z_position,
        x_group=v_position, grad_group=z_position, weight_group=4 * g.inputs * g.outputs, grad_channel=channel,
        weight_channel=4 * g.inputs, blocks=groups, groups=_POSITIONS, pixel_chunk=len(vectors), term_chunk=g.inputs,
        term_chunks=1, channel_tiles=tiles_of_channels, parts=groups, part_bytes=_POSITIONS * 4 * g.inputs * g.outputs,
        keep=keep, x_apart=0,
    )  # fmt: skip


def _apart(nbytes: int) -> int:
    """Return a stride of at least ``nbytes`` whose multiples fall into different sets of the first-level cache."""
    return nbytes + 64 if nbytes % 1024 == 0 else nbytes
