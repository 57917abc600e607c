"""Kernels that treat every pixel alike: activations, sums, products, broadcasts and their reductions."""

from __future__ import annotations

from typing import Any

from numba import njit

from edgetrain.kernels.codes import (
    ADD,
    CLIP,
    ELU,
    HARD_SIGMOID,
    HARD_SWISH,
    LEAKY_RELU,
    RELU,
    SIGMOID,
    TANH,
)
from edgetrain.kernels.registry import Body, kernel
from edgetrain.kernels.simd import (
    arguments,
    broadcast,
    floor,
    fma,
    load,
    load_f32,
    maximum,
    minimum,
    pack,
    power_of_two,
    select_gt,
    select_same,
    store,
    store_f32,
    sum_lanes,
    unpack,
    whole,
)


@njit
def exponential(x: Any, width: Any) -> Any:
    """Return ``exp(x)`` of a vector to about 2 units in the last place.

    ``exp(x) = 2**n * exp(r)`` with ``|r| <= ln(2)/2``; coefficients of the degree-6
    Taylor polynomial, ``ln 2`` in two parts (Cody and Waite, 1980, chapter 6).
    """
    x = minimum(maximum(x, broadcast(-87.0, width)), broadcast(88.0, width))
    n = floor(fma(x, broadcast(1.4426950408889634, width), broadcast(0.5, width)))
    r = fma(n, broadcast(-0.693359375, width), x)
    r = fma(n, broadcast(2.12194440e-4, width), r)
    p = broadcast(1.0 / 720.0, width)
    p = fma(p, r, broadcast(1.0 / 120.0, width))
    p = fma(p, r, broadcast(1.0 / 24.0, width))
    p = fma(p, r, broadcast(1.0 / 6.0, width))
    p = fma(p, r, broadcast(0.5, width))
    p = fma(p, r, broadcast(1.0, width))
    p = fma(p, r, broadcast(1.0, width))
    return p * power_of_two(n)


@njit
def hyperbolic_tangent(x, width):  # type: ignore[no-untyped-def]
    """Return ``tanh(x)`` of a vector to about 5 units in the last place, near 0 too.

    The rational function ``x * p(x**2) / q(x**2)`` that Eigen uses (``generic_fast_tanh_float``); from
    exponentials, ``1 - 2 / (1 + exp(2 x))`` would keep no digit of a small x.
    """
    x = minimum(maximum(x, broadcast(-7.99881172180175781, width)), broadcast(7.99881172180175781, width))
    square = x * x
    p = broadcast(-2.76076847742355e-16, width)
    p = fma(p, square, broadcast(2.00018790482477e-13, width))
    p = fma(p, square, broadcast(-8.60467152213735e-11, width))
    p = fma(p, square, broadcast(5.12229709037114e-08, width))
    p = fma(p, square, broadcast(1.48572235717979e-05, width))
    p = fma(p, square, broadcast(6.37261928875436e-04, width))
    p = fma(p, square, broadcast(4.89352455891786e-03, width))
    q = broadcast(1.19825839466702e-06, width)
    q = fma(q, square, broadcast(1.18534705686654e-04, width))
    q = fma(q, square, broadcast(2.26843463243900e-03, width))
    q = fma(q, square, broadcast(4.89352518554385e-03, width))
    return x * p / q


