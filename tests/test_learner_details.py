"""What a learner keeps, counts and refuses, in cases that larger tests pass over."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import edgetrain as et
import edgetrain.onnx_io
from edgetrain import choice, devices, models, reference
from edgetrain.devices import load_profile
from edgetrain.errors import CheckpointError, DataError, GraphError, NumericalError, ProfileError, UsageError
from edgetrain.fitting import fit_loop
from edgetrain.graph import Graph, Normalization
from edgetrain.kernels.codes import UPDATE_JOB
from edgetrain.optim import SGD, from_recipe
from edgetrain.torch_network import TorchNetwork
from edgetrain.verify import _Settings, _Trial
from tests.engine import PROFILE, channel_learner, wide_host
from tests.op_cases import Net
from tests.test_filters import instances, learner
from tests.test_fitting import FakeLearner, dataset


def dropping(seed=0):
    graph = et.Graph("drop", input_shape=(64,))
    weight = graph.parameter("w", np.random.default_rng(0).normal(0, 1, (3, 64)))
    graph.set_outputs([graph.add("Gemm", [graph.add("Dropout", ["input"], ratio=0.5), weight], transB=1)])
    return et.Learner(graph, batch_size=4, seed=seed, threads=1, optimizer=et.SGD(lr=0.0, momentum=0.0))


def wide(inputs=500, outputs=9) -> Graph:
    graph = Graph("wide", input_shape=(inputs,))
    rng = np.random.default_rng(0)
    weight = graph.parameter("w", rng.normal(0, 0.1, (outputs, inputs)))
    graph.set_outputs([graph.add("Gemm", ["input", weight, graph.parameter("b", np.zeros(outputs))], transB=1)])
    return graph


def test_a_restored_network_counts_as_trained():
    one, other, (x, y, _) = learner(), learner(), instances(16)
    one.partial_fit(x, y)
    assert not other.graph.trained
    other.restore(*one.state())
    assert other.graph.trained


def test_another_normalisation_counts_at_once():
    some, (x, _, _) = learner(), instances(16)
    for mean in (1.0, 2.0):
        some.graph.normalization = Normalization(np.full(1, mean, np.float32), np.ones(1, np.float32))
        fresh = learner()
        np.testing.assert_allclose(some.logits(x), fresh.logits(x - mean), rtol=1e-4, atol=1e-5)


def test_what_a_larger_batch_left_does_not_count():
    """What a larger batch left behind a smaller one does not count."""
    some, fresh, (x, y, _) = learner(), learner(), instances(16)
    some.gradients(x, y)
    for name, array in fresh.gradients(x[:5], y[:5]).items():
        np.testing.assert_allclose(some.gradients(x[:5], y[:5])[name], array, rtol=1e-5, atol=1e-7)


def test_every_step_and_seed_drops_others():
    """Every step drops others, and every seed."""
    x, y, (one, other) = np.ones((4, 64), np.float32), np.array([0, 1, 2, 0]), (dropping(), dropping(1))
    losses = [one.partial_fit(x, y).loss, one.partial_fit(x, y).loss, other.partial_fit(x, y).loss]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("count", [1, 5, 37])  # lanes hold channels, and samples
def test_of_equal_outputs_the_first_is_the_prediction_that_counts(count):
    graph = Graph("zero", input_shape=(4,))
    graph.set_outputs([graph.add("Gemm", ["input", graph.parameter("w", np.zeros((3, 4)))], transB=1)])
    some, y = et.Learner(graph, batch_size=count, threads=1), np.arange(1, count + 1) % 3
    x = np.ones((count, 4), np.float32)
    assert some.partial_fit(x, y).correct == (y == 0).sum()


def test_label_smoothing_is_in_checkpoints(tmp_path):
    learner(label_smoothing=0.25).save(tmp_path / "a.safetensors")
    assert et.Learner.load(tmp_path / "a.safetensors").label_smoothing == 0.25


def test_weights_that_know_inputs_as_they_are_get_them_so():
    some = FakeLearner()
    fit_loop(some, dataset(), epochs=1, normalize=False)
    fit_loop(some, dataset(), epochs=1)
    assert some.graph.normalization is None  # the weights know inputs as they are


def test_too_few_epochs_are_refused_inside_an_epoch_too():
    some = FakeLearner()
    fit_loop(some, dataset(), epochs=3, should_stop=lambda: some.step_count >= 6)
    with pytest.raises(UsageError, match="epochs is 1, but 1 are done already"):
        fit_loop(some, dataset(), epochs=1)


def test_what_decays_cannot_change_halfway():
    some = et.Learner(wide(), batch_size=4, threads=1, optimizer=et.SGD(lr=0.1, weight_decay=0.1))
    with pytest.raises(UsageError, match="make a new Learner"):
        some.optimizer = et.SGD(lr=0.1, weight_decay=0.1, decay_bias_and_norm=False)


def test_a_recipe_says_all_that_an_optimizer_heeds():
    recipe = replace(load_profile("generic-x86_64").recipe, optimizer="sgd", lr=0.03, momentum=0.8, nesterov=True,
                     weight_decay=0.002, decay_bias_and_norm=False, schedule="cosine", warmup_fraction=0.25,
                     clip_norm=2.0, averaging=0.5)  # fmt: skip
    shared = {"lr": 0.03, "weight_decay": 0.002, "decay_bias_and_norm": False, "clip_norm": 2.0, "averaging": 0.5,
              "schedule": et.Schedule("cosine", warmup=0.25)}  # fmt: skip
    assert from_recipe(recipe) == et.SGD(momentum=0.8, nesterov=True, **shared)
    assert from_recipe(replace(recipe, optimizer="adam")) == et.Adam(**shared)


def test_the_last_part_of_many_parameters_is_updated_measured_and_averaged():
    graph = wide(UPDATE_JOB // 8, 9)  # more than one job, the last one not full
    settings = {"batch_size": 4, "threads": 1}
    optimizer = et.SGD(lr=0.5, clip_norm=0.01, averaging=0.5)
    some = et.Learner(graph, optimizer=optimizer, **settings)
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(4, UPDATE_JOB // 8)).astype(np.float32), np.array([8, 8, 8, 8])
    before, grads = some.parameters(), some.gradients(x, y)
    assert sum(array.size for array in grads.values()) % UPDATE_JOB
    norm = np.sqrt(sum((array.astype(np.float64) ** 2).sum() for array in grads.values()))
    some.partial_fit(x, y)
    after = some.parameters()  # the first step begins the average exactly
    for name, array in grads.items():
        wanted = before[name] - 0.5 * 0.01 / norm * array
        np.testing.assert_allclose(after[name], wanted, rtol=1e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_running_variances_of_few_numbers_are_unbiased(count):
    graph = Graph("points", input_shape=(4, 1, 1))
    names = [graph.parameter(name, np.full(4, value), trainable) for name, value, trainable in
             (("scale", 1, True), ("bias", 0, True), ("mean", 0, False), ("variance", 1, False))]  # fmt: skip
    x = graph.add("Flatten", [graph.add("BatchNormalization", ["input", *names])])
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("w", np.ones((3, 4)))], transB=1)])
    x = np.random.default_rng(0).normal(size=(count, 4, 1, 1)).astype(np.float32)
    some = et.Learner(graph, batch_size=count, threads=1)
    some.partial_fit(x, np.zeros(count, int))
    wanted = 0.9 + 0.1 * (x.var(0, ddof=1).ravel() if count > 1 else np.zeros(4))
    np.testing.assert_allclose(some.parameters()["variance"], wanted, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 4 * choice.simd_lanes()])
def test_a_variance_that_overflows_reaches_no_running_statistic(count):
    net = Net((3, 4, 4))
    net.graph.set_outputs([net.Gemm(net.Flatten(net.Relu(net.norm("input"))), net.parameter(48, 3))])
    made = et.Learner(net.graph, PROFILE, batch_size=count, threads=1)
    x = np.random.default_rng(1).standard_normal((count, 3, 4, 4), np.float32)
    if count > choice.simd_lanes():
        x[choice.simd_lanes() :, 0] = 1e20  # no block's own variance overflows, that of all does
    else:
        x[:, 0] *= 1e20
    before = made.parameters()
    with pytest.raises(NumericalError):
        made.partial_fit(x, np.zeros(count, int))
    for name, array in made.parameters().items():
        np.testing.assert_array_equal(array, before[name], err_msg=name)


def test_an_error_in_a_bias_that_moves_off_kinks_stays():
    trial = _Trial(models.resnet((3, 8, 8), depth=8), _Settings(1, 8, 0, "cross_entropy", SGD(), 1))
    name = next(iter(trial._biases.values()))
    found = trial.learner.parameters()
    trial.learner.load_parameters(found | {name: found[name] + np.float32(0.25)})
    own = trial._off_kinks(trial.batch(0)[0], follow=False)
    np.testing.assert_allclose(trial.learner.parameters()[name] - own[name], 0.25, atol=1e-5)


def test_a_peak_must_follow_from_the_clock_within_a_percent(tmp_path):
    source = (devices._profile_folder() / "raspberrypi4.toml").read_text()
    peak = et.devices.load_profile("raspberrypi4").float32_peak_gflops
    line = next(line for line in source.splitlines() if line.startswith("float32_peak_gflops"))
    (tmp_path / "a.toml").write_text(source.replace(line, f"float32_peak_gflops = {1.03 * peak:.3f}"))
    with pytest.raises(ProfileError, match="float32_peak_gflops"):
        devices.load_profile(tmp_path / "a.toml")


def test_the_longest_name_of_a_board_wins():
    board = devices.load_profile("raspberrypi4")
    profiles = [
        replace(board, name="short", device_tree_match=("Pi 4",)),
        replace(board, name="long", device_tree_match=("Pi 4 Model B",)),
    ]
    host = SimpleNamespace(board="Raspberry Pi 4 Model B Rev 1.4", machine="aarch64")
    for given in (profiles, profiles[::-1]):
        assert devices._matching_profile(host, given).name == "long"


def test_an_application_may_make_underflow_an_error():
    graph = wide(4, 3)
    graph.arrays["b"] = np.float32([200, 0, -200])
    some = et.Learner(graph, batch_size=2, threads=1)
    with np.errstate(all="raise"):
        np.testing.assert_array_equal(some.predict_proba(np.zeros((2, 4), np.float32)), [[1, 0, 0]] * 2)
        assert some.evaluate(np.zeros((2, 4), np.float32), [0, 0])["loss"] == 0


def normalised(seed: int) -> Graph:
    """A bias that moves for the first Relu moves what the second one and the pool see."""
    rng, graph = np.random.default_rng(seed), Graph("normalised", (3, 8, 8))
    x = graph.add("Conv", ["input", graph.parameter("w", rng.normal(0, 0.3, (4, 3, 3, 3)))], pads=[1] * 4)
    arrays = {"s": rng.uniform(0.5, 1.5, 4), "b": rng.normal(size=4), "m": np.zeros(4), "v": np.ones(4)}
    names = [graph.parameter(name, array, trainable=name in "sb") for name, array in arrays.items()]
    x = graph.add("Relu", [graph.add("BatchNormalization", [x, *names])])
    x = graph.add("Conv", [x, graph.parameter("u", rng.normal(0, 0.3, (4, 4, 3, 3)))], pads=[1] * 4)
    x = graph.add("MaxPool", [graph.add("Relu", [x])], kernel_shape=[2, 2], strides=[2, 2])
    weight = graph.parameter("f", rng.normal(0, 0.1, (5, 64)))
    graph.set_outputs([graph.add("Gemm", [graph.add("Flatten", [x]), weight], transB=1)])
    return graph


@pytest.mark.parametrize("seed", [12, 21, 28, 36])
def test_verify_moves_biases_only_where_that_widens_the_margin(seed):
    trial = _Trial(normalised(seed), _Settings(1, 8, seed, "cross_entropy", SGD(), 1))
    x, _ = trial.batch(0)
    before = trial.judge.kink_margin(x)
    trial._off_kinks(x, follow=True)
    assert trial.judge.kink_margin(x) > 0.9 * before


def test_the_judge_knows_the_gradient_of_a_normalisation_behind_a_transpose():
    """PyTorch 2.13 does not, where maps have one row."""
    graph = Graph("turned", (7, 1, 11))
    rng = np.random.default_rng(0)
    arrays = {"s": rng.uniform(0.5, 1.5, 7), "b": rng.normal(size=7), "m": np.zeros(7), "v": np.ones(7)}
    names = [graph.parameter(name, array, trainable=name in "sb") for name, array in arrays.items()]
    x = graph.add("BatchNormalization", ["input", *names])
    graph.set_outputs([graph.add("Transpose", [x], perm=[0, 3, 1, 2])])
    data = rng.normal(size=(3, 7, 1, 11)), rng.normal(size=(3, 11, 7, 1))
    judge = TorchNetwork(graph, "mse")
    judge.loss(*data).backward()
    _, wanted = reference.gradients(graph, *data, "mse")
    for name in "sb":
        np.testing.assert_allclose(judge.tensors[name].grad.numpy(), wanted[name], rtol=1e-6, atol=1e-9)


def test_schedules_count_what_observe_left_waiting():
    some, (x, y, _) = learner(), instances(64)
    some.observe(x[:3], y[:3])
    some.fit((x, y), epochs=2)
    assert some.topology.total_steps == some.step_count


@pytest.mark.usefixtures(wide_host.__name__)
@pytest.mark.parametrize("count", [2, 3, 7, 20])
@pytest.mark.parametrize("value", [3.7, 100.1])
def test_a_channel_that_does_not_vary_is_normalised_exactly(value, count):
    """A mean that is off by an ulp or two counts 316 times in what the layer behind sees."""
    rng, graph = np.random.default_rng(1), Graph("constant", (6, 4, 4))
    arrays = {"s": rng.uniform(0.5, 1.5, 6), "b": 0.1 * rng.normal(size=6), "m": np.zeros(6), "v": np.ones(6)}
    names = [graph.parameter(name, array, trainable=name in "sb") for name, array in arrays.items()]
    x = graph.add("Flatten", [graph.add("BatchNormalization", ["input", *names])])
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("w", rng.normal(0, 0.1, (64, 96)))], transB=1)])
    x = rng.normal(size=(count, 6, 4, 4)).astype(np.float32)
    x[:, ::2] = value
    y = rng.integers(0, 64, count)
    _, wanted = reference.gradients(graph, x, y)
    for name, gradient in channel_learner(graph).gradients(x, y).items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=0, atol=1e-5 * np.abs(wanted[name]).max(), err_msg=name)


def test_tensors_that_want_gradients_are_refused_in_one_message():
    tensor = pytest.importorskip("torch").zeros(2, 4, requires_grad=True)
    with pytest.raises(DataError, match=r"x is not an array \(Can't call numpy\(\) on Tensor that requires grad"):
        et.Learner(wide(4, 3), batch_size=2, threads=1).predict(tensor)


def test_labels_that_are_too_large_are_named_as_they_were_given():
    with pytest.raises(DataError, match="label 18446744073709551615 given"):
        et.Learner(wide(4, 3), batch_size=2, threads=1).partial_fit(np.zeros((1, 4)), np.array([2**64 - 1], np.uint64))


@pytest.mark.parametrize("count", [0, -1, 1.5, "3", True])
def test_plans_are_of_whole_numbers_of_samples(count):
    made = et.Learner(et.models.lenet5(), batch_size=4, threads=1)
    for plan in (made.memory_plan, made.training_plan):
        with pytest.raises(UsageError, match="batch_size="):
            plan(count)


def test_normalisations_are_checked():
    made = et.Learner(et.models.lenet5(), batch_size=4, threads=1)
    with pytest.raises(GraphError, match="shape"):
        Normalization([0.5, 0.5], [0.2])
    with pytest.raises(GraphError, match="expected numbers"):
        Normalization("a", [0.2])
    made.graph.normalization = Normalization([0.5, 0.5], [0.2, 0.2])
    with pytest.raises(GraphError, match="2 channels, the input has 1"):
        made.logits(np.zeros((1, 1, 28, 28), np.float32))


def test_half_a_state_is_refused():
    made = et.Learner(et.models.lenet5(), batch_size=4, threads=1)
    with pytest.raises(CheckpointError, match="not whole"):
        made.restore({}, {})


def test_schedules_say_what_is_wrong():
    with pytest.raises(UsageError, match="milestones"):
        et.Schedule("step", milestones=0.5)
    with pytest.raises(UsageError, match="final"):
        et.Schedule("cosine", final=float("inf"))
