"""Kernels for batches smaller than a vector: the lanes hold channels of one sample instead of samples.

Activations are ``[sample][channel / lanes][rows][columns][lanes]``; lanes beyond the last channel
hold zeros in every gradient. Element-wise kernels and pools do not care what a lane holds
and serve both; here are those that do. Vectors of parameters are read and written whole:
their buffers end on whole cache lines of zeros.
"""

from __future__ import annotations

import math

import numpy as np

from edgetrain.kernels.random import mixed, stream_key
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    fma,
    lane_numbers,
    load,
    load_f32,
    load_i64,
    maximum,
    minimum,
    select_gt,
    sqrt,
    store,
    store_f32,
)

_MAPS = ("blocks", "rows", "columns")


@kernel(
    "x", "y", "scale", "shift", "channels", "maps", "rows", "columns", "y_block", "y_map", "y_row",
)  # fmt: skip
def pack_channels(lanes: int) -> Body:
    """Copy samples, dense float32 ``(N, C, H, W)``, normalised: ``x * scale[c] + shift[c]``. Job: (sample, map)."""

    def body(args: int, first: int, last: int) -> None:
        x, y, scale, shift, channels, maps, rows, columns, y_block, y_map, y_row = arguments(args, 11)
        for job in range(first, last):
            sample, group = job // maps, job % maps
            for lane in range(lanes):
                channel = group * lanes + lane
                source = x + 4 * rows * columns * (sample * channels + channel)
                target = y + sample * y_block + group * y_map + 4 * lane
                alive = channel < channels
                factor = load_f32(scale + 4 * channel) if alive else 0.0
                offset = load_f32(shift + 4 * channel) if alive else 0.0
                for row in range(rows):
                    for column in range(columns):
                        value = load_f32(source + 4 * (row * columns + column)) * factor + offset if alive else 0.0
                        store_f32(target + row * y_row + 4 * lanes * column, value)

    return body


@kernel("x", "y", "table", "count", "x_block", "y_block")
def copy_scalars() -> Body:
    """Copy the numbers of a table of int64 pairs (input, output byte offset). Job: sample."""

    def body(args: int, first: int, last: int) -> None:
        x, y, table, count, x_block, y_block = arguments(args, 6)
        for block in range(first, last):
            for i in range(count):
                value = load_f32(x + block * x_block + load_i64(table + 16 * i))
                store_f32(y + block * y_block + load_i64(table + 16 * i + 8), value)

    return body


@kernel("y", "bias", "channels", "maps", "y_block")
def add_bias_channels(lanes: int) -> Body:
    """Add a number per channel to maps of one pixel; lanes behind the last channel become 0. Job: (sample, map)."""

    def body(args: int, first: int, last: int) -> None:
        y, bias, channels, maps, y_block = arguments(args, 5)
        zero = broadcast(0.0, lanes)
        for job in range(first, last):
            sample, group = job // maps, job % maps
            place = y + sample * y_block + 4 * lanes * group
            value = load(place, lanes) + load(bias + 4 * lanes * group, lanes)
            rest = broadcast(float(channels - group * lanes), lanes)
            store(place, select_gt(rest, lane_numbers(lanes), value, zero))

    return body


