"""Measure how much resident memory training takes and what the plan says; a helper of tests.

Run as ``python memory_growth.py MODEL BATCH_SIZE``. It is a process of its own, so that nothing else of the
tests is measured.
"""

from __future__ import annotations

import ctypes
import gc
import json
import re
import sys
from pathlib import Path

import numpy as np

from edgetrain.catalog import build_model
from edgetrain.executor import compile_kernels
from edgetrain.learner import Learner


def resident(kind: str) -> int:
    """Return ``VmRSS`` (now) or ``VmHWM`` (highest so far) in bytes."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def main(name: str, batch_size: int) -> None:
    """Train three steps and write the growth as JSON."""
    graph = build_model(name)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch_size, *graph.input_shape), np.float32)
    y = rng.integers(0, graph.output_shape[0], batch_size)
    compile_kernels(Learner(graph, batch_size=batch_size, memory_budget="64GiB").training_plan().kernels)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that the first learner gave back must not hide what the second one takes
    Path("/proc/self/clear_refs").write_text("5")  # the highest value starts again from the present one
    before = resident("VmRSS")
    learner = Learner(graph, batch_size=batch_size, memory_budget="64GiB")
    losses = [learner.partial_fit(x, y).loss for _ in range(3)]
    grown = resident("VmHWM") - before
    sys.stdout.write(json.dumps({"grown": grown, "planned": learner.memory_plan().peak_bytes, "losses": losses}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
