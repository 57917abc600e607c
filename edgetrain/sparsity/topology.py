"""The sparse layers of one learner: their indices and stored values, with a policy at work on them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.autodiff import TrainingGraph
from edgetrain.errors import CheckpointError, UsageError
from edgetrain.graph import Graph, is_placeholder
from edgetrain.kernels.codes import DENSITY, RECORD, THRESHOLD
from edgetrain.optim import Optimizer
from edgetrain.parameters import Parameters
from edgetrain.policies import NONE, describe_policy, parse_policy
from edgetrain.sparse_index import Positions, SparseIndex
from edgetrain.sparsity.layers import SparseLayer, dense_layers, sparse_layers
from edgetrain.sparsity.policy import Floats, Gradients, Mask, SparsityPolicy
from edgetrain.unbroken import unbroken

TOPOLOGY = "topology/"  # begins the names of the state's tensors
_PARTS = ("starts", "columns")
# Keys of the metadata of exported files.
SPARSITY, DENSITIES = "edgetrain.sparsity", "edgetrain.densities"


class Topology:
    """Which weights of a network exist; without a policy all of them do.

    Making it chooses the initial pattern; ``attach`` brings the values. Layers that a policy wants dense are not among
    ``layers``.

    Args:
        graph: the network; its arrays are read.
        policy: what decides, or ``None``.
        optimizer: refused if the policy cannot work with it.
        seed: of random patterns.

    Attributes:
        candidates: the layers that the policy is about, in execution order.
        layers: those with sparse weights; the others have density 1.
        records: of layers whose saved activations are pruned: number of their record, by weight.
        indices: their indices by weight.
        densities: the share of weights that every sparse layer keeps, by weight.
        beginning: what weights exist before the first step, and why, as text; empty without a policy.
        total_steps: length of training, ``None`` when nobody told.
        changes, seconds: before or after how many steps a weight came or went, in all processes of a run, and the time
            that these changes took.

    Raises:
        UsageError: the policy cannot work with the optimizer, or finds no layer; or weights of the graph are in a
            sparse learner.
    """

    def __init__(self, graph: Graph, policy: SparsityPolicy | None, optimizer: Optimizer, seed: int) -> None:
        self.policy, self.seed = policy, seed
        self.total_steps: int | None = None
        self.candidates: list[SparseLayer] = []
        self.layers: list[SparseLayer] = []
        self.records: dict[str, int] = {}
        self.indices: dict[str, SparseIndex] = {}
        self.densities: dict[str, float] = {}
        self._scales: dict[str, np.float32] = {}
        self.changes, self.seconds, self.beginning = 0, 0.0, ""
        self._held = False
        self._begun: int | None = None  # the step before which there was a change already
        _check_values(graph)
        if policy is not None:
            policy.check(optimizer)
            self._choose(graph, policy)
            graph.densities = {}  # from here on the placeholders stand for what this learner stores
            self.beginning = policy.beginning(graph.trained)

    def _choose(self, graph: Graph, policy: SparsityPolicy) -> None:
        check_layers(policy, graph)
        self.candidates = policy.layers(graph)
        arrays = {layer.weight: graph.arrays[layer.weight] for layer in self.candidates}
        if any(is_placeholder(array) for array in arrays.values()):  # a checkpoint: its state brings pattern and values
            for layer in self.candidates:
                if is_placeholder(arrays[layer.weight]):
                    index = self._add(policy, layer, graph.densities[layer.weight])
                    index.set_positions(np.arange(index.capacity if policy.compact else 0))
            return
        densities = policy.densities_for(self.candidates, arrays)
        for number, layer in enumerate(self.candidates):
            density, array = densities[layer.weight], arrays[layer.weight]
            rng = np.random.default_rng([self.seed, number])
            mask, scale = policy.initial(layer, array, density, rng, graph.trained)
            if mask.all() and (policy.compact or density >= 1):
                continue  # dense: the kernels and the storage of any dense layer
            self._add(policy, layer, density).set(mask)
            self._scales[layer.weight] = np.float32(scale)

    def _add(self, policy: SparsityPolicy, layer: SparseLayer, density: float) -> SparseIndex:
        """Make a layer sparse; its pattern is still to come."""
        index = SparseIndex(
            layer.shape, policy.capacity(layer, density), inputs_first=layer.inputs_first, groups=layer.groups,
            compact=policy.compact,
        )  # fmt: skip
        self.layers.append(layer)
        self.indices[layer.weight], self.densities[layer.weight] = index, density
        return index

    def rewrite(self, train: TrainingGraph, lanes: int) -> None:
        """Let the policy change the training graph that autodiff made; ``lanes``: samples in a vector, or 0."""
        if self.policy is not None:
            self.records = self.policy.rewrite(train, self.candidates, lanes)

    @property
    def needs_lists(self) -> bool:
        """Whether ``rewrite`` makes lists, for which lanes must hold samples."""
        policy = self.policy
        return policy is not None and policy.needs_lists and policy.prunes_activations(self.candidates)

    def attach(self, parameters: Parameters) -> None:
        """Take the place where the values are stored, as the graph has them: they are scaled where the policy does.

        Here, as scaling the graph's arrays would take a second dense copy of all weights, if only for a moment.
        """
        self._parameters = parameters
        for name, scale in self._scales.items():
            if scale != 1:
                parameters.view(name)[...] *= scale

    # --- what policies read and write ---

    def mask(self, layer: SparseLayer) -> Mask:
        """Return which weights exist, bool in ONNX shape."""
        return self.indices[layer.weight].mask()

    def existing(self, layer: SparseLayer) -> tuple[Positions, Floats]:
        """Return the weights that exist in a compact layer: ascending positions in the flat ONNX array, and values."""
        positions, order = self.indices[layer.weight].ascending()
        return positions, self._parameters.view(layer.weight)[order]

    def master(self, layer: SparseLayer) -> Floats:
        """Return the master copy of the weights in ONNX shape, as a view; only where the policy is not compact."""
        return self._parameters.view(layer.weight)

    def mean_momentum(self, layer: SparseLayer) -> float:
        """Return the mean absolute first moment over the weights that exist."""
        moment = self._parameters.view(layer.weight, self._parameters.moments[0])
        return float(np.abs(moment[self.mask(layer)]).mean())

    def tally(self, record: int) -> tuple[int, int]:
        """Return how many saved activations a layer kept in the latest step, and how many there were."""
        kept, total = self._parameters.buffers["tally"].reshape(-1, 2)[record]
        return int(kept), int(total)

    def prune_activations(self, densities: Mapping[str, float]) -> None:
        """Set the share of saved activations that layers keep from now on, by weight."""
        records = self._parameters.buffers["records"].reshape(-1, RECORD)
        for name, number in self.records.items():
            if records[number, DENSITY] != np.float32(densities[name]):
                records[number, DENSITY], records[number, THRESHOLD] = densities[name], 0  # 0: it is chosen anew

    def set(self, layer: SparseLayer, positions: Positions) -> None:
        """Take another topology; a new weight has its master copy's value or, if there is none, is 0 as its moments.

        What is stored moves from its old place to its new one, in memory proportional to the weights that exist.

        Args:
            layer: one of ``layers``.
            positions: indices of the weights that exist in the flat ONNX array, ascending.
        """
        index = self.indices[layer.weight]
        old, order = index.ascending()
        if np.array_equal(old, positions):
            return
        buffers = self._parameters.carried if index.compact else ()
        views = {name: self._parameters.view(layer.weight, name) for name in buffers}
        values = {name: view[order] for name, view in views.items()}
        del order  # with ``old`` and those of the caller it took half of the memory of a change
        moved = _moved(values, old, positions) if values else {}
        del old, values
        self._parameters.patterns += 1  # first: lists of what was there are stale whatever breaks in
        index.set_positions(positions)
        if moved:
            order = index.order()
            for name in moved:
                views[name][order], views[name][index.count :] = moved[name], 0

    # --- what the learner calls ---

    @property
    def memory(self) -> dict[str, int]:
        """About how many bytes a change of topology takes between steps, of the layer that needs most."""
        policy, layers = self.policy, self.layers
        needs = [policy.change_bytes(layer.size, self.indices[layer.weight].capacity) for layer in layers if policy]
        return {"topology change": max(needs)} if any(needs) else {}

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let no step change the topology meanwhile, for steps that only look at how long things take."""
        self._held = True
        try:
            yield
        finally:
            self._held = False

    @property
    def _at_work(self) -> SparsityPolicy | None:
        return self.policy if self.layers and not self._held else None

    @property
    def wants_gradients(self) -> bool:
        """Whether some steps must keep the gradients of weights that do not exist."""
        return self.policy is not None and bool(self.layers) and self.policy.wants_gradients

    def wants_gradients_at(self, step: int) -> bool:
        """Whether step ``step`` (from 0) must."""
        policy = self._at_work
        return policy is not None and policy.wants_gradients_at(step, self.total_steps)

    def begin_step(self, step: int) -> bool:
        """Change the topology before step ``step``; not again where that step is tried once more.

        Returns:
            Whether it may have changed, and another plan may be due.
        """
        policy = self._at_work
        if policy is None or not policy.changes_before(step) or self._begun == step:
            return False
        unbroken(lambda: self._change(step, policy.before_step, step))
        return True

    def end_step(self, step: int, gradients: Gradients) -> None:
        """Change the topology after step ``step``."""
        policy = self._at_work
        if policy is not None and policy.changes_after(step, self.total_steps):
            unbroken(lambda: self._change(None, policy.after_step, step, gradients))

    def adopt(self, arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
        """Choose the patterns of layers whose weights are about to be replaced; moments stay with their weights.

        Returns:
            The arrays to take, where the policy scales them.
        """
        taken = dict(arrays)
        if self.policy is None:
            return taken
        self._begun = None
        if not self.policy.compact and all(layer.weight in arrays for layer in self.candidates):
            wanted, indices = self.policy.densities_for(self.candidates, arrays), self.indices
            self.densities = {n: min(wanted[n], index.capacity / index.size) for n, index in indices.items()}
        for number, layer in enumerate(self.candidates):
            name = layer.weight
            if name in self.indices and name in arrays:
                rng = np.random.default_rng([self.seed, number])
                mask, scale = self.policy.initial(layer, arrays[name], self.densities[name], rng, trained=True)
                self.set(layer, np.flatnonzero(mask))
                taken[name] = arrays[name] * np.float32(scale) if scale != 1 else arrays[name]
        self.beginning = self.policy.beginning(trained=True)
        return taken

    def thinned(self, arrays: Mapping[str, NDArray[np.float32]]) -> tuple[str, ...]:
        """Return the names of sparse weights that have numbers other than 0, in arrays given, where none exist here."""
        lost = {n: np.count_nonzero(arrays[n][~index.mask()]) for n, index in self.indices.items() if n in arrays}
        return tuple(name for name, count in lost.items() if count)

    def describe(self, graph: Graph, arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, str]:
        """Return what an exported file says about its zeros: policy, and share of non-zeros by sparse layer as JSON.

        A weight that has just grown exists and is still 0. It counts as a zero here, so that a reader of the file finds
        what this says; who goes on from the file draws such places anew.

        Args:
            graph: the network.
            arrays: its parameters: without a policy, layers that have zeros are the sparse ones.
        """
        if self.policy is None:
            shares = {layer.weight: _density(arrays[layer.weight]) for layer in sparse_layers(graph)}
            densities = {name: share for name, share in shares.items() if share < 1}
            return {DENSITIES: json.dumps(densities)} if densities else {}
        densities = {name: _density(arrays[name]) for name in self.indices}
        return {SPARSITY: self._described(), DENSITIES: json.dumps(densities)}

    def account(self) -> dict[str, Any]:
        """Return how often the topology changed and how long that took, in seconds, as plain data."""
        return {"changes": self.changes, "seconds": self.seconds}

    def _described(self) -> str:
        return describe_policy("sparsity", self.policy)

    # --- state ---

    def state(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Return (tensors, plain data) for ``restore``."""
        tensors: dict[str, NDArray[Any]] = {}
        for name, index in self.indices.items():
            tensors[f"{TOPOLOGY}{name}/starts"] = index.starts.copy()
            tensors[f"{TOPOLOGY}{name}/columns"] = index.columns[: index.count].copy()
        # What there is room for: ``adopt`` may lower the densities, but how a learner computes depends on the room.
        capacities = {name: index.capacity / index.size for name, index in self.indices.items()}
        plain = {"total_steps": self.total_steps, "densities": dict(self.densities), "policy": self._described()}
        plain["begun"] = self._begun
        return tensors, plain | {"capacities": capacities, "beginning": self.beginning} | self.account()

    def restore(self, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any] | None) -> dict[str, NDArray[Any]]:
        """Take the state that ``state`` returned (``None`` for none); return the tensors that belong to others.

        Raises:
            CheckpointError: it belongs to another network or policy.
        """
        rest = {key: array for key, array in tensors.items() if not key.startswith(TOPOLOGY)}
        wanted = {f"{TOPOLOGY}{name}/{part}" for name in self.indices for part in _PARTS}
        policy = NONE if meta is None else meta["policy"]
        if not self._is_policy(policy) or wanted | rest.keys() != tensors.keys():
            raise CheckpointError(
                f"the state belongs to another sparsity policy: '{policy}', this learner has '{self._described()}'"
            )
        try:
            parts = {name: [tensors[f"{TOPOLOGY}{name}/{part}"] for part in _PARTS] for name in self.indices}
            patterns = {name: index.positions_of(*parts[name]) for name, index in self.indices.items()}
        except UsageError as error:
            raise CheckpointError(f"the state belongs to another network: {error}") from error
        self._parameters.patterns += 1
        for name, positions in patterns.items():  # only now: a state that does not fit changes nothing
            self.indices[name].set_positions(positions)
        self._begun = None
        if meta is not None:
            self._begun = meta.get("begun")  # not in files from before it was kept
            self.total_steps, self.densities = meta["total_steps"], dict(meta["densities"])
            # Not in files from before they were kept.
            self.changes, self.seconds = meta.get("changes", 0), meta.get("seconds", 0.0)
            self.beginning = meta.get("beginning", self.beginning)
        return rest

    def _is_policy(self, text: str) -> bool:
        """Whether a text describes this policy; it may be older than a setting that has its default here."""
        try:
            return bool(parse_policy("sparsity", text) == self.policy)
        except UsageError:
            return False

    def _change(self, begun: int | None, change: Callable[..., None], *arguments: Any) -> None:
        """Call what changes the topology, and count it if anything moves; ``begun``: the step that it is done before.

        All or nothing: half of a change that an interrupt broke off left weights where no step has them.
        """
        start, patterns = time.perf_counter(), self._parameters.patterns
        change(self, *arguments)
        self._begun = begun
        if self._parameters.patterns != patterns:
            self.changes += 1
            self.seconds += time.perf_counter() - start


def check_layers(policy: SparsityPolicy, graph: Graph) -> None:
    """Refuse a policy that finds no layer in a network.

    Raises:
        UsageError: all layers stay dense.
    """
    if policy.skips_nothing or policy.layers(graph):
        return
    listed = "; ".join(f"{name}: {reason}" for name, reason in dense_layers(graph, *policy.dense_ends).items())
    raise UsageError(
        f"{policy.name}: no layer of '{graph.name}' can be sparse ({listed or 'it has no weights'}); "
        "expected one at least: change the settings named, take another network, or leave sparsity out"
    )


def _check_values(graph: Graph) -> None:
    """Refuse a graph without the values of its weights, unless a checkpoint's state will bring them.

    Raises:
        UsageError: a sparse learner has them.
    """
    names = [name for name, a in graph.arrays.items() if is_placeholder(a) and name not in graph.densities]
    if names:
        raise UsageError(
            f"graph '{graph.name}': the weights of {', '.join(map(repr, names))} are in a sparse learner; its "
            "export_onnx or parameters() gives them: take load_onnx of the file, or put the arrays into graph.arrays"
        )


def _moved(arrays: Mapping[str, Floats], old: Positions, new: Positions) -> dict[str, Floats]:
    """Return the values ``(len(new),)`` of ascending positions, of which ``old`` had those given; 0 for the others."""
    places = np.minimum(np.searchsorted(old, new), max(0, len(old) - 1))
    stays = np.flatnonzero(old[places] == new) if len(old) else places[:0]
    places, moved = places[stays], {name: np.zeros(len(new), np.float32) for name in arrays}
    for name, values in arrays.items():
        moved[name][stays] = values[places]
    return moved


def _density(array: NDArray[np.float32]) -> float:
    return np.count_nonzero(array) / array.size
