"""Policies that thin out the error maps of the backward pass: which operators to put where in a training graph.

A policy rewrites the training graph that autodiff made; the engine does not know it. An error map is the gradient
of a product's output; both backward products read it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

from edgetrain.autodiff import TrainingGraph
from edgetrain.densities import DISTRIBUTIONS
from edgetrain.errors import UsageError
from edgetrain.graph import Graph, Node, Value
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductOp
from edgetrain.ops.pooling import MaxPoolGrad
from edgetrain.ops.pruning import CHOICE, IMPORTANCE
from edgetrain.settings import Limits, take_numbers

# Gradients of normalisations, and which of their outputs is the gradient of the input.
_NORMALISED = {
    "BatchNormalizationGrad": 0, "BatchNormalizationGradAgain": 0, "ResidualNormalizationGrad": 1,
    "ResidualNormalizationMaskGrad": 1,
}  # fmt: skip
# First ``stream`` of the random numbers for channels behind max pools, and of gradient pruning; other channels' is 0.
_POOLED_STREAMS, _GRADIENT_STREAMS = 500, 1000
_PRUNED = {"ProductInputGrad": "PrunedInputGrad", "ProductWeightGrad": "PrunedWeightGrad", "SumTo": "PrunedBiasGrad"}


class ErrorPruning:
    """Base class of the policies that thin out error maps.

    Between the two calls error maps behind max pools become lists (``pooled_errors``), where that pays.
    """

    @property
    def idle(self) -> bool:
        """Whether nothing is ever dropped."""
        return False

    def left_whole(self, train: TrainingGraph) -> dict[str, str]:
        """Return why the settings drop nothing of error maps that could be pruned, by the convolution's weights."""
        return {}

    def rewrite(self, train: TrainingGraph) -> None:
        """Insert operators that change error maps into a training graph."""

    def skip(self, train: TrainingGraph) -> None:
        """Let products leave out what the policy drops."""


