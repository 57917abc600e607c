"""Contract of the built-in models: names, shapes, counts, initialisation, errors; equality with PyTorch modules."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from edgetrain import models
from edgetrain.catalog import build_model, model_names
from edgetrain.errors import ModelError, UsageError
from edgetrain.torch_network import TorchNetwork

BUILDERS = [pytest.param(getattr(models, name), id=name) for name in models.__all__]


class TorchLeNet5(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 6, 5, padding=2), nn.Conv2d(6, 16, 5)
        self.fc1, self.fc2, self.fc3 = nn.Linear(400, 120), nn.Linear(120, 84), nn.Linear(84, 10)

    def forward(self, x):
        for conv in (self.conv1, self.conv2):
            x = nn.functional.max_pool2d(conv(x).relu(), 2)
        return self.fc3(self.fc2(self.fc1(x.flatten(1)).relu()).relu())


class TorchBlock(nn.Module):
    def __init__(self, before, channels, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(before, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False), nn.BatchNorm2d(channels)
        self.stride, self.new = stride, channels - before

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride > 1:
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.new // 2, self.new // 2))
        return (x + y).relu()


class TorchResNet8(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(TorchBlock(16, 16, 1))
        self.layer2 = nn.Sequential(TorchBlock(16, 32, 2))
        self.layer3 = nn.Sequential(TorchBlock(32, 64, 2))
        self.fc = nn.Linear(64, 10)

    def forward(self, x):
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


MODULES = [
    pytest.param("lenet5", TorchLeNet5, id="lenet5"),
    pytest.param("resnet8", TorchResNet8, id="resnet8"),
]


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    state = module.state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items() if "num_batches" not in name}


@pytest.mark.parametrize(("name", "module"), MODULES)
def test_parameter_names_and_shapes_are_those_of_the_pytorch_module(name, module):
    assert {n: a.shape for n, a in build_model(name).arrays.items()} == state_shapes(module())


@pytest.mark.parametrize(("name", "module"), MODULES)
def test_trainable_arrays_are_the_parameters_of_the_pytorch_module(name, module):
    assert build_model(name).trainable == {n for n, _ in module().named_parameters()}


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("name", "module"), MODULES)
def test_same_outputs_as_the_pytorch_module(name, module, training):
    graph = build_model(name)
    twin = module().double().train(training)
    twin.load_state_dict(OrderedDict((n, torch.tensor(a).double()) for n, a in graph.arrays.items()), strict=False)
    x = np.random.default_rng(1).standard_normal((3, *graph.input_shape))
    network = TorchNetwork(graph)
    network.training = training
    with torch.no_grad():
        np.testing.assert_allclose(network.forward(x), twin(torch.tensor(x)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("lenet5", None, 61_706),
        ("resnet20", None, 269_722),  # He et al. 2016, table 6: 0.27 million
        ("resnet56", None, 853_018),  # 0.85 million there
        ("resnet110", None, 1_727_962),  # 1.7 million there
        ("mobilenet_v1", 1000, 4_231_976),  # Howard et al. 2017, table 4: 4.2 million
        ("mobilenet_v1_0.5", 1000, 1_331_592),  # 1.3 million there
        ("mobilenet_v1_0.25", 1000, 470_072),  # 0.5 million there
        ("ds_cnn", None, 23_180),
        ("cnn1d", None, 24_774),
    ],
)
def test_parameter_counts(name, classes, count):
    assert build_model(name, num_classes=classes).parameter_count == count


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("lenet5", (3, 32, 32)),
        ("lenet5", (1, 12, 17)),
        ("resnet8", (1, 28, 28)),
        ("resnet14", (3, 7, 9)),
        ("mobilenet_v1_0.25", (3, 65, 48)),
        ("mobilenet_v1_0.25", (1, 33, 1)),
        ("ds_cnn", (1, 98, 40)),
        ("cnn1d", (9, 50)),
    ],
    ids=str,
)
def test_other_input_shapes(name, shape):
    graph = build_model(name, shape, 5)
    assert (graph.input_shape, graph.output_shape) == (shape, (5,))
    x = np.zeros((2, *shape))
    assert TorchNetwork(graph).output(x).shape == (2, 5)


def test_a_signal_of_height_one_is_a_signal():
    assert models.cnn1d((6, 1, 128)).input_shape == (6, 128)


@pytest.mark.parametrize("builder", BUILDERS)
def test_same_seed_same_weights_other_seed_others(builder):
    first, again, other = builder(seed=3), builder(seed=3), builder(seed=4)
    assert all(np.array_equal(first.arrays[name], again.arrays[name]) for name in first.arrays)
    weights = [name for name, array in first.arrays.items() if array.ndim > 1]
    assert not any(np.array_equal(first.arrays[name], other.arrays[name]) for name in weights)


@pytest.mark.parametrize("builder", BUILDERS)
def test_weights_and_biases_have_pytorchs_default_spread(builder):
    graph = builder()
    for name, array in graph.arrays.items():
        if array.ndim > 1 and array.size > 1000 and builder is not models.resnet:
            bound = 1 / np.sqrt(array[0].size)
            assert np.abs(array).max() <= bound
            assert array.std() == pytest.approx(bound / np.sqrt(3), rel=0.1), name


def test_resnet_weights_are_kaiming_normal():
    weight = models.resnet().arrays["layer3.0.conv2.weight"]
    assert weight.std() == pytest.approx(np.sqrt(2 / (64 * 9)), rel=0.03)
    assert np.abs(weight).max() > 3 * weight.std()


@pytest.mark.parametrize("builder", BUILDERS)
def test_fresh_batch_normalisation_is_the_identity(builder):
    graph = builder()
    for node in graph.nodes:
        if node.op_type == "BatchNormalization":
            arrays = [graph.arrays[value.name] for value in node.inputs[1:]]
            assert [set(array) for array in arrays] == [{1}, {0}, {0}, {1}]


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"input_shape": (3,)},
        {"input_shape": (0, 32, 32)},
        {"input_shape": (1, 32.5, 32)},
        {"input_shape": (1, 0, 0)},
        {"num_classes": 0},
        {"num_classes": "ten"},
    ],
    ids=str,
)
def test_bad_arguments_are_named(builder, arguments):
    with pytest.raises(ModelError, match=rf"{builder.__name__}: .*({next(iter(arguments))}|expected)"):
        builder(**arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.lenet5((1, 11, 28)), r"lenet5: input_shape \(1, 11, 28\) is too small.* at least 12"),
        (lambda: models.resnet(depth=21), r"resnet: depth is 21, expected 6 n \+ 2"),
        (lambda: models.resnet(depth=116), "from 8 to 110"),
        (lambda: models.mobilenet_v1(width=0), "width is 0"),
        (lambda: models.cnn1d((6, 3)), "too small"),
    ],
    ids=["lenet5-small", "resnet-depth", "resnet-deep", "mobilenet-width", "cnn1d-short"],
)
def test_errors_say_what_was_expected(call, message):
    with pytest.raises(ModelError, match=message):
        call()


@pytest.mark.parametrize("name", [*model_names(), "resnet", "resnet14", "mobilenet_v1_0.75"])
def test_catalog_builds_every_name(name):
    assert build_model(name, num_classes=3, seed=1).output_shape == (3,)


@pytest.mark.parametrize(("wrong", "right"), [("lenet", "lenet5"), ("mobilenet", "mobilenet_v1"), ("ds-cnn", "ds_cnn")])
def test_catalog_names_the_nearest(wrong, right):
    with pytest.raises(UsageError, match=f"unknown model '{wrong}'; did you mean '{right}'"):
        build_model(wrong)


def test_catalog_reads_files(tmp_path):
    from edgetrain.onnx_io import save_onnx

    path = tmp_path / "model.onnx"
    graph = models.lenet5()
    save_onnx(graph, path)
    assert build_model(str(path), (1, 28, 28), 10).parameter_count == graph.parameter_count
    with pytest.raises(ModelError, match="takes inputs of shape"):
        build_model(path, (3, 28, 28))
    with pytest.raises(ModelError, match="not 7 classes"):
        build_model(path, num_classes=7)
