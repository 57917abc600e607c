"""The lines that a streaming run prints: one for every window, and the last one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from edgetrain.cli.output import count
from edgetrain.history import EpochRecord

if TYPE_CHECKING:
    from edgetrain.stream import InstanceStream


def stream_line(stream: InstanceStream, length: int | None, record: EpochRecord, predict: bool) -> str:
    """Return a line about a window of a stream of so many instances, ``None`` when that is unknown."""
    parts = [f"{stream.position:,}" if length is None else f"{stream.position:,}/{length:,}"]
    if math.isnan(record.loss):
        parts.append(f"no step, {_waiting(stream.waiting)}")
    else:
        what = "accuracy before learning" if predict else "accuracy of those trained on"
        parts += [f"loss {record.loss:.4f}", f"{what} {record.accuracy:.4f}"]
    parts.append(f"kept {record.instances_kept / max(record.instances_seen, 1):.0%}")
    if record.macs_dense:
        parts.append(f"computed {record.macs_done / record.macs_dense:.0%}")
    return "  ".join([*parts, f"{record.images_per_second:,.0f} images/s"])


def _waiting(number: int) -> str:
    return f"{count(number, 'instance')} waiting for a full micro-batch"


def last_line(result: Mapping[str, Any]) -> str:
    """Return the last line of a streaming run, of its result."""
    parts = [f"{count(result['instances'], 'instance')}, {result['mode']}"]
    if result["mode"] == "predict and train":
        running, recent = result["running_accuracy"], result["recent_accuracy"]
        parts.append(f"accuracy before learning {running:.4f}, of late {recent:.4f}")
    if result["accuracy"] is not None:
        parts.append(f"test accuracy {result['accuracy']:.4f}")
    if result["instances_waiting"]:
        parts.append(_waiting(result["instances_waiting"]))
    if not result["steps"]:
        parts[-1] = (
            f"nothing was learned yet: {count(result['instances_waiting'], 'instance')} kept, a micro-batch takes "
            f"{result['batch_size']}; use a smaller --batch-size, or when there are more instances go on with: "
            f"edgetrain resume {result['run']}"
        )
    return "; ".join([*parts, f"model: {result['files']['model']}, run: {result['run']}"])
