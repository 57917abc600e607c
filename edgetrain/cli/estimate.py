"""How long dense training takes, where no dense twin was trained: estimated from steps side by side with the run's."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgetrain.accounting import StepResult
from edgetrain.cli.output import count
from edgetrain.data.batches import Batch
from edgetrain.errors import DataError, MemoryBudgetError, NumericalError
from edgetrain.graph import Graph

if TYPE_CHECKING:
    from edgetrain.learner import Learner

# Steps that a run must have taken: the first ones of a process are slow, those of the estimate are not.
_LEAST_STEPS = 20
# A turn is so many steps of each, of which the first does not count: it wakes threads and brings memory back into the
# caches. Long steps are fewer: a turn of one learner ends, with two steps, after so many seconds.
_STEPS, _TURN_SECONDS = 5, 0.2
# So many turns, or as many as fit into some seconds, but a few in any case.
_TURNS, _FEWEST_TURNS, _SECONDS = 50, 3, 2.0
# Dense steps before all turns, or as many as fit: short programs need 200 to learn how many threads serve them best
# (``executor.Pace``), which the run's learner knows.
_WARM_STEPS, _WARM_SECONDS = 250, 0.5

# Returns batches of so many instances, prepared as those of the run.
Batches = Callable[[int], Iterable[Batch]]


@dataclass(frozen=True)
class Work:
    """What a run has done.

    Attributes:
        seconds: its training time.
        macs: multiply-accumulates that it executed.
        instances: that it has trained on or skipped.
        block: instances that it looks at together.
        predicts: whether a stream predicts every instance before it learns from it; ``None`` of a run over epochs.
    """

    seconds: float
    macs: int
    instances: int
    block: int
    predicts: bool | None = None


@dataclass(frozen=True)
class _Burst:
    """Sums over the steps of a turn that count."""

    seconds: float
    macs: int
    instances: int
    steps: int


def random_batches(learner: Learner, size: int) -> Iterator[Batch]:
    """Yield batches of random images, where those of the run are gone."""
    rng, graph = np.random.default_rng(0), learner.graph
    while True:
        yield rng.random((size, *graph.input_shape), np.float32), rng.integers(0, graph.num_classes, size)


def time_dense(learner: Learner, work: Work, batches: Batches) -> dict[str, Any]:
    """Estimate the training time of dense training on the instances of a run.

    How fast a machine is changes from minute to minute, with what else it does. So dense steps alone would be compared
    with a run of other minutes: two equal runs said that they saved 54 % and 80 %. Here they take turns with steps of
    the run's own learner, and the ratio of both times is multiplied with that of the run. The own steps count by their
    operations, as those of the run do: a filter may have let more pass at its start than now. Changes of the topology
    are taken out of the time of the run, as the steps have next to none. Both are timed by the clock of this thread,
    which stands still while another process has the processor: for several steps of LeNet-5 at a time.

    All steps are taken at learning rate 0: at that of the run, weights drawn at random may grow without bound, which
    says nothing about the run.

    Args:
        learner: of the run; it is put back into the state that it has, and so is the memory it takes.
        work: what the run has done.
        batches: returns batches (x, y) of so many instances, prepared as the run does; the first few are used, again
            where they are few.

    Returns:
        ``seconds``, ``None`` where they cannot be told, and ``how`` that is known or why not.
    """
    if not work.instances:
        return {"seconds": None, "how": "no instance was trained on or skipped yet"}
    if learner.step_count < _LEAST_STEPS:
        found = f"{count(learner.step_count, 'step')}, a comparison takes {_LEAST_STEPS}"
        return {"seconds": None, "how": f"too few steps to compare: {found}"}
    try:
        dense = _dense_twin(learner)
        with _set_back(learner):
            turns = list(_turns(dense, learner, work, batches))
    except NumericalError:
        return {"seconds": None, "how": "a step of the comparison, with random dense weights, was not finite"}
    except MemoryBudgetError:
        return {"seconds": None, "how": "a dense network beside the run's does not fit into the memory budget; "
                                        "--baseline measures it"}  # fmt: skip
    except DataError as error:
        return {"seconds": None, "how": str(error)}
    return _estimated(turns, work, learner.topology.seconds)


def _estimated(turns: list[tuple[_Burst, _Burst]], work: Work, changing: float) -> dict[str, Any]:
    """Return the estimate of turns, of dense steps and of the run's; ``changing``: seconds of topology changes."""
    # Where all instances of a turn were skipped at no cost, nothing compares the machine with that of the run.
    told = [(dense, own) for dense, own in turns if own.macs and own.seconds]
    if not told or not work.macs:
        return {"seconds": None, "how": "the filter let nothing pass beside the dense steps"}
    an_instance = statistics.median(dense.seconds / dense.instances for dense, _ in told)
    an_operation = statistics.median(own.seconds / own.macs for _, own in told)
    seconds = max(0.0, work.seconds - changing) / work.macs * work.instances * an_instance / an_operation
    steps = sum(dense.steps for dense, _ in told)
    return {"seconds": seconds, "how": f"estimated from {count(steps, 'dense step')}, side by side with the run's own"}


