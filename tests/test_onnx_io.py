"""ONNX files of PyTorch's exporters come in with the same outputs; what goes out runs in onnxruntime and comes back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import edgetrain as et
from edgetrain.checkpoint import load_checkpoint
from edgetrain.errors import GraphError, ModelError, UsageError
from edgetrain.graph import Graph, Normalization
from edgetrain.onnx_io import load_onnx, save_onnx
from edgetrain.reference import evaluate
from tests import torch_models
from tests.onnx_text import net, ones

Array = np.ndarray


@dataclass(frozen=True)
class Exported:
    """A network of the table as PyTorch wrote it."""

    path: Path
    model: nn.Module
    x: Array

    @property
    def y(self) -> Array:
        with torch.no_grad():
            return self.model(torch.from_numpy(self.x)).numpy()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Exported]:
    """Export each network once per exporter."""
    folder, done = tmp_path_factory.mktemp("exported"), {}

    def get(name: str, exporter: str) -> Exported:
        if (name, exporter) not in done:
            path = folder / f"{name}-{exporter}.onnx"
            model = torch_models.export(name, path, dynamo=exporter == "dynamo")
            x = np.random.default_rng(1).normal(size=(5, *torch_models.MODELS[name][1])).astype(np.float32)
            done[name, exporter] = Exported(path, model, x)
        return done[name, exporter]

    return get


def outputs(graph: Graph, x: Array) -> Array:
    """Return what a user of the network gets: logits, or probabilities where the file ends in Softmax."""
    logits = evaluate(graph, x)
    if not graph.softmax_output:
        return logits
    return torch.softmax(torch.from_numpy(np.asarray(logits)), 1).numpy()


def run(path: Path, x: Array) -> Array:
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


EXPORTERS = ("script", "dynamo")


# --- import ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exporter", EXPORTERS)
@pytest.mark.parametrize("name", torch_models.MODELS)
def test_imported_network_computes_what_pytorch_computes(
    name: str, exporter: str, exported: Callable[[str, str], Exported]
) -> None:
    file = exported(name, exporter)
    np.testing.assert_allclose(outputs(load_onnx(file.path), file.x), file.y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", torch_models.MODELS)
def test_fixed_batch_folded_and_oldest_opset(name: str, tmp_path: Path) -> None:
    opset = {"squeeze_excite": 14, "curved": 12}.get(name, 11)  # HardSwish is in ONNX since 14, Celu since 12
    model = torch_models.export(name, tmp_path / "m.onnx", dynamo=False, training=False, dynamic=False, opset=opset)
    x = np.random.default_rng(2).normal(size=(3, *torch_models.MODELS[name][1])).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(outputs(load_onnx(tmp_path / "m.onnx"), x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", torch_models.MODELS)
def test_learner_runs_the_imported_network(name: str, exported: Callable[[str, str], Exported]) -> None:
    file = exported(name, "script")
    graph = load_onnx(file.path)
    learner = et.Learner(graph, batch_size=4, seed=0)
    got = learner.predict_proba(file.x) if graph.softmax_output else learner.logits(file.x)
    np.testing.assert_allclose(got, file.y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("exporter", EXPORTERS)
def test_parameters_of_a_file_are_those_of_the_pytorch_module(
    exporter: str, exported: Callable[[str, str], Exported]
) -> None:
    file = exported("lenet", exporter)
    graph = load_onnx(file.path)
    assert graph.name == f"lenet-{exporter}"
    expected = {name: tensor.detach().numpy() for name, tensor in file.model.named_parameters()}
    assert graph.trainable == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(graph.arrays[name], array)


def test_equal_weights_of_different_layers_stay_two_arrays(exported: Callable[[str, str], Exported]) -> None:
    # The exporter stores fresh, hence equal, BatchNormalization scales once and copies them with Identity nodes.
    file = exported("mobilenet", "script")
    expected = {name for name, _ in file.model.named_parameters()}
    assert load_onnx(file.path).trainable == expected


def test_one_weight_used_by_two_nodes_stays_one_array() -> None:
    text = "(float[N,2] x) => (float[N,2] y) { h = MatMul(x, w) y = MatMul(h, w) }"
    graph = load_onnx(net(text, w=ones(2, 2)))
    assert list(graph.arrays) == ["w"]


def test_shared_running_averages_become_one_per_layer() -> None:
    text = """(float[N,2] x) => (float[N,2] y) {
        h = BatchNormalization(x, one, zero, zero, one) [second] y = BatchNormalization(h, one, zero, zero, one) }"""
    graph = load_onnx(net(text, one=ones(2), zero=0 * ones(2)))
    first, second = ([value.name for value in node.inputs[1:]] for node in graph.nodes)
    assert len({*first[2:], *second[2:]}) == 4
    assert not graph.trainable.intersection(first[2:] + second[2:])


def test_running_averages_and_constants_are_not_trainable(exported: Callable[[str, str], Exported]) -> None:
    graph = load_onnx(exported("cnn1d", "script").path)
    assert set(graph.arrays) - graph.trainable == {"1.running_mean", "1.running_var"}
    assert load_onnx(exported("hand_written", "script").path).trainable == {
        "bias", "weight", "conv1.bias", "conv1.weight", "conv2.bias", "conv2.weight"
    }  # fmt: skip


def test_softmax_at_the_end_is_taken_off(exported: Callable[[str, str], Exported]) -> None:
    graph = load_onnx(exported("softmax", "dynamo").path)
    assert graph.softmax_output
    assert graph.nodes[-1].op_type == "Gemm"


def test_log_softmax_at_the_end_is_taken_off_and_comes_back(tmp_path: Path) -> None:
    """As PyTorch's MNIST example ends; checkpoints know it, too."""
    text = "(float[N,3] x) => (float[N,2] y) { z = Gemm(x, w, b) y = LogSoftmax<axis = 1>(z) }"
    rng = np.random.default_rng(0)
    model = net(text, w=rng.normal(size=(3, 2)).astype(np.float32), b=rng.normal(size=2).astype(np.float32))
    graph, x = load_onnx(model), rng.normal(size=(4, 3)).astype(np.float32)
    assert [node.op_type for node in graph.nodes] == ["Gemm"]
    assert (graph.softmax_output, graph.log_softmax_output) == (False, True)
    learner = et.Learner(graph, batch_size=4, threads=1)
    learner.save(tmp_path / "a.safetensors")
    load_checkpoint(tmp_path / "a.safetensors").export_onnx(tmp_path / "m.onnx")
    onnx.save(model, tmp_path / "first.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), run(tmp_path / "first.onnx", x), rtol=1e-5, atol=1e-6)
    again = load_onnx(tmp_path / "m.onnx")
    assert (again.softmax_output, again.log_softmax_output) == (False, True)


def test_a_bias_of_one_output_is_trained() -> None:
    """As Keras writes ``Dense(1)``; a number without an axis is no bias."""
    text = "(float[N,3] x) => (float[N,1] y) { z = MatMul(x, w) y = Add(z, b) }"
    assert load_onnx(net(text, w=ones(3, 1), b=ones(1))).trainable == {"w", "b"}
    assert load_onnx(net(text, w=ones(3, 1), b=ones())).trainable == {"w"}


def test_slopes_are_trained_and_fixed_factors_are_not(tmp_path: Path) -> None:
    text = "(float[N,3] x) => (float[N,3] y) { y = PRelu(x, s) }"
    graph = load_onnx(net(text, s=0.5 * ones(3)))
    save_onnx(graph, tmp_path / "out.onnx")
    assert graph.trainable == load_onnx(tmp_path / "out.onnx").trainable == {"s"}
    text = "(float[N,3] x) => (float[N,3] y) { n = Clip(x, , m) l = Mul(n, s) p = Relu(x) y = Add(p, l) }"
    assert not load_onnx(net(text, s=0.5 * ones(3), m=np.zeros((), np.float32))).trainable


@pytest.mark.parametrize(("start", "end", "kept"), [(1, 3, [1, 2]), (-2, 2**31 - 1, [2, 3]), (-9, -1, [0, 1, 2])])
def test_slices_along_axes_of_a_sample(start: int, end: int, kept: list[int]) -> None:
    text = f"(float[N,4] x) => (float[N,{len(kept)}] y) {{ y = Slice(x, a, b, c) }}"
    graph = load_onnx(net(text, a=np.array([start]), b=np.array([end]), c=np.array([1])))
    x = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.testing.assert_array_equal(evaluate(graph, x), x[:, kept])


def test_splits_of_unequal_parts() -> None:
    text = "(float[N,5] x) => (float[N,2] y) { a, , b = Split<axis = -1>(x, s) y = Add(a, b) }"
    x = np.arange(10, dtype=np.float32).reshape(2, 5)
    np.testing.assert_array_equal(evaluate(load_onnx(net(text, s=np.array([2, 1, 2]))), x), x[:, :2] + x[:, 3:])


def test_numbers_of_a_sample_are_repeated_as_squeeze_and_excite_does() -> None:
    text = """(float[N,3,4,5] x) => (float[N,3,4,5] y) {
        s = GlobalAveragePool(x) n = Shape(x) e = Expand(s, n) y = Mul(x, e) }"""
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_allclose(evaluate(load_onnx(net(text)), x), x * x.mean((2, 3), keepdims=True), rtol=1e-5)


def test_an_expand_of_a_number_that_changes_nothing() -> None:
    text = "(float[N,3] x) => (float[N] y) { z = MatMul(x, w) s = Squeeze(z, a) n = Shape(s) y = Expand(s, n) }"
    graph = load_onnx(net(text, w=ones(3, 1), a=np.array([1])))
    np.testing.assert_allclose(evaluate(graph, ones(2, 3)), [3, 3])


def test_a_constant_is_cast_as_a_value_of_the_network() -> None:
    """As PyTorch's exporter writes bounds and biases where it does not optimise."""
    text = "(float[N,5] x) => (float[N,5] y) { d = CastLike(c, x) y = Add(x, d) }"
    graph, x = load_onnx(net(text, c=np.arange(5))), ones(2, 5)
    np.testing.assert_allclose(evaluate(graph, x), x + np.arange(5))


def test_external_data_beside_the_file(exported: Callable[[str, str], Exported], tmp_path: Path) -> None:
    file = exported("lenet", "script")
    model = onnx.load(file.path)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    np.testing.assert_allclose(outputs(load_onnx(tmp_path / "m.onnx"), file.x), file.y, rtol=1e-4, atol=1e-5)
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(ModelError, match=r"m\.onnx' cannot be read as an ONNX model"):
        load_onnx(tmp_path / "m.onnx")


def test_branch_with_a_constant_condition_is_taken() -> None:
    # torch.squeeze on an axis that might not have size 1 is exported like this.
    text = """(float[N,3,1] x) => (float[N,3] y) {
        s = Shape(x) i = Constant<value = int64[1] {2}>() n = Gather(s, i) one = Constant<value = int64[1] {1}>()
        c = Equal(n, one)
        y = If(c) <then_branch = t () => (float[N,3] a) { ax = Constant<value = int64[1] {2}>() a = Squeeze(x, ax) },
                   else_branch = e () => (float[N,3] b) { b = Identity(x) }>
    }"""
    graph = load_onnx(net(text))
    assert [node.op_type for node in graph.nodes] == ["Flatten"]


@pytest.mark.parametrize(("index", "shape"), [(-1, (3,)), ([1], (3, 1)), ([[0]], (3, 1, 1))])
def test_one_index_of_an_axis_is_cut_out(index: Any, shape: tuple[int, ...]) -> None:
    text = f"(float[N,3,4] x) => (float[{','.join(['N', *map(str, shape)])}] y) {{ y = Gather<axis = 2>(x, i) }}"
    graph = load_onnx(net(text, i=np.array(index)))
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    np.testing.assert_array_equal(outputs(graph, x), np.take(x, index, axis=2))


@pytest.mark.parametrize("count", [1, 4, 9, 17])
def test_a_network_may_give_one_number_per_sample(count: int, tmp_path: Path) -> None:
    text = "(float[N,6] x) => (float[N] y) { z = Gemm<transB = 1>(x, w, b) y = Squeeze(z, a) }"
    graph = load_onnx(net(text, w=ones(1, 6), b=ones(1), a=np.array([1])))
    x, y = np.random.default_rng(count).normal(size=(count, 6)).astype(np.float32), np.zeros(count, np.float32)
    learner = et.Learner(graph, batch_size=count, loss="mse")
    np.testing.assert_allclose(learner.logits(x), x.sum(1) + 1, atol=1e-5)
    wanted = (2 * (x.sum(1) + 1)[:, None] * x).mean(0, keepdims=True)
    np.testing.assert_allclose(learner.gradients(x, y)["w"], wanted, atol=1e-5)
    learner.export_onnx(tmp_path / "one.onnx")
    assert load_onnx(tmp_path / "one.onnx").output_shape == ()
    for call in (learner.predict, learner.predict_proba, lambda x: et.Learner(graph).evaluate(x, y.astype(int))):
        with pytest.raises(GraphError, match=r"outputs \(N\), expected \(N, classes\)"):
            call(x)


@pytest.mark.parametrize("ending", ["Softmax", "LogSoftmax"])
def test_squared_errors_behind_a_softmax_are_refused(ending: str) -> None:
    graph = load_onnx(net(f"(float[N,2] x) => (float[N,3] y) {{ l = MatMul(x, w) y = {ending}(l) }}", w=ones(2, 3)))
    with pytest.raises(GraphError, match=f"ends in a {ending}"):
        et.Learner(graph, loss="mse")


@pytest.mark.parametrize("channels", [89, 96, 97])
def test_a_bias_of_equal_numbers_is_no_expansion_over_the_batch(channels: int) -> None:
    """The batch is 97 or 89 while constants are computed."""
    text = f"(float[N,2] x) => (float[N,{channels}] y) {{ m = MatMul(x, w) y = Add(m, b) }}"
    graph = load_onnx(net(text, w=ones(2, channels), b=ones(channels)))
    assert graph.trainable == {"w", "b"}
    np.testing.assert_array_equal(outputs(graph, ones(1, 2)), 3 * ones(1, channels))


KERAS = """(float[N,8,6,3] x) => (float[N,4] y) {
    t = Transpose<perm = [0,3,1,2]>(x) c = Conv<pads = [1,1,1,1]>(t, k, b) r = Relu(c)
    p = MaxPool<kernel_shape = [2,2], strides = [2,2]>(r) u = Transpose<perm = [0,2,3,1]>(p) f = Reshape(u, s)
    m = MatMul(f, w) y = Add(m, v) }"""


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("count", [1, 3, 16])
def test_networks_of_keras_have_their_channels_last(count: int, normalized: bool, tmp_path: Path) -> None:
    """Inside they are first: data are (N, C, H, W) as everywhere, files keep their input and the order of features."""
    rng = np.random.default_rng(count)
    shapes = {"k": (5, 3, 3, 3), "b": (5,), "w": (60, 4), "v": (4,)}
    arrays = {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    model = net(KERAS, s=np.array([-1, 60]), **arrays)
    onnx.save(model, tmp_path / "keras.onnx")
    graph = load_onnx(tmp_path / "keras.onnx")
    assert (graph.input_shape, graph.channels_last, graph.trainable) == ((3, 8, 6), True, set(shapes))
    if normalized:
        graph.normalization = Normalization(np.array([0.1, 0.2, 0.3], np.float32), np.array([1, 2, 0.5], np.float32))
    x = rng.normal(size=(count, 8, 6, 3)).astype(np.float32)
    mean, std = ([0.1, 0.2, 0.3], [1, 2, 0.5]) if normalized else (0, 1)
    learner = et.Learner(graph, batch_size=count)
    wanted = run(tmp_path / "keras.onnx", ((x - mean) / std).astype(np.float32))
    first = np.moveaxis(x, 3, 1)
    np.testing.assert_allclose(learner.logits(first), wanted, atol=1e-5)
    learner.partial_fit(first, rng.integers(0, 4, count))
    learner.export_onnx(tmp_path / "trained.onnx")
    learner.save(tmp_path / "trained.safetensors")
    np.testing.assert_allclose(run(tmp_path / "trained.onnx", x), learner.logits(first), atol=1e-5)
    for again in (et.Learner(load_onnx(tmp_path / "trained.onnx")), load_checkpoint(tmp_path / "trained.safetensors")):
        assert again.graph.channels_last
        np.testing.assert_allclose(again.logits(first), learner.logits(first), atol=1e-5)
    assert learner.load_parameters(tmp_path / "keras.onnx").by_name == ("k", "b", "w", "v")


def test_an_input_that_others_read_too_keeps_its_axes() -> None:
    text = """(float[N,4,6,3] x) => (float[N,3,4,6] y) {
        t = Transpose<perm = [0,3,1,2]>(x) r = Relu(x) u = Transpose<perm = [0,3,1,2]>(r) y = Add(t, u) }"""
    graph = load_onnx(net(text))
    assert (graph.input_shape, graph.channels_last) == ((4, 6, 3), False)
    x = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32)
    np.testing.assert_array_equal(outputs(graph, x), np.moveaxis(x + np.maximum(x, 0), 3, 1))


@pytest.mark.parametrize("sizes", [(6, 6), (4, 6)])
def test_a_transpose_behind_an_identity_keeps_its_meaning_in_the_file(sizes: tuple[int, int], tmp_path: Path) -> None:
    """The file looks like one of Keras then; it tells that it is none."""
    rows, columns = sizes
    text = f"""(float[N,{rows},{columns}] x) => (float[N,{columns},{rows}] y) {{
        i = Identity(x) t = Transpose<perm = [0,2,1]>(i) y = Relu(t) }}"""
    graph = load_onnx(net(text))
    assert (graph.input_shape, graph.channels_last) == (sizes, False)
    save_onnx(graph, tmp_path / "again.onnx")
    again = load_onnx(tmp_path / "again.onnx")
    assert (again.input_shape, again.channels_last) == (sizes, False)
    x = np.random.default_rng(0).normal(size=(2, *sizes)).astype(np.float32)
    np.testing.assert_array_equal(outputs(again, x), outputs(graph, x))


def test_the_transpose_of_one_channel_may_have_become_a_reshape(tmp_path: Path) -> None:
    text = """(float[N,6,4,1] x) => (float[N,3] y) {
        t = Reshape(x, s) c = Conv<pads = [1,1,1,1]>(t, k) f = Flatten(c) y = MatMul(f, w) }"""
    rng = np.random.default_rng(0)
    arrays = {"k": rng.normal(size=(2, 1, 3, 3)), "w": rng.normal(size=(48, 3))}
    model = net(text, s=np.array([-1, 1, 6, 4]), **{name: a.astype(np.float32) for name, a in arrays.items()})
    graph = load_onnx(model)
    assert (graph.input_shape, graph.channels_last) == ((1, 6, 4), True)
    onnx.save(model, tmp_path / "keras.onnx")
    save_onnx(graph, tmp_path / "again.onnx")
    x = rng.normal(size=(5, 6, 4, 1)).astype(np.float32)
    for file in ("keras.onnx", "again.onnx"):
        np.testing.assert_allclose(run(tmp_path / file, x), outputs(graph, np.moveaxis(x, 3, 1)), atol=1e-5)


def test_a_shuffle_with_an_identity_in_its_middle_is_one() -> None:
    """As PyTorch writes ``.contiguous()`` where it does not optimise."""
    text = """(float[N,4,2,2] x) => (float[N,4,2,2] y) {
        g = Reshape(x, s) t = Transpose<perm = [0,2,1,3,4]>(g) i = Identity(t) y = Reshape(i, r) }"""
    graph = load_onnx(net(text, s=np.array([0, 2, 2, 2, 2]), r=np.array([0, 4, 2, 2])))
    assert [node.op_type for node in graph.nodes] == ["ChannelShuffle"]


def test_gemm_factors_go_into_the_weights() -> None:
    text = "(float[N,2] x) => (float[N,3] y) { y = Gemm<alpha = 0.5, beta = 2.0, transB = 1>(x, w, b) }"
    graph = load_onnx(net(text, w=ones(3, 2), b=np.float32(1)))
    np.testing.assert_array_equal(outputs(graph, ones(1, 2)), 3 * ones(1, 3))


@pytest.mark.parametrize(("layer", "turned"), [
    ("t = Transpose<perm = [1, 0]>(w) y = MatMul(x, t)", True), ("t = Transpose(w) y = Gemm(x, t)", True),
    ("t = Transpose(w) y = Gemm<transB = 1>(x, t)", False),
], ids=str)  # fmt: skip
def test_weights_turned_in_the_file_keep_name_and_layout(layer: str, turned: bool) -> None:
    rng = np.random.default_rng(0)
    w, x = rng.normal(size=(3, 2) if turned else (2, 3)).astype(np.float32), rng.normal(size=(4, 2)).astype(np.float32)
    graph = load_onnx(net(f"(float[N,2] x) => (float[N,3] y) {{ {layer} }}", w=w))
    assert [(node.op_type, node.get("transB", 0)) for node in graph.nodes] == [("Gemm", int(turned))]
    np.testing.assert_array_equal(graph.arrays["w"], w)
    np.testing.assert_allclose(outputs(graph, x), x @ (w.T if turned else w), rtol=1e-6)


@pytest.mark.parametrize("keepdims", [0, 1])
def test_mean_over_one_spatial_axis_is_a_pool(keepdims: int) -> None:
    text = f"(float[N,2,3,4] x) => (float[N,2,s,4] y) {{ y = ReduceMean<axes = [2], keepdims = {keepdims}>(x) }}"
    x = np.random.default_rng(0).normal(size=(3, 2, 3, 4)).astype(np.float32)
    np.testing.assert_allclose(outputs(load_onnx(net(text)), x), x.mean(2, keepdims=bool(keepdims)), atol=1e-6)


def test_unused_nodes_and_outputs_are_dropped() -> None:
    text = "(float[N,2] x) => (float[N,2] y) { z = Erf(x) y, mask = Dropout(x) }"
    assert [node.op_type for node in load_onnx(net(text)).nodes] == ["Dropout"]


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("name", torch_models.MODELS)
def test_written_file_gives_the_same_outputs_in_onnxruntime(
    name: str, batch: int, exported: Callable[[str, str], Exported], tmp_path: Path
) -> None:
    file = exported(name, "script")
    save_onnx(load_onnx(file.path), tmp_path / "out.onnx")
    x = np.resize(file.x, (batch, *file.x.shape[1:]))
    with torch.no_grad():
        expected = file.model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(run(tmp_path / "out.onnx", x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", torch_models.MODELS)
def test_reading_back_gives_the_same_graph(name: str, exported: Callable[[str, str], Exported], tmp_path: Path) -> None:
    graph = load_onnx(exported(name, "script").path)
    save_onnx(graph, tmp_path / "out.onnx")
    again = load_onnx(tmp_path / "out.onnx")
    assert [(n.name, n.op_type, n.inputs, n.outputs) for n in again.nodes] == [
        (n.name, n.op_type, n.inputs, n.outputs) for n in graph.nodes
    ]
    assert again.trainable == graph.trainable
    assert again.softmax_output == graph.softmax_output
    assert again.arrays.keys() == graph.arrays.keys()
    for array_name, array in graph.arrays.items():
        np.testing.assert_array_equal(again.arrays[array_name], array)


def tiny_graph() -> Graph:
    graph = Graph("tiny", input_shape=(2, 4, 4))
    weight = graph.parameter("fc.weight", np.random.default_rng(0).normal(size=(3, 32)))
    flat = graph.add("Flatten", ["input"], axis=1)
    graph.set_outputs([graph.add("Gemm", [flat, weight], transB=1)])
    graph.class_names = ("cat", "dog", "Wölfin")
    graph.normalization = Normalization(np.array([0.5, -1], np.float32), np.array([2, 0.25], np.float32))
    graph.softmax_output = True
    return graph


def test_normalisation_softmax_and_class_names_travel_with_the_file(tmp_path: Path) -> None:
    graph, x = tiny_graph(), np.random.default_rng(1).normal(size=(3, 2, 4, 4)).astype(np.float32)
    save_onnx(graph, tmp_path / "m.onnx", metadata={"trained_on": "nothing"})
    logits = ((x - np.array([0.5, -1]).reshape(2, 1, 1)) / np.array([2, 0.25]).reshape(2, 1, 1)).reshape(3, -1)
    logits = logits @ graph.arrays["fc.weight"].T
    expected = torch.softmax(torch.from_numpy(logits), 1).numpy()
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), expected, rtol=1e-4, atol=1e-5)

    again = load_onnx(tmp_path / "m.onnx")
    assert [node.op_type for node in again.nodes] == ["Flatten", "Gemm"]
    assert again.class_names == graph.class_names
    assert again.softmax_output
    np.testing.assert_array_equal(again.normalization.mean, graph.normalization.mean)
    np.testing.assert_array_equal(again.normalization.std, graph.normalization.std)


def test_trained_network_is_written_with_what_it_learned(
    exported: Callable[[str, str], Exported], tmp_path: Path
) -> None:
    file = exported("cnn1d", "script")
    learner = et.Learner(load_onnx(file.path), batch_size=5, seed=0)
    for _ in range(3):
        learner.partial_fit(file.x, np.arange(5) % 4)
    learner.export_onnx(tmp_path / "m.onnx")
    assert not np.allclose(learner.logits(file.x), file.y, atol=1e-3)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", file.x), learner.logits(file.x), rtol=1e-4, atol=1e-4)


def test_facts_about_the_written_file(tmp_path: Path) -> None:
    save_onnx(tiny_graph(), tmp_path / "m.onnx", metadata={"trained_on": "nothing"})
    model = onnx.load(tmp_path / "m.onnx")
    assert (model.ir_version, model.opset_import[0].version) == (8, 17)
    assert (model.producer_name, model.producer_version) == ("edgetrain", et.__version__)
    assert {p.key: p.value for p in model.metadata_props} == {
        "trained_on": "nothing", "class_names": '["cat", "dog", "W\\u00f6lfin"]'
    }  # fmt: skip
    for info in [*model.graph.input, *model.graph.output]:
        assert info.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_trained_arrays_replace_those_of_the_graph(tmp_path: Path) -> None:
    graph = tiny_graph()
    save_onnx(graph, tmp_path / "m.onnx", arrays={"fc.weight": ones(3, 32)})
    np.testing.assert_array_equal(load_onnx(tmp_path / "m.onnx").arrays["fc.weight"], ones(3, 32))
    with pytest.raises(ModelError, match=r"array 'fc\.weight' has the shape \(3, 2\); expected \(3, 32\)"):
        save_onnx(graph, tmp_path / "m.onnx", arrays={"fc.weight": ones(3, 2)})
    with pytest.raises(ModelError, match=r"'fc' is no array of graph 'tiny'; it has: fc\.weight"):
        save_onnx(graph, tmp_path / "m.onnx", arrays={"fc": ones(3, 32)})


def test_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.onnx").write_bytes(b"old")

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UsageError, match=r"m\.onnx: cannot be written \(no space left on device\)"):
        save_onnx(tiny_graph(), tmp_path / "m.onnx")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", b"old")]


