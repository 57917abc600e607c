"""Checkpoints: going on exactly, surviving crashes, and refusing what is damaged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors

import edgetrain as et
from edgetrain import checkpoint
from edgetrain.checkpoint import load_checkpoint, read_checkpoint, save_checkpoint, write_file
from edgetrain.errors import CheckpointError, GraphError
from edgetrain.fitting import fit_loop
from edgetrain.graph import Graph, Normalization
from edgetrain.graph_json import graph_from_dict, graph_to_dict
from tests.cli_support import ROOT


def small_graph() -> Graph:
    """Convolution, batch normalisation, dropout and a dense layer on 1x4x4 images, three classes."""
    rng = np.random.default_rng(7)
    graph = Graph("small", input_shape=(1, 4, 4))
    weight = graph.parameter("conv.weight", rng.normal(size=(4, 1, 3, 3)))
    x = graph.add("Conv", ["input", weight], name="conv", kernel_shape=(3, 3), pads=(1, 1, 1, 1))
    names = [graph.parameter(f"norm.{name}", np.full(4, value), trainable)
             for name, value, trainable in (("weight", 1, True), ("bias", 0, True),
                                            ("running_mean", 0, False), ("running_var", 1, False))]  # fmt: skip
    x = graph.add("BatchNormalization", [x, *names], name="norm")
    x = graph.add("Dropout", [graph.add("Relu", [x])], ratio=0.3)
    x = graph.add("Flatten", [x])
    dense = [graph.parameter("fc.weight", 0.3 * rng.normal(size=(3, 64))), graph.parameter("fc.bias", np.zeros(3))]
    graph.set_outputs([graph.add("Gemm", [x, *dense], name="fc", transB=1)])
    return graph


def data(count: int = 22) -> et.Dataset:
    rng = np.random.default_rng(3)
    return et.Dataset.from_arrays(rng.integers(0, 256, (count, 1, 4, 4)).astype(np.uint8), np.arange(count) % 3)


OPTIMIZERS = {
    "sgd": lambda: et.SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, schedule=et.Schedule("cosine")),
    "adam": lambda: et.Adam(lr=0.01),
    "adamw": lambda: et.AdamW(lr=0.01, clip_norm=1.0),
}


def learner(optimizer: str = "sgd") -> et.Learner:
    return et.Learner(small_graph(), batch_size=4, seed=5, threads=1, optimizer=OPTIMIZERS[optimizer]())


@pytest.fixture
def saved(tmp_path) -> Path:
    path = tmp_path / "last.safetensors"
    trained = learner()
    fit_loop(trained, data(), 1)
    save_checkpoint(trained, path)
    return path


@pytest.mark.parametrize("stop_after", [0, 2, 6, 9], ids=lambda n: f"after_{n}_steps")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_loading_and_going_on_equals_one_go(tmp_path, optimizer, stop_after):
    through = learner(optimizer)
    expected = fit_loop(through, data(), 2, validation=data(9))
    part = learner(optimizer)
    fit_loop(part, data(), 2, validation=data(9), should_stop=lambda: part.step_count >= stop_after)
    save_checkpoint(part, tmp_path / "part.safetensors")
    loaded = load_checkpoint(tmp_path / "part.safetensors")
    assert loaded.step_count == stop_after
    history = fit_loop(loaded, data(), 2, validation=data(9))
    assert history.column("loss") == expected.column("loss")
    assert history.column("validation_loss") == expected.column("validation_loss")
    found = loaded.parameters()
    for name, array in through.parameters().items():
        assert np.array_equal(found[name], array), name


def test_settings_and_model_come_back(tmp_path):
    before = et.Learner(
        small_graph(), profile="raspberrypi4", batch_size=3, seed=11, threads=2, optimizer=et.Adam(lr=0.003)
    )
    before.graph.class_names, before.graph.softmax_output = ("a", "b", "c"), True
    before.graph.normalization = Normalization(np.array([0.1], np.float32), np.array([1 / 3], np.float32))
    save_checkpoint(before, tmp_path / "x.safetensors")
    after = load_checkpoint(tmp_path / "x.safetensors")
    assert (after.batch_size, after.seed, after.threads) == (3, 11, 2)
    assert after.profile == before.profile
    assert after.optimizer == before.optimizer
    assert (after.graph.class_names, after.graph.softmax_output) == (("a", "b", "c"), True)
    assert after.graph.normalization.std == np.float32(1 / 3)
    x, _ = data().take(np.arange(5))
    assert np.array_equal(after.predict_proba(x), before.predict_proba(x))


def test_saving_changes_nothing_and_is_repeatable(tmp_path):
    trained = learner()
    fit_loop(trained, data(), 1)
    before = trained.parameters()
    save_checkpoint(trained, tmp_path / "a.safetensors")
    save_checkpoint(trained, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert all(np.array_equal(before[name], array) for name, array in trained.parameters().items())


def test_loading_and_saving_again_gives_the_same_tensors(saved):
    again = saved.with_name("again.safetensors")
    save_checkpoint(load_checkpoint(saved), again)
    first, second = read_checkpoint(saved)[0], read_checkpoint(again)[0]
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_weights_are_stored_once(saved):
    _, table = read_checkpoint(saved)
    assert "graph/fc.weight" in table["aliases"]


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99])
def test_truncated_file(saved, share):
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match=r"last\.safetensors: not a whole checkpoint .* use another checkpoint"):
        load_checkpoint(saved)


def test_flipped_bit_in_a_tensor(saved):
    content = bytearray(saved.read_bytes())
    content[-5] ^= 1
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the content does not match its SHA-256"):
        load_checkpoint(saved)


def test_changed_setting(saved):
    content = saved.read_bytes().replace(b'\\"batch_size\\": 4', b'\\"batch_size\\": 5')
    saved.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its SHA-256"):
        load_checkpoint(saved)


def test_other_format_version(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT_VERSION", 99)
        save_checkpoint(learner(), tmp_path / "new.safetensors")
    with pytest.raises(CheckpointError, match=r"new\.safetensors: format version 99, expected 1; load it with the"):
        load_checkpoint(tmp_path / "new.safetensors")


def test_file_of_another_program(tmp_path):
    from safetensors.numpy import save_file

    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="a safetensors file, but not written by edgetrain"):
        load_checkpoint(tmp_path / "other.safetensors")


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone\.safetensors: no such checkpoint; check the path"):
        load_checkpoint(tmp_path / "gone.safetensors")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"cannot be written \(No such file or directory\)"):
        save_checkpoint(learner(), tmp_path / "gone" / "x.safetensors")


def test_safetensors_reads_every_kind_of_array(tmp_path):
    names = ["bool", "uint8", "int32", "int64", "uint64", "float32", "float64"]
    tensors = {f"{name} é": np.arange(6).reshape(2, 3).astype(name) for name in names}
    tensors |= {"none": np.zeros((0, 3), np.float32), "one": np.array(2.5), "odd": np.ones(3, np.uint8)}
    write_file(tmp_path / "file", *checkpoint._encode(tensors, {"a": 1}))
    with safetensors.safe_open(tmp_path / "file", "numpy") as file:
        assert json.loads(file.metadata()["edgetrain"])["a"] == 1
        assert set(file.keys()) == set(tensors)
        for name, array in tensors.items():
            assert file.get_tensor(name).dtype == array.dtype
            np.testing.assert_array_equal(file.get_tensor(name), array)


def test_numbers_lie_aligned_in_the_file():
    tensors = {name: np.ones(3, name) for name in ("bool", "uint8", "int32", "float32", "float64")}
    start = checkpoint._encode(tensors, {})[0]
    header = checkpoint._header(start)
    assert len(start) % 8 == 0
    assert all(header[name]["data_offsets"][0] % array.itemsize == 0 for name, array in tensors.items())


@pytest.mark.parametrize("trainable", [True, False])
def test_scalars_keep_their_shape(tmp_path, trainable):
    graph = Graph("scaled", input_shape=(4,))
    x = graph.add("Mul", ["input", graph.parameter("scale", np.float32(2), trainable)])
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("w", np.ones((3, 4)))], transB=1)])
    some = et.Learner(graph, batch_size=4, optimizer=et.SGD(lr=0.1, momentum=0.9))
    x, y = np.random.default_rng(0).random((4, 4), np.float32), np.arange(4) % 3
    some.partial_fit(x, y)
    save_checkpoint(some, tmp_path / "file")
    other = load_checkpoint(tmp_path / "file")
    for learner in (some, other):
        learner.partial_fit(x, y)
    assert other.parameters()["scale"].shape == ()
    np.testing.assert_array_equal(other.logits(x), some.logits(x))


def test_saving_takes_the_state_once(tmp_path):
    """Not three times: beside the copy of the state nothing as large as the file is made."""
    weight = np.zeros((1000, 800), np.float32)
    graph = Graph("large", input_shape=(800,))
    graph.set_outputs([graph.add("Gemm", ["input", graph.parameter("w", weight)], transB=1)])
    some = et.Learner(graph, batch_size=8)
    some.partial_fit(np.random.default_rng(0).random((8, 800), np.float32), np.arange(8))
    save_checkpoint(some, tmp_path / "first")
    tracemalloc.start()
    save_checkpoint(some, tmp_path / "file")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.2 * (tmp_path / "file").stat().st_size


def test_crash_while_writing_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")

    def crash(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(CheckpointError, match=r"file: cannot be written \(No space left on device\); free space"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_link_is_followed_and_rights_stay(tmp_path):
    (tmp_path / "there").mkdir()
    target, link = tmp_path / "there/file", tmp_path / "link"
    target.write_bytes(b"old")
    target.chmod(0o640)
    link.symlink_to("there/file")
    write_file(link, b"new")
    assert link.is_symlink()
    assert (target.read_bytes(), target.stat().st_mode & 0o777) == (b"new", 0o640)


def test_what_is_no_file_is_not_replaced(tmp_path):
    """A device, say: as root, /dev/null would become a file."""
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match=r"pipe: cannot be written \(it is no regular file\)"):
        write_file(tmp_path / "pipe", b"new")
    assert (tmp_path / "pipe").is_fifo()


@pytest.mark.parametrize("name", ["/dev/stdout", "/proc/self/fd/1", "/dev/fd/1"])
def test_what_standard_output_was_sent_to_is_not_replaced(name, tmp_path):
    script = f"from edgetrain.files import replace_file; print('a line', flush=True); replace_file({name!r}, b'new')"
    with (tmp_path / "log").open("w") as log:
        done = subprocess.run([sys.executable, "-c", script], stdout=log, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert "it is no regular file" in done.stderr
    assert (tmp_path / "log").read_text() == "a line\n"


def test_read_only_file_system_is_one_message_about_the_file(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("edgetrain.files._write_synced", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(CheckpointError, match=r"file: cannot be written \(Read-only file system\); free space or"):
        write_file(tmp_path / "file", b"new")


@pytest.mark.parametrize("name", ["file", "file[1]*"])
def test_orphans_of_dead_processes_are_removed_others_stay(tmp_path, name):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    orphan, other = tmp_path / f".{name}.{dead.pid}.tmp", tmp_path / ".other.tmp"
    living = tmp_path / f".{name}.{os.getppid()}.tmp"
    strange = tmp_path / f".{name}.notes.tmp"
    for file in (orphan, other, living, strange):
        file.write_bytes(b"")
    write_file(tmp_path / name, b"new")
    assert not orphan.exists()
    assert not strange.exists()
    assert other.exists()
    assert living.exists()


def test_a_file_of_another_users_process_stays(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "kill", refuse)
    theirs = tmp_path / ".file.1.tmp"
    theirs.write_bytes(b"")
    write_file(tmp_path / "file", b"new")
    assert theirs.exists()


def test_every_thread_writes_a_file_of_its_own(tmp_path, monkeypatch):
    written = []
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda *paths: (written.append(paths[0]), replace(*paths)))
    threads = [threading.Thread(target=write_file, args=(tmp_path / "file", b"new")) for _ in range(2)]
    barrier = threading.Barrier(2)
    monkeypatch.setattr("edgetrain.files._remove_orphans", lambda path: barrier.wait(10))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(written)) == 2
    assert {path.name.split(".")[-2] for path in written} == {str(os.getpid())}  # whose file it is


def test_file_is_synced_before_it_gets_its_name(tmp_path, monkeypatch):
    calls, sizes = [], []
    fsync, rename = os.fsync, os.replace

    def noted(handle):
        calls.append("fsync")
        sizes.append(os.fstat(handle).st_size)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), rename(*paths)))
    write_file(tmp_path / "file", b"new")
    assert calls == ["fsync", "rename", "fsync"]
    assert sizes[0] == len(b"new")


# ---- the graph as JSON


@pytest.mark.parametrize("name", ["lenet5", "resnet8", "mobilenet_v1_0.25", "ds_cnn", "cnn1d"])
def test_graph_round_trip(name):
    from edgetrain.catalog import build_model

    graph = build_model(name)
    again = graph_from_dict(json.loads(json.dumps(graph_to_dict(graph))), graph.arrays)
    assert list(again.values.items()) == list(graph.values.items())
    assert again.nodes == graph.nodes
    assert (again.inputs, again.outputs, again.trainable) == (graph.inputs, graph.outputs, graph.trainable)
    assert list(again.arrays) == list(graph.arrays)


def test_graph_whose_array_is_missing_or_has_another_shape():
    graph = small_graph()
    table = graph_to_dict(graph)
    with pytest.raises(GraphError, match=r"stored graph: KeyError\('conv.weight'\)"):
        graph_from_dict(table, {})
    with pytest.raises(GraphError, match=r"'fc.bias' has shape \(4,\), expected \(3,\)"):
        graph_from_dict(table, graph.arrays | {"fc.bias": np.zeros(4, np.float32)})


def test_attribute_that_json_lacks():
    graph = Graph("odd", input_shape=(3,))
    graph.set_outputs([graph.add("Flatten", ["input"], name="flat")])
    graph.nodes[0].attributes["axis"] = object()
    with pytest.raises(GraphError, match=r"node 'flat' .Flatten.: attribute 'axis' is object, not storable"):
        graph_to_dict(graph)
