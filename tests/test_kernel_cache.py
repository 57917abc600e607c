"""Compiled kernels on disk: found again without a compiler, wherever they are kept, whatever happens to the files."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain.cli import warming
from edgetrain.devices import load_profile
from edgetrain.errors import GraphError
from edgetrain.kernels import cache, registry
from edgetrain.kernels.codes import RELU, SIGMOID
from edgetrain.kernels.compiler import LIBRARY_FUNCTIONS, compile_object

ROOT = Path(et.__file__).parents[1]

# A step of a small network, or a prediction of one activation, in a process of its own.
PROGRAM = """
import json, sys
import numpy as np
from edgetrain.graph import Graph
from edgetrain.kernels.registry import on_compile
from edgetrain.learner import Learner
seen = []
on_compile.append(lambda name, number, total: seen.append(name))
results = []
for name in sys.argv[1:]:
    graph = Graph("tiny", input_shape=(3,))
    if name == "train":
        weights = graph.parameter("w", np.full((2, 3), 0.5, np.float32))
        bias = graph.parameter("b", np.zeros(2, np.float32))
        graph.set_outputs([graph.add("Gemm", ["input", weights, bias], transB=1)])
        learner = Learner(graph, batch_size=4, threads=2)
        results.append(learner.partial_fit(np.eye(4, 3, dtype=np.float32), np.array([0, 1, 0, 1])).loss)
    else:
        graph.set_outputs([graph.add(name, ["input"])])
        results.append(Learner(graph, batch_size=4, threads=1).logits(np.full((1, 3), -2, np.float32)).tolist())
