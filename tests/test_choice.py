"""The choice of kernels and tiles: rules, candidates, calibration, and that no tile changes a bit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain import bench_tiles, calibration, choice
from edgetrain.calibration import Finding
from edgetrain.choice import Sizes, Tile, candidates, choose, planning_for, rule, trial
from edgetrain.devices import load_profile
from edgetrain.kernel_table import kernel_table
from edgetrain.kernels.codes import CHANNELS, DEPTHWISE, SAMPLES
from tests.cli_support import run

# ---- rules ----

MULTIPLY, CORRELATE = "multiply", "correlate"
# Sizes -> the tile with 32 registers (16 lanes), the tile with 16 (8 lanes).
RULES = {
    "many pixels": (Sizes(MULTIPLY, SAMPLES, 16, 32, 256, 144), (4, 4), (4, 3)),
    "two pixels": (Sizes(MULTIPLY, SAMPLES, 16, 120, 2, 400), (8, 2), (6, 2)),
    "one pixel": (Sizes(MULTIPLY, SAMPLES, 16, 120, 1, 400), (16, 1), (12, 1)),
    "one channel": (Sizes(MULTIPLY, SAMPLES, 16, 1, 576, 9, 16), (1, 8), (1, 8)),
    "six channels": (Sizes(MULTIPLY, SAMPLES, 16, 6, 784, 25), (6, 4), (4, 3)),
    "weight gradient": (Sizes(CORRELATE, SAMPLES, 16, 32, 256, 144), (4, 4), (4, 3)),
    "weight gradient, six channels": (Sizes(CORRELATE, SAMPLES, 16, 6, 784, 25), (6, 3), (4, 3)),
    "weight gradient, one channel": (Sizes(CORRELATE, SAMPLES, 16, 1, 64, 25), (1, 13), (1, 9)),
    "channels, one vector": (Sizes(MULTIPLY, CHANNELS, 8, 8, 256, 27), (8, 12), (8, 8)),
    "channels, two vectors": (Sizes(MULTIPLY, CHANNELS, 8, 16, 256, 27), (16, 8), (16, 5)),
    "channels, one pixel": (Sizes(MULTIPLY, CHANNELS, 8, 32, 1, 27), (32, 1), (32, 1)),
    "channels, four pixels": (Sizes(MULTIPLY, CHANNELS, 8, 64, 4, 27), (32, 4), (16, 4)),
    "channels, four pixels of one vector": (Sizes(MULTIPLY, CHANNELS, 8, 8, 4, 27), (8, 12), (8, 8)),
    "channels, depthwise": (Sizes(MULTIPLY, DEPTHWISE, 8, 8, 256, 9, 4), (8, 8), (8, 6)),
    "channels, weight gradient": (Sizes(CORRELATE, CHANNELS, 8, 8, 256, 27), (8, 12), (8, 9)),
    "channels, wide weight gradient": (Sizes(CORRELATE, CHANNELS, 8, 64, 256, 27), (16, 8), (16, 5)),
    "channels, depthwise weight gradient": (Sizes(CORRELATE, DEPTHWISE, 8, 8, 256, 25, 4), (8, 13), (8, 9)),
}


@pytest.fixture(params=[32, 16])
def registers(request, monkeypatch) -> int:
    monkeypatch.setattr(choice, "_host", lambda: choice.Target(16, request.param))
    return int(request.param)


@pytest.fixture
def folder(monkeypatch, tmp_path) -> Iterator[Path]:
    """Return a folder of its own for calibrations."""
    monkeypatch.setattr(calibration.cache, "places", lambda: [tmp_path / "package", tmp_path / "user"])
    calibration.forget()
    yield tmp_path / "user"
    calibration.forget()


@pytest.mark.parametrize("name", RULES)
def test_rule(folder, registers, name):
    sizes, with_32, with_16 = RULES[name]
    wanted = with_32 if registers == 32 else with_16
    assert rule(sizes) == wanted
    assert choose(sizes) == choice.TileChoice(sizes, wanted, "rule")


@pytest.mark.parametrize("name", RULES)
def test_candidates_fit_registers_and_sizes(registers, name):
    sizes = RULES[name][0]
    found = candidates(sizes)
    assert found[0] == rule(sizes)
    assert len(found) == len(set(found)) <= 13
    unit = 1 if sizes.kind == SAMPLES else sizes.lanes
    for channels, width in found[1:]:
        assert channels % unit == 0
        assert channels // unit * width < registers
        assert channels <= 16 or sizes.kind != SAMPLES  # rows of weights and biases are read that far
        assert channels <= max(unit, 1.25 * sizes.channels)


def test_a_profile_gets_the_tiles_of_its_own_registers(monkeypatch):
    monkeypatch.setattr(choice, "_host", lambda: choice.Target(16, 32))
    sizes = RULES["many pixels"][0]
    assert (rule(sizes), choice.simd_lanes()) == ((4, 4), 16)
    with planning_for(load_profile("generic-x86_64")):
        lanes = choice.simd_lanes()
        assert rule(sizes) == ((4, 3) if lanes < 16 else (4, 4))
    with planning_for(load_profile("raspberrypi4")):
        assert (rule(sizes), choice.simd_lanes()) == ((4, 4), 4)
    assert choice.simd_lanes() == 16


# ---- results ----

GRAPHS = {
    "samples": (lambda: et.models.mobilenet_v1((3, 32, 32), width=0.25), 8),
    "channels": (lambda: et.models.mobilenet_v1((3, 32, 32), width=0.25), 1),
    "samples, 5x5 and fully connected": (et.models.lenet5, 8),
}


def results(graph: et.Graph, size: int, number: int) -> dict[str, bytes]:
    """Return the parameters after two steps in which every product has its candidate of this number."""

    def tile(sizes: Sizes) -> Tile:
        tiles = candidates(sizes)
        return tiles[min(number, len(tiles) - 1)]

    with trial(tile):
        learner = et.Learner(graph, batch_size=size, threads=2, optimizer=et.SGD(lr=0.05, momentum=0.9))
        rng = np.random.default_rng(0)
        for _ in range(2):
            x = rng.standard_normal((size, *graph.input_shape), np.float32)
            learner.partial_fit(x, rng.integers(0, 10, size))
        return {name: array.tobytes() for name, array in learner.parameters().items()}


@pytest.mark.parametrize("name", GRAPHS)
def test_no_tile_changes_a_bit(name):
    build, size = GRAPHS[name]
    graph = build()
    usual = results(graph, size, 0)
    for number in range(1, 13):
        assert results(graph, size, number) == usual, f"candidates number {number}"


# ---- calibration ----

FOUND = Finding((4, 4), (8, 3), 1.3, 15)
PRODUCT = Sizes(MULTIPLY, SAMPLES, 16, 32, 576, 16)


def test_a_calibration_replaces_the_rule_and_says_so(folder, monkeypatch):
    monkeypatch.setattr(choice, "_host", lambda: choice.Target(16, 32))
    other = Sizes(MULTIPLY, SAMPLES, 16, 32, 576, 17)
    file = calibration.keep({PRODUCT.label: FOUND, other.label: Finding((4, 4), (4, 4), 1.0, 15)})
    assert choose(PRODUCT) == choice.TileChoice(PRODUCT, (8, 3), "calibration")
    assert choose(other).reason == "rule"
    assert json.loads(file.read_text())["products"][PRODUCT.label]["tile"] == [8, 3]
    assert [path.name for path in folder.iterdir()] == [file.name]


def test_a_calibration_is_kept_in_the_users_folder_under_the_kernels_fingerprint(folder):
    assert calibration.keep({}) == folder / f"calibration-{calibration.cache.fingerprint()}.json"


def test_findings_are_added_to_former_ones(folder):
    calibration.keep({"a": FOUND})
    calibration.keep({"b": FOUND})
    assert calibration.findings() == {"a": FOUND, "b": FOUND}


def test_a_calibration_is_not_for_other_devices(folder, monkeypatch):
    monkeypatch.setattr(choice, "_host", lambda: choice.Target(16, 32))
    calibration.keep({PRODUCT.label: FOUND})
    with planning_for(load_profile("raspberrypi4")):
        assert choose(PRODUCT).reason == "rule"


def test_a_tile_that_no_calibration_would_try_is_not_used(folder, monkeypatch):
    monkeypatch.setattr(choice, "_host", lambda: choice.Target(16, 32))
    calibration.keep({PRODUCT.label: Finding((4, 4), (64, 1), 9.0, 15)})
    assert choose(PRODUCT).tile == (4, 4)


DAMAGES = {"cut": '{"products": {', "list": "[]", "no tile": '{"products": {"a": {"rule": [4, 4]}}}',
           "three": '{"products": {"a": {"rule": [4, 4], "tile": [1, 2, 3], "gain": 1, "rounds": 2}}}',
           "zero": '{"products": {"a": {"rule": [4, 4], "tile": [0, 2], "gain": 1, "rounds": 2}}}'}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_calibration_is_not_used_and_named(folder, capsys, damage):
    assert calibration.state() == "none"
    file = calibration.keep({PRODUCT.label: FOUND})
    assert calibration.state() == "found"
    file.write_text(DAMAGES[damage])
    calibration.forget()
    assert calibration.state() == "damaged"
    assert choose(PRODUCT).reason == "rule"
    _, text, _ = run(capsys, "doctor")
    assert f"{file} is damaged and not used; make it again with edgetrain doctor --calibrate" in text
    calibration.keep({PRODUCT.label: FOUND})
    assert calibration.state() == "found"


def test_a_full_disk_leaves_the_former_calibration(folder, monkeypatch):
    calibration.keep({"a": FOUND})

    def full(path: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        calibration.keep({"b": FOUND})
    calibration.forget()
    assert list(calibration.findings()) == ["a"]
    assert len(list(folder.iterdir())) == 1


# ---- measuring ----


def test_only_what_wins_clearly_in_both_comparisons_replaces_the_rule(folder, monkeypatch):
    """Times are made up: one product has a better tile, one only in the first comparison, one hardly."""
    graph = et.models.cnn1d((6, 32))
    comparisons: list[int] = []
    real = bench_tiles._Steps.compare

    def compare(steps, fewest, most):
        comparisons.append(len(steps._learners))
        return real(steps, 3, 3)

    def spent(steps, learner):
        choices = dict.fromkeys(row.choice for row in learner.training_plan().rows if row.choice is not None)
        return {c.sizes: 1e-3 / speed(list(steps.products(learner)).index(c.sizes), c) for c in choices}

    def speed(number: int, of: choice.TileChoice) -> float:
        if of.tile == rule(of.sizes):
            return 1.0
        other = {0: 1.5, 1: 1.5 if len(comparisons) == 1 else 0.9, 2: 1.03}
        return other.get(number, 0.8)

    monkeypatch.setattr(bench_tiles._Steps, "compare", compare)
    monkeypatch.setattr(bench_tiles._Steps, "_time", spent)
    said: list[str] = []
    found = bench_tiles.find_tiles(graph, load_profile("host"), 8, threads=1, say=said.append)
    first, *others = found.items()
    assert first[1].tile != first[1].rule
    assert first[1].gain == pytest.approx(1.5)
    assert all(finding == Finding(finding.rule, finding.rule, 1.0, 3) for _, finding in others)
    assert comparisons[1] == 2, "the winners meet the rule alone"
    assert said[-1] == "2 candidates to compare with the rule again"
    assert bench_tiles.find_tiles(graph, load_profile("host"), 8, threads=1, known=found) == {}
    assert calibration.state() == "none", "nobody but the command line keeps what was found"


def test_products_too_short_to_be_timed_keep_the_rule(monkeypatch):
    monkeypatch.setattr(bench_tiles, "_SHORTEST_SECONDS", 1e9)
    found = bench_tiles.find_tiles(et.models.cnn1d((6, 32)), load_profile("host"), 8, threads=1)
    assert found
    assert all(finding.tile == finding.rule for finding in found.values())


# ---- the table and the command ----


def test_table_has_every_product_of_a_step():
    uses = kernel_table(et.models.cnn1d(), load_profile("host"), 8)
    graph = et.Learner(et.models.cnn1d(), batch_size=8).training_plan().graph
    products = [n.name for n in graph.nodes if n.op_type in ("Conv", "Gemm") or n.op_type.startswith("ProductWeight")]
    assert set(products) <= {name for use in uses for name in use.nodes}
    assert {use.product for use in uses} == {"forward", "input gradient", "weight gradient"}
    assert all(use.jobs > 0 and use.kernel for use in uses)


def test_equal_layers_are_one_row():
    uses = kernel_table(et.models.resnet((3, 32, 32), depth=20), load_profile("host"), 8)
    assert max(len(use.nodes) for use in uses) >= 5


def test_command_prints_the_table(folder, capsys):
    code, text, _ = run(capsys, "doctor", "--kernels", "--model", "lenet5", "--batch-size", "32")
    assert code == 0
    assert text.splitlines()[0] == "profile host, batch size 32; calibration: none"
    assert text.splitlines()[2] == "lenet5"
    row = next(line for line in text.splitlines() if line.startswith("6@14x14 -> 16@10x10, 5x5"))
    assert row.endswith("rule")
    code, text, _ = run(capsys, "doctor", "--kernels", "--model", "lenet5", "--profile", "raspberrypi4", "--json")
    uses = json.loads(text)["models"]["lenet5"]
    assert {use["lanes"] for use in uses} == {4}
    assert all(use["tile"] for use in uses)


INPUT, WEIGHT = "input gradient", "weight gradient"


@pytest.mark.parametrize(
    ("flag", "method", "expected"),
    [("--sparsity=rigl:weights=0.95", "lists of weights", {"forward", "both gradients"}),
     ("--sparsity=swat:weights=0,activations=0.9", "lists of activations", {WEIGHT}),
     ("--error-pruning=gradients:group=lanes", "lists of errors", {INPUT, WEIGHT}),
     ("--error-pruning=channels:keep=0.5", "winograd", {"forward", INPUT, WEIGHT})],
)  # fmt: skip
def test_command_prints_the_kernels_of_methods(folder, capsys, flag, method, expected):
    code, text, _ = run(capsys, "doctor", "--kernels", "--model", "resnet8", "--batch-size", "32", flag, "--json")
    uses = [use for use in json.loads(text)["models"]["resnet8"] if use["method"] == method]
    assert code == 0
    assert {use["product"] for use in uses} == expected


def test_a_winograd_kernel_is_shown_with_its_tile():
    uses = kernel_table(et.models.resnet((3, 32, 32), depth=8), load_profile("host"), 32)
    tiles = {use.tile for use in uses if use.kernel == "winograd"}
    assert tiles
    assert tiles <= set(choice._WINOGRAD[choice.target().registers].values())


def test_command_calibrates_and_the_table_tells(folder, capsys, monkeypatch):
    timed = bench_tiles._Steps._time

    def rule_is_slow(steps, learner):  # so that there is something to keep, whatever the machine does
        factor = 10 if learner is steps._learners[0] else 1
        return {sizes: factor * seconds for sizes, seconds in timed(steps, learner).items()}

    monkeypatch.setattr(bench_tiles._Steps, "_time", rule_is_slow)
    monkeypatch.setattr(bench_tiles, "_SHORTEST_SECONDS", 1e-9)
    flags = ("--model", "cnn1d", "--batch-size", "2")
    code, text, progress = run(capsys, "doctor", "--calibrate", *flags, "--json")
    assert code == 0
    assert "[1/1] cnn1d, batch size 2" in progress
    result = json.loads(text)
    assert Path(result["file"]).is_file()
    assert result["products"] >= len(result["replaced"]) > 0
    _, text, _ = run(capsys, "doctor", "--kernels", *flags, "--json")
    assert {use["reason"] for use in json.loads(text)["models"]["cnn1d"]} >= {"calibration"}
    _, text, _ = run(capsys, "doctor")
    assert f"{len(result['replaced'])} of {result['products']} tiles replaced" in text
    code, text, _ = run(capsys, "doctor", "--calibrate", *flags, "--quiet")
    assert "products measured in" in text


ERRORS = {
    "both": (("--kernels", "--calibrate"), "--kernels and --calibrate are given, expected one of them"),
    "model alone": (("--model", "lenet5"), "add --kernels or --calibrate"),
    "unknown model": (("--kernels", "--model", "lenet6"), "unknown model 'lenet6'"),
    "method alone": (("--sparsity", "rigl"), "say which kernels: add --kernels"),
    "unknown method": (("--kernels", "--sparsity", "rogl"), "rogl"),
    "batch of nothing": (("--kernels", "--batch-size", "0"), "batch_size=0, expected an integer of at least 1"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_command_refuses(folder, capsys, name):
    flags, message = ERRORS[name]
    code, text, error = run(capsys, "doctor", *flags)
    assert (code, text) == (2, "")
    assert message in error


def test_command_names_a_folder_that_cannot_be_written(capsys, monkeypatch, tmp_path):
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder should be refuses even root")
    monkeypatch.setattr(calibration.cache, "places", lambda: [blocked])
    monkeypatch.setattr("edgetrain.cli.kernels.find_tiles", lambda *a, **b: {"a": FOUND})
    calibration.forget()
    code, _, error = run(capsys, "doctor", "--calibrate", "--model", "cnn1d")
    assert code == 2
    assert f"{blocked}" in error
    assert "set NUMBA_CACHE_DIR to a folder you may write" in error
    calibration.forget()


@pytest.mark.parametrize(("kib", "cores", "share"), [(1024, 4, 256), (512, None, 512), (512, 1, 512), (None, None, 0)])
def test_a_core_has_its_share_of_the_second_level_cache(kib, cores, share):
    profile = replace(load_profile("raspberrypi4"), l2_kib=kib, l2_shared_by_cores=cores)
    with choice.planning_for(profile):
        assert choice.target().l2_kib == share
