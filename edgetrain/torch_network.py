"""The judge of the cross-check: a graph rebuilt in float64 PyTorch.

An interpreter of the graph made of ``torch.nn.functional``: a table from operator to a
small function, written from the ONNX operator texts without edgetrain's own shape rules
and kernels, so that a mistake there cannot hide. PyTorch is optional and imported at
the first use.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Node

Tensor = Any  # torch.Tensor
Array = NDArray[Any]

_LARGEST_SHIFT, _SHIFTS = 0.1, 21  # of a bias, to keep a map off its kinks


class _LazyTorch:
    """Imports PyTorch at the first use of an attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return getattr(importlib.import_module("torch"), name)
        except ModuleNotFoundError:
            raise UsageError(
                "verify compares with PyTorch, which is not installed: pip install edgetrain[verify]"
            ) from None


torch: Any = _LazyTorch()


class TorchNetwork:
    """A graph in float64 PyTorch.

    Args:
        graph: it is not changed.
        loss: ``"cross_entropy"`` or ``"mse"``.

    Attributes:
        graph: as given.
        tensors: every array of the graph as a float64 tensor; the trainable ones require gradients.
        training: whether batch statistics are used, and running averages updated.

    Raises:
        UsageError: unknown loss, or PyTorch is not installed.
        UnsupportedError: an operator is not in the table.
    """

    def __init__(self, graph: Graph, loss: str = "cross_entropy") -> None:
        if loss not in ("cross_entropy", "mse"):
            raise UsageError(f"verify: the loss is '{loss}', expected 'cross_entropy' or 'mse'")
        for node in graph.nodes:
            if node.op_type not in _TABLE:
                known = ", ".join(sorted(_TABLE))
                raise UnsupportedError(f"node '{node.name}': verify cannot rebuild {node.op_type}; it knows {known}")
        self.graph = graph
        self.training = False
        self.tensors = {
            name: torch.tensor(array, dtype=torch.float64).requires_grad_(name in graph.trainable)
            for name, array in graph.arrays.items()
        }
        self._loss = loss
        self._margin: float | None = None  # a number while margins are measured
        self._biases: dict[str, str] = {}

    def forward(self, x: Array) -> Tensor:
        """Return the first output, batch dimension first, for inputs ``(N, ...)``."""
        tensors = dict(self.tensors)
        tensors[self.graph.inputs[0]] = self._normalized(torch.tensor(np.asarray(x), dtype=torch.float64))
        for node in self.graph.nodes:
            inputs = [None if value is None else tensors[value.name] for value in node.inputs]
            if self.measuring:
                inputs[0] = self._at_kinks(node, inputs[0])
            tensors[node.y.name] = _TABLE[node.op_type](self, node, *inputs)
        return tensors[self.graph.outputs[0]]

    def _normalized(self, x: Tensor) -> Tensor:
        if (normal := self.graph.normalization) is None:
            return x
        shape = (-1, *[1] * (x.dim() - 2))
        mean, std = (torch.tensor(a, dtype=torch.float64).reshape(shape) for a in (normal.mean, normal.std))
        return (x - mean) / std

    def output(self, x: Array) -> Array:
        """Return the first output in inference mode."""
        self.training = False
        with torch.no_grad():
            return np.asarray(self.forward(x).numpy())

    def loss(self, x: Array, y: Array) -> Tensor:
        """Return the mean loss in training mode; running averages are updated."""
        self.training = True
        out = self.forward(x)
        if self._loss == "mse":
            return torch.nn.functional.mse_loss(out, torch.tensor(y, dtype=torch.float64))
        return torch.nn.functional.cross_entropy(out, torch.tensor(y, dtype=torch.int64))

    def gradients(self, x: Array, y: Array) -> dict[str, Array]:
        """Return the gradients of the mean loss in training mode; nothing changes."""
        buffers = {name: tensor.clone() for name, tensor in self.tensors.items() if not tensor.requires_grad}
        names = [name for name in self.tensors if name in self.graph.trainable]
        tensors = [self.tensors[name] for name in names]
        grads = torch.autograd.grad(self.loss(x, y), tensors, allow_unused=True, materialize_grads=True)
        self.tensors.update(buffers)
        return {name: np.asarray(grad.numpy()) for name, grad in zip(names, grads, strict=True)}

    def trainable(self) -> list[Tensor]:
        """Return the tensors that training changes."""
        return [tensor for tensor in self.tensors.values() if tensor.requires_grad]

    def load(self, arrays: Mapping[str, Array]) -> dict[str, Tensor]:
        """Set arrays by name, in place, and return the old ones."""
        old = {name: self.tensors[name].detach().clone() for name in arrays}
        with torch.no_grad():
            for name, array in arrays.items():
                self.tensors[name].copy_(torch.as_tensor(array))
        return old

    def parameters(self) -> dict[str, Array]:
        """Return every array of the graph as it is now, float64."""
        return {name: tensor.detach().numpy().copy() for name, tensor in self.tensors.items()}

    def kink_margin(self, x: Array, biases: Mapping[str, str] | None = None) -> float:
        """Return the smallest distance to a kink in a training pass, relative to the largest entry of its map.

        Args:
            x: inputs ``(N, ...)``.
            biases: names of arrays ``(C,)`` that may move to widen the margin, by the name of the node with the kink;
                moving one must move the first input of that node alike.
        """
        self.training, self._margin, self._biases = True, math.inf, dict(biases or {})
        with torch.no_grad():
            self.forward(x)
        margin, self._margin = self._margin, None
        return margin

    @property
    def measuring(self) -> bool:
        """Whether this pass only measures distances to kinks, and leaves running averages alone."""
        return self._margin is not None

    def note_distance(self, distance: Tensor, scale: Tensor) -> None:
        """Take distances to a kink into account; exact zeros are the same in float32 and do not count."""
        nonzero = distance[distance > 0]
        if self._margin is not None and nonzero.numel():
            self._margin = min(self._margin, float(nonzero.min() / scale.abs().max()))

    def _at_kinks(self, node: Node, x: Tensor) -> Tensor:
        points = _kink_points(node)
        if points and node.name in self._biases:
            x = self._move(self._biases[node.name], x, points)
        for point in points:
            self.note_distance((x - point).abs(), x)
        return x

    def _move(self, bias: str, x: Tensor, points: Sequence[float]) -> Tensor:
        """Add to each channel the shift, and to its bias, that keeps its entries farthest from the kinks."""
        channels = x.transpose(0, 1).flatten(1)
        shifts = torch.linspace(-_LARGEST_SHIFT, _LARGEST_SHIFT, _SHIFTS, dtype=torch.float64)
        distances = [
            torch.stack([(channels + (shift - point)).abs().amin(1) for point in points]).amin(0) for shift in shifts
        ]
        best = shifts[torch.stack(distances).argmax(0)]
        self.tensors[bias] += best
        return x + best.reshape(-1, *[1] * (x.dim() - 2))


