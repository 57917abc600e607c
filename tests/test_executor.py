"""Running programs: threads, processes, changing batch sizes, floating-point state, broken steps, the kernel cache."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain import executor
from edgetrain.errors import NumericalError
from edgetrain.executor import Arena, Pace, Team
from edgetrain.graph import Graph
from edgetrain.kernels.codes import ARRIVED, TICKET
from edgetrain.kernels.registry import interpreter
from edgetrain.plan import Plan

BUILDERS = {
    "resnet8": lambda: et.models.resnet((3, 8, 8), depth=8),
    "mobilenet": lambda: et.models.mobilenet_v1((3, 32, 32), width=0.25),
}
BATCH = 8


def learner(name: str = "resnet8", **options) -> et.Learner:
    options = {"threads": 2, "optimizer": et.SGD(lr=0.05, momentum=0.9)} | options
    return et.Learner(BUILDERS[name](), batch_size=BATCH, **options)


def batch(of: et.Learner, count: int = BATCH, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((seed, count))
    return rng.standard_normal((count, *of.graph.input_shape), np.float32), rng.integers(0, 10, count)


def trained(of: et.Learner, sizes: tuple[int, ...] = (BATCH,) * 4) -> et.Learner:
    for number, count in enumerate(sizes):
        of.partial_fit(*batch(of, count, number))
    return of


def content(of: et.Learner) -> dict[str, bytes]:
    """Return everything that training changes, bit for bit."""
    tensors, meta = of.state()
    return {name: array.tobytes() for name, array in tensors.items()} | {"meta": repr(meta).encode()}


@pytest.fixture(scope="module", params=BUILDERS)
def name(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def single(name) -> dict[str, bytes]:
    return content(trained(learner(name, threads=1)))


# --- threads ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [2, 3, 4])
def test_results_do_not_depend_on_the_number_of_threads(name, single, threads):
    assert content(trained(learner(name, threads=threads))) == single


def test_threads_may_change_between_steps(name, single):
    changing = trained(learner(name, threads=1), (BATCH,))
    changing.threads = 4
    for number in (1, 2, 3):
        changing.partial_fit(*batch(changing, seed=number))
    assert content(changing) == single


def test_predictions_do_not_depend_on_the_number_of_threads(name):
    one, four = learner(name, threads=1), learner(name, threads=4)
    x, _ = batch(one, 11)
    np.testing.assert_array_equal(one.logits(x), four.logits(x))


def in_threads(*jobs) -> list[BaseException]:
    """Run all jobs at once; return what they raised."""
    raised: list[BaseException] = []

    def guarded(job) -> None:
        try:
            job()
        except BaseException as error:  # handed to the test
            raised.append(error)

    workers = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers), "threads wait for each other"
    return raised


def test_learners_in_several_application_threads_do_not_disturb_each_other():
    learners = [learner(threads=2) for _ in range(4)]
    assert in_threads(*(lambda one=one: trained(one) for one in learners)) == []
    assert len({tuple(content(one).items()) for one in learners}) == 1
    assert content(learners[0]) == content(trained(learner(threads=1)))


def test_one_learner_shared_by_application_threads_takes_every_step():
    shared, probe = learner(threads=2), batch(learner(), 5)[0]
    jobs = [lambda: trained(shared, (BATCH,) * 5), lambda: trained(shared, (3,) * 5)]
    assert in_threads(*jobs, *(lambda: [shared.predict(probe) for _ in range(10)],) * 2) == []
    assert shared.step_count == 10
    assert all(np.isfinite(array).all() for array in shared.parameters().values())


def test_parameters_are_never_read_in_the_middle_of_a_step():
    # One weight and its gradient are constant, so every snapshot must be a whole number of steps.
    graph = Graph("ramp", input_shape=(1,))
    graph.set_outputs([graph.add("Gemm", ["input", graph.parameter("w", np.zeros((4096, 1)))], transB=1)])
    moving = et.Learner(graph, batch_size=1, threads=2, optimizer=et.SGD(lr=1.0), loss="mse")
    x, y = np.ones((1, 1), np.float32), np.ones((1, 4096), np.float32)
    snapshots: list[np.ndarray] = []
    assert in_threads(
        lambda: [moving.partial_fit(x, y) for _ in range(200)],
        lambda: snapshots.extend(moving.parameters()["w"] for _ in range(200)),
    ) == []  # fmt: skip
    assert max(float(np.ptp(snapshot)) for snapshot in snapshots) == 0


def helpers() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "edgetrain"}


def eventually(condition) -> bool:
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return bool(condition())


def test_a_learner_that_is_gone_leaves_no_thread():
    before = helpers()
    passing = trained(learner(threads=4), (BATCH,))
    own = helpers() - before
    assert len(own) == 3
    del passing
    assert eventually(lambda: not any(thread.is_alive() for thread in own))


def test_no_thread_is_started_before_the_first_program():
    before = helpers()
    team = Team(4)
    assert team.run(0, 0)
    assert helpers() <= before


def test_an_interrupt_before_a_run_leaves_a_team_that_works(monkeypatch):
    # Ctrl-C can strike between any two lines of Python; here: when one of three threads has been woken.
    struck = trained(learner(threads=4), (BATCH,))
    order = struck.plans.team._order

    def interrupted() -> None:
        order.starts[0].release()
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(order, "wake", interrupted)
    with pytest.raises(KeyboardInterrupt):
        struck.partial_fit(*batch(struck, seed=1))
    assert order.wanted == int(struck.plans.team.sync[TICKET // 8])  # else the threads would look for a run for ever
    assert in_threads(lambda: struck.partial_fit(*batch(struck, seed=2))) == []


def test_addresses_that_an_interrupt_left_unresolved_are_resolved_in_the_next_run(monkeypatch):
    struck, other = learner(), learner()
    x, y = batch(struck)

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as strike:
        strike.setattr(Plan, "bind", interrupted)
        with pytest.raises(KeyboardInterrupt):
            struck.partial_fit(x, y)
    struck.partial_fit(x, y)
    other.partial_fit(x, y)
    assert content(struck) == content(other)


# --- fork -------------------------------------------------------------------------------------------------------------


def _train_in_child(of: et.Learner, pipe) -> None:
    pipe.send(content(trained(of)))
    pipe.close()


# Python 3.12 and newer warn of every fork in a process with threads; that is the situation under test.
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_after_a_fork_the_child_trains_and_the_parent_goes_on():
    parent = trained(learner(threads=2), (BATCH,))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_train_in_child, args=(parent, sender))
    child.start()
    assert receiver.poll(60), "the child hangs"
    in_child = receiver.recv()
    child.join(60)
    assert child.exitcode == 0
    assert in_child == content(trained(parent))


# --- batch sizes and the arena ----------------------------------------------------------------------------------------

SIZES = {"one, full, many": (1, BATCH, 3 * BATCH + 1), "many, one, full": (3 * BATCH + 1, 1, BATCH),
         "growing": (1, 5, BATCH, BATCH + 1)}  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_any_order_of_batch_sizes_equals_fresh_learners(name, sizes):
    steady = learner(name)
    for number, count in enumerate(sizes):
        fresh = learner(name)
        fresh.restore(*steady.state())
        assert (steady.partial_fit(*batch(steady, count, number)).loss ==
                fresh.partial_fit(*batch(fresh, count, number)).loss)  # fmt: skip
        assert content(steady) == content(fresh)


def test_predicting_between_steps_changes_nothing(name, single):
    busy = learner(name, threads=1)
    for number in range(4):
        busy.predict(batch(busy, 3 * BATCH + 1)[0])
        busy.partial_fit(*batch(busy, seed=number))
        busy.logits(batch(busy, 1)[0])
    assert content(busy) == single


def test_a_prediction_does_not_depend_on_its_neighbours(name):
    some = trained(learner(name))
    x, _ = batch(some, 3 * BATCH + 1)
    np.testing.assert_allclose(some.logits(x), np.concatenate([some.logits(one[None]) for one in x]), atol=1e-5)


def test_many_batch_sizes_do_not_pile_up_plans():
    varied = learner(threads=1)
    x, y = batch(varied, 300)
    for count in range(1, 300, 12):
        varied.partial_fit(x[:count], y[:count])
    assert len(varied.plans._executors) <= 8


def test_an_arena_grows_and_never_shrinks():
    arena = Arena()
    arena.reserve(1000)
    small = arena.address
    arena.reserve(10)
    assert (arena.memory.size, arena.address) == (1000, small)
    arena.reserve(5000)
    assert arena.memory.size == 5000
    assert arena.address % 64 == 0


# --- floating-point state ---------------------------------------------------------------------------------------------

SUBNORMAL = np.float32(1e-40)


def linear(weight: float) -> et.Learner:
    graph = Graph("scale", input_shape=(1,))
    graph.set_outputs([graph.add("Gemm", ["input", graph.parameter("w", [[weight]])], transB=1)])
    return et.Learner(graph, batch_size=4, threads=2, loss="mse", optimizer=et.SGD(lr=0.0))


def test_the_calling_thread_keeps_its_subnormal_numbers():
    some = trained(learner(threads=2), (BATCH,))
    some.predict(batch(some)[0])
    assert np.array([SUBNORMAL]) * np.float32(0.5) > 0
    assert np.array([1e-30], np.float32) * np.float32(1e-10) > 0


def test_kernels_take_subnormal_numbers_as_zero():
    assert linear(1e30).logits(np.full((1, 1), SUBNORMAL))[0, 0] == 0


def test_kernels_write_zero_for_subnormal_results():
    assert linear(1e-20).logits(np.full((1, 1), 1e-20, np.float32))[0, 0] == 0


def test_normal_numbers_near_the_limit_are_exact():
    assert linear(1.0).logits(np.full((1, 1), 2e-38, np.float32))[0, 0] == np.float32(2e-38)


# --- broken steps -----------------------------------------------------------------------------------------------------


def test_an_exploding_step_is_not_applied():
    hot = trained(learner(optimizer=et.SGD(lr=1e30)), (BATCH,))
    before = content(hot)
    with pytest.raises(NumericalError, match=r"^step 2: loss or gradients are not finite, first at node '.+' \(\w+\);"):
        hot.partial_fit(*batch(hot, seed=1))
    assert content(hot) == before
    hot.load_parameters(learner().parameters())
    hot.optimizer = et.SGD(lr=0.01)
    assert np.isfinite(hot.partial_fit(*batch(hot, seed=1)).loss)


def test_after_a_broken_step_a_lower_rate_goes_on_exactly():
    hot, cool = learner(), learner()
    trained(hot, (BATCH,))
    trained(cool, (BATCH,))
    x, y = batch(hot, seed=1)
    with pytest.raises(NumericalError):
        hot.partial_fit(x * 1e30, y)
    hot.optimizer = cool.optimizer = et.SGD(lr=0.01, momentum=0.9)
    assert hot.partial_fit(x, y).loss == cool.partial_fit(x, y).loss
    assert content(hot) == content(cool)


@pytest.mark.parametrize("optimizer", [et.SGD(momentum=0.9), et.Adam(), et.AdamW()], ids=["sgd", "adam", "adamw"])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_broken_step_keeps_every_bit(optimizer, threads):
    some = trained(learner(optimizer=optimizer, threads=threads), (BATCH,))
    before = content(some)
    x, y = batch(some)
    with pytest.raises(NumericalError):
        some.partial_fit(x * 1e30, y)
    assert content(some) == before


@pytest.mark.parametrize(("x", "y"), [(1e-10, 1e20), (3e38, -3.0)], ids=["loss", "gradients"])
def test_a_step_of_which_one_alone_is_not_finite_is_not_applied(x, y):
    some = linear(0.0)
    some.optimizer = et.SGD(lr=0.1)
    with pytest.raises(NumericalError, match="step 1: loss or gradients are not finite"):
        some.partial_fit(np.full((4, 1), x, np.float32), np.full((4, 1), y, np.float32))
    assert some.parameters()["w"] == 0


NODES = {"conv1.weight": "conv1", "layer1.0.conv2.weight": r"layer1\.0\.conv2", "bn1.bias": "bn1", "fc.weight": "fc"}


@pytest.mark.parametrize(("parameter", "node"), NODES.items(), ids=NODES)
def test_a_weight_that_is_not_a_number_is_named(parameter, node):
    sick = learner()
    sick.graph.arrays[parameter].flat[0] = np.nan
    before = content(sick)
    with pytest.raises(NumericalError, match=f"step 1: .* first at node '{node}'"):
        sick.partial_fit(*batch(sick))
    assert content(sick) == before


def test_max_pooling_does_not_hide_a_weight_that_is_not_a_number():
    sick = et.Learner(et.models.lenet5(), batch_size=BATCH, threads=1)
    sick.graph.arrays["conv1.weight"].flat[0] = np.nan
    with pytest.raises(NumericalError, match="first at node 'conv1'"):
        sick.partial_fit(*batch(sick))


def positive() -> Graph:
    """Return a network with a Relu whose input is positive, so that a word of its bits is no finite float32."""
    graph = Graph("positive", input_shape=(1, 6, 6))
    arrays = graph.parameter("conv.weight", np.ones((2, 1, 1, 1))), graph.parameter("conv.bias", np.full(2, 9.0))
    x = graph.add("Relu", [graph.add("Conv", ["input", *arrays], kernel_shape=[1, 1])])
    x = graph.add("Flatten", [graph.add("GlobalAveragePool", [x])])
    weight = graph.parameter("fc.weight", np.ones((10, 2)))
    graph.set_outputs([graph.add("Gemm", [x, weight], name="fc", transB=1)])
    return graph


PACKED = {
    "positions of a max pool": (et.models.lenet5, "MaxPoolTraining", "fc3"),
    "bits of a Relu": (positive, "ReluMask", "fc"),
}


@pytest.mark.parametrize(("build", "packed", "layer"), PACKED.values(), ids=PACKED)
def test_what_is_packed_into_words_is_not_taken_for_numbers(build, packed, layer):
    sick = et.Learner(build(), batch_size=BATCH, threads=1)
    sick.graph.arrays[f"{layer}.weight"].flat[0] = np.nan
    assert packed in [node.op_type for node in sick.training_plan().graph.nodes]
    with pytest.raises(NumericalError, match=f"first at node '{layer}'"):
        sick.partial_fit(*batch(sick))


# --- the kernel cache -------------------------------------------------------------------------------------------------

# Two operators only, to keep the compilation short.
_COMPILE = """
import json, sys
import numpy as np
from edgetrain.graph import Graph
from edgetrain.kernels.registry import on_compile
from edgetrain.learner import Learner
seen = []
on_compile.append(lambda name, number, total: seen.append([name, number, total]))
graph = Graph("tiny", input_shape=(2,))
graph.set_outputs([graph.add("Relu", ["input"])])
probability = Learner(graph, batch_size=4, threads=1).logits(np.ones((1, 2), np.float32))
sys.stdout.write(json.dumps({"seen": seen, "sum": float(probability.sum())}))
"""


def compiled(root: Path, **environment: str) -> list[tuple[str, int, int]]:
    """Run a tiny network in a process of its own; return the kernels that it had to compile."""
    variables = {k: v for k, v in os.environ.items() if k != "NUMBA_CACHE_DIR"} | environment
    command = [sys.executable, "-W", "error", "-c", _COMPILE]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env=variables | {"PYTHONPATH": str(root)}, cwd="/"
    )
    answer = json.loads(done.stdout)
    assert answer["sum"] == 2
    return [tuple(entry) for entry in answer["seen"]]


def test_only_kernels_that_are_not_in_the_cache_are_announced(tmp_path):
    root = Path(et.__file__).parents[1]
    first = compiled(root, NUMBA_CACHE_DIR=str(tmp_path))
    assert [entry[1:] for entry in first] == [(1, 2), (2, 2)]
    assert [entry[0].split("x")[0] for entry in first] == ["pack_channels", "unary"]
    assert compiled(root, NUMBA_CACHE_DIR=str(tmp_path)) == []


def test_the_cache_works_when_the_package_is_read_only(tmp_path):
    source, root = Path(__file__).parents[1], tmp_path / "installed"
    for folder in ("edgetrain", "models", "device_profiles"):
        shutil.copytree(
            source / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__", "fashion_mnist_subset")
        )
    # Root may write anywhere; a file in the place of every cache folder refuses even root.
    for folder in [path for path in root.rglob("*") if path.is_dir()]:
        (folder / "__pycache__").write_text("")
    home = {"HOME": str(tmp_path / "home"), "XDG_CACHE_HOME": str(tmp_path / "home"), "PYTHONDONTWRITEBYTECODE": "1"}
    assert len(compiled(root, **home)) == 2
    assert compiled(root, **home) == []


def test_a_leader_that_is_late_finds_its_team(monkeypatch):
    # Woken threads must wait for a run however long it takes to begin: the leader may lose its core in between.
    late = trained(learner(threads=3), (BATCH,))
    order, wake = late.plans.team._order, late.plans.team._order.wake

    def slowly() -> None:
        wake()
        time.sleep(0.1)  # a hundred times longer than a thread looks for work

    monkeypatch.setattr(order, "wake", slowly)
    assert in_threads(lambda: late.partial_fit(*batch(late, seed=1))) == []


# ---- how many threads run a short program


def paced(seconds: dict[int, float], runs: int, pace: Pace | None = None) -> tuple[Pace, list[int]]:
    """Run with given seconds by number of threads; return the pace and the threads of every run."""
    pace, threads = pace or Pace(max(seconds)), []
    for _ in range(runs):
        threads.append(pace.threads)
        pace.took(seconds[pace.threads])
    return pace, threads


def test_a_short_program_runs_on_one_thread_where_that_is_faster():
    pace, threads = paced({1: 1e-4, 4: 2e-4}, 1000)
    assert set(threads) == {1, 4}
    assert threads[:200] == [4] * 200
    assert threads.count(1) > 700
    _, later = paced({1: 1e-4, 4: 0.5e-4}, 2000, pace)  # the machine has become quiet
    assert later.count(4) > 1000


@pytest.mark.parametrize("seconds", [1e-4, 6e-3])  # the latter is a long program on one thread
def test_trials_are_rare_where_all_threads_are_much_faster(seconds):
    _, threads = paced({1: 2 * seconds, 2: seconds}, 10_000)
    assert threads[-1] == 2
    assert 0 < threads.count(1) < 50


@pytest.mark.parametrize("slow", [5e-4, 3e-3, 2e-2])
def test_one_slow_run_decides_nothing(slow):
    pace, _ = paced({1: 1e-4, 2: 0.9e-4}, 203)
    pace.took(slow)  # the trial of two threads meets another process
    _, threads = paced({1: 1e-4, 2: 0.9e-4}, 20, pace)
    assert threads[-1] == 2


def test_interruptions_do_not_keep_a_program_on_all_threads():
    pace, ones = Pace(2), 0
    for number in range(10_000):
        ones += pace.threads == 1
        pace.took(2e-2 if number % 50 == 0 else 1e-4 * pace.threads)
    assert ones > 8000


@pytest.mark.parametrize("seconds", [{1: 1.0, 2: 3.0}, {1: 1e-4}])
def test_long_programs_and_single_threads_are_left_alone(seconds):
    _, threads = paced(seconds, 1000)
    assert set(threads) == {max(seconds)}


def test_threads_sleep_when_another_team_runs():
    """Teams that take turns would keep the processors from each other."""
    made = [learner(), learner()]
    follow, finished = interpreter()[1], []
    for of in (*made, made[0]):
        of.partial_fit(*batch(of))
        sync = of.plans.team.sync
        assert executor._ACTIVE[0] == sync.ctypes.data
        others = [other.plans.team.sync for other in made if other is not of]

        def wait(sync: np.ndarray = others[0]) -> None:
            follow(sync.ctypes.data, 1, int(sync[TICKET // 8]), 10**12, executor._ACTIVE.ctypes.data)
            finished.append(sync)

        thread = threading.Thread(target=wait, daemon=True)
        thread.start()
        thread.join(20)
    assert len(finished) == 3


# ---- interrupts


@pytest.fixture
def strike():
    """Return what sends an interrupt, as of Ctrl-C, once a learner's threads have met twice in a run from now on."""
    before, watchers = signal.signal(signal.SIGALRM, signal.default_int_handler), []

    def begin(learner: et.Learner) -> None:
        sync, main = learner.plans.team.sync, threading.main_thread().ident
        met = int(sync[ARRIVED // 8]) + 4

        def watch() -> None:
            deadline = time.monotonic() + 10
            while sync[ARRIVED // 8] < met and time.monotonic() < deadline:
                time.sleep(0)
            signal.pthread_kill(main, signal.SIGALRM)

        watchers.append(threading.Thread(target=watch))
        watchers[-1].start()

    yield begin
    for watcher in watchers:
        watcher.join()
    signal.signal(signal.SIGALRM, before)


def test_a_step_that_an_interrupt_strikes_is_taken_whole_and_counted(strike):
    rng = np.random.default_rng(0)
    x, y = rng.random((1024, 1, 28, 28), np.float32), np.arange(1024) % 10
    some, other = (et.Learner(et.models.lenet5(), batch_size=1024, threads=2) for _ in range(2))
    some.partial_fit(x, y)

    def take_steps() -> None:
        while True:
            some.partial_fit(x, y)

    for _ in range(4):
        strike(some)
        with pytest.raises(KeyboardInterrupt):
            take_steps()
    assert some.step_count >= 5
    for _ in range(some.step_count):
        other.partial_fit(x, y)
    for name, array in other.parameters().items():
        np.testing.assert_array_equal(some.parameters()[name], array)


def test_an_interrupted_fit_goes_on_where_it_stood(strike):
    rng = np.random.default_rng(0)
    data = rng.random((4096, 1, 28, 28), np.float32), np.arange(4096) % 10
    some, other = (et.Learner(et.models.lenet5(), batch_size=512, threads=2) for _ in range(2))
    other.fit(data, 2)
    some.prepare()
    for _ in range(3):
        strike(some)
        with pytest.raises(KeyboardInterrupt):
            some.fit(data, 2)
    some.fit(data, 2)
    assert (some.step_count, some.position) == (other.step_count, other.position)
    for name, array in other.parameters().items():
        np.testing.assert_array_equal(some.parameters()[name], array)


class _Struck(np.ndarray):
    """Memory that an interrupt keeps from telling its address."""

    @property
    def ctypes(self):
        raise KeyboardInterrupt


@pytest.mark.parametrize("before", [0, 64])
def test_an_interrupt_while_the_arena_grows_leaves_no_address_of_memory_that_is_gone(before, monkeypatch):
    arena = Arena()
    arena.reserve(before)
    with monkeypatch.context() as strike:
        strike.setattr(executor, "aligned", lambda size, kind: np.zeros(size, kind).view(_Struck))
        with pytest.raises(KeyboardInterrupt):
            arena.reserve(1 << 20)
    assert arena.memory.size == 1 << 20
    arena.reserve(128)
    assert arena.address == arena.memory.view(np.ndarray).ctypes.data


def test_an_interrupt_while_threads_start_leaves_none(monkeypatch):
    team, started, start = Team(3), list[threading.Thread](), threading.Thread.start

    def strike(thread: threading.Thread) -> None:
        start(thread)
        started.append(thread)
        if len(started) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", strike)
        with pytest.raises(KeyboardInterrupt):
            team._start()
    for thread in started:
        thread.join(10)
        assert not thread.is_alive()
    team._start()
    assert len(team._order.starts) == 2
    assert not team._order.dismissed
