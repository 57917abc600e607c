"""Optimizers step by step against PyTorch's, schedules against PyTorch's, and what they refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

import edgetrain as et
from edgetrain import optim
from edgetrain.errors import UsageError
from edgetrain.graph import Graph
from edgetrain.optim import OPTIMIZERS, Optimizer, Schedule

torch = pytest.importorskip("torch", reason="PyTorch is the judge here")

STEPS = 10

# --- steps ------------------------------------------------------------------------------------------------------------


def network() -> Graph:
    """Dense, batch normalisation and dense: weights that decay, biases and scales that may not."""
    rng = np.random.default_rng(11)
    graph = Graph("small", input_shape=(5,))
    first = [graph.parameter("first.weight", rng.normal(size=(7, 5))), graph.parameter("first.bias", np.zeros(7))]
    x = graph.add("Gemm", ["input", *first], transB=1)
    x = graph.add("Reshape", [x], shape=(7, 1, 1))
    norm = [graph.parameter("norm.weight", np.ones(7)), graph.parameter("norm.bias", np.full(7, 0.5)),
            graph.parameter("mean", np.zeros(7), False), graph.parameter("variance", np.ones(7), False)]  # fmt: skip
    x = graph.add("Flatten", [graph.add("BatchNormalization", [x, *norm])])
    last = [graph.parameter("last.weight", rng.normal(size=(3, 7))), graph.parameter("last.bias", np.zeros(3))]
    graph.set_outputs([graph.add("Gemm", [graph.add("Tanh", [x]), *last], transB=1)])
    return graph


def _sgd(groups, o):
    return torch.optim.SGD(groups, lr=o.lr, momentum=o.momentum, nesterov=o.nesterov)


def _adam(groups, o):
    return torch.optim.Adam(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon)


def _adamw(groups, o):
    return torch.optim.AdamW(groups, lr=o.lr, betas=(o.beta1, o.beta2), eps=o.epsilon)


TWINS = {"sgd": _sgd, "adam": _adam, "adamw": _adamw}

CASES = {
    "sgd": et.SGD(lr=0.1),
    "sgd, momentum": et.SGD(lr=0.1, momentum=0.9),
    "sgd, nesterov": et.SGD(lr=0.1, momentum=0.9, nesterov=True),
    "sgd, decay": et.SGD(lr=0.1, momentum=0.9, weight_decay=0.05),
    "sgd, nesterov, decay of weights only": et.SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05,
                                                   decay_bias_and_norm=False),
    "sgd, no momentum, decay of weights only": et.SGD(lr=0.1, weight_decay=0.05, decay_bias_and_norm=False),
    "sgd, clipped": et.SGD(lr=0.1, momentum=0.9, clip_norm=0.1),
    "sgd, clip norm never reached": et.SGD(lr=0.1, momentum=0.9, clip_norm=1e6),
    "sgd, clipped, decay": et.SGD(lr=0.1, momentum=0.9, weight_decay=0.05, clip_norm=0.1),
    "sgd, cosine": et.SGD(lr=0.1, momentum=0.9, schedule=Schedule("cosine", total_steps=STEPS)),
    "adam": et.Adam(lr=0.01),
    "adam, other betas": et.Adam(lr=0.01, beta1=0.5, beta2=0.9, epsilon=1e-3),
    "adam, decay": et.Adam(lr=0.01, weight_decay=0.1),
    "adam, decay of weights only, clipped": et.Adam(lr=0.01, weight_decay=0.1, decay_bias_and_norm=False,
                                                    clip_norm=0.1),
    "adamw": et.AdamW(lr=0.01),
    "adamw, strong decay": et.AdamW(lr=0.01, weight_decay=0.5),
    "adamw, decay of weights only": et.AdamW(lr=0.01, weight_decay=0.5, decay_bias_and_norm=False),
    "adamw, one cycle": et.AdamW(lr=0.01, schedule=Schedule("one_cycle", total_steps=STEPS)),
}  # fmt: skip


class Twin:
    """The same optimizer in float64 PyTorch, fed with gradients from outside."""

    def __init__(self, optimizer: Optimizer, arrays: dict[str, np.ndarray]) -> None:
        self._settings = optimizer
        self.tensors = {name: torch.tensor(a, dtype=torch.float64, requires_grad=True) for name, a in arrays.items()}
        groups = [
            {"params": [t], "weight_decay": optimizer.weight_decay * (optimizer.decay_bias_and_norm or t.ndim > 1)}
            for t in self.tensors.values()
        ]
        self._optimizer = TWINS[optimizer.name](groups, optimizer)

    def step(self, number: int, grads: dict[str, np.ndarray]) -> None:
        for name, tensor in self.tensors.items():
            tensor.grad = torch.tensor(grads[name], dtype=torch.float64)
        if self._settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(list(self.tensors.values()), self._settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.lr_at(number)
        self._optimizer.step()


def distance(learner: et.Learner, twin: Twin, start: dict[str, np.ndarray]) -> float:
    """Return the largest difference relative to the largest entry, and to the way that was gone."""
    found = learner.parameters()
    errors = []
    for name, tensor in twin.tensors.items():
        wanted = tensor.detach().numpy()
        scale = max(np.abs(wanted).max(), np.abs(wanted - start[name]).max())
        errors.append(np.abs(found[name] - wanted).max() / scale)
    return max(errors)


@pytest.mark.parametrize("optimizer", CASES.values(), ids=CASES)
def test_ten_steps_are_those_of_pytorch(optimizer):
    learner = et.Learner(network(), batch_size=6, threads=1, optimizer=optimizer)
    start = {name: array for name, array in learner.parameters().items() if name in learner.graph.trainable}
    twin = Twin(optimizer, start)
    rng = np.random.default_rng(5)
    errors = []
    for number in range(STEPS):
        x, y = rng.standard_normal((6, 5), np.float32), rng.integers(0, 3, 6)
        twin.step(number, learner.gradients(x, y))
        learner.partial_fit(x, y)
        errors.append(distance(learner, twin, start))
    assert max(errors) < 1e-6, errors


@pytest.mark.parametrize("optimizer", [et.Adam(lr=1e-3), et.AdamW(lr=1e-3, weight_decay=0.0)], ids=["adam", "adamw"])
def test_the_way_gone_by_adam_is_exact_too(optimizer):
    # From zero weights nothing but the steps is compared: an error of 1 - beta2 would show.
    graph = Graph("zero", input_shape=(4,))
    graph.set_outputs([graph.add("Gemm", ["input", graph.parameter("w", np.zeros((2, 4)))], transB=1)])
    learner = et.Learner(graph, batch_size=4, threads=1, optimizer=optimizer)
    twin = Twin(optimizer, learner.parameters())
    rng = np.random.default_rng(2)
    for number in range(STEPS):
        x, y = rng.standard_normal((4, 4), np.float32), rng.integers(0, 2, 4)
        twin.step(number, learner.gradients(x, y))
        learner.partial_fit(x, y)
    wanted = twin.tensors["w"].detach().numpy()
    assert np.abs(learner.parameters()["w"] - wanted).max() < 1e-6 * np.abs(wanted).max()


def test_a_frozen_array_is_not_touched():
    frozen = network()
    frozen.trainable.discard("first.weight")
    learner = et.Learner(frozen, batch_size=6, threads=1, optimizer=et.SGD(lr=0.1, weight_decay=0.5))
    before = learner.parameters()["first.weight"]
    learner.partial_fit(np.ones((6, 5), np.float32), np.arange(6) % 3)
    np.testing.assert_array_equal(learner.parameters()["first.weight"], before)


# --- schedules --------------------------------------------------------------------------------------------------------


def torch_rates(make, steps: int) -> list[float]:
    """Return the learning rates of a PyTorch scheduler over an optimizer with lr 1."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


