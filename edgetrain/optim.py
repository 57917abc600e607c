"""Optimizers and learning-rate schedules: what to do, as data. The arithmetic is in ``kernels/update.py``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from edgetrain.errors import UsageError
from edgetrain.kernels.codes import (
    ADAM_CORRECTION,
    ADAM_LR,
    AVERAGING,
    BETA1,
    BETA2,
    CLIP_NORM,
    DECOUPLED,
    EPSILON,
    GRADIENT_SCALE,
    LR,
    MOMENTUM,
    NESTEROV,
    REST1,
    REST2,
    WEIGHT_DECAY,
)
from edgetrain.settings import Limits, take_numbers

KINDS = ("constant", "step", "cosine", "one_cycle")


@dataclass(frozen=True)
class Schedule:
    """Learning rate over time, as a factor of the optimizer's ``lr``.

    Attributes:
        kind: ``constant``; ``step``: times ``gamma`` at every share of training in ``milestones``;
            ``cosine``: half a cosine from 1 to ``final`` (Loshchilov and Hutter 2017, equation 5);
            ``one_cycle``: cosine up from 1/25 in the first ``warmup`` (0.3 if 0), then down to ``final``
            (Smith and Topin 2018, as in ``torch.optim.lr_scheduler.OneCycleLR``).
        warmup: share of training in which the rate rises linearly from almost 0 (not for ``one_cycle``).
        total_steps: length of training in steps; ``None`` lets ``fit`` fill it in.
        final: factor at the end, of ``cosine`` and ``one_cycle``.
        milestones, gamma: of ``step``.

    Raises:
        UsageError: unknown kind, or a number out of range.

    Example:
        >>> schedule = Schedule("cosine", total_steps=100)
        >>> schedule.factor(0), round(schedule.factor(50), 3), round(schedule.factor(100), 3)
        (1.0, 0.5, 0.0)
    """

    kind: str = "constant"
    warmup: float = 0.0
    total_steps: int | None = None
    final: float = 0.0
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1

    def __post_init__(self) -> None:
        if not isinstance(self.milestones, Iterable):
            raise UsageError(f"schedule: milestones={self.milestones!r}, expected shares of training from 0 to 1")
        object.__setattr__(self, "milestones", tuple(self.milestones))
        take_numbers(self, "schedule")
        if self.kind not in KINDS:
            raise UsageError(f"schedule '{self.kind}' is unknown; expected one of {', '.join(KINDS)}")
        limits, steps = Limits(self, "schedule"), self.total_steps
        limits.number("warmup", lambda share: 0 <= share < 1, "a share of training, at least 0 and below 1")
        known = steps is None or (isinstance(steps, int) and steps >= 1)
        limits.require("total_steps", known, "an integer of at least 1, or None")
        shares = all(isinstance(value, int | float) and 0 <= value <= 1 for value in self.milestones)
        limits.require("milestones", shares, "shares of training from 0 to 1")
        if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in (self.final, self.gamma)):
            raise UsageError(f"schedule: final={self.final!r}, gamma={self.gamma!r}, expected numbers of at least 0")

    def factor(self, step: int) -> float:
        """Return the factor for optimizer step ``step`` (from 0).

        Raises:
            UsageError: the schedule needs ``total_steps`` and has none.
        """
        if self.total_steps is None:
            if self.kind == "constant" and self.warmup == 0:
                return 1.0
            raise UsageError(f"schedule '{self.kind}' needs total_steps; give it, or train with fit")
        done = min(1.0, step / max(1, self.total_steps))
        if self.kind == "one_cycle":
            return self._one_cycle(step)
        if done < self.warmup:
            return (step + 1) / (self.warmup * self.total_steps + 1)
        return self._after_warmup(done)

    def _after_warmup(self, done: float) -> float:
        if self.kind == "step":
            return self.gamma ** sum(done >= m for m in self.milestones)
        if self.kind == "cosine":
            return _cosine(1.0, self.final, (done - self.warmup) / (1 - self.warmup))
        return 1.0

    def _one_cycle(self, step: int) -> float:
        assert self.total_steps is not None
        last = self.total_steps - 1
        top = min(max(0.0, (self.warmup or 0.3) * self.total_steps - 1), last)
        if step < top:
            return _cosine(0.04, 1.0, step / top)
        return _cosine(1.0, self.final, min(1.0, (step - top) / (last - top)) if last > top else 0.0)


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


# Of averaging: the latest 1 / (_ETA + 1) of all steps count most. With 0, the mean of all steps, 51 steps from scratch
# gave 25 % where the last parameters gave 43 %; 4, 9 and 19 differ by less than a point in streams.
_ETA = 9.0


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share.

    Attributes:
        lr: learning rate.
        weight_decay: L2 penalty (SGD, Adam) or decoupled decay (AdamW).
        decay_bias_and_norm: whether biases and BatchNormalization's scale and bias decay too.
        clip_norm: gradients are scaled down to this L2 norm over all parameters; ``None`` for no clipping.
        schedule: learning rate over time.
        averaging: weight of the past in an exponential average of the parameters, running statistics included, which
            predictions, evaluations and exports then use; training goes on from the present ones. 0.99 is the mean of
            about the latest hundred steps, or of the latest tenth of all steps as long as that is less; 0: no average.
            It takes the place of a decaying rate where the end is unknown, as in streams (docs/streams.md); one more
            number per parameter. Source: Shamir and Zhang, "Stochastic Gradient Descent for Non-smooth Optimization",
            ICML 2013, section 4 (polynomial-decay averaging, eta = 9).

    Raises:
        UsageError: a number out of range.
    """

    lr: float = 0.05
    weight_decay: float = 0.0
    decay_bias_and_norm: bool = True
    clip_norm: float | None = None
    schedule: Schedule | None = None
    averaging: float = 0.0

    kernel: ClassVar[str]
    name: ClassVar[str]

    def __post_init__(self) -> None:
        take_numbers(self, self.name)
        shared = (("lr", 0.0, math.inf), ("weight_decay", 0.0, math.inf), ("averaging", 0.0, 1.0))
        limits = Limits(self, self.name)
        for key, low, high in (*shared, *self._ranges()):
            value = getattr(self, key)
            within = isinstance(value, int | float) and low <= value < high
            limits.require(key, within, f"a number from {low} to below {high}")
        if self.clip_norm is not None:
            limits.number("clip_norm", lambda norm: norm > 0, "a number above 0, or None")
        limits.require("schedule", isinstance(self.schedule, Schedule | None), "a Schedule, or None")

    def _ranges(self) -> tuple[tuple[str, float, float], ...]:
        return ()

    @property
    def moments(self) -> tuple[str, ...]:
        """Names of the arrays kept per parameter."""
        raise NotImplementedError

    @property
    def kept(self) -> tuple[str, tuple[str, ...], bool, bool]:
        """What decides how its state lies in memory: optimizers with the same may take each other's place."""
        return self.kernel, self.moments, self.decay_bias_and_norm, self.averaging > 0

    def fill(self, settings: NDArray[np.float32], step: int) -> None:
        """Write the numbers of step ``step`` (from 0) for the update kernel."""
        raise NotImplementedError

    def lr_at(self, step: int) -> float:
        """Return the learning rate of step ``step`` (from 0)."""
        return self.lr * (self.schedule.factor(step) if self.schedule else 1.0)

    def _fill_shared(self, settings: NDArray[np.float32], step: int) -> None:
        settings[:] = 0
        settings[LR], settings[WEIGHT_DECAY] = self.lr_at(step), self.weight_decay
        settings[CLIP_NORM], settings[GRADIENT_SCALE] = self.clip_norm or 0.0, 1.0
        settings[AVERAGING] = max(1.0 - self.averaging, (_ETA + 1) / (step + _ETA + 1))

    def with_total_steps(self, steps: int) -> Self:
        """Return the optimizer with the length of training filled in where the schedule lacks it."""
        if self.schedule is None or self.schedule.total_steps is not None:
            return self
        return replace(self, schedule=replace(self.schedule, total_steps=steps))

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain data, with the optimizer's name under ``"name"``."""
        return {"name": self.name, **asdict(self)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Optimizer:
        """Return the optimizer of ``to_dict``.

        Raises:
            UsageError: unknown optimizer or setting.
        """
        settings = dict(data)
        kind = OPTIMIZERS.get(str(settings.pop("name", "")).lower())
        if kind is None:
            raise UsageError(f"optimizer '{data.get('name')}' is unknown; expected one of {', '.join(OPTIMIZERS)}")
        unknown = set(settings) - {f.name for f in fields(kind)}
        if unknown:
            raise UsageError(f"optimizer {kind.name}: unknown settings {sorted(unknown)}")
        if isinstance(settings.get("schedule"), Mapping):
            odd = set(settings["schedule"]) - {f.name for f in fields(Schedule)}
            if odd:
                raise UsageError(f"schedule of {kind.name}: unknown settings {sorted(odd)}")
            settings["schedule"] = Schedule(**settings["schedule"])
        return kind(**settings)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum, as ``torch.optim.SGD``.

    Attributes:
        momentum: share of the velocity that stays from step to step, below 1; 0 for no velocity.
        nesterov: look ahead by the velocity (Nesterov's form); needs a momentum.

    Example:
        >>> SGD(lr=0.1, momentum=0.9, nesterov=True).lr_at(0)
        0.1
    """

    momentum: float = 0.0
    nesterov: bool = False

    kernel: ClassVar[str] = "sgd"
    name: ClassVar[str] = "sgd"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov and not self.momentum:
            raise UsageError(
                "sgd: nesterov needs a momentum above 0; give momentum=0.9 (--momentum 0.9) or nesterov=False "
                "(--no-nesterov)"
            )

    def _ranges(self) -> tuple[tuple[str, float, float], ...]:
        return (("momentum", 0.0, 1.0),)

    @property
    def moments(self) -> tuple[str, ...]:
        """One velocity, none without momentum."""
        return ("velocity",) if self.momentum else ()

    def fill(self, settings: NDArray[np.float32], step: int) -> None:
        """Write learning rate, decay, momentum."""
        self._fill_shared(settings, step)
        settings[MOMENTUM], settings[NESTEROV] = self.momentum, self.nesterov


@dataclass(frozen=True)
class Adam(Optimizer):
    """Adam (Kingma and Ba 2015, algorithm 1), as ``torch.optim.Adam``: weight decay is added to the gradient.

    Attributes:
        lr: learning rate, 0.001 by default.
        beta1, beta2: share of the first and second moment that stays from step to step, below 1.
        epsilon: added to the root of the second moment.
    """

    lr: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    kernel: ClassVar[str] = "adam"
    name: ClassVar[str] = "adam"
    decoupled: ClassVar[bool] = False

    def _ranges(self) -> tuple[tuple[str, float, float], ...]:
        return (("beta1", 0.0, 1.0), ("beta2", 0.0, 1.0), ("epsilon", 0.0, math.inf))

    @property
    def moments(self) -> tuple[str, ...]:
        """Two."""
        return ("first_moment", "second_moment")

    def fill(self, settings: NDArray[np.float32], step: int) -> None:
        """Write rates corrected for the moments' start at zero."""
        self._fill_shared(settings, step)
        settings[BETA1], settings[BETA2], settings[EPSILON] = self.beta1, self.beta2, self.epsilon
        settings[REST1], settings[REST2] = 1 - self.beta1, 1 - self.beta2
        settings[ADAM_LR] = self.lr_at(step) / (1 - self.beta1 ** (step + 1))
        settings[ADAM_CORRECTION] = 1 / math.sqrt(1 - self.beta2 ** (step + 1))
        settings[DECOUPLED] = self.decoupled


@dataclass(frozen=True)
class AdamW(Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2), as ``torch.optim.AdamW``.

    ``weight_decay`` is 0.01 by default.
    """

    weight_decay: float = 1e-2

    name: ClassVar[str] = "adamw"
    decoupled: ClassVar[bool] = True


OPTIMIZERS: dict[str, type[Optimizer]] = {"sgd": SGD, "adam": Adam, "adamw": AdamW}


def from_recipe(recipe: Any) -> Optimizer:
    """Return the optimizer that a recipe describes; ``fit`` fills in the schedule's length.

    Args:
        recipe: anything with the fields of ``devices.Hyperparameters``.

    Raises:
        UsageError: unknown optimizer or schedule.
    """
    names = ("lr", "weight_decay", "decay_bias_and_norm", "clip_norm", "averaging")
    shared = {name: getattr(recipe, name) for name in names}
    own = {name: getattr(recipe, name) for name in ("momentum", "nesterov")} if recipe.optimizer == "sgd" else {}
    schedule = asdict(Schedule(recipe.schedule, recipe.warmup_fraction))
    return Optimizer.from_dict({"name": recipe.optimizer, "schedule": schedule, **shared, **own})
