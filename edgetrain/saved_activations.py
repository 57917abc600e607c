"""Rewrites of a training graph after which only the largest part of the saved activations is kept: for SWAT.

A weight gradient reads lists of the kept numbers or vectors, or a copy of its input with zeros (``ops/pruning.py``).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from edgetrain.autodiff import TrainingGraph
from edgetrain.choice import simd_lanes
from edgetrain.graph import Node, Value
from edgetrain.keeping import forget_again
from edgetrain.pruning import error_maps

# Room for vectors beyond the wanted density: thresholds hold for many steps while activations move.
_SLACK = 1.25
# Lists of numbers hold two words each and have one segment per channel. Where there is room for more than this share,
# or maps have fewer pixels, they save neither memory nor time.
_DENSEST_LIST, _FEWEST_PIXELS = 0.4, 16
# Where samples fill half a vector or more, lists of more than this share save no time. A step of ResNet-20 that keeps
# 0.3 of the numbers took 1.125 of a dense one's time with lists and takes 1.01 with zeros (batch 32, two threads), 1.10
# and 1.01 at batch 8, but 1.00 and 1.04 at batch 4; with 0.25 1.07 and 1.01, 1.04 and 1.02, 0.98 and 1.02.
_DENSEST_OF_MANY = 0.3
# Weight gradients that read whole activations: with the error map, or with lists of its exact zeros.
_WHOLE = ("ProductWeightGrad", "PooledWeightGrad")


def compress_activations(
    train: TrainingGraph, densities: Mapping[str, float], refresh: int = 100, capacity: float | None = None,
    group: str = "lanes", lanes: int = 1,
) -> dict[str, int]:  # fmt: skip
    """Let convolutions compute their weight gradient from the largest part of their input alone (SWAT).

    What is kept for the backward pass is the list, not the input, unless something else reads that; a normalised map
    is listed when it is made, and not computed again. Weight gradients from lists of exact zeros (``pooled_errors``)
    read the map again, with zeros in the place of what was dropped (``ExpandActivation``).

    Args:
        train: is changed: every ``ProductWeightGrad`` of a listed weight becomes a ``CompressActivation`` behind the
            node that makes x, and a ``CompressedWeightGrad``.
        densities: share of the vectors or numbers to keep, above 0 and at most 1, by the name of a convolution's
            weights. Convolutions with groups or shared weights and fully connected layers stay as they are, with
            ``"element"`` also those where lists do not pay: their weights are not in the result.
        refresh: steps after which thresholds are found anew.
        capacity: largest share there is memory for; 1.25 times the density by default. Give the largest density that
            will be set later.
        group: ``"lanes"``: a vector, one pixel of the samples that lie in the lanes together, is kept or dropped as a
            whole; ``"element"``: every number for itself.
        lanes: samples in a vector. Where lists of single numbers are slower than dense kernels, copies with zeros are
            made as ``mask_activations`` does, of the same layers and with the same records. So they are with 0: lanes
            hold channels, and no kernel reads lists. Nor does it matter to the records which weight gradients read
            lists of exact zeros.

    Returns:
        The number of every pruned weight's record. ``Parameters.buffers["records"]`` is float32
        ``(records * RECORD,)``; its number ``DENSITY`` (``kernels.codes``) of a record is the share to keep and may be
        changed between steps; ``Parameters.buffers["tally"]`` is int64 ``(records * 2,)``: what was kept in the latest
        step, and all.
    """
    maps, records = error_maps(train), {}
    uses = Counter(node.input(1) for node in train.graph.nodes[: train.forward_count] if node.op_type == "Conv")
    # One after another, listed or stored: a state goes to other batch sizes, for which error maps are made otherwise.
    for node in [n for n in train.graph.nodes if n.op_type in _WHOLE]:
        weight = node.get("like")
        density, error_map = densities.get(weight.name, 0.0), next((m for m in maps if m.read_by(node)), None)
        room = min(1.0, _SLACK * density if capacity is None else capacity)
        pooled = node.op_type == "PooledWeightGrad" and uses[weight] == 1
        if not density or not (error_map or pooled) or not (group == "lanes" or _is_listed(node.x, room)):
            continue
        records[weight.name] = train.records
        settings = {"density": density, "capacity": room, "refresh": refresh, "record": train.records}
        if error_map is None:
            _store(train, node, settings)
        elif group == "element" and 2 * lanes >= simd_lanes() and room > _DENSEST_OF_MANY:
            _mask(train, node, {**settings, "capacity": 1.0}, merge=True)
        elif lanes:
            _compress(train, node, {**node.attributes, **settings, "unit": group, "grad_out": error_map.value})
        else:
            _mask(train, node, settings)
        train.records += 1
    return records


def _is_listed(x: Value, room: float) -> bool:
    """Whether lists of single numbers pay for a map with room for that share of them."""
    return room <= _DENSEST_LIST and math.prod(x.shape[1:]) >= _FEWEST_PIXELS


def mask_activations(
    train: TrainingGraph, densities: Mapping[str, float], refresh: int = 100, merge: bool = True
) -> dict[str, int]:
    """Let weight gradients see the largest numbers of their input alone, by a copy with zeros.

    Kernels are those of whole activations: for products whose lists ``compress_activations`` does not make. Arguments
    and result as there; weight gradients that read lists already are left alone. ``merge``: let a normalisation that
    is computed again, for the weight gradient alone, write the copy itself; false where lanes hold channels. A step of
    ResNet-20 with half of the weights and activations takes 0.985 of the time so (batch 8 and 32, one thread).
    """
    records = {}
    for node in [n for n in train.graph.nodes if n.op_type in _WHOLE]:
        if (name := node.get("like").name) in densities:
            records[name] = train.records
            settings = {"density": densities[name], "capacity": 1.0, "refresh": refresh, "record": train.records}
            _mask(train, node, settings, merge)
            train.records += 1
    return records


def _mask(train: TrainingGraph, node: Node, attributes: Mapping[str, Any], merge: bool = False) -> None:
    """Let a weight gradient read a copy of its input with zeros; the capacity is what a list would have room for.

    ``merge`` as for ``mask_activations``.
    """
    graph, x, masked = train.graph, node.x, Value(f"{node.y.name}.masked", node.x.shape)
    graph.add_value(masked)
    graph.nodes[graph.nodes.index(node)] = replace(node, inputs=(masked, node.input(1)))
    made = next((n for n in graph.nodes if x in n.outputs and n.op_type == "BatchNormalizationGradAgain"), None)
    if made is None or not merge or graph.consumers(x.name):
        _insert_behind(train, x, Node("MaskActivation", masked.name, (x,), (masked,), attributes))
        return
    settings = {key: value for key, value in attributes.items() if key != "capacity"}
    graph.nodes[graph.nodes.index(made)] = replace(
        made, outputs=(*made.outputs[:3], masked), attributes={**made.attributes, **settings}
    )
    del train.again[x.name]  # nobody makes it any more


def _compress(train: TrainingGraph, node: Node, attributes: Mapping[str, Any]) -> None:
    """Replace a weight gradient by one from lists, which are made right behind the node that makes x."""
    graph, lists = train.graph, Value(f"{node.y.name}.lists", (1,), batched=False)
    graph.add_value(lists)
    x, place = train.again.get(node.x.name, node.x), graph.nodes.index(node)
    graph.nodes[place] = replace(
        node, op_type="CompressedWeightGrad", inputs=(lists, node.input(1)), attributes={**attributes, "source": x}
    )
    _insert_behind(train, x, Node("CompressActivation", lists.name, (x,), (lists,), attributes))
    forget_again(graph, train.again, node.x)


def _store(train: TrainingGraph, node: Node, attributes: Mapping[str, Any]) -> None:
    """Let a weight gradient read its input written out again, with zeros, from a list that the forward pass keeps."""
    graph, x = train.graph, train.again.get(node.x.name, node.x)
    lists, expanded = Value(f"{node.y.name}.lists", (1,), batched=False), Value(f"{node.y.name}.expanded", x.shape)
    graph.add_value(lists)
    graph.add_value(expanded)
    place = graph.nodes.index(node)
    graph.nodes[place] = replace(node, inputs=(expanded, node.input(1)))
    expand = {"like": x, "capacity": attributes["capacity"]}
    graph.nodes.insert(place, Node("ExpandActivation", expanded.name, (lists,), (expanded,), expand))
    attributes = {**attributes, "unit": "stored", "expanded": expanded}
    _insert_behind(train, x, Node("CompressActivation", lists.name, (x,), (lists,), attributes))
    forget_again(graph, train.again, node.x)


def _insert_behind(train: TrainingGraph, x: Value, node: Node) -> None:
    """Insert a node right behind the one that makes a value, or at the beginning if x is an input."""
    made = next((i for i, n in enumerate(train.graph.nodes) if x in n.outputs), -1)
    train.graph.nodes.insert(made + 1, node)
    train.forward_count += made + 1 < train.forward_count
