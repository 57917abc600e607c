"""LeNet-5 with rectifiers and maximum pooling."""

from __future__ import annotations

from collections.abc import Sequence

from edgetrain.graph import Graph

from ._layers import Layers, checked_count, checked_shape


def lenet5(input_shape: Sequence[int] = (1, 28, 28), num_classes: int = 10, *, seed: int = 0) -> Graph:
    """Build LeNet-5: two 5x5 convolutions with pooling, three linear layers.

    The first convolution pads by 2, so a 28x28 image takes the paper's path of 32x32:
    maps of 28x28, 14x14, 10x10, 5x5. Rectifiers and maximum pooling stand in for the
    paper's scaled tanh and trainable subsampling, and the last layer is linear, as in
    every modern version.

    Source: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document
    Recognition", Proceedings of the IEEE 86(11), 1998, section II.B.

    Args:
        input_shape: ``(C, H, W)``, H and W at least 12.
        num_classes: length of the output.
        seed: of the initial weights.

    Raises:
        ModelError: the input is too small or an argument is malformed.

    Example:
        >>> graph = lenet5()
        >>> graph.output_shape, graph.parameter_count
        ((10,), 61706)
    """
    shape = checked_shape("lenet5", input_shape, "(C, H, W)", minimum=12)
    net = Layers("lenet5", shape, seed)
    x = net.max_pool(net.relu(net.conv(net.input, "conv1", 6, (5, 5), pads=(2, 2, 2, 2), bias=True)))
    x = net.max_pool(net.relu(net.conv(x, "conv2", 16, (5, 5), bias=True)))
    x = net.relu(net.linear(net.flatten(x), "fc1", 120))
    x = net.relu(net.linear(x, "fc2", 84))
    return net.finish(net.linear(x, "fc3", checked_count("lenet5", "num_classes", num_classes)))
