"""Every exception that edgetrain raises on purpose.

A message names the thing, the value found, what was
expected and the remedy. The command line maps ``exit_code`` to its exit status
(see docs/architecture.md); a library user catches ``EdgetrainError``.
"""

from __future__ import annotations


class EdgetrainError(Exception):
    """Base class of all errors raised by edgetrain."""

    exit_code = 2


class UsageError(EdgetrainError):
    """An argument or option is wrong."""


class BenchmarkError(EdgetrainError):
    """A contender of the benchmark died or did not answer."""


class ProfileError(EdgetrainError):
    """A device profile is missing, malformed or inconsistent."""


class VerificationError(EdgetrainError):
    """A cross-check with PyTorch or onnxruntime disagreed."""

    exit_code = 1


class DataError(EdgetrainError):
    """A data file, an image, a label or an array handed in is bad."""

    exit_code = 3


class ModelError(EdgetrainError):
    """A model is bad or cannot be used."""

    exit_code = 3


class GraphError(ModelError):
    """A node of a graph is invalid: wrong shape, attribute or operator."""


class UnsupportedError(ModelError):
    """A model uses an operator, an attribute or a type that edgetrain lacks."""


class CheckpointError(ModelError):
    """A checkpoint is missing, damaged, or belongs to another model."""


class NumericalError(EdgetrainError):
    """A loss, a gradient or a prediction is not finite; the last good state was kept.

    Attributes:
        samples: of a prediction, which of the samples that were given have no finite outputs, counted from 0; empty
            where the parameters are to blame.
    """

    exit_code = 3
    samples: tuple[int, ...] = ()


class MemoryBudgetError(EdgetrainError):
    """The plan needs more memory than the budget allows."""

    exit_code = 4


class InterruptedRunError(EdgetrainError):
    """A run was interrupted; its state was saved."""

    exit_code = 5