def test_dilated_average_pool_needs_a_newer_opset(tmp_path: Path) -> None:
    graph = Graph("dilated", input_shape=(1, 7, 7))
    graph.set_outputs([graph.add("AveragePool", ["input"], kernel_shape=[2, 2], dilations=[3, 3])])
    save_onnx(graph, tmp_path / "m.onnx")
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == 19
    x = np.random.default_rng(0).normal(size=(2, 1, 7, 7)).astype(np.float32)
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), outputs(graph, x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(7, 7), (6, 8), (7, 8), (7,)])
@pytest.mark.parametrize("op_type", ["MaxPool", "AveragePool"])
@pytest.mark.parametrize(("kernel", "stride", "pad"), [(2, 3, 1), (3, 2, 1), (3, 3, 1), (2, 2, 0)])
def test_pools_leave_out_a_window_that_begins_in_the_padding(
    op_type: str, shape: tuple[int, ...], kernel: int, stride: int, pad: int, tmp_path: Path
) -> None:
    """With ceil_mode PyTorch does, ONNX does not: the file says otherwise what is computed."""
    rank = len(shape)
    graph = Graph("rounded", input_shape=(2, *shape))
    sizes = {"kernel_shape": [kernel] * rank, "strides": [stride] * rank, "pads": [pad] * 2 * rank, "ceil_mode": 1}
    graph.set_outputs([graph.add(op_type, ["input"], **sizes)])
    x = np.random.default_rng(0).normal(size=(2, 2, *shape)).astype(np.float32)
    options = {"ceil_mode": True} | ({"count_include_pad": False} if op_type == "AveragePool" else {})
    kind = getattr(nn, f"{op_type.replace('Average', 'Avg')}{rank}d")
    wanted = kind(kernel, stride, pad, **options)(torch.from_numpy(x)).numpy()
    save_onnx(graph, tmp_path / "m.onnx")
    np.testing.assert_allclose(run(tmp_path / "m.onnx", x), wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(outputs(load_onnx(tmp_path / "m.onnx"), x), wanted, rtol=1e-5, atol=1e-6)


def test_an_average_that_counts_padding_cannot_leave_out_a_window_on_one_axis_and_add_one_on_the_other(
    tmp_path: Path,
) -> None:
    graph = Graph("rounded", input_shape=(1, 6, 8))
    sizes = {"kernel_shape": [3, 3], "strides": [3, 3], "pads": [1] * 4, "ceil_mode": 1, "count_include_pad": 1}
    graph.set_outputs([graph.add("AveragePool", ["input"], **sizes)])
    with pytest.raises(ModelError, match=r"AveragePool.*leaves out a window along one axis"):
        save_onnx(graph, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())