@kernel("x", "y", "rows", "vectors", "x_plane", "x_row", "y_plane", "y_row", "f_a", "f_b")
def unary(lanes: int, function: int) -> Body:
    """Write ``y = function(x)``; job: plane of ``rows`` x ``vectors``. ``a`` and ``b`` are the function's constants."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        x, y, rows, vectors, x_plane, x_row, y_plane, y_row = arguments(args, 8)
        a, b = broadcast(load_f32(args + 64), lanes), broadcast(load_f32(args + 72), lanes)
        zero, one = broadcast(0.0, lanes), broadcast(1.0, lanes)
        for plane in range(first, last):
            for row in range(rows):
                source, target = x + plane * x_plane + row * x_row, y + plane * y_plane + row * y_row
                for i in range(vectors):
                    value = load(source + i * step, lanes)
                    if function == RELU:
                        value = maximum(value, zero)
                    elif function == LEAKY_RELU:
                        value = select_gt(value, zero, value, value * a)
                    elif function == CLIP:
                        value = minimum(maximum(value, a), b)
                    elif function == SIGMOID:
                        value = one / (one + exponential(zero - value, lanes))
                    elif function == TANH:
                        value = hyperbolic_tangent(value, lanes)
                    elif function == HARD_SIGMOID:
                        value = minimum(maximum(fma(value, a, b), zero), one)
                    elif function == HARD_SWISH:
                        value = value * minimum(maximum(fma(value, a, b), zero), one)
                    elif function == ELU:
                        below = a * (exponential(minimum(value, zero), lanes) - one)
                        value = select_gt(value, zero, value, below)
                    else:
                        value = fma(value, a, b)
                    store(target + i * step, value)

    return body


@kernel(
    "saved", "grad_out", "grad_x", "rows", "vectors", "saved_plane", "saved_row", "grad_plane", "grad_row",
    "grad_x_plane", "grad_x_row", "f_a", "f_b",
)  # fmt: skip
def unary_gradient(lanes: int, function: int) -> Body:
    """Write ``grad_x = grad_out * function'``; job: plane.

    ``saved`` is the function's output, except for LeakyRelu and HardSwish, where it is the input.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (saved, grad_out, grad_x, rows, vectors, saved_plane, saved_row, grad_plane, grad_row,
         grad_x_plane, grad_x_row) = arguments(args, 11)  # fmt: skip
        a, b = broadcast(load_f32(args + 88), lanes), broadcast(load_f32(args + 96), lanes)
        zero, one = broadcast(0.0, lanes), broadcast(1.0, lanes)
        for plane in range(first, last):
            for row in range(rows):
                kept = saved + plane * saved_plane + row * saved_row
                source = grad_out + plane * grad_plane + row * grad_row
                target = grad_x + plane * grad_x_plane + row * grad_x_row
                for i in range(vectors):
                    v, g = load(kept + i * step, lanes), load(source + i * step, lanes)
                    if function == RELU:
                        g = select_gt(v, zero, g, zero)
                    elif function == LEAKY_RELU:
                        g = select_gt(v, zero, g, g * a)
                    elif function == CLIP:
                        g = select_gt(v, a, select_gt(b, v, g, zero), zero)
                    elif function == SIGMOID:
                        g = g * v * (one - v)
                    elif function == TANH:
                        g = g * (one - v * v)
                    elif function == HARD_SIGMOID:
                        g = select_gt(v, zero, select_gt(one, v, g * a, zero), zero)
                    elif function == HARD_SWISH:
                        gate = fma(v, a, b)
                        inner = g * fma(v, a, gate)
                        g = select_gt(gate, zero, select_gt(one, gate, inner, g), zero)
                    elif function == ELU:
                        g = select_gt(v, zero, g, g * (v + a))
                    else:
                        g = g * a
                    store(target + i * step, g)

    return body


@kernel("y", "mask", "rows", "vectors", "y_plane", "y_row", "mask_plane")
def keep_mask(lanes: int) -> Body:
    """Write one bit per number: whether it is positive; 32 vectors share a word per lane. Job: plane.

    ``lanes``: of vectors that may hold neighbouring pixels (``lowering_core.row_lanes``). What reads the bits must have
    the same: ``apply_mask``, or ``normalization.residual_norm_gradient`` with its ``width``.
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        y, mask, rows, vectors, y_plane, y_row, mask_plane = arguments(args, 7)
        zero, none, one = broadcast(0.0, lanes), whole(0, lanes), whole(1, lanes)
        for plane in range(first, last):
            word, packed, place = none, 0, mask + plane * mask_plane
            for row in range(rows):
                source = y + plane * y_plane + row * y_row
                for i in range(vectors):
                    word = pack(word, select_gt(load(source + i * step, lanes), zero, one, none), packed)
                    packed += 1
                    if packed == 32:
                        store(place, word)
                        word, packed, place = none, 0, place + step
            if packed:
                store(place, word)

    return body


@kernel("mask", "grad_out", "grad_x", "rows", "vectors", "mask_plane", "grad_plane", "grad_row", "grad_x_plane",
        "grad_x_row")  # fmt: skip
def apply_mask(lanes: int) -> Body:
    """Write the gradient where the bit that ``keep_mask`` wrote is set, else 0. Job: plane."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (mask, grad_out, grad_x, rows, vectors, mask_plane, grad_plane, grad_row, grad_x_plane,
         grad_x_row) = arguments(args, 10)  # fmt: skip
        zero, none = broadcast(0.0, lanes), whole(0, lanes)
        for plane in range(first, last):
            packed, place = 0, mask + plane * mask_plane
            word = load(place, lanes)
            for row in range(rows):
                source, target = grad_out + plane * grad_plane + row * grad_row, grad_x + plane * grad_x_plane
                for i in range(vectors):
                    if packed == 32:
                        packed, place = 0, place + step
                        word = load(place, lanes)
                    grad = load(source + i * step, lanes)
                    share = select_same(unpack(word, packed, 1), none, zero, grad)
                    store(target + row * grad_x_row + i * step, share)
                    packed += 1

    return body


