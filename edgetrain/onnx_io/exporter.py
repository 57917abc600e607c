"""Writing a graph as an ONNX file that checkers accept and runtimes execute.

The file holds the inference network: BatchNormalization uses its running averages
and Dropout does nothing (it stays in the file, so that reading it back gives the
same training behaviour).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain._version import __version__
from edgetrain.errors import ModelError, UsageError
from edgetrain.files import not_written, replace_file
from edgetrain.graph import Graph, Node, Normalization, Value
from edgetrain.onnx_io.names import (
    BATCH,
    CHANNELS_LAST,
    CLASS_NAMES,
    DIVIDE_BY_STD,
    NORMALIZATION,
    PROBABILITIES,
    PRODUCER,
    SUBTRACT_MEAN,
)
from edgetrain.ops import get_op
from edgetrain.ops.pooling import PoolOp

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto

    Written = tuple[list[NodeProto], list[TensorProto]]

OPSET, IR_VERSION = 17, 8
# AveragePool knows dilations since opset 19, which came with the file format 9.
DILATED_OPSET, DILATED_IR_VERSION = 19, 9


def save_onnx(
    graph: Graph,
    path: str | PathLike[str],
    *,
    arrays: Mapping[str, NDArray[np.float32]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a graph for inference, with weights, input normalisation, Softmax and class names.

    The file appears complete or not at all: it is written beside ``path`` and renamed.

    Args:
        graph: what to write. Inputs and outputs get a free first dimension named ``batch``.
        path: of the file.
        arrays: float32 arrays in ONNX layout that replace those of the graph, by name (trained parameters).
        metadata: more key-value pairs for the file's ``metadata_props``.

    Raises:
        ModelError: an array does not fit the graph, or the result does not pass ``onnx.checker``.
        UsageError: the file cannot be written there.
    """
    import onnx

    model = exported_model(graph, arrays=arrays, metadata=metadata)
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception as error:  # ValidationError or InferenceError, whose classes differ between versions of onnx
        raise ModelError(f"graph '{graph.name}' cannot be written as ONNX: {error}") from error
    try:
        replace_file(path, model.SerializeToString())
    except OSError as error:
        raise UsageError(not_written(path, error)) from error


