"""JAX as a further peer of the benchmark: the network as pure functions, one jitted training step."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Node

_MOMENTUM, _LR = 0.9, 0.01
# Running averages of BatchNormalization: share of the new value, as PyTorch counts it.
_NEW_SHARE = 0.1


def import_jax(threads: int) -> Any:
    """Return the module jax, computing with so many threads.

    Raises:
        UsageError: JAX is not installed.
    """
    # XLA has no setting for it: its pool is as large as the set of processors that the process may use.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        return importlib.import_module("jax")
    except ModuleNotFoundError:
        raise UsageError("JAX is not installed: pip install jax, or leave that contender out") from None


class JaxStep:
    """One training step of JAX: forward, cross-entropy, backward, SGD with momentum.

    Args:
        graph: the network.
        x, y: the batch, float32 ``(N, ...)`` and int64 ``(N,)``.
        threads: processors that the process is bound to.

    Raises:
        UsageError: JAX is not installed.
        UnsupportedError: an operator outside the benchmark's networks.
    """

    def __init__(self, graph: Graph, x: NDArray[np.float32], y: NDArray[np.int64], threads: int) -> None:
        jax = import_jax(threads)
        self._wait = jax.block_until_ready
        trained = {name: jax.numpy.asarray(graph.arrays[name]) for name in sorted(graph.trainable)}
        fixed = {n: jax.numpy.asarray(a) for n, a in graph.arrays.items() if n not in graph.trainable}
        velocity = {name: jax.numpy.zeros_like(array) for name, array in trained.items()}
        self._state = (trained, velocity, fixed)
        self._batch = (jax.numpy.asarray(x), jax.numpy.asarray(y.astype(np.int32)))
        self._step = jax.jit(_step_of(jax, graph), donate_argnums=0)

    def __call__(self) -> float:
        """Take one step, wait for its end and return the loss."""
        self._state, loss = self._step(self._state, *self._batch)
        self._wait((self._state, loss))
        return float(loss)

    def facts(self) -> dict[str, Any]:
        """Return nothing: JAX tells of no plan."""
        return {}


def _step_of(jax: Any, graph: Graph) -> Callable[..., Any]:
    operators = [_operator(jax, node) for node in graph.nodes]

    def loss_of(trained: Any, fixed: Any, x: Any, y: Any) -> Any:
        values, averages = {**trained, **fixed, graph.inputs[0]: x}, dict(fixed)
        for node, operator in zip(graph.nodes, operators, strict=True):
            given = [None if value is None else values[value.name] for value in node.inputs]
            values[node.y.name], changed = operator(*given)
            if changed:
                averages |= {node.input(i).name: new for i, new in changed.items()}
        logits = jax.nn.log_softmax(values[graph.outputs[0]])
        return -jax.numpy.take_along_axis(logits, y[:, None], 1).mean(), averages

    def step(state: Any, x: Any, y: Any) -> Any:
        trained, velocity, fixed = state
        (loss, averages), grads = jax.value_and_grad(loss_of, has_aux=True)(trained, fixed, x, y)
        velocity = jax.tree.map(lambda v, g: _MOMENTUM * v + g, velocity, grads)
        trained = jax.tree.map(lambda w, v: w - _LR * v, trained, velocity)
        return (trained, velocity, averages), loss

    return step


def _operator(jax: Any, node: Node) -> Callable[..., tuple[Any, dict[int, Any] | None]]:
    """Return a function of a node's inputs that gives the output and what it changed of the inputs, by position."""
    if node.op_type == "BatchNormalization":
        return lambda *inputs: _batch_norm(jax.numpy, node, *inputs)
    makers = {"Conv": _conv, "Gemm": _gemm, "MaxPool": _max_pool, "AveragePool": _average_pool, "Pad": _pad}
    plain = {
        "Relu": jax.nn.relu, "Add": jax.numpy.add, "Mul": jax.numpy.multiply,
        "Flatten": lambda x, *_: x.reshape(x.shape[0], -1), "Dropout": lambda x, *_: x,
        "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdims=True),
    }  # fmt: skip
    if node.op_type not in plain and node.op_type not in makers:
        raise UnsupportedError(f"node '{node.name}': the benchmark's JAX side has no {node.op_type}")
    function = plain[node.op_type] if node.op_type in plain else makers[node.op_type](jax, node)
    return lambda *inputs: (function(*inputs), None)


def _sides(node: Node, axes: int) -> list[tuple[int, int]]:
    pads = list(node.get("pads") or [0] * 2 * axes)
    return list(zip(pads[:axes], pads[axes:], strict=True))


def _conv(jax: Any, node: Node) -> Callable[..., Any]:
    axes = len(node.x.shape) - 1
    letters = "HW"[-axes:]

    def conv(x: Any, weight: Any, bias: Any = None) -> Any:
        y = jax.lax.conv_general_dilated(
            x, weight, node.get("strides") or [1] * axes, _sides(node, axes),
            rhs_dilation=node.get("dilations") or [1] * axes, feature_group_count=node.get("group", 1),
            dimension_numbers=(f"NC{letters}", f"OI{letters}", f"NC{letters}"),
        )  # fmt: skip
        return y if bias is None else y + bias.reshape(-1, *[1] * axes)

    return conv


def _gemm(jax: Any, node: Node) -> Callable[..., Any]:
    def gemm(x: Any, weight: Any, bias: Any = None) -> Any:
        y = x @ (weight.T if node.get("transB", 0) else weight)
        return y if bias is None else y + bias

    return gemm


def _windows(node: Node) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, int]]]:
    kernel = tuple(node.get("kernel_shape"))
    strides = tuple(node.get("strides") or [1] * len(kernel))
    return (1, 1, *kernel), (1, 1, *strides), [(0, 0), (0, 0), *_sides(node, len(kernel))]


def _max_pool(jax: Any, node: Node) -> Callable[..., Any]:
    return lambda x: jax.lax.reduce_window(x, -np.inf, jax.lax.max, *_windows(node))


def _average_pool(jax: Any, node: Node) -> Callable[..., Any]:
    sides = _sides(node, len(node.get("kernel_shape")))
    if any(side != (0, 0) for side in sides):
        raise UnsupportedError(f"node '{node.name}': the benchmark's JAX side has no padded AveragePool")
    return lambda x: jax.lax.reduce_window(x, 0.0, jax.lax.add, *_windows(node)) / np.prod(node.get("kernel_shape"))


def _pad(jax: Any, node: Node) -> Callable[..., Any]:
    pads = node.get("pads")
    half = len(pads) // 2
    sides = list(zip(pads[:half], pads[half:], strict=True))
    return lambda x: jax.numpy.pad(x, sides, constant_values=float(node.get("value", 0.0)))


def _batch_norm(numpy: Any, node: Node, x: Any, scale: Any, shift: Any, mean: Any, variance: Any) -> Any:
    axes, wide = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    now, spread = x.mean(axes), x.var(axes)
    factor = scale / numpy.sqrt(spread + float(node.get("epsilon", 1e-5)))
    y = (x - now.reshape(wide)) * factor.reshape(wide) + shift.reshape(wide)
    count = x.size / x.shape[1]
    unbiased = spread * count / max(1.0, count - 1)
    averages = {3: mean + _NEW_SHARE * (now - mean), 4: variance + _NEW_SHARE * (unbiased - variance)}
    return y, averages