lrs = torch.optim.lr_scheduler
SCHEDULES = {
    "cosine": (Schedule("cosine", total_steps=37), lambda o: lrs.CosineAnnealingLR(o, 37)),
    "cosine to a floor": (Schedule("cosine", total_steps=20, final=0.1),
                          lambda o: lrs.CosineAnnealingLR(o, 20, eta_min=0.1)),
    "step": (Schedule("step", total_steps=40), lambda o: lrs.MultiStepLR(o, [20, 30])),
    "step, own milestones": (Schedule("step", total_steps=10, milestones=(0.3, 0.7), gamma=0.5),
                             lambda o: lrs.MultiStepLR(o, [3, 7], gamma=0.5)),
    "one cycle": (Schedule("one_cycle", total_steps=50, final=0.04 / 1e4), lambda o: lrs.OneCycleLR(o, 1.0, 50)),
    "one cycle, early peak": (Schedule("one_cycle", total_steps=23, warmup=0.1, final=0.04 / 100),
                              lambda o: lrs.OneCycleLR(o, 1.0, 23, pct_start=0.1, final_div_factor=100)),
}  # fmt: skip


@pytest.mark.parametrize(("schedule", "twin"), SCHEDULES.values(), ids=SCHEDULES)
def test_a_schedule_is_that_of_pytorch(schedule, twin):
    steps = schedule.total_steps
    factors = [schedule.factor(step) for step in range(steps)]
    np.testing.assert_allclose(factors, torch_rates(twin, steps), rtol=1e-9, atol=1e-12)


KINDS = pytest.mark.parametrize("kind", optim.KINDS)


@KINDS
def test_a_schedule_stays_at_its_end(kind):
    schedule = Schedule(kind, total_steps=10, final=0.25)
    assert schedule.factor(10) == schedule.factor(1000)


@KINDS
@pytest.mark.parametrize("total", [1, 2, 3])
def test_very_short_training_has_a_rate(kind, total):
    factors = [Schedule(kind, warmup=0.5, total_steps=total).factor(i) for i in range(total)]
    assert all(0 <= factor <= 1 for factor in factors)
    assert max(factors) > 0


