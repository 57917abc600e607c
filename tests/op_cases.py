"""One table of small networks that between them use every operator in every way it can be used.

A case is one or a few nodes between two products with trainable arrays: the array before makes the input
gradient observable, the array behind keeps the operator's own output from being the network's (so that it may be
overwritten, and its gradient is not uniform). ``CASES`` feeds the tests of kernels, gradients, PyTorch agreement,
memory and threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.graph import Graph, Shape

Array = NDArray[Any]


class Net:
    """Builds a graph with seeded parameters; method names are the operators'."""

    def __init__(self, shape: Shape) -> None:
        self.graph = Graph("case", shape)
        self.rng = np.random.default_rng(len(shape) + sum(shape))

    def parameter(self, *shape: int, spread: float = 1.0, trainable: bool = True) -> str:
        """Add normally distributed numbers."""
        array = self.rng.normal(0.0, spread, shape)
        return self.graph.parameter(f"p{len(self.graph.arrays)}", array, trainable)

    def positive(self, *shape: int, trainable: bool = True) -> str:
        """Add numbers between 0.5 and 1.5."""
        array = self.rng.uniform(0.5, 1.5, shape)
        return self.graph.parameter(f"p{len(self.graph.arrays)}", array, trainable)

    def shape(self, value: str) -> Shape:
        """Return a value's shape per sample."""
        return self.graph.values[value].shape

    def __getattr__(self, op_type: str) -> Callable[..., str]:
        if not op_type[:1].isupper():
            raise AttributeError(op_type)
        return lambda *inputs, **attributes: self.graph.add(op_type, inputs, **attributes)

    def conv(self, x: str, *weight: int, bias: bool = True, **attributes: Any) -> str:
        """Convolve with weights of a shape."""
        spread = float(np.prod(weight[1:])) ** -0.5
        inputs = [x, self.parameter(*weight, spread=spread)] + ([self.parameter(weight[0])] if bias else [])
        return self.Conv(*inputs, **attributes)

    def norm(self, x: str, **attributes: Any) -> str:
        """Normalise over the batch."""
        channels = self.shape(x)[0]
        learned = [self.positive(channels), self.parameter(channels)]
        running = [self.parameter(channels, trainable=False), self.positive(channels, trainable=False)]
        return self.BatchNormalization(x, *learned, *running, **attributes)


@dataclass(frozen=True)
class Case:
    """A network and how to feed it.

    Attributes:
        id: shown by pytest.
        shape: of one sample.
        build: adds the nodes under test behind a value and returns the last one's output.
        loss: of training.
        label_smoothing: of cross-entropy.
        wide: also tested with 8 and 16 lanes (each costs compiling, so one or two cases per kernel).
        least: smallest batch for which the result is defined.
        spread: of the normally distributed inputs.
        bare: without the products before and behind.
    """

    id: str
    shape: Shape
    build: Callable[[Net, str], str]
    loss: str = "mse"
    label_smoothing: float = 0.0
    wide: bool = False
    least: int = 1
    spread: float = 1.0
    bare: bool = False

    def graph(self) -> Graph:
        """Return the network, the same at every call."""
        net = Net(self.shape)
        x = "input" if self.bare else net.Mul("input", net.positive(*self.shape))
        y = self.build(net, x)
        net.graph.set_outputs([y if self.bare else net.Mul(y, net.positive(*net.shape(y)))])
        return net.graph

    def batch(self, count: int) -> tuple[Array, Array]:
        """Return inputs and targets; a smaller batch is the beginning of a larger one."""
        x = np.stack([_rng(self, n).normal(0, self.spread, self.shape) for n in range(count)]).astype(np.float32)
        shape = self.graph().output_shape
        if self.loss == "cross_entropy":
            return x, np.array([_rng(self, n + 10**6).integers(shape[0]) for n in range(count)])
        return x, np.stack([_rng(self, n + 10**6).normal(size=shape) for n in range(count)]).astype(np.float32)


def _rng(case: Case, stream: int) -> np.random.Generator:
    return np.random.default_rng([stream, *case.id.encode()])


def one(
    name: str, shape: Shape, op_type: str, /, *, wide: bool = False, spread: float = 1.0, **attributes: Any
) -> Case:  # fmt: skip
    """One operator without parameters."""
    return Case(name, shape, lambda net, x: getattr(net, op_type)(x, **attributes), wide=wide, spread=spread)


def conv(name: str, shape: Shape, *weight: int, bias: bool = True, wide: bool = False, **attributes: Any) -> Case:
    """One convolution."""
    return Case(f"conv-{name}", shape, lambda net, x: net.conv(x, *weight, bias=bias, **attributes), wide=wide)


