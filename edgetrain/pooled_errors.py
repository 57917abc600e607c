"""Gradients of convolutions before max pools, from lists of the few numbers of their error map that are not 0.

A max pool hands each gradient to one pixel of a window, a Relu stops about half of them: of LeNet-5's second error map
9 to 12 % are not 0. Batch normalisation fills such maps; then nothing is done here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from edgetrain.autodiff import TrainingGraph
from edgetrain.choice import channel_lanes, simd_lanes
from edgetrain.graph import Graph, Node, Value
from edgetrain.ops.conv import Conv, Product
from edgetrain.ops.pooling import MaxPoolGrad, Pool

# Share of the windows that a Relu leaves a gradient, for the estimate; 0.53 in LeNet-5 after 300 steps.
_ALIVE = 0.5
# In cycles, measured at batch 32 on one thread with AVX-512. Dense kernels do 1.6 multiply-accumulates of vectors in
# one (LeNet-5), Winograd's as many as 3.9 (ResNet-20). A number of a list takes 15 in the weight gradient and 22 in the
# input gradient, for the 25 vectors of 8 channels that it meets in LeNet-5; more is assumed here, as wider ones move
# more bytes. Turning a vector takes 3, listing one 25.
_DENSE, _WINOGRAD = 1.6, 3.9
_NUMBER, _READ, _SPREAD, _TURN, _LIST = 4.0, 0.55, 1.15, 3.0, 25.0
# Lists must promise to be faster by this factor, and take no more than this times the memory of the error map.
_MARGIN, _MEMORY = 0.9, 1.5
_READERS = {"ProductInputGrad", "ProductWeightGrad", "SumTo"}


def list_pooled_errors(train: TrainingGraph, lanes: int, listed: Callable[[str, Product], bool]) -> None:
    """Let convolutions compute their gradients from lists of what comes to the max pool behind them, where that pays.

    Not where the products run on lists of the weights that exist: they skip zeros already.

    Args:
        train: is changed: the pool's gradient becomes ``PooledErrors``, its readers ``PooledInputGrad`` and
            ``PooledWeightGrad``; the bias gets the sum of what comes to the pool.
        lanes: samples in a vector.
        listed: whether the product with the weights of that name runs on such a list.
    """
    for node in [n for n in train.graph.nodes if n.op_type == "MaxPoolGrad"]:
        readers, pool = train.graph.consumers(node.y.name), MaxPoolGrad().pool(node)
        conv = train.graph.producer(node.get("like").name)
        if conv is None or conv.op_type != "Conv" or int(conv.get("group", 1)) != 1:
            continue
        if listed(conv.input(1).name, Conv().product(conv)):
            continue
        kinds = {reader.op_type for reader in readers}
        if not pool.inside or "ProductWeightGrad" not in kinds or not kinds <= _READERS:
            continue
        bounded = train.graph.producer(node.input(1).name)
        alive = _ALIVE if bounded is not None and bounded.op_type in ("ReluMaskGrad", "ActivationGrad") else 1.0
        if pays(Conv().product(conv), pool, "ProductInputGrad" in kinds, lanes, alive):
            _rewrite(train.graph, node, conv, readers, math.prod(pool.out))


def pays(g: Product, pool: Pool, with_input: bool, lanes: int, alive: float) -> bool:
    """Whether lists promise to be faster than dense kernels, without much more memory.

    Args:
        g: the convolution.
        pool: the max pool behind it.
        with_input: whether the gradient of its input is wanted.
        lanes: samples in a vector.
        alive: share of the windows that get a gradient.
    """
    simd, taps, windows = simd_lanes(), len(g.taps), math.prod(pool.out)
    width = channel_lanes(g.channels_in, lanes, narrowest=4)
    vectors = -(-g.channels_in // width)
    top, left, bottom, right = g.border
    pixels = (g.size[0] + top + bottom) * (g.size[1] + left + right)
    if pixels * vectors * width > _MEMORY * math.prod(g.out) * g.channels_out:
        return False
    winograd = g.kernel == (3, 3) and g.strides == g.dilations == (1, 1) and g.channels_in % 4 == 0
    winograd = winograd and all(size % 4 == 0 for size in g.out)
    dense = (1 + with_input) * g.macs / simd / (_WINOGRAD if winograd else _DENSE)
    numbers = alive * windows * g.channels_out
    listed = numbers * (_NUMBER + _READ * taps * vectors) + _LIST * windows * g.channels_out / lanes
    listed += _TURN * pixels * vectors
    if with_input:
        listed += numbers * (_NUMBER + _SPREAD * taps * vectors) + _TURN * pixels * vectors
    return listed < _MARGIN * dense


def _rewrite(graph: Graph, node: Node, conv: Node, readers: list[Node], windows: int) -> None:
    lists = Value(f"{node.y.name}.lists", (1,), batched=False)
    graph.add_value(lists)
    attributes = {**node.attributes, "conv": conv}
    graph.nodes[graph.nodes.index(node)] = Node("PooledErrors", node.name, node.inputs, (lists,), attributes)
    for reader in readers:
        place, more = graph.nodes.index(reader), {**reader.attributes, "windows": windows}
        if reader.op_type == "SumTo":
            graph.nodes[place] = replace(reader, inputs=(node.input(1),))
        elif reader.op_type == "ProductInputGrad":
            inputs = (lists, reader.input(1))
            graph.nodes[place] = replace(reader, op_type="PooledInputGrad", inputs=inputs, attributes=more)
        else:
            inputs = (reader.x, lists)
            graph.nodes[place] = replace(reader, op_type="PooledWeightGrad", inputs=inputs, attributes=more)
