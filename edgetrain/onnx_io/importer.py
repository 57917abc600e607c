"""Reading a whole ONNX file: the file, its inputs and outputs, and the walk over its nodes.

The batch dimension has no size in a ``Graph``, but shape arithmetic in a file
computes with it. While a file is read, a marker size stands for it; two readings
with different markers must give the same graph (see ``_build``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgetrain.errors import ModelError, UnsupportedError
from edgetrain.graph import Graph
from edgetrain.onnx_io.folding import live_nodes
from edgetrain.onnx_io.names import CHANNELS_LAST, CLASS_NAMES
from edgetrain.onnx_io.readers import READERS
from edgetrain.onnx_io.reading import Reading, Source, check_text

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

OLDEST_OPSET = 11
# Primes: a product of sizes is a multiple of the marker only if the batch is in it. Small, because exporters
# expand constants over the batch.
_MARKER, _OTHER_MARKER = 97, 89
# What PyTorch's exporters call every network; the file's name says more.
_MEANINGLESS_NAMES = ("main_graph", "main", "torch_jit", "torch-jit-export", "onnx")


def load_onnx(source: str | PathLike[str] | ModelProto) -> Graph:
    """Read an ONNX model: structure and weights, ready to train.

    Args:
        source: path of a file, or a model in memory. External data must lie next to the file.

    Returns:
        A graph whose inputs have dimension 0 of the file's inputs as batch. Weights of Conv, Gemm and MatMul,
        scale and bias of BatchNormalization, and biases added right after a layer are trainable; running
        averages and all other constants are not. A Softmax or LogSoftmax at the end is taken off (``softmax_output``,
        ``log_softmax_output``). The weights count as trained (``trained``).

    Raises:
        UnsupportedError: an operator, attribute, shape or type is not supported; names node, operator, opset, reason.
        ModelError: the file is missing, is no ONNX file, or is inconsistent.

    Example:
        >>> load_onnx("missing.onnx")
        Traceback (most recent call last):
        ...
        edgetrain.errors.ModelError: 'missing.onnx' cannot be read as an ONNX model: no such file
    """
    model = _current_opset(_without_functions(read_model(source)))
    opset = _opset(model)
    graph = _build(model, opset, _MARKER)
    if graph.name in _MEANINGLESS_NAMES and not isinstance(source, type(model)):
        graph.name = Path(source).stem
    if any(node.op_type in ("Shape", "Size") for node in model.graph.node):
        _check_same(graph, _build(model, opset, _OTHER_MARKER))
    _check_numbers(graph)
    graph.trained = True
    return graph


def _check_numbers(graph: Graph) -> None:
    """Refuse weights and constants that are not finite: the first step would fail, and blame something else.

    Raises:
        ModelError: there are some.
    """
    broken = [name for name, array in graph.arrays.items() if not np.isfinite(array).all()]
    if broken:
        raise ModelError(
            f"graph '{graph.name}': array '{broken[0]}' holds NaN or infinite numbers; export the network again, from "
            "before its weights went astray"
        )


def read_model(source: str | PathLike[str] | ModelProto) -> ModelProto:
    """Return the ONNX model of a file, with external data loaded.

    Raises:
        ModelError: the file is missing, a folder, truncated, or no ONNX file; or the source is no path.
    """
    import onnx

    if isinstance(source, onnx.ModelProto):
        model, place = source, f"model '{source.graph.name}'"
    else:
        if not isinstance(source, str | PathLike):
            raise ModelError(f"{source!r} is no model, expected the path of an .onnx file, or a ModelProto")
        place = f"'{source}'"
        if not Path(source).is_file():
            what = "a folder" if Path(source).is_dir() else "no such file"
            raise ModelError(f"{place} cannot be read as an ONNX model: {what}")
        try:
            model = onnx.load(source)
        except Exception as error:  # protobuf, checker and file system each raise their own classes
            raise ModelError(
                f"{place} cannot be read as an ONNX model: {error}; was it exported and copied completely?"
            ) from error
    if not model.graph.node or not model.opset_import:
        raise ModelError(f"{place} is not an ONNX model: it holds no nodes; was the file written completely?")
    check_text(model, place)
    return model


def _without_functions(model: ModelProto) -> ModelProto:
    if not model.functions:
        return model
    from onnx.inliner import inline_local_functions

    try:
        return inline_local_functions(model)
    except Exception as error:  # the inliner raises RuntimeError and others
        raise ModelError(f"the functions of model '{model.graph.name}' cannot be put in place: {error}") from error


def _opset(model: ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=1)


def _current_opset(model: ModelProto) -> ModelProto:
    """Return the model in an opset that the readers know; older files go through onnx's version converter.

    Raises:
        UnsupportedError: newer than the installed onnx package, or too old to convert.
    """
    import onnx
    from onnx import version_converter

    opset, newest = _opset(model), onnx.defs.onnx_opset_version()
    if opset > newest:
        raise UnsupportedError(
            f"model '{model.graph.name}' uses opset {opset}; the installed onnx {onnx.__version__} knows "
            f"{OLDEST_OPSET} to {newest}: update onnx, or export with opset_version={newest}"
        )
    if opset >= OLDEST_OPSET:
        return model
    try:
        return version_converter.convert_version(model, OLDEST_OPSET)
    except Exception as error:  # the converter raises RuntimeError, ConvertError and others
        raise UnsupportedError(
            f"model '{model.graph.name}' uses opset {opset}; supported are {OLDEST_OPSET} to {newest}, and "
            f"the onnx package cannot convert it ({error}): export it with opset_version={OLDEST_OPSET} or newer"
        ) from error


def _build(model: ModelProto, opset: int, marker: int) -> Graph:
    """Read the model with one marker for the batch size."""
    r = Reading(Graph(model.graph.name or "onnx"), opset, marker)
    _load_tensors(r, model.graph.initializer)
    inputs = [info for info in model.graph.input if info.name not in r.constants]
    if _metadata(model).get(CHANNELS_LAST) != "false":
        r.channels_last = _channels_last(r, model.graph, inputs)
    for info in inputs:
        _read_input(r, info)
    for node in live_nodes(model.graph):
        _read_node(r, node)
    _set_outputs(r, [info.name for info in model.graph.output])
    r.graph.normalization, r.graph.channels_last = r.normalization, bool(r.channels_last)
    r.graph.class_names = _class_names(model)
    return r.graph


def _channels_last(r: Reading, graph: GraphProto, inputs: Sequence[ValueInfoProto]) -> str:
    """Return the name of the only input if nodes read it with its last axis put first alone, as Keras' files do.

    By a Transpose; where images have one channel, it may have become a Reshape.
    """
    names = [info.name for info in inputs]
    readers = [node for node in graph.node if any(name in node.input for name in names)]
    if len(names) != 1 or len(readers) != 1 or readers[0].op_type not in ("Transpose", "Reshape"):
        return ""
    if not any(name in node.input for name in readers[0].output for node in graph.node):
        return ""
    sizes = [dimension.dim_value for dimension in inputs[0].type.tensor_type.shape.dim]
    order = [0, len(sizes) - 1, *range(1, len(sizes) - 1)]
    first = readers[0].op_type == "Transpose" and len(sizes) > 2 and Source.of(readers[0]).get("perm") == order
    if readers[0].op_type == "Reshape" and len(sizes) == 4 and sizes[3] == 1:
        target = r.constants.get(readers[0].input[-1])
        first = target is not None and target.ravel()[1:].tolist() == [1, *sizes[1:3]] != sizes[1:]
    return names[0] if first else ""


def _check_same(graph: Graph, other: Graph) -> None:
    """Refuse a network that computes with the batch size.

    Raises:
        UnsupportedError: an array or an attribute differs between readings with different markers.
    """
    for mine, twin in zip(graph.nodes, other.nodes, strict=True):
        if mine.op_type != twin.op_type or mine.attributes != twin.attributes:
            raise UnsupportedError(
                f"node '{mine.name}' ({mine.op_type}): an attribute depends on the batch size, which is free"
            )
    for name, array in graph.arrays.items():
        if name not in other.arrays or not np.array_equal(array, other.arrays[name], equal_nan=True):
            raise UnsupportedError(f"the constant '{name}' is computed from the batch size, which is free")


def _load_tensors(r: Reading, tensors: Iterable[TensorProto]) -> None:
    from onnx import numpy_helper

    for tensor in tensors:
        try:
            r.constants[tensor.name] = numpy_helper.to_array(tensor)
        except Exception as error:  # external data that is not there, or a tensor shorter than its shape says
            raise ModelError(f"the initializer '{tensor.name}' cannot be read: {error}") from error


def _read_input(r: Reading, info: ValueInfoProto) -> None:
    """Declare an input of the network.

    Raises:
        UnsupportedError: not float32, no batch dimension, or sizes that are not fixed.
    """
    from onnx import TensorProto

    tensor = info.type.tensor_type
    where = f"input '{info.name}' of the network (opset {r.opset})"
    if tensor.elem_type != TensorProto.FLOAT:
        known = tensor.elem_type in TensorProto.DataType.values()
        kind = TensorProto.DataType.Name(tensor.elem_type).lower() if known else f"number {tensor.elem_type}"
        raise UnsupportedError(
            f"{where} has the type {kind}; edgetrain computes in float32: export with float32 inputs"
        )
    sizes = [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in tensor.shape.dim]
    if not sizes:
        raise UnsupportedError(f"{where} has no dimensions; expected the batch as dimension 0")
    fixed = [n for n in sizes[1:] if n is not None]
    if len(fixed) != len(sizes) - 1:
        shown = ", ".join("?" if n is None else str(n) for n in sizes)
        raise UnsupportedError(
            f"{where} has the shape ({shown}); only dimension 0 may be free: export with fixed image sizes"
        )
    if r.graph.inputs and sizes[0] != r.fixed_batch:
        raise UnsupportedError(
            f"{where}: dimension 0 is {sizes[0]}, but {r.fixed_batch} in other inputs; it must be the batch"
        )
    r.fixed_batch = sizes[0]
    if info.name == r.channels_last:
        fixed = [fixed[-1], *fixed[:-1]]
    r.values[info.name] = r.graph.add_input(info.name, fixed)


def _read_node(r: Reading, node: NodeProto) -> None:
    """Fold a node or add it to the graph.

    Raises:
        UnsupportedError: see ``load_onnx``.
    """
    if r.fold(node):
        return
    if node.op_type == "If":
        _read_branch(r, node)
        return
    source = Source.of(node)
    if source.op_type not in READERS:
        r.fail(source, f"the operator is not supported; supported: {', '.join(sorted(READERS))}")
    READERS[source.op_type](r, source)


def _read_branch(r: Reading, node: NodeProto) -> None:
    """Read the branch of an If that its constant condition takes (torch exports squeeze this way).

    Raises:
        ModelError: there is no such branch, or it has another number of outputs.
    """
    source = Source.of(node)
    taken = "then_branch" if np.all(r.constant(source, 0)) else "else_branch"
    branch: GraphProto | None = source.get(taken)
    if branch is None or len(branch.output) != len(node.output):
        outputs = "is not there" if branch is None else f"has {len(branch.output)} outputs"
        raise ModelError(f"node '{source.name}' (If): its {taken} {outputs}, expected {len(node.output)} outputs")
    _load_tensors(r, branch.initializer)
    for inner in branch.node:
        _read_node(r, inner)
    for name, out in zip(node.output, branch.output, strict=True):
        if out.name in r.constants:
            r.constants[name] = r.constants[out.name]
        elif out.name in r.values:
            r.values[name] = r.values[out.name]


def _set_outputs(r: Reading, names: list[str]) -> None:
    """Declare the outputs; a Softmax at the end was taken off by its reader.

    Raises:
        UnsupportedError: an output is a constant.
        ModelError: there is no output, or nothing makes it.
    """
    if not names:
        raise ModelError(f"model '{r.graph.name}' declares no output, expected at least one; export it again")
    for name in names:
        if name in r.withheld:
            raise UnsupportedError(f"network (opset {r.opset}): {r.withheld[name]}")
        if name in r.constants:
            raise UnsupportedError(f"network (opset {r.opset}): output '{name}' does not depend on the input")
        if name not in r.values:
            raise ModelError(f"the output '{name}' of the network is made by no node")
        if r.values[name] in r.graph.inputs:
            r.values[name] = r.graph.add("Identity", [r.values[name]], name=name, outputs=[name])
    ending = r.probabilities.get(names[0])
    r.graph.softmax_output, r.graph.log_softmax_output = ending == "Softmax", ending == "LogSoftmax"
    r.graph.set_outputs(dict.fromkeys(r.values[name] for name in names))


def _class_names(model: ModelProto) -> tuple[str, ...]:
    """Return the labels in the file's metadata; none when they are absent or not a JSON list."""
    try:
        names = json.loads(_metadata(model).get(CLASS_NAMES, "[]"))
    except ValueError:
        return ()
    return tuple(str(name) for name in names) if isinstance(names, list) else ()


def _metadata(model: ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}
