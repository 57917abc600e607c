"""Run the ONNX backend cases and write docs/onnx_backend.md.

Use: ``python benchmarks/onnx_backend_table.py``. Exit code 1 when a case fails.
"""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from edgetrain.errors import UnsupportedError  # noqa: E402  # the repository is put on the path first
from tests.onnx_backend_cases import KINDS, Case, cases  # noqa: E402  # likewise

HEAD = """# ONNX backend cases

Written by `python benchmarks/onnx_backend_table.py`; do not edit.

The cases of `onnx.backend.test` (onnx {version}; kinds {kinds}) that consist of supported operators only, imported with
`edgetrain.load_onnx` and run by `Learner.logits`. Weights that a case gives as inputs become initializers. The same
cases are tests: `pytest tests/test_onnx_backend.py`.

**{passed} passed, {skipped} skipped, {failed} failed.**
"""


@dataclass(frozen=True)
class Outcome:
    """What became of a case; ``verdict`` is passed, skipped or failed."""

    case: Case
    verdict: str
    reason: str = ""


def judge(case: Case) -> Outcome:
    """Run one case."""
    try:
        outputs = case.run()
        for got, expected in zip(outputs, case.expected, strict=True):
            np.testing.assert_allclose(got, expected, rtol=case.rtol, atol=max(case.atol, 1e-6))
    except UnsupportedError as error:
        return Outcome(case, "skipped", str(error))
    except Exception as error:  # whatever goes wrong belongs into the table
        return Outcome(case, "failed", f"{type(error).__name__}: {str(error).strip().splitlines()[0]}")
    return Outcome(case, "passed")


def by_operator(outcomes: list[Outcome]) -> list[str]:
    """Return a table: operator, passed, skipped, failed."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        for operator in outcome.case.operators:
            counts.setdefault(operator, Counter())[outcome.verdict] += 1
    lines = ["| operator | passed | skipped | failed |", "|---|--:|--:|--:|"]
    lines += [f"| {op} | {c['passed']} | {c['skipped']} | {c['failed']} |" for op, c in sorted(counts.items())]
    return lines


def with_reason(outcomes: list[Outcome], verdict: str) -> list[str]:
    """Return a table: case, reason."""
    rows = [o for o in outcomes if o.verdict == verdict]
    if not rows:
        return []
    lines = ["", f"## {verdict.capitalize()}", "", "| case | reason |", "|---|---|"]
    return lines + [f"| {o.case.kind}/{o.case.name} | {o.reason.replace('|', '/')} |" for o in rows]


def main() -> int:
    """Write the table."""
    outcomes = [judge(case) for case in cases()]
    counts = Counter(outcome.verdict for outcome in outcomes)
    numbers = {verdict: counts[verdict] for verdict in ("passed", "skipped", "failed")}
    head = HEAD.format(version=onnx.__version__, kinds=", ".join(KINDS), **numbers)
    tables = [*by_operator(outcomes), *with_reason(outcomes, "failed"), *with_reason(outcomes, "skipped")]
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs" / "onnx_backend.md").write_text("\n".join([head, *tables, ""]), encoding="utf-8")
    print(", ".join(f"{number} {verdict}" for verdict, number in numbers.items()))
    return 1 if numbers["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
