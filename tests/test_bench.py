"""The benchmark: protocol with its contenders, statistics, load of the machine, time per node, document, command."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain import bench, bench_process
from edgetrain.bench_load import Load, Watch
from edgetrain.bench_ops import RestoredStep, RowsStep, timings
from edgetrain.errors import BenchmarkError, EdgetrainError, NumericalError, UnsupportedError, UsageError
from edgetrain.learner import Learner
from tests.cli_support import run

ROOT = Path(__file__).parents[1]
CASE = bench.Case("cnn1d", 2, 1)
# A contender that answers at once; its name says how it behaves.
FAKE = """
import json, os, sys, time
order = json.loads(sys.stdin.readline())
name = order["contender"]
def answer(**message):
    print(json.dumps(message), flush=True)
if name == "torch-dies":
    sys.exit("ImportError: no such library")
if name == "torch-cannot":
    answer(error="no Conv here", kind="UnsupportedError")
elif name == "torch-missing":
    answer(error="not installed", kind="UsageError")
elif name == "torch-odd":
    answer(error="something else", kind="ZeroDivisionError")
else:
    answer(ready=True)
slow = {"edgetrain": 1, "torch": 4, "torch-channels-last": 3, "sgemm": 2}.get(name, 1)
for line in sys.stdin:
    order = json.loads(line)
    if name == "torch-dies-later":
        os.kill(os.getpid(), 9)
    if name == "torch-hangs":
        time.sleep(60)
    if "facts" in order:
        facts = {"macs": 1_000_000, "planned_bytes": {"weights": 100, "activations": 28}, "library": "a BLAS"}
        answer(facts=facts)
    else:
        seconds = [slow * 1e-3 * (1 + 0.1 * (i % 3)) for i in range(order["steps"])]
        answer(seconds=seconds, resident_bytes=slow * 1000)