@kernel("x", "y", "blocks", "rows", "columns", "x_block", "x_map", "x_row")
def sum_samples_channels(lanes: int) -> Body:
    """Sum all samples' pixels to one number per channel (a bias's gradient). Job: map."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        x, y, blocks, rows, columns, x_block, x_map, x_row = arguments(args, 8)
        for group in range(first, last):
            total = broadcast(0.0, lanes)
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_map + row * x_row
                    part = broadcast(0.0, lanes)
                    for i in range(columns):
                        part = part + load(source + i * step, lanes)
                    total = total + part
            store(y + group * step, total)

    return body


@kernel(
    "x", "y", "addend", "scale", "bias", "mean", "variance", "inverse_std", *_MAPS, "x_block", "x_channel", "x_row",
    "y_block", "y_channel", "y_row", "addend_block", "addend_channel", "addend_row", "f_epsilon", "f_low", "f_high",
)  # fmt: skip
def batch_norm_channels(lanes: int, adds: int) -> Body:
    """Normalise with the batch's own statistics; see ``normalization.batch_norm``. Job: map."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, addend, scale, bias, mean, variance, inverse_std, blocks, rows, columns, x_block, x_channel, x_row,
         y_block, y_channel, y_row, addend_block, addend_channel, addend_row) = arguments(args, 20)  # fmt: skip
        epsilon = broadcast(load_f32(args + 160), lanes)
        low, high = broadcast(load_f32(args + 168), lanes), broadcast(load_f32(args + 176), lanes)
        share = broadcast(1.0 / (blocks * rows * columns), lanes)
        one, infinite, broken = broadcast(1.0, lanes), broadcast(math.inf, lanes), broadcast(math.nan, lanes)
        for group in range(first, last):
            total = broadcast(0.0, lanes)
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    part = broadcast(0.0, lanes)
                    for i in range(columns):
                        part = part + load(source + i * step, lanes)
                    total = total + part
            middle = total * share
            # The sum was rounded many times. Where a channel hardly varies, 1 / std is 316, and an error of the mean
            # counts: what is left around it is put right.
            total = left = broadcast(0.0, lanes)
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    part = along = broadcast(0.0, lanes)
                    for i in range(columns):
                        away = load(source + i * step, lanes) - middle
                        part, along = fma(away, away, part), along + away
                    total, left = total + part, left + along
            left = left * share
            middle = middle + left
            spread = total * share - left * left
            spread = select_gt(broadcast(0.0, lanes), spread, broadcast(0.0, lanes), spread)
            # See ``normalization.batch_norm``: an overflow must not pass for a healthy step.
            inverse = select_gt(infinite, spread, one / sqrt(spread + epsilon), broken)
            store(mean + group * step, middle)
            store(variance + group * step, spread)
            store(inverse_std + group * step, inverse)
            factor = load(scale + group * step, lanes) * inverse
            offset = load(bias + group * step, lanes)
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    other = addend + block * addend_block + group * addend_channel + row * addend_row
                    target = y + block * y_block + group * y_channel + row * y_row
                    for i in range(columns):
                        value = fma(load(source + i * step, lanes) - middle, factor, offset)
                        if adds:
                            value = value + load(other + i * step, lanes)
                        store(target + i * step, minimum(maximum(value, low), high))

    return body


@kernel(
    "x", "y", "scale", "bias", "mean", "spread", *_MAPS,
    "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row", "f_epsilon", "f_low", "f_high",
)  # fmt: skip
def batch_norm_inference_channels(lanes: int, inverted: int) -> Body:
    """Normalise with given statistics and clip; see ``normalization.batch_norm_inference``. Job: map."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, scale, bias, mean, spread, blocks, rows, columns, x_block, x_channel, x_row, y_block, y_channel,
         y_row) = arguments(args, 15)  # fmt: skip
        epsilon, one = broadcast(load_f32(args + 120), lanes), broadcast(1.0, lanes)
        low, high = broadcast(load_f32(args + 128), lanes), broadcast(load_f32(args + 136), lanes)
        for group in range(first, last):
            middle = load(mean + group * step, lanes)
            inverse = load(spread + group * step, lanes)
            if inverted == 0:
                inverse = one / sqrt(inverse + epsilon)
            factor = load(scale + group * step, lanes) * inverse
            offset = load(bias + group * step, lanes)
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    target = y + block * y_block + group * y_channel + row * y_row
                    for i in range(columns):
                        value = fma(load(source + i * step, lanes) - middle, factor, offset)
                        store(target + i * step, minimum(maximum(value, low), high))

    return body


@kernel(
    "x", "y", "grad_out", "grad_x", "scale", "bias", "mean", "inverse_std", "grad_scale", "grad_bias", *_MAPS,
    "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row", "grad_block", "grad_channel", "grad_row",
    "grad_x_block", "grad_x_channel", "grad_x_row", "f_low", "f_high",
)  # fmt: skip
def batch_norm_gradient_channels(lanes: int, again: int) -> Body:
    """Write the gradients of input, scale and bias, and y; see ``normalization.batch_norm_gradient``. Job: map."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, grad_out, grad_x, scale, bias, mean, inverse_std, grad_scale, grad_bias, blocks, rows, columns,
         x_block, x_channel, x_row, y_block, y_channel, y_row, grad_block, grad_channel, grad_row, grad_x_block,
         grad_x_channel, grad_x_row) = arguments(args, 25)  # fmt: skip
        low, high = broadcast(load_f32(args + 200), lanes), broadcast(load_f32(args + 208), lanes)
        zero = broadcast(0.0, lanes)
        share = broadcast(1.0 / (blocks * rows * columns), lanes)
        for group in range(first, last):
            middle, inverse = load(mean + group * step, lanes), load(inverse_std + group * step, lanes)
            factor, offset = load(scale + group * step, lanes) * inverse, load(bias + group * step, lanes)
            total, product = broadcast(0.0, lanes), broadcast(0.0, lanes)
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    grads = grad_out + block * grad_block + group * grad_channel + row * grad_row
                    part, along = broadcast(0.0, lanes), broadcast(0.0, lanes)
                    for i in range(columns):
                        away = load(source + i * step, lanes) - middle
                        value = fma(away, factor, offset)
                        grad = load(grads + i * step, lanes)
                        grad = select_gt(value, low, select_gt(high, value, grad, zero), zero)
                        part = part + grad
                        along = fma(grad, away, along)
                    total, product = total + part, product + along
            store(grad_bias + group * step, total)
            store(grad_scale + group * step, product * inverse)
            shift = total * share
            slope = product * inverse * inverse * share
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    grads = grad_out + block * grad_block + group * grad_channel + row * grad_row
                    target = grad_x + block * grad_x_block + group * grad_x_channel + row * grad_x_row
                    result = y + block * y_block + group * y_channel + row * y_row
                    for i in range(columns):
                        away = load(source + i * step, lanes) - middle
                        value = fma(away, factor, offset)
                        if again:
                            store(result + i * step, minimum(maximum(value, low), high))
                        grad = load(grads + i * step, lanes)
                        grad = select_gt(value, low, select_gt(high, value, grad, zero), zero)
                        store(target + i * step, (grad - shift - away * slope) * factor)

    return body


