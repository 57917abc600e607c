"""Layers with PyTorch's names and initialisation, shared by the model files.

A convolution ``conv1`` makes the parameters ``conv1.weight`` and ``conv1.bias``, a
batch normalisation ``bn1`` makes ``bn1.weight``, ``bn1.bias``, ``bn1.running_mean``
and ``bn1.running_var``: the keys of a PyTorch ``state_dict``. The distributions are
PyTorch's too; the numbers come from ``np.random.default_rng(seed)``, in the order
in which the layers are built.

Sources: He et al., "Delving Deep into Rectifiers", ICCV 2015, equations 10 and 14;
``torch.nn.modules.conv.reset_parameters``.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Literal

import numpy as np

from edgetrain.errors import ModelError
from edgetrain.graph import Graph

Initialization = Literal["kaiming_uniform", "kaiming_normal"]


class Layers:
    """Appends layers to a new graph; each method takes and returns value names.

    Args:
        name: of the graph.
        input_shape: without the batch dimension.
        seed: of the initial weights.
        initialization: of the weights of convolutions and linear layers: ``kaiming_uniform`` is PyTorch's
            default (``a = sqrt(5)``, hence bounds of ``1 / sqrt(fan_in)``), ``kaiming_normal`` has a
            standard deviation of ``sqrt(2 / fan_in)``. Biases are uniform within ``1 / sqrt(fan_in)`` in both.
    """

    def __init__(
        self, name: str, input_shape: Sequence[int], seed: int, initialization: Initialization = "kaiming_uniform"
    ) -> None:
        self.graph = Graph(name, input_shape=input_shape)
        self._rng = np.random.default_rng(seed)
        self._initialization = initialization

    @property
    def input(self) -> str:
        """Name of the input value."""
        return self.graph.inputs[0]

    def shape(self, x: str) -> tuple[int, ...]:
        """Return the shape of a value without the batch dimension."""
        return self.graph.values[x].shape

    def conv(
        self, x: str, name: str, channels: int, kernel: Sequence[int], *, stride: int = 1,
        pads: Sequence[int] | None = None, groups: int = 1, bias: bool = False,
    ) -> str:  # fmt: skip
        """Append a convolution of ``(C, ...)`` to ``(channels, ...)``.

        Args:
            x: input value, ``(C, H, W)`` or ``(C, W)``.
            name: prefix of the parameters, and name of the node.
            channels: of the output.
            kernel: one size per spatial axis.
            stride: the same along every axis.
            pads: ONNX order, all beginnings before all ends; none by default.
            groups: the number of input channels for a depthwise convolution.
            bias: whether there is one; pointless in front of a batch normalisation.
        """
        fan_in = self.shape(x)[0] // groups * math.prod(kernel)
        inputs = [x, *self._weights(name, (channels, self.shape(x)[0] // groups, *kernel), fan_in, bias)]
        return self.graph.add(
            "Conv", inputs, name=name, kernel_shape=list(kernel), strides=[stride] * len(kernel),
            pads=list(pads or [0] * 2 * len(kernel)), group=groups,
        )  # fmt: skip

    def linear(self, x: str, name: str, features: int) -> str:
        """Append a fully connected layer of ``(F,)`` to ``(features,)``, with bias."""
        (fan_in,) = self.shape(x)
        return self.graph.add("Gemm", [x, *self._weights(name, (features, fan_in), fan_in, True)], name=name, transB=1)

    def batch_norm(self, x: str, name: str) -> str:
        """Append a batch normalisation with scale 1, bias 0 and fresh running averages."""
        ones, zeros = np.ones(self.shape(x)[0]), np.zeros(self.shape(x)[0])
        inputs = [
            x,
            self.graph.parameter(f"{name}.weight", ones),
            self.graph.parameter(f"{name}.bias", zeros),
            self.graph.parameter(f"{name}.running_mean", zeros, trainable=False),
            self.graph.parameter(f"{name}.running_var", ones, trainable=False),
        ]
        return self.graph.add("BatchNormalization", inputs, name=name, epsilon=1e-5, momentum=0.9)

    def relu(self, x: str) -> str:
        """Append a rectifier."""
        return self.graph.add("Relu", [x])

    def max_pool(self, x: str) -> str:
        """Append a maximum over windows of 2 along every spatial axis that do not overlap."""
        twos = [2] * (len(self.shape(x)) - 1)
        return self.graph.add("MaxPool", [x], kernel_shape=twos, strides=twos)

    def pooled_features(self, x: str) -> str:
        """Append the mean over all positions: ``(C, ...)`` to ``(C,)``."""
        return self.flatten(self.graph.add("GlobalAveragePool", [x]))

    def flatten(self, x: str) -> str:
        """Append the flattening of ``(C, H, W)`` to ``(C * H * W,)``."""
        return self.graph.add("Flatten", [x], axis=1)

    def finish(self, logits: str) -> Graph:
        """Return the graph with its output set."""
        self.graph.set_outputs([logits])
        return self.graph

    def _weights(self, name: str, shape: tuple[int, ...], fan_in: int, bias: bool) -> list[str]:
        bound = 1.0 / math.sqrt(fan_in)
        if self._initialization == "kaiming_normal":
            weight = self._rng.normal(0.0, math.sqrt(2.0) * bound, shape)
        else:
            weight = self._rng.uniform(-bound, bound, shape)
        names = [self.graph.parameter(f"{name}.weight", weight)]
        if bias:
            names.append(self.graph.parameter(f"{name}.bias", self._rng.uniform(-bound, bound, shape[0])))
        return names


def checked_shape(model: str, input_shape: Sequence[int], layout: str, minimum: int = 1) -> tuple[int, ...]:
    """Return an input shape as integers.

    Args:
        model: name for the error.
        input_shape: without the batch dimension.
        layout: names of the axes, such as ``"(C, H, W)"``.
        minimum: smallest spatial size.

    Raises:
        ModelError: the number of axes or a size does not fit the model.
    """
    shape = tuple(_integer(model, "a size of input_shape", size) for size in input_shape)
    if len(shape) != layout.count(",") + 1 or shape[0] < 1:
        raise ModelError(f"{model}: input_shape is {tuple(input_shape)}, expected {layout} without the batch dimension")
    if min(shape[1:]) < minimum:
        raise ModelError(f"{model}: input_shape {shape} is too small, every spatial size must be at least {minimum}")
    return shape


def checked_count(model: str, what: str, value: int) -> int:
    """Return a count as an int; ``what`` names it in the error.

    Raises:
        ModelError: not an integer, or below 1.
    """
    count = _integer(model, what, value)
    if count < 1:
        raise ModelError(f"{model}: {what} is {count}, expected at least 1")
    return count


def _integer(model: str, what: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ModelError(f"{model}: {what} is {value!r}, expected an integer") from None
