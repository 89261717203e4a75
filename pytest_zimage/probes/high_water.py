"""The most resident memory that this process ever had, by the system's own mark."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import NamedTuple

from pytest_zimage.errors import MeasurementError

_STATUS = Path("/proc/self/status")


class Sized(NamedTuple):
    """A size, where it comes from, and what to know about it."""

    bytes: int
    source: str
    notes: tuple[str, ...] = ()


def rss_peak(status: Path = _STATUS) -> Sized:
    """Largest resident set of this process since it was exec'ed.

    `VmHWM` (proc(5)) where the kernel has it. The fallback, `ru_maxrss`, survives exec: a worker started from a larger
    process reports that one's peak, which its note says. Raises `MeasurementError` where neither exists.
    """
    value = _status_kib(status, "VmHWM")
    if value:
        return Sized(value * 1024, "VmHWM")
    try:
        import resource
    except ImportError:
        return _rss_peak_windows()
    # Kilobytes everywhere but on macOS: getrusage(2) of each.
    scale = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale
    if peak <= 0:
        raise MeasurementError(
            f"no peak resident memory: {status} has no VmHWM and ru_maxrss is {peak}", mend="run on Linux with /proc"
        )
    return Sized(peak, "ru_maxrss", ("ru_maxrss may be the peak of the process that started this one",))


def _rss_peak_windows() -> Sized:
    info = importlib.import_module("psutil").Process().memory_info()
    if not getattr(info, "peak_wset", 0):
        raise MeasurementError("this system reports no peak resident memory", mend="run on Linux")
    return Sized(int(info.peak_wset), "peak_wset", ("peak working set of Windows, not comparable with Linux",))


def _status_kib(path: Path, key: str) -> int | None:
    try:
        for line in path.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return None
