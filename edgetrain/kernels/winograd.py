"""3x3 convolutions of stride 1 by Winograd's F(4x4, 3x3): 36 multiplications for 16 outputs instead of 144.

See ``winograd_tiles`` for the mathematics. A tile is 4 x 4 pixels of the output; its 36 transformed numbers (6 x 6
*positions*) lie apart by ``..._position`` bytes. Sizes are multiples of 4 pixels: there are no partial tiles.
Largest errors, relative to the largest output: 5e-6 to 1e-5, ten times those of the direct kernel.
"""

from __future__ import annotations

from typing import Any

from numba import njit

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import arguments, load_f32
from edgetrain.kernels.winograd_tiles import (
    product_tile,
    transform_data,
    transform_gradient,
    transform_output,
    transform_weight_gradient,
    transform_weights,
)


@njit
def _channel(listed: Any, i: Any) -> Any:
    """Return the number of channel ``i`` of a list (float32), or ``i`` itself when there is no list (address 0)."""
    return i if listed == 0 else int(load_f32(listed + 4 * i))


@kernel(
    "weight", "packed", "listed", "inputs", "outputs", "weight_in", "weight_out", "tap", "tap_step", "packed_position",
)  # fmt: skip
def winograd_weights(channels: int) -> Body:
    """Write ``G g G^T`` of all kernels to ``[position][tile of outputs][input][channels]``.

    Job: a tile of output channels. ``tap``, ``tap_step``: byte offset of a kernel's first number and bytes to the next,
    backwards for an input gradient. ``listed``: numbers of the input channels, or 0 for all.
    """

    def body(args: int, first: int, last: int) -> None:
        (weight, packed, listed, inputs, outputs, weight_in, weight_out, tap, tap_step,
         packed_position) = arguments(args, 10)  # fmt: skip
        for job in range(first, last):
            source, target = weight + job * channels * weight_out, packed + 4 * job * channels * inputs
            for c in range(inputs):
                transform_weights(
                    source + _channel(listed, c) * weight_in, weight_out, outputs - job * channels, tap, tap_step,
                    target + 4 * c * channels, packed_position, channels,
                )  # fmt: skip

    return body


