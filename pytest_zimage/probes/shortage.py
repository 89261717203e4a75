"""Out of memory, told: how much more was needed, how much is free, and who holds the rest."""

from __future__ import annotations

import importlib
import os
import re
from typing import Any

from pytest_zimage.errors import MemoryShortageError
from pytest_zimage.probes import nvml
from pytest_zimage.probes.fitness import GpuProcess
from pytest_zimage.probes.gpu_state import GpuState
from pytest_zimage.probes.host_load import process_name
from pytest_zimage.probes.memory import nvml_uuid, shares_memory

_SIGNS = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
_NEEDED = re.compile(r"tried to allocate ([0-9.]+ (?:bytes|[KMGT]iB))", re.IGNORECASE)
_GIB = 1 << 30


def shortage(error: Exception, torch: Any, device: str, doing: str, *, lib: Any = None) -> MemoryShortageError | None:
    """`error` as a shortage of memory, or None if it is something else.

    `doing` is what was under way (`loading`). torch says it with an error of its own (`torch.OutOfMemoryError`), CUDA's
    libraries and the host's allocator with a `RuntimeError` that only its text tells apart. `lib` stands in for pynvml.
    """
    text = str(error)
    told_by_text = isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS)
    if not (told_by_text or isinstance(error, MemoryError)):
        return None
    on_device = device.startswith("cuda") and told_by_text and "DefaultCPUAllocator" not in text
    needed = _NEEDED.search(text)
    told = [f"{needed[1]} more were needed" if needed else (text.splitlines() or [type(error).__name__])[0]]
    told += _device_side(torch, device, lib) if on_device else [_host_side()]
    return MemoryShortageError(
        f"out of {device if on_device else 'host'} memory while {doing}: {'; '.join(told)}",
        mend="end what else holds memory there, or choose a smaller variant (--zimage-list) or workload",
    )


def others_on(uuid: str, own: int, lib: Any = None) -> list[str]:
    """What processes other than `own` hold on the GPU `uuid`, a text each; empty where NVML does not tell."""
    with nvml.opened(lib) as session:
        if isinstance(session, str):
            return []
        found = GpuState(session, uuid).processes() or {}
    return [
        f"{GpuProcess(pid, process_name(pid)).title} holds {_gib(size) if size is not None else 'an unknown amount'}"
        for pid, size in sorted(found.items())
        if pid != own
    ]


def _device_side(torch: Any, device: str, lib: Any) -> list[str]:
    try:
        free, total = torch.cuda.mem_get_info(device)
        told = [f"{_gib(free)} of {_gib(total)} are free"]
        told.append(f"this worker's tensors hold {_gib(torch.cuda.memory_allocated(device))}")
        if shares_memory(torch, device):
            # cudaMemGetInfo does not count page cache that the kernel would give up as free.
            told.append(f"{_host_side()}, page cache that can be dropped included")
        return told + others_on(nvml_uuid(torch, device), os.getpid(), lib)
    except RuntimeError as error:  # a context that an error has spoilt answers nothing more
        return [f"{device} does not say what is free: {(str(error).splitlines() or [''])[0]}"]


def _host_side() -> str:
    return f"the machine has {_gib(importlib.import_module('psutil').virtual_memory().available)} available"


def _gib(size: int) -> str:
    return f"{size / _GIB:.2f} GiB"
