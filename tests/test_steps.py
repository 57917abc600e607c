"""What holds for every step, whatever the operators: inputs, batches, values that must survive, kinks, dropout."""

from __future__ import annotations

import numpy as np
import pytest
from edgetrain.models import ds_cnn

from edgetrain import autodiff, keeping, reference
from edgetrain.graph import Graph
from edgetrain.learner import Learner
from edgetrain.ops.pooling import Pool
from tests.engine import assert_all_close, assert_close, assert_same, channel_learner, learner, wide_host
from tests.op_cases import Net

pytestmark = pytest.mark.usefixtures(wide_host.__name__)


def classifier(shape: tuple[int, ...] = (2, 6, 6)) -> Graph:
    """Convolution, normalisation, pooling and a dense layer, three classes."""
    net = Net(shape)
    spatial = len(shape) - 1
    x = net.conv("input", 5, shape[0], *[3] * spatial, pads=[1] * 2 * spatial, bias=False)
    x = net.MaxPool(net.Relu(net.norm(x)), kernel_shape=[2] * spatial, strides=[2] * spatial)
    x = net.Flatten(x)
    net.graph.set_outputs([net.Gemm(x, net.parameter(net.shape(x)[0], 3), net.parameter(3))])
    return net.graph


def batch(count: int, shape: tuple[int, ...] = (2, 6, 6)) -> tuple[np.ndarray, np.ndarray]:
    """Whole numbers, so that they are the same in every type."""
    rng = np.random.default_rng(4)
    return rng.integers(-3, 4, (count, *shape)).astype(np.float32), rng.integers(0, 3, count)


# ---- inputs ----------------------------------------------------------------------------------------------------------

VIEWS = {
    "float64": lambda x: x.astype(np.float64),
    "float16": lambda x: x.astype(np.float16),
    "big-endian": lambda x: x.astype(">f4"),
    "fortran-order": np.asfortranarray,
    "every-second": lambda x: np.repeat(x, 2, axis=0)[::2],
    "channels-last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 1, -1)), -1, 1),
    "mirrored": lambda x: np.ascontiguousarray(x[..., ::-1])[..., ::-1],
    "list": np.ndarray.tolist,
}


@pytest.mark.parametrize("view", VIEWS)
def test_any_array_of_the_same_numbers_gives_the_same_result(view):
    x, y = batch(5)
    made = learner(classifier())
    given = VIEWS[view](x)
    assert_same({"logits": made.logits(given)}, {"logits": made.logits(x)})
    assert_same(made.gradients(given, y), made.gradients(x, y))


def test_signals_may_have_one_row():
    x, y = batch(5, (3, 12))
    made = learner(classifier((3, 12)))
    wide = x[:, :, None]
    assert_same({"logits": made.logits(wide)}, {"logits": made.logits(x)})
    assert_same(made.gradients(wide, y), made.gradients(x, y))


@pytest.mark.parametrize("labels", [np.uint8, np.int32, np.int64])
def test_labels_of_any_integer_type(labels):
    x, y = batch(5)
    made = learner(classifier())
    assert_same(made.gradients(x, y.astype(labels)), made.gradients(x, y))


def test_inputs_are_not_modified():
    x, y = batch(5)
    x.flags.writeable = y.flags.writeable = False
    before = x.tobytes(), y.tobytes()
    made = learner(classifier())
    made.partial_fit(x, y)
    made.gradients(x, y)
    made.logits(x)
    assert (x.tobytes(), y.tobytes()) == before


def test_gradients_change_nothing():
    x, y = batch(5)
    made = learner(classifier())
    before = made.parameters()
    made.gradients(x, y)
    assert_same(made.parameters(), before)
    assert made.step_count == 0


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 7, 8, 9, 20])
def test_a_samples_output_does_not_depend_on_its_batch(count):
    x, _ = batch(count)
    made = learner(classifier(), lanes=8)
    alone = np.concatenate([made.logits(sample[None]) for sample in x])
    assert_same({"logits": made.logits(x)}, {"logits": alone})


def test_gradients_do_not_depend_on_the_usual_batch_size():
    x, y = batch(11)
    usual, large = learner(classifier(), lanes=16), learner(classifier(), lanes=16)
    large.batch_size = 100
    large.gradients(*batch(90))  # a larger plan in the same memory
    assert_same(large.gradients(x, y), usual.gradients(x, y))


