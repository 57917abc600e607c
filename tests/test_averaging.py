"""Averaged parameters: what they are, who predicts with them, and that training does not notice."""

import numpy as np
import pytest

import edgetrain as et
from edgetrain.errors import CheckpointError, NumericalError, UsageError
from edgetrain.graph import Graph

OPTIMIZERS = {
    "sgd": lambda averaging: et.SGD(lr=0.05, momentum=0.9, averaging=averaging),
    "sgd without momentum": lambda averaging: et.SGD(lr=0.05, averaging=averaging),
    "adamw": lambda averaging: et.AdamW(lr=0.01, weight_decay=0.1, averaging=averaging),
}
SPARSITY = {
    "dense": None,
    "static": "static:weights=0.6",
    "rigl": "rigl:weights=0.6,refresh=2,total_steps=20",
    "swat": "swat:weights=0.6,activations=0.6,refresh=2",
}


def network(seed: int = 0) -> Graph:
    """Convolution, batch normalisation and a fully connected layer: arrays of all three groups of parameters."""
    rng = np.random.default_rng(seed)
    graph = Graph("small", input_shape=(2, 6, 6))
    x = graph.add("Conv", ["input", graph.parameter("conv.weight", rng.normal(0, 0.3, (4, 2, 3, 3)))], pads=[1] * 4)
    scale, shift = graph.parameter("bn.weight", np.ones(4)), graph.parameter("bn.bias", np.zeros(4))
    mean = graph.parameter("bn.running_mean", np.zeros(4), trainable=False)
    variance = graph.parameter("bn.running_var", np.ones(4), trainable=False)
    x = graph.add("Relu", [graph.add("BatchNormalization", [x, scale, shift, mean, variance])])
    weight = graph.parameter("head.weight", rng.normal(0, 0.1, (3, 144)))
    head = [graph.add("Flatten", [x], axis=1), weight, graph.parameter("head.bias", np.zeros(3))]
    graph.set_outputs([graph.add("Gemm", head, transB=1)])
    return graph


def learner(optimizer: et.SGD | et.AdamW, **arguments) -> et.Learner:
    return et.Learner(network(), batch_size=8, threads=1, optimizer=optimizer, **arguments)


def batch(number: int, size: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((7, number))
    return rng.standard_normal((size, 2, 6, 6), np.float32), rng.integers(0, 3, size)


def present(some: et.Learner) -> dict[str, np.ndarray]:
    """Return the parameters that the next step begins with, as the network uses them."""
    return {name: some._parameters.dense(name) for name in some._parameters.names()}


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(a[name], b[name]) for name in a)


def follow(some: et.Learner, averaging: float, masked: bool = False) -> None:
    """Take steps and compare the parameters that predict with an average in float64.

    ``masked``: weights that cease to exist lose their average, and begin at 0 if they come back.
    """
    wanted: dict[str, np.ndarray] = {}
    for number in range(15):
        some.partial_fit(*batch(number))
        now = {name: array.astype(np.float64) for name, array in present(some).items()}
        share = max(1 - averaging, 10 / (number + 10))
        wanted = {n: wanted.get(n, now[n]) + share * (now[n] - wanted.get(n, now[n])) for n in now}
        if masked:
            wanted |= {n: wanted[n] * index.mask() for n, index in some.topology.indices.items()}
        for name, array in some.parameters().items():
            np.testing.assert_allclose(array, wanted[name], rtol=1e-5, atol=1e-7, err_msg=f"{name}, step {number}")
    assert not same(some.parameters(), present(some))


@pytest.mark.parametrize("averaging", [0.5, 0.9])
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_average_is_of_the_latest_tenth_of_all_steps_at_first_and_an_exponential_one_later(make, averaging):
    follow(learner(make(averaging)), averaging)


@pytest.mark.parametrize("policy", ["static:weights=0.6", "rigl:weights=0.6,refresh=2,total_steps=20",
                                    "set:weights=0.6,refresh=3,total_steps=20"])  # fmt: skip