@kernel(
    "x", "y", "packed", "bias", "listed", "scratch", "scratch_bytes", "slots", "blocks", "tile_rows", "tile_columns",
    "inputs", "outputs", "chunk", "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row", "packed_position",
    "v_position", "m_position",
)  # fmt: skip
def winograd(lanes: int, wide: int, channels: int, width: int, cuts: int) -> Body:
    """Write ``y = bias + weights * x``: transform a chunk of tiles, 36 products of matrices, transform back.

    Job: a slot of ``scratch``, with an equal share of all (block, chunk of ``chunk`` tiles, one of ``cuts`` parts of
    the output channels). A chunk's numbers stay in the second-level cache. Positions must not lie a multiple of 4 KiB
    apart: writing 36 lines of one cache set made the kernel take 1.2 to 1.6 times as long
    (``lowering_winograd._apart``).
    The products run on vectors of ``wide`` lanes: neighbouring tiles together where samples do not fill a vector.
    ``listed``: numbers of the input channels, or 0 for all. ``cuts`` is known to the compiler: as an argument it made
    the forward pass of ResNet-20 at batch 32 take 5.1 ms in these kernels, not 4.4 (one thread).
    """
    size, run = 4 * lanes, 4 * wide * width

    def body(args: int, first: int, last: int) -> None:
        (x, y, packed, bias, listed, scratch, scratch_bytes, slots, blocks, tile_rows, tile_columns, inputs, outputs,
         chunk, x_block, x_channel, x_row, y_block, y_channel, y_row, packed_position, v_position,
         m_position) = arguments(args, 23)  # fmt: skip
        chunks, tiles = tile_rows * tile_columns // chunk, (outputs + channels - 1) // channels
        total, step = blocks * chunks * cuts, chunk * size
        for job in range(first, last):
            v = scratch + job * scratch_bytes
            m = v + 36 * v_position
            begin, end = total * job // slots, total * (job + 1) // slots
            for part in range(begin // cuts, (end + cuts - 1) // cuts):
                block, start = part // chunks, part % chunks * chunk
                low, high = 0, outputs
                if cuts > 1:
                    first_cut, last_cut = max(0, begin - part * cuts), min(cuts, end - part * cuts)
                    low, high = tiles * first_cut // cuts * channels, min(outputs, tiles * last_cut // cuts * channels)
                for c in range(inputs):
                    source = x + block * x_block + _channel(listed, c) * x_channel
                    for t in range(chunk):
                        row, column = (start + t) // tile_columns, (start + t) % tile_columns
                        transform_data(
                            source + 4 * (row * x_row + column * size), x_row, size, v + c * step + t * size,
                            6 * v_position, v_position, lanes,
                        )  # fmt: skip
                for p in range(36):
                    for o in range(low, high, channels):
                        for t in range(0, step, run):
                            product_tile(
                                v + p * v_position + t, step, packed + p * packed_position + 4 * o * inputs,
                                4 * channels, m + p * m_position + o * step + t, step, inputs, channels, width, wide,
                            )  # fmt: skip
                for o in range(low, high):
                    target, shift = y + block * y_block + o * y_channel, load_f32(bias + 4 * o)
                    for t in range(chunk):
                        row, column = (start + t) // tile_columns, (start + t) % tile_columns
                        transform_output(
                            m + o * step + t * size, 6 * m_position, m_position,
                            target + 4 * (row * y_row + column * size), y_row, size, shift, lanes,
                        )  # fmt: skip

    return body


@kernel(
    "x", "v", "listed", "channels", "tile_rows", "tile_columns", "x_block", "x_channel", "x_row", "v_block",
    "v_channel", "v_position",
)  # fmt: skip
def winograd_transform(lanes: int, gradient: int) -> Body:
    """Write ``B^T d B`` of every tile to ``[position][channel][block][tile]``, or ``A dY A^T`` of a ``gradient``.

    Job: (block, channel).
    """
    size, transform = 4 * lanes, transform_gradient if gradient else transform_data

    def body(args: int, first: int, last: int) -> None:
        (x, v, listed, channels, tile_rows, tile_columns, x_block, x_channel, x_row, v_block, v_channel,
         v_position) = arguments(args, 12)  # fmt: skip
        for job in range(first, last):
            block, c = job // channels, job % channels
            source = x + block * x_block + _channel(listed, c) * x_channel
            target = v + block * v_block + c * v_channel
            for row in range(tile_rows):
                for column in range(tile_columns):
                    transform(
                        source + 4 * (row * x_row + column * size), x_row, size,
                        target + (row * tile_columns + column) * size, 6 * v_position, v_position, lanes,
                    )  # fmt: skip

    return body


@kernel("sums", "grad_weight", "listed", "parts", "inputs", "sums_part", "sums_position", "weight_out")
def winograd_weight_gradient(columns: int, flipped: int) -> Body:
    """Write ``G^T q G``, q the sum of ``parts`` arrays ``[position][output][input]``. Job: an output channel.

    The kernels of ``columns`` input channels are made together; ``inputs`` is a multiple. They are written backwards
    where ``flipped``. ``listed``: numbers of the output channels, or 0 for all.
    """

    def body(args: int, first: int, last: int) -> None:
        sums, grad_weight, listed, parts, inputs, sums_part, sums_position, weight_out = arguments(args, 8)
        for o in range(first, last):
            for c in range(0, inputs, columns):
                transform_weight_gradient(
                    sums + 4 * (o * inputs + c), sums_position, parts, sums_part,
                    grad_weight + _channel(listed, o) * weight_out + 36 * c, columns, flipped,
                )  # fmt: skip

    return body
