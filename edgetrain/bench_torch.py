"""The other side of the benchmark: a graph as an ordinary float32 PyTorch module, trained the ordinary way.

Layers are ``torch.nn`` modules with their own padding, called one after the other; the
optimizer is ``torch.optim.SGD`` as it comes. This is not the judge of ``verify`` (that
one is slow and independent); this one is meant to be as fast as PyTorch is.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Node

# How many of a node's inputs are values of the network; the rest belongs to its module.
_DATA_INPUTS = {"Add": 2, "Mul": 2}


def import_torch() -> Any:
    """Return the module torch.

    Raises:
        UsageError: PyTorch is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError:
        raise UsageError("PyTorch is not installed: pip install torch, or leave that contender out") from None


def torch_module(graph: Graph) -> Any:
    """Return a ``torch.nn.Module`` with the graph's layers and parameters.

    Raises:
        UnsupportedError: an operator outside the benchmark's networks.
    """
    torch = import_torch()
    steps = [(_layer(torch, graph, node), _sources(node), node.y.name) for node in graph.nodes]

    class Network(torch.nn.Module):  # type: ignore[misc, name-defined]  # torch is optional and untyped here
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(layer for layer, _, _ in steps if isinstance(layer, torch.nn.Module))

        def forward(self, x: Any) -> Any:
            values = {graph.inputs[0]: x}
            for layer, sources, target in steps:
                values[target] = layer(*[values[name] for name in sources])
            return values[graph.outputs[0]]

    return Network()


def _sources(node: Node) -> list[str]:
    return [v.name for v in node.inputs[: _DATA_INPUTS.get(node.op_type, 1)] if v is not None]


def _layer(torch: Any, graph: Graph, node: Node) -> Callable[..., Any]:
    makers = {
        "Conv": _conv, "Gemm": _linear, "BatchNormalization": _batch_norm, "MaxPool": _pool, "AveragePool": _pool,
        "GlobalAveragePool": _global_pool, "Pad": _pad,
    }  # fmt: skip
    plain = {"Relu": torch.nn.ReLU, "Flatten": torch.nn.Flatten, "Dropout": torch.nn.Dropout}
    if node.op_type in plain:
        return plain[node.op_type]()  # type: ignore[no-any-return]  # untyped here
    if node.op_type in ("Add", "Mul"):
        return getattr(torch, node.op_type.lower())  # type: ignore[no-any-return]  # untyped here
    if node.op_type not in makers:
        raise UnsupportedError(f"node '{node.name}': the benchmark's PyTorch side has no {node.op_type}")
    return makers[node.op_type](torch, graph, node)  # type: ignore[no-any-return]  # untyped here


def _fill(torch: Any, module: Any, graph: Graph, node: Node, names: list[str]) -> Any:
    """Copy a node's arrays into a module's tensors of the given names."""
    with torch.no_grad():
        for name, value in zip(names, node.inputs[1:], strict=False):
            if value is not None:
                getattr(module, name).copy_(torch.from_numpy(graph.arrays[value.name]))
    return module


def _symmetric(pads: Any) -> list[int] | None:
    half = len(pads) // 2
    return list(pads[:half]) if list(pads[:half]) == list(pads[half:]) else None


def _conv(torch: Any, graph: Graph, node: Node) -> Any:
    weight, axes = node.input(1), len(node.input(1).shape) - 2
    kind = torch.nn.Conv1d if axes == 1 else torch.nn.Conv2d
    pads = list(node.get("pads") or [0] * 2 * axes)
    inside = _symmetric(pads)
    groups = node.get("group", 1)
    conv = kind(
        weight.shape[1] * groups, weight.shape[0], weight.shape[2:], node.get("strides") or 1,
        [0] * axes if inside is None else inside, node.get("dilations") or 1, groups, node.optional(2) is not None,
    )  # fmt: skip
    _fill(torch, conv, graph, node, ["weight", "bias"])
    if inside is not None:
        return conv
    sides = [width for axis in reversed(range(axes)) for width in (pads[axis], pads[axis + axes])]
    before = torch.nn.ConstantPad1d(sides, 0.0) if axes == 1 else torch.nn.ZeroPad2d(sides)
    return torch.nn.Sequential(before, conv)


def _linear(torch: Any, graph: Graph, node: Node) -> Any:
    outputs, inputs = node.input(1).shape
    return _fill(torch, torch.nn.Linear(inputs, outputs), graph, node, ["weight", "bias"])


def _batch_norm(torch: Any, graph: Graph, node: Node) -> Any:
    kind = torch.nn.BatchNorm1d if len(node.x.shape) < 3 else torch.nn.BatchNorm2d
    return _fill(torch, kind(node.x.shape[0]), graph, node, ["weight", "bias", "running_mean", "running_var"])


def _pool(torch: Any, graph: Graph, node: Node) -> Any:
    axes = len(node.x.shape) - 1
    name = {"MaxPool": "MaxPool", "AveragePool": "AvgPool"}[node.op_type] + f"{axes}d"
    pads = _symmetric(node.get("pads") or [0] * 2 * axes)
    if pads is None:
        raise UnsupportedError(f"node '{node.name}': the benchmark's PyTorch side has no asymmetric pooling")
    strides = tuple(node.get("strides") or [1] * axes)
    return getattr(torch.nn, name)(tuple(node.get("kernel_shape")), strides, tuple(pads))


def _global_pool(torch: Any, graph: Graph, node: Node) -> Any:
    return torch.nn.AdaptiveAvgPool1d(1) if len(node.x.shape) == 2 else torch.nn.AdaptiveAvgPool2d(1)


def _pad(torch: Any, graph: Graph, node: Node) -> Callable[..., Any]:
    pads = node.get("pads")
    half = len(pads) // 2
    sides = [width for axis in reversed(range(half)) for width in (pads[axis], pads[axis + half])]
    pad = torch.nn.functional.pad
    return lambda x: pad(x, sides, value=float(node.get("value", 0.0)))


class TorchStep:
    """One training step of PyTorch: forward, cross-entropy, backward, SGD with momentum, as all contenders do.

    Args:
        graph: the network.
        x, y: the batch, float32 ``(N, ...)`` and int64 ``(N,)``.
        channels_last: memory format of images.

    Raises:
        UsageError: PyTorch is not installed.
        UnsupportedError: an operator outside the benchmark's networks, or no images for ``channels_last``.
    """

    def __init__(
        self, graph: Graph, x: NDArray[np.float32], y: NDArray[np.int64], channels_last: bool = False
    ) -> None:
        torch = import_torch()
        if channels_last and x.ndim != 4:
            raise UnsupportedError(f"the memory format channels_last is for images, the inputs are {x.shape[1:]}")
        self.module = torch_module(graph).train()
        self._x, self._y = torch.from_numpy(x), torch.from_numpy(y)
        if channels_last:
            self.module = self.module.to(memory_format=torch.channels_last)
            self._x = self._x.to(memory_format=torch.channels_last)
        self._optimizer = torch.optim.SGD(self.module.parameters(), lr=0.01, momentum=0.9)
        self._loss = torch.nn.functional.cross_entropy

    def __call__(self) -> float:
        """Take one step and return the loss."""
        self._optimizer.zero_grad()
        loss = self._loss(self.module(self._x), self._y)
        loss.backward()
        self._optimizer.step()
        return float(loss.item())

    def facts(self) -> dict[str, Any]:
        """Return nothing: PyTorch tells of no plan."""
        return {}
