"""onert as a further peer of the benchmark: its trainer, fed with a .tflite file that is written here.

onert trains plain convolutional networks alone: it has no gradient of BatchNormalization. Its SGD has no momentum, so a
step here reads and writes less than the others' do: the difference is in its favour. It trains on one thread.
"""

from __future__ import annotations

import importlib
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Node

_LR = 0.01


def import_onert(threads: int) -> tuple[Any, Any, Any]:
    """Return the modules onert.experimental.train, tflite and flatbuffers.

    Raises:
        UsageError: one of them is not installed.
    """
    os.environ["NUM_THREADS"] = str(threads)
    try:
        names = ("onert.experimental.train", "tflite", "flatbuffers")
        return tuple(importlib.import_module(name) for name in names)  # type: ignore[return-value]  # three of them
    except ModuleNotFoundError:
        raise UsageError(
            "onert is not installed: pip install onert tflite flatbuffers, or leave that contender out"
        ) from None


class OnertStep:
    """One training step of onert: forward, cross-entropy, backward, SGD without momentum.

    Args:
        graph: the network, a chain of convolutions, poolings, ReLUs and full connections.
        x, y: the batch, float32 ``(N, C, H, W)`` and int64 ``(N,)``.
        threads: told to onert, which trains on one whatever it is told.

    Raises:
        UsageError: onert, tflite or flatbuffers is not installed.
        UnsupportedError: an operator that onert cannot train, or one outside such chains.
    """

    def __init__(self, graph: Graph, x: NDArray[np.float32], y: NDArray[np.int64], threads: int) -> None:
        train, tflite, flatbuffers = import_onert(threads)
        _check_trainable(graph)
        model = _Model(tflite, flatbuffers, graph).written()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.tflite"
            path.write_bytes(model)
            self._session = train.session(str(path))
            loss = train.losses.CategoricalCrossentropy("mean")
            self._session.compile(train.optimizer.SGD(_LR), loss, batch_size=len(x))
        self._x = [np.ascontiguousarray(np.moveaxis(x, 1, -1))]
        self._y = [np.eye(graph.num_classes, dtype=np.float32)[y]]

    def __call__(self) -> float:
        """Take one step and return the loss."""
        return float(self._session.train_step(self._x, self._y)["loss"][0])

    def facts(self) -> dict[str, Any]:
        """Return nothing: onert tells of no plan."""
        return {}


@dataclass
class _Operator:
    name: str
    inputs: list[int]
    output: int
    kind: str  # of the table of its options
    options: dict[str, Any]


def _check_trainable(graph: Graph) -> None:
    """Raise UnsupportedError for the one operator of the benchmark's networks that onert has no gradient of."""
    if any(node.op_type == "BatchNormalization" for node in graph.nodes):
        raise UnsupportedError("onert has no gradient of BatchNormalization")


