"""Further peers of the benchmark: the same step as edgetrain's where they are installed, clear words where not."""

from __future__ import annotations

import configparser
import importlib
import json
import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from edgetrain.models._layers import Layers

import edgetrain as et
from edgetrain import bench, bench_mnn, bench_onert, bench_process, bench_tinygrad
from edgetrain.bench_contenders import batch_for, make_step
from edgetrain.catalog import build_model
from edgetrain.errors import UnsupportedError, UsageError
from edgetrain.graph import Graph
from edgetrain.learner import Learner
from edgetrain.onnx_io import save_onnx
from edgetrain.optim import SGD
from tests.cli_support import run

ROOT = Path(__file__).parents[1]
EVERY_PEER = pytest.mark.parametrize("peer", bench.PEERS)
STEPS, COUNT = 4, 4
MOMENTUM = {"onert": 0.0, "onnxruntime-training": 0.0}  # theirs; everyone else's is 0.9
# A peer in a process of its own: some bind it to processors or leave threads behind.
SCRIPT = f"""
import json, sys
from edgetrain.bench_contenders import make_step
from edgetrain.bench_process import Case
from edgetrain.errors import UnsupportedError
try:
    step = make_step(sys.argv[1], Case(sys.argv[2], {COUNT}, 1))
except UnsupportedError as error:
    sys.exit(f"UnsupportedError: {{error}}")
losses = []
for _ in range({STEPS}):
    before = step.loss() if hasattr(step, "loss") else None
    after = step()
    after = after.item() if hasattr(after, "item") else after
    losses.append(after if before is None else before)
print("\\n" + json.dumps({{"losses": losses, "facts": step.facts()}}))
"""


def separable() -> Graph:
    """Build a network with strided depthwise convolutions, and padding that differs from side to side."""
    net = Layers("separable", (2, 13, 12), 0, "kaiming_normal")
    x = net.relu(net.batch_norm(net.conv(net.input, "first", 8, (4, 3), stride=2, pads=(2, 1, 1, 1)), "norm1"))
    x = net.relu(net.batch_norm(net.conv(x, "depthwise", 8, (3, 3), stride=2, pads=(1, 1, 1, 1), groups=8), "norm2"))
    x = net.relu(net.batch_norm(net.conv(x, "pointwise", 12, (1, 1)), "norm3"))
    return net.finish(net.linear(net.pooled_features(x), "fc", 5))


NETWORKS = {
    "chain": lambda: et.models.lenet5((1, 16, 16)),
    "signals": lambda: et.models.cnn1d((3, 32)),
    "residual": lambda: et.models.resnet((3, 16, 16), depth=8),
    "separable": separable,
}


def own_losses(graph: Graph, momentum: float) -> list[float]:
    x, y = batch_for(graph.input_shape, graph.output_shape[0], COUNT)
    learner = Learner(graph, batch_size=COUNT, threads=1, optimizer=SGD(lr=0.01, momentum=momentum))
    return [learner.partial_fit(x, y).loss for _ in range(STEPS)]


def of_peer(peer: str, network: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, peer, str(network)], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize("name", NETWORKS)
@EVERY_PEER
def test_a_peer_takes_the_same_steps(peer, name, tmp_path):
    if not bench.available([peer]):
        pytest.skip(f"{peer} is not installed")
    path = tmp_path / "network.onnx"
    save_onnx(NETWORKS[name](), path)
    done = of_peer(peer, path)
    if peer == "onert" and name != "chain":
        assert "UnsupportedError: onert has no gradient of BatchNormalization" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["losses"] == pytest.approx(own_losses(build_model(str(path)), MOMENTUM.get(peer, 0.9)), rel=1e-3)
    assert found["facts"] == {}


# ---- without them ----------------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_installed(monkeypatch):
    """Let no module be found, and keep the process and its environment as they are."""

    def missing(name):
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    monkeypatch.setattr(os, "environ", dict(os.environ))


@EVERY_PEER
def test_a_peer_that_is_not_installed_says_so(nothing_installed, peer):
    with pytest.raises(UsageError, match=r"is not installed.*: pip install .*or leave that contender out"):
        make_step(peer, bench.Case("cnn1d", 2, 1))


def test_every_peer_is_a_contender_and_an_extra():
    assert set(bench.PEERS) < set(bench.CONTENDERS)
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    for peer in bench.PEERS:
        assert peer in extras[peer].lower(), peer


def test_the_command_names_every_peer(capsys):
    _, text, _ = run(capsys, "bench", "--help")
    words = " ".join(text.split())
    assert not [peer for peer in bench.PEERS if peer not in words.replace("- ", "-")]


@pytest.mark.parametrize("training", [True, False])
def test_onnxruntime_counts_with_its_training_part_alone(monkeypatch, tmp_path, training):
    spec = ModuleSpec("onnxruntime", None, is_package=True)
    spec.submodule_search_locations = [str(tmp_path)]
    (tmp_path / ("training" if training else "tools")).mkdir()
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: spec if name == "onnxruntime" else None)
    assert bench.available(["onnxruntime-training"]) == ["onnxruntime-training"] * training
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None)
    assert bench.available(bench.PEERS) == []


