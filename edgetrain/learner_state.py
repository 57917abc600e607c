"""What training changes about a learner, as tensors and plain data, and a learner set back to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import CheckpointError
from edgetrain.sparsity.topology import TOPOLOGY
from edgetrain.stream import InstanceStream
from edgetrain.tensors import State, Tensors, put_under, taken_from

if TYPE_CHECKING:
    from edgetrain.learner import Learner

# Names of tensors beside ``<buffer>/<array>`` of ``Parameters`` and those of the topology.
_STREAM, _RECORDS = "stream/", "records"


def state_of(learner: Learner) -> State:
    """Return copies of all that training changes but the graph's own: tensors by name, and plain data."""
    parameters, steps = learner.plans.parameters, learner.step_count
    arrays = _stored_arrays(learner, steps)
    tensors: Tensors = {f"{buffer}/{name}": parameters.stored(name, buffer).copy() for buffer, name in arrays}
    if steps:
        tensors[_RECORDS] = parameters.buffers[_RECORDS].copy()
    patterns, topology = learner.topology.state()
    streamed, stream = learner.stream.state()
    meta = {"step_count": steps, "topology": topology} | ({"stream": stream} if stream else {})
    return tensors | patterns | put_under(_STREAM, streamed), meta


def restore_state(learner: Learner, tensors: Mapping[str, NDArray[Any]], meta: Mapping[str, Any]) -> None:
    """Give a learner the state that ``state_of`` returned.

    Raises:
        CheckpointError: it belongs to another network, optimizer or instance filter; nothing has changed.
    """
    own = {name: array for name, array in tensors.items() if not name.startswith(_STREAM)}
    records, step_count = own.pop(_RECORDS, None), int(meta["step_count"])
    _check(learner, own, records, step_count)
    stream = InstanceStream(learner)
    if "stream" in meta:
        stream.restore(taken_from(_STREAM, tensors), meta["stream"])
    own = learner.topology.restore(own, meta.get("topology"))
    parameters = learner.plans.parameters
    parameters.forget()
    if records is not None:
        parameters.buffers[_RECORDS][:] = records
    for key, array in own.items():
        buffer, name = key.split("/", 1)
        parameters.stored(name, buffer)[...] = array
    learner.step_count = step_count
    learner.graph.trained |= step_count > 0
    learner.stream, learner.plans.beside = stream, (stream, learner.topology)


def _stored_arrays(learner: Learner, step_count: int) -> list[tuple[str, str]]:
    """Return (buffer, name) of all arrays of a state after so many steps; before the first one of weights alone."""
    names, optimizer = learner.plans.parameters.names(), learner.optimizer
    weights = [("weights", name) for name in names]
    if not step_count:
        return weights
    moments = [(moment, name) for moment in optimizer.moments for name in names if name in learner.graph.trainable]
    return weights + moments + [("average", name) for name in names if optimizer.averaging]


def _check(learner: Learner, tensors: Tensors, records: NDArray[Any] | None, step_count: int) -> None:
    """Compare names and shapes of a state with what a learner has, before any of it is changed.

    Raises:
        CheckpointError: they differ.
    """
    parameters = learner.plans.parameters
    if step_count:
        _ = learner.plans.training  # makes the buffers of moments and records
    arrays = _stored_arrays(learner, step_count)
    wanted = {f"{buffer}/{name}": parameters.stored(name).shape for buffer, name in arrays}
    given = {key: np.shape(array) for key, array in tensors.items() if not key.startswith(TOPOLOGY)}
    if given != wanted:
        odd = sorted(key for key in wanted.keys() | given.keys() if wanted.get(key) != given.get(key))
        reason = "missing, unknown or of another shape"
        raise CheckpointError(f"the state belongs to another network or optimizer: {odd[:3]} {reason}")
    if records is not None and records.shape != parameters.buffers[_RECORDS].shape:
        raise CheckpointError("the state belongs to other pruned layers: its records have another size")
