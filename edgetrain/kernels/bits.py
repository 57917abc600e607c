"""Sparse weights by a bit each: whole vectors of a row, whose columns lie side by side, at a time.

A word of ``bits`` (``sparse_index.SparseIndex``) tells which of 16 columns exist, so reading a row needs no column
numbers. Values lie in compact storage, in the order of the entries, or in a dense array of which some weights count.
All kernels but ``mask_bits`` are for machines with instructions that spread numbers over the lanes of a vector and
gather them again (AVX-512). The first three stand between sparse weights and dense kernels. With few samples that copy
would take longer than the product; there fully connected layers multiply what they read (``multiply_bits`` and the two
behind it, ``lowering_few``).

Half of 48,000 weights are written out in 6.4 us, number by number in 21; gathered in 6.5 us and 18 (one thread).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    compress,
    count_bits,
    fma,
    keep_where,
    load,
    load_expanded,
    load_f32,
    load_i32,
    load_i64,
    load_u16,
    load_where,
    store,
    store_f32,
    store_where,
    sum_lanes,
)

# starts: int32, first entry of every row; bits: uint16, ``row_words`` a row; lanes: 16, as many as a word has bits.


@kernel("values", "dense", "row_size", "bits", "row_words")
def mask_bits(lanes: int) -> Body:
    """Copy a dense array of weights, 0 instead of those that do not exist. Job: row.

    Half of 48,000 weights took 17.7 us by their numbers and take 5.0 so (one thread).
    """

    def body(args: int, first: int, last: int) -> None:
        values, dense, row_size, bits, row_words = arguments(args, 5)
        for row in range(first, last):
            word, place = bits + 2 * row * row_words, 4 * row * row_size
            for vector in range(row_size // lanes):
                kept = keep_where(load(values + place, lanes), load_u16(word + 2 * vector))
                store(dense + place, kept)
                place += 4 * lanes
            exist = load_u16(word + 2 * row_words - 2)
            for lane in range(row_size % lanes):
                value = load_f32(values + place + 4 * lane) if (exist >> lane) & 1 else np.float32(0.0)
                store_f32(dense + place + 4 * lane, value)

    return body


@kernel("values", "dense", "row_size", "starts", "bits", "row_words", "dense_row")
def expand_bits(lanes: int) -> Body:
    """Write a dense array of weights, ``dense_row`` bytes a row: the values where they exist, 0 elsewhere. Job: row."""

    def body(args: int, first: int, last: int) -> None:
        values, dense, row_size, starts, bits, row_words, dense_row = arguments(args, 7)
        rest = (1 << row_size % lanes) - 1
        for row in range(first, last):
            at, line = values + 4 * load_i32(starts + 4 * row), dense + row * dense_row
            word = bits + 2 * row * row_words
            for vector in range(row_size // lanes):
                exist = load_u16(word + 2 * vector)
                store(line + 4 * lanes * vector, load_expanded(at, exist, lanes))
                at += 4 * count_bits(exist)
            if rest != 0:
                exist = load_u16(word + 2 * row_words - 2)
                store_where(line + 4 * lanes * (row_words - 1), load_expanded(at, exist, lanes), rest)

    return body


@kernel("values", "dense", "starts", "bits", "row_words", "dense_row")
def gather_bits(lanes: int) -> Body:
    """Take the entries of a dense array into sparse storage. Job: row; see ``expand_bits``."""

    def body(args: int, first: int, last: int) -> None:
        values, dense, starts, bits, row_words, dense_row = arguments(args, 6)
        for row in range(first, last):
            at, line = values + 4 * load_i32(starts + 4 * row), dense + row * dense_row
            word = bits + 2 * row * row_words
            for vector in range(row_words):
                exist = load_u16(word + 2 * vector)
                found = count_bits(exist)
                # Never more than there are: what follows in ``values`` may be another thread's.
                wanted = compress(load_where(line + 4 * lanes * vector, exist, lanes), exist)
                store_where(at, wanted, (1 << found) - 1)
                at += 4 * found

    return body


# Rows of weights in compact storage, or (``compact`` is 0) of a dense array of which some weights count.


@njit
def _row(values: Any, starts: Any, row: Any, row_size: Any, compact: Any) -> Any:
    """Return where a row's weights begin."""
    return values + 4 * (load_i32(starts + 4 * row) if compact else row * row_size)


