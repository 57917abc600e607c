"""What the methods of a run saved: instances, operations and time against dense training, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from edgetrain.accounting import SAVERS
from edgetrain.cli.output import duration, table
from edgetrain.layer_report import layer_report

if TYPE_CHECKING:
    from edgetrain.learner import Learner

_NAMES = {"filter": "the instance filter", "error_maps": "error pruning", "weights": "sparse weights",
          "activations": "sparse activations"}  # fmt: skip


def savings_of(
    counts: Mapping[str, int], seconds: float, whole_seconds: float | None, dense: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the account of a run.

    Args:
        counts: sums of the run, as ``history.Totals.counts`` names them, and ``instances_waiting`` for a full batch.
        seconds: training time of the run.
        whole_seconds: wall time of the run: reading, validation, checkpoints and compiling are in it, too; ``None``
            where it is unknown.
        dense: ``seconds`` that dense training takes, ``None`` if that is unknown, ``how`` it is known or why not, and
            perhaps its ``accuracy`` and ``whole_seconds``; ``itself`` of a run that is dense.
    """
    shares = {f"saved_{name}": counts[f"saved_{name}"] / max(counts["macs_dense"], 1) for name in SAVERS}
    done = counts["macs_done"] / counts["macs_dense"] if counts["macs_dense"] else 1.0
    return {
        **counts, "share_done": done, "shares": shares, "seconds": seconds,
        "whole_seconds": whole_seconds, "dense": dict(dense),
        "time_saved": 1 - seconds / dense["seconds"] if dense["seconds"] else None,
    }  # fmt: skip


def itself(seconds: float) -> dict[str, Any]:
    """Return what dense training takes, for the account of a run that is dense and took so many seconds."""
    return {"seconds": seconds, "how": "no method was used: this is the dense run", "itself": True}


def account_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a run's result that tell what was computed and skipped."""
    return {key: result[key] for key in ("layers", "topology", "savings") if key in result}


def account_text(account: Mapping[str, Any]) -> str:
    """Return what ``account_of`` found, as a person reads it."""
    texts = [layers_text(account["layers"], account.get("topology", {}))] if "layers" in account else []
    return "\n".join([*texts, savings_text(account["savings"])])


def savings_text(account: Mapping[str, Any]) -> str:
    """Return the account as a table and a line about time; of a dense run, the line says it all."""
    if account["dense"].get("itself"):
        return _dense_line(account)
    seen = max(account["instances_seen"], 1)
    rows = [("instances seen", f"{account['instances_seen']:,}", "100.0 %")]
    for name in ("kept", "uncertain"):
        number = account[f"instances_{name}"]
        rows.append((f"instances {name}", f"{number:,}", _percent(number / seen)))
    rows += [("operations of dense training", _macs(account["macs_dense"]), "100.0 %"),
             ("operations done", _macs(account["macs_done"]), _percent(account["share_done"]))]  # fmt: skip
    for name in SAVERS:
        number = account[f"saved_{name}"]
        if number:
            rows.append((f"  saved by {_NAMES[name]}", _macs(number), _percent(account["shares"][f"saved_{name}"])))
    return "\n".join([table(rows), *_not_trained_on(account), _time_line(account)])


def _not_trained_on(account: Mapping[str, Any]) -> list[str]:
    """Say of which instances the operations are, where some were kept and not trained on."""
    seen, missing = account["instances_seen"], account["instances_kept"] - account["instances_trained"]
    if not missing:
        return []
    waiting = account.get("instances_waiting")
    if waiting is None:  # older runs did not log it
        why = "but wait for a full batch, or their step failed"
    elif waiting == missing:
        why = "but wait for a full batch"
    elif waiting:
        why = f"but {waiting:,} of them wait for a full batch, and the step of the others failed"
    else:
        why = "but their step failed"
    return [f"operations of training are those of {seen - missing:,} instances: {missing:,} were kept, {why}"]


def _time_line(account: Mapping[str, Any]) -> str:
    dense, saved = account["dense"], account["time_saved"]
    took = f"training time {_times(account)}"
    if saved is None:
        return f"{took}; what dense training takes is unknown ({dense['how']})"
    accuracy = f", accuracy {dense['accuracy']:.4f}" if dense.get("accuracy") is not None else ""
    outcome = f"{_percent(saved)} of the time saved" if saved >= 0 else f"{_percent(-saved)} more time"
    return f"{took}; dense {_times(dense)}{accuracy} ({dense['how']}): {outcome}"


def _dense_line(account: Mapping[str, Any]) -> str:
    done, whole = account["macs_done"], account["macs_dense"]
    # Kernels pass over exact zeros of error maps, which changes nothing but the count.
    zeros = f", {_percent(1 - done / whole)} were exact zeros" if done < whole else ""
    share = f"operations done {_percent(account['share_done'])} ({_macs(done)}{zeros})"
    return f"{share}, training time {_times(account)}; {account['dense']['how']}"


def _times(account: Mapping[str, Any]) -> str:
    return times_text(account["seconds"], account.get("whole_seconds"))


def times_text(seconds: float, whole_seconds: float | None) -> str:
    """Return training time and, where it is known, that of the whole run."""
    return duration(seconds) + ("" if whole_seconds is None else f" (whole run {duration(whole_seconds)})")


def layers_of(learner: Learner) -> dict[str, Any]:
    """Return ``layers`` and ``topology``, as ``layers_text`` takes them; empty for a learner without sparsity."""
    if learner.sparsity is None:
        return {}
    topology = learner.topology.account()  # before the report: that takes steps
    return {"layers": [layer.to_dict() for layer in layer_report(learner)], "topology": topology}


def layers_text(layers: Sequence[Mapping[str, Any]], topology: Mapping[str, Any]) -> str:
    """Return what every layer did in a training step, as a table, and what changes of the topology took.

    Args:
        layers: of ``LayerUse.to_dict``.
        topology: of ``Topology.account``; empty of a run that did not keep it.
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
    if topology.get("changes"):
        each = 1e3 * topology["seconds"] / topology["changes"]
        lines.append(f"the topology changed {topology['changes']:,} times, in {topology['seconds']:.3f} s: "
                     f"{each:.2f} ms per change")  # fmt: skip
    return "\n".join(lines)


def _macs(count: int) -> str:
    return f"{count / 1e9:,.3f} GMAC"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