@dataclass(frozen=True)
class ErrorMapPruning(ErrorPruning):
    """Keep the most important channels of every error map (Wu et al. 2020, arXiv 2007.03213).

    Of a convolution's O output channels ``round(keep * O)`` are kept, at least one, chosen anew in every step by the
    L1 norm of the channel's error map over the batch. Where the gradient of a batch normalisation makes the map it is
    the L2 norm, which follows from that gradient's sums, and only the kept channels' maps are computed at all, unless
    a weight gradient from lists of pruned activations (``SWAT``), which uses all channels, reads it too: L1 then. The
    gradients of input, weights and bias are computed from the kept channels alone (from their non-zeros, where weights
    are lists); the others' weights and biases get a gradient of exactly 0. So their momentum still moves them and
    weight decay still shrinks them, as for any parameter whose gradient is 0. The gradients of a batch normalisation's
    scale and bias are those of all channels.

    Convolutions with groups (depthwise ones) or shared weights and fully connected layers are computed densely.

    Attributes:
        keep: share of the channels, above 0 and at most 1. With 1 nothing changes.
        distribution: the layers' shares: ``"uniform"``, or ``"erk"``, the Erdos-Renyi-kernel rule of sparse weights:
            small layers keep more, and the channels kept of all layers together have the share ``keep`` of the weights.
        importance: ``"error"``: norm of the error map; ``"error_and_weights"``: its L1 norm twice, plus the L1 norm of
            the channel's weights, both relative to the layer's sum; ``"random"``: the baseline, by chance.

    Raises:
        UsageError: a value out of range.

    Example:
        >>> ErrorMapPruning(keep=0.5).importance
        'error'
    """

    keep: float = 0.7
    importance: str = "error"
    distribution: str = "uniform"

    def __post_init__(self) -> None:
        take_numbers(self, "ErrorMapPruning")
        limits = Limits(self, "ErrorMapPruning")
        limits.number("keep", lambda keep: 0 < keep <= 1, "a number above 0 and at most 1", share=True)
        limits.one_of("importance", IMPORTANCE)
        limits.one_of("distribution", DISTRIBUTIONS)

    @property
    def idle(self) -> bool:
        """Whether all channels are kept."""
        return self.keep == 1

    def left_whole(self, train: TrainingGraph) -> dict[str, str]:
        """Return which convolutions have so few channels that all of them are kept."""
        convs = [error_map.conv for error_map in error_maps(train)]
        keep = self._shares(convs)
        whole = [conv.input(1) for conv in convs if not self._count(conv, keep)]
        return {weight.name: f"keep={self.keep:g} keeps all of its {weight.shape[0]} channels" for weight in whole}

    def skip(self, train: TrainingGraph) -> None:
        """Choose channels before the first gradient that reads an error map."""
        graph, listed = train.graph, error_maps(train)
        pooled = [node for node in graph.nodes if node.op_type == "PooledErrors"]
        convs = [*(error_map.conv for error_map in listed), *(node.get("conv") for node in pooled)]
        keep = self._shares(convs)
        for stream, error_map in enumerate(listed):
            if count := self._count(error_map.conv, keep):
                kept = self._choice(graph, error_map.conv, error_map.value, count, stream)
                self._prune(train, error_map, kept)
        for stream, node in enumerate(pooled, _POOLED_STREAMS):
            if count := self._count(node.get("conv"), keep):
                # What comes to the pool has the norms of the error map.
                kept = self._choice(graph, node.get("conv"), node.input(1), count, stream)
                self._prune_lists(graph, node, kept)

    def _prune(self, train: TrainingGraph, error_map: ErrorMap, kept: Node) -> None:
        """Let the gradients of a convolution read the kept channels, and choose these as soon as that is possible.

        Where a normalisation's gradient makes the error map for nobody else, its sums tell the norms, and the other
        channels' errors are never written: with keep 0.3 a step of ResNet-20 saved 28 % of the time before, 32 % so (1
        thread; with 0.7 11.8 and 13 %). The same holds for the gradient of a max pool, whose own input has the norms.
        """
        graph, made = train.graph, _producer(train, error_map.value)
        readers = [i for i, node in enumerate(graph.nodes) if error_map.read_by(node)]
        alone = len(graph.consumers(error_map.value.name)) == len(readers)
        for i in readers:
            graph.nodes[i] = _pruned(graph.nodes[i], kept.y)
        if alone and _hands_on(made):
            self._prune_pool(graph, made, error_map, kept)
            return
        # Of the gradients that a residual normalisation makes, one goes on to what was added: no sums tell its norms.
        normalised = made.op_type in _NORMALISED and made.outputs[_NORMALISED[made.op_type]] == error_map.value
        if alone and normalised and self.importance != "error_and_weights":
            choice = {name: kept.get(name) for name in CHOICE}
            graph.nodes[graph.nodes.index(made)] = replace(
                made, op_type=f"Pruned{made.op_type}", outputs=(*made.outputs, kept.y),
                attributes={**made.attributes, **choice},
            )  # fmt: skip
        else:
            graph.nodes.insert(readers[0], kept)

    def _prune_pool(self, graph: Graph, made: Node, error_map: ErrorMap, kept: Node) -> None:
        """Choose channels of what comes to a max pool; the bias gets the sums of that.

        A step of LeNet-5 with keep 0.7 takes 3 to 5 % less so (kernels 367 us for 379; batch 32, 2 threads).
        """
        errors, place = made.input(1), graph.nodes.index(made)
        for i, node in enumerate(graph.nodes):
            if node.op_type == "PrunedBiasGrad" and node.x == error_map.value:
                graph.nodes[i] = replace(node, inputs=(errors, kept.y))
        graph.nodes[place] = replace(made, op_type="PrunedMaxPoolGrad", inputs=(*made.inputs, kept.y))
        graph.nodes.insert(place, replace(kept, inputs=(errors, *kept.inputs[1:])))

    def _shares(self, convs: Sequence[Node]) -> dict[str, float]:
        """Return the share of the channels to keep, by weight."""
        return DISTRIBUTIONS[self.distribution]({conv.input(1).name: conv.input(1).shape for conv in convs}, self.keep)

    def _count(self, conv: Node, keep: Mapping[str, float]) -> int:
        """Return how many channels to keep, 0 if all are; ``keep``: shares by weight."""
        channels = conv.input(1).shape[0]
        count = max(1, round(keep[conv.input(1).name] * channels))
        return count if count < channels else 0

    def _choice(self, graph: Graph, conv: Node, errors: Value, count: int, stream: int) -> Node:
        """Return the node that chooses."""
        kept = Value(f"{errors.name}.{conv.name}.kept", (count,), batched=False)
        graph.add_value(kept)
        choices = {"count": count, "importance": self.importance, "stream": stream, "like": conv.x}
        attributes = {**conv.attributes, "forward": conv.op_type, **choices}
        return Node("KeptChannels", kept.name, (errors, conv.input(1)), (kept,), attributes)

    def _prune_lists(self, graph: Graph, node: Node, kept: Node) -> None:
        """List the kept channels alone; the bias gets the sums of what comes to the pool in those."""
        bias = node.get("conv").optional(2)
        for i, reader in enumerate(graph.nodes):
            if node.y in reader.inputs:
                graph.nodes[i] = replace(reader, attributes={**reader.attributes, "kept": kept.y.size})
            elif reader.op_type == "SumTo" and reader.x == node.input(1) and bias is not None:
                graph.nodes[i] = _pruned(reader, kept.y) if reader.get("like") == bias else reader
        place = graph.nodes.index(node)
        graph.nodes[place] = replace(node, inputs=(*node.inputs, kept.y))
        graph.nodes.insert(place, kept)