class _Model:
    """A .tflite file of a chain of nodes: channels last, ReLU inside the operator before it, Softmax at the end."""

    def __init__(self, tflite: Any, flatbuffers: Any, graph: Graph) -> None:
        self._tflite, self._graph = tflite, graph
        self._builder = flatbuffers.Builder(0)
        self._buffers = [self._table("Buffer")]  # the first is empty by convention, and every activation's
        self._tensors: list[int] = []
        self._operators: list[_Operator] = []
        self._flattened: tuple[int, ...] = ()
        self._last = self._first = self._tensor(_channels_last(graph.input_shape))
        previous = graph.inputs[0]
        for node in graph.nodes:
            if node.x.name != previous:
                raise UnsupportedError(f"node '{node.name}': the benchmark's onert side has chains of nodes alone")
            self._add(node)
            previous = node.y.name
        self._append("SOFTMAX", [], "SoftmaxOptions", {"Beta": 1.0}, graph.output_shape)

    def _add(self, node: Node) -> None:
        makers: dict[str, Callable[[Node], None]] = {
            "Conv": self._conv, "Gemm": self._gemm, "MaxPool": self._max_pool, "Flatten": self._flatten,
            "Relu": self._relu,
        }  # fmt: skip
        if node.op_type not in makers:
            raise UnsupportedError(f"node '{node.name}': the benchmark's onert side has no {node.op_type}")
        makers[node.op_type](node)

    def _conv(self, node: Node) -> None:
        axes = len(node.x.shape) - 1
        if axes != 2 or node.get("group", 1) > 1 or max(node.get("dilations") or [1]) > 1:
            raise UnsupportedError(f"node '{node.name}': the benchmark's onert side has plain 2-D convolutions alone")
        weight = np.moveaxis(self._graph.arrays[node.input(1).name], 1, -1)
        options = {**_strides(node), "Padding": self._padding(node, weight.shape[1:3])}
        self._append("CONV_2D", [self._constant(weight), self._bias(node)], "Conv2DOptions", options, node.y.shape)

    def _gemm(self, node: Node) -> None:
        weight = self._graph.arrays[node.input(1).name]
        weight = weight if node.get("transB", 0) else weight.T
        if self._flattened:  # the columns are in the order of channels first
            weight = np.moveaxis(weight.reshape(-1, *self._flattened), 1, -1).reshape(len(weight), -1)
            self._flattened = ()
        inputs = [self._constant(weight), self._bias(node)]
        self._append("FULLY_CONNECTED", inputs, "FullyConnectedOptions", {}, node.y.shape)

    def _max_pool(self, node: Node) -> None:
        if len(node.x.shape) != 3:
            raise UnsupportedError(f"node '{node.name}': the benchmark's onert side has pooling of images alone")
        height, width = node.get("kernel_shape")
        sizes = {"FilterHeight": height, "FilterWidth": width, "Padding": self._padding(node, (height, width))}
        self._append("MAX_POOL_2D", [], "Pool2DOptions", {**_strides(node), **sizes}, node.y.shape)

    def _flatten(self, node: Node) -> None:
        self._flattened = node.x.shape
        shape = self._constant(np.array([-1, node.y.shape[0]], np.int32))
        self._append("RESHAPE", [shape], "ReshapeOptions", {}, node.y.shape)

    def _relu(self, node: Node) -> None:
        if not self._operators or self._operators[-1].name not in ("CONV_2D", "FULLY_CONNECTED"):
            raise UnsupportedError(f"node '{node.name}': the benchmark's onert side has ReLU behind products alone")
        self._operators[-1].options["FusedActivationFunction"] = self._tflite.ActivationFunctionType.RELU

    def _bias(self, node: Node) -> int:
        bias = node.optional(2)
        return self._constant(np.zeros(node.y.shape[0], np.float32) if bias is None else self._graph.arrays[bias.name])

    def _padding(self, node: Node, kernel: Sequence[int]) -> int:
        """Return the name that the node's padding has in a .tflite file.

        Raises:
            UnsupportedError: it has none.
        """
        pads = list(node.get("pads") or [0] * 4)
        if not any(pads):
            return int(self._tflite.Padding.VALID)
        strides = node.get("strides") or [1, 1]
        sizes = zip(node.x.shape[1:], kernel, strides, strict=True)
        totals = [max((-(-size // s) - 1) * s + k - size, 0) for size, k, s in sizes]
        if pads != [total // 2 for total in totals] + [total - total // 2 for total in totals]:
            raise UnsupportedError(f"node '{node.name}': a .tflite file cannot say the padding {pads}")
        return int(self._tflite.Padding.SAME)

    def _append(self, name: str, inputs: list[int], kind: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
        """Append an operator that reads what the one before it wrote."""
        given, self._last = self._last, self._tensor(_channels_last(shape))
        self._operators.append(_Operator(name, [given, *inputs], self._last, kind, options))

    def _constant(self, array: NDArray[Any]) -> int:
        data = self._builder.CreateByteVector(np.ascontiguousarray(array).tobytes())
        self._buffers.append(self._table("Buffer", Data=data))
        return self._tensor(array.shape, len(self._buffers) - 1, array.dtype.name.upper())

    def _tensor(self, shape: tuple[int, ...], buffer: int = 0, kind: str = "FLOAT32") -> int:
        number = len(self._tensors)
        name, sizes = self._builder.CreateString(f"t{number}"), self._numbers("Tensor", "Shape", shape)
        kind = getattr(self._tflite.TensorType, kind)
        self._tensors.append(self._table("Tensor", Shape=sizes, Type=kind, Buffer=buffer, Name=name))
        return number

    def _table(self, name: str, **fields: Any) -> int:
        getattr(self._tflite, f"{name}Start")(self._builder)
        for field, value in fields.items():
            getattr(self._tflite, f"{name}Add{field}")(self._builder, value)
        return int(getattr(self._tflite, f"{name}End")(self._builder))

    def _numbers(self, table: str, field: str, numbers: Sequence[int]) -> int:
        return self._vector(table, field, numbers, self._builder.PrependInt32)

    def _tables(self, table: str, field: str, offsets: Sequence[int]) -> int:
        return self._vector(table, field, offsets, self._builder.PrependUOffsetTRelative)

    def _vector(self, table: str, field: str, items: Sequence[int], prepend: Callable[[int], None]) -> int:
        getattr(self._tflite, f"{table}Start{field}Vector")(self._builder, len(items))
        for item in reversed(items):
            prepend(item)
        return int(self._builder.EndVector())

    def written(self) -> bytes:
        """Return the file."""
        codes = list(dict.fromkeys(operator.name for operator in self._operators))
        operators = [self._written_operator(operator, codes) for operator in self._operators]
        body = self._table(
            "SubGraph", Tensors=self._tables("SubGraph", "Tensors", self._tensors),
            Inputs=self._numbers("SubGraph", "Inputs", [self._first]),
            Outputs=self._numbers("SubGraph", "Outputs", [self._last]),
            Operators=self._tables("SubGraph", "Operators", operators),
        )  # fmt: skip
        model = self._table(
            "Model", Version=3, Subgraphs=self._tables("Model", "Subgraphs", [body]),
            OperatorCodes=self._tables("Model", "OperatorCodes", [self._written_code(name) for name in codes]),
            Buffers=self._tables("Model", "Buffers", self._buffers),
        )  # fmt: skip
        self._builder.Finish(model, file_identifier=b"TFL3")
        return bytes(self._builder.Output())

    def _written_operator(self, operator: _Operator, codes: list[str]) -> int:
        inputs = self._numbers("Operator", "Inputs", operator.inputs)
        outputs = self._numbers("Operator", "Outputs", [operator.output])
        options = self._table(operator.kind, **operator.options)
        kind = getattr(self._tflite.BuiltinOptions, operator.kind)
        return self._table("Operator", OpcodeIndex=codes.index(operator.name), Inputs=inputs, Outputs=outputs,
                           BuiltinOptionsType=kind, BuiltinOptions=options)  # fmt: skip

    def _written_code(self, name: str) -> int:
        code = getattr(self._tflite.BuiltinOperator, name)
        return self._table("OperatorCode", DeprecatedBuiltinCode=code, BuiltinCode=code, Version=1)


def _channels_last(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return a shape with a batch dimension of 1; onert widens it to the batch."""
    return (1, *shape[1:], shape[0])


def _strides(node: Node) -> dict[str, int]:
    height, width = node.get("strides") or [1, 1]
    return {"StrideH": height, "StrideW": width}
