"""Cross-check with PyTorch: the same graph, weights and batches in float64.

The judge is ``torch_network.TorchNetwork``, which rebuilds the graph out of
``torch.nn.functional``. PyTorch is imported when the first check runs.

**Scale of an error.** A gradient's error is relative to the largest entry of that
gradient in float64. A gradient that is zero in exact arithmetic (a bias in front of a
batch normalisation) leaves rounding noise in float64 too; its error is relative to the
largest gradient entry of the same layer, or of the network when the whole layer is zero.

**Fresh batch normalisations.** Scales of 1 and biases of 0 hide mistakes (channels swapped,
a bias forgotten), and make the gradient of a scale in front of a depthwise convolution
with its own batch normalisation vanish up to epsilon, where float32 has no digits left.
Scales and biases that are all equal are therefore moved by up to 0.5 at random.

**Sensitive networks.** The 20 steps run freely on both sides. Where they end apart, a second
float64 run that starts one float32 rounding away tells whether the steps amplify rounding
beyond the tolerance (deep networks with small batches do, in any float32 program). If so,
the steps are repeated with PyTorch taking each gradient at edgetrain's weights and adding
up its own steps, and the report says so. A real mistake still adds up over the steps.

**Kinks.** An input of a rectifier within float32 rounding of 0 may fall on either side, and
then one float32 gradient rightly differs by a whole term. Of several batches drawn for a
step, the one whose inputs of rectifiers, clips and maximum pools stay farthest from their
kinks is used; the report names the draw. Where a batch normalisation stands in front, its
bias moves a little in both programs before a step, to the same end (before the first
step only if it was fresh). Tolerances are never loosened.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgetrain.arguments import optimizer_of
from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph, Node
from edgetrain.torch_network import TorchLearner, TorchNetwork, torch, torch_optimizer

Array = NDArray[Any]

OUTPUT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 1e-4
PARAMETER_TOLERANCE = 1e-3
_ZERO = 1e-10  # below this part of the network's largest gradient, a float64 gradient is rounding noise
_DRAWS, _LATER_DRAWS = 12, 2  # batches tried for the first step, where gradients are compared, and for the others
_ROUNDING = 2.0**-24  # relative, of float32
_WIDE_MARGIN = 3e-5  # of the largest entry: hundreds of float32 roundings, no need to draw again


@dataclass(frozen=True)
class VerifyRow:
    """One compared quantity.

    Attributes:
        quantity: what was compared, such as ``"gradient conv1.weight"``.
        error: largest absolute difference divided by the scale (see the module's docstring).
        tolerance: largest error that passes.
        ok: whether it passes; an error that is not a number does not.
    """

    quantity: str
    error: float
    tolerance: float
    ok: bool


@dataclass(frozen=True)
class VerifyReport:
    """What a cross-check found.

    Attributes:
        model: name of the graph.
        rows: the compared quantities: output, loss, gradients, parameters.
        steps, batch_size, seed: of the run.
        margin: smallest distance of the first batch to a kink, relative to the largest entry of its map.
        notes: what else a reader must know, such as dropout taken as off.
    """

    model: str
    rows: tuple[VerifyRow, ...]
    steps: int
    batch_size: int
    seed: int
    margin: float
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every row is within its tolerance."""
        return all(row.ok for row in self.rows)

    def worst(self, kind: str) -> float:
        """Return the largest error of the rows whose quantity begins with ``kind``.

        Raises:
            UsageError: there is no such row.
        """
        errors = [row.error for row in self.rows if row.quantity.startswith(kind)]
        if not errors:
            raise UsageError(f"no row of the report begins with '{kind}'")
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error)

    def table(self) -> str:
        """Return the rows, the notes and the verdict as text."""
        width = max(len(row.quantity) for row in self.rows)
        lines = [f"{'quantity':<{width}}  max error  tolerance  verdict"]
        for row in self.rows:
            verdict = "ok" if row.ok else "DISAGREES"
            lines.append(f"{row.quantity:<{width}}  {row.error:9.1e}  {row.tolerance:9.0e}  {verdict}")
        failed = sum(not row.ok for row in self.rows)
        verdict = "all agree" if not failed else f"{failed} of {len(self.rows)} quantities DISAGREE"
        head = f"{self.model}: float32 edgetrain against float64 PyTorch, {self.steps} steps of batch {self.batch_size}"
        return "\n".join([head, *lines, *(f"note: {note}" for note in self.notes), f"{self.model}: {verdict}"])