def torch_optimizer(optimizer: Any, judge: TorchNetwork) -> Any:
    """Return PyTorch's optimizer with the same settings, over the judge's trainable tensors.

    Raises:
        UsageError: PyTorch has no counterpart.
    """
    decay = optimizer.weight_decay
    one_dimensional = decay if optimizer.decay_bias_and_norm else 0.0  # biases, scales and shifts
    groups = [
        {"params": [tensor], "weight_decay": decay if tensor.dim() > 1 else one_dimensional}
        for tensor in judge.trainable()
    ]
    kind = type(optimizer).__name__
    if kind == "SGD":
        return torch.optim.SGD(groups, lr=optimizer.lr, momentum=optimizer.momentum, nesterov=optimizer.nesterov)
    if kind in ("Adam", "AdamW"):
        betas = (optimizer.beta1, optimizer.beta2)
        return getattr(torch.optim, kind)(groups, lr=optimizer.lr, betas=betas, eps=optimizer.epsilon)
    raise UsageError(f"verify: no PyTorch counterpart of the optimizer {kind}; expected SGD, Adam or AdamW")


class TorchLearner:
    """What the cross-check uses of a ``Learner``, in float64 PyTorch.

    Attributes:
        loss: mean loss of the last step.
    """

    def __init__(self, graph: Graph, loss: str, optimizer: Any) -> None:
        network = TorchNetwork(graph, loss)
        self.loss = math.nan
        self.parameters, self.load_parameters, self.gradients = network.parameters, network.load, network.gradients
        self._network, self._optimizer = network, torch_optimizer(optimizer, network)

    def partial_fit(self, x: Array, y: Array) -> TorchLearner:
        """Take one optimizer step and return this object, which has the ``loss``."""
        self._optimizer.zero_grad()
        loss = self._network.loss(x, y)
        loss.backward()
        self._optimizer.step()
        self.loss = float(loss.item())
        return self


