"""tinygrad as a further peer of the benchmark: the network as tensor expressions, one captured training step.

Its CPU backend compiles C with clang. Where there is none on the path, the package ziglang brings one. The search for
faster kernels (BEAM) is left to whoever sets that variable: it takes minutes per network and batch size.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Node
from edgetrain.kernels.cache import places

_MOMENTUM, _LR = 0.9, 0.01
# Running averages of BatchNormalization: share of the new value, as PyTorch counts it.
_NEW_SHARE = 0.1


def import_tinygrad(threads: int) -> Any:
    """Return the module tinygrad, computing on so many processors.

    Raises:
        UsageError: tinygrad or its compiler is not installed.
    """
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ.update({"DEV": "CPU", "NUM_CPU_THREADS": str(threads), "PARALLEL": "0"})
    try:
        tinygrad = importlib.import_module("tinygrad")
    except ModuleNotFoundError:
        raise UsageError("tinygrad is not installed: pip install tinygrad, or leave that contender out") from None
    if "CC" not in os.environ:
        os.environ["CC"] = _compiler()
    return tinygrad


def _compiler() -> str:
    """Return the path of a clang; that of ziglang is called through a file of two lines in the cache folder.

    Raises:
        UsageError: there is none.
    """
    if found := shutil.which("clang"):
        return found
    zig = importlib.util.find_spec("ziglang")
    if zig is None or zig.origin is None:
        raise UsageError("tinygrad needs clang: install it or pip install ziglang, or leave that contender out")
    script = places()[-1] / "clang"
    script.parent.mkdir(parents=True, exist_ok=True)
    draft = script.with_suffix(f".{os.getpid()}")  # nobody runs it while it is written
    draft.write_text(f'#!/bin/sh\nexec "{Path(zig.origin).parent / "zig"}" clang "$@"\n', encoding="utf-8")
    draft.chmod(0o700)
    draft.replace(script)
    return str(script)


class TinygradStep:
    """One training step of tinygrad: forward, cross-entropy, backward, SGD with momentum.

    Args:
        graph: the network.
        x, y: the batch, float32 ``(N, ...)`` and int64 ``(N,)``.
        threads: processors that the process is bound to.

    Raises:
        UsageError: tinygrad or its compiler is not installed.
        UnsupportedError: an operator outside the benchmark's networks.
    """

    def __init__(self, graph: Graph, x: NDArray[np.float32], y: NDArray[np.int64], threads: int) -> None:
        tinygrad = import_tinygrad(threads)
        self._step = tinygrad.TinyJit(_step_of(tinygrad, graph, x, y))
        self._device = tinygrad.Device["CPU"]

    def __call__(self) -> Any:
        """Take one step, wait for its end and return the loss, a tensor: reading it would take a copy's time."""
        loss = self._step()
        self._device.synchronize()
        return loss

    def facts(self) -> dict[str, Any]:
        """Return nothing: tinygrad tells of no plan."""
        return {}


def _step_of(tinygrad: Any, graph: Graph, x: NDArray[np.float32], y: NDArray[np.int64]) -> Callable[[], Any]:
    operators = [_operator(node) for node in graph.nodes]
    arrays = {name: tinygrad.Tensor(array).realize() for name, array in graph.arrays.items()}
    batch, targets = (tinygrad.Tensor(array).realize() for array in (x, y.astype(np.int32)))
    averages = [tensor for name, tensor in arrays.items() if name not in graph.trainable]
    trained = [arrays[name] for name in sorted(graph.trainable)]
    optimizer = tinygrad.nn.optim.SGD(trained, lr=_LR, momentum=_MOMENTUM)

    def step() -> Any:
        with tinygrad.Context(TRAINING=1):
            optimizer.zero_grad()
            values = {**arrays, graph.inputs[0]: batch}
            for node, operator in zip(graph.nodes, operators, strict=True):
                values[node.y.name] = operator(*[None if v is None else values[v.name] for v in node.inputs])
            loss = values[graph.outputs[0]].sparse_categorical_crossentropy(targets)
            loss.backward()
            return loss.realize(*optimizer.schedule_step(), *averages)

    return step


def _operator(node: Node) -> Callable[..., Any]:
    """Return a function of a node's inputs that gives the output."""
    if node.op_type == "BatchNormalization":
        return lambda *inputs: _batch_norm(node, *inputs)
    makers = {"Conv": _conv, "MaxPool": _pool, "AveragePool": _pool, "Pad": _pad}
    if node.op_type in makers:
        return makers[node.op_type](node)
    plain: dict[str, Callable[..., Any]] = {
        "Relu": lambda x: x.relu(), "Add": lambda a, b: a + b, "Mul": lambda a, b: a * b, "Dropout": lambda x, *_: x,
        "Flatten": lambda x: x.flatten(1), "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
        "Gemm": lambda x, weight, bias=None: x.linear(weight.T if node.get("transB", 0) else weight, bias),
    }  # fmt: skip
    if node.op_type not in plain:
        raise UnsupportedError(f"node '{node.name}': the benchmark's tinygrad side has no {node.op_type}")
    return plain[node.op_type]


def _sides(node: Node, axes: int) -> list[int]:
    """Return the widths of padding, the last axis first."""
    pads = list(node.get("pads") or [0] * 2 * axes)
    return [width for axis in reversed(range(axes)) for width in (pads[axis], pads[axis + axes])]


def _conv(node: Node) -> Callable[..., Any]:
    axes = len(node.x.shape) - 1
    settings = {
        "groups": node.get("group", 1), "stride": tuple(node.get("strides") or [1] * axes),
        "dilation": tuple(node.get("dilations") or [1] * axes), "padding": _sides(node, axes),
    }  # fmt: skip
    return lambda x, weight, bias=None: x.conv2d(weight, bias, **settings)


def _pool(node: Node) -> Callable[..., Any]:
    kernel = tuple(node.get("kernel_shape"))
    sides = _sides(node, len(kernel))
    strides = tuple(node.get("strides") or [1] * len(kernel))
    if node.op_type == "MaxPool":
        return lambda x: x.max_pool2d(kernel, strides, padding=sides)
    if any(sides):
        raise UnsupportedError(f"node '{node.name}': the benchmark's tinygrad side has no padded AveragePool")
    return lambda x: x.avg_pool2d(kernel, strides)


def _pad(node: Node) -> Callable[..., Any]:
    pads = node.get("pads")
    half = len(pads) // 2
    sides = tuple(zip(pads[:half], pads[half:], strict=True))
    return lambda x: x.pad(sides, value=float(node.get("value", 0.0)))


def _batch_norm(node: Node, x: Any, scale: Any, shift: Any, mean: Any, variance: Any) -> Any:
    axes, wide = (0, *range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
    now = x.mean(axes)
    centred = x - now.reshape(wide)
    spread = centred.square().mean(axes)
    factor = scale * (spread + float(node.get("epsilon", 1e-5))).rsqrt()
    count = x.numel() / x.shape[1]
    unbiased = spread.detach() * (count / max(1.0, count - 1))
    mean.assign(mean + _NEW_SHARE * (now.detach() - mean))
    variance.assign(variance + _NEW_SHARE * (unbiased - variance))
    return centred * factor.reshape(wide) + shift.reshape(wide)
