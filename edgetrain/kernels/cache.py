"""Compiled kernels on disk; needs neither LLVM nor Numba nor the kernels' source modules.

A process that finds all its kernels here imports no compiler: training LeNet-5 at batch size 32 then takes 44 MiB of
resident memory (the x86 machine of docs/performance.md).

One file per kernel, a checksum and an ELF object, in a folder that is named by everything the machine code depends on;
so nothing is ever out of date. Files are written under a temporary name and renamed: several processes may compile at
once, and a file cut short by a power failure is compiled again.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from edgetrain.hostinfo import processor

_PREFIX, _SUFFIX = "edgetrain-", ".kernel"
# Folders kept: for other Python environments or machines that share the place, and to go back to a former version.
_KEPT_FOLDERS = 4
# Numba's settings that change the machine code. NUMBA_DISABLE_JIT and the like are not supported: kernels are
# written in terms of the machine and mean nothing to the Python interpreter.
_SETTINGS = ("NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_ENABLE_AVX", "NUMBA_OPT", "NUMBA_LOOP_VECTORIZE",
             "NUMBA_SLP_VECTORIZE")  # fmt: skip


def places() -> list[Path]:
    """Return the folders where kernels may be kept: all are read, the first one that can be written is written.

    ``NUMBA_CACHE_DIR`` if set, and nothing else; or beside the package, then the user's cache folder.
    """
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    if chosen:
        return [Path(chosen)]
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    users = [] if home.startswith("~") else [Path(home) / "edgetrain"]  # there are users without a home
    return [Path(__file__).parent / "__pycache__", *users]


def describe() -> dict[str, Any]:
    """Return where kernels are kept: ``folder``, whether it is ``writable``, and how many ``kernels`` are there."""
    writable = [place for place in places() if _writable(place)]
    kernels = {file.name for place in places() for file in place.glob(f"{_folder_name()}/*{_SUFFIX}")}
    return {"folder": str((writable or places())[0]), "writable": bool(writable), "kernels": len(kernels)}


def read(name: str) -> bytes | None:
    """Return what was written under this name, or ``None`` if it is not there or damaged."""
    for place in places():
        try:
            content = (place / _folder_name() / name).read_bytes()
        except OSError:
            continue
        if content[:8] == _checksum(name, content[8:]):
            return content[8:]
    return None


def write(name: str, content: bytes) -> None:
    """Keep bytes under a name in the first place that can be written; without one they are not kept."""
    for place in places():
        with contextlib.suppress(OSError):
            folder = place / _folder_name()
            if not folder.is_dir():
                folder.mkdir(parents=True, exist_ok=True)
                _remove_old(place)
            temporary = folder / f".{name}.{os.getpid()}"
            try:
                temporary.write_bytes(_checksum(name, content) + content)
                temporary.replace(folder / name)
            except OSError:  # a full disk: leave nothing behind
                temporary.unlink(missing_ok=True)
                raise
            return


def file_name(label: str) -> str:
    """Return the name of a kernel's file."""
    return label + _SUFFIX


@functools.cache
def fingerprint() -> str:
    """Return 16 digits that depend on everything that machine code depends on.

    That is the source of all kernels, the versions of Numba, llvmlite and Python, the processor and its features.
    Numba's own cache looks at a kernel's own file only and takes over changes of ``simd.py`` when it is emptied.
    """
    parts = [sys.version, *processor(), *(os.environ.get(name, "") for name in _SETTINGS)]
    sources = [_version_of("numba"), _version_of("llvmlite")]
    sources += [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return importlib.util.source_hash(b"\0".join([*(part.encode() for part in parts), *sources])).hex()


def _folder_name() -> str:
    return _PREFIX + fingerprint()


def _checksum(name: str, content: bytes) -> bytes:
    # The hash of Python's own cache files, 64 bits: against accidents, as the rights of the folder are against intent.
    return importlib.util.source_hash(name.encode() + b"\0" + content)


def _version_of(package: str) -> bytes:
    """Return the file in which a package says its version; importing compilers is what this module avoids."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return b""
    return (Path(spec.origin).parent / "_version.py").read_bytes()


def _writable(folder: Path) -> bool:
    existing = next((place for place in (folder, *folder.parents) if place.exists()), folder)
    return os.access(existing, os.W_OK | os.X_OK)


def _remove_old(place: Path) -> None:
    """Remove the folders of former versions, but not the latest ones."""
    folders = sorted(place.glob(f"{_PREFIX}*"), key=lambda folder: folder.stat().st_mtime, reverse=True)
    for folder in folders[_KEPT_FOLDERS:]:
        shutil.rmtree(folder, ignore_errors=True)