# Lists of weights are left alone up to this many times the share of vectors that would stay. ResNet-8 with a tenth of
# its weights (ERK) at rate 0.9 took 5.0 ms with 1 and 4.7 with 1.5, 4.6 without pruning; LeNet-5 with a fifth 0.265 ms
# with 1 or 1.5, 0.287 with 2, 0.297 without.
_LEFT_TO_WEIGHTS = 1.5


@dataclass(frozen=True)
class GradientPruning(ErrorPruning):
    """Set small gradients to zero by chance, so that their expectation stays (Ye et al. 2020, arXiv 1908.00173).

    What is below a threshold t becomes 0, or t with probability size / t. The threshold is predicted from the mean
    sizes of the latest five steps; the first five steps are not pruned. Where a batch normalisation follows a
    convolution, the convolution's output gradient is pruned; where none does, the gradient that an activation or a
    pool behind the convolution gets (the input gradient of the next layer), so that their zeros add to the pruned
    ones. The gradient of the loss itself is never pruned. With ``lanes``, convolutions whose weights are about as
    sparse as their error maps would be are left to their lists of weights, which save as much without noise.

    The gradients of convolutions with groups (depthwise ones) or shared weights and of fully connected layers are
    pruned only where a convolution of one group gets its error map from them.

    Operations count as saved where numbers are zero because of pruning. What a Relu makes zero anyway is no saving
    (of vectors that is an estimate, see ``kernels.error_lists.count_listed``), nor what comes as zeros from a layer
    behind that is pruned itself.

    Attributes:
        rate: ``group="element"``: the paper's p, the share of normally distributed gradients below the threshold, of
            which some are promoted to it: with 0.9 a share of 0.46 stays. ``group="lanes"``: the threshold is the mean
            norm divided by 1 - rate, so that a share of at most 1 - rate stays.
        group: ``"element"``: every number for itself, as published; few kernels can skip that. ``"lanes"``: vectors
            of one pixel of the samples that are computed together, by their L2 norm; kernels skip those that are zero.
            Before max pools kernels skip both (docs/architecture.md).

    Raises:
        UsageError: a value out of range.

    Example:
        >>> GradientPruning(rate=0.75, group="lanes").rate
        0.75
    """

    rate: float = 0.9
    group: str = "element"

    def __post_init__(self) -> None:
        take_numbers(self, "GradientPruning")
        limits = Limits(self, "GradientPruning")
        limits.number("rate", lambda rate: 0 < rate < 1, "a number above 0 and below 1", share=True)
        limits.require("group", self.group in ("element", "lanes"), "'element' or 'lanes'")

    @property
    def factor(self) -> float:
        """The threshold divided by the mean size."""
        if self.group == "lanes":
            return 1 / (1 - self.rate)
        return NormalDist().inv_cdf((1 + self.rate) / 2) * math.sqrt(math.pi / 2)

    def left_whole(self, train: TrainingGraph) -> dict[str, str]:
        """Return which convolutions get the gradient of the loss itself."""
        whole = [e.conv.input(1).name for e in error_maps(train) if _source(train, e.value) is None]
        return dict.fromkeys(whole, "its error map is the gradient of the loss itself")

    def rewrite(self, train: TrainingGraph) -> None:
        """Prune where the error maps of convolutions come from."""
        done: set[Value] = set()
        for error_map in self._error_maps(train):
            if (source := _source(train, error_map.value)) is not None and source not in done:
                done.add(source)
                self._prune(train, source)

    def skip(self, train: TrainingGraph) -> None:
        """List the vectors that are left, and let all products that skip zeros count what pruning adds."""
        pooled = [node for node in train.graph.nodes if node.op_type == "PooledErrors"]
        if self.group == "lanes":
            for error_map in self._error_maps(train):
                if (pruned := _pruning(train, error_map.value)) is not None:
                    list_errors(train, error_map, pruned.y)
                else:
                    train.records += 1
            # Which error maps became lists depends on the machine; the records of a checkpoint must not.
            train.records += len(pooled)
        for node in pooled:
            if (pruned := _pruning(train, node.input(1))) is not None:
                for reader in train.graph.consumers(node.y.name):
                    attributes = {**reader.attributes, "record": pruned.get("record")}
                    train.graph.nodes[train.graph.nodes.index(reader)] = replace(reader, attributes=attributes)

    def _error_maps(self, train: TrainingGraph) -> list[ErrorMap]:
        """Return the error maps whose zeros are worth more than those of the weights."""
        most = _LEFT_TO_WEIGHTS * (1 - self.rate) if self.group == "lanes" else 0.0
        return [e for e in error_maps(train) if train.densities.get(e.conv.input(1).name, 1.0) > most]

    def _prune(self, train: TrainingGraph, source: Value) -> None:
        graph = train.graph
        pruned = Value(f"{source.name}.pruned", source.shape)
        graph.add_value(pruned)
        for i, node in enumerate(graph.nodes):
            if source in node.inputs:
                inputs = tuple(pruned if value == source else value for value in node.inputs)
                graph.nodes[i] = replace(node, inputs=inputs)
            if node.get("grad_out") == source:  # lists of activations tell places in the map that is read with them
                graph.nodes[i] = replace(graph.nodes[i], attributes={**node.attributes, "grad_out": pruned})
        made = next(i for i, node in enumerate(graph.nodes) if source in node.outputs)
        stream = _GRADIENT_STREAMS + made
        attributes = {"group": self.group, "factor": self.factor, "record": train.records, "stream": stream}
        graph.nodes.insert(made + 1, Node("PrunedGradient", pruned.name, (source,), (pruned,), attributes))
        train.records += 1


