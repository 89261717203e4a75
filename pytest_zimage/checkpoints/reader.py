"""Reads tensors of a safetensors file straight into fresh buffers, and onto the device.

No memory map and no lazy pages: every byte is read once, on purpose, so that the time it takes can be measured and the
pages of the file are never part of the process.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, Protocol

import torch

from pytest_zimage.checkpoints.header import Header, TensorInfo
from pytest_zimage.errors import CheckpointError, UnsupportedError

TORCH_DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""torch's type for a safetensors dtype code."""

STAGING_BYTES = 32 << 20
"""One of the two pinned buffers a CUDA device is fed through: large enough that a copy costs no more than its bytes."""
_READ_AT_MOST = 1 << 30
"""Linux returns short above 0x7ffff000 bytes, so larger tensors are read in pieces."""


class TensorSource(Protocol):
    """What the loader needs of a reader; a reader with several threads can take this one's place."""

    read_s: float
    """Seconds spent reading the file."""
    to_device_s: float
    """Seconds spent moving what was read to the device."""

    def read(self, tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Each of `tensors` once, on the device, in any order."""
        ...

    def read_bytes(self, tensor: TensorInfo) -> bytes:
        """A small tensor's bytes."""
        ...


class TensorReader:
    """One file, one thread; a context manager.

    Raises `CheckpointError` when the file cannot be opened or ends early, `UnsupportedError` for a dtype torch lacks.
    """

    def __init__(self, header: Header, device: torch.device) -> None:
        self.read_s = 0.0
        self.to_device_s = 0.0
        self._path = header.path
        self._device = device
        self._fd = -1
        self._staging = _Staging(device) if device.type == "cuda" else None

    def __enter__(self) -> TensorReader:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"{self._path}: cannot be read: {error.strerror}", mend="check the file's permissions"
            ) from error
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)
        self._fd = -1
        self._staging = None

    def read(self, tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Each of `tensors` in file order, so that a disk is read forwards."""
        for tensor in sorted(tensors, key=lambda tensor: tensor.begin):
            dtype = TORCH_DTYPES.get(tensor.dtype)
            if dtype is None:
                raise UnsupportedError(
                    f"{self._path}: tensor {tensor.name!r}: torch {torch.__version__} has no type for {tensor.dtype}",
                    mend=f"types that can be read: {', '.join(TORCH_DTYPES)}",
                )
            buffer = self._to_host(tensor) if self._staging is None else self._to_device(tensor, self._staging)
            yield tensor, buffer.view(dtype).reshape(tensor.shape)
        if self._staging is not None:
            began = time.perf_counter()
            self._staging.finish()
            self.to_device_s += time.perf_counter() - began

    def read_bytes(self, tensor: TensorInfo) -> bytes:
        return bytes(self._to_host(tensor).numpy())

    def _to_host(self, tensor: TensorInfo) -> torch.Tensor:
        buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
        self._fill(tensor, 0, buffer)
        return buffer

    def _to_device(self, tensor: TensorInfo, staging: _Staging) -> torch.Tensor:
        target = torch.empty(tensor.nbytes, dtype=torch.uint8, device=self._device)
        for start in range(0, tensor.nbytes, STAGING_BYTES):
            part = target[start : start + STAGING_BYTES]
            began = time.perf_counter()
            slot = staging.next_free()[: part.numel()]
            self.to_device_s += time.perf_counter() - began
            self._fill(tensor, start, slot)
            began = time.perf_counter()
            staging.send(slot, part)
            self.to_device_s += time.perf_counter() - began
        return target

    def _fill(self, tensor: TensorInfo, start: int, buffer: torch.Tensor) -> None:
        """Read `buffer.numel()` bytes of `tensor`, from its byte `start` on."""
        began = time.perf_counter()
        view = memoryview(buffer.numpy().data)
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + _READ_AT_MOST]], tensor.begin + start + done)
            if count <= 0:
                raise CheckpointError(
                    f"{self._path}: the file ends within tensor {tensor.name!r}", mend="download the file again"
                )
            done += count
        self.read_s += time.perf_counter() - began


class _Staging:
    """Two pinned host buffers used in turn, so that reading the next piece overlaps the copy of the last."""

    def __init__(self, device: torch.device) -> None:
        self._slots = [torch.empty(STAGING_BYTES, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        event: Any = torch.cuda.Event
        self._sent: list[torch.cuda.Event] = [event() for _ in range(2)]
        self._stream = torch.cuda.current_stream(device)
        self._turn = 0

    def next_free(self) -> torch.Tensor:
        self._turn ^= 1
        self._sent[self._turn].synchronize()
        return self._slots[self._turn]

    def send(self, slot: torch.Tensor, target: torch.Tensor) -> None:
        target.copy_(slot, non_blocking=True)
        self._sent[self._turn].record(self._stream)

    def finish(self) -> None:
        for event in self._sent:
            event.synchronize()
