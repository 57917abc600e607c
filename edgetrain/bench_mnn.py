"""MNN as a further peer of the benchmark: the network as expressions, trained by MNN's own optimizer.

Signals of one dimension are images of height 1 here, as MNN's kernels are for images. MNN keeps the biased variance as
running average of BatchNormalization; nothing in a training step reads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Node

_MOMENTUM, _LR = 0.9, 0.01


def import_mnn(threads: int) -> Any:
    """Return the module MNN, computing with so many threads.

    Raises:
        UsageError: MNN is not installed.
    """
    try:
        mnn = importlib.import_module("MNN")
    except ModuleNotFoundError:
        raise UsageError("MNN is not installed: pip install MNN, or leave that contender out") from None
    mnn.expr.set_thread_number(threads)
    mnn.expr.lazy_eval(True)  # without it, expressions forget what they were made of, and nothing has a gradient
    return mnn


class MnnStep:
    """One training step of MNN: forward, cross-entropy, backward, SGD with momentum.

    Args:
        graph: the network.
        x, y: the batch, float32 ``(N, ...)`` and int64 ``(N,)``.
        threads: that MNN computes with.

    Raises:
        UsageError: MNN is not installed.
        UnsupportedError: an operator outside the benchmark's networks.
    """

    def __init__(self, graph: Graph, x: NDArray[np.float32], y: NDArray[np.int64], threads: int) -> None:
        self._mnn = mnn = import_mnn(threads)
        self._network = _network(mnn, graph)
        self._network.train(True)
        self._optimizer = mnn.optim.SGD(self._network, _LR, _MOMENTUM)
        self._x = _const(mnn, _as_images(x))
        self._y = _const(mnn, np.eye(graph.num_classes, dtype=np.float32)[y])

    def __call__(self) -> None:
        """Take one step. The loss is not read: MNN would compute the forward pass once more for that."""
        self._optimizer.step(self._loss())

    def loss(self) -> float:
        """Return the loss of the batch with the weights as they are."""
        return float(self._loss().read())

    def _loss(self) -> Any:
        probabilities = self._mnn.expr.softmax(self._network.forward(self._x), 1)
        return self._mnn.nn.loss.cross_entropy(probabilities, self._y)

    def facts(self) -> dict[str, Any]:
        """Return nothing: MNN tells of no plan."""
        return {}


def _as_images(array: NDArray[np.float32]) -> NDArray[np.float32]:
    return array[:, :, None] if array.ndim == 3 else array


def _const(mnn: Any, array: NDArray[np.float32]) -> Any:
    return mnn.expr.const(np.ascontiguousarray(array), list(array.shape), mnn.expr.NCHW)


def _network(mnn: Any, graph: Graph) -> Any:
    """Return an ``MNN.nn.Module`` with the graph's layers and parameters.

    Raises:
        UnsupportedError: an operator outside the benchmark's networks.
    """

    class Network(mnn.nn.Module):  # type: ignore[misc]  # MNN is optional and untyped here
        def __init__(self) -> None:
            super().__init__()
            self.layers = [(_layer(mnn, self, graph, node), node) for node in graph.nodes]

        def forward(self, x: Any) -> Any:
            values = {graph.inputs[0]: x}
            for layer, node in self.layers:
                given = [values[v.name] for v in node.inputs if v is not None and v.name in values]
                values[node.y.name] = layer(*given)
            return values[graph.outputs[0]]

    return Network()


def _layer(mnn: Any, network: Any, graph: Graph, node: Node) -> Callable[..., Any]:
    """Return a function of a node's data inputs; its parameters become those of the network."""
    expr = mnn.expr
    makers = {"Conv": _conv, "Gemm": _gemm, "BatchNormalization": _batch_norm}
    if node.op_type in makers:
        return makers[node.op_type](mnn, network, graph, node)
    shapes = {"MaxPool": _pool, "AveragePool": _pool, "GlobalAveragePool": _global_pool, "Pad": _pad}
    if node.op_type in shapes:
        return shapes[node.op_type](mnn, node)
    plain: dict[str, Callable[..., Any]] = {
        "Relu": expr.relu, "Add": lambda a, b: a + b, "Mul": lambda a, b: a * b, "Dropout": lambda x: x,
        "Flatten": lambda x: expr.reshape(expr.convert(x, expr.NCHW), [x.shape[0], -1]),
    }  # fmt: skip
    if node.op_type not in plain:
        raise UnsupportedError(f"node '{node.name}': the benchmark's MNN side has no {node.op_type}")
    return plain[node.op_type]


def _parameter(mnn: Any, network: Any, graph: Graph, name: str) -> Any:
    """Return an array of the graph, one that is trained as a parameter of the network."""
    variable = _const(mnn, _as_images(graph.arrays[name]))
    if name in graph.trainable:
        variable.fix_as_trainable()
        network._add_parameter(variable)
    return variable


def _two(values: Sequence[int], filler: int) -> list[int]:
    """Return a setting of width and height, MNN's order; that of a missing height is ``filler``."""
    return [*reversed(values), filler][:2]


