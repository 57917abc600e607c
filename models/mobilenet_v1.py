"""MobileNet version 1: depthwise separable convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from edgetrain.errors import ModelError
from edgetrain.graph import Graph

from ._layers import Layers, checked_count, checked_shape

# (channels, stride) of the 13 separable blocks, table 1 of the paper
_BLOCKS = (
    (64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2),
    (512, 1), (512, 1), (512, 1), (512, 1), (512, 1), (1024, 2), (1024, 1),
)  # fmt: skip
_SMALLEST_LAYER = 8


def mobilenet_v1(
    input_shape: Sequence[int] = (3, 96, 96), num_classes: int = 10, *, width: float = 1.0, seed: int = 0
) -> Graph:
    """Build MobileNet: a 3x3 convolution and 13 depthwise separable blocks, 32 times smaller maps at the end.

    Source: Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile
    Vision Applications", arXiv:1704.04861, 2017, table 1; widths are rounded down and at
    least 8, as in the authors' code.

    Args:
        input_shape: ``(C, H, W)`` of any size.
        num_classes: length of the output.
        width: multiplies the channels of every layer (alpha in the paper), above 0 and at most 4.
        seed: of the initial weights.

    Raises:
        ModelError: an argument is malformed.

    Example:
        >>> graph = mobilenet_v1()
        >>> graph.output_shape, graph.parameter_count
        ((10,), 3217226)
        >>> mobilenet_v1(num_classes=2, width=0.25).parameter_count
        213586
    """
    if not (math.isfinite(width) and 0 < width <= 4):
        raise ModelError(f"mobilenet_v1: width is {width}, expected a factor above 0 and at most 4, such as 0.25")
    name = "mobilenet_v1" if width == 1 else f"mobilenet_v1_{width:g}"
    net = Layers(name, checked_shape("mobilenet_v1", input_shape, "(C, H, W)"), seed)
    x = net.conv(net.input, "conv1", _scaled(32, width), (3, 3), stride=2, pads=(1, 1, 1, 1))
    x = net.relu(net.batch_norm(x, "bn1"))
    for index, (channels, stride) in enumerate(_BLOCKS):
        x = _separable(net, x, f"blocks.{index}", _scaled(channels, width), stride)
    classes = checked_count("mobilenet_v1", "num_classes", num_classes)
    return net.finish(net.linear(net.pooled_features(x), "fc", classes))


def _scaled(channels: int, width: float) -> int:
    return max(_SMALLEST_LAYER, int(channels * width))


def _separable(net: Layers, x: str, name: str, channels: int, stride: int) -> str:
    before = net.shape(x)[0]
    x = net.conv(x, f"{name}.depthwise", before, (3, 3), stride=stride, pads=(1, 1, 1, 1), groups=before)
    x = net.relu(net.batch_norm(x, f"{name}.bn1"))
    x = net.conv(x, f"{name}.pointwise", channels, (1, 1))
    return net.relu(net.batch_norm(x, f"{name}.bn2"))