# Gradient operators that hand zeros on, and which input the gradient is.
_PASSING = {
    "ActivationGrad": 1, "ReluMaskGrad": 1, "MaxPoolGrad": 1, "AveragePoolGrad": 0, "Reshape": 0, "Flatten": 0,
}  # fmt: skip


def _source(train: TrainingGraph, value: Value) -> Value | None:
    """Return the gradient that zeros of an error map come from; ``None`` if it is the loss's own."""
    node = _producer(train, value)
    while node.op_type in _PASSING:
        value = node.input(_PASSING[node.op_type])
        node = _producer(train, value)
    return None if node.op_type.endswith("LossGrad") else value


def _pruning(train: TrainingGraph, value: Value) -> Node | None:
    """Return the ``PrunedGradient`` that zeros of an error map come from, if one was inserted."""
    source = _source(train, value)
    made = None if source is None else _producer(train, source)
    return made if made is not None and made.op_type == "PrunedGradient" else None


def _producer(train: TrainingGraph, value: Value) -> Node:
    node = train.graph.producer(value.name)
    assert node is not None
    return node


_ON_LISTS = {"ProductInputGrad": "ListedInputGrad", "ProductWeightGrad": "ListedWeightGrad"}


def list_errors(train: TrainingGraph, error_map: ErrorMap, pruned: Value) -> None:
    """Let the gradients of a convolution skip the vectors of its error map that are zero.

    They count as saved what is zero because ``pruned`` is, the output of a ``PrunedGradient``.
    """
    graph, conv = train.graph, error_map.conv
    lists = Value(f"{error_map.value.name}.{conv.name}.lists", (1,), batched=False)
    graph.add_value(lists)
    counted = {"record": train.records, "pruned": pruned}
    train.records += 1
    if (node := _pool_behind(graph, error_map)) is not None:
        _list_at_pool(graph, error_map, node, lists, counted)
        return
    readers = [i for i, node in enumerate(graph.nodes) if error_map.read_by(node) and node.op_type in _ON_LISTS]
    # Places in the lists are those of what the weight gradient reads: a copy of the input may have another border.
    x = next((graph.nodes[i].x for i in readers if graph.nodes[i].op_type == "ProductWeightGrad"), conv.x)
    by_pixel = any(graph.nodes[i].op_type == "ProductInputGrad" for i in readers)
    for i in readers:
        node = graph.nodes[i]
        graph.nodes[i] = replace(
            node, op_type=_ON_LISTS[node.op_type], inputs=(*node.inputs, lists),
            attributes={**node.attributes, "record": counted["record"]},
        )  # fmt: skip
    attributes = {**conv.attributes, "forward": conv.op_type, "like": x, "by_pixel": by_pixel, **counted}
    made = Node("ErrorLists", lists.name, (error_map.value, conv.input(1)), (lists,), attributes)
    graph.nodes.insert(readers[0], made)


