"""What the methods of a run saved: instances, operations and time against dense training, as a table."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.accounting import METHODS
from edgetrain.cli.output import duration, table
from edgetrain.errors import NumericalError

if TYPE_CHECKING:
    from edgetrain.learner import Learner

_NAMES = {"filter": "the instance filter", "error_maps": "error pruning", "weights": "sparse weights",
          "activations": "sparse activations"}  # fmt: skip
# Dense steps that are timed when no baseline was trained, after as many to warm up.
_TIMED_STEPS = 10


def savings_of(counts: Mapping[str, int], seconds: float, dense: Mapping[str, Any]) -> dict[str, Any]:
    """Return the account of a run.

    Args:
        counts: sums of the run, as ``history.Totals.counts`` names them.
        seconds: training time of the run.
        dense: ``seconds`` that dense training takes, ``None`` if that is unknown, ``how`` it is known or why not, and
            perhaps its ``accuracy``.
    """
    shares = {f"saved_{name}": counts[f"saved_{name}"] / max(counts["macs_dense"], 1) for name in METHODS}
    done = counts["macs_done"] / counts["macs_dense"] if counts["macs_dense"] else 1.0
    return {
        **counts, "share_done": done, "shares": shares, "seconds": seconds, "dense": dict(dense),
        "time_saved": 1 - seconds / dense["seconds"] if dense["seconds"] else None,
    }  # fmt: skip


def savings_text(account: Mapping[str, Any]) -> str:
    """Return the account as a table and a line about time."""
    seen = max(account["instances_seen"], 1)
    rows = [("instances seen", f"{account['instances_seen']:,}", "100.0 %")]
    for name in ("kept", "uncertain"):
        number = account[f"instances_{name}"]
        rows.append((f"instances {name}", f"{number:,}", _percent(number / seen)))
    rows += [("operations of dense training", _macs(account["macs_dense"]), "100.0 %"),
             ("operations done", _macs(account["macs_done"]), _percent(account["share_done"]))]  # fmt: skip
    for name in METHODS:
        number = account[f"saved_{name}"]
        if number:
            rows.append((f"  saved by {_NAMES[name]}", _macs(number), _percent(account["shares"][f"saved_{name}"])))
    return f"{table(rows)}\n{_time_line(account)}"


def _time_line(account: Mapping[str, Any]) -> str:
    dense, saved = account["dense"], account["time_saved"]
    took = f"training took {duration(account['seconds'])}"
    if saved is None:
        return f"{took}; what dense training takes is unknown ({dense['how']})"
    accuracy = f", accuracy {dense['accuracy']:.4f}" if dense.get("accuracy") is not None else ""
    outcome = f"{_percent(saved)} of the time saved" if saved >= 0 else f"{_percent(-saved)} more time"
    return f"{took}, dense training {duration(dense['seconds'])}{accuracy} ({dense['how']}): {outcome}"


def layers_text(layers: Sequence[Mapping[str, Any]], topology: Mapping[str, Any]) -> str:
    """Return what every layer did in a training step, as a table, and what changes of the topology took.

    Args:
        layers: of ``LayerUse.to_dict``.
        topology: of ``Topology.account``.
    """
    mega = max((layer["macs_done"] for layer in layers), default=0) < 1e9
    rows = [("layer", "density", "forward, gradients", "operations done", "of dense", "ms per step")]
    for layer in layers:
        share = _percent(layer["macs_done"] / max(1, layer["macs_dense"]))
        kernels = ", ".join(dict.fromkeys(layer["kernels"]))
        done = f"{layer['macs_done'] / 1e6:,.3f} MMAC" if mega else _macs(layer["macs_done"])
        rows.append((layer["name"], f"{layer['density']:.4f}", kernels, done, share,
                     f"{1e3 * layer['seconds']:.3f}"))  # fmt: skip
    lines = [table(rows), "one step of the usual batch size, random images, times of this machine"]
    if topology["changes"]:
        each = 1e3 * topology["seconds"] / topology["changes"]
        lines.append(f"the topology changed {topology['changes']:,} times, in {topology['seconds']:.3f} s: "
                     f"{each:.2f} ms per change")  # fmt: skip
    return "\n".join(lines)


def time_dense(learner: Learner, instances: int) -> dict[str, Any]:
    """Estimate how long dense training on so many instances takes on this machine, from a few steps.

    The steps are taken at learning rate 0: at that of the run, weights drawn at random may grow without bound, which
    says nothing about the run.

    Returns:
        ``seconds``, ``None`` if there is no instance or even those steps were not finite, and ``how`` that is known.
    """
    from edgetrain.learner import Learner

    if not instances:
        return {"seconds": None, "how": "no instance was trained on or skipped yet"}

    twin = Learner(
        learner.graph, learner.profile, batch_size=learner.batch_size, threads=learner.threads,
        optimizer=replace(learner.optimizer, lr=0.0, schedule=None), loss=learner.loss,
        label_smoothing=learner.label_smoothing, memory_budget="1024GiB",
    )  # fmt: skip
    rng = np.random.default_rng(0)
    # Trained weights would do, unless the training went astray: numbers of a usual size take as long.
    weights = {n: a for n, a in twin.parameters().items() if n in learner.graph.trainable}
    twin.load_parameters({n: rng.normal(0, a[0].size ** -0.5, a.shape) for n, a in weights.items()})
    x = rng.random((learner.batch_size, *learner.graph.input_shape), np.float32)
    y = rng.integers(0, learner.graph.output_shape[0], learner.batch_size)
    try:
        seconds = _seconds_per_step(twin, x, y) / learner.batch_size * instances
    except NumericalError:
        return {"seconds": None, "how": "dense steps with random weights were not finite"}
    return {"seconds": seconds, "how": f"estimated from {_TIMED_STEPS} dense steps"}


def _seconds_per_step(learner: Learner, x: NDArray[np.float32], y: NDArray[np.int64]) -> float:
    start = 0.0
    for step in range(2 * _TIMED_STEPS):
        if step == _TIMED_STEPS:
            start = time.perf_counter()
        learner.partial_fit(x, y)
    return (time.perf_counter() - start) / _TIMED_STEPS


def _macs(count: int) -> str:
    return f"{count / 1e9:,.3f} GMAC"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
