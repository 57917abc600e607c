"""What the backward pass of a training graph keeps: rewrites after which it keeps less, or passes over less.

None of them changes what is computed, but for the order in which two gradients are added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from edgetrain.arrays import map_sizes, mask_words
from edgetrain.graph import Graph, Node, Value
from edgetrain.ops import get_op
from edgetrain.ops.activation import Activation
from edgetrain.ops.shape import RESHAPES


def keep_less(train: Graph, forward_count: int) -> tuple[dict[str, Value], int]:
    """Rewrite a training graph whose first ``forward_count`` nodes are its forward pass.

    Returns:
        By the name of a value that the backward pass computes again, the forward pass's value; and how many nodes
        were added to the forward pass.
    """
    forget_positions(train)
    merge_sums(train, forward_count)
    again = compute_again(train, forward_count)
    return again, keep_masks(train, forward_count)


def forget_positions(train: Graph) -> None:
    """Let max pools keep no positions that no gradient reads: those before the first trained array."""
    for place, node in enumerate(train.nodes):
        if node.op_type == "MaxPoolTraining" and not train.consumers(node.outputs[1].name):
            train.nodes[place] = replace(node, op_type="MaxPool", outputs=node.outputs[:1])


def merge_sums(train: Graph, forward_count: int) -> None:
    """Let the gradient of a normalisation with an addend add up what it gets itself, if nobody else reads the sum."""
    for place, node in enumerate(train.nodes):
        if place < forward_count or node.op_type != "ResidualNormalizationGrad":
            continue
        total = next((n for n in train.nodes[forward_count:place] if n.y == node.input(1)), None)
        if total is None or total.op_type != "Add" or len(train.consumers(total.y.name)) != 1:
            continue
        first, second = total.inputs
        train.nodes[place] = replace(node, inputs=(node.x, first, *node.inputs[2:6], second))
    used = {v.name for n in train.nodes for v in n.inputs if v is not None}
    train.nodes = [
        n for i, n in enumerate(train.nodes) if i < forward_count or n.op_type != "Add" or not n.y.batched
        or n.y.name in used
    ]  # fmt: skip


def compute_again(train: Graph, forward_count: int) -> dict[str, Value]:
    """Let the backward pass compute normalised maps (and activations of them) again instead of keeping them.

    What is kept is the normalisation's input, which its own gradient needs anyway.

    Returns:
        By the name of a value that is computed again, the forward pass's value.
    """
    forward, backward = train.nodes[:forward_count], train.nodes[forward_count:]
    normalised = {
        node.y.name for node in forward if node.op_type == "BatchNormalizationTraining" and node.optional(5) is None
    }
    cheap = [n for n in forward if n.y.name in normalised
             or (isinstance(get_op(n.op_type), Activation) and n.x.name in normalised)]  # fmt: skip
    found = {}
    for node in reversed(cheap):  # what is computed again from another such value reads that one's copy then
        readers = [i for i, reader in enumerate(backward) if node.y in reader.inputs]
        if not readers:
            continue
        again = Value(f"edgetrain.again.{node.y.name}", node.y.shape)
        train.add_value(again)
        found[again.name] = node.y
        for i in readers:
            inputs = tuple(again if value == node.y else value for value in backward[i].inputs)
            backward[i] = replace(backward[i], inputs=inputs)
        backward.insert(readers[0], _repeated(node, again))
    for node in [n for n in backward if n.op_type == "BatchNormalizationAgain"]:
        _merge_again(backward, node)
    train.nodes = forward + backward
    return found


def _repeated(node: Node, again: Value) -> Node:
    """Return the node that computes a forward node's first output once more."""
    if node.op_type != "BatchNormalizationTraining":
        return replace(node, name=again.name, outputs=(again,))
    inputs = (node.x, node.input(1), node.input(2), node.outputs[1], node.outputs[3])
    bounds = {key: node.attributes[key] for key in ("low", "high") if key in node.attributes}
    return Node("BatchNormalizationAgain", again.name, inputs, (again,), bounds)