def exported_model(
    graph: Graph,
    *,
    arrays: Mapping[str, NDArray[np.float32]] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> ModelProto:
    """Return the ONNX model of a graph; see ``save_onnx``.

    Raises:
        ModelError: an array does not fit the graph.
    """
    from onnx import helper

    opset, ir_version = _versions(graph)
    nodes, first = _channels_first(graph)
    (more_nodes, tensors), first = _normalization(graph, first)
    nodes += more_nodes
    tensors += [_tensor(name, array) for name, array in _merged(graph, arrays or {}).items()]
    for node in graph.nodes:
        more_nodes, more_tensors = WRITERS.get(node.op_type, _plain)(_renamed_input(graph, node, first))
        nodes += more_nodes
        tensors += more_tensors
    outputs = [_described(graph.values[name]) for name in graph.outputs]
    if graph.softmax_output or graph.log_softmax_output:
        logits = graph.outputs[0]
        name = PROBABILITIES if PROBABILITIES not in graph.values else f"{logits}.{PROBABILITIES}"
        ending = "LogSoftmax" if graph.log_softmax_output else "Softmax"
        nodes.append(helper.make_node(ending, [logits], [name], name=name, axis=-1))
        outputs[0] = _described(Value(name, graph.output_shape))
    inputs = [_described(graph.values[name]) for name in graph.inputs]
    if graph.channels_last:
        inputs[0] = _described(Value(graph.inputs[0], (*graph.input_shape[1:], graph.input_shape[0])))
    body = helper.make_graph(nodes, graph.name, inputs, outputs, tensors)
    model = helper.make_model(
        body, producer_name=PRODUCER, producer_version=__version__, opset_imports=[helper.make_opsetid("", opset)]
    )
    model.ir_version = ir_version
    _set_metadata(model, graph, metadata or {})
    return model


def _versions(graph: Graph) -> tuple[int, int]:
    """Return the opset and the file format version that the graph needs."""
    dilated = any(n.op_type == "AveragePool" and max(n.get("dilations") or [1]) > 1 for n in graph.nodes)
    return (DILATED_OPSET, DILATED_IR_VERSION) if dilated else (OPSET, IR_VERSION)


def _merged(graph: Graph, arrays: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Return the graph's arrays with replacements.

    Raises:
        ModelError: a replacement has an unknown name or another shape.
    """
    for name, array in arrays.items():
        if name not in graph.arrays:
            raise ModelError(f"'{name}' is no array of graph '{graph.name}'; it has: {', '.join(graph.arrays)}")
        if np.shape(array) != graph.arrays[name].shape:
            raise ModelError(f"array '{name}' has the shape {np.shape(array)}; expected {graph.arrays[name].shape}")
    used = {value.name for node in graph.nodes for value in node.inputs if value is not None}
    return {name: arrays.get(name, array) for name, array in graph.arrays.items() if name in used}


def _set_metadata(model: ModelProto, graph: Graph, metadata: Mapping[str, str]) -> None:
    from onnx import helper

    props = {str(key): str(value) for key, value in metadata.items()}
    if graph.class_names:
        props[CLASS_NAMES] = json.dumps(list(graph.class_names))
    readers = [node for node in graph.nodes if any(v is not None and v.name in graph.inputs for v in node.inputs)]
    if graph.channels_last or any(node.op_type in ("Transpose", "Reshape") for node in readers):
        props[CHANNELS_LAST] = json.dumps(graph.channels_last)
    helper.set_model_props(model, props)


def _described(value: Value) -> ValueInfoProto:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(value.name, TensorProto.FLOAT, [BATCH, *value.shape])


def _tensor(name: str, array: Any, dtype: type[np.generic] = np.float32) -> TensorProto:
    from onnx import numpy_helper

    return numpy_helper.from_array(np.asarray(array, dtype=dtype, order="C"), name)


# --- in front of the network: channels put first, input normalisation in two recognisable nodes ----------------------


def _channels_first(graph: Graph) -> tuple[list[NodeProto], str]:
    """Return what puts the channels of the first input first, if they are last there, and the name of the result."""
    x = graph.inputs[0]
    if not graph.channels_last:
        return [], x
    from onnx import helper

    rank, y = len(graph.input_shape) + 1, f"{x}.channels_first"
    return [helper.make_node("Transpose", [x], [y], name=y, perm=[0, rank - 1, *range(1, rank - 1)])], y


def _normalization(graph: Graph, x: str) -> tuple[Written, str]:
    """Return ``(x - mean) / std`` for the first input, if it is normalised, and the name of the result."""
    if graph.normalization is None:
        return ([], []), x
    from onnx import helper

    centred, normalized = f"{graph.inputs[0]}.centred", f"{graph.inputs[0]}.normalized"
    mean, std = f"{NORMALIZATION}.mean", f"{NORMALIZATION}.std"
    nodes = [
        helper.make_node("Sub", [x, mean], [centred], name=SUBTRACT_MEAN),
        helper.make_node("Div", [centred, std], [normalized], name=DIVIDE_BY_STD),
    ]
    tensors = [_tensor(mean, _per_channel(graph, "mean")), _tensor(std, _per_channel(graph, "std"))]
    return (nodes, tensors), normalized


def _per_channel(graph: Graph, part: str) -> NDArray[np.float32]:
    """Return the mean or the standard deviation in a shape that broadcasts over pixels."""
    normalization: Normalization | None = graph.normalization
    numbers = np.asarray(getattr(normalization, part), np.float32)
    return numbers.reshape(-1, *[1] * (len(graph.input_shape) - 1))


def _renamed_input(graph: Graph, node: Node, first: str) -> Node:
    """Let readers of the first input read what was made of it."""
    if first == graph.inputs[0]:
        return node
    renamed = [Value(first, v.shape) if v is not None and v.name == graph.inputs[0] else v for v in node.inputs]
    return Node(node.op_type, node.name, tuple(renamed), node.outputs, node.attributes)


# --- operators -------------------------------------------------------------------------------------------------------


def _made(node: Node, more_inputs: list[str], tensors: list[TensorProto], **attributes: Any) -> Written:
    from onnx import helper

    inputs = ["" if value is None else value.name for value in node.inputs] + more_inputs
    while inputs and not inputs[-1]:
        inputs.pop()
    outputs = [value.name for value in node.outputs]
    return [helper.make_node(node.op_type, inputs, outputs, name=node.name, **attributes)], tensors


def _plain(node: Node) -> Written:
    """Write an operator whose attributes are those of ONNX."""
    attributes = {key: value for key, value in node.attributes.items() if value is not None}
    return _made(node, [], [], **attributes)


def _pool(node: Node) -> Written:
    """Write a pool; without ``ceil_mode`` where ONNX would add a last window that PyTorch, and we, leave out.

    A window is left out that begins in the padding at the end. The windows that stay are then asked for by padding.
    """
    attributes = {key: value for key, value in node.attributes.items() if value is not None}
    if node.op_type == "AveragePool" and max(attributes.get("dilations", [1])) == 1:
        attributes.pop("dilations", None)
    if attributes.get("ceil_mode", 0) and (pads := _pads_without_ceil_mode(node)):
        attributes |= {"ceil_mode": 0, "auto_pad": "NOTSET", "pads": pads}
    return _made(node, [], [], **attributes)


def _pads_without_ceil_mode(node: Node) -> list[int]:
    """Return the padding with which a pool has the same windows without ``ceil_mode``; nothing if it may keep that.

    Raises:
        ModelError: the padding counts in averages, but what makes room for a window must not.
    """
    op = get_op(node.op_type)
    assert isinstance(op, PoolOp)
    pool = op.pool(node, node.x)
    rank, pads, left_out = len(node.x.shape) - 1, list(pool.pads), False
    for axis in (0, 1):
        reach = (pool.kernel[axis] - 1) * pool.dilations[axis] + 1
        room = pool.size[axis] + pool.pads[axis] + pool.pads[axis + 2] - reach
        left_out |= -(-room // pool.strides[axis]) + 1 > pool.out[axis]
        pads[axis + 2] += max(0, (pool.out[axis] - 1) * pool.strides[axis] - room)
    if left_out and pads != list(pool.pads) and pool.include_pad:
        raise ModelError(
            f"node '{node.name}' (AveragePool): ONNX has no average pool with ceil_mode and count_include_pad that "
            "leaves out a window along one axis and adds one along the other; give it square maps or other pads"
        )
    return [*pads[2 - rank : 2], *pads[4 - rank :]] if left_out else []


def _clip(node: Node) -> Written:
    names, tensors = [], []
    for bound in ("min", "max"):
        given = node.get(bound) is not None and np.isfinite(node.get(bound))
        names.append(f"{node.name}.{bound}" if given else "")
        tensors += [_tensor(names[-1], node.get(bound))] if given else []
    return _made(node, names, tensors)


def _pad(node: Node) -> Written:
    pads, value = f"{node.name}.pads", f"{node.name}.value"
    tensors = [_tensor(pads, node.get("pads"), np.int64), _tensor(value, node.get("value", 0.0))]
    return _made(node, [pads, value], tensors, mode="constant")


def _reshape(node: Node) -> Written:
    shape = f"{node.name}.shape"
    return _made(node, [shape], [_tensor(shape, [0, *node.y.shape], np.int64)])  # 0 keeps the batch dimension


def _channel_shuffle(node: Node) -> Written:
    """Write three nodes, the last of which has the node's name."""
    from onnx import helper

    channels, rows, columns = node.y.shape
    group, grouped, dealt, shape = node.get("group"), *(f"{node.name}.{part}" for part in ("grouped", "dealt", "shape"))
    nodes = [
        helper.make_node("Reshape", [node.x.name, f"{grouped}.shape"], [grouped], name=grouped),
        helper.make_node("Transpose", [grouped], [dealt], name=dealt, perm=[0, 2, 1, 3, 4]),
        helper.make_node("Reshape", [dealt, shape], [node.y.name], name=node.name),
    ]
    sizes = [0, group, channels // group, rows, columns]
    return nodes, [_tensor(f"{grouped}.shape", sizes, np.int64), _tensor(shape, [0, *node.y.shape], np.int64)]


def _dropout(node: Node) -> Written:
    ratio = f"{node.name}.ratio"
    return _made(node, [ratio], [_tensor(ratio, node.get("ratio", 0.5))])


WRITERS: dict[str, Callable[[Node], Written]] = {
    "AveragePool": _pool,
    "ChannelShuffle": _channel_shuffle,
    "Clip": _clip,
    "Dropout": _dropout,
    "MaxPool": _pool,
    "Pad": _pad,
    "Reshape": _reshape,
}