def _pool_behind(graph: Graph, error_map: ErrorMap) -> Node | None:
    """Return the gradient of a max pool of separate windows that makes an error map for its weights and bias alone."""
    made, readers = graph.producer(error_map.value.name), graph.consumers(error_map.value.name)
    served = all(error_map.read_by(node) and node.op_type != "ProductInputGrad" for node in readers)
    return made if made is not None and _hands_on(made) and served else None


def _hands_on(node: Node) -> bool:
    """Whether a node is the gradient of a max pool that gives each number to one pixel: its windows lie apart."""
    if node.op_type != "MaxPoolGrad":
        return False
    pool = MaxPoolGrad().pool(node)
    return pool.inside and all(stride >= size for stride, size in zip(pool.strides, pool.kernel, strict=True))


def _list_at_pool(graph: Graph, error_map: ErrorMap, node: Node, lists: Value, counted: Mapping[str, Any]) -> None:
    """Make the lists instead of the error map; the bias gets the sum of what comes to the pool."""
    pool, x = MaxPoolGrad().pool(node), error_map.conv.x
    for reader in graph.consumers(error_map.value.name):
        place = graph.nodes.index(reader)
        if reader.op_type == "SumTo":
            graph.nodes[place] = replace(reader, inputs=(node.input(1),))
            continue
        x, covered = reader.x, math.prod(pool.out) * len(pool.taps)
        graph.nodes[place] = replace(
            reader, op_type=_ON_LISTS[reader.op_type], inputs=(reader.x, lists),
            attributes={**reader.attributes, "record": counted["record"], "covered": covered},
        )  # fmt: skip
    attributes = {**node.attributes, "conv": error_map.conv, "x": x, **counted}
    graph.nodes[graph.nodes.index(node)] = Node("PooledErrorLists", node.name, node.inputs, (lists,), attributes)


