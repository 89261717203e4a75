"""Memory of a server from outside: what it and all its descendants hold, looked at every 20 ms from a thread.

All sizes are bytes. A page that two processes share counts for both, as in the published figures.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from pytest_zimage.engines.servers.keeper import descendants
from pytest_zimage.probes import nvml
from pytest_zimage.probes.nvml import ProcessMemory

INTERVAL_S = 0.020
_NOT_KNOWN = "which process of this host serves is not known, so its memory is not"
_FAMILY_S = 0.2
"""Between two looks for new processes, which takes a look at every process of the host."""


class TreeMemory:
    """Peaks of a process and of all that ever descended from it. A context manager: it looks while it is open."""

    def __init__(
        self,
        pid: int | None,
        gpu_uuid: str,
        *,
        interval_s: float = INTERVAL_S,
        lib: Any = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`pid` None: the process is not known here, and nothing will be. `gpu_uuid` is NVML's, empty on the CPU.

        `lib` stands in for pynvml.
        """
        self._pid, self._gpu_uuid, self._interval_s, self._lib, self._clock = pid, gpu_uuid, interval_s, lib, clock
        self._family: dict[int, psutil.Process] = {}
        self._listed_at = float("-inf")
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._resources = ExitStack()
        self._gpu: ProcessMemory | None = None
        self._no_gpu = ""
        self.idle_bytes: int | None = None
        """All of them at `mark_idle`."""
        self.peak_bytes: int | None = None
        """The largest sum seen at one moment."""
        self.high_water_bytes: int | None = None
        """The kernel's own mark (`VmHWM`, proc(5)) of the largest process since it began, missing no moment."""
        self.samples = 0

    def __enter__(self) -> Self:
        if self._pid is None:
            return self
        if self._gpu_uuid:
            session = self._resources.enter_context(nvml.opened(self._lib))
            if isinstance(session, str):
                self._no_gpu = session
            else:
                self._gpu = ProcessMemory(session, self._pids, self._gpu_uuid)
        self._sample()
        self._thread = threading.Thread(target=self._loop, name="zimage-server-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self.now()
        self._resources.close()

    def mark_idle(self) -> None:
        """What is held at this moment counts as idle, and no earlier peak counts: it was of something else."""
        with self._lock:
            self.peak_bytes = None
            if self._gpu is not None:
                self._gpu.peak_bytes = None
        self.idle_bytes = self.now()

    def now(self) -> int | None:
        """One more look at everything: the processes too, and the kernel's marks; the sum of resident sizes."""
        if self._pid is None:
            return None
        self._listed_at = float("-inf")
        held = self._sample()
        marks = [_high_water(pid) for pid in list(self._family)]
        known = [mark for mark in (*marks, self.high_water_bytes) if mark is not None]
        self.high_water_bytes = max(known, default=None)
        return held

    @property
    def gpu_peak_bytes(self) -> int | None:
        """The most that NVML listed for all of them at one moment; None where it does not say."""
        return self._gpu.peak_bytes if self._gpu is not None else None

    @property
    def why_no_size(self) -> str:
        """Why there is no peak; empty where there is one."""
        if self._pid is None:
            return _NOT_KNOWN
        return "" if self.peak_bytes else f"process {self._pid} cannot be looked at: it is gone, or another user's"

    @property
    def why_no_gpu(self) -> str:
        """Why there is no peak of device memory; empty where there is one, and without a GPU."""
        if self._pid is None:
            return _NOT_KNOWN
        return "; ".join(self._gpu.notes()) if self._gpu is not None else self._no_gpu

    def _pids(self) -> Collection[int]:
        return self._family.keys()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _sample(self) -> int | None:
        with self._lock:
            if self._clock() - self._listed_at >= _FAMILY_S:
                self._list_family()
                self._listed_at = self._clock()
            sizes = [size for process in self._family.values() if (size := _resident(process)) is not None]
            held = sum(sizes) if sizes else None
            if held is not None:
                self.peak_bytes = max(self.peak_bytes or 0, held)
            if self._gpu is not None:
                self._gpu.poll()
            self.samples += 1
            return held

    def _list_family(self) -> None:
        """Whoever was of the family stays of it, even with another parent."""
        # A number may have passed to another process by now.
        here = {pid: process for pid, process in self._family.items() if process.is_running()}
        roots = {*here, self._pid} if self.samples == 0 and self._pid is not None else set(here)
        for pid in roots | descendants(*roots):
            with contextlib.suppress(psutil.Error):
                here[pid] = here.get(pid) or psutil.Process(pid)
        self._family = here


def _resident(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return None


def _high_water(pid: int) -> int | None:
    """`VmHWM` of a process; None where it is gone or has none."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, ValueError, IndexError, StopIteration):
        return None