def verify(
    graph: Graph, *, steps: int = 20, batch_size: int = 8, seed: int = 0, loss: str = "cross_entropy",
    optimizer: Any = None, threads: int | None = None,
) -> VerifyReport:  # fmt: skip
    """Compare a graph in edgetrain with the same graph in float64 PyTorch.

    Compared are the output in inference mode, the loss, every gradient of the first
    batch, and after ``steps`` optimizer steps every parameter and running average. Inputs
    are noise with a random level and contrast per sample and channel (after the graph's own
    normalisation), targets random. Dropout has random masks, so it is taken as off on both sides; the
    report says so.

    Args:
        graph: any graph with one input; it is not changed.
        steps: optimizer steps, at least 1.
        batch_size: samples per step, at least 1.
        seed: of the data.
        loss: ``"cross_entropy"`` or ``"mse"``.
        optimizer: of ``edgetrain.optim``; by default SGD with lr 0.05, momentum 0.9, weight decay 5e-4. Its average of
            the parameters is left out: no step depends on it.
        threads: of edgetrain; the profile's when ``None``.

    Raises:
        UsageError: PyTorch is not installed, or an argument is out of range.
        UnsupportedError: the PyTorch side lacks an operator of the graph, or the graph has several inputs, nothing to
            train, or an output that the loss does not take.
    """
    from edgetrain.optim import SGD

    if steps < 1 or batch_size < 1:
        raise UsageError(f"verify: steps is {steps} and batch_size is {batch_size}, expected at least 1")
    given = optimizer_of(optimizer or SGD(lr=0.05, momentum=0.9, weight_decay=5e-4))
    settings = _Settings(steps, batch_size, seed, loss, replace(given, averaging=0.0), threads)
    _check_supported(graph, settings)
    plain, notes = _prepared(graph, settings)
    trial = _Trial(plain, settings)
    x, y = trial.batch(0)
    rows = _first_batch_rows(trial.learner, trial.judge, x, y)
    after = trial.run(follow=False)
    if not all(row.ok for row in after) and (apart := _sensitivity(plain, settings)) > PARAMETER_TOLERANCE:
        trial = _Trial(plain, settings)
        after = trial.run(follow=True)
        notes += (
            f"sensitive: float64 runs that start one float32 rounding apart grow {apart:.0e} apart, "
            "so PyTorch took its gradients at edgetrain's weights (and its steps from its own)",
        )
    notes += (
        f"data seed {seed}, draw {trial.draws[0]} of the first batch, "
        f"{trial.margins[0]:.1e} of the largest entry away from the nearest kink",
    )
    return VerifyReport(plain.name, (*rows, *after), steps, batch_size, seed, trial.margins[0], notes)


@dataclass(frozen=True)
class _Settings:
    steps: int
    batch_size: int
    seed: int
    loss: str
    optimizer: Any
    threads: int | None


def _check_supported(graph: Graph, settings: _Settings) -> None:
    """Refuse what one of the two sides cannot do.

    Raises:
        UnsupportedError: the graph has several inputs, nothing to train, or an output that the loss does not take.
        UsageError: the batch is too small.
    """
    head, inputs, shape = f"verify: the network '{graph.name}' has", graph.inputs, graph.output_shape
    if len(inputs) != 1:
        raise UnsupportedError(f"{head} the inputs {', '.join(inputs)}, expected one; check a part with one input")
    if not graph.trainable:
        raise UnsupportedError(f"{head} no trainable parameter, expected at least one; there is nothing to compare")
    if settings.loss == "cross_entropy" and len(shape) != 1:
        raise UnsupportedError(
            f"{head} an output of shape {shape}, expected (classes,) for cross-entropy; use "
            'edgetrain.verify.verify(graph, loss="mse")'
        )
    for node in graph.nodes:
        if node.op_type == "BatchNormalization" and settings.batch_size * math.prod(node.x.shape[1:]) == 1:
            raise UsageError(
                f"verify: batch_size is 1, but node '{node.name}' (BatchNormalization) has inputs of shape "
                f"{node.x.shape} and PyTorch refuses one value per channel; use a batch size of at least 2"
            )


# ---- what is compared: a copy of the graph ---------------------------------------------------------------------------


def _prepared(graph: Graph, settings: _Settings) -> tuple[Graph, tuple[str, ...]]:
    """Return a copy that can be compared, and notes on what differs from the original."""
    plain, notes = graph.copy(), []
    for index, node in enumerate(plain.nodes):
        if node.op_type == "Dropout":
            plain.nodes[index] = replace(node, op_type="Identity", inputs=node.inputs[:1], attributes={})
            notes.append("dropout has random masks: taken as off on both sides")
    if drawn := _draw_constants(plain, settings.seed):
        notes.append("batch normalisations with equal scales or biases: drawn at random (see edgetrain.verify)")
        _move_biases(plain, drawn, settings)
    return plain, tuple(dict.fromkeys(notes))