def _merge_again(backward: list[Node], again: Node) -> None:
    """Let the gradient of a normalisation compute its output again, if what it needs is there early enough."""
    place = backward.index(again)
    which = (again.x, again.input(3))  # the mean tells apart the normalisations of one value
    grad = next((n for n in backward if n.op_type == "BatchNormalizationGrad" and (n.x, n.input(4)) == which), None)
    made = {value for n in backward[:place] for value in n.outputs}
    if grad is not None and grad.input(1) in made:
        backward[place] = replace(grad, op_type="BatchNormalizationGradAgain", outputs=(*grad.outputs, again.y))
        backward.remove(grad)


def forget_again(train: Graph, again: Mapping[str, Value], value: Value) -> None:
    """Do not compute a value again that nobody reads any more, nor what was computed again for it alone."""
    nodes = train.nodes
    if value.name not in again or any(value in reader.inputs for reader in nodes):
        return
    place, node = next((i, n) for i, n in enumerate(nodes) if value in n.outputs)
    if node.op_type == "BatchNormalizationGradAgain":
        nodes[place] = replace(node, op_type="BatchNormalizationGrad", outputs=node.outputs[:3])
        return
    del nodes[place]
    forget_again(train, again, node.x)


def keep_masks(train: Graph, forward_count: int) -> int:
    """Let a Relu keep one bit per number where the backward pass reads its output for nothing else.

    Returns:
        How many nodes were added to the forward pass.
    """
    added = 0
    for node in train.nodes[:forward_count]:
        slopes = _slopes(train, node, forward_count + added) if node.op_type == "Relu" else []
        mask = _mask_of(train, node) if slopes else None
        if mask is None:
            continue
        for slope in slopes:
            inputs = (mask, slope.input(1))
            train.nodes[train.nodes.index(slope)] = replace(slope, op_type="ReluMaskGrad", inputs=inputs)
        added += 1
    return added


def keep_residual_masks(train: Graph, forward_count: int) -> int:
    """Do as ``keep_masks`` for Relus that are fused into a normalisation with an addend.

    Usually the next product's weight gradient reads their output, too: this is for where a policy has ended that.

    Returns:
        How many nodes were added to the forward pass.
    """
    added = 0
    for node in train.nodes[:forward_count]:
        bounds = node.attributes.get("low"), node.attributes.get("high")
        if node.op_type != "BatchNormalizationTraining" or node.optional(5) is None or bounds != (0.0, math.inf):
            continue
        readers = [n for n in train.nodes[forward_count + added :] if node.y in n.inputs]
        by_gradient = [n.op_type == "ResidualNormalizationGrad" and n.input(3) == node.y for n in readers]
        mask = _mask_of(train, node) if by_gradient == [True] and node.y.name not in train.outputs else None
        if mask is None:
            continue
        (grad,) = readers
        inputs = (*grad.inputs[:3], mask, *grad.inputs[4:])
        train.nodes[train.nodes.index(grad)] = replace(grad, op_type="ResidualNormalizationMaskGrad", inputs=inputs)
        added += 1
    return added


def _mask_of(train: Graph, node: Node) -> Value | None:
    """Let the forward pass pack which numbers of a node's output are positive; ``None`` where that saves nothing."""
    channels, rows, columns = map_sizes(node.y.shape)
    words = mask_words(rows * columns)
    if words >= rows * columns:
        return None
    mask = Value(f"edgetrain.mask.{node.y.name}", (channels, words))
    train.add_value(mask)
    train.nodes.insert(train.nodes.index(node) + 1, Node("ReluMask", mask.name, (node.y,), (mask,), {}))
    return mask


def _slopes(train: Graph, node: Node, forward_count: int) -> list[Node]:
    """Return the nodes for whose sake alone an activation's output would be kept; none if it is kept anyway."""
    if node.y.name in train.outputs:
        return []
    names = {node.y.name}  # of the output and its reshapes, which share its memory
    for reader in train.nodes[:forward_count]:
        if reader.op_type in RESHAPES and reader.x.name in names:
            names.add(reader.y.name)
    readers = [n for n in train.nodes[forward_count:] if any(v is not None and v.name in names for v in n.inputs)]
    own = [n for n in readers if n.op_type == "ActivationGrad" and n.get("forward").name == node.name]
    return own if own == readers else []
