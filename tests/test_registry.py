"""Loud errors: the tables of operators and kernels, and every way to build a graph wrongly, matched on their text."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import textwrap

import numpy as np
import pytest

from edgetrain.autodiff import training_graph
from edgetrain.errors import GraphError
from edgetrain.graph import Graph
from edgetrain.kernels import registry as kernels
from edgetrain.lowering import Lowering
from edgetrain.lowering_channels import ChannelLowering, fits
from edgetrain.ops import Op, get_op, known_ops, register
from edgetrain.ops import registry as ops
from edgetrain.optim import SGD
from edgetrain.parameters import Parameters
from tests.engine import PRUNING_KERNELS
from tests.op_cases import CASES

# ---- the table of operators ------------------------------------------------------------------------------------------


def test_unknown_operator_lists_what_exists():
    with pytest.raises(GraphError, match=r"unknown operator 'Softplus'; known: Add, AveragePool, .*Transpose$"):
        get_op("Softplus")


def test_duplicate_operator_names_both_classes():
    class Twin(Op):
        name = "Relu"

    with pytest.raises(GraphError, match="operator 'Relu' is registered twice: Relu and Twin"):
        register(Twin)
    assert type(get_op("Relu")).__name__ == "Relu"


def test_operator_without_gradient_is_named(monkeypatch):
    class Absolute(Op):
        name = "Abs"

        def infer(self, node):
            return [(node.x.shape, True)]

    monkeypatch.setitem(ops._OPS, "Abs", Absolute())
    graph = Graph("model", (2,))
    graph.set_outputs([graph.add("Abs", [graph.add("Mul", ["input", graph.parameter("w", [1, 2])])], name="size")])
    with pytest.raises(GraphError, match=r"node 'size' \(Abs\) with inputs \[Nx2\]: the operator Abs has no gradient"):
        training_graph(graph)


def test_gradient_operators_are_not_for_models():
    assert not set(known_ops()) & set(known_ops(training_only=True))
    assert {"Conv", "Gemm"} <= set(known_ops())
    assert "ProductWeightGrad" in known_ops(training_only=True)


# ---- nodes that do not fit -------------------------------------------------------------------------------------------

IMAGE, VECTOR = (4, 6, 6), (8,)


def refused(shape, op_type, inputs, parameters, attributes):
    """Add one node named ``layer``; ``inputs`` name ``input``, ``other`` (batched) or parameters by their shape."""
    graph = Graph("model", shape)
    names = [graph.parameter(f"p{i}", np.zeros(size)) for i, size in enumerate(parameters)]
    graph.add(op_type, [*inputs, *names], name="layer", **attributes)


REFUSED = {
    "arity": (IMAGE, "Conv", ["input"], [], {}, r"1 inputs, expected 2 to 3"),
    "attribute": (IMAGE, "Relu", ["input"], [], {"alpha": 1}, r"unknown attribute 'alpha'; known: none"),
    "attribute-of-conv": (IMAGE, "Conv", ["input"], [(5, 4, 3, 3)], {"padding": 1},
                          r"unknown attribute 'padding'; known: kernel_shape, strides"),
    "missing-input": (IMAGE, "Relu", [None], [], {}, r"input 0 is missing"),
    "parameter-first": (IMAGE, "Relu", [], [(4,)], {}, r"the first input is a parameter"),
    "conv-channels": (IMAGE, "Conv", ["input"], [(5, 3, 3, 3)], {}, r"4 input channels, expected 3 x 1 groups"),
    "conv-groups": (IMAGE, "Conv", ["input"], [(5, 2, 3, 3)], {"group": 2}, r"5 output channels .* by 2 groups"),
    "conv-bias": (IMAGE, "Conv", ["input"], [(5, 4, 3, 3), (4,)], {}, r"parameter of 5 numbers, got 4"),
    "conv-kernel-shape": (IMAGE, "Conv", ["input"], [(5, 4, 3, 3)], {"kernel_shape": [3, 2]}, r"kernel_shape=\[3, 2\]"),
    "conv-of-vector": (VECTOR, "Conv", ["input"], [(5, 8, 1, 1)], {}, r"must be \(N, C, W\) or \(N, C, H, W\)"),
    "conv-weights": (IMAGE, "Conv", ["input"], [(5, 4)], {}, r"weights must be a parameter .* got 5x4"),
    "conv-weights-computed": (IMAGE, "Conv", ["input", "input"], [], {}, r"weights must be a parameter .* Nx4x6x6"),
    "conv-too-large": (IMAGE, "Conv", ["input"], [(5, 4, 7, 3)], {},
                       r"a kernel of 7 \(dilation 1\) does not fit into 6 pixels padded by 0 and 0"),
    "conv-strides": (IMAGE, "Conv", ["input"], [(5, 4, 3, 3)], {"strides": [0, 1]}, r"strides=\[0, 1\], expected 2"),
    "conv-pads": (IMAGE, "Conv", ["input"], [(5, 4, 3, 3)], {"pads": [1, 1]}, r"pads=\[1, 1\], expected 4"),
    "conv-auto-pad": (IMAGE, "Conv", ["input"], [(5, 4, 3, 3)], {"auto_pad": "SAME"}, r"auto_pad=SAME, expected"),
    "gemm-of-image": (IMAGE, "Gemm", ["input"], [(144, 3)], {}, r"flatten the input first"),
    "gemm-features": (VECTOR, "Gemm", ["input"], [(7, 3)], {}, r"8 features given, the weights expect 7"),
    "gemm-alpha": (VECTOR, "Gemm", ["input"], [(8, 3)], {"alpha": 2.0}, r"alpha and beta must be 1"),
    "gemm-bias": (VECTOR, "Gemm", ["input"], [(8, 3), (1,)], {}, r"the bias must be a parameter of 3 numbers, got 1"),
    "batchnorm": (IMAGE, "BatchNormalization", ["input"], [(4,), (4,), (4,), (3,)], {}, r"parameters of shape \(4,\)"),
    "pool-without-kernel": (IMAGE, "MaxPool", ["input"], [], {}, r"and fit the kernel \(\)"),
    "pool-in-padding": (IMAGE, "MaxPool", ["input"], [], {"kernel_shape": [2, 2], "pads": [2, 0, 0, 0]},
                        r"a window of \(2, 2\) lies in the padding alone"),
    "pool-in-padding-behind": (IMAGE, "MaxPool", ["input"], [], {"kernel_shape": [2, 2], "pads": [0, 0, 0, 2]},
                               r"a window of \(2, 2\) lies in the padding alone"),
    "add-shapes": (IMAGE, "Add", ["input"], [(5, 1, 1)], {}, r"the shapes do not broadcast; sizes must be equal or 1"),
    "add-batch": (IMAGE, "Add", ["input"], [(2, 4, 6, 6)], {}, r"2x4x6x6 cannot be broadcast"),
    "add-parameters": (IMAGE, "Add", [], [(4,), (1,)], {}, r"two parameters must have equal shapes"),
    "add-middle": ((2, 3, 4, 5), "Add", ["input"], [(1, 3, 1, 1)], {}, r"the middle axes must"),
    "reshape": (IMAGE, "Reshape", ["input"], [], {"shape": [5, -1]}, r"144 elements .* shape \[5, 28\]"),
    "flatten-axis": (IMAGE, "Flatten", ["input"], [], {"axis": 2}, r"axis=2; only axis=1 keeps one vector per sample"),
    "concat-axis": (IMAGE, "Concat", ["input", "input"], [], {"axis": 2}, r"axis=2; only axis=1"),
    "concat-parameter": (IMAGE, "Concat", ["input"], [(4, 6, 6)], {}, r"only axis=1 of .* equal maps"),
    "pad-batch": (IMAGE, "Pad", ["input"], [], {"pads": [1, 0, 0, 0, 0, 0, 0, 0]}, r"expected 8 numbers"),
    "pad-count": (IMAGE, "Pad", ["input"], [], {"pads": [1, 1, 1, 1]}, r"pads=\[1, 1, 1, 1\], expected 8 numbers"),
    "dropout": (IMAGE, "Dropout", ["input"], [], {"ratio": 1.0}, r"ratio=1.0, expected at least 0 and below 1"),
    "loss-of-image": (IMAGE, "SoftmaxCrossEntropyLoss", ["input", "input"], [], {}, r"outputs \(N, classes\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_node_that_does_not_fit_is_refused(name):
    shape, op_type, inputs, parameters, attributes, message = REFUSED[name]
    with pytest.raises(GraphError, match=message) as caught:
        refused(shape, op_type, inputs, parameters, attributes)
    assert f"node 'layer' ({op_type})" in str(caught.value)
    if name != "missing-input":
        shown = "x".join(["N", *map(str, shape)]) if inputs else "x".join(map(str, parameters[0]))
        assert f"with inputs [{shown}" in str(caught.value)


# ---- graphs ----------------------------------------------------------------------------------------------------------


def small() -> Graph:
    graph = Graph("small", (3, 8, 8))
    weights = [graph.parameter("conv.weight", np.zeros((4, 3, 3, 3))), graph.parameter("conv.bias", np.zeros(4))]
    x = graph.add("Flatten", [graph.add("Conv", ["input", *weights], name="conv")], name="flat")
    graph.set_outputs([graph.add("Gemm", [x, graph.parameter("fc.weight", np.zeros((144, 5)))], name="fc")])
    return graph


def test_summary_is_a_table():
    lines = small().summary().splitlines()
    assert lines[0] == "small: input Nx3x8x8"
    assert [line.split() for line in lines[1:]] == [
        ["layer", "operator", "output", "parameters", "MACs"],
        ["conv", "Conv", "Nx4x6x6", "112", "3,888"],
        ["flat", "Flatten", "Nx144", "0", "0"],
        ["fc", "Gemm", "Nx5", "720", "720"],
        ["total", "Nx5", "832", "4,608"],
    ]
    assert len({len(line) for line in lines[1:]}) == 1


def test_graph_counts_and_neighbours():
    graph = small()
    assert (graph.parameter_count, graph.macs()) == (832, 4608)
    assert (graph.input_shape, graph.output_shape) == ((3, 8, 8), (5,))
    assert graph.producer("flat.out").name == "flat"
    assert graph.producer("input") is None
    assert [node.name for node in graph.consumers("conv.out")] == ["flat"]


def test_a_copy_shares_no_array():
    graph = small()
    twin = graph.copy()
    twin.arrays["conv.bias"][0] = 1
    twin.add("Relu", [twin.outputs[0]])
    assert graph.arrays["conv.bias"][0] == 0
    assert len(graph.nodes) == 3


BROKEN = {
    "unknown-operator": (lambda g: g.add("Softplus", ["input"]), r"unknown operator 'Softplus'; known: Add"),
    "unknown-value": (lambda g: g.add("Relu", ["x"], name="act"), r"node 'act' \(Relu\): .* 'x'.* in execution order"),
    "value-twice": (lambda g: g.add("Relu", ["input"], outputs=["input"]), r"the value name 'input' is used twice"),
    "empty-parameter": (lambda g: g.parameter("w", np.zeros((2, 0))), r"shape \(2, 0\) is not static"),
    "output": (lambda g: g.set_outputs(["nothing"]), r"graph 'small': the output 'nothing' does not exist"),
    "nothing-to-train": (lambda g: (g.trainable.clear(), training_graph(g)), r"graph 'small': no trainable parameter"),
    "loss": (lambda g: training_graph(g, "hinge"), r"loss 'hinge' is unknown; expected 'cross_entropy' or 'mse'"),
    "unused-parameter": (lambda g: (g.parameter("idle", [1.0]), training_graph(g)),
                         r"the loss does not depend on .*\['idle'\]"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_graph_is_refused(name):
    build, message = BROKEN[name]
    with pytest.raises(GraphError, match=message):
        build(small())


def test_a_refused_node_leaves_the_graph_as_it_was():
    graph = small()
    before = len(graph.nodes), len(graph.values)
    with pytest.raises(GraphError):
        graph.add("Gemm", ["input", "fc.weight"])
    assert (len(graph.nodes), len(graph.values)) == before


# ---- only what is needed ---------------------------------------------------------------------------------------------


def gradient_ops(graph: Graph) -> list[str]:
    train = training_graph(graph)
    return [node.op_type for node in train.graph.nodes[train.forward_count :]]


def test_the_first_layer_has_no_input_gradient():
    assert gradient_ops(small()).count("ProductInputGrad") == 1  # that of the dense layer
    assert gradient_ops(small()).count("ProductWeightGrad") == 2


def test_frozen_layers_have_no_gradients():
    graph = small()
    graph.trainable = {"fc.weight"}
    assert gradient_ops(graph) == ["SoftmaxCrossEntropyLossGrad", "ProductWeightGrad"]


# ---- the table of kernels --------------------------------------------------------------------------------------------


def test_unknown_kernel_lists_what_exists():
    with pytest.raises(GraphError, match=r"unknown kernel 'fft'; known: .*correlate, .*multiply"):
        kernels.argument_names("fft")


def test_duplicate_kernel_is_refused():
    kernels.load_factories()

    def multiply() -> None:
        """Stand in for a second kernel of the same name."""

    with pytest.raises(GraphError, match="kernel 'multiply' is registered twice"):
        kernels.kernel("x")(multiply)


def test_wrong_kernel_arguments_are_named():
    low = Lowering(small(), [], 4, 1, Parameters(small(), SGD(lr=0.1)), set())
    with pytest.raises(GraphError, match=r"kernel 'fill': arguments \['channels', .*'z'\] missing or unknown"):
        low.emit("fill", (4,), 1, y=0, z=0)


def factories() -> dict[str, tuple]:
    return kernels.load_factories()


KERNELS = sorted(factories())


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_reads_its_arguments_in_the_order_it_declares(name):
    factory, declared = factories()[name]
    body = ast.parse(textwrap.dedent(inspect.getsource(factory)))
    assigned = [node for node in ast.walk(body) if isinstance(node, ast.Assign)]
    unpacked = [node for node in assigned if "arguments(args," in ast.unparse(node.value)]
    names = tuple(element.id.lstrip("_") for node in unpacked for element in node.targets[0].elts)
    assert names == declared[: len(names)]
    assert [node.value.args[1].value for node in unpacked] == [len(names)] * bool(names)
    reads = re.findall(r"(load_f32|load_i64)\((?:args|arguments)(?: \+ (\d+))?\)", ast.unparse(body))
    assert {(int(offset or 0) // 8, kind == "load_f32") for kind, offset in reads} == {
        (place, argument.startswith("f_")) for place, argument in enumerate(declared) if place >= len(names)
    }


def test_the_operator_cases_use_every_kernel():
    used = {"pack_input", "pack_channels"}
    for case in CASES:
        train = training_graph(case.graph(), case.loss)
        for graph, keep in ((case.graph(), set()), (train.graph, {train.logits, train.losses, train.correct})):
            parameters = Parameters(graph, SGD(lr=0.1))
            parameters.start_training(train.gradients, SGD(lr=0.1))
            for lowering in [Lowering, ChannelLowering] if fits(graph.nodes) else [Lowering]:
                low = lowering(graph, graph.nodes, 4, 2, parameters, keep)
                for name in graph.inputs:
                    low._start(graph.values[name])
                low.run(len(graph.nodes))
                used |= {row.kernel[0] for row in low.plan.rows}
    elsewhere = {"sgd", "adam", "average", "sum_of_squares", "check_step", "stamp"}  # the update of a step, and timing
    # Where threads keep to their blocks of samples: of error maps, and of large maps.
    elsewhere |= {"settle_channels", "sum_parts"}
    elsewhere |= {"join_samples"}  # large layers whose samples fill a part of a vector (test_few.py)
    # Those of methods are tested with the methods.
    methods = ("bits", "csr", "pooled_errors", "sparse_storage", *PRUNING_KERNELS)
    elsewhere |= {name for name, (made, _) in factories().items() if made.__module__.rpartition(".")[2] in methods}
    assert set(KERNELS) - elsewhere == used


@pytest.mark.parametrize("module", kernels._MODULES)
def test_every_kernel_says_what_it_writes(module):
    source = importlib.import_module(f"edgetrain.kernels.{module}")
    made = [factory for factory, _ in factories().values() if factory.__module__ == source.__name__]
    assert made
    assert all(factory.__doc__ for factory in made)