def test_plans_of_several_sizes_share_memory():
    x, y = batch(40)
    made, fresh = learner(classifier()), learner(classifier())
    wanted = fresh.gradients(x[:3], y[:3])
    for count in (3, 40, 1, 17):
        made.gradients(x[:count], y[:count])
        made.logits(x[:count])
    assert_same(made.gradients(x[:3], y[:3]), wanted)


# ---- values that must survive ----------------------------------------------------------------------------------------

OVERWRITE = {
    "Relu": lambda net, h: net.Relu(h),
    "Identity": lambda net, h: net.Relu(net.Identity(h)),
    "Dropout": lambda net, h: net.Relu(net.Dropout(h)),
    "Add": lambda net, h: net.Add(h, net.parameter(3, 1, 1)),
    "Mul": lambda net, h: net.Mul(h, h),
    "BatchNormalization": lambda net, h: net.norm(h),
    "Reshape": lambda net, h: net.Relu(net.Reshape(h, shape=[48])),
    "Flatten-twice": lambda net, h: net.Relu(net.Flatten(net.Flatten(h))),
}


def kept(op_type: str, source: str) -> Graph:
    """An output that another node would like to overwrite: a computed value, or the input itself."""
    net = Net((3, 4, 4))
    trained = net.parameter(3, 4, 4)
    h = net.Mul("input", trained) if source == "computed" else "input"
    behind = OVERWRITE[op_type](net, h)
    net.graph.set_outputs([net.Add(h, trained) if source == "input" else h, behind])
    net.graph.trainable = {trained}  # the loss does not depend on the second output
    return net.graph


@pytest.mark.parametrize("source", ["computed", "input"])
@pytest.mark.parametrize("op_type", OVERWRITE)
def test_an_output_is_not_overwritten(op_type, source):
    graph, (x, _) = kept(op_type, source), batch(5, (3, 4, 4))
    assert_close(learner(graph, loss="mse").logits(x), reference.evaluate(graph, x), 1e-6)


def test_the_second_output_is_right_too():
    graph, (x, _) = kept("Relu", "computed"), batch(3, (3, 4, 4))
    made = learner(graph, loss="mse")
    first = made.logits(x)
    second = made.plans.executor(False, 3).value(graph.values[graph.outputs[1]], 3)
    np.testing.assert_array_equal(second, np.maximum(first, 0))


# ---- kinks -----------------------------------------------------------------------------------------------------------

KINKS = {
    "relu": ("Relu", {}, [0.0], lambda f, x: f.relu(x)),
    "leakyrelu": ("LeakyRelu", {"alpha": 0.2}, [0.0], lambda f, x: f.leaky_relu(x, 0.2)),
    "relu6": ("Clip", {"min": 0.0, "max": 6.0}, [0.0, 6.0], lambda f, x: f.relu6(x)),
    "hardsigmoid": ("HardSigmoid", {"alpha": 1 / 6}, [-3.0, 3.0], lambda f, x: f.hardsigmoid(x)),
    "elu": ("Elu", {"alpha": 0.3}, [0.0], lambda f, x: f.elu(x, 0.3)),
    "hardswish": ("HardSwish", {}, [-3.0, 3.0], lambda f, x: f.hardswish(x)),
}


@pytest.mark.parametrize("name", KINKS)
def test_slopes_at_kinks_are_those_of_torch(name):
    torch = pytest.importorskip("torch")
    op_type, attributes, points, function = KINKS[name]
    at = torch.tensor(points, dtype=torch.float64, requires_grad=True)
    function(torch.nn.functional, at).sum().backward()
    net = Net((len(points),))
    shift = net.graph.parameter("shift", np.zeros(len(points)))
    net.graph.set_outputs([getattr(net, op_type)(net.Add("input", shift), **attributes)])
    x = np.array([points], np.float32)
    made = learner(net.graph, loss="mse")
    slope = made.gradients(x, made.logits(x) - 1)["shift"] * len(points) / 2  # the loss's gradient is 2 / size
    _, twin = reference.gradients(net.graph, x, reference.evaluate(net.graph, x) - 1, "mse")
    np.testing.assert_allclose(slope, at.grad, atol=1e-6)
    np.testing.assert_allclose(twin["shift"] * len(points) / 2, at.grad, atol=1e-6)


