"""onnxruntime-training as a further peer of the benchmark: its on-device training of an exported ONNX model.

Its optimizers are AdamW and SGD without momentum, so a step here reads and writes less than the others' do: the
difference is in its favour. Its Python package imports PyTorch, which therefore counts in the memory and in the start.
"""

from __future__ import annotations

import importlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph

if TYPE_CHECKING:
    from onnx import ModelProto

_LR = 0.01
_IR_VERSION = 10  # the newest that release 1.19 reads; the package onnx writes newer ones


def import_onnxruntime() -> Any:
    """Return the module onnxruntime, with its part for training.

    Raises:
        UsageError: onnxruntime-training, or PyTorch which it needs, is not installed.
    """
    try:
        for name in ("onnxruntime.training.artifacts", "onnxruntime.training.api"):
            importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"onnxruntime-training is not installed ({error}): pip install onnxruntime-training torch, where "
            "onnxruntime is not, or leave that contender out"
        ) from None
    return importlib.import_module("onnxruntime")


class OnnxruntimeStep:
    """One training step of onnxruntime-training: forward, cross-entropy, backward, SGD without momentum.

    Args:
        graph: the network.
        x, y: the batch, float32 ``(N, ...)`` and int64 ``(N,)``.
        threads: that its operators compute with.

    Raises:
        UsageError: onnxruntime-training is not installed.
        UnsupportedError: an operator that it has no gradient of.
    """

    def __init__(self, graph: Graph, x: NDArray[np.float32], y: NDArray[np.int64], threads: int) -> None:
        runtime = import_onnxruntime()
        options = runtime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        with tempfile.TemporaryDirectory() as folder:
            try:
                _write_artifacts(runtime, graph, len(x), Path(folder))
                self._module, self._optimizer = _load(runtime, Path(folder), options)
            except RuntimeError as error:
                raise UnsupportedError(f"onnxruntime-training cannot train '{graph.name}': {error}") from error
        self._batch = [runtime.OrtValue.ortvalue_from_numpy(array) for array in (x, y)]

    def __call__(self) -> float:
        """Take one step and return the loss."""
        loss = self._module(*self._batch)
        self._optimizer.step()
        self._module.lazy_reset_grad()
        return float(loss.numpy())

    def facts(self) -> dict[str, Any]:
        """Return nothing: onnxruntime tells of no plan."""
        return {}


def _write_artifacts(runtime: Any, graph: Graph, count: int, folder: Path) -> None:
    """Write the models of training and of the update, and the parameters."""
    import onnx

    artifacts = runtime.training.artifacts
    artifacts.generate_artifacts(
        _model(graph, count), requires_grad=sorted(graph.trainable),
        frozen_params=sorted(set(graph.arrays) - set(graph.trainable)), loss=artifacts.LossType.CrossEntropyLoss,
        optimizer=artifacts.OptimType.SGD, artifact_directory=folder, loss_input_names=[graph.outputs[0]],
    )  # fmt: skip
    path = folder / "optimizer_model.onnx"
    update = onnx.load(path)
    update.ir_version = _IR_VERSION
    onnx.save(update, path)


def _model(graph: Graph, count: int) -> ModelProto:
    """Return the exported network for batches of one size: the gradient of AveragePool needs to know it."""
    from edgetrain.onnx_io.exporter import exported_model

    twin = graph.copy(share=True)
    twin.channels_last = False  # the batches that all contenders get are as inside
    model = exported_model(twin)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = count
    return model


def _load(runtime: Any, folder: Path, options: Any) -> tuple[Any, Any]:
    api = runtime.training.api
    state = api.CheckpointState.load_checkpoint(folder / "checkpoint")
    module = api.Module(folder / "training_model.onnx", state, session_options=options)
    optimizer = api.Optimizer(folder / "optimizer_model.onnx", module)
    optimizer.set_learning_rate(_LR)
    return module.train(), optimizer
