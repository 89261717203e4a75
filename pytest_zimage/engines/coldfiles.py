"""A run's weights on the disk, from before they are read until nobody needs them there any more."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType

from pytest_zimage.probes import diskspeed, pagecache
from pytest_zimage.probes.pagecache import CacheState


class ColdFiles:
    """Holds the files' disks and empties the page cache of them, before they are read and after it.

    A context manager. It works beside its user, since all of this takes seconds: from its beginning, during imports and
    a worker's start, and after `read`, during the first image; leaving it waits until that is done.
    """

    def __init__(self, files: Sequence[Path], reading: AbstractContextManager[None]) -> None:
        """`reading`: what holds the disks; nobody else loads from them meanwhile."""
        self._files = files
        self._reading = reading
        self._disks = ExitStack()
        self._beside = ThreadPoolExecutor(1)
        self._emptied: Future[CacheState] | None = None

    def __enter__(self) -> ColdFiles:
        self._disks.enter_context(self._reading)
        self._emptied = self._beside.submit(pagecache.empty, self._files)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._beside.shutdown()
        self._disks.close()

    def ready(self) -> tuple[CacheState, float | None]:
        """The page cache, now empty, and how fast the disk reads in 1e9 bytes a second, None if that cannot be told.

        To be called when nobody reads anything else, and before the load.
        """
        assert self._emptied is not None
        state = self._emptied.result()
        speed = diskspeed.read_gb_s(self._files) if state.emptied else None
        return (state if speed is None else pagecache.empty(self._files)), speed

    def read(self) -> None:
        """They have been read: empties the page cache of them, and lets others load.

        Where device and host share their memory its pages are in the way of the weights, and the next load would have
        to wait for it.
        """
        self._beside.submit(self._leave, self._disks.pop_all())

    def _leave(self, disks: ExitStack) -> None:
        with disks:
            pagecache.empty(self._files)
