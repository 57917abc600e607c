"""Batch normalisation. One job is one channel, of all samples or, by blocks (``PARTS`` and on), of one block.

Sums are made block by block in either case and put together in the same order: the results are the same bit for bit.
``mask`` holds one vector per block, 1 where a lane has a sample and 0 where it has
none; ``state`` starts with the number of samples (int64). ``width``: lanes of the vectors in which rows, without
their border, are read and written: neighbouring pixels of the samples in the ``lanes``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit

from edgetrain.kernels.codes import ERRORS, KEPT, LARGEST, PARTS, REST, SUMS
from edgetrain.kernels.element_lists import limit_of_step
from edgetrain.kernels.pruned import is_kept
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    absolute,
    arguments,
    broadcast,
    fma,
    load,
    load_f32,
    load_f64,
    load_i64,
    maximum,
    minimum,
    repeat,
    select_ge,
    select_gt,
    select_same,
    store,
    store_f32,
    store_f64,
    store_i64,
    sum_lanes,
    unpack,
    whole,
)

_MAPS = ("blocks", "rows", "columns")
# Zeros around the result's maps, written along with them: clearing them before, line by line of memory that is not in
# any cache, took 6 % of a step of MobileNetV1 at batch 128.
_BORDER = ("top", "left", "bottom", "right")
# Of a choice between channels: where their scores belong, and the numbers of those whose input gradient is wanted.
_CHOICE = ("scores", "kept", "kept_count")


# Inlined, as calls with so many vectors made the gradients of MobileNetV1 8 % slower.
@njit(inline="always")
def _write_normalised(
    x: Any, y: Any, addend: Any, adds: Any, middle: Any, factor: Any, offset: Any, low: Any, high: Any, rows: Any,
    columns: Any, x_row: Any, y_row: Any, addend_row: Any, top: Any, left: Any, bottom: Any, right: Any, lanes: Any,
    width: Any,
) -> None:  # fmt: skip
    """Write ``y = clip((x - middle) * factor + offset [+ addend])`` of a map, and the zeros around it."""
    step, wide, nothing = 4 * lanes, 4 * width, broadcast(0.0, lanes)
    for row in range(-top, rows + bottom):
        source, other, target = x + row * x_row, addend + row * addend_row, y + row * y_row
        inside = columns if 0 <= row < rows else 0
        for i in range(-left, 0):
            store(target + i * step, nothing)
        for i in range(inside * lanes // width):
            value = fma(load(source + i * wide, width) - middle, factor, offset)
            if adds:
                value = value + load(other + i * wide, width)
            store(target + i * wide, minimum(maximum(value, low), high))
        for i in range(inside, columns + right):
            store(target + i * step, nothing)


@njit(inline="always")
def _write_gradient(
    x: Any, grad: Any, grad_x: Any, middle: Any, factor: Any, offset: Any, low: Any, high: Any, shift: Any, slope: Any,
    alive: Any, rows: Any, columns: Any, x_row: Any, grad_row: Any, grad_x_row: Any, top: Any, left: Any, bottom: Any,
    right: Any, lanes: Any, width: Any,
) -> None:  # fmt: skip
    """Write a map's input gradient, and the zeros around it; ``grad`` counts where y lies between the bounds."""
    step, wide, nothing, zero = 4 * lanes, 4 * width, broadcast(0.0, lanes), broadcast(0.0, width)
    for row in range(-top, rows + bottom):
        source, grads, target = x + row * x_row, grad + row * grad_row, grad_x + row * grad_x_row
        inside = columns if 0 <= row < rows else 0
        for i in range(-left, 0):
            store(target + i * step, nothing)
        for i in range(inside * lanes // width):
            away = load(source + i * wide, width) - middle
            value, own = fma(away, factor, offset), load(grads + i * wide, width)
            own = select_gt(value, low, select_gt(high, value, own, zero), zero)
            store(target + i * wide, (own - shift - away * slope) * alive)
        for i in range(inside, columns + right):
            store(target + i * step, nothing)


@njit(inline="always")
def _share(stage: Any, job: Any, channels: Any, blocks: Any) -> Any:
    """Return a job's channel, its first block and the one behind its last."""
    if stage in (PARTS, REST, KEPT):
        return job % channels, job // channels, job // channels + 1
    return job, 0, blocks


@njit
def _settle(
    stage: Any, grad_scale: Any, grad_bias: Any, scores: Any, channel: Any, scale: Any, inverse: Any, total: Any,
    product: Any, squares: Any, count: Any, epsilon: Any,
) -> None:  # fmt: skip
    """Write a channel's gradients of scale and bias, and with ``SUMS`` the L2 norm of its ``grad_x``.

    This is ``(grad - mean(grad) - xhat * mean(grad * xhat)) * scale * inverse``, of which the two means are orthogonal
    parts: the norm follows from the sum of the squares of ``grad``. The mean square of ``xhat`` is not 1 but
    ``1 - epsilon * inverse^2``, which matters where the variance is small. Scores as in ``channel_scores``.
    """
    store_f32(grad_bias + 4 * channel, total)
    store_f32(grad_scale + 4 * channel, product * inverse)
    if stage == SUMS:
        slope = product * inverse
        energy = squares - (total * total + slope * slope * (1.0 + epsilon * inverse * inverse)) / count
        norm = 0.0 if energy < 0.0 else math.sqrt(energy)  # what is not finite stays so
        store_f32(scores + 8 * channel, norm * abs(load_f32(scale + 4 * channel) * inverse))
        store_f32(scores + 8 * channel + 4, 0.0)


@njit
def _put(parts: Any, part: Any, total: Any, product: Any, squares: Any) -> None:
    """Write the sums of a channel in one block."""
    store_f64(parts + 24 * part, total)
    store_f64(parts + 24 * part + 8, product)
    store_f64(parts + 24 * part + 16, squares)


@njit
def _combined(parts: Any, channel: Any, blocks: Any) -> Any:
    """Return the sums of all blocks: three numbers."""
    total, product, squares = 0.0, 0.0, 0.0
    for part in range(channel * blocks, channel * blocks + blocks):
        total += load_f64(parts + 24 * part)
        product += load_f64(parts + 24 * part + 8)
        squares += load_f64(parts + 24 * part + 16)
    return total, product, squares


@njit
def _settled(
    stage: Any, grad_scale: Any, grad_bias: Any, scores: Any, parts: Any, channel: Any, begin: Any, blocks: Any,
    scale: Any, inverse: Any, total: Any, product: Any, squares: Any, count: Any, epsilon: Any,
) -> Any:  # fmt: skip
    """Do as ``_settle`` if that is not done, and return the sums (total, product) that ``grad_x`` is made from.

    With ``REST`` they are those of the blocks in ``parts``, and the job of block 0 alone writes. Where channels are
    chosen the two are rounded, so that ``grad_x`` has the same bits in all stages.
    """
    if stage == REST:
        total, product, squares = _combined(parts, channel, blocks)
    if stage not in (ERRORS, KEPT) and begin == 0:
        _settle(stage, grad_scale, grad_bias, scores, channel, scale, inverse, total, product, squares, count, epsilon)
    if stage in (SUMS, ERRORS, KEPT):
        return float(load_f32(grad_bias + 4 * channel)), load_f32(grad_scale + 4 * channel) / inverse
    return total, product


@kernel(
    "parts", "scale", "inverse_std", "grad_scale", "grad_bias", "scores", "state", "blocks", "pixels", "f_epsilon"
)
def settle_channels() -> Body:
    """Write gradients of scale and bias and the score of every channel from the sums of its blocks. Job: channel."""

    def body(args: int, first: int, last: int) -> None:
        parts, scale, inverse_std, grad_scale, grad_bias, scores, state, blocks, pixels = arguments(args, 9)
        epsilon = load_f32(args + 72)
        count = load_i64(state) * pixels
        for channel in range(first, last):
            total, product, squares = _combined(parts, channel, blocks)
            _settle(SUMS, grad_scale, grad_bias, scores, channel, scale, load_f32(inverse_std + 4 * channel), total,
                    product, squares, count, epsilon)  # fmt: skip

    return body


# Squares around a pivot that cancel more than this share when they are moved to the mean are summed up anew.
_MOST_CANCELLED = 15.0 / 16.0


@njit
def _moments(x: Any, pivot: Any, rows: Any, vectors: Any, x_row: Any, width: Any) -> Any:
    """Return the sums of a map's distances from the pivot and of their squares, by lane."""
    whole = wholly = broadcast(0.0, width)
    for row in range(rows):
        part = along = broadcast(0.0, width)
        for i in range(vectors):
            away = load(x + row * x_row + i * 4 * width, width) - pivot
            part = part + away
            along = fma(away, away, along)
        whole, wholly = whole + part, wholly + along
    return whole, wholly


@njit
def _map_statistics(x: Any, mask: Any, rows: Any, columns: Any, x_row: Any, lanes: Any, width: Any) -> Any:
    """Return the mean of a map and the sum of squares around it, lanes without a sample (``mask``) left out.

    One pass around a pivot near the mean, that of the first row: E[x^2] - E[x]^2 would cancel where the mean is large
    against the deviation. Where the first row is no guide, a second pass follows.
    """
    exist, zero, vectors = load(mask, lanes), broadcast(0.0, width), columns * lanes // width
    samples, alive = sum_lanes(exist), repeat(exist, width)
    first, _ = _moments(x, zero, 1, vectors, x_row, width)
    pivot = sum_lanes(first * alive) / (samples * columns)
    whole, wholly = _moments(x, broadcast(pivot, width), rows, vectors, x_row, width)
    distance, squares = sum_lanes(whole * alive) / (samples * rows * columns), sum_lanes(wholly * alive)
    surplus = distance * distance * samples * rows * columns
    if surplus > _MOST_CANCELLED * squares:
        pivot, distance, surplus = pivot + distance, 0.0, 0.0
        _, wholly = _moments(x, broadcast(pivot, width), rows, vectors, x_row, width)
        squares = sum_lanes(wholly * alive)
    return pivot + distance, squares - surplus


@kernel(
    "x", "y", "addend", "scale", "bias", "mean", "variance", "inverse_std", "mask", "parts", "channels", *_MAPS,
    "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row", "addend_block", "addend_channel", "addend_row",
    *_BORDER, "f_epsilon", "f_low", "f_high",
)  # fmt: skip
def batch_norm(lanes: int, width: int, adds: int, stage: int) -> Body:
    """Normalise with the batch's own statistics, add ``addend`` if ``adds``, and clip to ``low``, ``high``.

    So a residual branch and a Relu or Clip behind a normalisation are done in its pass. Also writes mean, biased
    variance and ``1 / sqrt(variance + epsilon)``. ``parts``: a mean and a sum of squares around it, float64, by channel
    and block; ``PARTS`` writes nothing else, ``REST`` reads what it wrote, ``WHOLE`` does both.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, addend, scale, bias, mean, variance, inverse_std, mask, parts, channels, blocks, rows, columns, x_block,
         x_channel, x_row, y_block, y_channel, y_row, addend_block, addend_channel, addend_row, top, left, bottom,
         right) = arguments(args, 27)  # fmt: skip
        epsilon = load_f32(args + 216)
        low, high = broadcast(load_f32(args + 224), width), broadcast(load_f32(args + 232), width)
        for job in range(first, last):
            channel, begin, end = _share(stage, job, channels, blocks)
            part = parts + 16 * blocks * channel
            if stage != REST:
                for block in range(begin, end):
                    source = x + block * x_block + channel * x_channel
                    own, squares = _map_statistics(source, mask + block * step, rows, columns, x_row, lanes, width)
                    store_f64(part + 16 * block, own)
                    store_f64(part + 16 * block + 8, squares)
            if stage == PARTS:
                continue
            count, centre, total = 0.0, 0.0, 0.0
            # Blocks are put together as in Chan, Golub and LeVeque, Algorithms for computing the sample variance
            # (1983), equation 2.1.
            for block in range(blocks):
                more = sum_lanes(load(mask + block * step, lanes)) * float(rows * columns)
                apart, both = load_f64(part + 16 * block) - centre, count + more
                total += load_f64(part + 16 * block + 8) + apart * apart * count * more / both
                centre, count = centre + apart * more / both, both
            spread = total / count
            # An overflow would give 1 / inf = 0: a finite loss, and running statistics that are lost for good.
            inverse = 1.0 / math.sqrt(spread + epsilon) if np.float32(spread) < math.inf else math.nan
            if begin == 0:
                store_f32(mean + 4 * channel, centre)
                store_f32(variance + 4 * channel, spread)
                store_f32(inverse_std + 4 * channel, inverse)
            # As stored, in float32: the backward pass computes y again and must find the same bits.
            middle = broadcast(centre, width)
            factor = broadcast(load_f32(scale + 4 * channel) * np.float32(inverse), width)
            offset = broadcast(load_f32(bias + 4 * channel), width)
            for block in range(begin, end):
                # Lanes without a sample get the offset: where samples are alike, 1 / std is 316, and a dozen
                # normalisations would make infinity of what these lanes hold, and NaN of its product with the mask.
                own = factor * repeat(load(mask + block * step, lanes), width)
                _write_normalised(
                    x + block * x_block + channel * x_channel, y + block * y_block + channel * y_channel,
                    addend + block * addend_block + channel * addend_channel, adds, middle, own, offset, low, high,
                    rows, columns, x_row, y_row, addend_row, top, left, bottom, right, lanes, width,
                )  # fmt: skip

    return body


@kernel(
    "x", "y", "scale", "bias", "mean", "spread", *_MAPS,
    "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row", *_BORDER, "f_epsilon", "f_low", "f_high",
)  # fmt: skip
def batch_norm_inference(lanes: int, width: int, inverted: int) -> Body:
    """Normalise with given statistics and clip.

    ``spread`` is the variance, or ``1 / std`` as ``batch_norm`` wrote it when ``inverted``:
    then the result is the same bit for bit.
    """
    def body(args: int, first: int, last: int) -> None:
        (x, y, scale, bias, mean, spread, blocks, rows, columns, x_block, x_channel, x_row, y_block, y_channel,
         y_row, top, left, bottom, right) = arguments(args, 19)  # fmt: skip
        epsilon = load_f32(args + 152)
        low, high = broadcast(load_f32(args + 160), width), broadcast(load_f32(args + 168), width)
        for channel in range(first, last):
            inverse = load_f32(spread + 4 * channel)
            if inverted == 0:
                inverse = np.float32(1.0 / math.sqrt(inverse + epsilon))
            middle = broadcast(load_f32(mean + 4 * channel), width)
            factor = broadcast(load_f32(scale + 4 * channel) * inverse, width)
            offset = broadcast(load_f32(bias + 4 * channel), width)
            for block in range(blocks):
                source = x + block * x_block + channel * x_channel
                _write_normalised(
                    source, y + block * y_block + channel * y_channel, source, 0, middle, factor, offset, low, high,
                    rows, columns, x_row, y_row, x_row, top, left, bottom, right, lanes, width,
                )  # fmt: skip

    return body


@kernel(
    "x", "y", "grad_out", "grad_x", "scale", "bias", "mean", "inverse_std", "grad_scale", "grad_bias", "mask", "state",
    "parts", "channels", *_MAPS, "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row", "grad_block",
    "grad_channel", "grad_row", "grad_x_block", "grad_x_channel", "grad_x_row", *_BORDER,
    *(f"y_{side}" for side in _BORDER), *_CHOICE, "record", "counts", "refresh", "f_low", "f_high", "f_epsilon",
)  # fmt: skip
def batch_norm_gradient(lanes: int, width: int, again: int, stage: int) -> Body:
    """Write the gradients of input, scale and bias (Ioffe and Szegedy 2015, section 3), and y if ``again``.

    Where the output was clipped the gradient stops; that is found out again from ``x``, so
    nothing but ``x`` is kept. ``grad_x`` is 0 in lanes without a sample, as every gradient must be.
    ``stage``, see ``codes``: with ``SUMS``, ``ERRORS`` and ``KEPT``, ``grad_x`` is written for the channels that are
    ``kept`` alone. ``parts``: three sums, float64, by channel and block, which ``PARTS`` writes.
    With ``again`` ``LARGEST``, y has 0 where its size is below ``element_lists.limit_of_step``; how many numbers reach
    that goes to ``counts``, int64, by block and channel.
    """
    step, wide = 4 * lanes, 4 * width

    def body(args: int, first: int, last: int) -> None:
        (x, y, grad_out, grad_x, scale, bias, mean, inverse_std, grad_scale, grad_bias, mask, state, parts, channels,
         blocks, rows, columns, x_block, x_channel, x_row, y_block, y_channel, y_row, grad_block, grad_channel,
         grad_row, grad_x_block, grad_x_channel, grad_x_row, top, left, bottom, right, y_top, y_left, y_bottom,
         y_right, scores, kept, kept_count, record, counts, refresh) = arguments(args, 43)  # fmt: skip
        low, high = broadcast(load_f32(args + 344), width), broadcast(load_f32(args + 352), width)
        epsilon = load_f32(args + 360)
        nothing, zero, one = broadcast(0.0, lanes), broadcast(0.0, width), broadcast(1.0, width)
        limit = broadcast(limit_of_step(record, state, refresh) if again == LARGEST else np.float32(0.0), width)
        count = load_i64(state) * rows * columns
        for job in range(first, last):
            channel, begin, end = _share(stage, job, channels, blocks)
            middle = broadcast(load_f32(mean + 4 * channel), width)
            inverse = load_f32(inverse_std + 4 * channel)
            factor = broadcast(load_f32(scale + 4 * channel) * inverse, width)
            offset = broadcast(load_f32(bias + 4 * channel), width)
            total, product, squares = 0.0, 0.0, 0.0
            for block in range(begin, begin if stage in (ERRORS, REST, KEPT) else end):
                summed, wholly, square, reached = zero, zero, zero, zero
                alive = repeat(load(mask + block * step, lanes), width)
                # y is written here, where the vectors of x are at hand.
                for row in range(-y_top if again else 0, rows + y_bottom if again else rows):
                    source = x + block * x_block + channel * x_channel + row * x_row
                    grads = grad_out + block * grad_block + channel * grad_channel + row * grad_row
                    result = y + block * y_block + channel * y_channel + row * y_row
                    part, along = zero, zero
                    inside = columns if 0 <= row < rows else 0
                    if again:
                        for i in range(-y_left, 0):
                            store(result + i * step, nothing)
                    for i in range(inside * lanes // width):
                        away = load(source + i * wide, width) - middle
                        value = fma(away, factor, offset)
                        grad = load(grads + i * wide, width)
                        grad = select_gt(value, low, select_gt(high, value, grad, zero), zero)
                        part = part + grad
                        along = fma(grad, away, along)
                        if stage in (SUMS, PARTS):
                            square = fma(grad, grad, square)
                        if again:
                            value = minimum(maximum(value, low), high)
                            if again == LARGEST:
                                size = absolute(value)
                                reached = reached + select_ge(size * alive, limit, one, zero)
                                value = select_gt(limit, size, zero, value)
                            store(result + i * wide, value)
                    if again:
                        for i in range(inside, columns + y_right):
                            store(result + i * step, nothing)
                    summed, wholly = summed + part, wholly + along
                total += sum_lanes(summed)
                product += sum_lanes(wholly)
                if stage in (SUMS, PARTS):
                    squares += sum_lanes(square)
                if again == LARGEST:
                    store_i64(counts + 8 * (block * channels + channel), int(sum_lanes(reached)))
            if stage == PARTS:
                _put(parts, channel * blocks + begin, total, product, squares)
                continue
            total, product = _settled(
                stage, grad_scale, grad_bias, scores, parts, channel, begin, blocks, scale, inverse, total, product,
                squares, count, epsilon,
            )  # fmt: skip
            if stage in (SUMS, ERRORS, KEPT) and not is_kept(kept, kept_count, channel):
                continue
            shift = broadcast(total / count, width)
            slope = broadcast(product * inverse * inverse / count, width)
            for block in range(begin, end):
                _write_gradient(
                    x + block * x_block + channel * x_channel, grad_out + block * grad_block + channel * grad_channel,
                    grad_x + block * grad_x_block + channel * grad_x_channel, middle, factor, offset, low, high,
                    shift, slope, repeat(load(mask + block * step, lanes), width) * factor, rows, columns, x_row,
                    grad_row, grad_x_row, top, left, bottom, right, lanes, width,
                )  # fmt: skip

    return body


@kernel(
    "x", "y", "grad_out", "more", "grad_sum", "grad_x", "scale", "mean", "inverse_std", "grad_scale", "grad_bias",
    "mask", "state", "parts", "channels", *_MAPS, "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row",
    "grad_block", "grad_channel", "grad_row", "more_block", "more_channel", "more_row", "grad_sum_block",
    "grad_sum_channel", "grad_sum_row", "grad_x_block", "grad_x_channel", "grad_x_row", *_BORDER, *_CHOICE, "f_low",
    "f_high", "f_epsilon",
)  # fmt: skip
def residual_norm_gradient(lanes: int, width: int, sums: int, bits: int, stage: int) -> Body:
    """Write the gradients of ``y = clip(norm(x) + addend)``: of the addend (``grad_sum``), input, scale and bias.

    ``grad_sum`` is ``grad_out``, plus ``more`` if ``sums``, where y was not clipped; it may be the memory of either.
    With ``bits``, ``y`` is what ``keep_mask`` wrote of it. The rest is as in ``batch_norm_gradient``.
    """
    step, wide = 4 * lanes, 4 * width

    def body(args: int, first: int, last: int) -> None:
        (x, y, grad_out, more, grad_sum, grad_x, scale, mean, inverse_std, grad_scale, grad_bias, mask, state, parts,
         channels, blocks, rows, columns, x_block, x_channel, x_row, y_block, y_channel, y_row, grad_block,
         grad_channel, grad_row, more_block, more_channel, more_row, grad_sum_block, grad_sum_channel, grad_sum_row,
         grad_x_block, grad_x_channel, grad_x_row, top, left, bottom, right, scores, kept,
         kept_count) = arguments(args, 43)  # fmt: skip
        low, high = broadcast(load_f32(args + 344), width), broadcast(load_f32(args + 352), width)
        epsilon = load_f32(args + 360)
        zero, least, most = broadcast(0.0, width), broadcast(-math.inf, width), broadcast(math.inf, width)
        none = whole(0, width)
        count = load_i64(state) * rows * columns
        for job in range(first, last):
            channel, begin, end = _share(stage, job, channels, blocks)
            middle = broadcast(load_f32(mean + 4 * channel), width)
            inverse = load_f32(inverse_std + 4 * channel)
            total, product, squares = 0.0, 0.0, 0.0
            for block in range(begin, begin if stage in (ERRORS, REST, KEPT) else end):
                summed, wholly, square = zero, zero, zero
                packed, place = 0, y + block * y_block + channel * y_channel
                word = load(place, width)
                for row in range(rows):
                    source = x + block * x_block + channel * x_channel + row * x_row
                    result = y + block * y_block + channel * y_channel + row * y_row
                    grads = grad_out + block * grad_block + channel * grad_channel + row * grad_row
                    others = more + block * more_block + channel * more_channel + row * more_row
                    target = grad_sum + block * grad_sum_block + channel * grad_sum_channel + row * grad_sum_row
                    part, along = zero, zero
                    for i in range(columns * lanes // width):
                        away = load(source + i * wide, width) - middle
                        grad = load(grads + i * wide, width)
                        if sums:
                            grad = grad + load(others + i * wide, width)
                        if bits:
                            if packed == 32:
                                packed, place = 0, place + wide
                                word = load(place, width)
                            grad = select_same(unpack(word, packed, 1), none, zero, grad)
                            packed += 1
                        else:
                            value = load(result + i * wide, width)
                            grad = select_gt(value, low, select_gt(high, value, grad, zero), zero)
                        store(target + i * wide, grad)
                        part = part + grad
                        along = fma(grad, away, along)
                        if stage in (SUMS, PARTS):
                            square = fma(grad, grad, square)
                    summed, wholly = summed + part, wholly + along
                total += sum_lanes(summed)
                product += sum_lanes(wholly)
                if stage in (SUMS, PARTS):
                    squares += sum_lanes(square)
            if stage == PARTS:
                _put(parts, channel * blocks + begin, total, product, squares)
                continue
            total, product = _settled(
                stage, grad_scale, grad_bias, scores, parts, channel, begin, blocks, scale, inverse, total, product,
                squares, count, epsilon,
            )  # fmt: skip
            if stage in (SUMS, ERRORS, KEPT) and not is_kept(kept, kept_count, channel):
                continue
            factor = broadcast(load_f32(scale + 4 * channel) * inverse, width)
            shift = broadcast(total / count, width)
            slope = broadcast(product * inverse * inverse / count, width)
            for block in range(begin, end):
                _write_gradient(
                    x + block * x_block + channel * x_channel,
                    grad_sum + block * grad_sum_block + channel * grad_sum_channel,
                    grad_x + block * grad_x_block + channel * grad_x_channel, middle, factor, zero, least, most, shift,
                    slope, repeat(load(mask + block * step, lanes), width) * factor, rows, columns, x_row,
                    grad_sum_row, grad_x_row, top, left, bottom, right, lanes, width,
                )  # fmt: skip

    return body


@kernel("running", "current", "state", "pixels", "f_keep", "unbiased")
def running_average() -> Body:
    """Move running statistics: ``running = keep * running + (1 - keep) * current``. Job: channel.

    With ``unbiased`` the batch variance is multiplied by n / (n - 1), as PyTorch does
    (n values per channel; left alone when n is 1).
    """

    def body(args: int, first: int, last: int) -> None:
        running, current, state, pixels = arguments(args, 4)
        keep = load_f32(args + 32)
        count = load_i64(state) * pixels
        factor = 1.0
        if load_i64(args + 40) != 0 and count > 1:
            factor = count / (count - 1.0)
        for channel in range(first, last):
            old, new = load_f32(running + 4 * channel), load_f32(current + 4 * channel)
            store_f32(running + 4 * channel, keep * old + (1.0 - keep) * new * factor)

    return body