@kernel(
    "x", "y", "grad_out", "more", "grad_sum", "grad_x", "scale", "mean", "inverse_std", "grad_scale", "grad_bias",
    *_MAPS, "x_block", "x_channel", "x_row", "y_block", "y_channel", "y_row", "grad_block", "grad_channel", "grad_row",
    "more_block", "more_channel", "more_row", "grad_sum_block", "grad_sum_channel", "grad_sum_row", "grad_x_block",
    "grad_x_channel", "grad_x_row", "f_low", "f_high",
)  # fmt: skip
def residual_norm_gradient_channels(lanes: int, sums: int) -> Body:
    """Write the gradients of ``y = clip(norm(x) + addend)``; see ``normalization.residual_norm_gradient``. Job: map."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, grad_out, more, grad_sum, grad_x, scale, mean, inverse_std, grad_scale, grad_bias, blocks, rows, columns,
         x_block, x_channel, x_row, y_block, y_channel, y_row, grad_block, grad_channel, grad_row, more_block,
         more_channel, more_row, grad_sum_block, grad_sum_channel, grad_sum_row, grad_x_block, grad_x_channel,
         grad_x_row) = arguments(args, 32)  # fmt: skip
        low, high = broadcast(load_f32(args + 256), lanes), broadcast(load_f32(args + 264), lanes)
        zero = broadcast(0.0, lanes)
        share = broadcast(1.0 / (blocks * rows * columns), lanes)
        for group in range(first, last):
            middle, inverse = load(mean + group * step, lanes), load(inverse_std + group * step, lanes)
            total, product = zero, zero
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    result = y + block * y_block + group * y_channel + row * y_row
                    grads = grad_out + block * grad_block + group * grad_channel + row * grad_row
                    others = more + block * more_block + group * more_channel + row * more_row
                    target = grad_sum + block * grad_sum_block + group * grad_sum_channel + row * grad_sum_row
                    part, along = zero, zero
                    for i in range(columns):
                        away, value = load(source + i * step, lanes) - middle, load(result + i * step, lanes)
                        grad = load(grads + i * step, lanes)
                        if sums:
                            grad = grad + load(others + i * step, lanes)
                        grad = select_gt(value, low, select_gt(high, value, grad, zero), zero)
                        store(target + i * step, grad)
                        part = part + grad
                        along = fma(grad, away, along)
                    total, product = total + part, product + along
            store(grad_bias + group * step, total)
            store(grad_scale + group * step, product * inverse)
            factor = load(scale + group * step, lanes) * inverse
            shift, slope = total * share, product * inverse * inverse * share
            for block in range(blocks):
                for row in range(rows):
                    source = x + block * x_block + group * x_channel + row * x_row
                    grads = grad_sum + block * grad_sum_block + group * grad_sum_channel + row * grad_sum_row
                    target = grad_x + block * grad_x_block + group * grad_x_channel + row * grad_x_row
                    for i in range(columns):
                        away = load(source + i * step, lanes) - middle
                        store(target + i * step, (load(grads + i * step, lanes) - shift - away * slope) * factor)

    return body


@kernel("logits", "probabilities", "labels", "losses", "correct", "classes", "logits_block", "f_smoothing")
def cross_entropy_channels() -> Body:
    """Write softmax, loss, and 1 where the first largest logit is the label's, of one sample. Job: sample.

    The logits of a sample are ``classes`` consecutive float32; see ``loss.cross_entropy``.
    """

    def body(args: int, first: int, last: int) -> None:
        logits, probabilities, labels, losses, correct, classes, logits_block = arguments(args, 7)
        smoothing = load_f32(args + 56)
        for sample in range(first, last):
            source, target = logits + sample * logits_block, probabilities + sample * logits_block
            best, winner = load_f32(source), 0
            for k in range(1, classes):
                if load_f32(source + 4 * k) > best:
                    best, winner = load_f32(source + 4 * k), k
            total = 0.0
            for k in range(classes):
                total += math.exp(load_f32(source + 4 * k) - best)
            log_total = math.log(total) + best
            loss = 0.0
            label = load_i64(labels + 8 * sample)
            for k in range(classes):
                away = log_total - load_f32(source + 4 * k)
                store_f32(target + 4 * k, math.exp(-away))
                loss += smoothing / classes * away
                if k == label:
                    loss += (1.0 - smoothing) * away
            store_f32(losses + 4 * sample, loss)
            store_f32(correct + 4 * sample, 1.0 if winner == label else 0.0)

    return body


@kernel("probabilities", "labels", "grad_logits", "classes", "padded", "samples", "logits_block", "f_smoothing")
def cross_entropy_gradient_channels() -> Body:
    """Write ``(probability - target) / N``, 0 in the ``padded - classes`` lanes behind the last class. Job: sample."""

    def body(args: int, first: int, last: int) -> None:
        probabilities, labels, grad_logits, classes, padded, samples, logits_block = arguments(args, 7)
        smoothing = load_f32(args + 56)
        for sample in range(first, last):
            source, target = probabilities + sample * logits_block, grad_logits + sample * logits_block
            label = load_i64(labels + 8 * sample)
            for k in range(classes):
                wanted = smoothing / classes + (1.0 - smoothing if k == label else 0.0)
                store_f32(target + 4 * k, (load_f32(source + 4 * k) - wanted) / samples)
            for k in range(classes, padded):
                store_f32(target + 4 * k, 0.0)

    return body


@kernel("y", "target", "losses", "correct", "channels", "rows", "columns", "y_block", "y_channel", "y_row",
        "target_block", "target_channel", "target_row")  # fmt: skip
def squared_error_channels(lanes: int) -> Body:
    """Write a sample's mean of ``(y - target) ** 2``. Job: sample."""

    def body(args: int, first: int, last: int) -> None:
        (y, target, losses, correct, channels, rows, columns, y_block, y_channel, y_row, target_block, target_channel,
         target_row) = arguments(args, 13)  # fmt: skip
        for sample in range(first, last):
            total = 0.0
            for c in range(channels):
                left = y + sample * y_block + c // lanes * y_channel + 4 * (c % lanes)
                right = target + sample * target_block + c // lanes * target_channel + 4 * (c % lanes)
                for r in range(rows):
                    for i in range(columns):
                        wanted = load_f32(right + r * target_row + 4 * lanes * i)
                        away = load_f32(left + r * y_row + 4 * lanes * i) - wanted
                        total += away * away
            store_f32(losses + 4 * sample, total / (channels * rows * columns))
            store_f32(correct + 4 * sample, 0.0)

    return body