def _turns(dense: Learner, own: Learner, work: Work, batches: Batches) -> Iterator[tuple[_Burst, _Burst]]:
    """Yield what dense steps and the run's took, in turns.

    Raises:
        DataError: there is no batch any more.
    """
    dense_batches, own_batches = _again(batches, dense.batch_size), _again(batches, work.block)
    _warm_up(dense, dense_batches, work.predicts)
    start = time.perf_counter()
    for turn in range(_TURNS):
        yield _burst(dense, dense_batches, work.predicts), _burst(own, own_batches, work.predicts)
        if turn + 1 >= _FEWEST_TURNS and time.perf_counter() - start > _SECONDS:
            return


def _again(batches: Batches, size: int) -> Iterator[Batch]:
    """Yield batches as often as turns may need them, of data that give one at least."""
    return itertools.chain.from_iterable(batches(size) for _ in range(_WARM_STEPS + _TURNS * _STEPS))


def _warm_up(learner: Learner, batches: Iterator[Batch], predicts: bool | None) -> None:
    start = time.perf_counter()
    for x, y in itertools.islice(batches, _WARM_STEPS):
        _take(learner, x, y, predicts)
        if time.perf_counter() - start > _WARM_SECONDS:
            return


def _burst(learner: Learner, batches: Iterator[Batch], predicts: bool | None) -> _Burst:
    """Take the steps of a turn.

    Raises:
        DataError: there is no batch any more.
    """
    began, steps = time.perf_counter(), []
    for x, y in itertools.islice(batches, _STEPS):
        start = time.thread_time()
        result = _take(learner, x, y, predicts)
        steps.append((time.thread_time() - start, result.macs_done, result.instances_seen))
        if len(steps) > 1 and time.perf_counter() - began > _TURN_SECONDS:
            break
    if len(steps) < 2:
        raise DataError("the data are gone that dense steps would be timed with")
    seconds, macs, instances = map(sum, zip(*steps[1:], strict=True))
    return _Burst(seconds, int(macs), int(instances), len(steps) - 1)


def _take(learner: Learner, x: Any, y: Any, predicts: bool | None) -> StepResult:
    """Take instances as a run does: ``predicts`` as in ``Work``."""
    if predicts is not None:
        return learner.observe(x, y, predicts)
    return learner.partial_fit(x, y) if learner.instance_filter is None else learner.stream.offer(x, y)


@contextmanager
def _set_back(learner: Learner) -> Iterator[None]:
    """Let steps be taken that change no weight, and put the learner back into its state, however they end."""
    state, optimizer = learner.state(), learner.optimizer
    learner.optimizer = replace(optimizer, lr=0.0, schedule=None)
    try:
        yield
    finally:
        learner.optimizer = optimizer
        learner.restore(*state)


def _dense_twin(learner: Learner) -> Learner:
    """Return a dense learner of the same network with weights of a usual size, in what the run leaves of its budget.

    Raises:
        MemoryBudgetError: that is too little.
    """
    from edgetrain.learner import Learner

    left = learner.memory_budget - learner.memory_plan().peak_bytes
    if learner.memory_budget and left <= 0:
        raise MemoryBudgetError("nothing of the memory budget is left")
    twin = Learner(
        _redrawn(learner.graph), learner.profile, batch_size=learner.batch_size, threads=learner.threads,
        optimizer=replace(learner.optimizer, lr=0.0, schedule=None), loss=learner.loss,
        label_smoothing=learner.label_smoothing, memory_budget=left if learner.memory_budget else 0,
    )  # fmt: skip
    twin.prepare()
    return twin


def _redrawn(graph: Graph) -> Graph:
    """Return a network with random weights.

    Trained ones would do, unless the training went astray: numbers of a usual size take as long. Those of a sparse
    learner are not in its graph anyway.
    """
    twin, rng = graph.copy(share=True), np.random.default_rng(0)
    trained = {n: a for n, a in twin.arrays.items() if n in twin.trainable}
    twin.arrays |= {n: rng.normal(0, a[0].size ** -0.5, a.shape).astype(np.float32) for n, a in trained.items()}
    return twin
