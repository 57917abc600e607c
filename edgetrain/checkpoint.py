"""Checkpoints: everything a learner needs to go on exactly, in one file that survives a power cut.

The file is safetensors (tensors and text, nothing executable); its one metadata entry holds JSON: the
graph, the settings, the position in the data, the history, and a SHA-256 over all of it. A file is first written
beside its destination, then synced and renamed, so the destination is always a whole file, old or new.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.devices import DeviceProfile
from edgetrain.errors import CheckpointError
from edgetrain.files import not_written, raw, replace_file
from edgetrain.graph import placeholder
from edgetrain.graph_json import graph_from_dict, graph_to_dict
from edgetrain.history import History
from edgetrain.optim import Optimizer
from edgetrain.policies import describe_policy
from edgetrain.schema import build
from edgetrain.tensors import Tensors, put_under, taken_from

if TYPE_CHECKING:
    from edgetrain.learner import Learner

FORMAT_VERSION = 1
_ENTRY = "edgetrain"
_GRAPH, _STATE = "graph/", "state/"  # begin the names of tensors
_REMEDY = "use another checkpoint of the run (such as best.safetensors), or train again"

# As safetensors names them.
_DTYPES = {
    "bool": "BOOL", "uint8": "U8", "int32": "I32", "int64": "I64", "uint64": "U64", "float32": "F32", "float64": "F64",
}  # fmt: skip


def save_checkpoint(learner: Learner, path: str | os.PathLike[str]) -> None:
    """Write a learner to one file; a crash at any moment leaves the old file or the new one, never a part.

    Args:
        learner: is not changed.
        path: of the file; its folder must exist.

    Raises:
        CheckpointError: the file cannot be written.
    """
    if Path(path).is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a file name such as learner.safetensors in it")
    tensors, meta = learner.state()
    sparse = learner.topology.indices  # their weights are in the state only: a dense copy would say nothing new
    arrays = {name: array for name, array in taken_from("weights/", tensors).items() if name not in sparse}
    # ``np.ascontiguousarray`` would make a shape of (1,) of (), and the file of a network with scalars useless.
    tensors = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    tensors, aliases = _without_duplicates(put_under(_STATE, tensors) | put_under(_GRAPH, arrays))
    table = {
        "format_version": FORMAT_VERSION,
        "graph": graph_to_dict(learner.graph),
        "settings": _settings(learner),
        "position": asdict(learner.position),
        "history": learner.history.to_dict(),
        "state": meta,
        "aliases": aliases,
    }
    write_file(path, *_encode(tensors, table))


def load_checkpoint(path: str | os.PathLike[str]) -> Learner:
    """Return the learner that ``save_checkpoint`` wrote, ready to go on exactly.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or of another format version.
    """
    tensors, table = read_checkpoint(path)
    from edgetrain.learner import Learner

    try:
        arrays = taken_from(_GRAPH, tensors)
        arrays |= _placeholders(table["graph"], arrays)
        graph = graph_from_dict(table["graph"], arrays)
        topology = table["state"].get("topology") or {}
        # Files from before capacities were kept: they may have shrunk where ``load_parameters`` was called.
        graph.densities = topology.get("capacities", topology.get("densities", {}))
        learner = Learner(graph, **_arguments(table["settings"]))
        learner.restore(taken_from(_STATE, tensors), table["state"])
        learner.position = replace(learner.position, **table["position"])
        learner.history = History.from_dict(table["history"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the content does not fit together ({error!r}); {_REMEDY}") from error
    return learner


def _placeholders(graph: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Tensors:
    """Return placeholders of sparse weights, which the state brings."""
    shapes = {step["parameter"]: step["shape"] for step in graph["steps"] if "parameter" in step}
    return {name: placeholder(shape) for name, shape in shapes.items() if name not in arrays}


def read_checkpoint(path: str | os.PathLike[str]) -> tuple[Tensors, dict[str, Any]]:
    """Return the tensors and the JSON of a checkpoint after checking its hash.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or of another format version.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such checkpoint; check the path") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); expected a checkpoint file") from error
    tensors, table = _decode(path, content)
    for name, original in table["aliases"].items():
        tensors[name] = tensors[original]
    return tensors, table