# ---- operators: (network, node, input tensors) -> first output, batch dimension first --------------------------------

Rebuild = Callable[..., Tensor]


@dataclass(frozen=True)
class _Window:
    """Geometry of a sliding window, one entry per spatial axis."""

    kernel: list[int]
    strides: list[int]
    dilations: list[int]
    before: list[int]
    after: list[int]

    def reach(self, axis: int) -> int:
        """Return how many positions lie between the first and the last that a window touches, both included."""
        return self.dilations[axis] * (self.kernel[axis] - 1) + 1


def _window(node: Node, sizes: Sequence[int], kernel: Sequence[int]) -> _Window:
    ones, axes = [1] * len(sizes), len(sizes)
    window = _Window(
        list(kernel), list(node.get("strides") or ones), list(node.get("dilations") or ones), [0] * axes, [0] * axes
    )
    mode = node.get("auto_pad") or "NOTSET"
    if mode == "NOTSET":
        pads = list(node.get("pads") or [0] * 2 * axes)
        return replace(window, before=pads[:axes], after=pads[axes:])
    if mode == "VALID":
        return window
    strides = window.strides
    totals = [max(0, (-(-n // strides[i]) - 1) * strides[i] + window.reach(i) - n) for i, n in enumerate(sizes)]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (
        replace(window, before=small, after=large)
        if mode == "SAME_UPPER"
        else replace(window, before=large, after=small)
    )


def _rounded_up(window: _Window, sizes: Sequence[int]) -> _Window:
    """Return the window with padding at the end for ceil_mode: no window starts beyond the data and its padding."""
    after = []
    for axis, size in enumerate(sizes):
        stride, reach = window.strides[axis], window.reach(axis)
        count = -(-(size + window.before[axis] + window.after[axis] - reach) // stride) + 1
        if (count - 1) * stride >= size + window.before[axis]:
            count -= 1
        after.append((count - 1) * stride + reach - size - window.before[axis])
    return replace(window, after=after)


def _padded(x: Tensor, window: _Window, value: float = 0.0) -> Tensor:
    pairs = zip(reversed(window.before), reversed(window.after), strict=True)
    return torch.nn.functional.pad(x, [width for pair in pairs for width in pair], value=value)


def _windows(padded: Tensor, window: _Window) -> Tensor:
    """Return ``(N, C, positions ..., entries of a window)``."""
    for axis, stride in enumerate(window.strides):
        padded = padded.unfold(2 + axis, window.reach(axis), stride)[..., :: window.dilations[axis]]
    return padded.flatten(-len(window.kernel))


def _conv(net: TorchNetwork, node: Node, x: Tensor, w: Tensor, b: Tensor = None) -> Tensor:
    window = _window(node, x.shape[2:], w.shape[2:])
    function = torch.nn.functional.conv1d if x.dim() == 3 else torch.nn.functional.conv2d
    return function(_padded(x, window), w, b, window.strides, 0, window.dilations, node.get("group", 1))


def _max_pool(net: TorchNetwork, node: Node, x: Tensor) -> Tensor:
    window = _window(node, x.shape[2:], node.attributes["kernel_shape"])
    if node.get("ceil_mode", 0):
        window = _rounded_up(window, x.shape[2:])
    padded = _padded(x, window, -math.inf)
    if net.measuring and math.prod(window.kernel) > 1:
        first, second = _windows(padded, window).topk(2, dim=-1).values.unbind(-1)
        net.note_distance(first - second, x)
    function = torch.nn.functional.max_pool1d if x.dim() == 3 else torch.nn.functional.max_pool2d
    return function(padded, window.kernel, window.strides, 0, window.dilations)


def _average_pool(net: TorchNetwork, node: Node, x: Tensor) -> Tensor:
    window = _window(node, x.shape[2:], node.attributes["kernel_shape"])
    full = _rounded_up(window, x.shape[2:]) if node.get("ceil_mode", 0) else window
    counted = torch.ones_like(x[:1, :1])
    if node.get("count_include_pad", 0):  # padding counts, but what ceil_mode adds behind it does not
        behind = [wide - narrow for wide, narrow in zip(full.after, window.after, strict=True)]
        counted = _padded(_padded(counted, window, 1.0), replace(full, before=[0] * len(behind), after=behind))
    else:
        counted = _padded(counted, full)
    return _windows(_padded(x, full), full).sum(-1) / _windows(counted, full).sum(-1)


def _batch_norm(
    net: TorchNetwork, node: Node, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor
) -> Tensor:
    if net.measuring:
        mean = var = None
    momentum = 1.0 - node.get("momentum", 0.9)  # ONNX weighs the old average, PyTorch the new value
    epsilon = node.get("epsilon", 1e-5)
    y = torch.nn.functional.batch_norm(x, mean, var, scale, bias, net.training, momentum, epsilon)
    if y.requires_grad:  # PyTorch 2.13 is wrong about permuted gradients of maps of one row
        y.register_hook(lambda grad: grad.clone(memory_format=torch.contiguous_format))
    return y


def _gemm(net: TorchNetwork, node: Node, x: Tensor, w: Tensor, b: Tensor = None) -> Tensor:
    y = node.get("alpha", 1.0) * (x @ (w.T if node.get("transB", 0) else w))
    return y if b is None else y + node.get("beta", 1.0) * b


def _kink_points(node: Node) -> tuple[float, ...]:
    """Return the inputs at which the derivative of an operator jumps."""
    if node.op_type in ("Relu", "LeakyRelu") or (node.op_type == "Elu" and node.get("alpha", 1.0) != 1.0):
        return (0.0,)
    if node.op_type == "Clip":
        return tuple(float(limit) for key in ("min", "max") if (limit := node.get(key)) is not None)
    if node.op_type == "HardSigmoid":
        alpha, beta = node.get("alpha", 0.2), node.get("beta", 0.5)
        return (-beta / alpha, (1.0 - beta) / alpha)
    return (-3.0, 3.0) if node.op_type == "HardSwish" else ()


def _clip(net: TorchNetwork, node: Node, x: Tensor) -> Tensor:
    low, high = (node.get(key) for key in ("min", "max"))
    return _bounded(x, -math.inf if low is None else float(low), math.inf if high is None else float(high))


def _hard_sigmoid(net: TorchNetwork, node: Node, x: Tensor) -> Tensor:
    return _bounded(node.get("alpha", 0.2) * x + node.get("beta", 0.5), 0.0, 1.0)


def _bounded(x: Tensor, low: float, high: float) -> Tensor:
    """Clamp without a gradient at the bounds, as ``hardtanh`` and ``hardsigmoid`` do; ``clamp`` has one there."""
    return torch.where((x > low) & (x < high), x, torch.clamp(x, low, high).detach())


def _pad(net: TorchNetwork, node: Node, x: Tensor) -> Tensor:
    pads, axes = node.attributes["pads"], x.dim()
    widths = [width for axis in reversed(range(axes)) for width in (pads[axis], pads[axis + axes])]
    return torch.nn.functional.pad(x, widths, value=float(node.get("value", 0.0)))


def _channel_shuffle(net: TorchNetwork, node: Node, x: Tensor) -> Tensor:
    return x.unflatten(1, (node.get("group"), -1)).transpose(1, 2).flatten(1, 2)


_TABLE: dict[str, Rebuild] = {
    "Add": lambda net, node, a, b: a + b,
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "ChannelShuffle": _channel_shuffle,
    "Clip": _clip,
    "Concat": lambda net, node, *parts: torch.cat(parts, node.get("axis", 1)),
    "Conv": _conv,
    "Elu": lambda net, node, x: torch.nn.functional.elu(x, node.get("alpha", 1.0)),
    "Flatten": lambda net, node, x: x.flatten(1),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda net, node, x: x.mean(tuple(range(2, x.dim())), keepdim=True),
    "HardSigmoid": _hard_sigmoid,
    "HardSwish": lambda net, node, x: torch.nn.functional.hardswish(x),
    "Identity": lambda net, node, x: x,
    "LeakyRelu": lambda net, node, x: torch.nn.functional.leaky_relu(x, node.get("alpha", 0.01)),
    "MatMul": lambda net, node, x, w: x @ w,
    "MaxPool": _max_pool,
    "Mul": lambda net, node, a, b: a * b,
    "Pad": _pad,
    "Relu": lambda net, node, x: torch.nn.functional.relu(x),
    "Reshape": lambda net, node, x: x.reshape(x.shape[0], *node.attributes["shape"]),
    "Sigmoid": lambda net, node, x: torch.sigmoid(x),
    "Tanh": lambda net, node, x: torch.tanh(x),
    "Transpose": lambda net, node, x: x.permute(*node.attributes["perm"]),
}
