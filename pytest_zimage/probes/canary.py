"""The canary: a matrix product and a copy of fixed sizes, which say how fast the device is whatever the model does.

Runs in the worker, beside the loaded model; torch is passed in. What it holds must count neither into the peaks that
the model is judged by nor into the memory that the model's next image finds cached, so its buffers come from a pool of
their own, which is given back as a whole, and the peaks of before are remembered.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

from msgspec import structs

from pytest_zimage.engines.protocol import CanaryTimed, Reported

_SIDE = 8192
_MATMUL_BYTES = 3 * 2 * _SIDE**2
"""Three bfloat16 matrices."""
_COPY_BYTES = (1 << 30, 1 << 28)
"""Size of each of the two copied buffers, the preferred one first: far larger than any cache, or at least as large."""
_SPARE = 1.25
"""Memory that must be free, as a multiple of what is taken: the driver keeps some for itself."""
_BUDGET_MS = 15.0
"""Of warming up, and of the timed repetitions again, in each of the two."""
_REPEATS = (3, 12)


def time_canary(torch: Any, device: str) -> CanaryTimed:
    """bfloat16 product of two random 8192 x 8192 matrices, and a copy within the device's memory; medians.

    Takes about 40 ms on a data-centre GPU. A device without memory to spare is not timed, and a note says so; the CPU
    has no canary at all.
    """
    if not device.startswith("cuda"):
        return CanaryTimed()
    notes: list[str] = []
    with torch.cuda.device(device), torch.inference_mode():
        matmul_s = _guarded(torch, "matmul", notes, partial(_matmul_s, torch, device))
        copied: tuple[float, int] | None = None
        for size in _COPY_BYTES:
            if copied is None and _free_bytes(torch, device) > 2 * size * _SPARE:
                copied = _guarded(torch, "copy", notes, partial(_copy, torch, device, size))
    if copied is None and not notes:
        notes.append(f"copy canary not timed: {_free_bytes(torch, device):,} bytes are free")
    return CanaryTimed(
        matmul_tflops=2 * _SIDE**3 / matmul_s / 1e12 if matmul_s else None,
        copy_gb_s=2 * copied[1] / copied[0] / 1e9 if copied and copied[0] else None,
        notes=tuple(notes),
    )


def _guarded(torch: Any, what: str, notes: list[str], timed: Callable[[], Any]) -> Any:
    """The answer, or None and a note where the memory does not suffice."""
    try:
        return timed()
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "ALLOC_FAILED" not in str(error):
            raise
        notes.append(f"{what} canary not timed: out of device memory")
        return None


def _matmul_s(torch: Any, device: str) -> float:
    # Zeros would need less power, and so tell of a clock that no model reaches.
    dice = torch.Generator(device).manual_seed(0)
    left, right, out = (torch.empty(_SIDE, _SIDE, dtype=torch.bfloat16, device=device) for _ in range(3))
    left.normal_(generator=dice)
    right.normal_(generator=dice)
    return _median_s(torch, lambda: torch.mm(left, right, out=out))


def _copy(torch: Any, device: str, size: int) -> tuple[float, int]:
    """Median seconds, and the bytes of one buffer."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median_s(torch, lambda: target.copy_(source)), size


def _median_s(torch: Any, call: Callable[[], object]) -> float:
    """Median seconds of one call by the device's clock, the calls queued one behind the other."""
    (first_ms,) = _durations_ms(torch, call, 1)
    (again_ms,) = _durations_ms(torch, call, 1)
    low, high = _REPEATS
    repeats = min(max(int(_BUDGET_MS / max(min(first_ms, again_ms), 1e-3)), low), high)
    _durations_ms(torch, call, repeats)
    return statistics.median(_durations_ms(torch, call, repeats)) / 1000


def _durations_ms(torch: Any, call: Callable[[], object], count: int) -> list[float]:
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    events[-1].synchronize()
    return [float(begin.elapsed_time(end)) for begin, end in pairwise(events)]


def _free_bytes(torch: Any, device: str) -> int:
    return int(torch.cuda.mem_get_info(device)[0])


class Aside:
    """Lets something else than the model hold device memory for a while, without a trace in the model's peaks."""

    def __init__(self, torch: Any, device: str) -> None:
        self._torch = torch
        self._device = device
        self._peaks: tuple[int, int] | None = None
        """Allocated and reserved, of all the time before the last `taken`."""

    @contextmanager
    def taken(self) -> Iterator[None]:
        """What is allocated inside and released by its end counts into no peak and leaves nothing cached."""
        if not self._device.startswith("cuda"):
            yield
            return
        cuda = self._torch.cuda
        before = self._now()
        reserved = int(cuda.memory_reserved(self._device))
        pool = cuda.MemPool()
        try:
            with cuda.device(self._device), cuda.use_mem_pool(pool):
                yield
        finally:
            del pool
            if int(cuda.memory_reserved(self._device)) > reserved:
                # A torch that keeps the pool's memory; all that is cached goes then, and the next image takes it anew.
                cuda.empty_cache()
            cuda.reset_peak_memory_stats(self._device)
            self._peaks = before

    def corrected(self, reported: Reported) -> Reported:
        """`reported`, whose peaks torch counts from the last `taken` on, with the peaks of all the time."""
        if self._peaks is None or reported.device_peak_bytes is None:
            return reported
        allocated, reserved = self._now()
        return structs.replace(reported, device_peak_bytes=allocated, device_reserved_peak_bytes=reserved)

    def _now(self) -> tuple[int, int]:
        cuda = self._torch.cuda
        allocated, reserved = self._peaks or (0, 0)
        return (
            max(allocated, int(cuda.max_memory_allocated(self._device))),
            max(reserved, int(cuda.max_memory_reserved(self._device))),
        )