@kernel(
    "a", "b", "y", "channels", "rows", "vectors",
    "a_block", "a_channel", "a_row", "a_pixel", "b_block", "b_channel", "b_row", "b_pixel",
    "y_block", "y_channel", "y_row",
)  # fmt: skip
def binary(lanes: int, function: int) -> Body:
    """Write ``y = a + b`` or ``y = a * b``; a stride of 0 repeats an operand. Job: (block, channel)."""
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (a, b, y, channels, rows, vectors, a_block, a_channel, a_row, a_pixel, b_block, b_channel, b_row, b_pixel,
         y_block, y_channel, y_row) = arguments(args, 17)  # fmt: skip
        for job in range(first, last):
            block, channel = job // channels, job % channels
            for row in range(rows):
                left = a + block * a_block + channel * a_channel + row * a_row
                right = b + block * b_block + channel * b_channel + row * b_row
                target = y + block * y_block + channel * y_channel + row * y_row
                for i in range(vectors):
                    v, w = load(left + i * a_pixel, lanes), load(right + i * b_pixel, lanes)
                    store(target + i * step, v + w if function == ADD else v * w)

    return body


@kernel("x", "y", "rows", "columns", "x_channel", "x_row", "x_pixel")
def expand(lanes: int) -> Body:
    """Copy a parameter (float32, byte strides, 0 repeats) to dense lanes ``[channel][row][column][lanes]``.

    Job: channel.
    """

    def body(args: int, first: int, last: int) -> None:
        x, y, rows, columns, x_channel, x_row, x_pixel = arguments(args, 7)
        for channel in range(first, last):
            for row in range(rows):
                for column in range(columns):
                    scalar = load_f32(x + channel * x_channel + row * x_row + column * x_pixel)
                    target = y + 4 * lanes * ((channel * rows + row) * columns + column)
                    store(target, broadcast(scalar, lanes))

    return body


@kernel(
    "x", "y", "channels", "rows", "columns", "y_channels", "y_rows", "y_columns", "x_block", "x_channel", "x_row",
    "y_block", "y_channel", "y_row",
)  # fmt: skip
def sum_maps(lanes: int) -> Body:
    """Sum every sample's maps to a smaller shape, each size of ``y`` being that of ``x`` or 1.

    Job: (block, channel of y).
    """
    step = 4 * lanes

    def body(args: int, first: int, last: int) -> None:
        (x, y, channels, rows, columns, y_channels, y_rows, y_columns, x_block, x_channel, x_row,
         y_block, y_channel, y_row) = arguments(args, 14)  # fmt: skip
        deep, high, wide = channels // y_channels, rows // y_rows, columns // y_columns
        for job in range(first, last):
            block, channel = job // y_channels, job % y_channels
            for row in range(y_rows):
                for column in range(y_columns):
                    total = broadcast(0.0, lanes)
                    for c in range(channel, channel + deep):
                        for r in range(row, row + high):
                            source = x + block * x_block + c * x_channel + r * x_row + column * step
                            for i in range(wide):
                                total = total + load(source + i * step, lanes)
                    store(y + block * y_block + channel * y_channel + row * y_row + column * step, total)

    return body


@kernel(
    "x", "y", "blocks", "channels", "rows", "columns", "y_channels", "y_rows", "y_columns",
    "x_block", "x_channel", "x_row",
)  # fmt: skip
def sum_samples(lanes: int) -> Body:
    """Sum all samples' maps to the shape of a parameter (dense float32), each of its sizes being that of ``x`` or 1.

    Lanes without a sample hold zeros in every gradient. Job: channel of y. Rows are
    added in float64, so that the sum over a large batch keeps its accuracy.
    """
    step = 4 * lanes

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
                            for r in range(row, row + high):
                                source = x + block * x_block + c * x_channel + r * x_row + column * step
                                part = broadcast(0.0, lanes)
                                for i in range(wide):
                                    part = part + load(source + i * step, lanes)
                                total += sum_lanes(part)
                    store_f32(y + 4 * ((channel * y_rows + row) * y_columns + column), total)

    return body
