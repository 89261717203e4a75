"""What a GPU is made of, beyond its name: firmware, board, link and limits, as NVML tells them.

Two boxes of one model have been seen 56 % apart, and newer firmware without the slow state. So whatever stays as it is
from one run to the next is recorded, and nothing that idles down or warms up: no present clock, link or temperature.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pytest_zimage.probes.nvml import Nvml

_NO_NUMBER = 2**32 - 1
"""What unsigned answers hold where the driver has no value."""
_NO_TEXT = frozenset({"", "n/a", "[n/a]", "unknown"})


def gpu_identity(nvml: Nvml, index: int) -> dict[str, str]:
    """Flat text by key, for the environment record; what NVML refuses or answers implausibly is not there.

    `index` is NVML's, of the physical GPU: a MIG slice has its parent's.
    """
    lib = nvml.lib
    found = {"cuda_driver": _cuda(_ask(lib, "nvmlSystemGetCudaDriverVersion"))}
    handle = _ask(lib, "nvmlDeviceGetHandleByIndex", index)
    if handle is not None:
        found |= {f"device_{key}": value for key, value in _of(lib, handle).items()}
    return {key: value for key, value in found.items() if value.lower() not in _NO_TEXT}


def _of(lib: Any, handle: Any) -> dict[str, str]:
    def text(name: str) -> str:
        answer = _ask(lib, name, handle)
        return answer.decode(errors="replace").strip() if isinstance(answer, bytes) else str(answer or "").strip()

    def number(name: str, *args: Any, per: int = 1) -> str:
        answer = _ask(lib, name, handle, *args)
        return str(int(answer) // per) if answer and 0 < int(answer) < _NO_NUMBER else ""

    def switch(name: str) -> str:
        answer = _ask(lib, name, handle)
        # Modes that can be pending come as (present, after the next start).
        state = answer[0] if isinstance(answer, list | tuple) else answer
        return {0: "off", 1: "on"}.get(state, "")

    generation, width = number("nvmlDeviceGetMaxPcieLinkGeneration"), number("nvmlDeviceGetMaxPcieLinkWidth")
    bus = _ask(lib, "nvmlDeviceGetPciInfo", handle)
    return {
        "vbios": text("nvmlDeviceGetVbiosVersion"),
        "gsp_firmware": text("nvmlDeviceGetGspFirmwareVersion"),
        "inforom": text("nvmlDeviceGetInforomImageVersion"),
        "board_part": text("nvmlDeviceGetBoardPartNumber"),
        "pci_bus": _decoded(getattr(bus, "busId", "")),
        "pcie_max": f"gen {generation} x{width}" if generation and width else "",
        "ecc": switch("nvmlDeviceGetEccMode"),
        "mig": switch("nvmlDeviceGetMigMode"),
        "persistence": switch("nvmlDeviceGetPersistenceMode"),
        "power_limit_w": number("nvmlDeviceGetPowerManagementLimit", per=1000),
        "clock_max_sm_mhz": number("nvmlDeviceGetMaxClockInfo", getattr(lib, "NVML_CLOCK_SM", 1)),
        "clock_max_memory_mhz": number("nvmlDeviceGetMaxClockInfo", getattr(lib, "NVML_CLOCK_MEM", 2)),
    }


def _cuda(version: int | None) -> str:
    """13000 is 13.0."""
    return f"{version // 1000}.{version % 1000 // 10}" if version else ""


def _decoded(value: object) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _ask(lib: Any, name: str, *args: Any) -> Any:
    """The answer, None where NVML refuses or these bindings have no such function."""
    function: Callable[..., Any] | None = getattr(lib, name, None)
    if function is None:
        return None
    try:
        return function(*args)
    except lib.NVMLError:
        return None