# ---- dropout ---------------------------------------------------------------------------------------------------------

PLANE = (1, 40, 50)


def dropped(ratio: float, times: int = 1, **settings) -> Learner:
    """A network that does nothing but drop; its input and its output pass a product with ones."""
    graph = Graph("dropout", PLANE)
    x = graph.add("Mul", ["input", graph.parameter("before", np.ones(PLANE))])
    for _ in range(times):
        x = graph.add("Dropout", [x], ratio=ratio)
    graph.set_outputs([graph.add("Mul", [x, graph.parameter("behind", np.ones(PLANE))])])
    return learner(graph, loss="mse", **settings)


def training_output(made: Learner, count: int) -> np.ndarray:
    """Return what the network computes from ones in a training step."""
    ones = np.ones((count, *PLANE), np.float32)
    executor, sources, _ = made._take_batch(ones, ones)
    executor.run(sources, until="forward")
    return executor.value(made.graph.values[made.graph.outputs[0]], count)


@pytest.mark.parametrize("ratio", [0.1, 0.5, 0.9])
def test_dropout_drops_its_share_and_scales_the_rest(ratio):
    out = training_output(dropped(ratio), 8)
    deviation = np.sqrt(ratio * (1 - ratio) / out.size)
    assert abs((out == 0).mean() - ratio) < 4 * deviation
    np.testing.assert_allclose(out[out != 0], 1 / (1 - ratio), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 2, 3], ids=["samples", "rows", "columns"])
def test_dropout_is_not_correlated(axis):
    zeros = np.moveaxis(training_output(dropped(0.5), 8) == 0, axis, 0).astype(float)
    correlation = np.corrcoef(zeros.reshape(len(zeros), -1))
    between = np.abs(correlation[np.triu_indices(len(zeros), 1)])
    assert between.max() < 5 / np.sqrt(zeros[0].size)


def test_dropout_backward_uses_the_same_mask():
    made = dropped(0.4)
    ones = np.ones((1, *PLANE), np.float32)
    zeros = training_output(made, 1)[0] == 0
    grads = made.gradients(ones, ones)
    assert_same({"before": grads["before"] == 0, "behind": grads["behind"] == 0}, {"before": zeros, "behind": zeros})
    np.testing.assert_allclose(grads["before"], grads["behind"], rtol=1e-5)  # both (y - 1) * mask / (1 - ratio)


@pytest.mark.parametrize("lanes", [4, 8, 16])
@pytest.mark.parametrize("threads", [1, 3])
def test_dropout_does_not_depend_on_lanes_and_threads(lanes, threads):
    assert_same({"out": training_output(dropped(0.5, lanes=lanes, threads=threads), 19)},
                {"out": training_output(dropped(0.5), 19)})  # fmt: skip


def test_dropout_has_another_mask_at_every_step_and_the_same_again_with_the_same_seed():
    ones = np.ones((4, *PLANE), np.float32)
    masks = []
    for made in (dropped(0.5, seed=3), dropped(0.5, seed=3), dropped(0.5, seed=4)):
        masks.append([])
        for _ in range(2):
            masks[-1].append(training_output(made, 4) != 0)
            made.partial_fit(ones, ones)
    assert (masks[0][0] == masks[1][0]).all()
    assert (masks[0][1] == masks[1][1]).all()
    for other in (masks[0][1], masks[2][0], masks[2][1]):
        assert abs((masks[0][0] == other).mean() - 0.5) < 0.03


def test_two_dropouts_have_different_masks():
    kept_share = (training_output(dropped(0.5, times=2), 8) != 0).mean()
    assert abs(kept_share - 0.25) < 0.02


def test_dropout_does_nothing_when_predicting():
    x = np.random.default_rng(0).normal(size=(3, *PLANE)).astype(np.float32)
    assert_same({"out": dropped(0.5).logits(x)}, {"out": x})


def shifted(graph: Graph) -> tuple[Graph, np.ndarray, np.ndarray]:
    """Return a network whose normalisations do not only normalise, and a batch of three."""
    rng = np.random.default_rng(1)
    for name in graph.trainable:
        if "bn" in name:
            graph.arrays[name] += rng.uniform(-0.5, 0.5, graph.arrays[name].shape).astype(np.float32)
    x = rng.standard_normal((3, *graph.input_shape)).astype(np.float32)
    return graph, x, rng.integers(0, graph.output_shape[0], 3)