"""


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(bench_process, "_COMMAND", [sys.executable, "-S", "-c", FAKE])
    monkeypatch.setattr(bench, "_GAP_SECONDS", 0.0)


# ---- protocol --------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_tell_their_facts(fakes):
    result = bench.compare(CASE, ["edgetrain", "torch"], turns=3, turn_seconds=0.005)
    own, other = result.timings
    assert [own.contender, other.contender] == ["edgetrain", "torch"]
    assert len(own.seconds) == 3 * 5
    assert len(other.seconds) == 3 * 1
    assert own.resident_bytes == 1000
    assert own.facts["macs"] == 1_000_000
    assert own.first_step_seconds > 0
    assert result.timing("jax") is None


def test_a_turn_has_one_step_at_least(fakes):
    result = bench.compare(CASE, ["edgetrain"], turns=4, turn_seconds=0.0)
    assert len(result.timings[0].seconds) == 4


DEATHS = {
    "torch-dies": r"the contender 'torch-dies' ended early \(exit code 1\): ImportError: no such library; mend",
    "torch-dies-later": r"the contender 'torch-dies-later' ended early \(exit code -9\): it left no message",
    "torch-odd": "something else",
}


@pytest.mark.parametrize("name", DEATHS)
def test_a_contender_that_dies_gives_one_error(fakes, name):
    with pytest.raises(BenchmarkError, match=DEATHS[name]):
        bench.compare(CASE, ["edgetrain", name], turns=1)


def test_a_contender_that_hangs_is_ended(fakes, monkeypatch):
    monkeypatch.setattr(bench_process, "_ANSWER_SECONDS", 0.5)
    with pytest.raises(BenchmarkError, match="'torch-hangs' ended early"):
        bench.compare(CASE, ["torch-hangs"], turns=1)


def test_a_contender_that_cannot_is_left_out(fakes):
    result = bench.compare(CASE, ["edgetrain", "torch-cannot"], turns=1)
    assert [timing.contender for timing in result.timings] == ["edgetrain"]
    assert result.left_out == {"torch-cannot": "no Conv here"}


def test_a_contender_that_is_not_installed_is_an_error(fakes):
    with pytest.raises(UsageError, match="not installed"):
        bench.compare(CASE, ["torch-missing"], turns=1)


def test_a_contender_ends_with_its_parent():
    code = (
        "import os, time\nfrom edgetrain.bench_process import Case, ContenderProcess\n"
        "process = ContenderProcess('sgemm', Case('cnn1d', 1, 1))\n"
        "print(process._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    stat = Path(f"/proc/{done.stdout.strip()}/stat")
    for _ in range(100):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    pytest.fail("the contender outlived its parent")


@pytest.mark.parametrize("name", ["torch-channels-last", "nobody"])
def test_contenders_refuse_what_they_cannot_do(name):
    pytest.importorskip("torch")
    expected = UnsupportedError if name.startswith("torch") else UsageError
    with pytest.raises(expected, match=r"channels_last is for images|contender 'nobody' is unknown"):
        bench_process.ContenderProcess(name, CASE)


def test_peak_memory_is_the_process_own():
    from edgetrain.bench_contenders import peak_resident

    ballast = np.ones(50_000_000)  # ru_maxrss of a child starts at what its parent once had
    script = "from edgetrain.bench_contenders import peak_resident; print(peak_resident())"
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(child.stdout) < ballast.nbytes < peak_resident()


# ---- statistics ------------------------------------------------------------------------------------------------------


def timing(contender: str, *seconds: float, resident_bytes: int = 0) -> bench.Timing:
    return bench.Timing(contender, list(seconds), resident_bytes=resident_bytes)


def test_median_and_95_percent():
    values = timing("edgetrain", *range(1, 101))
    assert values.median == 50.5
    assert values.p95 == 95
    assert timing("edgetrain", 3.0).p95 == 3.0


def test_ratio_is_to_the_better_pytorch_alone():
    own, torch = timing("edgetrain", 1, 2, 9), [timing("torch", 8), timing("torch-channels-last", 6)]
    assert bench.ratio([own, *torch, timing("jax", 1)]) == 3.0
    assert bench.ratio([own, timing("jax", 1)]) is None
    assert bench.ratio(torch) is None


def test_result_of_a_comparison(fakes):
    comparison = bench.compare(CASE, ["edgetrain", "torch", "torch-channels-last", "sgemm"], turns=3, turn_seconds=0.0)
    comparison.load = Load(0.5, 0.0, ("pytest",))
    result = json.loads(json.dumps(bench.result_of(CASE, comparison)))
    assert result["ratio"] == pytest.approx(3.0)
    assert result["best_torch"] == "torch-channels-last"
    assert result["memory_share"] == pytest.approx(1 / 3)
    assert result["sgemm"] == {"gflops": pytest.approx(1.0), "library": "a BLAS"}
    assert result["contenders"]["edgetrain"]["gflops"] == pytest.approx(2.0)
    assert result["contenders"]["edgetrain"]["sgemm_share"] == pytest.approx(2.0)
    assert result["contenders"]["torch"]["images_per_second"] == pytest.approx(500.0)
    assert "sgemm" not in result["contenders"]
    assert result["planned_bytes"] == {"weights": 100, "activations": 28}
    assert result["busy"]
    assert result["load"]["names"] == ["pytest"]


def test_start_up_uses_a_cache_of_its_own(fakes):
    found = bench.start_up(CASE, ["edgetrain", "torch", "torch-cannot"], repeats=2)
    assert list(found) == ["edgetrain", "torch"]
    assert found["edgetrain"]["cold_seconds"] > 0
    assert found["torch"]["cold_seconds"] is None


def test_available():
    assert bench.available(["edgetrain"]) == ["edgetrain"]
    with pytest.raises(UsageError, match="contender 'touch' is unknown; expected one of edgetrain, torch"):
        bench.available(["touch"])


# ---- load of the machine ---------------------------------------------------------------------------------------------


def write_proc(folder: Path, user: int, stolen: int, ticks: int) -> None:
    (folder / "77").mkdir(exist_ok=True)
    (folder / "stat").write_text(f"cpu  {user} 0 0 500 0 0 0 {stolen} 0 0\ncpu0 0\n")
    (folder / "77" / "stat").write_text(f"77 (some (odd) name) R {' '.join(['0'] * 10)} {ticks} 0 0\n")


def test_load_counts_others_and_names_them(tmp_path, monkeypatch):
    from edgetrain import bench_load

    clock = iter([10.0, 12.0])
    monkeypatch.setattr(bench_load.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(bench_load.os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    second = os.sysconf("SC_CLK_TCK")
    write_proc(tmp_path, 100, 0, 100)
    watch = Watch(tmp_path)
    write_proc(tmp_path, 100 + 2 * second, second // 10, 100 + second)
    load = watch.load()
    assert load == Load(1.0, 0.05, ("some (odd) name",))
    assert load.busy
    assert not Load(0.1, 0.1).busy


def test_load_is_unknown_without_proc(tmp_path):
    assert Watch(tmp_path).load() is None


def test_load_of_this_machine_is_plausible():
    watch = Watch()
    time.sleep(0.3)  # the kernel counts in hundredths of a second
    load = watch.load()
    assert load is None or 0 <= load.others <= 2 * (os.cpu_count() or 1)


# ---- time per node ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> et.Graph:
    return et.models.cnn1d()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_with_clocks_is_the_same_step(tiny, threads):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, *tiny.input_shape)).astype(np.float32), np.arange(4) % tiny.output_shape[0]
    plain, timed = (Learner(tiny, batch_size=4, threads=min(threads, os.cpu_count() or 1)) for _ in range(2))
    for _ in range(2):
        plain.partial_fit(x, y)
        seconds = timed.time_rows(x, y)
    assert seconds.shape == (len(timed.training_plan().rows) + 1,)
    assert (seconds > 0).all()
    assert timed.step_count == 2
    for name, array in plain.parameters().items():
        assert np.array_equal(timed.parameters()[name], array), name


def test_a_broken_step_is_refused_with_clocks_too(tiny):
    learner = Learner(tiny, batch_size=4, threads=1)
    broken = {name: np.full_like(array, 1e38) for name, array in learner.parameters().items() if "weight" in name}
    learner.load_parameters({**learner.parameters(), **broken})
    with pytest.raises(NumericalError, match="not finite"):
        learner.time_rows(np.ones((4, *tiny.input_shape), np.float32), np.zeros(4, np.int64))


def test_every_row_belongs_to_one_node(tiny):
    learner = Learner(tiny, batch_size=4, threads=1)
    plan = learner.training_plan()
    ops = timings(plan, np.full(len(plan.rows), 1e-3), 4)
    assert sum(op.rows for op in ops) == len(plan.rows)
    assert sum(op.seconds for op in ops) == pytest.approx(1e-3 * len(plan.rows))
    step = learner.partial_fit(np.ones((4, *tiny.input_shape), np.float32), np.zeros(4, np.int64))
    assert sum(op.macs for op in ops) == step.macs_done
    convolution = next(op for op in ops if op.op_type == "Conv")
    assert "@1x128 -> " in convolution.shape
    weights = next(op for op in ops if op.op_type == "ProductWeightGrad" and op.shape == convolution.shape)
    assert weights.macs == convolution.macs
    assert convolution.to_dict()["gflops"] == pytest.approx(2e-9 * convolution.macs / convolution.seconds)
    assert convolution.nbytes >= 4 * 4 * tiny.input_shape[0] * 128


def test_facts_of_the_row_contender(tiny):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, *tiny.input_shape)).astype(np.float32)
    step = RowsStep(tiny, CASE, x, np.zeros(2, np.int64))
    for _ in range(3):
        step()
    facts = json.loads(json.dumps(step.facts()))
    assert {"ops", "sum_seconds", "step_seconds", "overhead_seconds"} == set(facts)
    assert facts["ops"][-1]["stage"] == "update"


# ---- document --------------------------------------------------------------------------------------------------------


@pytest.fixture
def performance(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("machines", "performance", "performance_document"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module("performance")


def stored_case(model: str, batch_size: int, threads: int, ratio: float = 4.0, busy: bool = False) -> dict:
    numbers = {"median_seconds": 0.01 / threads, "p95_seconds": 0.02, "steps": 15, "images_per_second": 100.0,
               "gflops": 50.0, "sgemm_share": 0.5, "resident_bytes": 2**20 * 30, "first_step_seconds": 1.0}  # fmt: skip
    torch = {**numbers, "median_seconds": numbers["median_seconds"] * ratio, "resident_bytes": 2**20 * 100}
    return {"model": model, "batch_size": batch_size, "threads": threads, "ratio": ratio, "best_torch": "torch",
            "memory_share": 0.3, "sgemm": {"gflops": 100.0, "library": "a BLAS"}, "planned_bytes": {"weights": 2**20},
            "contenders": {"edgetrain": numbers, "torch": torch}, "left_out": {}, "load": None, "busy": busy,
            "date": "2026-01-02"}  # fmt: skip


def sample(performance) -> dict:
    cases = {
        f"{model}/{batch}/{threads}": stored_case(model, batch, threads)
        for model in bench.MODELS for batch in bench.BATCH_SIZES for threads in bench.THREADS
    }  # fmt: skip
    own, torch = {"warm_seconds": 1.0, "cold_seconds": 9.0}, {"warm_seconds": 3.0, "cold_seconds": None}
    starts = {"edgetrain": own, "torch": torch}
    entry = {"batch_size": 32, "threads": 2, "contenders": starts, "date": "2026-01-03"}
    ops = [{"shape": f"{size} -> {size}, 3x3", "op_type": kind, "gflops": 90.0}
           for size in performance.KERNEL_SIZES for kind in performance.KERNEL_KINDS]  # fmt: skip
    kernels = performance.kernel_shares({"ops": ops, "sgemm": {"gflops": 100.0, "library": "a BLAS"}, "busy": False})
    idle = {"busy": False, "date": "2026-01-03"}
    scaling = {"model": "resnet20", "batch_size": 32, "gain": 1.9, "sgemm_gain": 2.0, "seconds": [0.19, 0.1], **idle}
    decayed = {"model": "lenet5", "batch_size": 32, "threads": 2, "ratio": 1.01, "seconds": [0.1, 0.101], **idle}
    seconds = {"python": 0.01, "import": 0.1, "help": 0.2, "warmup": 50.0}
    commands = {name: {"seconds": number, "kernels": 100, **idle} for name, number in seconds.items()}
    return {"machine": performance.machines.facts(), "versions": {"edgetrain": "0"}, "cases": cases,
            "start_up": {"lenet5": entry}, "kernels": {"resnet20": {**kernels, "date": "2026-01-03"}},
            "scaling": {"resnet20/32": scaling}, "decayed": {"lenet5/32/2": decayed},
            "commands": commands, "peers": {}}  # fmt: skip


def bars(performance, stored: dict) -> dict[str, bool | None]:
    found = sys.modules["performance_document"].bars(stored)
    return {what: met for what, _, _, met in found}


def test_document_from_stored_results(performance):
    stored = sample(performance)
    text = performance.document([json.loads(json.dumps(stored))])
    assert "| lenet5 | 4.00 | 4.00 | 4.00 | 4.00 |" in text
    assert "Geometric mean of 20 cells: **4.00**." in text
    assert "| ratio of lenet5, batch 8 | at least 6 | 4.00 | **no** |" in text
    assert "| lenet5 | 1 | 1 | 1.0 | 30.0 | 100.0 | 30% |" in text
    assert "| 16@32x32 | forward | 90.0 | 90% | 1 |" in text
    assert "| lenet5 | 32 | 2 | edgetrain | 1.00 | 9.0 |" in text
    assert "| edgetrain warmup, with an empty kernel cache | 50.00 |" in text
    assert "warmup compiles 100 kernels" in text
    assert "resnet20 at batch 32 gains 1.90 (190.0 to 100.0 ms), the machine's sgemm 2.00." in text
    assert "| lenet5 | 32 | 2 | 100.000 | 101.000 | 1.01 |" in text
    assert "Measured: 2026-01-02 to 2026-01-03" in text
    assert "Not measured yet" not in text
    met = bars(performance, stored)
    assert met.pop("ratio of lenet5, batch 8") is False
    assert all(met.values())


def test_document_claims_nothing_that_was_not_measured(performance):
    stored = sample(performance)
    del stored["cases"]["resnet20/128/2"]
    stored["cases"]["cnn1d/1/2"]["busy"] = stored["kernels"]["resnet20"]["busy"] = True
    stored["scaling"]["resnet20/32"]["busy"] = stored["commands"]["help"]["busy"] = True
    stored["decayed"]["lenet5/32/2"]["busy"] = True
    text, met = performance.document([stored]), bars(performance, stored)
    assert "Not measured yet (model/batch/threads): resnet20/128/2." in text
    assert (
        "**Not to be trusted**, something else used the machine: cnn1d/1/2, kernels resnet20, scaling resnet20/32, "
        in text
    )
    assert "4.00 (18 of 20 cells)" in text
    unknown = {what for what, is_met in met.items() if is_met is None}
    assert {"ratio, geometric mean", "ratio, lowest cell", "memory, highest share of PyTorch's",
            "1 to 2 threads, resnet20, batch 32", "edgetrain --help",
            "time on decayed weights over that on usual ones, highest"} < unknown  # fmt: skip
    assert sum("convolutions" in what for what in unknown) == 3
    empty = {part: {} for part in stored}
    assert not any(bars(performance, empty).values())
    empty["machine"] = stored["machine"]
    assert "## Bars" in performance.document([empty])


def test_results_of_one_machine_never_stand_under_another(performance, monkeypatch, tmp_path):
    monkeypatch.setattr(performance, "RESULTS", tmp_path / "here" / "performance.json")
    monkeypatch.setattr(performance, "DOCUMENT", tmp_path / "performance.md")
    monkeypatch.setattr(sys, "argv", ["performance.py", "--document"])
    away = sample(performance)
    away["machine"] = {**away["machine"], "cpu": "Another (TM)"}
    performance.machines.write(tmp_path / "another" / "performance.json", away)
    performance.main()
    text = performance.DOCUMENT.read_text()
    assert "## Another (TM) (" in text
    assert text.count("### Bars") == 1
    performance.machines.write(performance.RESULTS, sample(performance))
    performance.main()
    assert performance.DOCUMENT.read_text().count("### Bars") == 2
    assert json.loads((tmp_path / "another" / "performance.json").read_text()) == away
    facts = {"cpu": "Intel(R) Xeon(R) Processor", "architecture": "x86_64", "cores": 2, "simd": "avx2", "ram_mib": 1}
    monkeypatch.setattr(performance.machines, "host_facts", lambda: facts)
    assert performance.machines.results_file("a.json").parts[-3:] == ("results", "intel-xeon-processor", "a.json")


def test_a_run_stores_every_result_and_goes_on(performance, monkeypatch, tmp_path):
    measured = []

    def measure(case, contenders, turns):
        measured.append(str(case))
        return stored_case(case.model, case.batch_size, case.threads, busy=len(measured) == 1)

    monkeypatch.setattr(performance, "RESULTS", tmp_path / "results" / "performance.json")
    monkeypatch.setattr(performance, "DOCUMENT", tmp_path / "performance.md")
    monkeypatch.setattr(performance.bench, "measure", measure)
    start = {"edgetrain": {"warm_seconds": 1.0, "cold_seconds": 1.23456789}}
    monkeypatch.setattr(performance.bench, "start_up", lambda case, contenders: start)
    monkeypatch.setattr(sys, "argv", ["performance.py", "--only", "cnn1d", "--batches", "1", "8", "--threads", "1",
                                      "--parts", "cases", "start_up"])  # fmt: skip
    performance.main()
    assert measured == ["cnn1d, batch 1, 1 thread", "cnn1d, batch 8, 1 thread"]
    performance.main()
    assert measured[2:] == ["cnn1d, batch 1, 1 thread"], "only the cell that was busy is measured again"
    stored = json.loads(performance.RESULTS.read_text())
    assert list(stored["cases"]) == ["cnn1d/1/1", "cnn1d/8/1"]
    assert stored["start_up"]["cnn1d"]["contenders"]["edgetrain"]["cold_seconds"] == 1.2346
    before = (tmp_path / "performance.md").read_text()
    (tmp_path / "performance.md").unlink()
    monkeypatch.setattr(sys, "argv", ["performance.py", "--document"])
    performance.main()
    assert (tmp_path / "performance.md").read_text() == before
    assert len(measured) == 3


def test_halves_and_parts(performance, monkeypatch, tmp_path):
    assert performance.parts_of([1]) == ["cases", "kernels", "scaling"]
    assert performance.parts_of([2]) == ["cases", "start_up", "decayed", "commands"]
    assert sorted(performance.parts_of([1, 2])) == sorted({*performance.parts_of([1]), *performance.parts_of([2])})
    monkeypatch.setattr(performance, "RESULTS", tmp_path / "here" / "performance.json")
    monkeypatch.setattr(performance, "DOCUMENT", tmp_path / "performance.md")
    ran: list[str] = []

    def command(words):
        ran.append(words[-1])
        return 0.1 * len(ran), '{"compiled": 7}'

    monkeypatch.setattr(performance, "run_command", command)
    monkeypatch.setattr(performance, "_COMMAND_REPEATS", 3)
    monkeypatch.setattr(sys, "argv", ["performance.py", "--parts", "commands"])
    performance.main()
    stored = json.loads(performance.RESULTS.read_text())
    assert stored["cases"] == {}
    assert stored["commands"]["import"]["seconds"] == pytest.approx(0.5)
    assert stored["commands"]["warmup"]["kernels"] == 7
    assert "| edgetrain --help |" in performance.DOCUMENT.read_text()


def test_commands_run_with_an_empty_kernel_cache(performance, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", "/of/somebody/else")
    seconds, text = performance.run_command(("-c", "import os; print(os.listdir(os.environ['NUMBA_CACHE_DIR']))"))
    assert text == "[]\n"
    assert seconds > 0


def test_scaling_compares_one_thread_with_two(fakes):
    found = bench.scaling("cnn1d", 2, turns=2, turn_seconds=0.0)
    assert found["gain"] == pytest.approx(1.0)
    assert found["sgemm_gain"] == pytest.approx(1.0)
    assert found["seconds"] == [pytest.approx(1e-3, rel=0.3)] * 2
    assert {"model", "batch_size", "busy", "load"} < set(found)


def test_decayed_compares_two_sides_of_one_step(fakes):
    found = bench.decayed(CASE, turns=2, turn_seconds=0.0)
    assert found["ratio"] == pytest.approx(1.0)
    assert len(found["seconds"]) == 2


@pytest.mark.parametrize("decayed", [None, 1e-40], ids=["usual", "decayed"])
def test_every_restored_step_starts_from_the_same_weights(tiny, monkeypatch, decayed):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, *tiny.input_shape)).astype(np.float32), np.zeros(2, np.int64)
    step = RestoredStep(tiny, CASE, x, y, decayed)
    real, before = step.learner.partial_fit, []

    def watched(*batch):
        before.append(step.learner.parameters())
        return real(*batch)

    monkeypatch.setattr(step.learner, "partial_fit", watched)
    for _ in range(2):
        step()
    for name, array in tiny.arrays.items():
        if array.ndim > 1:
            wanted = array if decayed is None else np.full_like(array, decayed)
            assert (before[0][name] == wanted).all()
            assert (before[1][name] == wanted).all()
    assert any((array != before[0][name]).any() for name, array in before[1].items()), "it does train"


# ---- command ---------------------------------------------------------------------------------------------------------

TINY = ["bench", "--model", "cnn1d", "--batch-size", "2", "--threads", "1", "--turns", "2"]


def test_command_times_edgetrain_alone(capsys, tmp_path):
    out = tmp_path / "result.json"
    code, text, progress = run(capsys, *TINY, "--contenders", "edgetrain", "--no-start-up", "--out", out)
    assert code == 0
    assert text.splitlines()[0].split()[:3] == ["model", "batch", "threads"]
    assert text.splitlines()[1].split()[:4] == ["cnn1d", "2", "1", "edgetrain"]
    assert "[1/1] cnn1d, batch 2, 1 thread" in progress
    case = json.loads(out.read_text())["cases"][0]
    assert case["ratio"] is None
    assert case["contenders"]["edgetrain"]["steps"] >= 2
    assert case["sgemm"]["gflops"] > 0


def test_command_says_when_pytorch_is_missing(capsys, monkeypatch, fakes):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "torch" else object())
    code, text, _ = run(capsys, *TINY)
    assert code == 0
    assert "PyTorch is not installed: edgetrain is timed alone" in text
    assert "with an empty kernel cache" in text
    code, text, message = run(capsys, *TINY, "--contenders", "torch")
    assert (code, text) == (2, "")
    assert "contender 'torch' needs the package 'torch', which is not installed" in message


def test_command_compares_and_prints_json(capsys, monkeypatch, fakes):
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: object())
    code, text, progress = run(capsys, *TINY, "--batch-size", "4", "--json")
    result = json.loads(text)
    assert code == 0
    assert set(result) == {"cases", "start_up", "geometric_mean_ratio", "notes"}
    assert [case["batch_size"] for case in result["cases"]] == [2, 4]
    assert result["geometric_mean_ratio"] == pytest.approx(3.0, rel=0.2)
    assert set(result["start_up"]["cnn1d"]) == {"batch_size", "threads", *bench.DEFAULT_CONTENDERS}
    assert "[2/2] cnn1d, batch 4, 1 thread" in progress


def test_command_per_op(capsys):
    code, text, _ = run(capsys, *TINY, "--per-op")
    assert code == 0
    assert "ProductWeightGrad" in text
    assert "sum of the nodes" in text
    assert "GB/s" in text


ERRORS = {
    "unknown contender": ([*TINY, "--contenders", "tf"], "contender 'tf' is unknown"),
    "too many threads": ([*TINY, "--threads", "9999"], "--threads is 9999, this machine has"),
    "no folder": ([*TINY, "--out", "/no/such/folder/x.json"], "which cannot be written (No such file or directory)"),
    "a device as file": ([*TINY, "--out", "/dev/null"], "which cannot be written (it is no regular file)"),
    "a folder as file": ([*TINY, "--out", "/tmp"], "--out is '/tmp', which cannot be written (Is a directory)"),
    "no turns": (["bench", "--turns", "0"], "--turns"),
    "unknown model": (["bench", "--model", "lenet6", "--contenders", "edgetrain"], "unknown model 'lenet6'; did you"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_command_errors(capsys, name):
    arguments, message = ERRORS[name]
    code, text, err = run(capsys, *arguments)
    assert (code, text) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_errors_are_edgetrains():
    assert issubclass(BenchmarkError, EdgetrainError)
