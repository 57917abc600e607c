"""Rewrite of a training graph: products whose weights are lists get both gradients from one pass over the error map."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace

from edgetrain.autodiff import TrainingGraph
from edgetrain.graph import Graph, Node, Value
from edgetrain.keeping import forget_again
from edgetrain.lowering_sparse import suits_lists, vectors_of
from edgetrain.ops import get_op
from edgetrain.ops.conv import ProductGrad
from edgetrain.sparse_index import SparseIndex

# Output pixels that a convolution must have: maps that are smaller are cut together with those of other samples, for
# two passes. And how many times as many input pixels a phase of the stride may have, as all are passed over for the
# weight gradient too: at 1.96 (5x5 without padding on 14x14) one pass took 95 us, two 87 (batch 32, one thread).
_FEWEST_PIXELS, _MOST_PIXELS = 16, 1.3
# What computes a normalised map again, and from which input on it reads scale, bias, mean and 1 / std.
_STATISTICS = {"BatchNormalizationAgain": 1, "BatchNormalizationGradAgain": 2}
# What adds up two gradients, and which of its inputs they are.
_ADDENDS = {"Add": (0, 1), "ResidualNormalizationGrad": (1, 6)}


def combine_gradients(
    train: TrainingGraph, sparse: Mapping[str, SparseIndex], blocks: int, lanes: int
) -> TrainingGraph:
    """Return the training graph with ``ProductGrads`` where they are faster; the given one stays as it is.

    Where the product's input is a normalised map that the backward pass would compute again for it alone, the kernel
    makes it from the normalisation's input, and it is never written.

    Args:
        train: as autodiff and all policies have made it.
        sparse: the indices by the names of the weights; only gradients of weights that exist are computed.
        blocks, lanes: of a batch.

    One pass reads every vector of the error map once for two multiply-accumulates: a step of ResNet-20 with a tenth of
    its weights, batch 32, takes 4.9 ms instead of 5.6 (two threads, ``benchmarks/sparse_steps.py``).
    """
    graph = copy.copy(train.graph)
    graph.nodes = list(graph.nodes)
    for node in [node for node in graph.nodes if node.op_type == "ProductInputGrad"]:
        index = sparse.get(node.input(1).name)
        if index is not None and index.compact and _suits(node, index, blocks, lanes):
            _combine(train, graph, node)
    return replace(train, graph=graph)


def _suits(node: Node, index: SparseIndex, blocks: int, lanes: int) -> bool:
    """Whether it is a convolution on lists, of enough pixels, of which its input gradient has hardly more."""
    op = get_op(node.op_type)
    assert isinstance(op, ProductGrad)
    g = op.product(node)
    sizes, outputs = list(zip(g.size, g.strides, strict=True)), g.out[0] * g.out[1]
    whole = all(size >= stride for size, stride in sizes)  # else some weights meet no phase
    few = math.prod(-(-size // stride) for size, stride in sizes) <= _MOST_PIXELS * outputs
    listed = suits_lists(index, True, vectors_of(g, blocks, lanes))
    return node.get("forward") == "Conv" and listed and whole and few and outputs >= _FEWEST_PIXELS


def _combine(train: TrainingGraph, graph: Graph, node: Node) -> None:
    """Put one node in the place of an input gradient and of the weight gradient that goes with it, if that can be."""
    weight, grad_out, place = node.input(1), node.x, graph.nodes.index(node)
    later = graph.nodes[place:]
    partner = next((n for n in later if n.op_type == "ProductWeightGrad" and n.get("like") == weight
                    and n.input(1) == grad_out), None)  # fmt: skip
    if partner is None:
        return
    x, statistics, bounds = partner.x, list[Value | None](), dict[str, float]()
    made = next((n for n in later if x in n.outputs), None)
    if made is not None:
        pruned = made.get("record") is not None
        if made.op_type not in _STATISTICS or pruned or len(graph.consumers(x.name)) > 1:
            return
        x, statistics = made.x, list(made.inputs[_STATISTICS[made.op_type] :][:4])
        bounds = {key: made.attributes[key] for key in ("low", "high") if key in made.attributes}
        if any(x in n.outputs for n in later):  # itself computed again, and later
            return
    attributes = {key: value for key, value in node.attributes.items() if key != "like"}
    graph.nodes[place] = Node("ProductGrads", node.name, (x, grad_out, weight, None, *statistics), (node.y, partner.y),
                              {**attributes, **bounds})  # fmt: skip
    _add_up(graph, place)
    graph.nodes.remove(partner)
    forget_again(graph, train.again, partner.x)


def _add_up(graph: Graph, place: int) -> None:
    """Let the node at ``place`` add to its input gradient what a later node would add, where that exists by then.

    The sum takes the place of that map, which nobody else may want any more: it is read there instead of a new one
    being written and both being read. Steps of ResNet-20 and ResNet-8 with a tenth of their weights take 0.97 of the
    time (batch 32, two threads; 1.00 at batch 8), the arena of ResNet-8 15.5 MiB for 16.9.
    """
    node, readers = graph.nodes[place], graph.consumers(graph.nodes[place].y.name)
    if len(readers) != 1 or readers[0].op_type not in _ADDENDS:
        return
    reader, places = readers[0], _ADDENDS[readers[0].op_type]
    pair = [reader.optional(i) for i in places]
    if node.y not in pair:
        return
    other = pair[1 - pair.index(node.y)]
    exists = any(other in n.outputs for n in graph.nodes[:place])
    wanted = any(other in n.inputs for n in graph.nodes[place:] if n is not reader)
    if other is None or other.shape != node.y.shape or not exists or wanted:
        return
    total = node.y
    if reader.op_type == "Add":
        total = reader.y
        graph.nodes.remove(reader)
    else:
        inputs = (reader.x, total, *reader.inputs[2 : places[1]])
        graph.nodes[graph.nodes.index(reader)] = replace(reader, inputs=inputs)
    inputs = (*node.inputs[:3], other, *node.inputs[4:])
    graph.nodes[place] = replace(node, inputs=inputs, outputs=(total, *node.outputs[1:]))