def _draw_constants(graph: Graph, seed: int) -> set[str]:
    """Move scales and biases that are all equal; return their names."""
    rng = np.random.default_rng((seed, 0))
    norms = [node for node in graph.nodes if node.op_type == "BatchNormalization"]
    names = [node.input(index).name for node in norms for index in (1, 2)]
    drawn = {name for name in names if np.ptp(graph.arrays[name]) == 0}
    for name in dict.fromkeys(name for name in names if name in drawn):
        shift = rng.uniform(-0.5, 0.5, graph.arrays[name].shape)
        graph.arrays[name] = (graph.arrays[name] + shift).astype(np.float32)
    return drawn


def _move_biases(graph: Graph, drawn: set[str], settings: _Settings) -> None:
    """Move drawn biases a little further, so that the first batch stays off the kinks."""
    judge = TorchNetwork(graph, settings.loss)
    biases = {kink: bias for kink, bias in _movable_biases(graph).items() if bias in drawn}
    judge.kink_margin(_draw_batch(graph, settings, 0, 0)[0], biases)
    graph.arrays.update({name: judge.parameters()[name].astype(np.float32) for name in biases.values()})


def _movable_biases(graph: Graph) -> dict[str, str]:
    """Return, by the name of a node, the trainable batch normalisation bias that shifts its first input."""
    pairs = ((node.name, _bias_before(graph, node)) for node in graph.nodes)
    return {name: bias for name, bias in pairs if bias in graph.trainable and bias is not None}


def _bias_before(graph: Graph, node: Node) -> str | None:
    """Return the batch normalisation bias that shifts the first input of a node, also through one addition."""
    maker = graph.producer(node.x.name)
    makers = [maker] if maker is None or maker.op_type != "Add" else [graph.producer(v.name) for v in maker.inputs if v]
    return next((m.input(2).name for m in makers if m is not None and m.op_type == "BatchNormalization"), None)


def _draw_batch(graph: Graph, settings: _Settings, step: int, number: int) -> tuple[Array, Array]:
    rng = np.random.default_rng((settings.seed, step, number))
    shape, count = graph.input_shape, settings.batch_size
    each = (count, shape[0], *[1] * (len(shape) - 1))  # white noise alone has the same mean in every sample
    level, contrast = rng.standard_normal(each, np.float32), rng.uniform(0.5, 1.5, each).astype(np.float32)
    x = level + contrast * rng.standard_normal((count, *shape), np.float32)
    if (normal := graph.normalization) is not None:
        per_channel = (-1, *[1] * (len(shape) - 1))
        x = x * normal.std.reshape(per_channel) + normal.mean.reshape(per_channel)
    if settings.loss == "mse":
        return x, rng.standard_normal((count, *graph.output_shape), np.float32)
    return x, rng.integers(0, graph.num_classes, count)


# ---- the comparison --------------------------------------------------------------------------------------------------


