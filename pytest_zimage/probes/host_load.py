"""How busy others keep the host, and which processes are this session's own.

The load average tells neither: it lags by a minute, in which the session itself was working. So the time that all cores
spent at work is taken between two looks, and what the session's own processes used is taken off.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil

_SHORTEST_S = 0.2
"""Between two looks: the kernel counts in ticks of 10 ms."""


class Cores(NamedTuple):
    """Seconds at work since some beginning, all cores together."""

    all_s: float
    own_s: float


class HostLoad:
    """Since when and how much: `others` may be asked as often as wanted."""

    def __init__(
        self,
        root_pid: int,
        also: int | None = None,
        *,
        read: Callable[..., Cores] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        cores: int | None = None,
    ) -> None:
        """`root_pid` is the process that the session's others descend from, `also` one beside it."""
        self._roots = [pid for pid in (root_pid, also) if pid is not None]
        self._read = read or core_times
        self._clock, self._sleep = clock, sleep
        # Of the machine and not of a container, as what the kernel counts is.
        self._cores = cores or os.cpu_count() or 1
        self._since_s, self._then = clock(), self._read(*self._roots)

    def others(self) -> float | None:
        """Share of the cores that others kept busy since the last call, 0 to 1; None where the kernel counts none."""
        if (short_s := _SHORTEST_S - (self._clock() - self._since_s)) > 0:
            self._sleep(short_s)
        now_s, now = self._clock(), self._read(*self._roots)
        passed_s, self._since_s = now_s - self._since_s, now_s
        all_s, own_s = now.all_s - self._then.all_s, now.own_s - self._then.own_s
        self._then = now
        if now.all_s <= 0 or passed_s <= 0:
            return None
        return min(max((all_s - own_s) / (passed_s * self._cores), 0.0), 1.0)


def core_times(*root_pids: int) -> Cores:
    """The kernel's own counts; a process that ended is in its parent's."""
    times = psutil.cpu_times()
    idle_s = times.idle + getattr(times, "iowait", 0.0)
    # A guest's time is in user's already, and steal is not work of this machine.
    counted_twice_s = sum(getattr(times, name, 0.0) for name in ("guest", "guest_nice", "steal"))
    own_s = 0.0
    for process in {process.pid: process for root in root_pids for process in own_processes(root)}.values():
        try:
            own = process.cpu_times()
        except psutil.Error:
            continue
        own_s += own.user + own.system + getattr(own, "children_user", 0.0) + getattr(own, "children_system", 0.0)
    return Cores(sum(times) - idle_s - counted_twice_s, own_s)


def own_processes(root_pid: int) -> list[psutil.Process]:
    """`root_pid` and all that descends from it, as far as this user may see."""
    try:
        root = psutil.Process(root_pid)
        return [root, *root.children(recursive=True)]
    except psutil.Error:
        return []


def process_name(pid: int) -> str:
    """Empty where there is no such process here, as for one of another container."""
    try:
        return str(psutil.Process(pid).name())
    except psutil.Error:
        return ""


def swap_used_bytes(meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Swap in use; None where the kernel does not say."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text(encoding="ascii").splitlines() if ":" in line)
        total, free = (int(lines[key].split()[0]) * 1024 for key in ("SwapTotal", "SwapFree"))
    except (OSError, KeyError, ValueError, IndexError):
        return None
    return total - free
