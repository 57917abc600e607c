"""A pattern that is chosen once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from edgetrain.sparsity.policy import CompactPolicy


@dataclass(frozen=True)
class StaticSparse(CompactPolicy):
    """Trains the weights of a pattern that is chosen before the first step and never changes.

    The baseline of dynamic sparse training ("static" in Evci et al., ICML 2020, section 4).

    Example:
        >>> StaticSparse(weights=0.8).distribution
        'erk'
    """

    name: ClassVar[str] = "static"