def convolutions() -> Iterable[Case]:
    """Conv, 2-D and 1-D."""
    same3, same5 = [1, 1, 1, 1], [2, 2, 2, 2]
    yield conv("1x1", (3, 5, 6), 5, 3, 1, 1, wide=True)
    yield conv("1x1-stride2", (4, 7, 7), 6, 4, 1, 1, strides=[2, 2])
    yield conv("1x1-stride2-even", (4, 6, 8), 6, 4, 1, 1, strides=[2, 2], bias=False)
    yield conv("3x3", (3, 8, 7), 8, 3, 3, 3, wide=True)
    yield conv("3x3-same", (5, 8, 8), 7, 5, 3, 3, pads=same3, wide=True)
    yield conv("3x3-no-bias", (1, 6, 6), 4, 1, 3, 3, pads=same3, bias=False)
    yield conv("3x3-one-output", (3, 6, 6), 1, 3, 3, 3, pads=same3)
    yield conv("3x3-many-channels", (17, 5, 5), 33, 17, 3, 3, pads=same3)
    yield conv("3x3-large-map", (2, 20, 21), 3, 2, 3, 3, pads=same3)
    yield conv("3x3-stride2", (4, 8, 8), 6, 4, 3, 3, strides=[2, 2], pads=same3)
    yield conv("3x3-stride2-odd", (3, 9, 7), 5, 3, 3, 3, strides=[2, 2], pads=same3)
    yield conv("3x3-stride3", (3, 10, 11), 4, 3, 3, 3, strides=[3, 3])
    yield conv("3x3-strides-1-2", (2, 7, 9), 5, 2, 3, 3, strides=[1, 2], pads=same3)
    yield conv("2x2-stride3", (3, 9, 10), 4, 3, 2, 2, strides=[3, 3])
    yield conv("2x2-stride3-pads", (3, 7, 8), 4, 3, 2, 2, strides=[3, 3], pads=[1, 0, 0, 1])
    yield conv("3x3-stride5-small-map", (2, 4, 4), 3, 2, 3, 3, strides=[5, 5], pads=same3)
    yield conv("3x3-one-pixel-map", (4, 1, 1), 5, 4, 3, 3, pads=same3)
    yield conv("3x3-one-pixel-map-stride2", (8, 1, 1), 16, 8, 3, 3, strides=[2, 2], pads=same3)
    yield conv("3x3-one-row-strides-2-1", (8, 1, 5), 16, 8, 3, 3, strides=[2, 1], pads=same3)
    yield conv("1x1-one-pixel-map", (20, 1, 1), 18, 20, 1, 1)
    yield conv("1x1-one-pixel-never-read", (8, 1, 1), 5, 8, 1, 1, strides=[2, 2], pads=[0, 1, 0, 1])
    yield conv("3x3-one-pixel-out", (4, 3, 3), 6, 4, 3, 3)
    yield conv("3x3-two-pixels-out", (4, 3, 4), 6, 4, 3, 3)
    yield conv("5x5", (2, 9, 9), 4, 2, 5, 5, pads=same5)
    yield conv("5x5-wider-than-map", (2, 3, 4), 3, 2, 5, 5, pads=same5)
    yield conv("3x5", (2, 7, 8), 3, 2, 3, 5)
    yield conv("1x7-stride-1-2", (3, 4, 12), 3, 3, 1, 7, strides=[1, 2], pads=[0, 3, 0, 3])
    yield conv("4x2", (3, 7, 6), 5, 3, 4, 2, pads=[1, 0, 2, 1])
    yield conv("pads-asymmetric", (3, 6, 6), 4, 3, 3, 3, pads=[0, 1, 2, 0])
    yield conv("pads-larger-than-needed", (2, 4, 5), 3, 2, 3, 3, pads=[4, 3, 5, 4])
    yield conv("pads-not-reached", (2, 6, 6), 3, 2, 3, 3, strides=[4, 4], pads=[1, 1, 2, 3])
    yield conv("pads-only-before", (2, 5, 5), 3, 2, 3, 3, strides=[2, 2], pads=[2, 2, 0, 0])
    yield conv("dilation2", (3, 9, 8), 4, 3, 3, 3, dilations=[2, 2], pads=same5)
    yield conv("dilations-1-3-strides-2-1", (2, 8, 12), 3, 2, 3, 3, dilations=[1, 3], strides=[2, 1])
    yield conv("dilation2-stride2", (3, 10, 10), 4, 3, 3, 3, dilations=[2, 2], strides=[2, 2], pads=same3)
    yield conv("dilation3-stride2", (2, 11, 11), 3, 2, 2, 3, dilations=[3, 3], strides=[2, 2], pads=same3)
    for mode in ("SAME_UPPER", "SAME_LOWER"):
        yield conv(f"{mode}-even-kernel", (3, 6, 7), 4, 3, 2, 4, auto_pad=mode)
        yield conv(f"{mode}-stride2", (3, 7, 8), 4, 3, 3, 3, auto_pad=mode, strides=[2, 2])
        yield conv(f"{mode}-stride3-dilation2", (2, 10, 9), 3, 2, 3, 2, auto_pad=mode, strides=[3, 3], dilations=[2, 2])
    yield conv("VALID", (3, 6, 7), 4, 3, 3, 3, auto_pad="VALID", strides=[2, 2])
    yield conv("groups2", (4, 6, 6), 6, 2, 3, 3, group=2, pads=same3)
    yield conv("groups3-odd", (9, 5, 6), 15, 3, 3, 3, group=3, pads=same3, strides=[2, 2])
    yield conv("groups5-one-output-each", (10, 5, 5), 5, 2, 3, 3, group=5)
    yield conv("groups2-1x1-no-bias", (6, 4, 4), 10, 3, 1, 1, group=2, bias=False)
    yield conv("groups2-one-pixel-map", (6, 1, 1), 10, 3, 1, 1, group=2)
    yield conv("depthwise", (5, 7, 7), 5, 1, 3, 3, group=5, pads=same3, wide=True)
    yield conv("depthwise-no-bias", (3, 6, 6), 3, 1, 3, 3, group=3, pads=same3, bias=False)
    yield conv("depthwise-stride2", (6, 9, 8), 6, 1, 3, 3, group=6, pads=same3, strides=[2, 2])
    yield conv("depthwise-5x5", (3, 8, 8), 3, 1, 5, 5, group=3, pads=same5)
    yield conv("depthwise-multiplier2", (3, 6, 7), 6, 1, 3, 3, group=3, pads=same3)
    yield conv("depthwise-dilation2", (3, 8, 9), 3, 1, 3, 3, group=3, dilations=[2, 2])
    yield conv("depthwise-one-pixel-map", (7, 1, 1), 7, 1, 1, 1, group=7)
    yield conv("1d", (3, 17), 5, 3, 3)
    yield conv("1d-same-stride2", (2, 16), 4, 2, 5, strides=[2], pads=[2, 2])
    yield conv("1d-dilation4", (3, 20), 4, 3, 3, dilations=[4], pads=[8, 0])
    yield conv("1d-stride-above-kernel", (3, 20), 4, 3, 2, strides=[5])
    yield conv("1d-depthwise", (4, 15), 4, 1, 3, group=4, pads=[1, 1])
    yield conv("1d-long", (1, 700), 2, 1, 9, strides=[2], pads=[4, 4])
    yield conv("1d-auto-pad", (2, 11), 3, 2, 4, auto_pad="SAME_LOWER", strides=[2])
    # Maps of whole 4 x 4 tiles and enough channels: Winograd's kernels (lowering_winograd.suits).
    yield conv("winograd", (16, 8, 8), 16, 16, 3, 3, pads=same3, wide=True)
    yield conv("winograd-one-tile", (12, 4, 4), 18, 12, 3, 3, pads=same3)
    yield conv("winograd-three-tiles", (20, 4, 12), 9, 20, 3, 3, pads=same3, bias=False)
    yield conv("winograd-pads-asymmetric", (16, 8, 8), 12, 16, 3, 3, pads=[2, 0, 0, 2], wide=True)
    yield conv("winograd-no-pads", (12, 10, 6), 16, 12, 3, 3)
    yield conv("winograd-odd-inputs", (18, 8, 4), 16, 18, 3, 3, pads=same3)
    yield conv("kernel-shape-given", (2, 5, 5), 3, 2, 3, 3, kernel_shape=[3, 3])


