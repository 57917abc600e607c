"""Products of training with dense weights: one gather-multiply and one gather-correlate.

Convolution of any stride, dilation, padding and group, its input gradient (one
call per phase of the stride), fully connected layers and their gradients are all
the same two loops; only the offset tables differ (see ``ops/conv.py``). On the
x86 machine of docs/performance.md these reach the rate of the BLAS sgemm, and a
3x3 kernel with unrolled taps was not faster, so there is no special case.
"""

from __future__ import annotations

from edgetrain.kernels.codes import ROWS, SAMPLES
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import arguments, load, load_f32, load_i64, store, store_f32
from edgetrain.kernels.tiles import correlate_tile, multiply_tile
from edgetrain.kernels.turning import pack_run

# pixels: table of int64 pairs (input, output byte offset); terms: table of int64 byte offsets; ranges: table of int64
# pairs (first term, behind the last), one for every ``width`` pixels, or 0 if all have all terms.


@kernel(
    "x", "y", "weight", "bias", "pixels", "terms", "ranges", "pixel_count", "term_count", "channel_count",
    "x_block", "y_block", "x_group", "y_group", "weight_group", "weight_tile", "weight_step", "weight_channel",
    "y_channel", "groups", "pixel_chunk", "pixel_chunks", "channel_chunk", "channel_chunks", "x_apart", "y_apart",
    "f_low", "f_high",
)  # fmt: skip
def multiply(lanes: int, channels: int, width: int, kind: int, x_runs: int = 1, y_runs: int = 1) -> Body:
    """Write ``y[block][c][p] = clip(bias[c] + sum_k weight[k][c] * x[block][p + term k], low, high)``.

    Job: (block, group, chunk of pixels, chunk of channels). ``weight_group``, ``weight_tile``,
    ``weight_step``: bytes between the weights of groups, of tiles of ``channels`` channels, of
    terms; those of a tile's channels are neighbours, or ``weight_channel`` apart (``ROWS``). ``pixels`` holds
    whole multiples of ``width`` pairs (the last pixel repeated). ``kind``: what the lanes hold, see ``codes``.
    ``x_runs``, ``y_runs``: in how many runs a vector lies, ``x_apart`` and ``y_apart`` bytes, where a stride parts the
    pixels that fill it.
    """
    step = 1 if kind in (SAMPLES, ROWS) else lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, weight, bias, pixels, terms, ranges, pixel_count, term_count, channel_count, x_block, y_block, x_group,
         y_group, weight_group, weight_tile, weight_step, weight_channel, y_channel, groups, pixel_chunk, pixel_chunks,
         channel_chunk, channel_chunks, x_apart, y_apart) = arguments(args, 26)  # fmt: skip
        low, high = load_f32(args + 208), load_f32(args + 216)
        for job in range(first, last):
            chunk_c = job % channel_chunks
            rest = job // channel_chunks
            chunk_p = rest % pixel_chunks
            rest = rest // pixel_chunks
            group = rest % groups
            block = rest // groups
            source = x + block * x_block + group * x_group
            target = y + block * y_block + group * y_group
            packed = weight + group * weight_group
            biases = bias + 4 * group * channel_count
            last_pixel = min(pixel_count, (chunk_p + 1) * pixel_chunk)
            last_channel = min(channel_count, (chunk_c + 1) * channel_chunk)
            for c in range(chunk_c * channel_chunk, last_channel, channels):
                for p in range(chunk_p * pixel_chunk, last_pixel, width):
                    first_term, last_term = 0, term_count
                    if ranges != 0:
                        first_term = load_i64(ranges + 16 * (p // width))
                        last_term = load_i64(ranges + 16 * (p // width) + 8)
                    weights = packed + c // channels * weight_tile + first_term * weight_step
                    multiply_tile(
                        source, target + c // step * y_channel, weights, weight_step,
                        weight_channel, biases + 4 * c, pixels + 16 * p, terms + 8 * first_term, last_term - first_term,
                        y_channel, channel_count - c, x_apart, y_apart, low, high, channels, width, lanes, kind,
                        x_runs, y_runs,
                    )  # fmt: skip

    return body


@kernel(
    "x", "grad_out", "grad_weight", "pixels", "terms", "pixel_count", "term_count", "channel_count",
    "x_block", "grad_block", "x_group", "grad_group", "weight_group", "grad_channel", "weight_channel",
    "blocks", "groups", "pixel_chunk", "term_chunk", "term_chunks", "channel_tiles", "parts", "part_bytes", "keep",
    "x_apart",
)  # fmt: skip
def correlate(lanes: int, channels: int, width: int, kind: int, few: int, x_runs: int = 1) -> Body:
    """Write ``grad_weight[c][k] = sum over blocks, pixels, lanes of grad_out[c][p] * x[p + term k]``.

    Job: (part of the blocks, group, tile of channels, chunk of terms). Each of ``parts`` has a ``grad_weight`` of its
    own, ``part_bytes`` apart, and adds to what it holds if ``keep``. ``terms`` holds int64 pairs (input offset, offset
    in ``grad_weight``), padded to a whole multiple of ``width``.
    Pixels are taken in chunks, so that the channels of ``grad_out`` stay in the first-level cache, and a chunk for all
    jobs, so that the input comes from memory once: where the first convolution of stride 2 in ResNet-20 read it again
    for every tile of channels, its weight gradient took 0.51 ms instead of 0.41, a step of DS-CNN 7 % longer.
    ``kind``: what the lanes hold, see ``codes``. ``few``: channels of a last tile that is not full, or 0 to compute
    what does not exist, too. ``x_runs``, ``x_apart``: as for ``multiply``.
    """
    step, fewer = 1 if kind == SAMPLES else lanes, few or channels

    def body(args: int, first: int, last: int) -> None:
        (x, grad_out, grad_weight, pixels, terms, pixel_count, term_count, channel_count, x_block, grad_block, x_group,
         grad_group, weight_group, grad_channel, weight_channel, blocks, groups, pixel_chunk, term_chunk, term_chunks,
         channel_tiles, parts, part_bytes, keep, x_apart) = arguments(args, 25)  # fmt: skip
        jobs = groups * channel_tiles * term_chunks
        for part in range(first // jobs, (last - 1) // jobs + 1):
            begin, own = part * blocks // parts, grad_weight + part * part_bytes
            for block in range(begin, (part + 1) * blocks // parts):
                for p in range(0, pixel_count, pixel_chunk):
                    count = min(pixel_chunk, pixel_count - p)
                    for job in range(max(0, first - part * jobs), min(jobs, last - part * jobs)):
                        chunk_k = job % term_chunks
                        rest = job // term_chunks
                        c = (rest % channel_tiles) * channels
                        group = rest // channel_tiles
                        source = x + block * x_block + group * x_group
                        grad = grad_out + block * grad_block + group * grad_group + c // step * grad_channel
                        target = own + group * weight_group + c * weight_channel
                        rows, end = min(channels, channel_count - c), min(term_count, (chunk_k + 1) * term_chunk)
                        for k in range(chunk_k * term_chunk, end, width):
                            if rows == few:
                                correlate_tile(
                                    source, grad, target, pixels + 16 * p, terms + 16 * k, count, grad_channel,
                                    weight_channel, rows, end - k, keep + block - begin + p, x_apart, fewer, width,
                                    lanes, kind, x_runs,
                                )  # fmt: skip
                            else:
                                correlate_tile(
                                    source, grad, target, pixels + 16 * p, terms + 16 * k, count, grad_channel,
                                    weight_channel, rows, end - k, keep + block - begin + p, x_apart, channels, width,
                                    lanes, kind, x_runs,
                                )  # fmt: skip

    return body


@kernel(
    "weight", "packed", "sources", "term_count", "channel_count", "group_bytes", "packed_group", "channel_bytes",
    "tiles", "groups",
)  # fmt: skip
def pack_weights(channels: int) -> Body:
    """Copy weights to ``[group][tile][k][channels]``; channels that do not exist become 0.

    Job: (group, tile). ``sources``: table of ``term_count`` int64 byte offsets, those of term k for channel 0.
    """

    def body(args: int, first: int, last: int) -> None:
        (weight, packed, sources, term_count, channel_count, group_bytes, packed_group, channel_bytes,
         tiles, _groups) = arguments(args, 10)  # fmt: skip
        for job in range(first, last):
            group, tile = job // tiles, job % tiles
            source = weight + group * group_bytes + tile * channels * channel_bytes
            target = packed + group * packed_group + tile * term_count * 4 * channels
            rows = min(channels, channel_count - tile * channels)
            for k in range(term_count):
                offset = load_i64(sources + 8 * k)
                for c in range(rows):
                    store_f32(target + 4 * (k * channels + c), load_f32(source + offset + c * channel_bytes))
                for c in range(rows, channels):
                    store_f32(target + 4 * (k * channels + c), 0.0)

    return body


@kernel(
    "weight", "packed", "runs", "places", "run_count", "run_chunk", "run_chunks", "group_bytes", "packed_group",
    "tile_bytes", "channel_bytes", "tiles", "groups",
)  # fmt: skip
def pack_runs(lanes: int, channels: int, columns: int) -> Body:
    """Do as ``pack_weights`` where a channel's weights lie side by side in runs of ``columns``, and all channels exist.

    Job: (group, tile, chunk of runs). ``runs``: table of int64 byte offsets of the runs of channel 0; ``places``: of
    the byte offsets in a tile where their ``columns`` weights belong.
    """

    def body(args: int, first: int, last: int) -> None:
        (weight, packed, runs, places, run_count, run_chunk, run_chunks, group_bytes, packed_group, tile_bytes,
         channel_bytes, tiles, _groups) = arguments(args, 13)  # fmt: skip
        for job in range(first, last):
            chunk, rest = job % run_chunks, job // run_chunks
            tile, group = rest % tiles, rest // tiles
            source = weight + group * group_bytes + tile * channels * channel_bytes
            target = packed + group * packed_group + tile * tile_bytes
            for run in range(chunk * run_chunk, min(run_count, (chunk + 1) * run_chunk)):
                start = source + load_i64(runs + 8 * run)
                for c in range(0, channels, lanes):
                    pack_run(start + c * channel_bytes, channel_bytes, target + 4 * c, places + 8 * columns * run,
                             columns, lanes)  # fmt: skip

    return body


@kernel("parts", "target", "count", "part_bytes", "size", "chunk")
def sum_parts(lanes: int) -> Body:
    """Write the sum of ``count`` arrays of ``size`` float32, ``part_bytes`` apart. Job: ``chunk`` numbers."""

    def body(args: int, first: int, last: int) -> None:
        parts, target, count, part_bytes, size, chunk = arguments(args, 6)
        begin, end = first * chunk, min(size, last * chunk)
        for i in range(begin, end - lanes + 1, lanes):
            sums = load(parts + 4 * i, lanes)
            for part in range(1, count):
                sums = sums + load(parts + part * part_bytes + 4 * i, lanes)
            store(target + 4 * i, sums)
        for i in range(end - (end - begin) % lanes, end):
            total = load_f32(parts + 4 * i)
            for part in range(1, count):
                total += load_f32(parts + part * part_bytes + 4 * i)
            store_f32(target + 4 * i, total)

    return body
