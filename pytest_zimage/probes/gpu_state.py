"""The present state of one GPU, asked of NVML again and again: clock, throttling, heat, power, who holds memory.

What NVML refuses is None, and the refusal is kept by what was asked; so is an answer that cannot be. A refusal is never
an error: GB10 gives several, and a MIG slice most.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_zimage.catalog.device_class import Throttle
from pytest_zimage.probes.nvml import Nvml

_NOT_AVAILABLE = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE: what `usedGpuMemory` holds where the driver model hides it."""
_SM = 1
"""NVML_CLOCK_SM, and NVML_TEMPERATURE_GPU is 0."""
THROTTLES: dict[int, Throttle] = {
    0x004: "power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "thermal throttle",
    0x040: "hardware thermal throttle",
    0x080: "power brake",
    0x100: "display clock",
}
"""nvmlClocksEventReason* of nvml.h. Idle (0x1) and clocks set by the owner (0x2) hold nothing down against his will."""
_CHOSEN = 0x003
_HARDWARE = 0x0C8
"""0x8 says that the hardware slowed down, 0x40 and 0x80 why; with a reason it says nothing of its own."""


class GpuState:
    """One GPU or MIG slice. No method raises."""

    def __init__(self, nvml: Nvml, uuid: str) -> None:
        self._lib = nvml.lib
        self.refused: dict[str, str] = {}
        """What was last asked in vain, and what NVML said."""
        self._handle = self._ask("the device", "nvmlDeviceGetHandleByUUID", uuid, of_device=False)

    def sm_clock_mhz(self) -> int | None:
        return self._number("SM clock", "nvmlDeviceGetClockInfo", _SM, most=20_000)

    def sm_clock_max_mhz(self) -> int | None:
        return self._number("SM clock's maximum", "nvmlDeviceGetMaxClockInfo", _SM, most=20_000)

    def temperature_c(self) -> int | None:
        return self._number("temperature", "nvmlDeviceGetTemperature", 0, most=200)

    def power_w(self) -> float | None:
        milliwatts = self._number("power", "nvmlDeviceGetPowerUsage", most=100_000_000)
        return milliwatts / 1000 if milliwatts is not None else None

    def power_limit_w(self) -> float | None:
        milliwatts = self._number("power limit", "nvmlDeviceGetEnforcedPowerLimit", most=100_000_000)
        return milliwatts / 1000 if milliwatts is not None else None

    def throttle(self) -> tuple[str, ...] | None:
        """Why the clocks are held down at this moment; empty where they are not."""
        new, old = "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
        bits = self._ask("throttling", new if hasattr(self._lib, new) else old)
        return decoded(int(bits)) if bits is not None else None

    def processes(self) -> dict[int, int | None] | None:
        """Device memory in bytes by process number, of those that compute; None where its size is hidden."""
        listed = self._ask("processes", "nvmlDeviceGetComputeRunningProcesses")
        if listed is None:
            return None
        sizes = {int(one.pid): one.usedGpuMemory for one in listed}
        return {pid: None if size in (None, _NOT_AVAILABLE) else int(size) for pid, size in sizes.items()}

    def _number(self, what: str, function: str, *args: Any, most: int) -> int | None:
        answer = self._ask(what, function, *args)
        if answer is None:
            return None
        if not 0 < int(answer) <= most:
            self.refused[what] = f"{int(answer)} cannot be"
            return None
        return int(answer)

    def _ask(self, what: str, function: str, *args: Any, of_device: bool = True) -> Any:
        """The answer; None where NVML refuses or these bindings have no such function, which `refused` then tells."""
        if of_device and self._handle is None:
            return None
        call: Callable[..., Any] | None = getattr(self._lib, function, None)
        if call is None:
            self.refused[what] = "this nvidia-ml-py cannot ask"
            return None
        try:
            answer = call(self._handle, *args) if of_device else call(*args)
        except self._lib.NVMLError as error:
            self.refused[what] = f"NVML says {error}"
            return None
        self.refused.pop(what, None)
        return answer


def decoded(bits: int) -> tuple[str, ...]:
    """Words for a mask of nvmlClocksEventReason*; a bit that nvml.h did not have yet keeps its number."""
    if bits & _HARDWARE & ~0x8:
        bits &= ~0x8
    words: list[str] = [word for bit, word in THROTTLES.items() if bits & bit]
    rest = bits & ~_CHOSEN & ~sum(THROTTLES)
    return (*words, *([f"reason {rest:#x}"] if rest else []))