def test_tinygrad_finds_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_tinygrad.shutil, "which", lambda name: f"/somewhere/{name}")
    assert bench_tinygrad._compiler() == "/somewhere/clang"
    monkeypatch.setattr(bench_tinygrad.shutil, "which", lambda name: None)
    monkeypatch.setattr(bench_tinygrad.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="tinygrad needs clang: install it or pip install ziglang"):
        bench_tinygrad._compiler()
    zig = tmp_path / "zig"
    zig.write_text('#!/bin/sh\necho "zig $@"\n')
    zig.chmod(0o700)
    spec = ModuleSpec("ziglang", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(bench_tinygrad.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "cache"))
    for _ in range(2):
        done = subprocess.run([bench_tinygrad._compiler(), "-c", "a b"], capture_output=True, text=True, check=True)
        assert done.stdout == "zig clang -c a b\n"
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["clang"]


def odd_one() -> Graph:
    net = Layers("odd", (4, 6, 6), 0, "kaiming_normal")
    y = net.graph.add("Tanh", [net.input], name="odd")
    return net.finish(net.linear(net.flatten(y), "fc", 3))


def test_operators_outside_the_benchmark_are_refused():
    graph = odd_one()
    with pytest.raises(UnsupportedError, match="node 'odd': the benchmark's tinygrad side has no Tanh"):
        bench_tinygrad._operator(graph.nodes[0])
    with pytest.raises(UnsupportedError, match="node 'odd': the benchmark's MNN side has no Tanh"):
        bench_mnn._layer(Anything(), None, graph, graph.nodes[0])


def test_gradients_that_are_missing_or_wrong_are_refused():
    with pytest.raises(UnsupportedError, match="onert has no gradient of BatchNormalization"):
        bench_onert._check_trainable(separable())
    net = Layers("groups", (4, 6, 6), 0, "kaiming_normal")
    graph = net.finish(net.linear(net.flatten(net.conv(net.input, "halves", 4, (3, 3), groups=2)), "fc", 3))
    with pytest.raises(UnsupportedError, match="node 'halves': MNN's gradient of grouped convolutions is wrong"):
        bench_mnn._conv(Anything(), None, graph, graph.nodes[0])


class Anything:
    """A module of which any function returns what it was given first."""

    def __getattr__(self, name: str):
        return Anything()

    def __call__(self, *given):
        return given[0] if given else None


def test_sides_and_orders_of_axes():
    assert bench_mnn._two([3, 4], 1) == [4, 3]
    assert bench_mnn._two([3], 1) == [3, 1]
    assert bench_mnn._sides([1, 2, 3, 4]) == [(0, 0), (0, 0), (1, 3), (2, 4)]
    assert bench_mnn._sides([1, 2]) == [(0, 0), (0, 0), (0, 0), (1, 2)]


# ---- comparison and document -----------------------------------------------------------------------------------------

FAKE = """
import json, sys
order = json.loads(sys.stdin.readline())
name = order["contender"]
kind = {"error": "no Conv here", "kind": "UnsupportedError"} if name == "onert" else {"ready": True}
print(json.dumps(kind), flush=True)
for line in sys.stdin:
    order = json.loads(line)
    seconds = [{"edgetrain": 1e-3}.get(name, 5e-3)] * order.get("steps", 0)
    print(json.dumps({"facts": {}} if "facts" in order else {"seconds": seconds, "resident_bytes": 1}), flush=True)
"""


@pytest.fixture
def fakes(monkeypatch):
    monkeypatch.setattr(bench_process, "_COMMAND", [sys.executable, "-S", "-c", FAKE])
    monkeypatch.setattr(bench, "_GAP_SECONDS", 0.0)


def test_against_compares_with_one_peer(fakes):
    found = bench.against("jax", bench.Case("cnn1d", 2, 1), turns=2, turn_seconds=0.0)
    assert found["ratio"] == pytest.approx(5.0)
    assert found["seconds"] == pytest.approx([1e-3, 5e-3])
    assert (found["peer"], found["left_out"]) == ("jax", None)
    found = bench.against("onert", bench.Case("cnn1d", 2, 1), turns=2, turn_seconds=0.0)
    assert (found["ratio"], found["seconds"], found["left_out"]) == (None, None, "no Conv here")


@pytest.fixture
def performance(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    for name in ("machines", "performance", "performance_document"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    module = importlib.import_module("performance")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "here" / "performance.json")
    monkeypatch.setattr(module, "DOCUMENT", tmp_path / "performance.md")
    monkeypatch.setattr(module.metadata, "version", lambda name: "1.2")
    return module


def test_peers_are_gathered_from_several_runs(performance, fakes, monkeypatch):
    empty = performance.load()
    here = {"machine": performance.machines.facts(), "versions": {"torch": "9"}}
    performance.machines.write(performance.RESULTS, {**empty, **here})
    for peer in ("jax", "onert"):
        monkeypatch.setattr(sys, "argv", ["performance.py", "--parts", "peers", "--peers", peer, "--turns", "2",
                                          "--threads", "2", "--batches", "8", "--only", "lenet5"])  # fmt: skip
        performance.main()
    stored = json.loads(performance.RESULTS.read_text())
    assert list(stored["peers"]) == ["jax/lenet5/8/2", "onert/lenet5/8/2"]
    assert stored["versions"] == {"torch": "9"}, "a peer's environment is not that of the other parts"
    text = performance.DOCUMENT.read_text()
    assert "| jax 1.2 | lenet5 | 8 | 2 | 1.000 | 5.000 | 5.00 |" in text
    assert "Geometric means of the ratios: jax 5.00." in text
    assert "Left out: onert, lenet5: no Conv here." in text
    for peer in bench.PEERS:
        assert f"- **{peer}**" in text, peer
