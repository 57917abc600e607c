"""Streams: what observe reports, counting the two modes apart, bounded memory, and readers that read once."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

import edgetrain as et
from edgetrain.data import load_dataset
from edgetrain.data.streaming import _JsonLines, open_stream
from edgetrain.errors import DataError, NumericalError, UsageError
from edgetrain.history import Totals
from tests.cli_support import ROOT
from tests.test_filters import instances, learner, network

SHAPE = (1, 28, 28)


def never() -> bool:
    return False


# ---- observe ---------------------------------------------------------------------------------------------------------


def test_without_a_filter_every_full_micro_batch_is_trained_on():
    some, plain, (x, y, _) = learner(), learner(), instances(40)
    results = [some.observe(x[i : i + 1], y[i : i + 1]) for i in range(40)]
    assert [r.instances_trained for r in results] == ([0] * 15 + [16]) * 2 + [0] * 8
    assert all(math.isnan(r.loss) for r in results if not r.instances_trained)
    steps = [plain.partial_fit(x[:16], y[:16]), plain.partial_fit(x[16:32], y[16:32])]
    assert [results[15].loss, results[31].loss] == [step.loss for step in steps]
    assert some.stream.waiting == 8
    for key, array in plain.parameters().items():
        assert array.tobytes() == some.parameters()[key].tobytes()


@pytest.mark.parametrize("chosen", [None, "random:rate=1.0", "eif:start=1000"])
def test_the_callers_arrays_may_be_used_again(chosen):
    own, shared = learner(chosen), learner(chosen)
    x, y, _ = instances(60)
    buffer, labels = np.empty((4, *x.shape[1:]), np.float32), np.empty(4, np.int64)
    for start in range(0, 60, 4):
        buffer[:], labels[:] = x[start : start + 4], y[start : start + 4]
        shared.observe(buffer, labels)
        buffer[:] = np.nan
        own.observe(x[start : start + 4], y[start : start + 4])
    for name, array in own.parameters().items():
        np.testing.assert_array_equal(array, shared.parameters()[name])


def overheard(some: et.Learner) -> tuple[list[float], list[float]]:
    """Return the mean losses of steps, and those that the filter is told, of what a learner does from now on."""
    steps, told, learn, partial_fit = [], [], some.stream._selector.learn, some.partial_fit

    def step(x, y):
        result = partial_fit(x, y)
        steps.append(result.loss)
        return result

    def hear(x, y, losses):
        told.append(losses.mean())
        return learn(x, y, losses)

    some.partial_fit, some.stream._selector.learn = step, hear
    return steps, told


@pytest.mark.parametrize("policy", ["rigl:weights=0.5,refresh=3,total_steps=40",
                                    "swat:weights=0.5,variant=momentum,refresh=3"])  # fmt: skip
def test_a_filter_hears_the_losses_of_the_step_that_was_taken(policy, tmp_path):
    """Steps that keep the gradients of missing weights, or change what runs on lists, have plans of their own."""
    some = learner("eif:rate=0.9,start=0", sparsity=policy)
    x, y, _ = instances(240)
    for seed in range(4):  # what comes first after loading is another kind of step each time
        steps, told = overheard(some)
        for start in range(0, 200, 40):
            some.observe(x[start : start + 40], y[start : start + 40])
        some.observe(x[200 : 217 + seed], y[200 : 217 + seed])
        np.testing.assert_allclose(told, steps, rtol=1e-5)
        some.save(tmp_path / "a.safetensors")
        some = et.Learner.load(tmp_path / "a.safetensors")
    assert len(told) > 8


def test_flush_trains_on_the_rest():
    some, (x, y, _) = learner(), instances(20)
    some.observe(x, y)
    rest = some.flush()
    assert (rest.instances_trained, rest.instances_seen, some.stream.waiting) == (4, 0, 0)
    assert some.flush() is None


@pytest.mark.parametrize("mode", ["train", "predict"])
def test_what_flush_does_is_counted_where_its_instances_were(mode, tmp_path):
    some, (x, y, _) = learner(et.RandomFilter(rate=0.5)), instances(100)
    some.observe(x, y, predict=mode == "predict")
    some.save(tmp_path / "a.safetensors")
    accuracy = some.stream.accuracy
    for each in (et.Learner.load(tmp_path / "a.safetensors"), some):
        before = each.stream.totals[mode].instances_trained
        rest = each.flush()
        total = each.stream.totals[mode]
        assert total.instances_trained == total.instances_kept == before + rest.instances_trained
        assert rest.instances_trained
        assert total.macs_dense - total.macs_done == total.saved_filter
        assert total.judged == (100 if mode == "predict" else total.instances_trained)
    if mode == "predict":
        assert some.stream.accuracy == accuracy
    else:
        assert some.stream.totals["predict"] == Totals()


def test_flush_waits_for_steps_of_other_threads():
    some, (x, y, _) = learner(), instances(4)
    some.observe(x, y)
    with some._lock:
        thread = threading.Thread(target=some.flush)
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert some.stream.waiting == 4
    thread.join(60)
    assert some.stream.waiting == 0


def test_predictions_come_before_learning():
    some, (x, y, _) = learner(), instances(16)
    expected = some.evaluate(x, y)
    result = some.observe(x, y, predict=True)
    assert result.loss == pytest.approx(expected["loss"])
    assert result.correct == round(16 * expected["accuracy"])
    assert some.stream.accuracy == pytest.approx(expected["accuracy"])
    assert some.stream.recent_accuracy == pytest.approx(expected["accuracy"])
    assert result.instances_trained == 16


def test_the_recent_accuracy_fades_by_instances_not_by_calls():
    some, hits, number, start = learner(), 0.0, 0.0, 0
    x, y, _ = instances(1600)
    for size in (1, 99, 500, 1000):
        result = some.observe(x[start : start + size], y[start : start + size], predict=True)
        hits, number = hits * 0.999**size + result.correct, number * 0.999**size + size
        start += size
        assert some.stream.recent_accuracy == pytest.approx(hits / number)
    assert some.stream.recent_accuracy > some.stream.accuracy + 0.005  # it has learned meanwhile
    before = some.stream.recent_accuracy
    some.observe(x[:100], y[:100])  # nothing is predicted
    assert some.stream.recent_accuracy == before


def test_the_two_modes_are_counted_apart():
    some, (x, y, _) = learner(et.RandomFilter(rate=0.5)), instances(100)
    some.observe(x[:60], y[:60])
    some.observe(x[60:], y[60:], predict=True)
    train, predict = some.stream.totals["train"], some.stream.totals["predict"]
    assert (train.instances_seen, predict.instances_seen, some.stream.position) == (60, 40, 100)
    step, forward = some.plans.step_macs, some.graph.macs()
    skipped = (predict.instances_seen - predict.instances_kept) * step
    assert predict.macs_dense - predict.macs_done == skipped
    assert predict.macs_done == predict.instances_trained * step + 40 * forward
    assert train.macs_done == train.instances_trained * step
    assert predict.judged == 40
    assert train.judged == train.instances_trained


def test_predictions_of_sparse_networks_are_counted_as_executed():
    some, (x, y, _) = learner(sparsity=et.StaticSparse(weights=0.9)), instances(8)
    result = some.observe(x, y, predict=True)
    assert result.macs_dense == 8 * some.graph.macs()
    assert result.macs_done < 0.5 * result.macs_dense
    assert result.saved_weights == result.macs_dense - result.macs_done


def failing_at(some: et.Learner, step: int) -> et.Learner:
    """Make the step of that number fail as one does whose gradients are not finite."""
    partial_fit = some.partial_fit

    def stub(x, y):
        if some.step_count == step:
            some.partial_fit = partial_fit
            raise NumericalError("not finite")
        return partial_fit(x, y)

    some.partial_fit = stub
    return some


@pytest.mark.parametrize("predict", [False, True])
def test_a_step_that_fails_leaves_consistent_books(predict):
    some, (x, y, _) = failing_at(learner(), 2), instances(70)
    with pytest.raises(NumericalError):
        some.observe(x, y, predict)
    total = some.stream.totals["predict" if predict else "train"]
    assert (some.stream.position, total.instances_seen, total.instances_kept) == (70, 70, 70)
    assert (total.instances_trained, some.stream.waiting) == (32, 22), "16 of the step that failed are dropped"
    assert total.macs_done == 32 * some.plans.step_macs + (70 * some.graph.macs() if predict else 0)
    assert total.judged == (70 if predict else 32)
    some.observe(x[:1], y[:1], predict)  # goes on with those that wait
    assert (some.step_count, some.stream.waiting, some.stream.position) == (3, 7, 71)


def struck_at(some: et.Learner, step: int) -> et.Learner:
    """Raise an interrupt behind the step of that number, as the executor does after Ctrl-C in the middle of a step."""
    partial_fit = some.partial_fit

    def stub(x, y):
        result = partial_fit(x, y)
        if some.step_count == step:
            some.partial_fit = partial_fit
            raise KeyboardInterrupt
        return result

    some.partial_fit = stub
    return some


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, TimeoutError])
def test_books_hold_where_a_signal_strikes_a_step(error, monkeypatch):
    """Behind a step that was taken it counts; before it, its instances wait, or are dropped by an error."""
    for taken in (True, False):
        some, (x, y, _) = learner(), instances(16)
        real = some.partial_fit

        def struck(*batch, real=real, taken=taken):
            if taken:
                real(*batch)
            raise error

        monkeypatch.setattr(some, "partial_fit", struck)
        with pytest.raises(error):
            some.observe(x, y)
        total, waits = some.stream.totals["train"], 16 * (not taken and error is not TimeoutError)
        assert (some.step_count, total.instances_trained, some.stream.waiting) == (taken, 16 * taken, waits)
        assert (total.macs_done > 0) is taken
        assert some.stream.position == 16


def test_what_breaks_into_collecting_leaves_all_as_it_was(monkeypatch):
    some, (x, y, _) = learner(), instances(5)
    some.observe(x[:2], y[:2])
    with monkeypatch.context() as patch:
        patch.setattr(np, "take", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            some.observe(x[2:], y[2:])
    assert (some.stream.position, some.stream.waiting, some.stream.totals["train"].instances_seen) == (2, 2, 2)


@pytest.mark.parametrize("kind", [et.RandomFilter, et.SelectiveBackprop, et.EarlyInstanceFilter])
@pytest.mark.parametrize("step", [1, 2, 3, 5, 8])
def test_a_fit_that_an_interrupt_strikes_goes_on_exactly(kind, step):
    data = instances(640)[:2]
    some, other = (learner(kind(rate=0.5, start=100)) for _ in range(2))
    other.fit(data, epochs=2)
    with pytest.raises(KeyboardInterrupt):
        struck_at(some, step).fit(data, epochs=2)
    some.fit(data, epochs=2)
    assert some.step_count == other.step_count
    for name, array in other.parameters().items():
        np.testing.assert_array_equal(some.parameters()[name], array)


def test_what_waits_when_an_interrupt_strikes_a_stream_is_learned_from_later():
    some, (x, y, _) = struck_at(learner(), 2), instances(70)
    with pytest.raises(KeyboardInterrupt):
        some.observe(x, y)
    assert (some.step_count, some.stream.waiting, some.stream.position) == (2, 38, 70)
    some.observe(x[:1], y[:1])
    assert (some.step_count, some.stream.waiting) == (4, 7)


def test_a_flush_that_fails_leaves_consistent_books():
    some, (x, y, _) = failing_at(failing_at(learner(), 1), 0), instances(50)
    with pytest.raises(NumericalError):
        some.observe(x, y)
    assert (some.stream.waiting, some.stream.totals["train"].instances_trained) == (34, 0)
    with pytest.raises(NumericalError):  # the second of three micro-batches
        some.flush()
    assert (some.stream.waiting, some.stream.totals["train"].instances_trained) == (2, 16)
    assert some.flush().instances_trained == 2
    assert some.stream.totals["train"].instances_trained == 18


def test_a_fit_goes_on_behind_the_block_whose_step_failed():
    some, (x, y, _) = failing_at(learner(et.RandomFilter(rate=0.5, start=0)), 3), instances(320)
    with pytest.raises(NumericalError):
        some.fit((x, y), epochs=1)
    assert some.position.batch > 0
    record = some.fit((x, y), epochs=1).epochs[0]
    assert record.instances_seen == 320
    assert record.instances_kept - record.instances_trained == 16, "those of the step that failed are dropped"
    assert some.stream.waiting == 0


@pytest.mark.parametrize("kind", [None, et.RandomFilter, et.SelectiveBackprop, et.EarlyInstanceFilter])
def test_instances_that_could_not_be_predicted_have_not_been_observed(kind):
    some, (x, y, _) = learner(None if kind is None else kind(rate=0.5, start=0)), instances(40)
    some.observe(x[:20], y[:20], predict=True)
    tensors, meta = some.state()
    logits = some.logits
    some.logits = lambda x: (_ for _ in ()).throw(NumericalError("not finite"))
    with pytest.raises(NumericalError):
        some.observe(x[20:], y[20:], predict=True)
    some.logits = logits
    again, after = some.state()
    assert after == meta
    assert all(again[name].tobytes() == tensors[name].tobytes() for name in tensors)


def test_bad_instances_are_refused_at_the_door():
    some, (x, y, _) = learner(), instances(4)
    with pytest.raises(DataError, match="shape"):
        some.observe(x[:, :, 1:], y)
    with pytest.raises(DataError, match="label 9"):
        some.observe(x, y + 9)
    assert some.stream.position == 0
    some.observe(x, y)
    with pytest.raises(DataError):
        some.observe(x * np.nan, y)
    assert some.stream.latest is None, "what failed did nothing"


def test_a_dropped_learner_is_freed_at_once():
    import gc
    import weakref

    some = learner(et.EarlyInstanceFilter(start=0))
    x, y, _ = instances(64)
    some.observe(x, y)
    gc.collect()
    gc.disable()
    try:
        dropped = weakref.ref(some)
        del some
        assert dropped() is None
    finally:
        gc.enable()


MEMORY = """
import json, re, sys
sys.path.append({root!r})  # last: the installed package comes first
import edgetrain as et
from tests.test_filters import instances, learner
resident = lambda: int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
some = learner(et.EarlyInstanceFilter(rate=0.2))
x, y, _ = instances(1000)
sizes = []
for turn in range(12):
    for start in range(0, 1000, 20):
        some.observe(x[start:start + 20], y[start:start + 20])
    sizes.append(resident())
