"""Which number was the first that is not finite, and what to do about it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import NumericalError
from edgetrain.executor import Executor
from edgetrain.ops import get_op


def explain_step(executor: Executor, count: int, step: int) -> NumericalError:
    """Run a training step again node by node; return an error that names the first that gives such a number.

    Args:
        executor: of the step, with its batch in place.
        count: samples of the batch.
        step: its number, counted from 1, for the message.
    """
    graph, where = executor.plan.graph, "the gradient norm"
    for position in executor.step_through():
        node = graph.nodes[position]
        numbers = [v for i, v in enumerate(node.outputs) if i not in get_op(node.op_type).opaque]
        values = [v for v in numbers if executor.plan.buffer(v.name) in executor.plan.offsets]
        if any(not np.isfinite(executor.value(v, count)).all() for v in values):
            where = f"node '{node.name}' ({node.op_type})"
            break
    return NumericalError(
        f"step {step}: loss or gradients are not finite, first at {where}; the parameters are those before this step. "
        "Lower the learning rate, clip gradients (clip_norm) or check the data"
    )


def explain_outputs(name: str, outputs: NDArray[np.float32], parameters: Mapping[str, NDArray[Any]]) -> NumericalError:
    """Return an error that tells whether weights or inputs are to blame.

    Args:
        name: of the network, for the message.
        outputs: float32 ``(N, ...)``, not all of them finite.
        parameters: of the network, by name.
    """
    samples = np.flatnonzero(~np.isfinite(outputs.reshape(len(outputs), -1)).all(1)).tolist()
    broken = next((key for key, array in parameters.items() if not np.isfinite(array).all()), None)
    if broken is not None:
        reason = f"'{broken}' holds NaN or infinite numbers; load an earlier checkpoint or other weights"
    else:
        reason = "numbers on the way are beyond float32; scale the inputs to about -1 to 1, or load smaller weights"
    error = NumericalError(f"the outputs of '{name}' are not finite (sample {samples[0]}): {reason}")
    error.samples = () if broken is not None else tuple(samples)
    return error
