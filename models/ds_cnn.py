"""DS-CNN: keyword spotting with depthwise separable convolutions."""

from __future__ import annotations

from collections.abc import Sequence

from edgetrain.graph import Graph

from ._layers import Layers, checked_count, checked_shape

_CHANNELS = 64
_BLOCKS = 4


def ds_cnn(input_shape: Sequence[int] = (1, 49, 10), num_classes: int = 12, *, seed: int = 0) -> Graph:
    """Build the small DS-CNN: a 10x4 convolution of stride 2, four separable blocks, the mean, a linear layer.

    The input is one second of speech: 49 frames of 40 ms with 10 mel-frequency cepstral
    coefficients each. The first convolution is padded so that its maps are 25x5 (TensorFlow's
    SAME, as in the authors' code). The classes are ten words, "silence" and "unknown".

    Source: Zhang, Suda, Lai, Chandra, "Hello Edge: Keyword Spotting on Microcontrollers",
    arXiv:1711.07128, 2017, section 4 and table 5 (DS-CNN, small).

    Args:
        input_shape: ``(C, frames, coefficients)``, any size from 2x2.
        num_classes: length of the output.
        seed: of the initial weights.

    Raises:
        ModelError: the input is too small or an argument is malformed.

    Example:
        >>> graph = ds_cnn()
        >>> graph.output_shape, graph.parameter_count
        ((12,), 23180)
    """
    net = Layers("ds_cnn", checked_shape("ds_cnn", input_shape, "(C, frames, coefficients)", 2), seed)
    x = net.conv(net.input, "conv1", _CHANNELS, (10, 4), stride=2, pads=(4, 1, 5, 1))
    x = net.relu(net.batch_norm(x, "bn1"))
    for index in range(_BLOCKS):
        x = _separable(net, x, f"blocks.{index}")
    return net.finish(net.linear(net.pooled_features(x), "fc", checked_count("ds_cnn", "num_classes", num_classes)))


def _separable(net: Layers, x: str, name: str) -> str:
    x = net.conv(x, f"{name}.depthwise", _CHANNELS, (3, 3), pads=(1, 1, 1, 1), groups=_CHANNELS)
    x = net.relu(net.batch_norm(x, f"{name}.bn1"))
    x = net.conv(x, f"{name}.pointwise", _CHANNELS, (1, 1))
    return net.relu(net.batch_norm(x, f"{name}.bn2"))
