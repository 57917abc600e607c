"""Small PyTorch networks that between them use every supported operator, as users write them.

``MODELS`` is one table: name -> (factory, input shape without the batch dimension).
They are exported to ONNX by the tests of the importer and of the cross-check.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  # the name every PyTorch user knows
from torch import Tensor, nn


class LeNet(nn.Module):
    """Convolutions, pooling, ``view`` with the batch size computed at run time, dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 5, padding=2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 3 * 3, 32)
        self.dropout = nn.Dropout(0.3)
        self.fc2 = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = x.view(x.size(0), -1)
        return self.fc2(self.dropout(F.relu(self.fc1(x))))


class BasicBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.down = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.down(x))


class ResNet(nn.Module):
    """Residual blocks with projection shortcuts; the mean over pixels written as ``mean``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block1, self.block2 = BasicBlock(8, 8, 1), BasicBlock(8, 16, 2)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.block2(self.block1(self.stem(x))).mean(dim=(2, 3)))


class CifarResNet(nn.Module):
    """A shortcut without parameters: every second pixel, channels padded with zeros (option A)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(x))
        shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        x = F.relu(self.bn(self.conv2(x)) + shortcut)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def _separable(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False), nn.BatchNorm2d(channels), nn.ReLU6(),
        nn.Conv2d(channels, out, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU6(),
    )  # fmt: skip


def mobilenet() -> nn.Module:
    """Depthwise separable convolutions with ReLU6."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
        _separable(8, 16, 1), _separable(16, 24, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 6),
    )  # fmt: skip


class SqueezeExcite(nn.Module):
    """Channels scaled by a HardSigmoid of their means, HardSwish activations."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 12, 3, padding=1)
        self.reduce, self.expand = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.hardswish(self.conv1(x))
        scale = F.hardsigmoid(self.expand(F.relu(self.reduce(F.adaptive_avg_pool2d(x, 1)))))
        return self.fc(F.hardswish(x * scale).mean([2, 3], keepdim=True).squeeze(-1).squeeze(-1))


class Curved(nn.Module):
    """Activations with a slope that is learned, or exponential, and bounds on one side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3, stride=2)
        self.sloping, self.alike = nn.PReLU(6), nn.PReLU(init=0.1)
        self.fc1, self.fc2 = nn.Linear(72, 9), nn.Linear(9, 4)
        self.register_buffer("low", torch.tensor(-0.9))
        self.register_buffer("high", torch.tensor([1.5]))

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.sloping(self.conv1(x)), 0.7)
        x = F.celu(self.alike(self.conv2(x)), 0.5)
        x = torch.maximum(F.selu(self.fc1(x.flatten(1))), self.low)
        return self.fc2(torch.minimum(self.high, x))


class Shuffled(nn.Module):
    """Units of ShuffleNet: channels split, a depthwise branch, joined and dealt out; a crop of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.branch = nn.Sequential(
            nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
            nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6),
            nn.Conv2d(6, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        )  # fmt: skip
        self.fc = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        for groups in (2, 3):
            a, b = x.chunk(2, dim=1)
            x = torch.cat((a, self.branch(b)), dim=1)
            n, c, h, w = x.size()
            x = x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)
        return self.fc(x[:, :, 1:, :-1].mean([2, 3]))


class HandWritten(nn.Module):
    """HardSwish and SiLU spelled out, input normalisation inside the network, a difference of branches."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor([0.2, 0.3, 0.25]).view(1, 3, 1, 1))
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 3), nn.Conv2d(3, 6, 3)
        self.weight = nn.Parameter(torch.randn(6, 4) / 3)
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - self.mean) / self.std
        a, b = self.conv1(x), self.conv2(x)
        a = a * torch.clamp(a + 3, 0, 6) / 6
        x = (1 - a) - b * torch.sigmoid(b)
        return torch.matmul(x.mean((2, 3)), self.weight) + self.bias


def cnn1d() -> nn.Module:
    """1-D convolutions over windows of a sensor signal."""
    return nn.Sequential(
        nn.Conv1d(3, 8, 5, stride=2, padding=2), nn.BatchNorm1d(8), nn.ReLU(), nn.MaxPool1d(2),
        nn.Conv1d(8, 12, 3, padding=2, dilation=2), nn.ReLU(), nn.AvgPool1d(2), nn.Flatten(), nn.Linear(48, 4),
    )  # fmt: skip


class Dilated(nn.Module):
    """Dilated convolutions and padding that differs on every side."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, dilation=2)
        self.conv2 = nn.Conv2d(6, 6, (3, 5), stride=(2, 1), padding=(0, 2), groups=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1(F.pad(x, (1, 2, 0, 3))))
        x = F.relu(self.conv2(F.pad(x, (2, 0, 1, 1), value=0.5)))
        return self.fc(x.mean(dim=(-1, -2)))


