"""The ONNX backend cases that concern edgetrain's operators, and how one of them is run.

The cases ship in the onnx package (``onnx.backend.test``): a model, inputs, expected
outputs. They give weights as inputs of the network; here those become initializers,
since edgetrain trains weights and feeds data.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, numpy_helper

import edgetrain as et
from edgetrain.errors import UnsupportedError
from edgetrain.graph import Graph
from edgetrain.onnx_io.importer import load_onnx
from edgetrain.onnx_io.readers import READERS

Array = np.ndarray
KINDS = ("node", "simple", "pytorch-operator", "pytorch-converted")
# These only occur inside shape arithmetic, which is folded away.
FOLDED = {"Cast", "CastLike", "Shape", "Size"}
OPERATORS = frozenset(READERS) - FOLDED
# Operators whose further inputs are data like the first one, when they have as many samples.
_SEVERAL_DATA_INPUTS = {"Add", "Concat", "Div", "Mul", "Sub", "Sum"}


@dataclass(frozen=True)
class Case:
    """One case: the model, its inputs and expected outputs by name, tolerances."""

    name: str
    kind: str
    model: ModelProto
    inputs: dict[str, Array]
    expected: list[Array]
    rtol: float
    atol: float

    @property
    def operators(self) -> list[str]:
        """Operators of the case in alphabetical order, without constants."""
        return sorted({node.op_type for node in self.model.graph.node} - {"Constant"})

    @property
    def data(self) -> dict[str, Array]:
        """Inputs with one entry per sample: the first, and those that are added to it or joined with it."""
        first, *others = self.inputs
        samples = np.shape(self.inputs[first])[:1]
        readers = {name: node.op_type for node in self.model.graph.node for name in node.input}
        same = [
            name for name in others
            if readers.get(name) in _SEVERAL_DATA_INPUTS and np.ndim(self.inputs[name]) == np.ndim(self.inputs[first])
            and np.shape(self.inputs[name])[:1] == samples
        ]  # fmt: skip
        return {name: self.inputs[name] for name in [first, *same]}

    @property
    def _is_random(self) -> bool:
        """Whether the case expects the random numbers of one implementation's dropout."""
        switch = {node.input[2] for node in self.model.graph.node if node.op_type == "Dropout" and len(node.input) > 2}
        return any(bool(np.any(self.inputs.get(name, False))) for name in switch)

    def graph(self) -> Graph:
        """Import the model.

        Raises:
            UnsupportedError: the case needs what edgetrain does not do.
        """
        if self._is_random:
            raise UnsupportedError("Dropout in training mode: the expected values come from one random generator")
        model = ModelProto.FromString(self.model.SerializeToString())
        weights = {name: array for name, array in self.inputs.items() if name not in self.data}
        model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), n) for n, a in weights.items())
        return load_onnx(model)

    def run(self) -> list[Array]:
        """Compute the outputs with edgetrain.

        Raises:
            UnsupportedError: the case needs what edgetrain does not do.
        """
        return [self._output(name) for name in self.graph().outputs]

    def _output(self, name: str) -> Array:
        """Compute one output: a learner gives the first."""
        graph, data = self.graph(), self.data
        graph.set_outputs([name])
        samples = max(1, len(next(iter(data.values()))))
        learner = et.Learner(graph, batch_size=min(samples, 8), seed=0)
        y = learner.logits(data if len(data) > 1 else next(iter(data.values())))
        probabilities = _softmax(y) if graph.softmax_output or graph.log_softmax_output else y
        return np.log(probabilities) if graph.log_softmax_output else probabilities


def _softmax(y: Array) -> Array:
    e = np.exp(y - y.max(axis=1, keepdims=True))
    return e / e.sum(axis=1, keepdims=True)


def cases() -> list[Case]:
    """Return every case made of supported operators alone."""
    from onnx.backend.test.loader import load_model_tests

    found: list[Case] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package computes expected values of other cases with overflows
        for kind in KINDS:
            for raw in load_model_tests(kind=kind):
                found += _of(raw, kind)
    return sorted(found, key=lambda case: (case.kind != "node", case.kind, case.name))


def _of(raw: Any, kind: str) -> Iterator[Case]:
    model = raw.model if raw.model is not None else onnx.load(Path(raw.model_dir) / "model.onnx")
    operators = {node.op_type for node in model.graph.node} - {"Constant"}
    if not operators or not operators <= OPERATORS or any(n.domain for n in model.graph.node):
        return
    given, expected = raw.data_sets[0] if raw.data_sets else _stored(Path(raw.model_dir) / "test_data_set_0")
    held = {tensor.name for tensor in model.graph.initializer}
    names = [info.name for info in model.graph.input if info.name not in held]
    # Cases stored on disk list values of initializers among the inputs, in the order of the graph's inputs.
    if len(given) != len(names):
        names = [info.name for info in model.graph.input][: len(given)]
    yield Case(raw.name, kind, model, dict(zip(names, given, strict=True)), list(expected), raw.rtol, raw.atol)


def _stored(folder: Path) -> tuple[list[Array], list[Array]]:
    return _tensors(folder, "input"), _tensors(folder, "output")


def _tensors(folder: Path, what: str) -> list[Array]:
    paths = sorted(folder.glob(f"{what}_*.pb"), key=lambda path: int(path.stem.split("_")[1]))
    return [numpy_helper.to_array(onnx.TensorProto.FromString(path.read_bytes())) for path in paths]