def _conv(mnn: Any, network: Any, graph: Graph, node: Node) -> Callable[..., Any]:
    expr, weight, bias = mnn.expr, node.input(1), node.optional(2)
    axes = len(weight.shape) - 2
    pads = list(node.get("pads") or [0] * 2 * axes)
    begins, ends = pads[:axes], pads[axes:]
    inside, sides = (_two(begins, 0), []) if begins == ends else ([0, 0], _sides(pads))
    strides, dilations = (_two(node.get(name) or [1] * axes, 1) for name in ("strides", "dilations"))
    if node.get("group", 1) not in (1, node.x.shape[0]) or node.get("group", 1) not in (1, weight.shape[0]):
        raise UnsupportedError(f"node '{node.name}': MNN's gradient of grouped convolutions is wrong")
    w = _parameter(mnn, network, graph, weight.name)
    zeros = np.zeros(weight.shape[0], np.float32)
    b = _const(mnn, zeros) if bias is None else _parameter(mnn, network, graph, bias.name)

    def conv(x: Any) -> Any:
        inner = expr.convert(_surrounded(mnn, x, sides), expr.NC4HW4)
        return expr.conv2d(inner, w, b, strides, inside, dilations, node.get("group", 1), expr.CAFFE)

    return conv


def _sides(pads: Sequence[int]) -> list[tuple[int, int]]:
    """Return the widths before and after each of four axes; ``pads`` has those of one or two, as ONNX lists them."""
    half = len(pads) // 2
    return [(0, 0)] * (4 - half) + list(zip(pads[:half], pads[half:], strict=True))


def _surrounded(mnn: Any, x: Any, sides: Sequence[tuple[int, int]]) -> Any:
    """Return ``x`` with zeros around it; MNN has a gradient of concatenation, none of padding."""
    for axis, widths in enumerate(sides):
        if any(widths):
            x = mnn.expr.convert(x, mnn.expr.NCHW)
            shapes = [[*x.shape[:axis], width, *x.shape[axis + 1 :]] for width in widths]
            before, after = ([_const(mnn, np.zeros(shape, np.float32))] if shape[axis] else [] for shape in shapes)
            x = mnn.expr.concat([*before, x, *after], axis)
    return x


def _gemm(mnn: Any, network: Any, graph: Graph, node: Node) -> Callable[..., Any]:
    # The public matmul casts its arguments, and a cast has no gradient.
    matmul, transposed = mnn.expr._F.matmul, bool(node.get("transB", 0))
    weight, *bias = [_parameter(mnn, network, graph, v.name) for v in node.inputs[1:] if v is not None]
    return lambda x: sum(bias, start=matmul(x, weight, False, transposed))


def _batch_norm(mnn: Any, network: Any, graph: Graph, node: Node) -> Callable[..., Any]:
    if len(node.x.shape) == 1:
        raise UnsupportedError(f"node '{node.name}': the benchmark's MNN side has BatchNormalization of images alone")
    keep, epsilon = float(node.get("momentum", 0.9)), float(node.get("epsilon", 1e-5))
    module = mnn.nn.batch_norm(node.x.shape[0], 4, keep, epsilon)
    names = [node.input(i).name for i in (1, 2, 4, 3)]  # scale, shift, variance, mean: the module's order
    variables = [_const(mnn, graph.arrays[name].reshape(1, -1, 1, 1)) for name in names]
    for name, variable in zip(names, variables, strict=True):
        if name in graph.trainable:
            variable.fix_as_trainable()
    module.load_parameters(variables)
    setattr(network, f"norm {node.name}", module)  # its parameters become the network's
    return module.forward  # type: ignore[no-any-return]  # untyped here


def _pool(mnn: Any, node: Node) -> Callable[..., Any]:
    expr, axes = mnn.expr, len(node.get("kernel_shape"))
    if any(node.get("pads") or []):
        raise UnsupportedError(f"node '{node.name}': the benchmark's MNN side has no padded {node.op_type}")
    kernel, strides = _two(node.get("kernel_shape"), 1), _two(node.get("strides") or [1] * axes, 1)
    pool = expr.max_pool if node.op_type == "MaxPool" else expr.avg_pool
    return lambda x: pool(expr.convert(x, expr.NC4HW4), kernel, strides)


def _global_pool(mnn: Any, node: Node) -> Callable[..., Any]:
    expr, kernel = mnn.expr, _two(node.x.shape[1:], 1)
    return lambda x: expr.avg_pool(expr.convert(x, expr.NC4HW4), kernel, [1, 1])


def _pad(mnn: Any, node: Node) -> Callable[..., Any]:
    if float(node.get("value", 0.0)):
        raise UnsupportedError(f"node '{node.name}': the benchmark's MNN side pads with zeros alone")
    pads, rank = node.get("pads"), len(node.x.shape) + 1
    batch, channels = ((pads[axis], pads[axis + rank]) for axis in (0, 1))
    sides = [batch, channels, *_sides([*pads[2:rank], *pads[rank + 2 :]])[2:]]
    return lambda x: _surrounded(mnn, x, sides)
