"""Losses of samples from a network's outputs, for evaluation and instance filters; their gradients are compiled."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the logarithms of the class probabilities, float64 ``(N, K)``."""
    wide = logits.astype(np.float64)
    wide -= wide.max(1, keepdims=True)
    with np.errstate(under="ignore"):  # an application may have made it an error
        wide -= np.log(np.exp(wide).sum(1, keepdims=True))
    return wide


def probabilities_of(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the class probabilities, float32 ``(N, K)``."""
    with np.errstate(under="ignore"):  # an application may have made it an error
        probabilities: NDArray[np.float32] = np.exp(log_softmax(logits)).astype(np.float32)
    return probabilities


def sample_losses(
    outputs: NDArray[np.float32], y: NDArray[Any], loss: str, label_smoothing: float = 0.0
) -> NDArray[np.float64]:
    """Return the loss of every sample, float64 ``(N,)``.

    Args:
        outputs: float32 ``(N, ...)`` of the network.
        y: labels ``(N,)`` for ``"cross_entropy"``, targets of the outputs' shape for ``"mse"``.
        loss: ``"cross_entropy"`` or ``"mse"``.
        label_smoothing: share of the uniform distribution in the targets (cross-entropy).

    Example:
        >>> sample_losses(np.zeros((1, 2), np.float32), np.array([1]), "cross_entropy").round(3)
        array([0.693])
    """
    if loss == "mse":
        squares: NDArray[np.float64] = (outputs.astype(np.float64) - y) ** 2
        means: NDArray[np.float64] = squares.reshape(len(y), -1).mean(1)
        return means
    logs = log_softmax(outputs)
    chosen: NDArray[np.float64] = -(1 - label_smoothing) * logs[np.arange(len(y)), y]
    if label_smoothing:
        chosen -= label_smoothing * logs.mean(1)
    return chosen
