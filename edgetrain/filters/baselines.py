"""Filters to compare with: by the true loss, and by chance."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

from edgetrain.filters.base import Choice, Floats, Images, InstanceFilter, Judge, Labels, Selector


@dataclass(frozen=True)
class SelectiveBackprop(InstanceFilter):
    """Keep the instances with the largest losses, after a forward pass of the network over all of them.

    Jiang et al., "Accelerating Deep Learning by Focusing on the Biggest Losers", 2019, section 3: an instance whose
    loss is at quantile ``u`` of the recent losses is kept with probability ``u ** beta``, and ``beta`` is
    ``1 / rate - 1``, whose mean is the rate; equal losses share the middle of their quantiles. ``rule="top"`` keeps
    exactly those above the quantile instead.

    The forward pass of everything is counted; it limits what can be saved to about two thirds.

    Attributes:
        rate, start: as ``InstanceFilter``.
        rule: "quantile" or "top".

    Raises:
        UsageError: a number out of range, or an unknown rule.

    Example:
        >>> SelectiveBackprop(rate=0.5).rule
        'quantile'
    """

    rule: str = "quantile"

    name: ClassVar[str] = "selective"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.limits.require("rule", self.rule in ("quantile", "top"), "'quantile' or 'top'")

    def selector(self, learner: Any, judge: Judge) -> Selector:
        """Return what decides for one learner."""
        return _ByLoss(self, learner.seed, judge)


class _ByLoss(Selector):
    settings: SelectiveBackprop

    def __init__(self, settings: SelectiveBackprop, seed: int, judge: Judge) -> None:
        super().__init__(settings, seed)
        self._judge = judge

    def decide(self, x: Images, y: Labels, losses: Floats | None) -> Choice:
        """Compare the losses with recent ones."""
        macs = 0
        if losses is None:
            losses, macs = self._judge.losses(x, y), len(y) * self._judge.executed()
        if self.settings.rule == "top":
            # Equal losses (all zero, say) are told apart by chance, else all of them would be kept.
            probabilities = self.share.probabilities(losses + 1e-9 * self.rng.random(len(y)), math.inf)
        else:
            self.share.remember(losses)
            probabilities = self.share.quantiles(losses) ** (1 / self.share.level(len(losses)) - 1)
        keep = self.rng.random(len(y)) < probabilities
        self.share.count(keep)
        return Choice(keep, macs)


@dataclass(frozen=True)
class RandomFilter(InstanceFilter):
    """Keep instances by chance, each with probability ``rate``: what every other filter must beat.

    Attributes:
        rate, start: as ``InstanceFilter``.

    Example:
        >>> RandomFilter(rate=0.5)
        RandomFilter(rate=0.5, start=0)
    """

    name: ClassVar[str] = "random"

    def selector(self, learner: Any, judge: Judge) -> Selector:
        """Return what decides for one learner."""
        return _ByChance(self, learner.seed)


class _ByChance(Selector):
    def decide(self, x: Images, y: Labels, losses: Floats | None) -> Choice:
        """Draw."""
        return Choice(self.rng.random(len(y)) < self.settings.rate, 0)