def write_file(path: str | os.PathLike[str], *content: bytes | NDArray[Any]) -> None:
    """Do as ``files.replace_file``.

    Raises:
        CheckpointError: the folder is missing, full or not writable; the old file is untouched.
    """
    try:
        replace_file(path, *content)
    except OSError as error:
        raise CheckpointError(not_written(path, error)) from error


def _without_duplicates(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """Drop tensors whose bytes are stored under another name already (state and graph share the weights)."""
    first: dict[tuple[str, tuple[int, ...], bytes], str] = {}
    aliases = {}
    for name, array in tensors.items():
        key = (str(array.dtype), array.shape, hashlib.sha256(raw(array)).digest())
        if first.setdefault(key, name) != name:
            aliases[name] = first[key]
    return {name: array for name, array in tensors.items() if name not in aliases}, aliases


def _encode(tensors: Tensors, table: dict[str, Any]) -> list[bytes | NDArray[Any]]:
    """Return the parts of a safetensors file: the header, then all tensors, the widest numbers first: aligned.

    ``safetensors.numpy.save`` makes the whole file in memory, and then a copy of it: saving 64 MiB took 184 beside the
    learner, it takes 64, which is the copy of the state.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    # One entry only: the order of several would differ from run to run, and with it the bytes of the file.
    header: dict[str, Any] = {"__metadata__": {_ENTRY: json.dumps(table | {"sha256": _digest(tensors, table)})}}
    end = 0
    for name in order:
        array, start = tensors[name], end
        end += array.nbytes
        header[name] = {"dtype": _DTYPES[str(array.dtype)], "shape": array.shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(tensors[name] for name in order)]


def _decode(path: Path, content: bytes) -> tuple[Tensors, dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        tensors = load(content)
        table = json.loads(_header(content)["__metadata__"][_ENTRY])
    except (SafetensorError, ValueError) as error:
        message = f"{path}: not a whole checkpoint ({error}), {len(content)} bytes; {_REMEDY}"
        raise CheckpointError(message) from error
    except (KeyError, TypeError):
        raise CheckpointError(f"{path}: a safetensors file, but not written by edgetrain; {_REMEDY}") from None
    if table.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path}: format version {table.get('format_version')}, expected {FORMAT_VERSION}; "
            "load it with the edgetrain version that wrote it"
        )
    if table.pop("sha256", None) != _digest(tensors, table):
        raise CheckpointError(f"{path}: the content does not match its SHA-256, the file is damaged; {_REMEDY}")
    return tensors, table


def _header(content: bytes) -> Any:
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length])


def _digest(tensors: Mapping[str, NDArray[Any]], table: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps(table, sort_keys=True).encode())
    for name in sorted(tensors):
        array = tensors[name]
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(raw(np.ascontiguousarray(array)))
    return digest.hexdigest()


def _settings(learner: Learner) -> dict[str, Any]:
    """Return the arguments of the constructor as JSON-able values."""
    return {
        "profile": _without_none(learner.profile.to_dict()),
        "batch_size": learner.batch_size,
        "seed": learner.seed,
        "threads": learner.threads,
        "memory_budget": learner.memory_budget,
        "optimizer": learner.optimizer.to_dict(),
        "loss": learner.loss,
        "label_smoothing": learner.label_smoothing,
        "sparsity": describe_policy("sparsity", learner.sparsity),
        "instance_filter": describe_policy("filter", learner.instance_filter),
        "error_pruning": describe_policy("error_pruning", learner.error_pruning),
    }


def _without_none(table: dict[str, Any]) -> dict[str, Any]:
    """Return nested tables without unknown numbers, as a profile's TOML file leaves them out."""
    tables = {key: _without_none(value) if isinstance(value, dict) else value for key, value in table.items()}
    return {key: value for key, value in tables.items() if value is not None}


def _arguments(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of the constructor; a profile travels whole, as its file may be gone by now."""
    profile = settings["profile"]
    chosen = "host" if profile["name"] == "host" else build(DeviceProfile, profile, Path("stored profile"))
    return dict(settings) | {
        "profile": chosen,
        "optimizer": Optimizer.from_dict(settings["optimizer"]),
    }
