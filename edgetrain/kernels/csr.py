"""Products of training with sparse weights: lists of non-zeros by output channel, or by input channel.

When a ``SparseIndex`` has changed, its rows are expanded to byte offsets for the layout at hand; then every product of
every step is one pass over a list for each tile of pixels. Tiles are the outer loop and channels the inner one, so that
the tile's part of the input stays in the cache.

A list may be cut into *parts* by column, so that the channels that one part reads fit the first-level cache.
"""

from __future__ import annotations

from edgetrain.kernels.codes import ABSENT, ALL_COUNT, FLAGGED_COLUMNS, FLAGGED_ROWS
from edgetrain.kernels.csr_tiles import csr_correlate_tile, csr_gradients_tile, csr_multiply_tile
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    load,
    load_f32,
    load_i32,
    load_i64,
    store_f32,
    store_i32,
    sum_lanes,
)

# bounds: int32 pairs [part][row], the first entry and the one behind the last; offsets, weight: see ``csr_tiles``;
# order: int32, where in the weight's storage the weight of each entry is.


@kernel("kept", "kept_count", "channels", "flags")
def channel_flags() -> Body:
    """Write an int32 per channel: 1 for those whose numbers (float32, ascending) ``kept`` holds, else 0. One job."""

    def body(args: int, first: int, last: int) -> None:
        kept, kept_count, channels, flags = arguments(args, 4)
        at = 0
        for channel in range(channels):
            found = at < kept_count and int(load_f32(kept + 4 * at)) == channel
            store_i32(flags + 4 * channel, int(found))
            at += found

    return body