@kernel("y", "target", "grad_y", "samples", "channels", "maps", "rows", "columns", "y_block", "y_channel", "y_row",
        "target_block", "target_channel", "target_row", "grad_block", "grad_channel", "grad_row")  # fmt: skip
def squared_error_gradient_channels(lanes: int) -> Body:
    """Write ``2 (y - target) / (N * size)``, 0 in the lanes behind the last channel. Job: (sample, map)."""

    def body(args: int, first: int, last: int) -> None:
        (y, target, grad_y, samples, channels, maps, rows, columns, y_block, y_channel, y_row, target_block,
         target_channel, target_row, grad_block, grad_channel, grad_row) = arguments(args, 17)  # fmt: skip
        factor = 2.0 / (samples * channels * rows * columns)
        for job in range(first, last):
            sample, group = job // maps, job % maps
            for lane in range(lanes):
                scale = factor if group * lanes + lane < channels else 0.0
                left = y + sample * y_block + group * y_channel + 4 * lane
                right = target + sample * target_block + group * target_channel + 4 * lane
                place = grad_y + sample * grad_block + group * grad_channel + 4 * lane
                for r in range(rows):
                    for i in range(columns):
                        wanted = load_f32(right + r * target_row + 4 * lanes * i)
                        away = load_f32(left + r * y_row + 4 * lanes * i) - wanted
                        store_f32(place + r * grad_row + 4 * lanes * i, away * scale if scale > 0.0 else 0.0)

    return body