@njit
def _weights(at: Any, exist: Any, compact: Any, lanes: Any) -> Any:
    """Return the next vector of a row's weights."""
    return load_expanded(at, exist, lanes) if compact else load_where(at, exist, lanes)


@njit
def _step(exist: Any, compact: Any, lanes: Any) -> Any:
    """Return the bytes of the weights that a word tells of."""
    return 4 * (count_bits(exist) if compact else lanes)


@njit
def _plus(sums: Any, a: Any, b: Any, samples: Any) -> Any:
    """Return four vectors of sums, of so many samples, with products added: one factor of each, and a common one."""
    return (
        fma(a[0], b, sums[0]),
        fma(a[1], b, sums[1]) if samples > 1 else sums[1],
        fma(a[2], b, sums[2]) if samples > 2 else sums[2],
        fma(a[3], b, sums[3]) if samples > 3 else sums[3],
    )


@njit
def _store_sums(target: Any, step: Any, sums: Any, shift: Any, samples: Any) -> None:
    """Store the sum of the lanes of every sample's vector."""
    store_f32(target, sum_lanes(sums[0]) + shift)
    if samples > 1:
        store_f32(target + step, sum_lanes(sums[1]) + shift)
    if samples > 2:
        store_f32(target + 2 * step, sum_lanes(sums[2]) + shift)
    if samples > 3:
        store_f32(target + 3 * step, sum_lanes(sums[3]) + shift)