@pytest.mark.parametrize("kind", ["constant", "step", "cosine"])
def test_warm_up_rises_in_a_straight_line_to_the_full_rate(kind):
    factors = [Schedule(kind, warmup=0.2, total_steps=50).factor(i) for i in range(11)]
    np.testing.assert_allclose(factors, [(i + 1) / 11 for i in range(11)])


def test_after_warm_up_the_cosine_spans_the_rest():
    schedule = Schedule("cosine", warmup=0.2, total_steps=100)
    assert (schedule.factor(20), schedule.factor(60), schedule.factor(100)) == pytest.approx((1.0, 0.5, 0.0))


def test_a_constant_rate_needs_no_length():
    assert Schedule().factor(10**9) == 1


@pytest.mark.parametrize(
    "schedule", [Schedule("step"), Schedule("cosine"), Schedule("one_cycle"), Schedule(warmup=0.1)], ids=str
)
def test_a_schedule_without_length_says_what_to_do(schedule):
    with pytest.raises(UsageError, match="needs total_steps; give it, or train with fit"):
        schedule.factor(0)


def test_the_length_is_filled_in_only_where_it_lacks():
    assert et.SGD().with_total_steps(7) == et.SGD()
    assert et.SGD(schedule=Schedule("cosine")).with_total_steps(7).schedule.total_steps == 7
    fixed = et.SGD(schedule=Schedule("cosine", total_steps=3))
    assert fixed.with_total_steps(7) is fixed


# --- errors -----------------------------------------------------------------------------------------------------------

WRONG = {
    "negative rate": (lambda: et.SGD(lr=-1), "sgd: lr=-1, expected a number from 0.0"),
    "rate that is not a number": (lambda: et.Adam(lr=float("nan")), "adam: lr=nan, expected"),
    "infinite rate": (lambda: et.Adam(lr=float("inf")), "adam: lr=inf, expected"),
    "rate as text": (lambda: et.SGD(lr="0.1"), "sgd: lr='0.1', expected a number"),
    "momentum of one": (lambda: et.SGD(momentum=1.0), "sgd: momentum=1.0, expected a number from 0.0 to below 1.0"),
    "beta of one": (lambda: et.Adam(beta2=1.0), "adam: beta2=1.0, expected"),
    "negative decay": (lambda: et.AdamW(weight_decay=-0.1), "adamw: weight_decay=-0.1, expected"),
    "clip norm of zero": (lambda: et.SGD(clip_norm=0.0), "sgd: clip_norm=0.0, expected a number above 0, or None"),
    "nesterov alone": (lambda: et.SGD(nesterov=True), "nesterov needs a momentum above 0"),
    "schedule as text": (lambda: et.SGD(schedule="cosine"), "sgd: schedule='cosine', expected a Schedule"),
    "unknown schedule": (lambda: Schedule("linear"), "schedule 'linear' is unknown; expected one of constant, step"),
    "clip norm as text": (lambda: et.SGD(clip_norm="1"), "sgd: clip_norm='1', expected a number above 0, or None"),
    "warm-up as text": (lambda: Schedule(warmup="x"), "warmup='x', expected a share"),
    "end as text": (lambda: Schedule(final="x"), "final='x', gamma=0.1, expected numbers of at least 0"),
    "warm-up all the time": (lambda: Schedule(warmup=1.0), "warmup=1.0, expected a share"),
    "no steps": (lambda: Schedule(total_steps=0), "total_steps=0, expected an integer of at least 1"),
    "negative end": (lambda: Schedule(final=-1), "final=-1"),
    "negative factor of steps": (lambda: Schedule("step", gamma=-0.1), "gamma=-0.1, expected numbers of at least 0"),
    "negative warm-up": (lambda: Schedule(warmup=-0.1), "warmup=-0.1, expected a share"),
    "milestone before the beginning": (lambda: Schedule("step", milestones=(-0.1,)), r"milestones=\(-0.1,\), expected"),
    "milestone behind the end": (lambda: Schedule("step", milestones=(2.0,)), r"milestones=\(2.0,\), expected shares"),
    "unknown optimizer": (lambda: Optimizer.from_dict({"name": "lion"}),
                          "'lion' is unknown; expected one of sgd, adam, adamw"),
    "no name": (lambda: Optimizer.from_dict({"lr": 1}), "optimizer 'None' is unknown"),
    "unknown setting": (lambda: Optimizer.from_dict({"name": "sgd", "rate": 1}), r"sgd: unknown settings \['rate'\]"),
    "unknown setting of the schedule": (lambda: Optimizer.from_dict({"name": "sgd", "schedule": {"sort": "step"}}),
                                        r"schedule of sgd: unknown settings \['sort'\]"),
}  # fmt: skip


@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_are_refused(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# --- plain data -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", CASES.values(), ids=CASES)
def test_settings_survive_json(optimizer):
    assert Optimizer.from_dict(json.loads(json.dumps(optimizer.to_dict()))) == optimizer


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_alone_gives_the_defaults(name):
    assert Optimizer.from_dict({"name": name.upper()}) == OPTIMIZERS[name]()