def test_the_average_of_a_weight_moves_with_it_when_the_topology_changes(policy):
    some = learner(OPTIMIZERS["sgd"](0.9), sparsity=policy)
    follow(some, 0.9, masked=True)
    assert some.topology.changes > (0 if "static" not in policy else -1)


@pytest.mark.parametrize("sparsity", SPARSITY.values(), ids=SPARSITY)
def test_training_does_not_notice(sparsity):
    plain, averaged = (learner(OPTIMIZERS["sgd"](averaging), sparsity=sparsity) for averaging in (0.0, 0.9))
    for number in range(9):
        assert plain.partial_fit(*batch(number)).loss == averaged.partial_fit(*batch(number)).loss
        averaged.predict(batch(number)[0])
    assert same(plain.parameters(), present(averaged))
    x, _ = batch(50)
    np.testing.assert_array_equal(plain.logits(x), averaged.logits(x, averaged=False))


@pytest.mark.parametrize("sparsity", SPARSITY.values(), ids=SPARSITY)
def test_everything_that_predicts_uses_the_average(sparsity, tmp_path):
    some = learner(OPTIMIZERS["sgd"](0.9), sparsity=sparsity)
    for number in range(9):
        some.partial_fit(*batch(number))
    x, y = batch(50, 21)
    twin = et.Learner(network(1), batch_size=8, threads=1)
    twin.load_parameters(some.parameters())
    np.testing.assert_allclose(some.logits(x), twin.logits(x), rtol=1e-5, atol=1e-5)
    assert np.abs(some.logits(x) - some.logits(x, averaged=False)).max() > 1e-3
    assert some.evaluate(x, y)["loss"] == pytest.approx(twin.evaluate(x, y)["loss"], rel=1e-5)
    some.export_onnx(tmp_path / "network.onnx")
    exported = et.Learner(et.load_onnx(tmp_path / "network.onnx"), batch_size=8, threads=1)
    np.testing.assert_allclose(exported.logits(x), some.logits(x), rtol=1e-5, atol=1e-5)
    for name, index in some.topology.indices.items():
        assert not some.parameters()[name][~index.mask()].any()


@pytest.mark.parametrize("sparsity", SPARSITY.values(), ids=SPARSITY)
def test_a_checkpoint_keeps_the_average(sparsity, tmp_path):
    some = learner(OPTIMIZERS["sgd"](0.9), sparsity=sparsity)
    for number in range(5):
        some.partial_fit(*batch(number))
    some.save(tmp_path / "a.safetensors")
    other = et.Learner.load(tmp_path / "a.safetensors")
    assert other.optimizer == some.optimizer
    for number in range(5, 9):
        assert same(some.parameters(), other.parameters())
        some.partial_fit(*batch(number))
        other.partial_fit(*batch(number))
    assert same(some.parameters(), other.parameters())


def test_a_state_of_before_the_first_step_brings_the_weights_that_predict():
    fresh = learner(OPTIMIZERS["sgd"](0.9))
    used = learner(OPTIMIZERS["sgd"](0.9))
    used.partial_fit(*batch(0))
    used.restore(*fresh.state())
    assert same(used.parameters(), fresh.parameters())
    x, _ = batch(1)
    np.testing.assert_array_equal(used.logits(x), fresh.logits(x))


def test_a_state_without_an_average_is_refused_and_changes_nothing():
    plain, averaged = learner(OPTIMIZERS["sgd"](0.0)), learner(OPTIMIZERS["sgd"](0.9))
    plain.partial_fit(*batch(0))
    averaged.partial_fit(*batch(1))
    before = averaged.parameters()
    with pytest.raises(CheckpointError, match=r"another network or optimizer: .'average/"):
        averaged.restore(*plain.state())
    assert same(averaged.parameters(), before)