class _Trial:
    """One learner and its judge, both at the graph's weights."""

    def __init__(self, graph: Graph, settings: _Settings, learner: Any = None) -> None:
        self._graph, self._settings, self._biases = graph, settings, _movable_biases(graph)
        self.judge = TorchNetwork(graph, settings.loss)
        self.learner = learner or _learner(graph, settings)
        self.margins: list[float] = []
        self.draws: list[int] = []
        self._optimizer = torch_optimizer(settings.optimizer, self.judge)

    def batch(self, step: int) -> tuple[Array, Array]:
        """Return the batch of a step: the draw that stays farthest from kinks at the judge's weights."""
        best: tuple[float, int, Array, Array] | None = None
        for number in range(_DRAWS if step == 0 else _LATER_DRAWS):
            x, y = _draw_batch(self._graph, self._settings, step, number)
            margin = self.judge.kink_margin(x)
            if best is None or margin > best[0]:
                best = (margin, number, x, y)
            if margin >= _WIDE_MARGIN:
                break
        assert best is not None  # there is at least one draw
        self.margins.append(best[0])
        self.draws.append(best[1])
        return best[2], best[3]

    def run(self, follow: bool) -> list[VerifyRow]:
        """Take all steps on both sides and compare the losses and the final parameters.

        Args:
            follow: whether the judge takes each gradient at the learner's weights. Its steps start from its own
                weights all the same, so that errors add up; what is gone is their exponential growth.
        """
        rows, steps = [], self._settings.steps
        for step in range(steps):
            x, y = self.batch(step)
            own = self._off_kinks(x, follow)
            loss = self._gradient(x, y)
            self.judge.load(own)
            self._step(step)
            found = self.learner.partial_fit(x, y)
            row = _row(f"loss of step {step + 1}", found.loss, loss, PARAMETER_TOLERANCE if step else LOSS_TOLERANCE)
            if step in (0, steps - 1) or not row.ok:
                rows.append(row)
            if not row.ok:
                break  # what follows only repeats that
        found, expected = self.learner.parameters(), self.judge.parameters()
        return rows + _array_rows(f"after {step + 1} steps", found, expected, self._graph, PARAMETER_TOLERANCE)

    def _off_kinks(self, x: Array, follow: bool) -> dict[str, Array]:
        """Move the same biases by the same amounts on both sides, off the kinks; return the judge's own weights.

        With ``follow`` the judge is left at the learner's weights.
        """
        theirs, own = self.learner.parameters(), self._trainable(self.judge.parameters())
        if follow:
            self.judge.load(self._trainable(theirs))
        before, margin = self.judge.parameters(), self.judge.kink_margin(x)
        self.judge.kink_margin(x, self._biases)
        after = self.judge.parameters()
        self.judge.load(self._trainable(after))
        if self.judge.kink_margin(x) <= margin:  # what suits a layer may bring later ones nearer
            after = before
        for name in set(self._biases.values()):
            moved = (theirs[name] + (after[name] - before[name])).astype(np.float32)
            own[name] += moved.astype(np.float64) - theirs[name]
            theirs[name] = moved
        if self._biases:
            self.learner.load_parameters(theirs)
        self.judge.load(self._trainable(theirs) if follow else own)
        return own

    def _trainable(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        return {name: arrays[name] for name in self._graph.trainable}

    def _gradient(self, x: Array, y: Array) -> float:
        self._optimizer.zero_grad()
        loss = self.judge.loss(x, y)
        loss.backward()
        return float(loss.item())

    def _step(self, step: int) -> None:
        settings = self._settings.optimizer
        if settings.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.judge.trainable(), settings.clip_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = settings.lr_at(step)
        self._optimizer.step()


def _sensitivity(graph: Graph, settings: _Settings) -> float:
    """Return how far apart two float64 runs end that start one float32 rounding apart."""
    rng = np.random.default_rng((settings.seed, 1))
    near = TorchLearner(graph, settings.loss, settings.optimizer)
    near.load_parameters({n: a * (1 + _ROUNDING * rng.uniform(-1, 1, a.shape)) for n, a in graph.arrays.items()})
    return max(row.error for row in _Trial(graph, settings, near).run(follow=False))


def _learner(graph: Graph, settings: _Settings) -> Any:
    from edgetrain.learner import Learner

    return Learner(
        graph, profile="host", batch_size=settings.batch_size, seed=settings.seed, threads=settings.threads,
        optimizer=settings.optimizer, loss=settings.loss,
    )  # fmt: skip


def _first_batch_rows(learner: Any, judge: TorchNetwork, x: Array, y: Array) -> list[VerifyRow]:
    rows = [_row("output", learner.logits(x), judge.output(x), OUTPUT_TOLERANCE)]
    expected = judge.gradients(x, y)
    return rows + _array_rows("gradient", learner.gradients(x, y), expected, judge.graph, GRADIENT_TOLERANCE)


def _array_rows(
    kind: str, found: Mapping[str, Array], expected: Mapping[str, Array], graph: Graph, tolerance: float
) -> list[VerifyRow]:
    scales = _scales(expected, graph)
    return [
        _row(f"{kind} {name}", found.get(name, np.nan), array, tolerance, scales[name])
        for name, array in expected.items()
    ]


def _row(quantity: str, found: Any, expected: Any, tolerance: float, scale: float = 0.0) -> VerifyRow:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape not in ((), expected.shape):
        error = math.inf
    else:
        difference = float(np.max(np.abs(found - expected), initial=0.0))
        scale = scale or float(np.max(np.abs(expected), initial=0.0)) or 1.0
        error = difference / scale
    return VerifyRow(quantity, error, tolerance, error <= tolerance)


def _scales(expected: Mapping[str, Array], graph: Graph) -> dict[str, float]:
    """Return what the error of each array is relative to (see the module's docstring)."""
    largest = {name: float(np.max(np.abs(array), initial=0.0)) for name, array in expected.items()}
    whole = max(largest.values(), default=0.0)
    noise = _ZERO * whole

    def scale(name: str) -> float:
        if largest[name] > noise:
            return largest[name]
        layer = max(largest.get(other, 0.0) for other in _layer_of(graph, name))
        return layer if layer > noise else whole

    return {name: scale(name) for name in expected}


def _layer_of(graph: Graph, name: str) -> list[str]:
    return [name, *(value.name for node in graph.consumers(name) for value in node.inputs if value is not None)]
