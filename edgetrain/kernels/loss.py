"""Losses and their gradients, per sample; ``state`` starts with the number of samples (int64)."""

from __future__ import annotations

import math

from edgetrain.kernels.elementwise import exponential
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    fma,
    load,
    load_f32,
    load_i64,
    maximum,
    store,
    store_f32,
    store_f64,
)


@kernel("logits", "probabilities", "labels", "losses", "correct", "state", "classes", "logits_block", "f_smoothing")
def cross_entropy(lanes: int) -> Body:
    """Write softmax probabilities, the loss of every sample, and 1 where the first largest logit is the label's.

    ``logits`` and ``probabilities`` are ``[block][class][lanes]``, ``labels`` int64, ``losses`` and
    ``correct`` float32 per lane (0 without a sample). Label smoothing: Szegedy et al. 2016,
    section 7, as ``torch.nn.CrossEntropyLoss(label_smoothing)``. Job: block.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        logits, probabilities, labels, losses, correct, state, classes, logits_block = arguments(args, 8)
        smoothing = load_f32(args + 64)
        count = load_i64(state)
        for block in range(first, last):
            source, target = logits + block * logits_block, probabilities + block * logits_block
            best = load(source, lanes)
            for k in range(1, classes):
                best = maximum(best, load(source + k * step, lanes))
            total = broadcast(0.0, lanes)
            for k in range(classes):
                power = exponential(load(source + k * step, lanes) - best, lanes)
                total = total + power
                store(target + k * step, power)
            inverse = broadcast(1.0, lanes) / total
            for k in range(classes):
                store(target + k * step, load(target + k * step, lanes) * inverse)
            store(losses + block * step, total)
            store(correct + block * step, best)
            for lane in range(lanes):
                sample = block * lanes + lane
                loss, hit = 0.0, 0.0
                if sample < count:
                    label = load_i64(labels + 8 * sample)
                    column = source + 4 * lane
                    top = load_f32(correct + 4 * sample)
                    log_total = math.log(load_f32(losses + 4 * sample)) + top
                    chosen = load_f32(column + label * step)
                    loss = (1.0 - smoothing) * (log_total - chosen)
                    if smoothing > 0.0:
                        for k in range(classes):
                            loss += smoothing / classes * (log_total - load_f32(column + k * step))
                    hit = 1.0 if chosen == top else 0.0
                    for k in range(label):
                        if load_f32(column + k * step) == top:
                            hit = 0.0
                store_f32(losses + 4 * sample, loss)
                store_f32(correct + 4 * sample, hit)

    return body


@kernel("probabilities", "labels", "grad_logits", "mask", "state", "classes", "logits_block", "f_smoothing")
def cross_entropy_gradient(lanes: int) -> Body:
    """Write ``(probability - target) / N``, 0 in lanes without a sample. Job: block."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        probabilities, labels, grad_logits, mask, state, classes, logits_block = arguments(args, 7)
        smoothing = load_f32(args + 56)
        count = load_i64(state)
        for block in range(first, last):
            source, target = probabilities + block * logits_block, grad_logits + block * logits_block
            share = load(mask + block * step, lanes) * broadcast(1.0 / count, lanes)
            for k in range(classes):
                spread = broadcast(smoothing / classes, lanes)
                store(target + k * step, (load(source + k * step, lanes) - spread) * share)
            for lane in range(lanes):
                sample = block * lanes + lane
                if sample < count:
                    place = target + load_i64(labels + 8 * sample) * step + 4 * lane
                    store_f32(place, load_f32(place) - (1.0 - smoothing) / count)

    return body


@kernel("y", "target", "losses", "correct", "channels", "rows", "columns", "y_block", "y_channel", "y_row",
        "target_block", "target_channel", "target_row", "mask")  # fmt: skip
def squared_error(lanes: int) -> Body:
    """Write every sample's mean of ``(y - target) ** 2``. Job: block."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (y, target, losses, correct, channels, rows, columns, y_block, y_channel, y_row, target_block, target_channel,
         target_row, mask) = arguments(args, 14)  # fmt: skip
        for block in range(first, last):
            total = broadcast(0.0, lanes)
            for c in range(channels):
                for r in range(rows):
                    left = y + block * y_block + c * y_channel + r * y_row
                    right = target + block * target_block + c * target_channel + r * target_row
                    for i in range(columns):
                        away = load(left + i * step, lanes) - load(right + i * step, lanes)
                        total = fma(away, away, total)
            share = load(mask + block * step, lanes) * broadcast(1.0 / (channels * rows * columns), lanes)
            store(losses + block * step, total * share)
            store(correct + block * step, broadcast(0.0, lanes))

    return body


@kernel("y", "target", "grad_y", "channels", "rows", "columns", "y_block", "y_channel", "y_row",
        "target_block", "target_channel", "target_row", "grad_block", "grad_channel", "grad_row", "mask",
        "state")  # fmt: skip
def squared_error_gradient(lanes: int) -> Body:
    """Write ``2 (y - target) / (N * size)``, 0 in lanes without a sample. Job: block."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (y, target, grad_y, channels, rows, columns, y_block, y_channel, y_row, target_block, target_channel,
         target_row, grad_block, grad_channel, grad_row, mask, state) = arguments(args, 17)  # fmt: skip
        factor = 2.0 / (load_i64(state) * channels * rows * columns)
        for block in range(first, last):
            share = load(mask + block * step, lanes) * broadcast(factor, lanes)
            for c in range(channels):
                for r in range(rows):
                    left = y + block * y_block + c * y_channel + r * y_row
                    right = target + block * target_block + c * target_channel + r * target_row
                    place = grad_y + block * grad_block + c * grad_channel + r * grad_row
                    for i in range(columns):
                        away = load(left + i * step, lanes) - load(right + i * step, lanes)
                        store(place + i * step, away * share)

    return body


@kernel("losses", "correct", "result", "state")
def mean_loss() -> Body:
    """Write the mean loss and the number of correct samples as two float64, summed in order. One job."""

    def body(args: int, first: int, last: int) -> None:
        losses, correct, result, state = arguments(args, 4)
        count = load_i64(state)
        total, hits = 0.0, 0.0
        for sample in range(count):
            total += load_f32(losses + 4 * sample)
            hits += load_f32(correct + 4 * sample)
        store_f64(result, total / count)
        store_f64(result + 8, hits)

    return body