def test_the_first_step_begins_the_average_exactly():
    some, other = learner(OPTIMIZERS["sgd"](0.9)), et.Learner(network(3), batch_size=8, threads=1)
    some.prepare()
    some.load_parameters({name: 1000 * array for name, array in other.parameters().items()})
    some.load_parameters(other.parameters())
    for step in range(2):
        some.restore(*learner(OPTIMIZERS["sgd"](0.9)).state())
        some.partial_fit(*batch(step))
        assert same(some.parameters(), present(some))


def test_loaded_parameters_predict_at_once():
    some, other = learner(OPTIMIZERS["sgd"](0.9)), et.Learner(network(3), batch_size=8, threads=1)
    some.partial_fit(*batch(0))
    some.load_parameters(other.parameters())
    x, _ = batch(1)
    np.testing.assert_array_equal(some.logits(x), other.logits(x))
    assert same(some.parameters(), other.parameters())


def test_a_step_that_is_not_finite_does_not_reach_the_average():
    some = learner(et.SGD(lr=0.05, averaging=0.9))
    some.partial_fit(*batch(0))
    some.partial_fit(*batch(1))
    before = some.parameters()
    x, y = batch(2)
    with pytest.raises(NumericalError):
        some.partial_fit(1e30 * x, y)
    assert same(some.parameters(), before)


def test_the_average_is_in_the_memory_plan():
    plain, averaged = (learner(OPTIMIZERS["sgd"](averaging)).memory_plan().parts for averaging in (0.0, 0.9))
    assert averaged["optimizer"] == plain["optimizer"] + plain["weights"]


def test_an_average_cannot_begin_or_end_in_the_middle():
    some = learner(OPTIMIZERS["sgd"](0.9))
    some.optimizer = OPTIMIZERS["sgd"](0.5)
    with pytest.raises(UsageError, match="make a new Learner"):
        some.optimizer = OPTIMIZERS["sgd"](0.0)


@pytest.mark.parametrize("averaging", [-0.1, 1.0, "much", None])
def test_a_weight_of_the_past_out_of_range_is_refused(averaging):
    with pytest.raises(UsageError, match="averaging="):
        et.SGD(averaging=averaging)


def test_a_filter_judges_by_the_parameters_that_are_trained():
    chosen = et.EarlyInstanceFilter(rate=0.5, start=0, uncertain=1.0, cells=1, hidden=1)
    some = learner(OPTIMIZERS["sgd"](0.99), instance_filter=chosen)
    for number in range(12):
        some.observe(*batch(number, 16))
    x, y = batch(50)
    logits = some.logits(x, averaged=False)
    wanted = np.log(np.exp(logits).sum(1)) - logits[np.arange(8), y]
    np.testing.assert_allclose(some.stream._selector._judge.losses(x, y), wanted, rtol=1e-4)


@pytest.mark.parametrize("predict", [False, True])
@pytest.mark.parametrize("chosen", ["eif:rate=0.5,start=0,cells=1,hidden=1", "selective:rate=0.5", "random:rate=0.5"])
def test_a_stream_trains_the_same_with_an_average(chosen, predict):
    plain, averaged = (learner(OPTIMIZERS["sgd"](averaging), instance_filter=chosen) for averaging in (0.0, 0.9))
    for number in range(20):
        a, b = (some.observe(*batch(number, 16), predict=predict) for some in (plain, averaged))
        assert a.instances_kept == b.instances_kept
    assert same(plain.parameters(), present(averaged))


def test_parameters_changed_before_the_first_step_predict():
    some = learner(OPTIMIZERS["sgd"](0.9))
    some.prepare()
    some.graph.arrays["head.bias"][2] = 1000
    assert some.predict(batch(0)[0]).tolist() == [2] * 8


def test_outputs_that_are_not_finite_are_explained_by_the_parameters_that_gave_them():
    some = learner(OPTIMIZERS["sgd"](0.9))
    some.partial_fit(*batch(0))
    some.graph.arrays["head.bias"][2] = np.inf
    with pytest.raises(NumericalError, match=r"'head.bias' holds NaN"):
        some.logits(batch(1)[0], averaged=False)
