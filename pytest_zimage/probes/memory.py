"""Memory of this process while it works: a light sampler beside the kernel's own mark, and the device's side.

All sizes are bytes. Nothing here imports torch; the worker passes it in.
"""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytest_zimage.engines.protocol import Reported
from pytest_zimage.probes import nvml
from pytest_zimage.probes.high_water import rss_peak
from pytest_zimage.probes.nvml import ProcessMemory

_STATM = Path("/proc/self/statm")
_NVML_EVERY = 10
"""Samples between two questions to NVML: it takes a lock of the driver's, reading statm does not."""


def rss_now() -> int:
    """Resident set of this process at this moment, in bytes."""
    return open_rss()()


def open_rss() -> Callable[[], int]:
    """A cheap reader of the resident set: one `pread` of /proc/self/statm a call, psutil where there is none."""
    try:
        statm = os.open(_STATM, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, AttributeError):
        process = importlib.import_module("psutil").Process()
        return lambda: int(process.memory_info().rss)
    return _Statm(statm)


class _Statm:
    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._page = os.sysconf("SC_PAGESIZE")

    def __call__(self) -> int:
        return int(os.pread(self._descriptor, 128, 0).split()[1]) * self._page

    def __del__(self) -> None:
        os.close(self._descriptor)


class MemorySampler:
    """Watches the resident set from a thread, as a second source beside the kernel's mark.

    `interval_s` apart, the thread sleeps in between; 20 ms costs about 0.1 % of one core. `nvml` is polled by the same
    thread, ten times more rarely.
    """

    def __init__(
        self,
        interval_s: float = 0.020,
        *,
        read: Callable[[], int] | None = None,
        nvml: ProcessMemory | None = None,
        no_nvml: str = "",
    ) -> None:
        """`no_nvml` says why there is no `nvml` on a machine that should have one."""
        if not 0 < interval_s < float("inf"):
            raise ValueError(f"interval_s is {interval_s}, not a positive number of seconds")
        self._interval_s = interval_s
        self._read = read or open_rss()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.nvml, self.no_nvml = nvml, no_nvml
        self.peak_bytes: int | None = None
        self.samples = 0
        self.failure = ""
        """Why sampling ended early; empty while it has not."""

    def start(self) -> MemorySampler:
        """Begins; at least one sample is taken before this returns."""
        if self._thread is not None:
            raise RuntimeError("the sampler is already running")
        self._stop.clear()
        self._sample()
        self._thread = threading.Thread(target=self._loop, name="zimage-memory", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> MemorySampler:
        """Ends, with one last sample; safe to call twice."""
        if self._thread is not None:
            self._stop.set()
            self._thread.join()
            self._thread = None
            self._sample()
        return self

    def __enter__(self) -> MemorySampler:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No sampling inside, one sample right after: the kernel's own mark covers what happened meanwhile."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()
            if self.failure:
                return

    def _sample(self, *, ask_nvml: bool = False) -> None:
        with self._lock:
            try:
                self.peak_bytes = max(self.peak_bytes or 0, self._read())
            except (OSError, ValueError) as error:
                self.failure = f"sampling resident memory ended after {self.samples} samples: {error}"
                return
            if self.nvml is not None and (ask_nvml or self.samples % _NVML_EVERY == 0):
                self.nvml.poll()
            self.samples += 1

    def now(self) -> MemorySampler:
        """One more sample of everything at once, for a moment that must not be missed."""
        self._sample(ask_nvml=True)
        return self


def device_peaks(torch: Any, device: str) -> tuple[int | None, int | None]:
    """(allocated, reserved) peaks in bytes of torch's allocator on `device`; (None, None) on the CPU."""
    if not device.startswith("cuda"):
        return None, None
    return int(torch.cuda.max_memory_allocated(device)), int(torch.cuda.max_memory_reserved(device))


def device_held(torch: Any, device: str) -> int | None:
    """Bytes that the living tensors on `device` asked for, without the allocator's rounding; None where unknown.

    Not to be asked beside a timed image: cuBLAS gives its workspaces back, which torch keeps among the tensors.
    """
    if not device.startswith("cuda"):
        return None
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_stats(device).get("requested_bytes.all.current") or None


def shares_memory(torch: Any, device: str) -> bool:
    """Whether the device has no memory but the machine's, as GB10: what it holds is never added to resident sizes."""
    return device.startswith("cuda") and bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def nvml_uuid(torch: Any, device: str) -> str:
    """NVML's name of a torch device (`GPU-...`), or the empty string where torch does not tell."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    return f"GPU-{uuid}" if uuid else ""


@contextmanager
def worker_sampler(torch: Any, device: str) -> Iterator[MemorySampler]:
    """A running sampler of this process; on a GPU it asks NVML too, where NVML answers."""
    if not device.startswith("cuda"):
        with MemorySampler() as sampler:
            yield sampler
        return
    with nvml.opened() as session:
        if isinstance(session, str):
            watching = MemorySampler(no_nvml=session)
        else:
            watching = MemorySampler(nvml=ProcessMemory(session, os.getpid(), nvml_uuid(torch, device)))
        with watching as sampler:
            yield sampler


def peaks(sampler: MemorySampler, torch: Any = None, device: str = "cpu") -> Reported:
    """Every peak since the process started. The kernel's mark is the measurement, the sampler the check on it."""
    sampler.now()
    kernel = rss_peak()
    notes = list(kernel.notes)
    allocated, reserved = device_peaks(torch, device) if torch is not None else (None, None)
    if sampler.failure:
        notes.append(sampler.failure)
    no_nvml = "; ".join(sampler.nvml.notes()) if sampler.nvml is not None else sampler.no_nvml
    if no_nvml:
        notes.append(no_nvml)
    if allocated == 0:
        notes.append(f"torch allocated nothing on {device}")
    if torch is not None and shares_memory(torch, device):
        notes.append(f"{device} shares the machine's memory: its sizes are part of that, not on top of it")
    return Reported(
        rss_peak_bytes=kernel.bytes,
        rss_peak_source=kernel.source,
        rss_sampled_peak_bytes=sampler.peak_bytes,
        device_peak_bytes=allocated,
        device_reserved_peak_bytes=reserved,
        nvml_process_peak_bytes=sampler.nvml.peak_bytes if sampler.nvml else None,
        device_held_bytes=device_held(torch, device) if torch is not None else None,
        notes=tuple(notes),
        unavailable={"gpu_process_peak": no_nvml} if no_nvml else {},
    )
