"""Where parameters, gradients and optimizer state live: one flat array each, in the same order.

One order for all: trainable arrays that decay, trainable arrays that do not, arrays
that are not trained. So an optimizer step is one pass over two ranges.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgetrain.arrays import ALIGNMENT, aligned
from edgetrain.graph import Graph, Normalization
from edgetrain.optim import SETTINGS, Optimizer

_LINE = ALIGNMENT // 4  # floats per cache line; every array starts on a line and is padded with zeros


class Parameters:
    """The arrays of a graph in flat float32 buffers.

    Attributes:
        buffers: ``weights``, ``gradients``, the optimizer's moments, and the small fixed
            arrays that kernels read (``state``, ``result``, ``settings``, ``scale``, ``shift``).
        decayed, trained: floats before the first array that does not decay, and before the first not trained.
    """

    def __init__(self, graph: Graph, optimizer: Optimizer) -> None:
        names = sorted(graph.arrays, key=lambda name: self._group(graph, optimizer, name))  # stable: keeps order
        self._shapes = {name: graph.arrays[name].shape for name in graph.arrays}
        self._starts: dict[str, int] = {}
        self._gradients: dict[str, str] = {}
        self._moments: tuple[str, ...] = ()
        place, ends = 0, [0, 0, 0]
        for name in names:
            self._starts[name] = place
            place += -(-graph.arrays[name].size // _LINE) * _LINE
            for group in range(self._group(graph, optimizer, name), 3):
                ends[group] = place
        self.decayed, self.trained, self.total = ends
        self.buffers: dict[str, NDArray[np.generic]] = {"weights": aligned(self.total + _LINE)}
        self.buffers["state"] = aligned(8, np.int64)
        self.buffers["result"] = aligned(8, np.float64)
        self.buffers["settings"] = aligned(max(_LINE, SETTINGS))
        channels = graph.input_shape[0] if graph.inputs and graph.input_shape else 1
        self.buffers["scale"], self.buffers["shift"] = aligned(channels), aligned(channels)
        self.load(graph.arrays)

    @staticmethod
    def _group(graph: Graph, optimizer: Optimizer, name: str) -> int:
        """0: decays, 1: does not, 2: not trained. Biases, scales and shifts are the arrays of one dimension."""
        if name not in graph.trainable:
            return 2
        return 0 if optimizer.decay_bias_and_norm or graph.arrays[name].ndim > 1 else 1

    def start_training(self, gradients: Mapping[str, str], optimizer: Optimizer) -> None:
        """Make the buffers that only training needs; ``gradients``: the gradient value of every trainable array."""
        self._gradients = {value: name for name, value in gradients.items()}
        self._moments = optimizer.moments
        for buffer in ("gradients", *self._moments):
            if buffer not in self.buffers:
                self.buffers[buffer] = aligned(self.trained + _LINE)

    def forget(self) -> None:
        """Set the optimizer's moments to zero, as they are before the first step."""
        for name in self._moments:
            self.buffers[name][:] = 0

    def find(self, value: str) -> tuple[str, int] | None:
        """Return (buffer, byte offset) of an array or of an array's gradient, or ``None``."""
        if value in self._starts:
            return "weights", 4 * self._starts[value]
        if value in self._gradients:
            return "gradients", 4 * self._starts[self._gradients[value]]
        return None

    def view(self, name: str, buffer: str = "weights") -> NDArray[np.float32]:
        """Return an array of a buffer as a view in its ONNX shape, float32."""
        shape = self._shapes[name]
        start = self._starts[name]
        flat: NDArray[np.float32] = self.buffers[buffer][start : start + int(np.prod(shape))]  # type: ignore[assignment]
        return flat.reshape(shape)

    def names(self) -> list[str]:
        """Return the names of all arrays in the graph's order."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return an array's shape."""
        return self._shapes[name]

    def load(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy arrays in."""
        for name, array in arrays.items():
            self.view(name)[...] = array

    def scale_input(self, normalization: Normalization | None) -> None:
        """Set the factor and the offset per channel that the first input is read with."""
        scale, shift = self.buffers["scale"], self.buffers["shift"]
        scale[:], shift[:] = 1, 0
        if normalization is not None:
            scale[:], shift[:] = 1 / normalization.std, -normalization.mean / normalization.std
