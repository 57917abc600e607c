"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def replace_file(path: str | os.PathLike[str], *content: bytes | NDArray[Any]) -> None:
    """Replace a file in one step: temporary file, fsync, rename, fsync of the folder.

    Temporary files that a crash left behind are removed first. Arrays are written as they lie in memory. Where the
    path is a link, the file is replaced that it leads to. Who may read an old file may read the new one.

    Raises:
        OSError: the folder is missing, full or not writable, or there is something else than a file, such as a device;
            what was there is untouched.
    """
    path = file_meant(path)
    temporary = path.with_name(f".{path.name}.{threading.get_ident()}.{os.getpid()}.tmp")
    try:
        _remove_orphans(path)
        _write_synced(temporary, content)
        with contextlib.suppress(FileNotFoundError):
            temporary.chmod(path.stat().st_mode & 0o777)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # nothing can be removed from a read-only file system either
            temporary.unlink()
        raise


def file_meant(path: str | os.PathLike[str]) -> Path:
    """Return the file that a path means: the one that a link leads to.

    Raises:
        OSError: there is something else than a file, such as a device.
    """
    folder = os.path.realpath(os.path.dirname(os.path.abspath(path)))
    file = Path(os.path.realpath(path))
    if file.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    # /dev/stdout leads to the file that standard output was sent to: to replace that would lose what it holds.
    if folder == "/dev" or folder.startswith("/proc/") or (file.exists() and not file.is_file()):
        raise OSError(errno.EINVAL, "it is no regular file")
    return file


def not_written(path: str | os.PathLike[str], error: OSError) -> str:
    """Return what to say of a file that cannot be written, and what to do."""
    remedy = "make its folder" if isinstance(error, FileNotFoundError) else "free space"
    return f"{path}: cannot be written ({error.strerror or error}); {remedy} or choose another place"


def raw(array: NDArray[Any]) -> memoryview:
    """Return the bytes of a contiguous array."""
    return array.reshape(-1).view(np.uint8).data


def _write_synced(path: Path, content: Iterable[bytes | NDArray[Any]]) -> None:
    with path.open("wb") as file:
        for part in content:
            file.write(part if isinstance(part, bytes) else raw(part))
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    # Without this the rename itself may be lost in a power cut.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_orphans(path: Path) -> None:
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        owner = orphan.name.split(".")[-2]
        if not (owner.isdigit() and _alive(int(owner))):
            orphan.unlink(missing_ok=True)


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
