"""Looks at the machine from the test process: before and after a timed block, and from a thread meanwhile.

The worker that is being timed knows nothing of it. A GPU is asked through NVML, the host through its kernel.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from msgspec import structs

from pytest_zimage.engines.protocol import CanaryTimed
from pytest_zimage.probes import nvml
from pytest_zimage.probes.fitness import CanaryFigures, GpuProcess, Reading
from pytest_zimage.probes.gpu_state import GpuState
from pytest_zimage.probes.host_load import HostLoad, own_processes, process_name, swap_used_bytes

WATCH_S = 0.2
"""Between two looks of the thread."""
_PROCESSES_EVERY = 5
"""Looks between two questions for processes, which the driver answers most slowly."""


class Strangers:
    """Tells the processes of others from this session's own.

    By process number, where the driver counts as this process does. In a container it may count as the host, and the
    session's own worker has another number there: then what was listed before the worker began is of others, and one
    more since is the worker.
    """

    def __init__(
        self,
        root_pid: int,
        also: int | None = None,
        *,
        own: Callable[[int], Iterable[int]] | None = None,
        name: Callable[[int], str] | None = None,
    ) -> None:
        """`also` is a process that is of the session though it does not descend from `root_pid`."""
        self._roots = [pid for pid in (root_pid, also) if pid is not None]
        self._own = own or (lambda root: (process.pid for process in own_processes(root)))
        self._name = name or process_name
        self._ours: set[int] = set()
        self._earlier: set[int] = set()

    def among(self, listed: Mapping[int, int | None], worker: int | None) -> tuple[tuple[GpuProcess, ...], str]:
        """Those of others, and what cannot be told. `worker` is the session's process that holds device memory, or
        whose descendant does."""
        if not self._ours.issuperset(listed):
            for root in self._roots:
                self._ours.update(self._own(root))
        others = {pid: size for pid, size in listed.items() if pid not in self._ours}
        if worker is None:
            self._earlier.update(others)
        elif self._ours.isdisjoint(listed):
            since = others.keys() - self._earlier
            # Numbers of another process table mean something else, or nothing, in this one.
            known = tuple(GpuProcess(pid, "", size) for pid, size in sorted(others.items()) if pid not in since)
            if len(since) < 2:
                return known, ""
            return known, f"which of {len(since)} processes is the worker: a container hides its process number"
        return tuple(GpuProcess(pid, self._name(pid), size) for pid, size in sorted(others.items())), ""


class Observer:
    """One machine, for the length of one run."""

    def __init__(
        self, gpu: GpuState | None, host: HostLoad, strangers: Strangers, *, unknown: tuple[str, ...] = ()
    ) -> None:
        """`unknown` says why there is no GPU to ask."""
        self._gpu, self._host, self._strangers, self._unknown = gpu, host, strangers, unknown
        self._swap = swap_used_bytes

    def look(self, canary: CanaryTimed | None = None, worker: int | None = None) -> Reading:
        """Everything, once. `worker` is the process of the session that holds device memory by now, `canary` what it
        timed just before."""
        reading = self._ask_gpu(worker, processes=True, limits=True)
        host_load, swap = self._host.others(), self._swap()
        missing = [what for what, value in (("load of the host", host_load), ("swap", swap)) if value is None]
        notes = (*(canary.notes if canary else ()), *(f"{what}: the kernel does not say" for what in missing))
        return structs.replace(
            reading,
            host_load=host_load,
            swap_bytes=swap,
            canary=CanaryFigures(matmul_tflops=canary.matmul_tflops, copy_gb_s=canary.copy_gb_s)
            if canary
            else CanaryFigures(),
            unknown=(*reading.unknown, *notes),
        )

    @contextmanager
    def watching(self, worker: int | None, interval_s: float = WATCH_S) -> Iterator[Watch]:
        """A thread that asks the GPU at intervals; none where there is no GPU to ask."""
        watch = Watch(lambda number: self._ask_gpu(worker, processes=number % _PROCESSES_EVERY == 0))
        if self._gpu is None:
            yield watch
            return
        with watch.running(interval_s):
            yield watch

    def _ask_gpu(self, worker: int | None, *, processes: bool, limits: bool = False) -> Reading:
        gpu = self._gpu
        if gpu is None:
            return Reading(unknown=self._unknown)
        listed = gpu.processes() if processes else None
        others, doubt = self._strangers.among(listed, worker) if listed is not None else (None, "")
        return Reading(
            sm_clock_mhz=gpu.sm_clock_mhz(),
            sm_clock_max_mhz=gpu.sm_clock_max_mhz() if limits else None,
            throttle=gpu.throttle(),
            temperature_c=gpu.temperature_c(),
            power_w=gpu.power_w(),
            power_limit_w=gpu.power_limit_w() if limits else None,
            processes=others,
            unknown=(*(f"{what}: {why}" for what, why in gpu.refused.items()), *([doubt] if doubt else [])),
        )


class Watch:
    """Many looks, of which the worst is kept."""

    def __init__(self, look: Callable[[int], Reading]) -> None:
        """`look` gets the number of the look, from 0."""
        self._look = look
        self._stop = threading.Event()
        self.worst: Reading | None = None

    @contextmanager
    def running(self, interval_s: float) -> Iterator[None]:
        thread = threading.Thread(target=self._loop, args=(interval_s,), name="zimage-fitness", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()

    def once(self) -> None:
        new = self._look(self.worst.looks if self.worst else 0)
        self.worst = new if self.worst is None else worse(self.worst, new)

    def _loop(self, interval_s: float) -> None:
        # The first look is late by an interval: the clocks of an idle GPU need a moment to rise.
        while not self._stop.wait(interval_s):
            self.once()


def worse(one: Reading, other: Reading) -> Reading:
    """The worst of both, figure by figure; what one of them does not know, the other says."""

    def pick(choose: Callable[[Any, Any], Any], name: str) -> Any:
        pair = getattr(one, name), getattr(other, name)
        known = [value for value in pair if value is not None]
        return choose(*known) if len(known) == 2 else known[0] if known else None

    def union(left: tuple[Any, ...], right: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(dict.fromkeys((*left, *right)))

    def largest(left: tuple[GpuProcess, ...], right: tuple[GpuProcess, ...]) -> tuple[GpuProcess, ...]:
        by_pid = {process.pid: process for process in sorted((*left, *right), key=lambda process: process.bytes or 0)}
        return tuple(by_pid.values())

    return Reading(
        sm_clock_mhz=pick(min, "sm_clock_mhz"),
        sm_clock_max_mhz=pick(max, "sm_clock_max_mhz"),
        throttle=pick(union, "throttle"),
        temperature_c=pick(max, "temperature_c"),
        power_w=pick(max, "power_w"),
        power_limit_w=pick(min, "power_limit_w"),
        processes=pick(largest, "processes"),
        looks=one.looks + other.looks,
        unknown=union(one.unknown, other.unknown),
    )


@contextmanager
def observing(gpu: str, root_pid: int, also: int | None = None, *, lib: Any = None) -> Iterator[Observer]:
    """An observer of the machine, and of the GPU with NVML's UUID `gpu` if not empty; `lib` stands in for pynvml.

    The session's own are `root_pid`, `also` and all that descends from them.
    """
    host, strangers = HostLoad(root_pid, also), Strangers(root_pid, also)
    if not gpu:
        yield Observer(None, host, strangers, unknown=("no GPU, so nothing was asked of one",))
        return
    with nvml.opened(lib) as session:
        if isinstance(session, str):
            yield Observer(None, host, strangers, unknown=(session,))
        else:
            yield Observer(GpuState(session, gpu), host, strangers)
