"""Instance filters: which samples are worth a training step.

A filter is described by a frozen record (``EarlyInstanceFilter``, ``SelectiveBackprop``, ``RandomFilter``); its
``selector`` method makes what decides, one per learner, with the state that a checkpoint keeps.
"""

from __future__ import annotations

from edgetrain.filters.base import Choice, InstanceFilter, Judge, Lesson, Selector
from edgetrain.filters.baselines import RandomFilter, SelectiveBackprop
from edgetrain.filters.early import EarlyInstanceFilter

__all__ = [
    "Choice",
    "EarlyInstanceFilter",
    "InstanceFilter",
    "Judge",
    "Lesson",
    "RandomFilter",
    "SelectiveBackprop",
    "Selector",
]
