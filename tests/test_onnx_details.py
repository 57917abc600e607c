"""ONNX files in cases that larger tests pass over."""

from __future__ import annotations

import numpy as np
import pytest

import edgetrain as et
import edgetrain.onnx_io
from edgetrain.errors import UnsupportedError
from edgetrain.graph import Normalization


def exported(graph, tmp_path, images):
    runtime = pytest.importorskip("onnxruntime")
    et.onnx_io.save_onnx(graph, tmp_path / "n.onnx")
    return runtime.InferenceSession(tmp_path / "n.onnx").run(None, {"input": images})


def test_epsilon_and_momentum_are_written(tmp_path):
    onnx = pytest.importorskip("onnx")
    graph = et.Graph("bn", input_shape=(2, 3, 3))
    names = [graph.parameter(name, np.ones(2), trainable=name in "sb") for name in ("s", "b", "m", "v")]
    graph.set_outputs([graph.add("BatchNormalization", ["input", *names], epsilon=0.5, momentum=0.75)])
    et.onnx_io.save_onnx(graph, tmp_path / "bn.onnx")
    (node,) = onnx.load(tmp_path / "bn.onnx").graph.node
    assert {a.name: a.f for a in node.attribute if a.name in ("epsilon", "momentum")} == {
        "epsilon": 0.5,
        "momentum": 0.75,
    }