@kernel(
    "values", "x", "y", "bias", "starts", "bits", "row_words", "rows", "x_block", "y_block", "row_chunk", "groups",
    "padded", "row_size",
)  # fmt: skip
def multiply_bits(lanes: int, samples: int, compact: int) -> Body:
    """Write ``y[sample][row] = bias[row] + sum over columns of weight[row][column] * x[sample][column]``.

    Job: (``row_chunk`` rows of ``padded``, those that do not exist get 0; one of ``groups`` of ``samples``, 1 to 4): a
    thread reads weights that it has updated itself, for all samples. Vectors of ``x`` are read whole: behind the last
    column it must hold finite numbers. Two rows at a time, the last twice if it is alone: half of LeNet-5's fc1 took
    3.5 us at batch 4 row by row, and takes 2.7 so (one thread).
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (values, x, y, bias, starts, bits, row_words, rows, x_block, y_block, row_chunk, groups, padded,
         row_size) = arguments(args, 14)  # fmt: skip
        zero = broadcast(0.0, lanes)
        for job in range(first, last):
            begin, sample = job // groups * row_chunk, job % groups * samples
            end, inputs, target = min(padded, begin + row_chunk), x + sample * x_block, y + sample * y_block
            for row in range(begin, min(rows, end), 2):
                other = min(row + 1, rows - 1)
                upper = lower = (zero, zero, zero, zero)
                at, word = _row(values, starts, row, row_size, compact), bits + 2 * row * row_words
                below, word_below = _row(values, starts, other, row_size, compact), bits + 2 * other * row_words
                for vector in range(row_words):
                    exist, exist_below = load_u16(word + 2 * vector), load_u16(word_below + 2 * vector)
                    source = inputs + step * vector
                    numbers = (
                        load(source, lanes),
                        load(source + x_block, lanes) if samples > 1 else zero,
                        load(source + 2 * x_block, lanes) if samples > 2 else zero,
                        load(source + 3 * x_block, lanes) if samples > 3 else zero,
                    )
                    upper = _plus(upper, numbers, _weights(at, exist, compact, lanes), samples)
                    lower = _plus(lower, numbers, _weights(below, exist_below, compact, lanes), samples)
                    at += _step(exist, compact, lanes)
                    below += _step(exist_below, compact, lanes)
                _store_sums(target + 4 * row, y_block, upper, load_f32(bias + 4 * row), samples)
                if row + 1 < min(rows, end):
                    _store_sums(target + 4 * other, y_block, lower, load_f32(bias + 4 * other), samples)
            for row in range(max(begin, rows), end):
                for other in range(samples):
                    store_f32(target + 4 * row + other * y_block, 0.0)

    return body


@njit
def _exist(word: Any, vector: Any, row_words: Any) -> Any:
    """Return which columns of a vector of a row exist: none behind the last."""
    return load_u16(word + 2 * vector) if vector < row_words else 0


@kernel(
    "values", "grad_out", "grad_x", "starts", "bits", "row_words", "groups", "rows", "grad_block", "grad_x_block",
    "row_size",
)  # fmt: skip
def multiply_bits_back(lanes: int, samples: int, compact: int) -> Body:
    """Write ``grad_x[sample][column] = sum over rows of grad_out[sample][row] * weight[row][column]``.

    Job: (four words of every row; one of ``groups`` of ``samples``, 1 to 4). Vectors are written whole, with 0 behind
    the last column. All sums stay in registers: half of LeNet-5's fc1 took 4.5 us at batch 4 with the sums in memory,
    3.0 with two samples at a time, and takes 1.9 so (one thread).
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (values, grad_out, grad_x, starts, bits, row_words, groups, rows, grad_block, grad_x_block,
         row_size) = arguments(args, 11)  # fmt: skip
        zero = broadcast(0.0, lanes)
        for job in range(first, last):
            begin, sample = 4 * (job // groups), job % groups * samples
            a = b = c = d = (zero, zero, zero, zero)
            for row in range(rows):
                at, word = _row(values, starts, row, row_size, compact), bits + 2 * row * row_words
                if compact:
                    for before in range(0, begin, 4):
                        at += 4 * count_bits(load_i64(word + 2 * before))
                else:
                    at += step * begin
                error = grad_out + sample * grad_block + 4 * row
                errors = (
                    broadcast(load_f32(error), lanes),
                    broadcast(load_f32(error + grad_block), lanes) if samples > 1 else zero,
                    broadcast(load_f32(error + 2 * grad_block), lanes) if samples > 2 else zero,
                    broadcast(load_f32(error + 3 * grad_block), lanes) if samples > 3 else zero,
                )
                exist = _exist(word, begin, row_words)
                a = _plus(a, errors, _weights(at, exist, compact, lanes), samples)
                at += _step(exist, compact, lanes)
                exist = _exist(word, begin + 1, row_words)
                b = _plus(b, errors, _weights(at, exist, compact, lanes), samples)
                at += _step(exist, compact, lanes)
                exist = _exist(word, begin + 2, row_words)
                c = _plus(c, errors, _weights(at, exist, compact, lanes), samples)
                at += _step(exist, compact, lanes)
                exist = _exist(word, begin + 3, row_words)
                d = _plus(d, errors, _weights(at, exist, compact, lanes), samples)
            target = grad_x + sample * grad_x_block + step * begin
            _store_samples(target, grad_x_block, a, samples)
            if begin + 1 < row_words:
                _store_samples(target + step, grad_x_block, b, samples)
            if begin + 2 < row_words:
                _store_samples(target + 2 * step, grad_x_block, c, samples)
            if begin + 3 < row_words:
                _store_samples(target + 3 * step, grad_x_block, d, samples)

    return body


@njit
def _store_samples(target: Any, step: Any, vectors: Any, samples: Any) -> None:
    """Store every sample's vector."""
    store(target, vectors[0])
    if samples > 1:
        store(target + step, vectors[1])
    if samples > 2:
        store(target + 2 * step, vectors[2])
    if samples > 3:
        store(target + 3 * step, vectors[3])


@kernel("values", "x", "grad_out", "starts", "bits", "row_words", "rows", "x_block", "grad_block", "row_chunk")
def correlate_bits(lanes: int, samples: int) -> Body:
    """Write the gradients of weights in compact storage: sums over samples of ``grad_out[row] * x[column]``.

    Job: ``row_chunk`` rows. Vectors of ``x`` are read whole.
    """

    def body(args: int, first: int, last: int) -> None:
        (values, x, grad_out, starts, bits, row_words, rows, x_block, grad_block,
         row_chunk) = arguments(args, 10)  # fmt: skip
        for row in range(first * row_chunk, min(rows, last * row_chunk)):
            at, word = values + 4 * load_i32(starts + 4 * row), bits + 2 * row * row_words
            for vector in range(row_words):
                exist = load_u16(word + 2 * vector)
                found, total = count_bits(exist), broadcast(0.0, lanes)
                for sample in range(samples):
                    error = broadcast(load_f32(grad_out + sample * grad_block + 4 * row), lanes)
                    total = fma(error, load(x + sample * x_block + 4 * lanes * vector, lanes), total)
                store_where(at, compress(total, exist), (1 << found) - 1)
                at += 4 * found

    return body
