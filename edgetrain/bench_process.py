"""A benchmark's contender: a process of its own, and the questions that the parent asks it.

One JSON line each way. The parent sends ``{"contender", "case"}`` and gets ``{"ready"}`` after the first training
step; then ``{"steps": n}`` gives ``{"seconds": [...], "resident_bytes"}``, and ``{"facts": true}`` gives
``{"facts": {...}}``. A refusal is ``{"error", "kind"}``. The other end of this protocol is ``bench_contenders.py``.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from edgetrain.errors import BenchmarkError, EdgetrainError, UnsupportedError, UsageError

_COMMAND = [sys.executable, "-c", "from edgetrain.bench_contenders import serve; serve()"]
_ANSWER_SECONDS = 900.0  # a first step compiles; on a small board that takes minutes
_EXIT_SECONDS = 5.0
_REFUSALS: dict[str, type[EdgetrainError]] = {"UnsupportedError": UnsupportedError, "UsageError": UsageError}
# Every library that a contender may compute with reads one of these.
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Case:
    """What is timed.

    Attributes:
        model: a name that ``catalog.build_model`` knows.
        batch_size: samples per step.
        threads: of every contender.
        input_shape: without the batch dimension; the model's default if ``None``.
        sparsity: of edgetrain's weights, a policy as text (``policies``); others train densely.
    """

    model: str
    batch_size: int
    threads: int
    input_shape: tuple[int, ...] | None = None
    sparsity: str = "none"

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.threads} thread{'s' * (self.threads > 1)}"


@dataclass
class Timing:
    """What one contender did in one case.

    Attributes:
        seconds: of every timed step.
        first_step_seconds: from the start of the process to the end of the first step.
        resident_bytes: peak resident memory of the process.
        facts: more that the contender tells of itself (planned bytes, multiply-accumulates).
    """

    contender: str
    seconds: list[float] = field(default_factory=list)
    first_step_seconds: float = 0.0
    resident_bytes: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Median seconds per step."""
        return statistics.median(self.seconds)

    @property
    def p95(self) -> float:
        """Seconds that 95 % of the steps do not exceed."""
        ordered = sorted(self.seconds)
        return ordered[-(-95 * len(ordered) // 100) - 1]


class ContenderProcess:
    """Starts a contender and takes its first step; a context manager that ends the process.

    Args:
        contender: a name that ``bench_contenders`` knows.
        case: what it is to train.
        environment: variables to set for it.

    Raises:
        BenchmarkError: the process died or did not answer.
        UsageError, UnsupportedError: it refused the case.
    """

    def __init__(self, contender: str, case: Case, environment: Mapping[str, str] | None = None) -> None:
        self.timing = Timing(contender)
        threads = dict.fromkeys(_THREAD_VARIABLES, str(case.threads))
        self._messages = tempfile.TemporaryFile("w+")  # noqa: SIM115  # open as long as the process lives
        start = time.perf_counter()
        # A session of its own: Ctrl-C reaches the parent alone, which then ends its contenders.
        self._process = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._messages, text=True,
            env={**os.environ, **threads, **(environment or {})}, start_new_session=True,
        )  # fmt: skip
        try:
            self._ask({"contender": contender, "case": asdict(case)})
        except BaseException:
            self.close()
            raise
        self.timing.first_step_seconds = time.perf_counter() - start

    def __enter__(self) -> ContenderProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def turn(self, steps: int, keep: bool = True) -> float:
        """Let the contender take some steps; return their median seconds.

        Args:
            steps: at least 1.
            keep: whether they count.

        Raises:
            BenchmarkError: the process died or did not answer.
        """
        answer = self._ask({"steps": steps})
        if keep:
            self.timing.seconds += answer["seconds"]
        self.timing.resident_bytes = answer["resident_bytes"]
        return float(statistics.median(answer["seconds"]))

    def finish(self) -> Timing:
        """Ask for the contender's facts and return everything known of it."""
        self.timing.facts = self._ask({"facts": True})["facts"]
        return self.timing

    def close(self) -> None:
        """End the process: it stops when its input does, and is killed if it does not."""
        assert self._process.stdin
        assert self._process.stdout
        with suppress(BrokenPipeError):  # it died with a question in the pipe
            self._process.stdin.close()
        self._end()
        self._process.stdout.close()
        self._messages.close()

    def _end(self) -> int:
        """Wait for the process, not for ever, and return its exit code."""
        try:
            return self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        watchdog = threading.Timer(_ANSWER_SECONDS, self._process.kill)
        watchdog.start()
        try:
            line = self._exchange(json.dumps(question))
        finally:
            watchdog.cancel()
        if not line.endswith("\n"):
            raise self._death()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise _REFUSALS.get(answer["kind"], BenchmarkError)(answer["error"])
        return answer

    def _exchange(self, line: str) -> str:
        assert self._process.stdin
        assert self._process.stdout
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            return self._process.stdout.readline()
        except BrokenPipeError:
            return ""

    def _death(self) -> BenchmarkError:
        """Describe why there is no answer: exit code, and the last line that the process wrote."""
        code = self._end()
        self._messages.seek(0)
        lines = [line.strip() for line in self._messages if line.strip()]
        reason = lines[-1] if lines else "it left no message"
        remedy = "" if self.timing.contender.startswith("edgetrain") else "; mend its installation or leave it out"
        return BenchmarkError(
            f"the contender '{self.timing.contender}' ended early (exit code {code}): {reason}{remedy}"
        )