def test_dropout_ratios_and_all_uses_of_a_normalised_input_are_written(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    graph = et.Graph("n", input_shape=(2, 3, 3))
    weight = graph.parameter("w", np.random.default_rng(0).normal(0, 1, (2, 2, 1, 1)))
    x = graph.add("Conv", ["input", weight], kernel_shape=[1, 1])
    x = graph.add("Dropout", [graph.add("Concat", [x, "input"], axis=1)], ratio=0.25)
    graph.set_outputs([graph.add("Flatten", [x], axis=1)])
    graph.normalization = et.graph.Normalization(np.array([1, 2], np.float32), np.array([3, 4], np.float32))
    et.onnx_io.save_onnx(graph, tmp_path / "n.onnx")
    images = np.random.default_rng(1).random((4, 2, 3, 3), np.float32)
    (found,) = runtime.InferenceSession(tmp_path / "n.onnx").run(None, {"input": images})
    np.testing.assert_allclose(found, et.Learner(graph, threads=1).logits(images), rtol=1e-5)
    again = et.onnx_io.load_onnx(tmp_path / "n.onnx")
    assert [node.get("ratio") for node in again.nodes if node.op_type == "Dropout"] == [0.25]


def test_files_are_for_everybody_to_read(tmp_path):
    graph = et.Graph("n", input_shape=(3,))
    graph.set_outputs([graph.add("Relu", ["input"])])
    et.onnx_io.save_onnx(graph, tmp_path / "n.onnx")
    assert (tmp_path / "n.onnx").stat().st_mode & 0o777 == 0o644


def test_signals_are_normalised_by_channel(tmp_path):
    graph = et.Graph("signal", input_shape=(2, 9))
    weight = graph.parameter("w", np.random.default_rng(0).normal(0, 1, (3, 2, 3)))
    graph.set_outputs([graph.add("Conv", ["input", weight], kernel_shape=[3])])
    graph.normalization = Normalization(np.array([1, 2], np.float32), np.array([3, 4], np.float32))
    images = np.random.default_rng(1).random((4, 2, 9), np.float32)
    np.testing.assert_allclose(
        exported(graph, tmp_path, images)[0], et.Learner(graph, threads=1).logits(images), rtol=1e-4, atol=1e-5
    )


def test_further_outputs_stay_beside_a_softmax(tmp_path):
    graph = et.Graph("two", input_shape=(3,))
    graph.set_outputs([graph.add("Relu", ["input"]), graph.add("Sigmoid", ["input"])])
    graph.softmax_output = True
    assert len(exported(graph, tmp_path, np.zeros((1, 3), np.float32))) == 2


@pytest.mark.parametrize("dilations", [[2, 1], [1, 2]])
def test_any_dilated_pool_needs_a_newer_opset(tmp_path, dilations):
    onnx = pytest.importorskip("onnx")
    graph = et.Graph("n", input_shape=(1, 6, 6))
    graph.set_outputs([graph.add("AveragePool", ["input"], kernel_shape=[2, 2], dilations=dilations)])
    et.onnx_io.save_onnx(graph, tmp_path / "n.onnx")
    assert onnx.load(tmp_path / "n.onnx").opset_import[0].version == 19


def test_the_last_part_of_a_split_may_be_smaller():
    onnx = pytest.importorskip("onnx")
    h, f = onnx.helper, onnx.TensorProto.FLOAT
    node = h.make_node("Split", ["x"], ["a", "b", "c"], axis=1, num_outputs=3)
    outs = [h.make_tensor_value_info(n, f, ["n", s]) for n, s in zip("abc", (3, 3, 1), strict=True)]
    model = h.make_model(
        h.make_graph([node], "g", [h.make_tensor_value_info("x", f, ["n", 7])], outs),
        opset_imports=[h.make_opsetid("", 18)],
        ir_version=8,
    )
    graph = edgetrain.onnx_io.load_onnx(model)
    assert [graph.values[n].shape for n in graph.outputs] == [(3,), (3,), (1,)]


def test_indices_count_from_the_end_and_attributes_do_not_know_the_batch():
    onnx = pytest.importorskip("onnx")

    h, f = onnx.helper, onnx.TensorProto.FLOAT

    def model(nodes, shape, out, **constants):
        tensors = [onnx.numpy_helper.from_array(np.array(a, np.int64), n) for n, a in constants.items()]
        return h.make_model(
            h.make_graph(
                nodes,
                "g",
                [h.make_tensor_value_info("x", f, ["n", *shape])],
                [h.make_tensor_value_info("y", f, ["n", *out])],
                tensors,
            ),
            opset_imports=[h.make_opsetid("", 17)],
            ir_version=8,
        )

    graph = edgetrain.onnx_io.load_onnx(
        model([h.make_node("Gather", ["x", "i"], ["y"], axis=2)], (2, 5), (2, 1), i=[-2])
    )
    x = np.arange(20, dtype=np.float32).reshape(2, 2, 5)
    assert np.array_equal(et.Learner(graph, threads=1).logits(x), x[:, :, -2:-1])
    nodes = [
        h.make_node("Shape", ["x"], ["s"]),
        h.make_node("Slice", ["s", "zero", "one"], ["b"]),
        h.make_node("Concat", ["front", "b"], ["pads"], axis=0),
        h.make_node("Pad", ["x", "pads"], ["y"]),
    ]
    with pytest.raises(UnsupportedError, match="an attribute depends on the batch size"):
        edgetrain.onnx_io.load_onnx(model(nodes, (3,), ("m",), zero=[0], one=[1], front=[0, 0, 0]))


def test_running_averages_are_matched_and_mark_a_network_as_trained():
    def bn():
        graph = et.Graph("bn", input_shape=(2, 3, 3))
        weight = graph.parameter("w", np.zeros((2, 2, 1, 1)))
        x = graph.add("Conv", ["input", weight], kernel_shape=[1, 1])
        names = [graph.parameter(name, np.ones(2), trainable=name in "sb") for name in ("s", "b", "m", "v")]
        graph.set_outputs([graph.add("BatchNormalization", [x, *names])])
        return graph

    graph = bn()
    arrays, report = et.onnx_io.match_parameters(
        graph, {n: np.full(a.shape, 2, np.float32) for n, a in graph.arrays.items()}
    )
    assert set(arrays) == {"w", "s", "b", "m", "v"} and not report.missing and not report.unused
    assert not graph.trained
    report.mark(graph)
    assert graph.trained
