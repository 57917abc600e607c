"""The cross-check passes for files that PyTorch exported, covering all operators; see ``torch_models.MODELS``."""

from __future__ import annotations

import pytest

from edgetrain.onnx_io import load_onnx
from edgetrain.verify import verify
from tests import torch_models


@pytest.mark.parametrize("name", torch_models.MODELS)
def test_exported_file_passes(name, tmp_path):
    path = tmp_path / f"{name}.onnx"
    torch_models.export(name, path, dynamo=False)
    report = verify(load_onnx(path), steps=20, batch_size=4, threads=2)
    assert report.passed, report.table()
