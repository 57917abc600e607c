"""Several learners alive, application threads, forks: nobody waits for ever, and results stay the same bit for bit."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import edgetrain as et
from edgetrain import forking
from edgetrain.kernels import registry

BUILDERS: dict[str, Callable[[], et.Graph]] = {
    "resnet8": lambda: et.models.resnet((3, 8, 8), depth=8),
    "lenet5": et.models.lenet5,
    "cnn1d": lambda: et.models.cnn1d((6, 32)),
}
# Learners of different networks, batch sizes (channels or samples in the lanes) and numbers of threads.
SETTINGS = [("resnet8", 8, 2), ("lenet5", 4, 3), ("cnn1d", 1, 2), ("resnet8", 1, 4)]
SECONDS = 60
# Python 3.12 and newer warn of every fork in a process with threads; that is the situation under test.
FORKS = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def learner(name: str, batch_size: int, threads: int) -> et.Learner:
    return et.Learner(BUILDERS[name](), batch_size=batch_size, threads=threads, optimizer=et.SGD(lr=0.02, momentum=0.9))


def step(of: et.Learner, number: int) -> None:
    rng = np.random.default_rng(number)
    shape = (of.batch_size, *of.graph.input_shape)
    of.partial_fit(rng.standard_normal(shape, np.float32), rng.integers(0, of.graph.output_shape[0], of.batch_size))


def trained(of: et.Learner, steps: int = 4) -> et.Learner:
    for number in range(steps):
        step(of, number)
    return of


def content(of: et.Learner) -> dict[str, bytes]:
    tensors, meta = of.state()
    return {name: array.tobytes() for name, array in tensors.items()} | {"meta": repr(meta).encode()}


@pytest.fixture(scope="module")
def alone() -> list[dict[str, bytes]]:
    """Return what each of the learners is after its steps when nothing else happens."""
    return [content(trained(learner(name, size, 1))) for name, size, _ in SETTINGS]


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Run all jobs at once; return their results, an exception as itself."""
    results: list[Any] = [None] * len(jobs)

    def guarded(number: int) -> None:
        try:
            results[number] = jobs[number]()
        except BaseException as error:  # handed to the test
            results[number] = error

    workers = [threading.Thread(target=guarded, args=(number,), daemon=True) for number in range(len(jobs))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    assert not any(worker.is_alive() for worker in workers), "threads wait for each other"
    return results


# ---- several learners


def test_learners_that_alternate_in_one_thread_do_not_disturb_each_other(alone):
    together = [learner(*settings) for settings in SETTINGS]
    for number in range(4):
        for one in together:
            step(one, number)
    assert [content(one) for one in together] == alone


def test_learners_made_and_trained_in_threads_of_their_own(alone):
    jobs = [lambda settings=settings: content(trained(learner(*settings))) for settings in SETTINGS]
    assert in_threads(*jobs, *jobs) == alone + alone


def test_learners_handed_from_thread_to_thread(alone):
    together = [learner(*settings) for settings in SETTINGS]
    for number in range(4):
        turned = together[number:] + together[:number]
        assert in_threads(*(lambda one=one, number=number: step(one, number) for one in turned)) == [None] * 4
    assert [content(one) for one in together] == alone


def test_a_learner_ends_while_others_train(alone):
    survivor = learner(*SETTINGS[0])

    def passing() -> None:
        for _ in range(5):
            trained(learner(*SETTINGS[1]), 1)

    assert in_threads(lambda: content(trained(survivor)), passing)[0] == alone[0]


# ---- forks


def in_child(job: Callable[[], Any], daemon: bool = True) -> multiprocessing.connection.Connection:
    """Start a job in a forked child; its result comes through the pipe that is returned."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = multiprocessing.get_context("fork")
    context.Process(target=lambda: sender.send(job()), daemon=daemon).start()
    sender.close()
    return receiver


def answer(pipe: multiprocessing.connection.Connection) -> Any:
    assert pipe.poll(SECONDS), "the child hangs"
    return pipe.recv()


@FORKS
def test_child_and_parent_train_all_learners_at_the_same_time(alone):
    together = [trained(learner(*settings), 2) for settings in SETTINGS]

    def rest() -> list[dict[str, bytes]]:
        for number in (2, 3):
            for one in together:
                step(one, number)
        return [content(one) for one in together]

    children = [in_child(rest) for _ in range(2)]
    assert rest() == alone
    assert [answer(child) for child in children] == [alone, alone]


@FORKS
def test_a_child_trains_learners_that_never_ran_and_new_ones(alone):
    idle = learner(*SETTINGS[0])
    child = in_child(lambda: [content(trained(idle)), content(trained(learner(*SETTINGS[1])))])
    assert answer(child) == alone[:2]
    assert content(trained(idle)) == alone[0]


@FORKS
def test_a_fork_in_the_middle_of_another_threads_steps(alone):
    """The child finds every learner between two steps, and no lock that nobody will ever open."""
    busy, ended = learner(*SETTINGS[0]), threading.Event()

    def train() -> None:
        while not ended.is_set():
            step(busy, busy.step_count)

    def go_on() -> tuple[dict[str, bytes], dict[str, bytes], int]:
        steps = busy.step_count
        step(busy, steps)
        return content(busy), content(trained(learner(*SETTINGS[1]))), steps

    worker = threading.Thread(target=train, daemon=True)
    worker.start()
    try:
        answers = [answer(in_child(go_on)) for _ in range(5)]
    finally:
        ended.set()
        worker.join(SECONDS)
    assert not worker.is_alive()
    for state, other, steps in answers:
        assert state == content(trained(learner(*SETTINGS[0]), steps + 1))
        assert other == alone[1]


@FORKS
def test_a_fork_in_the_middle_of_another_threads_stream():
    """The filter's own learner works inside the main one, and is made after it."""
    busy = et.Learner(et.models.lenet5(), batch_size=8, threads=2, instance_filter="eif:rate=0.5,start=0")
    rng, ended = np.random.default_rng(0), threading.Event()
    x, y = rng.random((32, 1, 28, 28), np.float32), rng.integers(0, 10, 32)

    def observe() -> None:
        while not ended.is_set():
            busy.observe(x, y)

    worker = threading.Thread(target=observe, daemon=True)
    worker.start()
    try:
        before = time.monotonic()
        assert [answer(in_child(lambda: busy.observe(x, y).instances_seen)) for _ in range(5)] == [32] * 5
        assert time.monotonic() - before < forking._SECONDS
    finally:
        ended.set()
        worker.join(SECONDS)
    assert not worker.is_alive()


@FORKS
def test_a_fork_waits_for_a_kernel_that_is_being_compiled(monkeypatch):
    started = threading.Event()
    release = threading.Event()

    def compiling(*_: object) -> None:
        started.set()
        release.wait(SECONDS)

    key = ("unary", (2, 0))  # lanes that no plan has
    monkeypatch.setattr(registry, "on_compile", [compiling])
    monkeypatch.setattr(registry.cache, "read", lambda name: None)
    worker = threading.Thread(target=registry.compile_kernels, args=([key],), daemon=True)
    worker.start()
    assert started.wait(SECONDS)
    threading.Timer(0.2, release.set).start()
    assert answer(in_child(lambda: key in registry.compile_kernels([key])))
    worker.join(SECONDS)


@FORKS
def test_a_fork_does_not_wait_for_ever(monkeypatch):
    monkeypatch.setattr(forking, "_SECONDS", 0.2)
    lock, held, ended = forking.ForkLock(), threading.Event(), threading.Event()

    def hold() -> None:
        with lock:
            held.set()
            ended.wait(SECONDS)

    worker = threading.Thread(target=hold, daemon=True)
    worker.start()
    assert held.wait(SECONDS)
    before = time.monotonic()
    assert answer(in_child(lambda: lock.wait(0.0))) is False
    assert time.monotonic() - before < SECONDS
    ended.set()
    worker.join(SECONDS)
    assert lock.wait(SECONDS)


@FORKS
def test_a_child_of_a_child_trains(alone):
    one = trained(learner(*SETTINGS[0]), 2)

    def child() -> dict[str, bytes]:
        step(one, 2)
        return answer(in_child(lambda: (step(one, 3), content(one))[1]))

    assert answer(in_child(child, daemon=False)) == alone[0]
