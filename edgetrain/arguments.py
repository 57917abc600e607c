"""What ``Learner`` is made of, checked when it is given: every bad argument is one message, not a failure later on."""

from __future__ import annotations

import operator
import os
from typing import Any

from edgetrain.devices import DeviceProfile, load_profile
from edgetrain.errors import GraphError, UsageError
from edgetrain.graph import Graph
from edgetrain.optim import Optimizer

# Counters in memory are int64.
_MOST = 2**63 - 1


def graph_of(graph: Any) -> Graph:
    """Return a graph as it is.

    Raises:
        UsageError: something else.
    """
    if not isinstance(graph, Graph):
        raise UsageError(
            f"graph={graph!r}, expected a Graph; make one with edgetrain.models.lenet5() or edgetrain.load_onnx(path)"
        )
    return graph


def profile_of(profile: Any) -> DeviceProfile:
    """Return a device profile as it is, or that of a name or a path.

    Raises:
        UsageError: something else.
        ProfileError: it is not there, or bad.
    """
    if isinstance(profile, DeviceProfile):
        return profile
    if not isinstance(profile, str | os.PathLike):
        raise UsageError(f"profile={profile!r}, expected 'host', the name of a board, a path or a DeviceProfile")
    return load_profile(profile)


def optimizer_of(optimizer: Any) -> Optimizer:
    """Return an optimizer as it is.

    Raises:
        UsageError: something else.
    """
    if not isinstance(optimizer, Optimizer):
        raise UsageError(f"optimizer={optimizer!r}, expected an optimizer such as edgetrain.SGD(lr=0.05)")
    return optimizer


def integer_of(name: str, value: Any, low: int, high: int = _MOST) -> int:
    """Return an integer of any type (also NumPy's) as an int.

    Raises:
        UsageError: something else, or out of range.

    Example:
        >>> integer_of("batch_size", 8, 1)
        8
    """
    try:
        number = low - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        limits = f"of at least {low}" if high == _MOST and number <= high else f"from {low} to {high}"
        raise UsageError(f"{name}={value!r}, expected an integer {limits}")
    return number


def loss_of(loss: Any, graph: Graph) -> str:
    """Return the name of a loss as it is.

    Raises:
        UsageError: there is no such loss.
        GraphError: squared errors of a network that ended in a Softmax, which is left to cross-entropy.
    """
    if loss not in ("cross_entropy", "mse"):
        raise UsageError(f"loss={loss!r}, expected 'cross_entropy' or 'mse'")
    if loss == "mse" and (graph.softmax_output or graph.log_softmax_output):
        ending = "LogSoftmax" if graph.log_softmax_output else "Softmax"
        raise GraphError(
            f"loss='mse' with the graph '{graph.name}', whose file ends in a {ending}: it is taken off when the file "
            f"is read, for cross-entropy; use loss='cross_entropy', or export the network without the {ending}"
        )
    return str(loss)


def threads_of(threads: int | None, profile: DeviceProfile) -> int:
    """Return a number of threads that was asked for, or the profile's.

    Raises:
        UsageError: less than 1, or more than 64 and than this machine has.
    """
    available = len(os.sched_getaffinity(0))
    if threads is None:
        return min(profile.threads, available)
    return integer_of("threads", threads, 1, max(64, available))


def smoothing_of(value: Any) -> float:
    """Return a label smoothing as a float.

    Raises:
        UsageError: not a number from 0 to below 1.
    """
    try:
        share = -1.0 if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share < 1:
        raise UsageError(f"label_smoothing={value!r}, expected a number from 0 to below 1")
    return share