compilers = sorted({name.partition(".")[0] for name in sys.modules} & {"numba", "llvmlite"})
sys.stdout.write(json.dumps({"compiled": seen, "compilers": compilers, "results": results}))
"""


def start(folder: Path, *what: str) -> subprocess.Popen:
    command = [sys.executable, "-W", "error", "-c", PROGRAM, *what]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(folder)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd="/")


def answer(process: subprocess.Popen) -> dict:
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    return json.loads(text)


@pytest.fixture(scope="module")
def filled(tmp_path_factory) -> tuple[Path, dict]:
    """Return a folder with the kernels of a training step, and what the process that filled it said."""
    folder = tmp_path_factory.mktemp("filled")
    return folder, answer(start(folder, "train"))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target / "cache"))


# ---- a process that finds everything


def test_training_with_a_filled_cache_imports_no_compiler_and_gives_the_same(filled):
    folder, first = filled
    assert "multiplyx" in "".join(first["compiled"])
    assert first["compilers"] == ["llvmlite", "numba"]
    again = answer(start(folder, "train"))
    assert again == {"compiled": [], "compilers": [], "results": first["results"]}


def test_the_cache_holds_nothing_else(filled):
    folder, first = filled
    names = {*(f"{name}.kernel" for name in first["compiled"]), "lead.kernel", "follow.kernel", "arguments.json"}
    assert {path.name for path in files(folder)} == names
    assert {path.parent for path in files(folder)} == {folder / f"edgetrain-{cache.fingerprint()}"}


def test_equal_names_from_different_processes_stay_apart(tmp_path):
    # Numba numbers its functions per process: both bodies are called unary.<locals>.body, version 1.
    for name in ("Relu", "Sigmoid"):
        answer(start(tmp_path, name))
    both = answer(start(tmp_path, "Relu", "Sigmoid"))
    assert both["compiled"] == []
    assert both["results"][0] == [[0, 0, 0]]
    assert both["results"][1] == [pytest.approx([0.11920292] * 3)]


# ---- damaged files, several processes


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "swapped"])
def test_a_damaged_kernel_is_compiled_again(filled, tmp_path, damage):
    folder, first = filled
    folder = copied(folder, tmp_path)
    victim, other = sorted(folder.rglob("*x*.kernel"))[:2]
    whole = victim.read_bytes()
    broken = {"cut": whole[:-100], "flipped": whole[:200] + b"\xff\xff" + whole[202:], "empty": b"",
              "swapped": other.read_bytes()}[damage]  # fmt: skip
    victim.write_bytes(broken)
    again = answer(start(folder, "train"))
    assert again["compiled"] == [victim.stem]
    assert again["results"] == first["results"]
    assert answer(start(folder, "train"))["compiled"] == []


def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path):
    together = [start(tmp_path, "Relu") for _ in range(3)]
    assert [answer(process)["results"] for process in together] == [[[[0, 0, 0]]]] * 3
    assert answer(start(tmp_path, "Relu"))["compiled"] == []
    assert not [path for path in files(tmp_path) if path.name.startswith(".")]


# ---- places


def test_the_first_place_that_can_be_written_is_taken_and_all_are_read(monkeypatch, tmp_path):
    blocked, ready, spare = tmp_path / "blocked", tmp_path / "ready", tmp_path / "spare"
    blocked.write_text("a file where a folder should be refuses even root")
    monkeypatch.setattr(cache, "places", lambda: [blocked, ready, spare])
    cache.write("one.kernel", b"content")
    assert [path.parent.parent for path in files(tmp_path) if path != blocked] == [ready]
    assert cache.describe() == {"folder": str(ready), "writable": True, "kernels": 1}
    monkeypatch.setattr(cache, "places", lambda: [spare, blocked, ready])
    assert cache.read("one.kernel") == b"content"
    assert cache.read("two.kernel") is None


def test_without_a_place_nothing_is_kept(monkeypatch, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    monkeypatch.setattr(cache, "places", lambda: [blocked])
    cache.write("one.kernel", b"content")
    assert cache.read("one.kernel") is None
    assert cache.describe() == {"folder": str(blocked), "writable": False, "kernels": 0}


def test_the_places(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    assert cache.places() == [tmp_path]
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.places() == [Path(cache.__file__).parent / "__pycache__", tmp_path / "edgetrain"]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache.places()[1] == Path("/home/somebody/.cache/edgetrain")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # as for a user without a home
    assert cache.places() == [Path(cache.__file__).parent / "__pycache__"]


def test_a_full_disk_leaves_no_part_of_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.write("one.kernel", b"content")
    assert files(tmp_path) == []


# ---- what the name of the folder depends on


@pytest.fixture
def sources(monkeypatch, tmp_path) -> Path:
    """Return a copy of the kernels' sources that stands for the real ones."""
    folder = tmp_path / "kernels"
    shutil.copytree(Path(cache.__file__).parent, folder, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(cache, "__file__", str(folder / "cache.py"))
    return folder


@pytest.mark.parametrize("name", ["dense", "simd", "tiles", "program"])
def test_any_edit_of_a_kernel_file_counts(sources, name):
    compute = cache.fingerprint.__wrapped__
    before = compute()
    assert before == compute() == cache.fingerprint()
    file = sources / f"{name}.py"
    text = file.read_text()
    file.write_text(text + "# edited\n")
    assert compute() != before
    file.write_text(text)
    assert compute() == before


def test_the_processor_counts(monkeypatch):
    monkeypatch.setattr(cache, "processor", lambda: ["aarch64", "CPU part: 0xd08"])
    assert cache.fingerprint.__wrapped__() != cache.fingerprint()


@pytest.mark.parametrize("package", ["numba", "llvmlite"])
def test_the_versions_of_the_compilers_count(monkeypatch, package):
    version_of = cache._version_of
    assert version_of(package)
    monkeypatch.setattr(cache, "_version_of", lambda name: b"1.0" if name == package else version_of(name))
    assert cache.fingerprint.__wrapped__() != cache.fingerprint()


def test_settings_of_numba_count(monkeypatch):
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert cache.fingerprint.__wrapped__() != cache.fingerprint()


def test_old_folders_go_and_the_latest_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    for age in range(6):
        old = tmp_path / f"edgetrain-{age}"
        old.mkdir()
        os.utime(old, (1e9 - age, 1e9 - age))
    (tmp_path / "of_somebody_else").mkdir()
    cache.write("one.kernel", b"content")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"of_somebody_else", f"edgetrain-{cache.fingerprint()}", *(f"edgetrain-{age}" for age in range(3))}


# ---- the objects


def undefined(content: bytes) -> set[str]:
    """Return the names that an ELF object of a 64-bit machine with low bytes first asks for."""
    assert content[:6] == b"\x7fELF\x02\x01"
    table, count = struct.unpack_from("<Q", content, 40)[0], struct.unpack_from("<H", content, 60)[0]
    sections = [struct.unpack_from("<IIQQQQIIQQ", content, table + 64 * number) for number in range(count)]
    start, size, strings = next((s[4], s[5], sections[s[6]][4]) for s in sections if s[1] == 2)
    found = set()
    for place in range(start + 24, start + size, 24):  # the first symbol is always empty
        name, _, _, section, _, _ = struct.unpack_from("<IBBHQQ", content, place)
        if section == 0:
            found.add(content[strings + name : content.index(b"\0", strings + name)].decode())
    return found


@pytest.fixture(scope="module")
def built_in() -> list[tuple[str, tuple[int, ...]]]:
    """Return the kernels of all built-in models, compiled."""
    kernels = warming.needed_kernels(load_profile("host"))
    registry.interpreter()
    for name, sizes in kernels:  # a test may have compiled some into a cache of its own (test_choice.py)
        if cache.read(cache.file_name("x".join([name, *map(str, sizes)]))) is None:
            registry._ADDRESSES.pop((name, sizes), None)
    registry.compile_kernels(kernels)
    return kernels


