"""What the kernels mean, in plain NumPy written to be read.

Arrays have the batch dimension first and their ONNX shapes; any float dtype works
(tests use float64). Maps are ``(N, C, H, W)``. Nothing here is fast.

``g`` is a window's geometry: ``kernel``, ``strides``, ``dilations``, ``pads``, ``size``
and ``out`` as in ``ops.geometry.Window``, and for convolutions also ``groups``,
``channels_in`` and ``channels_out``. The examples use this one, on 2x3 maps:

>>> from types import SimpleNamespace
>>> g = SimpleNamespace(kernel=(2, 2), strides=(1, 1), dilations=(1, 1), pads=(0, 0, 0, 0), size=(2, 3), out=(1, 2),
...                     groups=1, channels_in=1, channels_out=1, divisors=([2], [2, 2]))
>>> x = np.array([[[[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]]]])
>>> grad_out = np.array([[[[1.0, 10.0]]]])
>>> w = np.array([[[[1.0, 0.0], [0.0, -1.0]]]])
>>> [(i, j, view.ravel().tolist()) for i, j, view in taps(x, (1, 2), (1, 2), (1, 1), (2, 1))]
[(0, 0, [1.0, 4.0]), (0, 1, [2.0, 5.0])]
>>> conv(x, w, np.array([0.5]), g)
array([[[[-3.5, -4.5]]]])
>>> conv_input_gradient(grad_out, w, g)
array([[[[  1.,  10.,   0.],
         [  0.,  -1., -10.]]]])
>>> conv_weight_gradient(x, grad_out, g)
array([[[[21., 32.],
         [54., 75.]]]])
>>> max_pool(x, g)
array([[[[5., 7.]]]])
>>> max_pool_positions(x, g)
array([[[[3, 3]]]])
>>> max_pool_gradient(max_pool_positions(x, g), grad_out, g)
array([[[[ 0.,  0.,  0.],
         [ 0.,  1., 10.]]]])
>>> average_pool(x, g)
array([[[[3.  , 4.25]]]])
>>> average_pool_gradient(grad_out, g)
array([[[[0.25, 2.75, 2.5 ],
         [0.25, 2.75, 2.5 ]]]])
>>> channelwise(np.ones(1), x).shape
(1, 1, 1, 1)
>>> sum_to(x, (2, 1))
array([[ 6.],
       [16.]])
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Pads = tuple[int, int, int, int]  # top, left, bottom, right


def pad(x: Array, pads: Pads, value: float = 0.0) -> Array:
    """Surround maps ``(N, C, H, W)`` with a constant.

    Example:
        >>> pad(np.ones((1, 1, 1, 2)), (0, 1, 1, 0))
        array([[[[0., 1., 1.],
                 [0., 0., 0.]]]])
    """
    top, left, bottom, right = pads
    return np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=value)


def taps(
    x: Array, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], out: Sequence[int]
) -> Iterator[tuple[int, int, Array]]:
    """Yield ``(i, j, view)``: the pixels ``(N, C, OH, OW)`` of padded maps that meet kernel position (i, j)."""
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            rows = slice(i * dilations[0], i * dilations[0] + (out[0] - 1) * strides[0] + 1, strides[0])
            columns = slice(j * dilations[1], j * dilations[1] + (out[1] - 1) * strides[1] + 1, strides[1])
            yield i, j, x[:, :, rows, columns]


def _pad_to_fit(x: Array, g: Any, value: float = 0.0) -> Array:
    """Pad as the geometry says, and further if the last window reaches beyond that."""
    top, left, bottom, right = g.pads
    need = [(o - 1) * s + (k - 1) * d + 1 for o, s, k, d in zip(g.out, g.strides, g.kernel, g.dilations, strict=True)]
    bottom = max(bottom, need[0] - x.shape[2] - top)
    right = max(right, need[1] - x.shape[3] - left)
    return pad(x, (top, left, bottom, right), value)


def conv(x: Array, w: Array, b: Array | None, g: Any) -> Array:
    """Convolution: ``y[n,o,h,w] = b[o] + sum x[n, c, h*s + i*d - p, ...] * w[o,c,i,j]`` within each group."""
    padded = _pad_to_fit(x, g)
    y = np.zeros((x.shape[0], w.shape[0], *g.out), x.dtype)
    for group in range(g.groups):
        inputs = slice(group * w.shape[1], (group + 1) * w.shape[1])
        outputs = slice(group * w.shape[0] // g.groups, (group + 1) * w.shape[0] // g.groups)
        for i, j, view in taps(padded, g.kernel, g.strides, g.dilations, g.out):
            y[:, outputs] += np.einsum("nchw,oc->nohw", view[:, inputs], w[outputs, :, i, j])
    return y if b is None else y + b[:, None, None]


def conv_input_gradient(grad_out: Array, w: Array, g: Any) -> Array:
    """Gradient of the convolution's input, ``(N, C, H, W)``."""
    padded = _pad_to_fit(np.zeros((grad_out.shape[0], g.channels_in, *g.size), grad_out.dtype), g)
    for group in range(g.groups):
        inputs = slice(group * w.shape[1], (group + 1) * w.shape[1])
        outputs = slice(group * w.shape[0] // g.groups, (group + 1) * w.shape[0] // g.groups)
        for i, j, view in taps(padded, g.kernel, g.strides, g.dilations, g.out):
            view[:, inputs] += np.einsum("nohw,oc->nchw", grad_out[:, outputs], w[outputs, :, i, j])
    top, left = g.pads[:2]
    return padded[:, :, top : top + g.size[0], left : left + g.size[1]]


def conv_weight_gradient(x: Array, grad_out: Array, g: Any) -> Array:
    """Gradient of the convolution's weights, ``(O, C / groups, KH, KW)``."""
    padded, per_group = _pad_to_fit(x, g), g.channels_in // g.groups
    grad = np.zeros((g.channels_out, per_group, *g.kernel), x.dtype)
    for group in range(g.groups):
        inputs = slice(group * per_group, (group + 1) * per_group)
        outputs = slice(group * g.channels_out // g.groups, (group + 1) * g.channels_out // g.groups)
        for i, j, view in taps(padded, g.kernel, g.strides, g.dilations, g.out):
            grad[outputs, :, i, j] = np.einsum("nohw,nchw->oc", grad_out[:, outputs], view[:, inputs])
    return grad


def max_pool(x: Array, g: Any) -> Array:
    """Largest value of every window; padding never wins."""
    padded = _pad_to_fit(x, g, -np.inf)
    return np.max([view for _, _, view in taps(padded, g.kernel, g.strides, g.dilations, g.out)], axis=0)


def max_pool_positions(x: Array, g: Any) -> Array:
    """Number, row by row, of the first largest pixel of every window (the kernels count pixels inside the map only)."""
    padded = _pad_to_fit(x, g, -np.inf)
    return np.argmax([view for _, _, view in taps(padded, g.kernel, g.strides, g.dilations, g.out)], axis=0)


def max_pool_gradient(positions: Array, grad_out: Array, g: Any) -> Array:
    """Each window's gradient goes to the pixel at its position."""
    grad = _pad_to_fit(np.zeros((*grad_out.shape[:2], *g.size), grad_out.dtype), g)
    for number, (_, _, target) in enumerate(taps(grad, g.kernel, g.strides, g.dilations, g.out)):
        target += np.where(positions == number, grad_out, 0)
    top, left = g.pads[:2]
    return grad[:, :, top : top + g.size[0], left : left + g.size[1]]


def pack(numbers: Array, bits: int) -> Array:
    """Pack whole numbers ``(N, C, ...)`` of ``bits`` bits into uint32 words ``(N, C, words)``, the first one lowest.

    Example:
        >>> pack(np.array([[[1, 0, 3]]]), 2), unpack(pack(np.array([[[1, 0, 3]]]), 2), 2, (1, 1, 3))
        (array([[[49]]], dtype=uint32), array([[[1, 0, 3]]]))
    """
    per_word, flat = 32 // bits, numbers.reshape(*numbers.shape[:2], -1).astype(np.uint32)
    padded = np.pad(flat, ((0, 0), (0, 0), (0, -flat.shape[2] % per_word)))
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    return np.bitwise_or.reduce(padded.reshape(*flat.shape[:2], -1, per_word) << shifts, axis=-1)


def unpack(words: Array, bits: int, shape: tuple[int, ...]) -> Array:
    """Return the numbers of a shape that ``pack`` packed, as int64."""
    numbers = (words[..., None] >> np.arange(0, 32, bits, dtype=np.uint32)) & np.uint32((1 << bits) - 1)
    return numbers.reshape(*shape[:2], -1)[:, :, : math.prod(shape[2:])].reshape(shape).astype(np.int64)


def average_pool(x: Array, g: Any) -> Array:
    """Sum of every window over its number of pixels (``g.divisors``: per output row, per output column)."""
    padded = _pad_to_fit(x, g)
    total = np.sum([view for _, _, view in taps(padded, g.kernel, g.strides, g.dilations, g.out)], axis=0)
    return total / np.outer(*g.divisors).astype(x.dtype)


def average_pool_gradient(grad_out: Array, g: Any) -> Array:
    """Spread every output gradient evenly over its window."""
    padded = _pad_to_fit(np.zeros((*grad_out.shape[:2], *g.size), grad_out.dtype), g)
    share = grad_out / np.outer(*g.divisors).astype(grad_out.dtype)
    for _, _, view in taps(padded, g.kernel, g.strides, g.dilations, g.out):
        view += share
    top, left = g.pads[:2]
    return padded[:, :, top : top + g.size[0], left : left + g.size[1]]


def channelwise(v: Array, x: Array) -> Array:
    """Reshape a vector of channels so that it broadcasts over ``x`` ``(N, C, ...)``."""
    return v.reshape(1, -1, *([1] * (x.ndim - 2)))


def batch_norm(x: Array, scale: Array, bias: Array, epsilon: float) -> tuple[Array, Array, Array, Array]:
    """Normalise with the batch's statistics; returns (y, mean, biased variance, 1 / sqrt(variance + epsilon)).

    Example:
        >>> y, mean, variance, inverse = batch_norm(np.array([[1.0], [3.0]]), np.array([2.0]), np.array([5.0]), 0.0)
        >>> y.ravel(), mean, variance, inverse
        (array([3., 7.]), array([2.]), array([1.]), array([1.]))
    """
    axes = (0, *range(2, x.ndim))
    mean, variance = x.mean(axes), x.var(axes)
    inverse = 1 / np.sqrt(variance + epsilon)
    y = (x - channelwise(mean, x)) * channelwise(inverse * scale, x) + channelwise(bias, x)
    return y, mean, variance, inverse


def batch_norm_gradient(x: Array, grad_out: Array, scale: Array, mean: Array, inverse: Array) -> tuple[Array, ...]:
    """Gradients of input, scale and bias.

    Example:
        >>> values = np.array([[0.0], [1.0], [2.0]])
        >>> _, mean, _, inverse = batch_norm(values, np.ones(1), np.zeros(1), 0.0)
        >>> grads = batch_norm_gradient(values, np.array([[1.0], [0.0], [1.0]]), np.ones(1), mean, inverse)
        >>> [grad.ravel().round(3).tolist() for grad in grads]
        [[0.408, -0.816, 0.408], [0.0], [2.0]]
    """
    axes = (0, *range(2, x.ndim))
    unit = (x - channelwise(mean, x)) * channelwise(inverse, x)
    grad_scale, grad_bias = (grad_out * unit).sum(axes), grad_out.sum(axes)
    count = x.size / x.shape[1]
    centred = grad_out - channelwise(grad_bias / count, x) - unit * channelwise(grad_scale / count, x)
    return centred * channelwise(scale * inverse, x), grad_scale, grad_bias


def largest(x: Array, density: float) -> Array:
    """That share of the numbers, the largest in size, and zeros: all whose size is that of the last to be kept.

    Example:
        >>> largest(np.array([3.0, -1.0, 2.0, -4.0]), 0.5)
        array([ 3.,  0.,  0., -4.])
    """
    sizes = np.abs(x)
    limit = np.sort(sizes, axis=None)[-max(1, math.ceil(density * sizes.size))]
    return np.where(sizes >= limit, x, 0)


def softmax(logits: Array) -> Array:
    """Softmax over axis 1.

    Example:
        >>> softmax(np.log([[1.0, 3.0]]))
        array([[0.25, 0.75]])
    """
    power = np.exp(logits - logits.max(1, keepdims=True))
    return power / power.sum(1, keepdims=True)


def smooth_targets(labels: Array, classes: int, smoothing: float) -> Array:
    """One-hot targets ``(N, classes)`` mixed with the uniform distribution.

    Example:
        >>> smooth_targets(np.array([1]), 2, 0.5)
        array([[0.25, 0.75]])
    """
    return (1 - smoothing) * np.eye(classes)[labels] + smoothing / classes


def sum_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sum ``x`` over leading and broadcast axes down to ``shape``."""
    x = x.sum(tuple(range(x.ndim - len(shape)))) if x.ndim > len(shape) else x
    axes = tuple(i for i, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if want == 1 and have > 1)
    return x.sum(axes, keepdims=True)
