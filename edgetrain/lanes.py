"""What the lanes of vectors hold in a batch: samples, or channels of one sample.

A batch that fills few lanes leaves the others empty, where lanes hold samples; but what skips work exists for samples
only: Winograd's kernels, lists of exact zeros behind max pools (``pooled_errors``), and most of what methods skip.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

from edgetrain import lowering_few as few
from edgetrain import lowering_winograd as winograd
from edgetrain.choice import channel_lanes, simd_lanes
from edgetrain.graph import Graph, Node
from edgetrain.lowering_core import FARTHEST
from edgetrain.ops import get_op
from edgetrain.ops.conv import Product, ProductOp
from edgetrain.ops.pooling import MaxPool

# What a vector of samples costs, where one sample with channels in all lanes costs 1. Fitted to steps of five networks
# with vectors of 4, 8 and 16 lanes (docs/lanes.md has what came of it): what skips takes longer with the root of its
# own lanes and of the machine's. The last is of a sample, in fully connected layers whose samples are put apart.
_DIRECT, _SKIPPING, _APART = 0.87, 0.36, 1.1
# So many times as long takes a product whose vectors lie in several runs: those of ResNet-20 and MobileNetV1 (AVX-512).
_STRIDED = 1.35
# What a weight of a list takes, 1 is one of a dense product: 1.4 in DS-CNN, 2.2 in cnn1d, 2.4 in MobileNetV1 (batch 5
# to 8, with a tenth and three tenths of the weights), and more, since little else of a step becomes shorter.
_LIST_COST = 3.0
_BETWEEN = ("Relu", "LeakyRelu", "Clip", "Identity")  # operators that leave exact zeros behind a max pool
# Operators that move single channels, number by number where lanes hold channels: for an eighth of a vector at most.
# With six of them, of 16 to 88 channels on 30x30 pixels, steps took 0.78 times as long as with samples at batch 2, 1.47
# times at 4 and 2.24 times at 8 (16 lanes, docs/lanes.md; tests/test_lanes.py).
_MOVING, _FEW = ("ChannelShuffle", "Concat", "Transpose"), 8


def sample_lanes(batch_size: int) -> int:
    """Return how many samples a vector has room for: this machine's SIMD width, less for small batches."""
    return min(simd_lanes(), max(4, 1 << (batch_size - 1).bit_length()))


def channels_pay(graph: Graph, batch_size: int, listed: Mapping[str, float] = MappingProxyType({})) -> bool:
    """Whether training steps of a batch smaller than a vector are faster with channels in the lanes.

    Args:
        listed: the share of the weights that exist, by name, of products that could run on lists of them, for which
            lanes must hold samples.
    """
    simd = simd_lanes()
    if batch_size == 1:
        return True
    if batch_size >= simd or (_FEW * batch_size > simd and any(node.op_type in _MOVING for node in graph.nodes)):
        return False
    lanes, channels, samples = sample_lanes(batch_size), 0.0, 0.0
    for node in graph.nodes:
        op = get_op(node.op_type)
        if isinstance(op, ProductOp):
            g = op.product(node)
            left = min(1.0, _LIST_COST * listed.get(node.input(1).name, 1.0))
            channels += batch_size * g.macs * _channel_vectors(g)
            samples += left * g.macs * _sample_vectors(graph, node, g, lanes)
    return channels <= samples


def _channel_vectors(g: Product) -> float:
    """Return how many times as many vectors of channels a product needs as if they were full."""
    if g.out == (1, 1):  # of a fully connected layer the lanes hold weights that lie side by side
        return 1.0
    channels = g.groups if g.outputs == 1 else g.outputs
    lanes = channel_lanes(channels, simd_lanes())
    return -(-channels // lanes) * simd_lanes() / channels


def _sample_vectors(graph: Graph, node: Node, g: Product, lanes: int) -> float:
    """Return how long a product of a vector of samples takes, see ``_DIRECT``."""
    simd = simd_lanes()
    if winograd.pays(g, g.out) or (g.groups == 1 and _feeds_max_pool(graph, node)):
        return _SKIPPING * math.sqrt(lanes * simd)
    if few.puts_apart(g, lanes):
        return _APART * lanes
    columns = g.out[1] if g.strides[1] <= FARTHEST else 1
    runs = _STRIDED if lanes < simd and 1 < g.strides[1] <= FARTHEST else 1.0
    return _DIRECT * runs * simd * _unfilled(columns, simd // lanes)


def _unfilled(columns: int, most: int) -> float:
    """Return how many vectors a row of pixels takes, per pixel: neighbours in input and output fill the rest of one.

    In two of three products of training the last vector of a row may begin sooner; else all must be full.
    """
    sizes = [n for n in (1, 2, 4) if n <= most]
    overlapping = min(-(-columns // n) for n in sizes) / columns
    full = 1 / max(n for n in sizes if columns % n == 0)
    return (2 * overlapping + full) / 3


def _feeds_max_pool(graph: Graph, node: Node) -> bool:
    """Whether all that reads a product is a max pool whose windows lie inside the map."""
    readers = graph.consumers(node.y.name)
    while len(readers) == 1 and readers[0].op_type in _BETWEEN:
        readers = graph.consumers(readers[0].y.name)
    return len(readers) == 1 and readers[0].op_type == "MaxPool" and MaxPool().pool(readers[0], readers[0].x).inside