def dense() -> Iterable[Case]:
    """Gemm and MatMul."""

    def gemm(outputs: int, trans: int, bias: Shape | None) -> Callable[[Net, str], str]:
        def build(net: Net, x: str) -> str:
            inputs = net.shape(x)[0]
            weight = net.parameter(*((outputs, inputs) if trans else (inputs, outputs)))
            extra = [] if bias is None else [net.parameter(*bias)]
            return net.Gemm(x, weight, *extra, transB=trans)

        return build

    yield Case("gemm", (7,), gemm(5, 0, (5,)))
    yield Case("gemm-no-bias", (6,), gemm(9, 0, None))
    yield Case("gemm-transposed", (7,), gemm(5, 1, (5,)), wide=True)
    yield Case("gemm-transposed-no-bias", (33,), gemm(21, 1, None))
    yield Case("gemm-bias-of-one-row", (3,), gemm(4, 1, (1, 4)))
    yield Case("gemm-one-output", (5,), gemm(1, 1, (1,)))
    yield Case("gemm-one-input", (1,), gemm(4, 0, (4,)))
    yield Case("gemm-one-input-transposed", (1,), gemm(4, 1, (4,)))
    yield Case("gemm-one-input-one-output", (1,), gemm(1, 1, (1,)))
    yield Case("matmul", (9,), lambda net, x: net.MatMul(x, net.parameter(9, 6)))
    yield Case("matmul-one-output", (9,), lambda net, x: net.MatMul(x, net.parameter(9, 1)))
    yield Case("gemm-twice", (9,), lambda net, x: gemm(3, 0, (3,))(net, net.Relu(gemm(18, 1, (18,))(net, x))))


