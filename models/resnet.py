"""Residual networks for small images (CIFAR style) with shortcuts free of parameters."""

from __future__ import annotations

from collections.abc import Sequence

from edgetrain.errors import ModelError
from edgetrain.graph import Graph

from ._layers import Layers, checked_count, checked_shape

_WIDTHS = (16, 32, 64)


def resnet(input_shape: Sequence[int] = (3, 32, 32), num_classes: int = 10, *, depth: int = 20, seed: int = 0) -> Graph:
    """Build a residual network of ``6 n + 2`` layers: three stages of ``n`` blocks with 16, 32 and 64 channels.

    The second and third stage begin with stride 2. Their shortcut is the paper's option A:
    every second pixel, new channels filled with zeros, half of them in front of the old
    ones and half behind, as in the widespread PyTorch version. Weights are
    drawn from the normal distribution of He et al. 2015.

    Source: He, Zhang, Ren, Sun, "Deep Residual Learning for Image Recognition", CVPR 2016,
    section 4.2 (0.27 million parameters for depth 20, table 6).

    Args:
        input_shape: ``(C, H, W)``, any size from 4x4.
        num_classes: length of the output.
        depth: 8, 14, 20, ... 110: ``6 n + 2``.
        seed: of the initial weights.

    Raises:
        ModelError: no network of that depth, or an argument is malformed.

    Example:
        >>> graph = resnet()
        >>> graph.output_shape, graph.parameter_count
        ((10,), 269722)
    """
    blocks = _blocks_per_stage(depth)
    net = Layers(f"resnet{depth}", checked_shape("resnet", input_shape, "(C, H, W)", 4), seed, "kaiming_normal")
    x = net.conv(net.input, "conv1", _WIDTHS[0], (3, 3), pads=(1, 1, 1, 1))
    x = net.relu(net.batch_norm(x, "bn1"))
    for stage, channels in enumerate(_WIDTHS, start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            x = _basic_block(net, x, f"layer{stage}.{block}", channels, stride)
    return net.finish(net.linear(net.pooled_features(x), "fc", checked_count("resnet", "num_classes", num_classes)))


def _blocks_per_stage(depth: int) -> int:
    count = checked_count("resnet", "depth", depth)
    if not 8 <= count <= 110 or (count - 2) % 6:
        raise ModelError(f"resnet: depth is {count}, expected 6 n + 2 from 8 to 110: 8, 14, 20, 32, 44, 56, 110 ...")
    return (count - 2) // 6


def _basic_block(net: Layers, x: str, name: str, channels: int, stride: int) -> str:
    y = net.conv(x, f"{name}.conv1", channels, (3, 3), stride=stride, pads=(1, 1, 1, 1))
    y = net.relu(net.batch_norm(y, f"{name}.bn1"))
    y = net.conv(y, f"{name}.conv2", channels, (3, 3), pads=(1, 1, 1, 1))
    y = net.batch_norm(y, f"{name}.bn2")
    shortcut = x if stride == 1 else _option_a(net, x, f"{name}.shortcut", channels)
    return net.relu(net.graph.add("Add", [y, shortcut], name=f"{name}.add"))


def _option_a(net: Layers, x: str, name: str, channels: int) -> str:
    # A mean over 1x1 windows with stride 2 picks every second pixel, and unlike MaxPool it saves no indices.
    x = net.graph.add("AveragePool", [x], name=name, kernel_shape=[1, 1], strides=[2, 2])
    front = (channels - net.shape(x)[0]) // 2
    behind = channels - net.shape(x)[0] - front
    return net.graph.add("Pad", [x], name=f"{name}.pad", pads=[0, front, 0, 0, 0, behind, 0, 0], value=0.0)