print(json.dumps(sizes))
"""


def test_memory_is_flat_after_the_first_instances():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    code = MEMORY.format(root=str(Path(__file__).parents[1]))
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    sizes = json.loads(done.stdout)
    assert max(sizes[2:]) - sizes[1] < 512, f"KiB after every 1,000 instances: {sizes}"


# ---- readers ---------------------------------------------------------------------------------------------------------


def whole(source, size: int = 7, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    blocks = list(source.blocks(size, start, never))
    assert [len(y) for _, y in blocks[:-1]] == [size] * (len(blocks) - 1)
    return np.concatenate([x for x, _ in blocks]), np.concatenate([y for _, y in blocks])


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 4, 5), (5, 5), (3, 9)])
def test_npz_is_read_piece_by_piece_as_load_dataset_reads_it(tmp_path, save, dtype, shape):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 255, (23, *shape)).astype(dtype)
    save(tmp_path / "a.npz", x=x, y=rng.integers(0, 4, 23).astype(np.int16))
    source, expected = open_stream(str(tmp_path / "a.npz"), SHAPE, 10), et.load_dataset(tmp_path / "a.npz")
    for start in (0, 9, 22):
        images, labels = whole(source, 7, start)
        np.testing.assert_array_equal(images, expected.take(np.arange(start, 23))[0])
        np.testing.assert_array_equal(labels, expected.labels[start:])
    assert (source.count, source.class_names, source.input_shape) == (23, expected.class_names, expected.input_shape)
    assert list(source.blocks(5, 23, never)) == []


@pytest.mark.parametrize("cut", [0.3, 0.9])
def test_a_truncated_npz_is_refused(tmp_path, cut):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.zeros((50, 1, 9, 9), np.uint8), y=np.arange(50) % 3)
    path.write_bytes(path.read_bytes()[: int(cut * path.stat().st_size)])
    with pytest.raises(DataError, match=r"a\.npz"):
        whole(open_stream(str(path), SHAPE, 10))


def test_npz_with_more_images_than_labels_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 1, 9, 9), np.uint8), y=np.arange(4))
    with pytest.raises(DataError, match="expected one each"):
        open_stream(str(tmp_path / "a.npz"), SHAPE, 10)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": np.array(["cat"] * 20)}, r"a\.npz: labels have dtype <U3, expected integers"),
        ({"x": np.array([["z"] * 9] * 20)[:, None]}, r"a\.npz: images have dtype <U1"),
        ({"class_names": np.arange(3)}, r"a\.npz: class_names have dtype int64"),
    ],
    ids=["labels", "images", "class-names"],
)
def test_an_npz_with_other_things_than_numbers_is_named(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **({"x": np.zeros((20, 1, 9, 9), np.uint8), "y": np.arange(20) % 3} | arrays))
    with pytest.raises(DataError, match=message):
        open_stream(str(tmp_path / "a.npz"), SHAPE, 10)


def test_an_npz_in_fortran_order_is_refused_with_a_remedy_that_works(tmp_path):
    x, y = np.arange(5 * 81).reshape(5, 1, 9, 9) % 256, np.arange(5) % 3
    np.savez(tmp_path / "a.npz", x=np.asfortranarray(x), y=y)
    with pytest.raises(DataError, match=r"Fortran order.*numpy\.ascontiguousarray\(x\)"):
        open_stream(str(tmp_path / "a.npz"), SHAPE, 10)
    np.savez(tmp_path / "a.npz", x=np.ascontiguousarray(np.load(tmp_path / "a.npz")["x"]), y=y)
    assert whole(open_stream(str(tmp_path / "a.npz"), SHAPE, 10))[1].tolist() == y.tolist()


def test_an_empty_npz_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((0, 1, 9, 9), np.uint8), y=np.zeros(0, int))
    with pytest.raises(DataError, match=r"a\.npz: holds images of shape \(0, 1, 9, 9\), expected at least one"):
        open_stream(str(tmp_path / "a.npz"), SHAPE, 10)


@pytest.mark.parametrize("bad", [0, 14, 17, 19, 20])
@pytest.mark.parametrize("start", [0, 13])
def test_good_instances_before_a_bad_one_of_an_npz_come_first(tmp_path, bad, start):
    x, y = np.zeros((21, 1, 9, 9), np.float32), np.arange(21) % 3
    x[bad:] = np.nan  # also where a whole block is bad
    np.savez(tmp_path / "a.npz", x=x, y=y)
    labels, error = taken(open_stream(str(tmp_path / "a.npz"), SHAPE, 10).blocks(7, start, never))
    assert labels == y[start:bad].tolist()
    assert f"a.npz: instance {max(bad, start)} (counted from 0) holds NaN" in str(error)


def test_a_negative_label_or_pixel_of_an_npz_is_named(tmp_path):
    path, x, y = tmp_path / "a.npz", np.zeros((20, 1, 9, 9), np.int16), np.arange(20) % 3
    x[9], y[10] = -1, -1
    np.savez(path, x=x, y=y)
    labels, error = taken(open_stream(str(path), SHAPE, 10).blocks(7, 0, never))
    assert labels == y[:9].tolist()
    told = f"{path}: instance 9 (counted from 0): images have dtype int16 with values -1 to -1, expected 0 to 255"
    assert str(error).startswith(told)
    np.savez(path, x=abs(x), y=y)
    labels, error = taken(open_stream(str(path), SHAPE, 10).blocks(7, 0, never))
    assert labels == y[:10].tolist()
    told = "label -1 of instance 10 (counted from 0) is out of range, expected 0 to 2 for 3 classes"
    assert str(error) == f"{path}: {told}"


@pytest.mark.parametrize("inside", ["", "train"])
def test_a_folder_is_read_in_the_order_of_the_file_names(tmp_path, inside):
    image = pytest.importorskip("PIL.Image")
    for number in range(9):
        folder = tmp_path / inside / "ab"[number % 2]
        folder.mkdir(exist_ok=True, parents=True)
        image.fromarray(np.full((28, 28), 10 * number, np.uint8)).save(folder / f"{number:03d}.png")
    source = open_stream(str(tmp_path), SHAPE, 2)
    x, y = whole(source, 4)
    np.testing.assert_array_equal((255 * x[:, 0, 0, 0]).round(), 10 * np.arange(9))
    np.testing.assert_array_equal(y, np.arange(9) % 2)
    assert source.class_names == ("a", "b")


def test_other_data_sets_are_taken_from_memory():
    source = open_stream("embedded", SHAPE, 10)
    x, y = next(source.blocks(32, 64, never))
    expected = et.load_dataset("embedded").take(np.arange(64, 96))
    np.testing.assert_array_equal(x, expected[0])
    np.testing.assert_array_equal(y, expected[1])


def taken(blocks) -> tuple[list[int], DataError | None]:
    """Return the labels of all blocks, and the error that ended them."""
    labels: list[int] = []
    try:
        for _, y in blocks:
            labels += y.tolist()
    except DataError as error:
        return labels, error
    return labels, None


def test_images_before_a_damaged_one_come_first(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for number in range(9):
        folder = tmp_path / "ab"[number % 2]
        folder.mkdir(exist_ok=True)
        image.fromarray(np.zeros((28, 28), np.uint8)).save(folder / f"{number:03d}.png")
    damaged = tmp_path / "a" / "006.png"
    damaged.write_bytes(damaged.read_bytes()[:40])
    labels, error = taken(open_stream(str(tmp_path), SHAPE, 2).blocks(4, 0, never))
    assert labels == [0, 1, 0, 1, 0, 1]
    assert "006.png" in str(error)


@contextmanager
def piped(text: str) -> Iterator[int]:
    """Open a pipe with a text in it and no writer."""
    reading, writing = os.pipe()
    os.write(writing, text.encode())
    os.close(writing)
    try:
        yield reading
    finally:
        os.close(reading)


def lines_of(text: str, names: tuple[str, ...] = ()) -> list[tuple[np.ndarray, np.ndarray]]:
    with piped(text) as reading:
        return list(_JsonLines(reading, (1, 2, 2), 3, names).blocks(2, 0, never))


GOOD = '{"x": [1, 2, 3, 4], "y": 2}\n'


def test_lines_before_a_bad_one_come_first():
    with piped(3 * GOOD + "garbage\n") as reading:
        labels, error = taken(_JsonLines(reading, (1, 2, 2), 3, ()).blocks(2, 0, never))
    assert labels == [2, 2, 2]
    assert "line 4: not JSON" in str(error)
    assert str(error).endswith("such as " + '{"pixels": [0, 17, 255], "y": 3}')


@pytest.mark.parametrize(("line", "told"), [
    ('{"x": ["1", "2", "3", "4"], "y": 2}', "line 2: 'x' is not an array of numbers, but of type <U1"),
    ('{"x": [true, false, true, false], "y": 2}', "line 2: 'x' is not an array of numbers, but of type bool"),
    ('{"x": [1, 2, [3], 4], "y": 2}', "line 2: 'x' is not an array of numbers"),
    ('{"image": "nothing.png", "y": 2}', "line 2: nothing.png: "),
])  # fmt: skip
def test_a_bad_instance_is_told_with_its_line(line, told):
    with piped(f"{GOOD}{line}\n") as reading:
        labels, error = taken(_JsonLines(reading, (1, 2, 2), 3, ()).blocks(2, 0, never))
    assert labels == [2]
    assert told in str(error)


@pytest.mark.parametrize("end", ["", "\n" + GOOD])
def test_of_a_line_without_an_end_no_more_is_kept_than_a_line_may_have(end):
    reading, writing = os.pipe()
    source = _JsonLines(reading, (1, 2, 2), 3, ())

    def write() -> None:
        os.write(writing, GOOD.encode())
        for _ in range(100):
            os.write(writing, bytes(1 << 16))
        os.write(writing, end.encode())
        os.close(writing)

    writer = threading.Thread(target=write)
    writer.start()
    lines = source._lines(never, never)
    assert next(lines) == GOOD[:-1].encode()
    assert len(next(lines)) <= source._longest + (1 << 16)
    assert [*lines] == ([GOOD[:-1].encode()] if end else [])
    writer.join()
    os.close(reading)


def test_a_line_that_is_too_long_is_a_bad_one():
    with piped(GOOD + GOOD) as reading:
        source = _JsonLines(reading, (1, 2, 2), 3, ())
        source._longest = len(GOOD) - 2
        labels, error = taken(source.blocks(2, 0, never))
    assert labels == []
    assert "line 1: longer than 26 bytes, expected such as" in str(error)


def test_closed_standard_input_is_refused(monkeypatch):
    """The next file that is opened would have its descriptor."""
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(UsageError, match="standard input is closed"):
        open_stream("-", (1, 2, 2), 3)


@pytest.mark.parametrize("kind", ["encrypted", "foreign"])
def test_an_archive_that_zipfile_cannot_read_is_bad_data(kind, tmp_path):
    file = tmp_path / "a.npz"
    np.savez(file, x=np.zeros((4, 1, 2, 2), np.uint8), y=np.array([0, 1, 0, 1]))
    content = bytearray(file.read_bytes())
    if kind == "foreign":  # NumPy takes names without a suffix, too
        with zipfile.ZipFile(file) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        with zipfile.ZipFile(file, "w") as archive:
            for name, member in members.items():
                archive.writestr(name.removesuffix(".npy"), member)
    else:
        for mark, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):  # the flags in both headers of every member
            for found in re.finditer(re.escape(mark), content):
                content[found.start() + place] |= 1
        file.write_bytes(content)
    readers = {"load": load_dataset, "stream": lambda name: open_stream(name, (1, 2, 2), 2)}
    if kind == "foreign":
        del readers["load"]  # which reads them
    for read in readers.values():
        with pytest.raises(DataError, match=r"a\.npz: cannot be read"):
            read(str(file))


def test_lines_read_along_with_a_bad_one_are_not_lost():
    with piped(3 * GOOD + "garbage\n" + GOOD.replace("2}", "1}") + "more garbage\n" + GOOD) as reading:
        labels, error = taken(_JsonLines(reading, (1, 2, 2), 3, ()).blocks(2, 0, never))
    assert labels == [2, 2, 2, 1, 2]
    assert "line 4: not JSON" in str(error)
    assert "of the lines read along with it, 2 behind it were taken, 1 are bad too" in str(error)


@pytest.mark.parametrize(("line", "told"), [(GOOD, "1 behind it were taken"), ("more garbage\n", "1 are bad too")])
def test_of_lines_read_along_with_a_bad_one_nothing_is_told_that_there_is_not(line, told):
    with piped("garbage\n" + line) as reading:
        _, error = taken(_JsonLines(reading, (1, 2, 2), 3, ()).blocks(2, 0, never))
    assert str(error).endswith(f"; of the lines read along with it, {told}")


def test_a_stream_ends_behind_a_whole_line_wherever_the_reading_stopped():
    """Lines of a live pipe come in pieces; whoever goes on with it finds the first line that was not taken."""
    reading, writing = os.pipe()
    os.write(writing, (GOOD + GOOD[:9]).encode())
    asked: list[int] = []
    source = _JsonLines(reading, (1, 2, 2), 3, ())
    later = threading.Timer(0.3, lambda: os.write(writing, (GOOD[9:] + GOOD.replace("2}", "1}")).encode()))
    later.start()
    assert taken(source.blocks(64, 0, lambda: bool(asked.append(0) or len(asked) > 1))) == ([2, 2], None)
    later.join()
    os.close(writing)
    assert taken(_JsonLines(reading, (1, 2, 2), 3, ()).blocks(64, 0, never)) == ([1], None)
    os.close(reading)


@pytest.mark.parametrize("ends", [True, False])
def test_a_begun_line_is_left_out_when_its_end_does_not_come(ends, monkeypatch):
    monkeypatch.setattr("edgetrain.data.streaming._PATIENCE", 0.01)
    reading, writing = os.pipe()
    os.write(writing, (GOOD + GOOD[:9]).encode())
    if ends:
        os.close(writing)
    asked: list[int] = []
    source = _JsonLines(reading, (1, 2, 2), 3, ())
    assert taken(source.blocks(64, 0, lambda: bool(asked.append(0) or len(asked) > 1))) == ([2], None)
    os.close(reading)
    if not ends:
        os.close(writing)


def test_lines_that_came_before_a_stop_are_not_lost():
    asked: list[int] = []
    with piped(3 * GOOD) as reading:
        source = _JsonLines(reading, (1, 2, 2), 3, ())
        assert taken(source.blocks(64, 0, lambda: bool(asked.append(0) or len(asked) > 1))) == ([2, 2, 2], None)


@pytest.mark.parametrize("due", [False, True])
def test_a_pipe_that_pauses_hands_on_what_has_come(due, monkeypatch):
    monkeypatch.setattr("edgetrain.data.streaming._PATIENCE", 0.01)
    monkeypatch.setattr("edgetrain.data.streaming._IDLE_TURNS", 10**6 if due else 3)
    reading, writing = os.pipe()
    os.write(writing, (3 * GOOD + GOOD[:9]).encode())
    blocks = _JsonLines(reading, (1, 2, 2), 3, ()).blocks(64, 0, never, lambda: due)
    assert next(blocks)[1].tolist() == [2, 2, 2]
    x, y = next(blocks)  # nothing came since: whoever saves by the clock must wake up
    assert (x.shape, y.shape) == ((0, 1, 2, 2), (0,))
    os.write(writing, (GOOD[9:] + 70 * GOOD).encode())
    assert [len(next(blocks)[1]) for _ in range(2)] == [64, 7]
    os.close(writing)
    assert [len(y) for _, y in blocks] == []
    os.close(reading)


def test_a_fast_pipe_gives_full_blocks_even_while_a_checkpoint_is_due():
    with piped(150 * GOOD) as reading:
        blocks = _JsonLines(reading, (1, 2, 2), 3, ()).blocks(64, 0, never, lambda: True)
        assert [len(y) for _, y in blocks] == [64, 64, 22]


def test_json_lines_flat_nested_pixels_and_numbers():
    blocks = lines_of(
        '{"pixels": [0, 51, 102, 255], "y": 0}\n\n{"x": [[[0.5, -1], [2, 3]]], "y": 2}\n'
        '{"y": "cat", "x": [1, 0, 1, 0]}',
        ("dog", "cat", "bird"),
    )
    x, y = (np.concatenate(column) for column in zip(*blocks, strict=True))
    np.testing.assert_allclose(x.reshape(3, 4), [[0, 0.2, 0.4, 1], [0.5, -1, 2, 3], [1, 0, 1, 0]], rtol=1e-6)
    assert y.tolist() == [0, 2, 1]
    assert (x.dtype, x.shape) == (np.float32, (3, 1, 2, 2))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("hello", "line 1: not JSON"),
        ("[1, 2]", "expected 'y' and one of"),
        ('{"x": [1, 2, 3, 4]}', "expected 'y' and one of"),
        ('{"x": [1, 2, 3], "y": 0}', "has 3 numbers"),
        ('{"x": [1, 2, 3, "a"], "y": 0}', "not an array of numbers"),
        ('{"x": [1, 2, [3], 4], "y": 0}', "not an array of numbers"),
        ('{"pixels": [1, 2, 3, 256], "y": 0}', "not whole numbers from 0 to 255"),
        ('{"pixels": [1, 2, 3, 0.5], "y": 0}', "not whole numbers from 0 to 255"),
        ('{"x": [1, 2, 3, 4], "y": 3}', "y is 3"),
        ('{"x": [1, 2, 3, 4], "y": true}', "y is True"),
        ('{"x": [1, 2, 3, 4], "y": "fox"}', "y is 'fox'"),
        ('{"image": "nowhere.png", "y": 1}', "nowhere.png"),
        pytest.param(3000 * "[", "line 1: not JSON", id="too-deep-for-json"),
        pytest.param(f'{{"x": {100 * "["}1{100 * "]"}, "y": 0}}', "not an array of numbers", id="too-deep-for-numpy"),
        pytest.param(f'{{"x": [1, 2, 3, 1{400 * "0"}], "y": 0}}', "not an array of numbers", id="too-large-for-float"),
        ('{"x": [1, 2, 3, 1e300], "y": 0}', "line 1: 'x' holds NaN, infinity or a number beyond float32"),
        ('{"x": [1, 2, 3, NaN], "y": 0}', "line 1: 'x' holds NaN"),
    ],
)
def test_a_bad_line_is_named(line, message):
    with pytest.raises(DataError, match=message):
        lines_of(line)


def test_waiting_for_a_line_can_be_interrupted():
    reading, writing = os.pipe()
    asked = []
    source = _JsonLines(reading, (1, 2, 2), 3, ())
    assert list(source.blocks(2, 0, lambda: bool(asked.append(0) or len(asked) > 2))) == []
    os.close(reading)
    os.close(writing)


# ---- what goes wrong again and again, and interrupts -----------------------------------------------------------------


@pytest.mark.parametrize("chosen", [None, "eif:rate=0.5,start=0", "random:rate=0.5"])
def test_memory_is_bounded_where_every_step_fails(chosen):
    some, (x, y, _) = learner(chosen), instances(64)
    some.load_parameters({name: array * np.float32(3e30) for name, array in some.parameters().items()})
    failures = 0
    for _ in range(60):
        try:
            some.observe(x, y)
        except NumericalError:
            failures += 1
        assert some.stream.waiting <= 64
    assert failures >= 30  # a filter may keep less than a micro-batch
    if chosen and chosen.startswith("eif"):
        assert some.stream._selector._queue.count <= some.stream._selector._queue.usual


@pytest.mark.parametrize("chosen", [None, "random:rate=1.0"])
def test_what_waits_behind_an_interrupt_is_no_array_of_the_callers(chosen, monkeypatch):
    some, (x, y, _) = learner(chosen), instances(40)

    def strike(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(some), "partial_fit", strike)
        with pytest.raises(KeyboardInterrupt):
            some.observe(x, y)
    assert some.stream.waiting == 40
    assert not np.shares_memory(some.stream._x, x)
    assert not np.shares_memory(some.stream._y, y)


def test_an_interrupt_while_a_call_is_counted_repeats_no_instance(monkeypatch):
    some, (x, y, _) = learner(), instances(40)

    def strike(*_) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(some.stream), "_count", strike)
        with pytest.raises(KeyboardInterrupt):
            some.observe(x, y)
    assert (some.stream.position, some.step_count, some.stream.waiting) == (40, 2, 8)


def test_targets_have_no_accuracy():
    some, (x, _, _) = et.Learner(network(), batch_size=4, threads=1, loss="mse"), instances(8)
    some.observe(x, np.zeros((8, 3), np.float32), predict=True)
    assert math.isnan(some.stream.accuracy)
    assert math.isnan(some.stream.recent_accuracy)
    assert some.stream.totals["predict"].judged == 8