@dataclass(frozen=True)
class ErrorMap:
    """The gradient of a convolution's output: the convolution's node and the value."""

    conv: Node
    value: Value

    def read_by(self, node: Node) -> bool:
        """Whether a node computes a gradient of the convolution from this error map."""
        weight, bias = self.conv.input(1), self.conv.optional(2)
        if node.op_type == "ProductInputGrad":
            return node.x == self.value and node.input(1) == weight
        if node.op_type == "ProductWeightGrad":
            return node.input(1) == self.value and bool(node.get("like") == weight)
        return node.op_type == "SumTo" and node.x == self.value and bias is not None and bool(node.get("like") == bias)


def error_maps(train: TrainingGraph) -> list[ErrorMap]:
    """Return the error maps of all convolutions of one group that are trained, in the order of the backward pass.

    Left out are convolutions that share their weights: a gradient does not tell which of them it belongs to.
    """
    forward = [node for node in train.graph.nodes[: train.forward_count] if node.op_type == "Conv"]
    uses = Counter(node.input(1) for node in forward)
    convs = {node.input(1): node for node in forward if int(node.get("group", 1)) == 1 and uses[node.input(1)] == 1}
    found: dict[tuple[str, str], ErrorMap] = {}
    for node in train.graph.nodes:
        if node.op_type in ("ProductInputGrad", "ProductWeightGrad"):
            inputs = node.op_type == "ProductInputGrad"
            value, weight = (node.x, node.input(1)) if inputs else (node.input(1), node.get("like"))
            if weight in convs:
                found.setdefault((value.name, weight.name), ErrorMap(convs[weight], value))
    return list(found.values())


def check_error_maps(policy: ErrorPruning, train: TrainingGraph) -> None:
    """Refuse a policy that has nothing to prune in a network.

    Args:
        policy: what a user gave; one that is idle is taken.
        train: as autodiff made it. Whether weights are sparse plays no part: leaving error maps to their lists is a
            choice that pays.

    Raises:
        UsageError: it leaves the error maps of all layers whole.
    """
    reasons = _reasons(policy, train)
    if policy.idle or not all(reasons.values()):
        return
    listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise UsageError(
        f"{type(policy).__name__}: no error map of '{train.graph.name}' can be pruned ({listed or 'it has no weights'})"
        "; expected those of one convolution without groups at least: change the settings named, take another network, "
        "or leave error pruning out"
    )


def _reasons(policy: ErrorPruning, train: TrainingGraph) -> dict[str, str]:
    """Return why the error map of every product is left whole, empty if it is not, by the name of its weights."""
    forward = train.graph.nodes[: train.forward_count]
    products = [node for node in forward if isinstance(get_op(node.op_type), ProductOp)]
    uses = Counter(node.input(1).name for node in products)
    pruned = dict.fromkeys((e.conv.input(1).name for e in error_maps(train)), "") | policy.left_whole(train)
    return {name: pruned.get(name, _reason(node, uses[name])) for node in products for name in (node.input(1).name,)}


def _reason(node: Node, uses: int) -> str:
    if node.op_type != "Conv":
        return "fully connected"
    if int(node.get("group", 1)) > 1:
        return "a convolution with groups"
    return "several layers share its weights" if uses > 1 else "neither it nor a layer before it is trained"


def _pruned(node: Node, kept: Value) -> Node:
    attributes = {"like": node.get("like")} if node.op_type == "SumTo" else node.attributes
    return replace(node, op_type=_PRUNED[node.op_type], inputs=(*node.inputs, kept), attributes=attributes)
