"""NVML read with care: what one driver answers another refuses, and a refusal must not lose the card.

`pynvml` (nvidia-ml-py) is imported only when asked for, and every function takes the module as an argument, so that a
scripted one can stand in for it. Sizes are bytes.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

from msgspec import Struct

NOT_SUPPORTED = 3
"""NVML_ERROR_NOT_SUPPORTED of nvml.h."""
GPU_IS_LOST = 15
"""NVML_ERROR_GPU_IS_LOST: it has fallen off the bus, or the driver gave it up."""
_NOT_AVAILABLE = 2**64 - 1
"""NVML_VALUE_NOT_AVAILABLE: what `usedGpuMemory` holds where the driver model hides it."""


class NvmlDevice(Struct, frozen=True, kw_only=True):
    """One device that CUDA could use: a whole GPU, or a MIG slice of one."""

    index: int
    """NVML's index of the physical GPU, in PCI bus order."""
    name: str
    uuid: str
    """`GPU-...`, or `MIG-...` for a slice."""
    capability: tuple[int, int] | None
    memory_bytes: int | None
    """None where the driver does not say, as on unified memory."""
    mig: bool = False
    notes: tuple[str, ...] = ()


class Nvml(Struct, frozen=True):
    """An initialised NVML."""

    lib: Any
    driver: str


@contextmanager
def opened(lib: Any = None) -> Iterator[Nvml | str]:
    """NVML initialised for the length of the block, or a sentence that says why there is none."""
    if lib is None:
        try:
            lib = importlib.import_module("pynvml")
        except ImportError:
            yield "nvidia-ml-py is not installed, so no GPU was looked for"
            return
    try:
        lib.nvmlInit()
    except lib.NVMLError as error:
        yield f"no NVIDIA driver to ask: {error}"
        return
    try:
        yield Nvml(lib, str(_try(lib, [], "driver version", lib.nvmlSystemGetDriverVersion) or ""))
    finally:
        _try(lib, [], "shutdown", lib.nvmlShutdown)


def devices(nvml: Nvml) -> tuple[list[NvmlDevice], tuple[str, ...]]:
    """Every device in PCI bus order, a GPU in MIG mode replaced by its slices; and notes on what did not answer."""
    lib = nvml.lib
    found: list[NvmlDevice] = []
    notes: list[str] = []
    for index, handle in _handles(lib, notes):
        if _is_lost(lib, handle):
            notes.append(f"GPU {index} is lost: it is in the driver's list and answers nothing, so it does not count")
            continue
        whole = _device(lib, handle, index)
        slices = list(_slices(lib, handle)) if _in_mig_mode(lib, handle) else None
        if slices == []:
            notes.append(f"GPU {index} ({whole.name}) is in MIG mode without a slice, which hides it from CUDA")
            continue
        found += [_device(lib, piece, index, parent=whole) for piece in slices] if slices else [whole]
    return found, tuple(notes)


def gpu_uuids(lib: Any = None) -> tuple[str, ...]:
    """Of every GPU in this machine, sorted, whatever CUDA may see of them; none without a driver."""
    with opened(lib) as session:
        if isinstance(session, str):
            return ()
        return tuple(sorted(filter(None, (_uuid(session.lib, handle) for _, handle in _handles(session.lib, [])))))


def _handles(lib: Any, notes: list[str]) -> Iterator[tuple[int, Any]]:
    """NVML's index and handle of every GPU that has one; `notes` gets what did not answer."""
    for index in range(_try(lib, notes, "device count", lib.nvmlDeviceGetCount) or 0):
        handle = _try(lib, notes, f"GPU {index}", lib.nvmlDeviceGetHandleByIndex, index)
        if handle is not None:
            yield index, handle


def _uuid(lib: Any, handle: Any) -> str:
    return _text(_try(lib, [], "UUID", lib.nvmlDeviceGetUUID, handle))


