"""Locks between processes: of a run, a device, a disk. The kernel frees them with the process that held them."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.errors import MeasurementError

OTHER_CACHE = "name a cache folder that can be written to: --zimage-cache DIR"


@contextmanager
def held(path: Path, waiting: str, progress: ReportProgress, mend: str = OTHER_CACHE) -> Iterator[None]:
    """Hold the lock file `path`; `waiting` is said where another process has it.

    Raises `MeasurementError` if the file cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise MeasurementError(f"{path}: cannot be written: {error.strerror or error}", mend=mend) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(waiting, 0, 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def disks(folder: Path, files: Iterable[Path], progress: ReportProgress, *, after_s: float = 0.0) -> Iterator[None]:
    """Hold every disk that one of `files` lies on; the locks are in `folder`, and asked for after `after_s` seconds.

    Two loads at once share the disk's bandwidth, and one empties the page cache that the other has just filled, so the
    time of a cold load is only worth something while nobody else loads.
    """
    time.sleep(after_s)
    devices = sorted({path.stat().st_dev for path in files})
    with ExitStack() as stack:
        for device in devices:
            waiting = "waiting for the disk, which another process is loading from"
            stack.enter_context(held(folder / f"disk-{device}.lock", waiting, progress))
        yield
