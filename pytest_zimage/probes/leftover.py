"""Whether a process that is gone gave its device memory back, as NVML sees the whole device."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from pytest_zimage.probes import nvml

ALLOWED_BYTES = 64 << 20
"""What may be in use more than before: drivers keep a little by themselves."""
_TRIES = 26
_PAUSE_S = 0.2


class DeviceUse:
    """Memory in use on one GPU, noted before a process starts and asked again after it has ended."""

    def __init__(self, uuid: str, *, lib: Any = None, sleep: Callable[[float], None] = time.sleep) -> None:
        """`uuid` is NVML's, of a GPU or a MIG slice; empty for the CPU. `lib` stands in for pynvml."""
        self._uuid, self._lib, self._sleep = uuid, lib, sleep
        self._before = self._used()

    def left_bytes(self) -> int | None:
        """Bytes in use more than before, negative for less; None where NVML does not say, as on unified memory.

        A driver takes a moment to clear up after a process: what is too much is asked again for about five seconds.
        """
        if self._before is None:
            return None
        left = None
        for _ in range(_TRIES):
            used = self._used()
            left = None if used is None else used - self._before
            if left is None or left <= ALLOWED_BYTES:
                break
            self._sleep(_PAUSE_S)
        return left

    def _used(self) -> int | None:
        if not self._uuid:
            return None
        with nvml.opened(self._lib) as session:
            if isinstance(session, str):
                return None
            lib = session.lib
            try:
                memory = lib.nvmlDeviceGetMemoryInfo(lib.nvmlDeviceGetHandleByUUID(self._uuid))
            except lib.NVMLError:
                return None
            # Some drivers answer for unified memory with values that cannot be.
            return int(memory.used) if 0 < memory.used <= memory.total else None
