"""Changing a baseline file so that it is always whole, and so that two sessions at once both get their change in."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from pytest_zimage.errors import BaselineError


def to_bytes(document: Struct) -> bytes:
    """Sorted keys, one number a line, shortest exact floats, a newline at the end: a review shows what changed."""
    plain = msgspec.to_builtins(document)
    text = json.dumps(plain, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8") + b"\n"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make `folder` and hold it against other sessions. The lock is on the folder itself, so that no file is left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise _cannot(folder, error) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError as error:
            raise _cannot(folder, error) from error
        yield
    finally:
        os.close(handle)


def write_atomically(path: Path, data: bytes) -> None:
    """Replace `path` by `data` or leave it as it is; `BaselineError` names the folder. The caller holds `locked`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise _cannot(path.parent, error) from error
    # The file is whole and in place; syncing the folder only makes its name survive a power cut.
    with suppress(OSError):
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cannot(folder: Path, error: OSError) -> BaselineError:
    return BaselineError(
        f"{folder}: baselines cannot be written: {error.strerror or error}; the stored ones are unchanged",
        mend="make the folder writable and free space, or name another one: --zimage-baselines DIR",
    )