class Inception(nn.Module):
    """Branches joined by ``cat``, one of them a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(3, 5, 5, padding=2)
        self.head = nn.Conv2d(18, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
        x = F.relu(torch.cat([self.a(x), self.b(x), self.c(x), pooled], dim=1))
        return F.adaptive_avg_pool2d(self.head(x), (1, 1)).flatten(1)


class Smooth(nn.Module):
    """LeakyReLU, Tanh, Sigmoid, average pooling with all its options, ``reshape`` with -1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 5, 3), nn.Conv2d(5, 5, 3, padding=1)
        self.pool1 = nn.AvgPool2d(3, stride=2, padding=1, count_include_pad=True)
        self.pool2 = nn.AvgPool2d(2, stride=2, padding=1, count_include_pad=False)
        self.pool3 = nn.MaxPool2d(3, stride=2, ceil_mode=True)
        self.fc1, self.fc2 = nn.Linear(20, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool1(F.leaky_relu(self.conv1(x), 0.1))
        x = self.pool3(self.pool2(torch.tanh(self.conv2(x))))
        return self.fc2(torch.sigmoid(self.fc1(x.reshape(-1, 20))))


def softmax_at_the_end() -> nn.Module:
    """Return probabilities."""
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5), nn.Softmax(dim=1))


def multilayer_perceptron() -> nn.Module:
    """Features instead of images; normalisation and dropout between fully connected layers."""
    return nn.Sequential(
        nn.Linear(7, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5),
        nn.Linear(16, 8, bias=False), nn.Hardtanh(), nn.Linear(8, 3),
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "lenet": (LeNet, (1, 20, 20)),
    "resnet": (ResNet, (3, 12, 12)),
    "cifar_resnet": (CifarResNet, (3, 10, 10)),
    "mobilenet": (mobilenet, (3, 16, 16)),
    "squeeze_excite": (SqueezeExcite, (3, 9, 9)),
    "curved": (Curved, (3, 9, 9)),
    "hand_written": (HandWritten, (3, 8, 8)),
    "cnn1d": (cnn1d, (3, 32)),
    "dilated": (Dilated, (2, 14, 13)),
    "inception": (Inception, (3, 9, 9)),
    "smooth": (Smooth, (1, 14, 14)),
    "shuffled": (Shuffled, (3, 11, 11)),
    "softmax": (softmax_at_the_end, (1, 8, 8)),
    "perceptron": (multilayer_perceptron, (7,)),
}


def build(name: str) -> nn.Module:
    """Return a seeded network in inference mode whose running averages are not the initial ones."""
    torch.manual_seed(0)
    factory, shape = MODELS[name]
    model = factory().train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, *shape) * 2 + 0.5)
    return model.eval()


def export(
    name: str, path: Path, *, dynamo: bool, training: bool = True, dynamic: bool = True, opset: int = 18
) -> nn.Module:
    """Export a network of the table to ONNX and return it.

    Args:
        name: in the table.
        path: of the file.
        dynamo: which of PyTorch's two exporters.
        training: keep BatchNormalization and Dropout as nodes (the exporter folds them away otherwise).
        dynamic: leave the batch dimension free.
        opset: version of the operators.
    """
    model = build(name)
    example = torch.randn(2, *MODELS[name][1])
    options = {"training": torch.onnx.TrainingMode.PRESERVE if training else torch.onnx.TrainingMode.EVAL}
    if dynamic and dynamo:
        options["dynamic_shapes"] = ({0: torch.export.Dim("batch")},)
    elif dynamic:
        options["dynamic_axes"] = {"input": {0: "batch"}, "output": {0: "batch"}}
    with warnings.catch_warnings():
        # Both exporters warn about themselves; what they write is checked by the tests.
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\..*")
        torch.onnx.export(
            model, (example,), path, dynamo=dynamo, opset_version=opset, input_names=["input"],
            output_names=["output"], verbose=False, do_constant_folding=not training, **options,
        )  # fmt: skip
    return model
