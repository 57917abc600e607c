"""Where parameters, gradients and optimizer state live: one flat array each, in the same order.

One order for all: trainable arrays that decay, trainable arrays that do not, arrays
that are not trained. So an optimizer step is one pass over two ranges. Of an array with a compact
``SparseIndex`` only the numbers that exist are stored.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import ArrayLike, NDArray

from edgetrain.arrays import ALIGNMENT, READ_BEHIND, aligned
from edgetrain.errors import GraphError
from edgetrain.graph import Graph, Node, Normalization, placeholder
from edgetrain.kernels.codes import DENSITY, RECORD, SETTINGS, TALLY_BYTES, THRESHOLD
from edgetrain.optim import Optimizer
from edgetrain.sparse_index import SparseIndex

_LINE = ALIGNMENT // 4  # floats per cache line; every array starts on a line and is padded with zeros
_SPARE = READ_BEHIND // 4  # floats behind the last array


class Parameters:
    """The arrays of a graph in flat float32 buffers.

    Attributes:
        buffers: ``weights``, ``gradients``, the optimizer's moments, ``average`` (of the weights, where the optimizer
            averages them), and the small fixed arrays that kernels read (``state``, ``result``, ``settings``,
            ``scale``, ``shift``).
        decayed, trained: floats before the first array that does not decay, and before the first not trained.
        sparse: the indices of weights that are sparse, by name.
        moments: names of the optimizer's buffers, empty before training.
        patterns: how often an index has changed so far.
        lists: what plans make of the indices for their kernels, by name, as long as there is a plan that needs it.
    """

    def __init__(self, graph: Graph, optimizer: Optimizer, sparse: Mapping[str, SparseIndex] | None = None) -> None:
        self.sparse = dict(sparse or {})
        names = sorted(graph.arrays, key=lambda name: self._group(graph, optimizer, name))  # stable: keeps order
        self._shapes = {name: graph.arrays[name].shape for name in graph.arrays}
        self._starts: dict[str, int] = {}
        self._gradients: dict[str, str] = {}
        self.moments: tuple[str, ...] = ()
        self.patterns = 0
        self.lists: WeakValueDictionary[str, NDArray[np.int32]] = WeakValueDictionary()
        place, ends = 0, [0, 0, 0]
        for name in names:
            self._starts[name] = place
            place += -(-self._size(name) // _LINE) * _LINE
            for group in range(self._group(graph, optimizer, name), 3):
                ends[group] = place
        self.decayed, self.trained, self.total = ends
        self.buffers: dict[str, NDArray[np.generic]] = {"weights": aligned(self.total + _SPARE)}
        self.buffers["state"] = aligned(8, np.int64)
        self.buffers["result"] = aligned(8, np.float64)
        self.buffers["settings"] = aligned(max(_LINE, SETTINGS))
        channels = graph.input_shape[0] if graph.inputs and graph.input_shape else 1
        self.buffers["scale"], self.buffers["shift"] = aligned(channels), aligned(channels)
        self.buffers["scale"][:] = 1
        self._scaled_for: Normalization | None = None
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
        self.moments = optimizer.moments
        for buffer in ("gradients", *self.moments):
            if buffer not in self.buffers:
                self.buffers[buffer] = aligned(self.trained + _SPARE)
        if optimizer.averaging and "average" not in self.buffers:
            self.buffers["average"] = aligned(self.total + _SPARE)  # the first step begins it

    @property
    def carried(self) -> tuple[str, ...]:
        """The buffers whose numbers belong to a weight, and move with it when the topology changes."""
        return ("weights", *self.moments, *(("average",) if "average" in self.buffers else ()))

    def start_records(self, nodes: Sequence[Node], count: int) -> None:
        """Make the records of layers that prune, with the initial density of their nodes, and what they count."""
        records, tally = aligned(RECORD * max(1, count)), aligned(TALLY_BYTES // 8 * max(1, count), np.int64)
        for node in nodes:
            if node.get("record") is not None and node.get("density") is not None:
                records[RECORD * node.get("record") + DENSITY] = node.get("density")
        self.buffers["records"], self.buffers["tally"] = records, tally
        self._fresh_records = records.copy()

    def forget(self) -> None:
        """Set the optimizer's moments and the records of layers that prune to what they are before the first step."""
        for name in self.moments:
            self.buffers[name][:] = 0
        if "records" in self.buffers:
            self.buffers["records"][:] = self._fresh_records

    def find(self, value: str) -> tuple[str, int] | None:
        """Return (buffer, byte offset) of an array or of an array's gradient, or ``None``."""
        if value in self._starts:
            return "weights", 4 * self._starts[value]
        if value in self._gradients:
            return "gradients", 4 * self._starts[self._gradients[value]]
        return None

    def gradient(self, name: str) -> str | None:
        """Return the name of the gradient value of an array, or ``None`` if it has none."""
        return next((value for value, of in self._gradients.items() if of == name), None)

    def view(self, name: str, buffer: str = "weights") -> NDArray[np.float32]:
        """Return an array of a buffer as a view, float32: in its ONNX shape, or compact ``(capacity,)``."""
        start = self._starts[name]
        flat: NDArray[np.float32] = self.buffers[buffer][start : start + self._size(name)]  # type: ignore[assignment]  # float32
        return flat if self._is_compact(name) else flat.reshape(self._shapes[name])

    def stored(self, name: str, buffer: str = "weights") -> NDArray[np.float32]:
        """Return the part of ``view`` that means something: what a checkpoint keeps."""
        view = self.view(name, buffer)
        return view[: self.sparse[name].count] if self._is_compact(name) else view

    def shared(self, name: str) -> NDArray[np.float32]:
        """Return an array for a graph to hold: the stored one, or a placeholder of the right shape without memory."""
        if self._is_compact(name):
            return placeholder(self._shapes[name])
        return self.view(name)

    def dense(self, name: str, buffer: str = "weights") -> NDArray[np.float32]:
        """Return a copy of an array in its ONNX shape, as the network uses it: 0 for weights that do not exist.

        Gradients and moments of weights that are stored but not used (``SparseIndex.compact`` is false) are kept.
        """
        index, view = self.sparse.get(name), self.view(name, buffer)
        if index is None or (not index.compact and buffer not in ("weights", "average")):
            return view.copy()
        return index.dense(view if index.compact else index.values_of(view))

    def put(self, name: str, array: ArrayLike, buffer: str = "weights") -> None:
        """Store an array given in its ONNX shape; of a compact one the entries of its index."""
        view = self.view(name, buffer)
        if not self._is_compact(name):
            view[...] = array
            return
        index = self.sparse[name]
        view[: index.count], view[index.count :] = index.values_of(array), 0

    def names(self) -> list[str]:
        """Return the names of all arrays in the graph's order."""
        return list(self._shapes)

    def load(self, arrays: Mapping[str, NDArray[np.float32]]) -> None:
        """Copy arrays in; the average of the weights goes on from them, thresholds of activations are chosen anew."""
        if "records" in self.buffers:
            self.buffers["records"].reshape(-1, RECORD)[:, THRESHOLD] = 0
        for name, array in arrays.items():
            for buffer in ("weights", "average"):
                if buffer in self.buffers:
                    self.put(name, array, buffer)

    def scale_input(self, normalization: Normalization | None) -> None:
        """Set the factor and the offset per channel that the first input is read with, if they are others now.

        Raises:
            GraphError: they are those of another number of channels.
        """
        if normalization is self._scaled_for:
            return
        scale, shift = self.buffers["scale"], self.buffers["shift"]
        if normalization is not None and len(normalization.mean) not in (1, len(scale)):
            raise GraphError(
                f"inputs are normalised by numbers of {len(normalization.mean)} channels, the input has {len(scale)}; "
                "give graph.normalization as many, or 1 for all"
            )
        scale[:], shift[:] = 1, 0
        if normalization is not None:
            scale[:], shift[:] = 1 / normalization.std, -normalization.mean / normalization.std
        self._scaled_for = normalization

    def _is_compact(self, name: str) -> bool:
        return name in self.sparse and self.sparse[name].compact

    def _size(self, name: str) -> int:
        """Return how many floats an array takes."""
        return self.sparse[name].capacity if self._is_compact(name) else int(np.prod(self._shapes[name]))
