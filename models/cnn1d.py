"""A convolutional network for windows of sensor signals."""

from __future__ import annotations

from collections.abc import Sequence

from edgetrain.graph import Graph

from ._layers import Layers, checked_count, checked_shape

_LAYERS = ((32, 8), (64, 5), (64, 3))  # (channels, kernel): the paper's kernels, a quarter to a half of its channels


def cnn1d(input_shape: Sequence[int] = (6, 128), num_classes: int = 6, *, seed: int = 0) -> Graph:
    """Build a fully convolutional network: three 1-D convolutions with batch normalisation, the mean, a linear layer.

    The defaults fit 2.56 seconds of accelerometer and gyroscope at 50 Hz and six human
    activities. Maximum pooling by 2 after the first two layers, which the paper does not
    have, keeps the cost low. Kernels are padded so that the length stays.

    Source: Wang, Yan, Oates, "Time Series Classification from Scratch with Deep Neural
    Networks: A Strong Baseline", IJCNN 2017, section II.B (kernels 8, 5, 3; 128, 256, 128
    channels there).

    Args:
        input_shape: ``(C, W)`` with W at least 4; ``(C, 1, W)`` means the same.
        num_classes: length of the output.
        seed: of the initial weights.

    Raises:
        ModelError: the window is too short or an argument is malformed.

    Example:
        >>> graph = cnn1d()
        >>> graph.output_shape, graph.parameter_count
        ((6,), 24774)
    """
    net = Layers("cnn1d", checked_shape("cnn1d", _without_height(input_shape), "(C, W)", minimum=4), seed)
    x = net.input
    for index, (channels, kernel) in enumerate(_LAYERS, start=1):
        x = net.conv(x, f"conv{index}", channels, (kernel,), pads=((kernel - 1) // 2, kernel // 2))
        x = net.relu(net.batch_norm(x, f"bn{index}"))
        if index < len(_LAYERS):
            x = net.max_pool(x)
    return net.finish(net.linear(net.pooled_features(x), "fc", checked_count("cnn1d", "num_classes", num_classes)))


def _without_height(shape: Sequence[int]) -> Sequence[int]:
    return (shape[0], shape[2]) if len(shape) == 3 and shape[1] == 1 else shape
