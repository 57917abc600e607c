"""The tiles that measuring found better than the rule on this machine, kept in the user's cache folder.

One JSON file, made by ``edgetrain doctor --calibrate`` alone (``bench_tiles``). Its name has the fingerprint of the
compiled kernels: another processor, another version of edgetrain or Numba finds no calibration and goes by the rules.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from edgetrain.kernels import cache

Tile = tuple[int, int]
# What reading a file that is not there, cut short or edited by hand may raise.
_DAMAGE = (OSError, ValueError, TypeError, KeyError, AttributeError)


@dataclass(frozen=True)
class Finding:
    """What was measured for one product.

    Attributes:
        rule, tile: the rule's tile and the one to use, which is the rule's unless another one won clearly.
        gain: time with the rule's tile over that with ``tile``, a median over rounds; 1 when they are the same.
        rounds: of the last comparison.
    """

    rule: Tile
    tile: Tile
    gain: float
    rounds: int


def path() -> Path:
    """Return where this machine's calibration is kept, whether it exists or not.

    The place is one of those of compiled kernels: ``NUMBA_CACHE_DIR`` if set, else the user's cache folder.
    """
    return cache.places()[-1] / f"calibration-{cache.fingerprint()}.json"


@functools.cache
def findings() -> Mapping[str, Finding]:
    """Return what was measured, by ``choice.Sizes.label``; nothing without a file or when it is damaged.

    A damaged file costs speed and changes no result; ``state`` tells of it, and so does ``edgetrain doctor``.
    """
    with contextlib.suppress(*_DAMAGE):
        return _read(path())
    return {}


@functools.cache
def stored_tiles() -> Mapping[str, Tile]:
    """Return the tiles that replace the rule's, by ``choice.Sizes.label``."""
    return {label: finding.tile for label, finding in findings().items() if finding.tile != finding.rule}


def state() -> str:
    """Return ``none``, ``damaged`` or ``found``."""
    if not path().exists():
        return "none"
    try:
        _read(path())
    except _DAMAGE:
        return "damaged"
    return "found"


def describe() -> dict[str, Any]:
    """Return ``file``, its ``state``, how many ``products`` it knows and how many of their tiles it ``replaced``."""
    return {"file": str(path()), "state": state(), "products": len(findings()), "replaced": len(stored_tiles())}


def keep(measured: Mapping[str, Finding]) -> Path:
    """Add findings to the file, in one step that a power failure cannot cut in two; return its path.

    Raises:
        OSError: the folder cannot be written.
    """
    file = path()
    entries = {label: asdict(finding) for label, finding in {**findings(), **measured}.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps({"products": entries}, indent=1) + "\n", encoding="utf-8")
        draft.replace(file)
    except OSError:
        draft.unlink(missing_ok=True)
        raise
    forget()
    return file


def forget() -> None:
    """Read the file again when it is needed next."""
    findings.cache_clear()
    stored_tiles.cache_clear()


def _read(file: Path) -> dict[str, Finding]:
    entries = json.loads(file.read_text(encoding="utf-8"))["products"]
    return {label: Finding(_tile(e["rule"]), _tile(e["tile"]), float(e["gain"]), int(e["rounds"]))
            for label, e in entries.items()}  # fmt: skip


def _tile(numbers: list[int]) -> Tile:
    """Check what a file says.

    Raises:
        ValueError, TypeError: it is not two positive whole numbers.
    """
    channels, width = map(int, numbers)
    if min(channels, width) < 1:
        raise ValueError(f"tile {numbers!r}, expected two positive whole numbers")
    return channels, width
