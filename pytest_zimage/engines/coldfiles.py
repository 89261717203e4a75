"""A run's weights on the disk, from before they are read until nobody needs them there any more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, TypeVar

from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.probes import diskspeed, pagecache
from pytest_zimage.probes.pagecache import CacheState

Reading = Callable[[ReportProgress], AbstractContextManager[None]]
"""What holds the disks, so that nobody else loads from them; it says so while it waits for them."""
T = TypeVar("T")

_SAID_EVERY_S = 0.2


class _Emptied(NamedTuple):
    state: CacheState
    gb_s: float | None


class ColdFiles:
    """Holds the files' disks and empties the page cache of them, before they are read and after it.

    A context manager. It works beside its user, since all of this takes seconds: from its beginning, during imports and
    a worker's start, and after `read`, during the first image. Leaving it waits until that is done, but not for a disk
    that another process holds.
    """

    def __init__(self, files: Sequence[Path], reading: Reading, progress: ReportProgress) -> None:
        self._files = files
        self._reading = reading
        self._progress = progress
        self._disks = ExitStack()
        self._held = threading.Event()
        self._left = False
        self._waiting = ""
        self._emptied: Future[_Emptied | None] = Future()
        self._dropped: Future[CacheState | None] | None = None

    def __enter__(self) -> ColdFiles:
        self._emptied = _beside(self._take)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._left = True
        if self._held.is_set():
            wait([self._emptied])
            if self._dropped is not None:
                wait([self._dropped])
        self._emptied.add_done_callback(lambda _: self._disks.close())

    def hold(self) -> None:
        """Wait until the disks are held, and say so. Raises `MeasurementError` if they cannot be."""
        while not (self._held.is_set() or self._emptied.done()):
            if self._waiting:
                self._progress(self._waiting, 0, 0)
            self._held.wait(_SAID_EVERY_S)
        if not self._held.is_set():
            self._emptied.result()

    def ready(self) -> tuple[CacheState, float | None]:
        """The page cache, now empty, and how fast the disk reads in 1e9 bytes a second, None if that cannot be told.

        To be called when the disks are held and nobody reads anything else, and before the load. It is the faster of
        two readings, the first taken while the worker started: what else goes on makes a reading slower, never faster.
        """
        emptied = self._emptied.result()
        assert emptied is not None
        if emptied.gb_s is None:
            return emptied.state, None
        again = diskspeed.read_gb_s(self._files)
        return pagecache.empty(self._files), max(emptied.gb_s, again or 0.0)

    def read(self) -> None:
        """They have been read: empties the page cache of them, and lets others load.

        Where device and host share their memory its pages are in the way of the weights, and the next load would have
        to wait for it.
        """
        self._dropped = _beside(self._drop)

    # ---- beside the user ---------------------------------------------------

    def _take(self) -> _Emptied | None:
        self._disks.enter_context(self._reading(self._say))
        self._held.set()
        # Whoever left meanwhile reads nothing, and others may.
        if self._left:
            return None
        state = pagecache.empty(self._files)
        return _Emptied(state, diskspeed.read_gb_s(self._files) if state.emptied else None)

    def _say(self, stage: str, done: int, total: int) -> None:
        self._waiting = stage

    def _drop(self) -> CacheState | None:
        with self._disks:
            return pagecache.empty(self._files)


def _beside(work: Callable[[], T]) -> Future[T]:
    """`work` in a thread that does not keep the process alive: it may be waiting for what another process holds."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            result = work()
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=run, daemon=True).start()
    return future