def activations() -> Iterable[Case]:
    """Element-wise functions, inputs on both sides of their kinks."""
    functions: tuple[tuple[str, str, dict[str, float]], ...] = (
        ("relu", "Relu", {}), ("leakyrelu", "LeakyRelu", {}), ("leakyrelu-0.3", "LeakyRelu", {"alpha": 0.3}),
        ("leakyrelu-0", "LeakyRelu", {"alpha": 0.0}), ("leakyrelu-negative", "LeakyRelu", {"alpha": -0.5}),
        ("relu6", "Clip", {"min": 0.0, "max": 6.0}), ("clip-min", "Clip", {"min": -0.7}),
        ("clip-max", "Clip", {"max": 0.7}), ("clip-none", "Clip", {}),
        ("clip-inexact-bounds", "Clip", {"min": -0.1, "max": 0.1}),
        ("sigmoid", "Sigmoid", {}), ("tanh", "Tanh", {}), ("hardsigmoid", "HardSigmoid", {}),
        ("hardsigmoid-torch", "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}), ("hardswish", "HardSwish", {}),
        ("elu", "Elu", {}), ("elu-0.3", "Elu", {"alpha": 0.3}), ("elu-0", "Elu", {"alpha": 0.0}),
    )  # fmt: skip
    for name, op_type, attributes in functions:
        yield one(name, (3, 5, 6), op_type, spread=4.0, wide=True, **attributes)
    yield one("tanh-small", (3, 4, 5), "Tanh", spread=1e-4)
    # With all inputs far out every gradient would be a rounding error: the slope comes from the output, as in PyTorch.
    yield one("tanh-large", (3, 9, 9), "Tanh", spread=8.0)
    yield one("sigmoid-large", (3, 9, 9), "Sigmoid", spread=8.0)
    yield one("relu-vector", (11,), "Relu")
    yield one("relu-signal", (3, 300), "Relu")
    yield one("identity", (3, 4, 5), "Identity")
    yield one("dropout-ratio-0", (3, 4, 5), "Dropout", ratio=0.0, wide=True)


def normalizations() -> Iterable[Case]:
    """BatchNormalization; a channel needs more than one number."""
    yield Case("batchnorm", (5, 6, 7), lambda net, x: net.norm(x), wide=True)
    # Of three numbers, mean and variance leave one direction: nothing but cancellation would be measured.
    yield Case("batchnorm-vector", (9,), lambda net, x: net.norm(net.Tanh(x)), least=4)
    yield Case("batchnorm-signal", (3, 400), lambda net, x: net.norm(x))
    yield Case("batchnorm-one-channel", (1, 4, 4), lambda net, x: net.norm(x))
    yield Case("batchnorm-epsilon", (3, 4, 5), lambda net, x: net.norm(x, epsilon=0.01, momentum=0.5))
    yield Case("batchnorm-between-convolutions", (3, 6, 6), lambda net, x: net.conv(
        net.Relu(net.norm(net.conv(x, 4, 3, 3, 3, pads=[1] * 4, bias=False))), 5, 4, 3, 3, pads=[1] * 4))  # fmt: skip
    same3 = [1] * 4

    def block(net: Net, x: str) -> str:
        inner = net.Relu(net.norm(net.conv(x, 5, 4, 3, 3, pads=same3, bias=False)))
        return net.Relu(net.Add(net.norm(net.conv(inner, 4, 5, 3, 3, pads=same3, bias=False)), x))

    yield Case("residual-relu", (3, 5, 6), lambda net, x: net.Relu(net.Add(net.norm(
        net.conv(x, 3, 3, 1, 1, bias=False)), x)), wide=True)  # fmt: skip
    yield Case("residual-clip", (3, 4, 5), lambda net, x: net.Clip(net.Add(x, net.norm(x)), min=-0.5, max=1.0))
    yield Case("residual-sum", (3, 4, 5), lambda net, x: net.conv(net.Add(net.norm(x), net.Tanh(x)), 4, 3, 3, 3))
    yield Case("residual-two-norms", (3, 4, 5), lambda net, x: net.Relu(net.Add(net.norm(x), net.norm(net.Tanh(x)))))
    yield Case("residual-blocks", (4, 6, 7), lambda net, x: block(net, block(net, x)), wide=True)
    yield Case("batchnorms-of-one-value", (3, 6, 6), lambda net, x: net.Add(
        net.conv(net.Relu(net.norm(x)), 4, 3, 3, 3), net.conv(net.norm(x), 4, 3, 3, 3)))  # fmt: skip
    yield Case("residual-repeated", (3, 4, 5), lambda net, x: net.Relu(net.Add(net.norm(x), net.GlobalAveragePool(x))))
    yield Case("residual-itself", (3, 4, 5), lambda net, x: (lambda y: net.Relu(net.Add(y, y)))(net.norm(x)))
    yield Case("residual-of-vectors", (6,), lambda net, x: net.Relu(net.Add(net.norm(x), net.Tanh(x))), least=4)
    # A Relu would leave little of the first one's gradient, as the second takes mean and scale away: one draw in ten is
    # off by more than 1e-5 in float32, whatever the order of summation.
    yield Case("batchnorm-twice", (3, 4, 4), lambda net, x: net.norm(net.Clip(net.norm(x), min=-0.2, max=0.3)))


def pools() -> Iterable[Case]:
    """MaxPool, AveragePool, GlobalAveragePool."""
    for kind, name in (("MaxPool", "maxpool"), ("AveragePool", "avgpool")):
        yield one(f"{name}-2x2", (3, 6, 8), kind, kernel_shape=[2, 2], strides=[2, 2], wide=True)
        # Windows that do not cover the map: the rest behind them, the rest of one that they overlap in, padding before.
        yield one(f"{name}-2x2-odd", (3, 7, 5), kind, kernel_shape=[2, 2], strides=[2, 2])
        yield one(f"{name}-last-pixel-unread", (2, 6, 6), kind, kernel_shape=[3, 3], strides=[2, 2])
        yield one(f"{name}-pads-before", (2, 6, 6), kind, kernel_shape=[3, 3], strides=[3, 3], pads=[1, 1, 0, 0])
        yield one(f"{name}-stride1-default", (3, 5, 5), kind, kernel_shape=[2, 3])
        yield one(f"{name}-overlap", (2, 9, 9), kind, kernel_shape=[3, 3], strides=[2, 2])
        yield one(f"{name}-pads", (3, 7, 7), kind, kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
        yield one(f"{name}-pads-asymmetric", (2, 6, 7), kind, kernel_shape=[3, 3], pads=[0, 1, 2, 0])
        yield one(f"{name}-stride-above-kernel", (2, 9, 10), kind, kernel_shape=[2, 2], strides=[3, 4])
        yield one(f"{name}-ceil", (2, 6, 7), kind, kernel_shape=[3, 3], strides=[2, 2], ceil_mode=1)
        yield one(f"{name}-ceil-pads", (2, 6, 6), kind, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4, ceil_mode=1)
        # A last window that would start behind the map and its left padding does not exist.
        yield one(f"{name}-ceil-less", (2, 5, 5), kind, kernel_shape=[2, 2], strides=[3, 3], pads=[1] * 4, ceil_mode=1)
        yield one(f"{name}-same-upper", (3, 7, 5), kind, kernel_shape=[2, 3], strides=[2, 2], auto_pad="SAME_UPPER")
        yield one(f"{name}-same-lower", (3, 7, 5), kind, kernel_shape=[2, 2], strides=[2, 2], auto_pad="SAME_LOWER")
        yield one(f"{name}-dilations", (2, 9, 8), kind, kernel_shape=[3, 2], dilations=[2, 3], pads=[1, 0, 1, 0])
        yield one(f"{name}-1d", (3, 15), kind, kernel_shape=[3], strides=[2], pads=[1, 1])
        yield one(f"{name}-1d-ceil", (3, 12), kind, kernel_shape=[5], strides=[3], ceil_mode=1)
        yield one(f"{name}-whole-map", (5, 4, 3), kind, kernel_shape=[4, 3])
        yield one(f"{name}-1x1", (5, 4, 3), kind, kernel_shape=[1, 1])
        yield Case(f"{name}-before-convolution", (3, 8, 8), lambda net, x, kind=kind: net.conv(
            getattr(net, kind)(x, kernel_shape=[2, 2], strides=[2, 2]), 4, 3, 3, 3, pads=[1] * 4))  # fmt: skip
        yield Case(f"{name}-after-convolution", (2, 7, 7), lambda net, x, kind=kind: getattr(net, kind)(
            net.conv(x, 3, 2, 3, 3, pads=[1] * 4), kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4))  # fmt: skip
    padded = {"kernel_shape": [3, 3], "strides": [2, 2], "count_include_pad": 1}
    yield one("avgpool-include-pad", (3, 7, 7), "AveragePool", pads=[1] * 4, **padded)
    yield one("avgpool-include-pad-asymmetric", (3, 6, 8), "AveragePool", pads=[2, 0, 1, 1], **padded)
    yield one("avgpool-include-pad-ceil", (3, 6, 6), "AveragePool", pads=[1] * 4, ceil_mode=1, **padded)
    yield one("avgpool-include-pad-dilations", (2, 9, 9), "AveragePool", pads=[1] * 4, dilations=[2, 2], **padded)
    yield Case("maxpool-ties", (2, 8, 8), lambda net, x: net.MaxPool(
        net.Relu(x), kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4))  # fmt: skip
    yield one("global-avgpool", (5, 6, 7), "GlobalAveragePool", wide=True)
    yield one("global-avgpool-1d", (3, 50), "GlobalAveragePool")
    yield one("global-avgpool-one-pixel", (3, 1, 1), "GlobalAveragePool")


def arithmetic() -> Iterable[Case]:
    """Add and Mul, every way to broadcast."""
    shape = (3, 4, 5)
    parameters: dict[str, Shape] = {
        "same": shape, "channels": (3, 1, 1), "map": (1, 4, 5), "rows": (4, 1), "columns": (5,), "one": (1,),
        "scalar": (), "batch-of-one": (1, 3, 1, 1), "channel-and-row": (3, 4, 1), "channel-and-column": (3, 1, 5),
    }  # fmt: skip
    for kind in ("Add", "Mul"):
        for name, size in parameters.items():
            yield Case(f"{kind.lower()}-parameter-{name}", shape, lambda net, x, kind=kind, size=size: getattr(
                net, kind)(x, net.parameter(*size)), wide=name == "channels")  # fmt: skip
        yield Case(f"{kind.lower()}-parameter-left", shape, lambda net, x, kind=kind: getattr(net, kind)(
            net.parameter(3, 1, 1), x))  # fmt: skip
        yield Case(f"{kind.lower()}-parameter-widens", (1, 4, 1), lambda net, x, kind=kind: getattr(net, kind)(
            net.parameter(3, 1, 5), x))  # fmt: skip
        yield Case(f"{kind.lower()}-parameter-vector", (6,), lambda net, x, kind=kind: getattr(net, kind)(
            x, net.parameter(6)))  # fmt: skip
        yield Case(f"{kind.lower()}-parameter-signal", (3, 9), lambda net, x, kind=kind: getattr(net, kind)(
            net.parameter(3, 1), x))  # fmt: skip
        yield Case(f"{kind.lower()}-itself", shape, lambda net, x, kind=kind: getattr(net, kind)(x, x), wide=True)
        yield Case(f"{kind.lower()}-itself-of-convolution", shape, lambda net, x, kind=kind: (
            lambda y: getattr(net, kind)(y, y))(net.conv(x, 4, 3, 3, 3)))  # fmt: skip
        yield Case(f"{kind.lower()}-values", shape, lambda net, x, kind=kind: getattr(net, kind)(
            net.conv(x, 3, 3, 1, 1), net.Tanh(x)))  # fmt: skip
        yield Case(f"{kind.lower()}-map-of-one-channel", shape, lambda net, x, kind=kind: getattr(net, kind)(
            net.conv(x, 1, 3, 3, 3, pads=[1] * 4), x))  # fmt: skip
        yield Case(f"{kind.lower()}-both-widen", (3, 4, 5), lambda net, x, kind=kind: getattr(net, kind)(
            net.conv(x, 1, 3, 1, 1), net.GlobalAveragePool(x)))  # fmt: skip
    yield Case("squeeze-excite", (4, 5, 6), lambda net, x: net.Mul(x, net.HardSigmoid(net.conv(net.Relu(net.conv(
        net.GlobalAveragePool(x), 3, 4, 1, 1)), 4, 3, 1, 1))))  # fmt: skip
    yield Case("residual", (3, 6, 6), lambda net, x: net.Relu(net.Add(
        net.conv(net.Relu(net.conv(x, 3, 3, 3, 3, pads=[1] * 4)), 3, 3, 3, 3, pads=[1] * 4), x)))  # fmt: skip
    yield Case("add-two-parameters", (3, 3), lambda net, x: net.Mul(
        x, net.Add(net.parameter(3, 3), net.parameter(3, 3))))  # fmt: skip
    yield Case("mul-two-parameters", (3, 3), lambda net, x: net.Mul(
        x, net.Mul(net.parameter(3, 3), net.parameter(3, 3))))  # fmt: skip


def data_movement() -> Iterable[Case]:
    """Concat, Pad, Flatten, Reshape, Transpose."""
    yield Case("concat", (2, 4, 5), lambda net, x: net.Concat(
        net.conv(x, 3, 2, 1, 1), x, net.conv(x, 1, 2, 3, 3, pads=[1] * 4), axis=1), wide=True)  # fmt: skip
    yield Case("concat-itself", (3, 4, 4), lambda net, x: net.Concat(x, x, axis=1))
    yield Case("concat-itself-around-another", (3, 4, 4), lambda net, x: net.Concat(x, net.Tanh(x), x, axis=-3))
    for group in (1, 2, 3, 6):
        yield Case(f"channel-shuffle-{group}", (6, 4, 5), lambda net, x, group=group: net.conv(
            net.ChannelShuffle(net.Tanh(x), group=group), 4, 6, 3, 3, pads=[1] * 4), wide=group == 2)  # fmt: skip
    yield Case("channel-shuffle-12", (24, 3, 3), lambda net, x: net.ChannelShuffle(x, group=12))
    for perm in ([0, 1, 3, 2], [0, 2, 1, 3], [0, 2, 3, 1], [0, 3, 1, 2], [0, 3, 2, 1]):
        yield Case(f"transpose-{''.join(map(str, perm))}", (6, 4, 5), lambda net, x, perm=perm: net.conv(
            net.Transpose(net.conv(x, 6, 6, 3, 3, pads=[1] * 4), perm=perm), 4, (6, 4, 5)[perm[1] - 1], 3, 3,
            pads=[1] * 4), wide=perm[1] == 2)  # fmt: skip
    yield Case("transpose-signal", (3, 40), lambda net, x: net.Transpose(net.Transpose(net.Tanh(x), perm=[0, 2, 1]),
                                                                         perm=[0, 2, 1]))  # fmt: skip
    yield Case("transpose-many-channels", (40, 2, 3), lambda net, x: net.Transpose(x, perm=[0, 2, 3, 1]))
    yield Case("concat-one", (3, 4, 4), lambda net, x: net.Concat(x, axis=1))
    yield Case("concat-vectors", (5,), lambda net, x: net.Concat(x, net.Sigmoid(x), axis=1))
    yield Case("concat-signals", (2, 7), lambda net, x: net.Concat(net.Relu(x), net.conv(x, 3, 2, 1), axis=1))
    yield Case("concat-before-convolution", (2, 5, 5), lambda net, x: net.conv(
        net.Concat(net.conv(x, 3, 2, 3, 3, pads=[1] * 4), x, axis=1), 4, 5, 3, 3, pads=[1] * 4))  # fmt: skip
    yield one("pad-spatial", (3, 4, 5), "Pad", pads=[0, 0, 1, 2, 0, 0, 3, 0], wide=True)
    yield one("pad-channels", (3, 4, 5), "Pad", pads=[0, 2, 0, 0, 0, 1, 0, 0])
    yield one("pad-crop", (4, 6, 7), "Pad", pads=[0, -1, -2, -1, 0, 0, -1, -3])
    yield one("pad-crop-and-grow", (3, 5, 5), "Pad", pads=[0, 1, -1, 2, 0, -1, 2, -2])
    yield one("pad-value", (2, 4, 4), "Pad", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=1.5)
    yield one("pad-nothing", (2, 4, 4), "Pad", pads=[0] * 8)
    yield one("pad-signal", (2, 6), "Pad", pads=[0, 1, 2, 0, 0, 3], value=-0.5)
    yield one("pad-vector", (6,), "Pad", pads=[0, 2, 0, -1])
    yield Case("pad-channels-behind-convolution", (2, 5, 5), lambda net, x: net.Pad(
        net.conv(x, 6, 2, 3, 3, pads=[1] * 4), pads=[0, 3, 0, 0, 0, 3, 0, 0]))  # fmt: skip
    yield Case("pad-before-convolution", (2, 5, 5), lambda net, x: net.conv(
        net.Pad(x, pads=[0, 0, 1, 0, 0, 1, 0, 1], value=0.5), 3, 3, 3, 3, pads=[1] * 4))  # fmt: skip
    yield Case("shortcut-option-a", (3, 6, 6), lambda net, x: net.Add(
        net.Pad(net.AveragePool(x, kernel_shape=[1, 1], strides=[2, 2]), pads=[0, 1, 0, 0, 0, 2, 0, 0]),
        net.conv(x, 6, 3, 3, 3, strides=[2, 2], pads=[1] * 4)))  # fmt: skip
    yield one("flatten", (3, 4, 5), "Flatten", wide=True)
    yield one("flatten-signal", (3, 7), "Flatten", axis=1)
    yield one("flatten-vector", (7,), "Flatten")
    yield one("reshape", (3, 4, 5), "Reshape", shape=[5, 12])
    yield one("reshape-minus-one", (3, 4, 4), "Reshape", shape=[-1, 2, 4])
    yield one("reshape-four-sizes", (3, 4, 4), "Reshape", shape=[3, 2, 2, 4])
    yield Case("reshape-of-bordered", (2, 6, 6), lambda net, x: net.Mul(
        net.Reshape(x, shape=[72]), net.Flatten(net.conv(x, 2, 2, 3, 3, pads=[1] * 4))))  # fmt: skip
    yield Case("reshape-to-bordered", (72,), lambda net, x: net.conv(
        net.Reshape(x, shape=[2, 6, 6]), 3, 2, 3, 3, pads=[1] * 4), wide=True)  # fmt: skip
    yield Case("reshape-then-overwrite", (3, 4, 4), lambda net, x: net.Relu(net.Reshape(net.Tanh(x), shape=[6, 8])))
    yield Case("reshape-and-original", (3, 4, 4), lambda net, x: net.Add(
        net.Reshape(net.Relu(net.Reshape(x, shape=[48])), shape=[3, 4, 4]), x))  # fmt: skip
    yield Case("flatten-of-convolution", (2, 5, 5), lambda net, x: net.Gemm(
        net.Flatten(net.Relu(net.conv(x, 3, 2, 3, 3, pads=[1] * 4))), net.parameter(75, 4)))  # fmt: skip


def combinations() -> Iterable[Case]:
    """Borders between nodes, and values and parameters with several users."""
    same3 = [1, 1, 1, 1]

    def shared_weight(net: Net, x: str) -> str:
        weight, bias = net.parameter(3, 3, 3, 3, spread=0.3), net.parameter(3)
        return net.Conv(net.Relu(net.Conv(x, weight, bias, pads=same3)), weight, bias, pads=same3)

    def tied_dense(net: Net, x: str) -> str:
        weight = net.parameter(7, 5)
        return net.Gemm(net.Tanh(net.Gemm(x, weight)), weight, transB=1)

    def three_users(net: Net, x: str) -> str:
        y = net.Relu(net.conv(x, 3, 3, 3, 3, pads=same3))
        pooled = net.MaxPool(y, kernel_shape=[3, 3], pads=same3)
        return net.Add(net.Add(net.conv(y, 3, 3, 5, 5, pads=[2] * 4), pooled), net.HardSwish(y))

    def scaled_weight(net: Net, x: str) -> str:
        return net.Conv(x, net.Mul(net.parameter(3, 2, 3, 3), net.parameter(3, 2, 3, 3)), pads=same3)

    yield Case("convolutions", (3, 7, 7), lambda net, x: net.conv(
        net.conv(x, 4, 3, 3, 3, pads=same3), 5, 4, 5, 5, pads=[2] * 4), wide=True)  # fmt: skip
    yield Case("convolutions-strided", (2, 12, 11), lambda net, x: net.conv(net.Relu(net.conv(
        x, 4, 2, 3, 3, strides=[2, 2], pads=same3)), 3, 4, 3, 3, strides=[2, 2], pads=[0, 1, 1, 0]))  # fmt: skip
    yield Case("separable", (3, 8, 8), lambda net, x: net.conv(net.Clip(net.norm(net.conv(
        x, 3, 1, 3, 3, group=3, pads=same3, bias=False)), min=0.0, max=6.0), 5, 3, 1, 1))  # fmt: skip
    yield Case("parameter-of-two-nodes", (3, 5, 5), shared_weight)
    yield Case("parameter-of-two-dense-nodes", (7,), tied_dense)
    yield Case("value-of-three-nodes", (3, 6, 6), three_users)
    yield Case("weight-computed", (2, 5, 5), scaled_weight)
    yield Case("activations-in-a-row", (3, 4, 4), lambda net, x: net.Sigmoid(net.Tanh(net.HardSwish(net.Relu(x)))))
    yield Case("identities-in-a-row", (3, 4, 4), lambda net, x: net.Identity(net.Relu(net.Identity(x))))
    yield Case("unused-branch", (3, 4, 4), lambda net, x: (net.Relu(x), net.Tanh(x))[1])


def losses() -> Iterable[Case]:
    """Both losses, on the output itself."""

    def logits(net: Net, x: str) -> str:
        return net.Gemm(x, net.parameter(4, 6), net.parameter(6))

    yield Case("cross-entropy", (4,), logits, loss="cross_entropy", bare=True, wide=True)
    yield Case("cross-entropy-smoothed", (4,), logits, loss="cross_entropy", label_smoothing=0.1, bare=True)
    yield Case("cross-entropy-large-logits", (4,), logits, loss="cross_entropy", bare=True, spread=30.0)
    yield Case("cross-entropy-two-classes", (2,), lambda net, x: net.Mul(x, net.parameter(2)),
               loss="cross_entropy", bare=True)  # fmt: skip
    yield Case("squared-error-vector", (4,), logits, bare=True, wide=True)
    yield Case("squared-error-maps", (2, 5, 5), lambda net, x: net.conv(x, 3, 2, 3, 3), bare=True)


CASES = [
    *convolutions(), *dense(), *activations(), *normalizations(), *pools(), *arithmetic(), *data_movement(),
    *combinations(), *losses(),
]  # fmt: skip