@kernel(
    "starts", "columns", "places", "terms", "limits", "bounds", "offsets", "order", "row_count", "group_rows",
    "group_bytes", "parts", "rows_per_job", "flags", "taps", "after",
)  # fmt: skip
def expand_csr(flagged: int) -> Body:
    """Write the list of every row: the offset of each non-zero's input, and where its weight is stored.

    Job: some rows. ``starts``, ``columns``, ``places``: of a ``SparseIndex``. ``terms``: table of int64 byte offsets
    by column, ``ABSENT`` for columns to leave out; ``group_bytes`` comes on top for each group of ``group_rows`` rows.
    ``limits``: int64 column behind each part. ``flags``: int32 by output channel, 0 for those to leave out, which are
    rows or, each, ``taps`` columns: ``flagged``, see ``codes``. ``order``: takes the ``places`` of what is listed; 0 if
    nothing is left out in the middle of a row, so that ``places`` are the order. ``after``: the bounds of the last part
    of a list that stands before this one in each row, or 0.
    """

    def body(args: int, first: int, last: int) -> None:
        (starts, columns, places, terms, limits, bounds, offsets, order, row_count, group_rows, group_bytes, parts,
         rows_per_job, flags, taps, after) = arguments(args, 16)  # fmt: skip
        for row in range(first * rows_per_job, min(row_count, last * rows_per_job)):
            base = row // group_rows * group_bytes
            counts = 1
            if flagged == FLAGGED_ROWS:
                counts = load_i32(flags + 4 * row)
            begin = load_i32(starts + 4 * row) if after == 0 else load_i32(after + 8 * row + 4)
            at, part, limit = begin, 0, load_i64(limits)
            for i in range(load_i32(starts + 4 * row), load_i32(starts + 4 * row + 4)):
                column = load_i32(columns + 4 * i)
                while column >= limit:
                    bound = bounds + 8 * (part * row_count + row)
                    store_i32(bound, begin)
                    store_i32(bound + 4, at)
                    begin = at
                    part += 1
                    limit = load_i64(limits + 8 * part)
                term = load_i64(terms + 8 * column)
                if flagged == FLAGGED_COLUMNS:
                    counts = load_i32(flags + 4 * (column // taps))
                listed = term != ABSENT and counts != 0
                # In lists of a step written in any case, where there is room: a branch would be predicted wrongly every
                # other time. What lasts is another list's, too, that may stand behind this one.
                if listed or (flagged != ALL_COUNT and after == 0):
                    store_i32(offsets + 4 * at, base + term)
                    if order != 0:
                        store_i32(order + 4 * at, load_i32(places + 4 * i))
                at += listed
            while part < parts:
                bound = bounds + 8 * (part * row_count + row)
                store_i32(bound, begin)
                store_i32(bound + 4, at)
                begin = at
                part += 1

    return body


@kernel("weight", "order", "values", "count", "entries_per_job")
def gather_csr() -> Body:
    """Write ``values[i] = weight[order[i]]``, the weights of a list one after another.

    Job: some entries. ``count``: address of their number, int32. While the products took each weight from its place
    themselves a step of ResNet-20 with a tenth of its weights took 4 % longer where these are picked from a dense array
    (SWAT), and 0.1 to 1.2 % where they are not (RigL; batch 32 and 4, one and two threads).
    """

    def body(args: int, first: int, last: int) -> None:
        weight, order, values, count, entries_per_job = arguments(args, 5)
        for i in range(first * entries_per_job, min(load_i32(count), last * entries_per_job)):
            store_f32(values + 4 * i, load_f32(weight + 4 * load_i32(order + 4 * i)))

    return body


@kernel(
    "x", "y", "bias", "tiles", "weight", "offsets", "bounds", "row_count", "parts", "x_block", "y_block", "y_channel",
    "y_step", "tile_count", "tile_chunk", "tile_chunks", "row_chunk", "row_chunks",
)  # fmt: skip
def multiply_csr(lanes: int, runs: int, columns: int, x_step: int, sets: int) -> Body:
    """Write ``y[block][row][p] = bias[row] + sum over the row's entries of w * x[block][p + offset]``.

    Job: (block, chunk of tiles, chunk of rows). ``tiles``: int64 pairs (input, output offset), ``runs`` per tile.
    ``weight``: of the entries, in their order.
    """
    tile_bytes = 16 * runs

    def body(args: int, first: int, last: int) -> None:
        (x, y, bias, tiles, weight, offsets, bounds, row_count, parts, x_block, y_block, y_channel, y_step, tile_count,
         tile_chunk, tile_chunks, row_chunk, row_chunks) = arguments(args, 18)  # fmt: skip
        for job in range(first, last):
            chunk_r = job % row_chunks
            rest = job // row_chunks
            chunk_t = rest % tile_chunks
            block = rest // tile_chunks
            last_row = min(row_count, (chunk_r + 1) * row_chunk)
            for t in range(chunk_t * tile_chunk, min(tile_count, (chunk_t + 1) * tile_chunk)):
                for part in range(parts):
                    for row in range(chunk_r * row_chunk, last_row):
                        bound = bounds + 8 * (part * row_count + row)
                        begin, end = load_i32(bound), load_i32(bound + 4)
                        if part == 0 or begin < end:
                            csr_multiply_tile(
                                x + block * x_block, y + block * y_block + row * y_channel, weight, offsets, begin, end,
                                load_f32(bias + 4 * row) * (part == 0), tiles + t * tile_bytes, part, y_step, runs,
                                columns, x_step, sets, lanes,
                            )  # fmt: skip

    return body


@kernel(
    "x", "grad_out", "tiles", "offsets", "bounds", "sums", "keep", "row_count", "parts", "x_block", "grad_block",
    "grad_channel", "grad_step", "part_sums", "tile_count", "tile_chunk", "tile_chunks", "row_chunk", "row_chunks",
)  # fmt: skip
def correlate_csr(lanes: int, runs: int, columns: int, x_step: int, chains: int) -> Body:
    """Write ``sums[chunk of pixels][entry] = sum over the chunk's pixels p of grad_out[row][p] * x[p + offset]``.

    Job: (block, chunk of tiles, chunk of rows); block and chunk of tiles are the chunk of pixels. ``sums`` are
    vectors of lanes, ``part_sums`` bytes of them per chunk of pixels; ``keep``: 1 to add to what they hold.
    ``tiles`` as in ``multiply_csr``.
    """
    tile_bytes = 16 * runs

    def body(args: int, first: int, last: int) -> None:
        (x, grad_out, tiles, offsets, bounds, sums, keep, row_count, parts, x_block, grad_block, grad_channel,
         grad_step, part_sums, tile_count, tile_chunk, tile_chunks, row_chunk,
         row_chunks) = arguments(args, 19)  # fmt: skip
        for job in range(first, last):
            chunk_r = job % row_chunks
            chunk = job // row_chunks
            block = chunk // tile_chunks
            first_tile = chunk % tile_chunks * tile_chunk
            source, grad, target = x + block * x_block, grad_out + block * grad_block, sums + chunk * part_sums
            last_row = min(row_count, (chunk_r + 1) * row_chunk)
            for t in range(first_tile, min(tile_count, first_tile + tile_chunk)):
                for part in range(parts):
                    for row in range(chunk_r * row_chunk, last_row):
                        bound = bounds + 8 * (part * row_count + row)
                        begin, end = load_i32(bound), load_i32(bound + 4)
                        if begin < end:
                            csr_correlate_tile(
                                source, grad + row * grad_channel, offsets, begin, end, target,
                                tiles + t * tile_bytes, keep + t - first_tile, grad_step, runs, columns, x_step, chains,
                                lanes,
                            )  # fmt: skip

    return body


@kernel(
    "x", "grad_out", "grad_x", "tiles", "weight", "offsets", "bounds", "sums", "scale", "bias", "mean", "inverse_std",
    "keep", "row_count", "parts", "x_block", "x_channel", "grad_block", "grad_x_block", "grad_x_channel", "part_sums",
    "tile_count", "tile_chunk", "tile_chunks", "row_chunk", "row_chunks", "x_step", "f_low", "f_high", "adds",
)  # fmt: skip
def gradients_csr(lanes: int, runs: int, columns: int, normalised: int) -> Body:
    """Do the work of ``multiply_csr`` for the input gradient and of ``correlate_csr`` in one pass over ``grad_out``.

    A row of the list is an input channel. With ``normalised`` the product's input is what a batch normalisation makes
    of ``x``, bit for bit, with the statistics that ``batch_norm`` wrote, clipped to ``low`` and ``high``.
    ``adds``: 1 to add to what ``grad_x`` holds, 0 to write.
    Job: (block, chunk of tiles, chunk of rows); ``tiles``: int64 triples (``grad_out``, ``x``, ``grad_x``).
    ``weight`` as in ``multiply_csr``; ``sums``, ``part_sums`` and ``keep`` as in ``correlate_csr``.
    ``x_step``: bytes between pixels of ``x`` and of ``grad_x``.
    """
    tile_bytes = 24 * runs

    def body(args: int, first: int, last: int) -> None:
        (x, grad_out, grad_x, tiles, weight, offsets, bounds, sums, scale, bias, mean, inverse_std, keep, row_count,
         parts, x_block, x_channel, grad_block, grad_x_block, grad_x_channel, part_sums, tile_count, tile_chunk,
         tile_chunks, row_chunk, row_chunks, x_step) = arguments(args, 27)  # fmt: skip
        low, high, adds = load_f32(args + 216), load_f32(args + 224), load_i64(args + 232)
        middle, factor, offset = low, low, low
        for job in range(first, last):
            chunk_r = job % row_chunks
            chunk = job // row_chunks
            block = chunk // tile_chunks
            first_tile = chunk % tile_chunks * tile_chunk
            source, grad, target = x + block * x_block, grad_out + block * grad_block, grad_x + block * grad_x_block
            summed = sums + chunk * part_sums
            last_row = min(row_count, (chunk_r + 1) * row_chunk)
            last_tile = min(tile_count, first_tile + tile_chunk)
            for t in range(first_tile, last_tile):
                for part in range(parts):
                    # ``x`` was last used long ago. Asking for the next tile's now, the backward products of the first
                    # stage of ResNet-20 at density 0.1 take 0.20 ms each instead of 0.29 (batch 32, one thread).
                    following = tiles + (t + 1) * tile_bytes if part == 0 and t + 1 < last_tile else 0
                    for row in range(chunk_r * row_chunk, last_row):
                        bound = bounds + 8 * (part * row_count + row)
                        begin, end = load_i32(bound), load_i32(bound + 4)
                        if part == 0 or begin < end:
                            if normalised:
                                middle, offset = load_f32(mean + 4 * row), load_f32(bias + 4 * row)
                                factor = load_f32(scale + 4 * row) * load_f32(inverse_std + 4 * row)
                            csr_gradients_tile(
                                grad, source + row * x_channel, target + row * grad_x_channel, weight, offsets, begin,
                                end, summed, tiles + t * tile_bytes, part + adds, keep + t - first_tile, following,
                                x_step, middle, factor, offset, low, high, runs, columns, normalised, lanes,
                            )  # fmt: skip

    return body


@kernel("sums", "grad_weight", "starts", "flags", "row_count", "capacity", "part_sums", "chunks", "rows_per_job")
def sum_csr_listed(lanes: int) -> Body:
    """Do as ``sum_csr`` for the rows whose flag is set, see ``expand_csr``; 0 for all others. Job: some rows."""

    def body(args: int, first: int, last: int) -> None:
        (sums, grad_weight, starts, flags, row_count, capacity, part_sums, chunks,
         rows_per_job) = arguments(args, 9)  # fmt: skip
        for row in range(first * rows_per_job, min(row_count, last * rows_per_job)):
            begin, end = load_i32(starts + 4 * row), load_i32(starts + 4 * row + 4)
            parts = chunks if load_i32(flags + 4 * row) != 0 else 0
            for i in range(begin, end):
                total = broadcast(0.0, lanes)
                for chunk in range(parts):
                    total = total + load(sums + chunk * part_sums + 4 * lanes * i, lanes)
                store_f32(grad_weight + 4 * i, sum_lanes(total))
            if row == row_count - 1:
                for i in range(end, capacity):
                    store_f32(grad_weight + 4 * i, 0.0)

    return body


@kernel("sums", "grad_weight", "order", "count", "capacity", "part_sums", "chunks", "entries_per_job")
def sum_csr(lanes: int) -> Body:
    """Write ``grad_weight[order[entry]] = sum of all chunks' vectors and lanes``; 0 behind the last entry.

    Job: some entries. ``order``: int32, where in compact storage. ``count``: address of their number, int32.
    """

    def body(args: int, first: int, last: int) -> None:
        sums, grad_weight, order, count, capacity, part_sums, chunks, entries_per_job = arguments(args, 8)
        entries = load_i32(count)
        for i in range(first * entries_per_job, min(capacity, last * entries_per_job)):
            total, place = broadcast(0.0, lanes), i
            if i < entries:
                place = load_i32(order + 4 * i)
                for chunk in range(chunks):
                    total = total + load(sums + chunk * part_sums + 4 * lanes * i, lanes)
            store_f32(grad_weight + 4 * place, sum_lanes(total))

    return body