@kernel("x", "y", "channels", "rows", "columns", "x_channel", "x_row", "x_pixel")
def expand_channels(lanes: int) -> Body:
    """Copy a parameter (byte strides, 0 repeats) to maps ``[channel / lanes][row][column][lanes]``. Job: map."""

    def body(args: int, first: int, last: int) -> None:
        x, y, channels, rows, columns, x_channel, x_row, x_pixel = arguments(args, 8)
        for group in range(first, last):
            for lane in range(lanes):
                channel = group * lanes + lane
                for row in range(rows):
                    for column in range(columns):
                        value = 0.0
                        if channel < channels:
                            value = load_f32(x + channel * x_channel + row * x_row + column * x_pixel)
                        store_f32(y + 4 * lanes * ((group * rows + row) * columns + column) + 4 * lane, value)

    return body


@kernel(
    "x", "y", "blocks", "channels", "rows", "columns", "y_channels", "y_rows", "y_columns", "x_block", "x_channel",
    "x_row",
)  # fmt: skip
def sum_samples_scalars(lanes: int) -> Body:
    """Sum all samples' maps to the shape of any parameter; see ``elementwise.sum_samples``. Job: channel of y."""

    def body(args: int, first: int, last: int) -> None:
        (x, y, blocks, channels, rows, columns, y_channels, y_rows, y_columns, x_block, x_channel,
         x_row) = arguments(args, 12)  # fmt: skip
        deep, high, wide = channels // y_channels, rows // y_rows, columns // y_columns
        for channel in range(first, last):
            for row in range(y_rows):
                for column in range(y_columns):
                    total = 0.0
                    for block in range(blocks):
                        for c in range(channel, channel + deep):
                            source = x + block * x_block + c // lanes * x_channel + 4 * (c % lanes)
                            for r in range(row, row + high):
                                for i in range(column, column + wide):
                                    total += load_f32(source + r * x_row + 4 * lanes * i)
                    store_f32(y + 4 * ((channel * y_rows + row) * y_columns + column), total)

    return body


@kernel(
    "x", "y", "state", "stream", "channels", "maps", "rows", "columns", "x_block", "x_channel", "x_row", "y_block",
    "y_channel", "y_row", "f_ratio",
)  # fmt: skip
def dropout_channels(lanes: int) -> Body:
    """Zero a share ``ratio`` of the elements; the same decisions as ``random.dropout``. Job: (sample, map)."""

    def body(args: int, first: int, last: int) -> None:
        (x, y, state, stream, channels, maps, rows, columns, x_block, x_channel, x_row, y_block, y_channel,
         y_row) = arguments(args, 14)  # fmt: skip
        ratio = load_f32(args + 112)
        keep = 1.0 / (1.0 - ratio) if ratio < 1.0 else 0.0
        threshold = np.uint64(ratio * 4294967296.0)
        key = stream_key(load_i64(state + 16), load_i64(state + 8), stream)
        for job in range(first, last):
            sample, group = job // maps, job % maps
            for lane in range(lanes):
                channel = group * lanes + lane
                for row in range(rows):
                    for column in range(columns):
                        place = row * x_row + 4 * (column * lanes + lane)
                        element = ((sample * channels + channel) * rows + row) * columns + column
                        bits = mixed(key + np.uint64(element)) >> np.uint64(32)
                        value = load_f32(x + sample * x_block + group * x_channel + place) * keep
                        alive = channel < channels and bits >= threshold
                        target = y + sample * y_block + group * y_channel + row * y_row + 4 * (column * lanes + lane)
                        store_f32(target, value if alive else 0.0)

    return body