@pytest.mark.parametrize("make", [learner, channel_learner], ids=["samples", "channels"])
def test_maps_computed_again_are_the_same_bit_for_bit(make, monkeypatch):
    graph, x, y = shifted(ds_cnn((1, 12, 8)))
    made = make(graph)
    assert any(name.startswith("edgetrain.again.") for name in made.training_plan().graph.values)
    found = made.gradients(x, y)
    monkeypatch.setattr(keeping, "compute_again", lambda train, forward_count: {})
    dense = make(graph)
    assert not any(name.startswith("edgetrain.again.") for name in dense.training_plan().graph.values)
    assert_same(found, dense.gradients(x, y))


@pytest.mark.parametrize("make", [learner, channel_learner], ids=["samples", "channels"])
@pytest.mark.parametrize("part", ["_pool_first", "keep_masks"])
def test_masks_and_the_order_of_pools_change_no_bit(make, part, monkeypatch):
    net = Net((3, 9, 10))
    x = net.MaxPool(net.Relu(net.conv("input", 4, 3, 3, 3)), kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 1, 1])
    x = net.MaxPool(net.Clip(net.conv(x, 5, 4, 1, 1), min=-0.5, max=0.5), kernel_shape=[2, 2])
    x = net.GlobalAveragePool(net.Relu(net.conv(x, 6, 5, 1, 1)))
    net.graph.set_outputs([net.Flatten(x)])
    graph, x, y = shifted(net.graph)
    made, plain = make(graph), {"_pool_first": lambda graph, fused: graph.nodes, "keep_masks": lambda *_: 0}[part]
    found, nodes = made.gradients(x, y), [node.op_type for node in made.training_plan().graph.nodes]
    monkeypatch.setattr(autodiff if part in vars(autodiff) else keeping, part, plain)
    without = make(graph)
    assert nodes != [node.op_type for node in without.training_plan().graph.nodes]
    assert_same(found, without.gradients(x, y))


def test_a_mask_takes_the_place_of_an_output_that_only_the_slope_reads():
    net = Net((3, 8, 8))
    y = net.Relu(net.conv("input", 4, 3, 3, 3))
    net.graph.set_outputs([net.Flatten(net.GlobalAveragePool(y))])
    plan = learner(net.graph).training_plan()
    positions = {node.op_type: i for i, node in enumerate(plan.graph.nodes)}
    assert plan.lifetimes[plan.buffer(y)][1] <= positions["GlobalAveragePool"]
    assert plan.lifetimes[plan.buffer(f"edgetrain.mask.{y}")][1] == positions["ReluMaskGrad"]
    assert plan.sizes[plan.buffer(f"edgetrain.mask.{y}")] * 9 == plan.sizes[plan.buffer(y)]  # 36 pixels in four words


def test_the_place_in_a_pools_window_takes_as_few_bits_as_fit_a_word():
    kernels = [(1, 1), (1, 2), (2, 2), (1, 5), (4, 4), (1, 17)]
    pools = [Pool(kernel, (1, 1), (1, 1), (0, 0, 0, 0), kernel, (1, 1)) for kernel in kernels]
    assert [pool.position_bits for pool in pools] == [1, 1, 2, 4, 4, 8]


@pytest.mark.parametrize("row", [0, 3], ids=["first-row-far-away", "another-row-far-away"])
def test_statistics_of_maps_whose_first_row_is_no_guide(row):
    """The mean of the first row is the pivot of a single pass; where that cancels, a second pass follows."""
    rng = np.random.default_rng(2)
    net = Net((2, 40, 7))
    net.graph.set_outputs([net.Mul(net.norm("input"), net.positive(2, 40, 7))])
    x = rng.normal(0, 0.01, (5, 2, 40, 7)).astype(np.float32)
    x[:, :, row] += 300.0
    x[:, 1] -= 300.0
    made, y = learner(net.graph, loss="mse"), rng.normal(size=(5, 2, 40, 7)).astype(np.float32)
    loss, wanted = reference.gradients(net.graph, x, y, "mse")
    assert_all_close(made.gradients(x, y), wanted, 1e-5)
    assert made.partial_fit(x, y).loss == pytest.approx(loss, rel=1e-5)
