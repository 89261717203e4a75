"""An NVML that answers from a script, for every test that needs one.

What a `Gpu` says nothing of is refused as NOT_SUPPORTED, which is what a driver does with what it cannot tell.
"""

from __future__ import annotations

import threading
from functools import partial
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

    `answers` says by function name what NVML tells of it: a value, an exception to raise, or a function of what is
    asked besides the handle; it goes before everything else. `processes` are (pid, bytes).
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
    """The functions of pynvml that are asked.

    `broken` makes `nvmlInit` fail, `refused` names what is NOT_SUPPORTED, and `absent` what these bindings do not have.
    Every call is noted in `asked`, and the thread that it came from in `threads`.
    """

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM = 1, 2

    def __init__(
        self,
        *gpus: Gpu,
        broken: NVMLError | None = None,
        refused: frozenset[str] = frozenset(),
        absent: frozenset[str] = frozenset(),
    ) -> None:
        self.gpus, self.broken, self.refused, self.absent = gpus, broken, refused, absent
        self.asked: list[str] = []
        self.threads: set[str] = set()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("nvml"):
            return object.__getattribute__(self, name)
        if name in self.absent:
            raise AttributeError(name)
        return partial(self._answer, name)

    def _answer(self, name: str, *args: Any) -> Any:
        self.asked.append(name)
        self.threads.add(threading.current_thread().name)
        if name in self.refused:
            raise not_supported()
        gpu = args[0] if args and isinstance(args[0], Gpu) else None
        if gpu is not None and name in gpu.answers:
            told = gpu.answers[name]
            if isinstance(told, Exception):
                raise told
            return told(*args[1:]) if callable(told) else told
        if name not in vars(type(self)):
            raise not_supported()
        return vars(type(self))[name](self, *args)

    def nvmlInit(self):
        if self.broken:
            raise self.broken

    def nvmlShutdown(self):
        pass

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


def _unless_fallen(gpu: Gpu) -> Gpu:
    if gpu.fallen:
        raise NVMLError(GPU_IS_LOST, "GPU is lost")
    return gpu