def test_objects_need_nothing_but_the_c_library(built_in):
    labels = ["lead", "follow", *("x".join([name, *map(str, sizes)]) for name, sizes in built_in)]
    needs = set().union(*(undefined(cache.read(cache.file_name(label))) for label in labels))
    assert "sched_yield" in needs
    assert needs <= LIBRARY_FUNCTIONS
    assert all(hasattr(ctypes.CDLL(None), name) for name in LIBRARY_FUNCTIONS)


def test_steps_are_timed_without_the_wait_for_a_compiler():
    """Of this thread, nested once, or of another one that compiles what all threads need."""

    def waited(wait):
        before, start = registry.working_clock(), time.perf_counter()
        wait()
        return registry.working_clock() - before, time.perf_counter() - start

    def nested():
        with registry._standing_clock(), registry._standing_clock():
            time.sleep(0.2)

    def behind_another():
        with registry._LOCK:
            thread.start()
            time.sleep(0.2)
        thread.join()

    told = []
    for wait in (registry.interpreter.__wrapped__, lambda: registry.compile_kernels([("stamp", ())])):
        thread = threading.Thread(target=lambda wait=wait: told.append(waited(wait)))
        behind_another()
    for worked, passed in (waited(nested), *told):
        assert passed >= 0.15
        assert worked < 0.1


def test_code_that_needs_more_is_refused():
    from numba import types

    getpid = types.ExternalFunction("getpid", types.int32())

    def body(args: int, first: int, last: int) -> None:
        getpid()

    with pytest.raises(GraphError, match="compiled code of 'asks' needs 'getpid', which is not in the C library"):
        compile_object(body, "asks", 3)