def _device(lib: Any, handle: Any, index: int, parent: NvmlDevice | None = None) -> NvmlDevice:
    notes: list[str] = []
    name = _text(_try(lib, notes, f"GPU {index}: name", lib.nvmlDeviceGetName, handle))
    capability = _try(lib, [], "compute capability", lib.nvmlDeviceGetCudaComputeCapability, handle)
    if capability is None and parent is not None:
        capability = parent.capability
    memory: int | None = None
    try:
        memory = int(lib.nvmlDeviceGetMemoryInfo(handle).total)
    except lib.NVMLError as error:
        # A value on unified memory (GB10), a defect on a discrete card: the device class decides which it is.
        unsupported = getattr(error, "value", None) == NOT_SUPPORTED
        notes.append(f"{name}: NVML " + ("has no memory total here" if unsupported else f"memory total: {error}"))
    return NvmlDevice(
        index=index,
        name=name,
        uuid=_text(_try(lib, notes, f"GPU {index}: UUID", lib.nvmlDeviceGetUUID, handle)),
        capability=(int(capability[0]), int(capability[1])) if capability else None,
        memory_bytes=memory,
        mig=parent is not None or " MIG " in name,
        notes=tuple(notes),
    )


def _is_lost(lib: Any, handle: Any) -> bool:
    try:
        lib.nvmlDeviceGetName(handle)
    except lib.NVMLError as error:
        return getattr(error, "value", None) == GPU_IS_LOST
    return False


def _in_mig_mode(lib: Any, handle: Any) -> bool:
    mode = _try(lib, [], "MIG mode", getattr(lib, "nvmlDeviceGetMigMode", None), handle)
    return bool(mode and mode[0])


def _slices(lib: Any, handle: Any) -> Iterator[Any]:
    """The MIG slices of a GPU in MIG mode; CUDA then sees them and not the GPU."""
    for index in range(_try(lib, [], "MIG count", lib.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
        piece = _try(lib, [], "MIG slice", lib.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
        if piece is not None:
            yield piece


class ProcessMemory:
    """Device memory of one process, or of several together, as the driver accounts for it, polled; keeps the peak.

    Answers on GB10 too, where the device's own memory total does not.
    """

    def __init__(self, nvml: Nvml, pid: int | Callable[[], Collection[int]], uuid: str = "") -> None:
        """`pid` is one process, or gives those there are at the moment, whose sum is meant.

        `uuid` limits the question to one device; without it, every device is asked and the answers summed.
        """
        self._lib = nvml.lib
        self._pids: Callable[[], Collection[int]] = pid if callable(pid) else lambda: (pid,)
        every = (handle for _, handle in _handles(nvml.lib, []))
        self._handles = [handle for handle in every if not uuid or _uuid(nvml.lib, handle) == uuid]
        self.peak_bytes: int | None = None
        self.others = 0
        """Most processes seen that are not this one."""
        self._refusal = "" if self._handles else f"NVML has no device {uuid or 'at all'}"

    def poll(self) -> None:
        """Asks once; never raises, a refusal is kept for `notes`."""
        used: int | None = None
        others = 0
        pids = self._pids()
        for handle in self._handles:
            try:
                processes = self._lib.nvmlDeviceGetComputeRunningProcesses(handle)
            except self._lib.NVMLError as error:
                self._refusal = f"NVML per-process memory: {error}"
                continue
            for process in processes:
                if process.pid not in pids:
                    others += 1
                elif process.usedGpuMemory in (None, _NOT_AVAILABLE):
                    self._refusal = "NVML lists this process without its memory"
                else:
                    used = (used or 0) + int(process.usedGpuMemory)
        self.others = max(self.others, others)
        if used is not None:
            self.peak_bytes = max(self.peak_bytes or 0, used)

    def notes(self) -> tuple[str, ...]:
        """Why there is no peak; empty where there is one."""
        if self.peak_bytes is not None:
            return ()
        if self._refusal:
            return (self._refusal,)
        pids = ", ".join(map(str, sorted(self._pids())))
        return (
            f"NVML never listed process {pids} ({self.others} others seen): it held no device memory, "
            "or a container hides its real process number",
        )


def _text(value: object) -> str:
    """Old bindings answer bytes."""
    return value.decode() if isinstance(value, bytes) else str(value or "")


def _try(lib: Any, notes: list[str], what: str, function: Callable[..., Any] | None, *args: Any) -> Any:
    """The answer, or None and a note where NVML refuses."""
    if function is None:
        return None
    try:
        return function(*args)
    except lib.NVMLError as error:
        notes.append(f"{what}: NVML says {error}")
        return None
