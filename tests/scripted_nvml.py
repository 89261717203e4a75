"""An NVML that answers from a script, for every test that needs one.

What a `Gpu` says nothing of is refused as NOT_SUPPORTED, which is what a driver does with what it cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

GIB = 1 << 30
NOT_SUPPORTED, NOT_FOUND, LIBRARY_NOT_FOUND, GPU_IS_LOST, VERSION_MISMATCH = 3, 6, 12, 15, 18
"""NVML_ERROR_* of nvml.h."""


class NVMLError(Exception):
    def __init__(self, value: int, text: str) -> None:
        super().__init__(text)
        self.value = value


def not_supported() -> NVMLError:
    return NVMLError(NOT_SUPPORTED, "Not Supported")


class Gpu:
    """One scripted GPU; `memory_gib` None is NOT_SUPPORTED, `lost` has no handle, `fallen` one that answers nothing.

    `answers` says by function name what else NVML tells of it: a value, or an exception to raise. `processes` are
    (pid, bytes).
    """

    def __init__(
        self, name, capability, memory_gib, uuid="GPU-0000", slices=(), lost=False, fallen=False, used_gib=0.5,
        processes=(), answers=None, mig_mode=None,
    ):  # fmt: skip
        self.name, self.capability, self.memory_gib, self.uuid = name, capability, memory_gib, uuid
        self.slices, self.lost, self.fallen, self.used_gib = slices, lost, fallen, used_gib
        self.processes, self.answers = processes, answers or {}
        self.mig_mode = bool(slices) if mig_mode is None else mig_mode


class ScriptedNvml:
    """The functions of pynvml that are asked. `broken` makes `nvmlInit` fail; `refused` names what is NOT_SUPPORTED."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(self, *gpus: Gpu, broken: NVMLError | None = None, refused: frozenset[str] = frozenset()) -> None:
        self.gpus, self.broken, self.refused, self.shut = gpus, broken, refused, 0

    def nvmlInit(self):
        if self.broken:
            raise self.broken

    def nvmlShutdown(self):
        self.shut += 1

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in object.__getattribute__(self, "refused"):
            return _refuse
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        """Whatever has no method here is told by the GPU's own `answers`."""
        if not name.startswith("nvml"):
            raise AttributeError(name)

        def answer(*args: Any) -> Any:
            gpu = args[0] if args and isinstance(args[0], Gpu) else None
            if gpu is None or name not in gpu.answers:
                raise not_supported()
            told = gpu.answers[name]
            if isinstance(told, Exception):
                raise told
            return told(*args[1:]) if callable(told) else told

        return answer

    def nvmlSystemGetDriverVersion(self):
        return "580.95.05"

    def nvmlSystemGetCudaDriverVersion(self):
        return 13000

    def nvmlDeviceGetCount(self):
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index):
        if self.gpus[index].lost:
            raise NVMLError(GPU_IS_LOST, "GPU is lost")
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for gpu in self.gpus:
            for one in (gpu, *gpu.slices):
                if one.uuid == uuid:
                    return one
        raise NVMLError(NOT_FOUND, "Not Found")

    def nvmlDeviceGetName(self, gpu):
        return _unless_fallen(gpu).name

    def nvmlDeviceGetUUID(self, gpu):
        return _unless_fallen(gpu).uuid

    def nvmlDeviceGetCudaComputeCapability(self, gpu):
        if _unless_fallen(gpu).capability is None:
            raise not_supported()
        return gpu.capability

    def nvmlDeviceGetMemoryInfo(self, gpu, version=None):
        if _unless_fallen(gpu).memory_gib is None:
            raise not_supported()
        return SimpleNamespace(total=int(gpu.memory_gib * GIB), used=int(gpu.used_gib * GIB))

    def nvmlDeviceGetComputeRunningProcesses(self, gpu):
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in _unless_fallen(gpu).processes]

    def nvmlDeviceGetMigMode(self, gpu):
        return [int(gpu.mig_mode)] * 2

    def nvmlDeviceGetMaxMigDeviceCount(self, gpu):
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, gpu, index):
        if index >= len(gpu.slices):
            raise NVMLError(NOT_FOUND, "Not Found")
        return gpu.slices[index]


def _refuse(*_args: Any) -> Any:
    raise not_supported()


def _unless_fallen(gpu: Gpu) -> Gpu:
    if gpu.fallen:
        raise NVMLError(GPU_IS_LOST, "GPU is lost")
    return gpu
