"""Whether the machine was fit to be timed: what was read of it, and what of that counts against it.

Plain data and one pure function; `observer` takes the readings. A figure that a machine cannot say is None, and
`Reading.unknown` says why; the unknown never makes a machine unfit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from msgspec import Struct

from pytest_zimage.catalog.device_class import FitnessLimits


class CanaryFigures(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How fast the device was at a matrix product and at a copy; None where it was not timed."""

    matmul_tflops: float | None = None
    """bfloat16, 1e12 operations a second."""
    copy_gb_s: float | None = None
    """1e9 bytes a second, read and written both counted."""


CANARIES = (("matmul", "TFLOP/s", "matmul_tflops"), ("copy", "GB/s", "copy_gb_s"))
"""What each figure is called, its unit, and its field."""


class Recorded(Struct, frozen=True, kw_only=True):
    """What the canary said when the baseline was recorded."""

    canary: CanaryFigures
    differs: str = ""
    """What else may explain another figure, such as "torch 2.10.0 when recorded, 2.11.0 now"."""


class GpuProcess(Struct, frozen=True):
    """A process on the GPU that is not of this session."""

    pid: int
    """As the driver counts; inside a container it may be another's."""
    name: str = ""
    """Empty where this machine's process table does not have it."""
    bytes: int | None = None
    """Device memory that it holds."""

    @property
    def title(self) -> str:
        """`pid 4711 python`, or the number alone."""
        return f"pid {self.pid} {self.name}".rstrip()


class Reading(Struct, frozen=True, kw_only=True):
    """One look at the machine, or the worst of many."""

    sm_clock_mhz: int | None = None
    """The lowest, of many looks."""
    sm_clock_max_mhz: int | None = None
    throttle: tuple[str, ...] | None = None
    """Why the clocks are held down, in the words of `gpu_state`; of many looks, all that were seen."""
    temperature_c: int | None = None
    """The highest, of many looks; so is the power."""
    power_w: float | None = None
    power_limit_w: float | None = None
    processes: tuple[GpuProcess, ...] | None = None
    """Of others, on this GPU."""
    host_load: float | None = None
    """Share of the host's cores that others kept busy since the look before, 0 to 1."""
    swap_bytes: int | None = None
    """Swap in use on the host."""
    canary: CanaryFigures = CanaryFigures()
    looks: int = 1
    unknown: tuple[str, ...] = ()
    """What could not be read, and why."""


class Fitness(Struct, frozen=True, kw_only=True):
    """The machine around one timed block. A cold load has only what was read before it."""

    before: Reading
    during: Reading | None = None
    """What a thread of the test process saw meanwhile; None where there is no GPU to ask."""
    after: Reading | None = None
    reasons: tuple[str, ...] = ()
    """Why it was not fit, as far as was known when it was measured."""
    waited_s: float = 0.0
    """Until the machine was fit, or until the limit."""
    retried: bool = False
    """Whether the block was timed a second time because the machine was not fit the first time."""

    def readings(self) -> Iterator[Reading]:
        yield from (reading for reading in (self.before, self.during, self.after) if reading is not None)

    def canary(self) -> CanaryFigures:
        """The better of before and after, as a baseline stores it: what disturbs one only ever makes it slower."""
        seen = [reading.canary for reading in (self.before, self.after) if reading is not None]
        return CanaryFigures(
            matmul_tflops=_best(figures.matmul_tflops for figures in seen),
            copy_gb_s=_best(figures.copy_gb_s for figures in seen),
        )

    def throttles(self) -> tuple[str, ...]:
        """All that was seen to hold the clocks down, each once."""
        return tuple(dict.fromkeys(word for reading in self.readings() for word in reading.throttle or ()))

    def processes(self) -> tuple[GpuProcess, ...]:
        """The processes of others, each with the most it was seen to hold, the largest first."""
        most: dict[int, GpuProcess] = {}
        for process in (one for reading in self.readings() for one in reading.processes or ()):
            known = most.get(process.pid)
            if known is None or (process.bytes or 0) > (known.bytes or 0):
                most[process.pid] = process
        return tuple(sorted(most.values(), key=lambda process: -(process.bytes or 0)))


def reasons(fitness: Fitness, limits: FitnessLimits, recorded: Recorded | None = None) -> tuple[str, ...]:
    """Why the machine was not fit, each in a few words; empty where nothing known speaks against it.

    `recorded` is the canary of the baseline, where there is one. A power cap or a low clock that costs the canary
    nothing is no reason.
    """
    if not limits.judged:
        return ()
    return (
        *(word for word in fitness.throttles() if word in limits.throttle),
        *_others(fitness, limits),
        *_canaries(fitness, limits, recorded),
        *_clock(fitness, limits),
        *_host(fitness, limits),
    )


def _others(fitness: Fitness, limits: FitnessLimits) -> Iterator[str]:
    for process in fitness.processes():
        if process.bytes is not None and process.bytes > limits.process_bytes:
            yield f"another process holds {gigabytes(process.bytes)}: {process.title}"


def _canaries(fitness: Fitness, limits: FitnessLimits, recorded: Recorded | None) -> Iterator[str]:
    for title, unit, key in CANARIES:
        before, after = (
            getattr(reading.canary, key) if reading else None for reading in (fitness.before, fitness.after)
        )
        seen = [value for value in (before, after) if value is not None]
        if len(seen) == 2 and 1 - min(seen) / max(seen) > limits.canary_apart:
            change = _percent(seen[1] / seen[0] - 1)
            yield f"{title} canary {figure(seen[0])} {unit} before and {figure(seen[1])} after the rounds ({change})"
        stored = getattr(recorded.canary, key) if recorded else None
        if recorded and stored is not None and seen and min(seen) < stored * (1 - limits.canary_below):
            change = _percent(min(seen) / stored - 1)
            differs = f"; {recorded.differs}" if recorded.differs else ""
            yield f"{title} canary {figure(min(seen))} {unit}, {figure(stored)} recorded ({change}){differs}"


def _clock(fitness: Fitness, limits: FitnessLimits) -> Iterator[str]:
    """Only of the rounds themselves: an idle GPU is right to lower its clock."""
    lowest = fitness.during.sm_clock_mhz if fitness.during else None
    most = max((reading.sm_clock_max_mhz or 0 for reading in fitness.readings()), default=0)
    if lowest is not None and lowest < limits.sm_clock * most:
        yield f"SM clock down to {lowest:,} of {most:,} MHz"


def _host(fitness: Fitness, limits: FitnessLimits) -> Iterator[str]:
    busy = [reading.host_load for reading in fitness.readings() if reading.host_load is not None]
    if busy and max(busy) > limits.host_load:
        yield f"others keep {max(busy) * 100:.0f} % of the host's cores busy"
    before, after = (reading.swap_bytes if reading else None for reading in (fitness.before, fitness.after))
    if before is not None and after is not None and after - before > limits.swap_growth_bytes:
        yield f"swap in use grew by {gigabytes(after - before)}"


def gigabytes(size: int) -> str:
    """1e9 bytes, as the tools that show device memory per process print it."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def figure(value: float) -> str:
    """Three significant digits, all of them before the point kept: `3,100`, `612`, `45.1`."""
    digits = max(2 - math.floor(math.log10(abs(value))), 0) if value else 0
    return f"{value:,.{digits}f}"


def _percent(ratio: float) -> str:
    return f"{ratio * 100:+.0f} %"


def _best(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return max(known, default=None)
