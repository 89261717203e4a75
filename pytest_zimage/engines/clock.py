"""Times one image and its phases without disturbing them.

The whole is taken by the host's clock between two synchronisations. The phases inside are marked without waiting for
the device: by CUDA events where there are any, by the host's clock otherwise, and read once the image is complete.
"""

from __future__ import annotations

import time
from typing import Any

import torch

_SLEEP_MARGIN_S = 0.0005
"""Sleeping overshoots by a scheduler tick; the rest of a hold is spent awake so that it is exact."""


class DeviceClock:
    """A stopwatch for one device: `start()`, any number of `mark(phase)`, `stop()`; then it may start again.

    `slow_by` is a fault on purpose: each phase is lengthened by that fraction of the time it really took.
    """

    def __init__(self, device: torch.device, slow_by: float = 0.0) -> None:
        self._device = device
        self._slow_by = slow_by
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self._names: list[str] = []
        self._began = 0.0
        self._phase_began = 0.0

    def synchronise(self) -> None:
        """Wait until the device has done everything asked of it."""
        if self._cuda:
            torch.cuda.synchronize(self._device)

    def start(self) -> None:
        self._names.clear()
        self._times.clear()
        self.synchronise()
        self._began = self._phase_began = time.perf_counter()
        self._note(0)

    def mark(self, phase: str) -> None:
        """End the phase that began at the last mark; names may not repeat within one image."""
        if self._slow_by:
            self.synchronise()
            hold((time.perf_counter() - self._phase_began) * self._slow_by)
        self._names.append(phase)
        self._note(len(self._names))
        if self._slow_by:
            self.synchronise()
            self._phase_began = time.perf_counter()

    def stop(self) -> tuple[float, dict[str, float]]:
        """Seconds from `start` to the device being idle again, and seconds by phase."""
        self.synchronise()
        total_s = time.perf_counter() - self._began
        return total_s, dict(zip(self._names, self._durations_s(), strict=True))

    def _note(self, index: int) -> None:
        if not self._cuda:
            self._times.append(time.perf_counter())
            return
        if index == len(self._events):
            event: Any = torch.cuda.Event
            self._events.append(event(enable_timing=True))
        self._events[index].record(torch.cuda.current_stream(self._device))

    def _durations_s(self) -> list[float]:
        count = len(self._names)
        if self._cuda:
            return [self._events[i].elapsed_time(self._events[i + 1]) / 1000 for i in range(count)]
        return [self._times[i + 1] - self._times[i] for i in range(count)]


def hold(seconds: float) -> None:
    """Let `seconds` pass on the host, to within microseconds."""
    until = time.perf_counter() + seconds
    if seconds > _SLEEP_MARGIN_S:
        time.sleep(seconds - _SLEEP_MARGIN_S)
    while time.perf_counter() < until:
        pass