def test_compilation_switched_off_is_named(monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    with pytest.raises(GraphError, match="NUMBA_DISABLE_JIT is set, but kernels run compiled only"):
        compile_object(lambda args, first, last: None, "nothing", 3)


def test_arguments_are_known_with_and_without_the_cache(built_in):
    names = {name: arguments for name, (_, arguments) in registry.load_factories().items()}
    assert registry._cached_names.__wrapped__() == names
    assert registry.argument_names("sgd") == ("weight", "grad", "velocity", "count", "settings", "decay")
    with pytest.raises(GraphError, match="unknown kernel 'sdg'"):
        registry.argument_names("sdg")


def test_kernels_of_one_factory_have_addresses_of_their_own():
    both = [("unary", (4, RELU)), ("unary", (4, SIGMOID))]
    assert len(set(registry.compile_kernels(both).values())) == 2
    assert registry.compile_kernels(both) == registry.compile_kernels(both)


# ---- warmup


def test_warmup_leaves_nothing_to_compile(built_in, capsys):
    from edgetrain.cli import main

    texts = []
    for flags in (["--json"], []):
        with pytest.raises(SystemExit) as stopped:
            main(["warmup", *flags])
        assert stopped.value.code in (0, None)
        texts.append(capsys.readouterr().out)
    result = json.loads(texts[0])
    assert result["compiled"] == 0
    assert result["kernels"] == len(built_in)
    assert f"0 kernels compiled, {len(built_in)} were there" in texts[1]


@pytest.mark.parametrize("name", ["resnet8", "resnet32"])
@pytest.mark.parametrize("optimizer", [et.SGD(lr=0.1), et.AdamW()], ids=["sgd", "adamw"])
def test_warmup_covers_models_of_other_depths(built_in, name, optimizer):
    from edgetrain.catalog import build_model

    learner = et.Learner(build_model(name), optimizer=optimizer)
    assert set(learner.kernels()) <= set(built_in)


@pytest.mark.parametrize(("model", "batch_size"), [("lenet5", 32), ("lenet5", 2), ("cnn1d", 6)])
def test_a_learner_knows_its_kernels(model, batch_size):
    from edgetrain.catalog import build_model

    learner = et.Learner(build_model(model), batch_size=batch_size)
    known = set(learner.kernels())
    for count in range(1, batch_size + 1):
        assert set(learner.plans.plan(True, count).kernels) <= known
        assert set(learner.plans.plan(False, count).kernels) <= known


def test_a_learner_of_few_samples_knows_the_kernels_of_fewer():
    graph = et.Graph("connected", (16,))
    rng = np.random.default_rng(0)
    first, second = (graph.parameter(n, rng.normal(size=shape)) for n, shape in (("a", (64, 16)), ("b", (32, 64))))
    graph.set_outputs([graph.add("Gemm", [graph.add("Gemm", ["input", first], transB=1), second], transB=1)])
    policy = et.StaticSparse(0.5, distribution="uniform", dense_first=False)
    for sparsity in (None, policy):
        learner = et.Learner(graph, batch_size=4, sparsity=sparsity)
        known = set(learner.kernels())
        for count in (1, 2, 3, 4):
            assert set(learner.plans.plan(True, count).kernels) <= known


def test_warmup_shows_its_progress_and_takes_a_profile(monkeypatch, tmp_path, capsys):
    from tests.cli_support import run

    wanted = [("unary", (4, RELU)), ("unary", (4, SIGMOID))]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(registry, "_ADDRESSES", {})
    profiles: list[str] = []
    monkeypatch.setattr(warming, "needed_kernels", lambda profile: profiles.append(profile.name) or wanted)
    code, text, _ = run(capsys, "warmup", "--profile", "raspberrypi4")
    assert (code, profiles) == (0, ["raspberrypi4"])
    assert "compiling kernels (once) 1/2: unaryx4x0" in text
    assert "2 kernels compiled, 0 were there" in text
    assert f"kept in {tmp_path}" in text
    code, text, _ = run(capsys, "warmup", "--quiet")
    assert "compiling" not in text


@pytest.mark.parametrize("methods", [
    {"instance_filter": "eif:rate=0.25", "error_pruning": "channels:keep=0.7"}, {"sparsity": "swat:weights=0.9"},
    {"sparsity": "swat:weights=0.9,group=lanes"}, {"sparsity": "set:weights=0.9"},
    {"error_pruning": "gradients:rate=0.9"}, {"instance_filter": "selective"},
], ids=lambda methods: ",".join(methods.values()))  # fmt: skip
def test_warmup_covers_recipes_and_common_methods(built_in, methods):
    assert set(et.Learner(et.models.resnet(depth=20), **methods).kernels()) <= set(built_in)


# ---- before the first step


def wanted_of(monkeypatch) -> list[tuple[str, tuple[int, ...]]]:
    """Return the list of the kernels that are asked for from now on."""
    wanted: list[tuple[str, tuple[int, ...]]] = []
    find = registry._ADDRESSES.__class__.__contains__

    class Table(dict):
        def __contains__(self, key: object) -> bool:
            wanted.append(key)  # type: ignore[arg-type]
            return find(self, key)

    monkeypatch.setattr(registry, "_ADDRESSES", Table(registry._ADDRESSES))
    return wanted


def test_a_prepared_learner_waits_for_no_compiler(monkeypatch):
    methods = {"instance_filter": "eif:rate=0.4,start=64", "error_pruning": "channels:keep=0.7",
               "sparsity": "rigl:weights=0.9"}  # fmt: skip
    learner = et.Learner(et.models.lenet5(), batch_size=32, **methods)
    wanted = wanted_of(monkeypatch)
    learner.prepare()
    prepared = set(wanted)
    rng = np.random.default_rng(0)
    for _ in range(8):
        learner.observe(rng.random((80, 1, 28, 28), np.float32), rng.integers(0, 10, 80), predict=True)
    assert learner.step_count > 3
    assert set(wanted) == prepared


def test_fit_compiles_before_its_clock_starts(monkeypatch):
    learner = et.Learner(et.models.lenet5(), batch_size=32, instance_filter="eif:rate=0.4,start=64")
    wanted, at_first_step = wanted_of(monkeypatch), []
    rng = np.random.default_rng(0)
    data = rng.random((160, 1, 28, 28), np.float32), rng.integers(0, 10, 160)
    learner.fit(data, 2, validation=data, on_step=lambda event: at_first_step.append(len(set(wanted))))
    assert at_first_step[0] == at_first_step[-1] == len(set(wanted))


def test_dense_networks_need_no_kernel_more_for_any_number_of_samples():
    learner = et.Learner(et.models.lenet5(), batch_size=128)
    kernels = set(learner.kernels())
    for count in range(1, 129, 5):
        for training in (True, False):
            assert set(learner.plans.plan(training, count).kernels) <= kernels


def test_a_step_that_has_to_compile_is_timed_without_that(monkeypatch, tmp_path):
    from edgetrain.graph import Graph

    graph = Graph("tiny", input_shape=(3,))
    weights = graph.parameter("w", np.full((2, 3), 0.5, np.float32))
    graph.set_outputs([graph.add("Gemm", ["input", weights, graph.parameter("b", np.zeros(2))], transB=1)])
    x, y = np.eye(4, 3, dtype=np.float32), np.array([0, 1, 0, 1])
    for step in ("partial_fit", "observe"):
        monkeypatch.setattr(registry, "_ADDRESSES", {})
        monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / step))
        learner, compiled = et.Learner(graph, batch_size=4, threads=1), []
        monkeypatch.setattr(registry, "on_compile", [lambda *_, seen=compiled: seen.append(time.sleep(0.1))])
        start = time.perf_counter()
        seconds = getattr(learner, step)(x, y).seconds
        whole = time.perf_counter() - start
        assert compiled
        assert whole > 0.1 * len(compiled) > 5 * seconds
