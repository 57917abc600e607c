"""What load_onnx does not take: each refusal is one error that names node, operator, opset and reason."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper

from edgetrain.errors import ModelError, UnsupportedError
from edgetrain.onnx_io import load_onnx
from tests.onnx_text import net, ones

REFUSED = {
    "operator": ("(float[N,2] x) => (float[N,2] y) { [gelu] y = Erf(x) }", {},
                 r"node 'gelu' \(Erf, opset 17\): the operator is not supported; supported: Add, AveragePool"),
    "domain": ("(float[N,2] x) => (float[N,2] y) { y = com.microsoft.Gelu(x) }", {},
               r"node 'y' \(com\.microsoft\.Gelu, opset 17\): the operator is not supported"),
    "type": ("(double[N,2] x) => (double[N,2] y) { y = Relu(x) }", {}, r"input 'x' .* has the type double; .*float32"),
    "cast": ("(float[N,2] x) => (float16[N,2] y) { y = Cast<to = 10>(x) }", {}, r"'y' \(Cast, opset 17\): converts"),
    "free size": ("(float[N,3,H,8] x) => (float[N,3,H,8] y) { y = Relu(x) }", {},
                  r"input 'x' .* shape \(\?, 3, \?, 8\); only dimension 0 may be free"),
    "no batch": ("(float x) => (float y) { y = Relu(x) }", {}, r"input 'x' .* no dimensions; expected the batch"),
    "batch sizes": ("(float[2,3] x, float[4,3] z) => (float[N,3] y) { y = Add(x, z) }", {},
                    r"input 'z' .*: dimension 0 is 4, but 2 in other inputs"),
    "computed weights": ("(float[N,2] x, float[N,2] w) => (float[N,2] y) { y = MatMul(x, w) }", {},
                         r"'y' \(MatMul, opset 17\): input 1 \('w'\) must be a constant"),
    "3-D convolution": ("(float[N,1,4,4,4] x) => (float[N,1,4,4,4] y) { y = Conv(x, w) }", {"w": ones(1, 1, 1, 1, 1)},
                        r"'y' \(Conv, .*3-D convolution; supported are 1-D and 2-D"),
    "does not fit": ("(float[N,3,4,4] x) => (float[N,1,2,2] y) { y = Conv(x, w) }", {"w": ones(1, 2, 3, 3)},
                     r"node 'y' \(Conv, opset 17\): 3 input channels, expected 2"),
    "mean": ("(float[N,3,4,4] x) => (float[N,4,4] y) { y = ReduceMean<axes = [1], keepdims = 0>(x) }", {},
             r"'y' \(ReduceMean, .*mean over the axes \[1\] of Nx3x4x4; supported are means over spatial axes"),
    "pad mode": ("(float[N,1,4,4] x) => (float[N,1,4,6] y) { y = Pad<mode = \"reflect\">(x, p) }",
                 {"p": np.array([0, 0, 0, 1, 0, 0, 0, 1])}, r"'y' \(Pad, .*mode 'reflect'; supported is 'constant'"),
    "merged batch": ("(float[N,4,2] x) => (float[M,2] y) { y = Reshape(x, s) }", {"s": np.array([-1, 2])},
                     r"'y' \(Reshape, .*from Nx4x2 to \[-1, 2\]: the batch dimension must stay first"),
    "batch size as number": (
        "(float[N,2] x) => (float[N,2] y) { s = Shape(x) g = Gather(s, i) f = Cast<to = 1>(g) y = Mul(x, f) }",
        {"i": np.array(0)}, r"the constant 'f' is computed from the batch size"),
    "softmax inside": ("(float[N,2] x) => (float[N,2] y) { p = Softmax(x) y = MatMul(p, w) }", {"w": ones(2, 2)},
                       r"'y' \(MatMul, .*comes from a Softmax, which is supported at the end"),
    "softmax axis": ("(float[N,2,4,4] x) => (float[N,2,4,4] y) { y = Softmax<axis = 1>(x) }", {},
                     r"'y' \(Softmax, .*over axis 1 of Nx2x4x4"),
    "pool indices": ("(float[N,1,4,4] x) => (int64[N,1,2,2] i) { y, i = MaxPool<kernel_shape = [2,2]>(x) }", {},
                     r"output 'i' of node 'y' \(MaxPool\) is not supported"),
    "merged numbers": ("(float[N,2] x) => (float[1,N] y) { z = Gather<axis = 1>(x, i) y = Flatten<axis = 0>(z) }",
                       {"i": np.array(0)}, r"'y' \(Flatten, .*would merge other dimensions with the batch"),
    "transposed batch": ("(float[N,2,3] x) => (float[2,N,3] y) { y = Transpose<perm = [1,0,2]>(x) }", {},
                         r"'y' \(Transpose, .*perm \[1, 0, 2\] of Nx2x3: the batch dimension must stay first"),
    "five axes": ("(float[N,2,3,2,2] x) => (float[N,3,2,2,2] y) { y = Transpose<perm = [0,2,1,3,4]>(x) }", {},
                  r"'y' \(Transpose, .*expected an order of up to three axes"),
    "groups left": ("(float[N,4,2,2] x) => (float[N,2,2,2,2] y) { g = Reshape(x, s) y = Relu(g) }",
                    {"s": np.array([0, 2, 2, 2, 2])}, r"'y' \(Relu, .*channels in groups; supported is"),
    "groups dealt twice": (
        "(float[N,4,2,2] x) => (float[N,4,2,2] y) { g = Reshape(x, s) t = Transpose<perm = [0,2,1,3,4]>(g)"
        " u = Transpose<perm = [0,2,1,3,4]>(t) y = Reshape(u, r) }",
        {"s": np.array([0, 2, 2, 2, 2]), "r": np.array([0, 4, 2, 2])}, r"'u' \(Transpose, .*channels in groups"),
    "one group": ("(float[N,4,2,2] x) => (float[N,4,2,2] y) { g = Reshape(x, s) p = Pad(g, d) y = Reshape(p, r) }",
                  {"s": np.array([0, 1, 4, 2, 2]), "d": np.array([0, 0, 2, 0, 0] * 2), "r": np.array([0, 8, 2, 2])},
                  r"'p' \(Pad, .*has 4 dimensions beside the batch, expected 1 to 3"),
    "several indices": ("(float[N,3,4] x) => (float[N,3,2] y) { y = Gather<axis = 2>(x, i) }",
                        {"i": np.array([0, 2])}, r"'y' \(Gather, .*several indices of Nx3x4; supported is one"),
    "sample by index": ("(float[N,3,4] x) => (float[3,4] y) { y = Gather(x, i) }", {"i": np.array(0)},
                        r"'y' \(Gather, .*samples of the batch"),
    "index outside": ("(float[N,3,4] x) => (float[N,3] y) { y = Gather<axis = 2>(x, i) }", {"i": np.array(4)},
                      r"'y' \(Gather, .*index 4 of axis 2 of Nx3x4"),
    "groups as output": ("(float[N,4,2,2] x) => (float[N,2,2,2,2] y) { y = Reshape(x, s) }",
                         {"s": np.array([0, 2, 2, 2, 2])}, r"channels in groups; supported is a channel shuffle"),
    "groups unmoved": ("(float[N,4,2,2] x) => (float[N,4,2,2] y) { g = Reshape(x, s) y = Reshape(g, r) }",
                       {"s": np.array([0, 2, 2, 2, 2]), "r": np.array([0, 4, 2, 2])}, r"'y' \(Reshape, .*in groups"),
    "slice of samples": ("(float[N,4] x) => (float[M,4] y) { y = Slice(x, a, b, c) }",
                         {"a": np.array([0]), "b": np.array([1]), "c": np.array([0])}, r"'y' \(Slice, .*axis 0 of Nx4"),
    "slice of nothing": ("(float[N,4] x) => (float[N,0] y) { y = Slice(x, a, b, c) }",
                         {"a": np.array([3]), "b": np.array([2]), "c": np.array([1])}, r"'y' \(Slice, .*\[3:2:1\] of"),
    "steps in a part": ("(float[N,1,6,6] x) => (float[N,1,2,6] y) { y = Slice(x, a, b, c, d) }",
                        {"a": np.array([1]), "b": np.array([5]), "c": np.array([2]), "d": np.array([2])},
                        r"'y' \(Slice, .*\[1:5:2\] of axis 2"),
    "split of samples": ("(float[4,2] x) => (float[2,2] y) { y, z = Split<axis = 0>(x) }", {},
                         r"Split, .*axis 0 of Nx2 is the batch"),
    "max of values": ("(float[N,2] x) => (float[N,2] y) { y = Max(x, x) }", {}, r"'y' \(Max, .*value with one number"),
    "min of several numbers": ("(float[N,2] x) => (float[N,2] y) { y = Min(x, c) }", {"c": ones(2)}, r"'y' \(Min, "),
    "elu": ("(float[N,2] x) => (float[N,2] y) { y = Elu<alpha = -1.0>(x) }", {}, r"'y' \(Elu, .*alpha is -1.0"),
    "celu": ("(float[N,2] x) => (float[N,2] y) { y = Celu<alpha = 0.0>(x) }", {}, r"'y' \(Celu, .*more than 0"),
    "division": ("(float[N,2] x) => (float[N,2] y) { y = Div(c, x) }", {"c": ones(1)}, r"'y' \(Div, .*by a value"),
    "zero": ("(float[N,2] x) => (float[N,2] y) { y = Div(x, c) }", {"c": 0 * ones(1)}, r"'c', which contains zero"),
    "per sample constant": ("(float[3,2] x) => (float[3,2] y) { y = Add(x, c) }", {"c": ones(3, 2)},
                            r"'y' \(Add, .*the batch dimension must stay free"),
    "per sample bias": ("(float[3,2] x) => (float[3,2] y) { y = Gemm(x, w, b) }", {"w": ones(2, 2), "b": ones(3, 2)},
                        r"'y' \(Gemm, .*'b' has the shape \(3, 2\); expected \(2,\)"),
    "constant output": ("(float[N,2] x) => (float[2] y) { y = Identity(c) }", {"c": ones(2)},
                        r"output 'y' does not depend on the input"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_supported_is_refused_with_one_clear_error(case: str) -> None:
    text, arrays, message = REFUSED[case]
    with pytest.raises(UnsupportedError, match=message):
        load_onnx(net(text, **arrays))


def test_opset_newer_than_the_onnx_package() -> None:
    text = "(float[N,2] x) => (float[N,2] y) { y = Relu(x) }"
    with pytest.raises(UnsupportedError, match=r"uses opset 999; the installed onnx .* knows 11 to \d+: update onnx"):
        load_onnx(net(text, opset=999))


def test_older_opset_goes_through_the_version_converter() -> None:
    graph = load_onnx(net("(float[N,2] x) => (float[N,2] y) { y = Clip<min = 0.0, max = 6.0>(x) }", opset=7))
    assert graph.nodes[0].attributes == {"min": 0.0, "max": 6.0}


@pytest.mark.parametrize(
    "content", [b"", b"no protobuf at all", b"\x08\x08" + bytes(40)], ids=["empty", "text", "damaged"]
)
def test_what_is_no_onnx_file_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.onnx' (cannot be read as|is not) an ONNX model"):
        load_onnx(tmp_path / "bad.onnx")


@pytest.mark.parametrize("source", [5, None, b"model.onnx"])
def test_what_is_no_path_is_named(source: object) -> None:
    with pytest.raises(ModelError, match=r"expected the path of an \.onnx file, or a ModelProto"):
        load_onnx(source)


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="a folder"):
        load_onnx(tmp_path)


def test_truncated_file(tmp_path: Path) -> None:
    model = net("(float[N,50] x) => (float[N,50] y) { y = MatMul(x, w) }", w=ones(50, 50))
    (tmp_path / "cut.onnx").write_bytes(model.SerializeToString()[:-5000])
    with pytest.raises(ModelError, match=r"cut\.onnx' cannot be read as an ONNX model"):
        load_onnx(tmp_path / "cut.onnx")


def test_value_that_no_node_makes() -> None:
    node = helper.make_node("Add", ["x", "ghost"], ["y"], name="sum")
    infos = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 2]) for n in "xy"]
    model = helper.make_model(helper.make_graph([node], "g", infos[:1], infos[1:]))
    with pytest.raises(ModelError, match=r"node 'sum' \(Add\): no node before it makes its input 1 \('ghost'\)"):
        load_onnx(model)


@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_weights_that_are_not_finite(number: float) -> None:
    """Found here: a training step would fail and blame its learning rate or the data."""
    weights = ones(3, 2)
    weights[1, 1] = number
    text = "(float[N,2] x) => (float[N,3] y) { y = Gemm<transB = 1>(x, fc) }"
    with pytest.raises(ModelError, match=r"graph 'net': array 'fc' holds NaN or infinite numbers; export .* again"):
        load_onnx(net(text, fc=weights))


# ---- damaged files: what one changed byte does -----------------------------------------------------------------------

SQUEEZED = """(float[N,2,4,4] x) => (float[N,2] y) { g = GlobalAveragePool(x) c = Constant<value = bool {1}>()
    z = If(c) <then_branch = g1 () => (float[N,2] t) { t = Squeeze(g, ax) },
               else_branch = g2 () => (float[N,2] e) { e = Identity(g) }>
    f = Concat<axis = 1>(z, z) y = Gemm<transB = 1>(f, w) }"""
ARRAYS = {"ax": np.array([2, 3]), "w": ones(2, 4)}


def damaged(change) -> ModelProto:
    model = net(SQUEEZED, **ARRAYS)
    change({node.op_type: node for node in model.graph.node}, model.graph)
    return model


def test_what_is_damaged_below_is_whole() -> None:
    assert [node.op_type for node in load_onnx(net(SQUEEZED, **ARRAYS)).nodes][-1] == "Gemm"


DAMAGED = {
    "attribute of another type": (lambda nodes, _: setattr(nodes["Concat"].attribute[0], "type", 1),
                                  r"\(Concat\): its attribute 'axis' is of type float, expected type int"),
    "attribute without a type": (lambda nodes, _: nodes["Concat"].attribute[0].ClearField("type"),
                                 r"\(Concat\): its attribute 'axis' is of type undefined, expected type int"),
    "attribute of no function": (lambda nodes, _: setattr(nodes["Gemm"].attribute[0], "ref_attr_name", "a"),
                                     r"\(Gemm\): its attribute 'transB' is a reference, expected type int"),
    "unknown type of the input": (lambda _, graph: setattr(graph.input[0].type.tensor_type, "elem_type", 65),
                                  r"input 'x' .* has the type number 65"),
    "branch that is not there": (lambda nodes, _: nodes["If"].attribute.pop(0),
                                 r"\(If\): its then_branch is not there, expected 1 outputs"),
    "branch without an output": (lambda nodes, _: nodes["If"].attribute[0].g.output.pop(),
                                 r"\(If\): its then_branch has 0 outputs, expected 1"),
    "node without an output": (lambda nodes, _: nodes["If"].attribute[0].g.node.add(op_type="Relu", input=["g"]),
                               r"\(Relu\) has no output"),
    "layer without weights": (lambda nodes, _: nodes["Gemm"].input.pop(), r"\(Gemm, .*'input 1' has the type none"),
    "network without an output": (lambda _, graph: graph.output.pop(), r"declares no output"),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_named(case: str) -> None:
    change, message = DAMAGED[case]
    with pytest.raises(ModelError, match=message):
        load_onnx(damaged(change))


@pytest.mark.parametrize("name", [b"Concat", b"axis", b"then_branch", b"GlobalAveragePool"])
def test_names_that_are_not_text(name: bytes, tmp_path: Path) -> None:
    content = net(SQUEEZED, **ARRAYS).SerializeToString()
    (tmp_path / "bad.onnx").write_bytes(content.replace(name, b"\xff" + name[1:], 1))
    with pytest.raises(ModelError, match=r"bad\.onnx' is damaged: \w+ is b'.*', expected text; export it again"):
        load_onnx(tmp_path / "bad.onnx")


def test_functions_that_cannot_be_put_in_place() -> None:
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["": 17, "own": 1]> net (float[N,2] x) => (float[N,2] y) { y = own.foo(x) }
        <opset_import: ["": 17], domain: "own"> foo (x) => (y) { y = Relu(x) }"""
    )
    assert [node.op_type for node in load_onnx(model).nodes] == ["Relu"]
    model.graph.node[0].input.extend(["x", "x"])
    with pytest.raises(ModelError, match="the functions of model 'net' cannot be put in place"):
        load_onnx(model)


@pytest.mark.parametrize("seed", range(4))
def test_a_changed_byte_ends_as_a_model_or_a_model_error(seed: int, tmp_path: Path) -> None:
    rng, whole = np.random.default_rng(seed), net(SQUEEZED, **ARRAYS).SerializeToString()
    for _ in range(100):
        content = bytearray(whole)
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        (tmp_path / "bad.onnx").write_bytes(content)
        with contextlib.suppress(ModelError):
            load_onnx(tmp_path / "bad.onnx")
