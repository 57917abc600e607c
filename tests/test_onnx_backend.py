"""The onnx package's own backend cases through our importer and executor.

``benchmarks/onnx_backend_table.py`` writes the outcome of every case to ``docs/onnx_backend.md``.
"""

from __future__ import annotations

import numpy as np
import pytest

from edgetrain.errors import UnsupportedError
from tests.onnx_backend_cases import Case, cases

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.name}")
def test_backend_case(case: Case) -> None:
    try:
        outputs = case.run()
    except UnsupportedError as error:
        pytest.skip(str(error))
    for got, expected in zip(outputs, case.expected, strict=True):
        assert got.shape == expected.shape
        np.testing.assert_allclose(got, expected, rtol=case.rtol, atol=max(case.atol, 1e-6))


def test_most_of_the_cases_are_not_skipped() -> None:
    # Guards against an importer that refuses everything: then every case above would be skipped.
    assert sum(_is_supported(case) for case in CASES) > len(CASES) / 2


def _is_supported(case: Case) -> bool:
    try:
        case.graph()
    except UnsupportedError:
        return False
    return True
