"""Reads tensors of a safetensors file into fresh memory of the process or of the device.

No memory map and no lazy pages: every byte is read once, on purpose, so that the time it takes can be measured and the
pages of the file are never part of the process.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Generator, Iterable, Iterator
from types import TracebackType
from typing import Protocol

import torch

from pytest_zimage.checkpoints.header import Header, TensorInfo
from pytest_zimage.checkpoints.readahead import READ_THREADS, Piece, ReadAhead, cut, ends_within, unreadable
from pytest_zimage.checkpoints.staging import HostBuffer, Staging
from pytest_zimage.errors import UnsupportedError

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

_TINY_BYTES = 256
"""At most this large are the records of formats, which `read_bytes` is asked for one by one and all over the file."""
_READ_AT_MOST = 1 << 30
"""Linux returns short above 0x7ffff000 bytes, so larger tensors are read in pieces."""


class TensorSource(Protocol):
    """What the loader needs of a reader."""

    read_s: float
    """Seconds the caller waited for the file."""
    to_device_s: float
    """Seconds the caller spent on getting what was read to the device, without what overlapped."""

    def read(self, tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Each of `tensors` once, on the device, in any order."""
        ...

    def read_bytes(self, tensor: TensorInfo) -> bytes:
        """A small tensor's bytes."""
        ...


class TensorReader:
    """One file; a context manager that leaves no thread and no copy behind, wherever its reading stopped.

    A CUDA device is fed by several threads through `staging`, which is made anew where none is passed on from the
    file before. The CPU reads straight into the tensors' own memory, unless it is given a `staging`.

    Raises `CheckpointError` when the file cannot be read or ends early, `UnsupportedError` for a dtype torch lacks.
    """

    def __init__(
        self, header: Header, device: torch.device, staging: Staging | None = None, threads: int = READ_THREADS
    ) -> None:
        self.read_s = 0.0
        self.to_device_s = 0.0
        self._path = header.path
        self._tiny = [tensor for tensor in header.tensors.values() if 0 < tensor.nbytes <= _TINY_BYTES]
        self._device = device
        self._fd = -1
        self._staging = Staging(device) if staging is None and device.type == "cuda" else staging
        self._threads = threads
        self._reading: Generator[tuple[TensorInfo, torch.Tensor], None, None] | None = None

    def __enter__(self) -> TensorReader:
        try:
            self._fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise unreadable(self._path, error) from error
        if hasattr(os, "posix_fadvise"):
            for tensor in self._tiny:
                os.posix_fadvise(self._fd, tensor.begin, tensor.nbytes, os.POSIX_FADV_WILLNEED)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if self._reading is not None:
                self._reading.close()
        finally:
            os.close(self._fd)
            self._fd = -1

    def read(self, tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Each of `tensors` in file order, so that a disk is read forwards."""
        ordered = sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))
        for tensor in ordered:
            if tensor.dtype not in TORCH_DTYPES:
                raise UnsupportedError(
                    f"{self._path}: tensor {tensor.name!r}: torch {torch.__version__} has no type for {tensor.dtype}",
                    mend=f"types that can be read: {', '.join(TORCH_DTYPES)}",
                )
        buffers = self._directly(ordered) if self._staging is None else self._ahead(ordered, self._staging)
        self._reading = self._typed(buffers)
        return self._reading

    def read_bytes(self, tensor: TensorInfo) -> bytes:
        return bytes(self._to_host(tensor).numpy())

    def _typed(
        self, buffers: Generator[tuple[TensorInfo, torch.Tensor], None, None]
    ) -> Generator[tuple[TensorInfo, torch.Tensor], None, None]:
        with contextlib.closing(buffers):
            for tensor, buffer in buffers:
                yield tensor, buffer.view(TORCH_DTYPES[tensor.dtype]).reshape(tensor.shape)

    # ---- with a thread per piece ---------------------------------------------

    def _ahead(
        self, tensors: list[TensorInfo], staging: Staging
    ) -> Generator[tuple[TensorInfo, torch.Tensor], None, None]:
        pieces = cut(tensors, staging.buffer_bytes)
        unfinished: dict[str, torch.Tensor] = {}
        with ReadAhead(self._path, pieces, staging, self._threads) as ahead:
            for index, piece in enumerate(pieces):
                began = time.perf_counter()
                buffer, blocked_s = ahead.take(index)
                taken = time.perf_counter()
                blocked_s = min(blocked_s, taken - began)
                self.read_s += taken - began - blocked_s
                finished = self._send(piece, buffer, unfinished)
                ahead.give_back()
                self.to_device_s += time.perf_counter() - taken + blocked_s
                yield from finished
        began = time.perf_counter()
        staging.wait()
        self.to_device_s += time.perf_counter() - began

    def _send(
        self, piece: Piece, buffer: HostBuffer, unfinished: dict[str, torch.Tensor]
    ) -> list[tuple[TensorInfo, torch.Tensor]]:
        """Copy a piece to the device; the tensors that are whole with it.

        The copies go to the current stream, like all that is done with the tensors, so that nothing must be ordered;
        what the loader computes in between takes a hundredth of their time.
        """
        finished = []
        for part in piece.parts:
            target = unfinished.pop(part.tensor.name, None)
            if target is None:
                target = torch.empty(part.tensor.nbytes, dtype=torch.uint8, device=self._device)
            there = target[part.start : part.start + part.nbytes]
            there.copy_(buffer.data[part.offset : part.offset + part.nbytes], non_blocking=True)
            if part.start + part.nbytes < part.tensor.nbytes:
                unfinished[part.tensor.name] = target
            else:
                finished.append((part.tensor, target))
        buffer.mark()
        return finished

    # ---- with none -------------------------------------------------------------

    def _directly(self, tensors: list[TensorInfo]) -> Generator[tuple[TensorInfo, torch.Tensor], None, None]:
        for tensor in tensors:
            yield tensor, self._to_host(tensor)

    def _to_host(self, tensor: TensorInfo) -> torch.Tensor:
        began = time.perf_counter()
        buffer = torch.empty(tensor.nbytes, dtype=torch.uint8)
        view = memoryview(buffer.numpy().data)
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._fd, [view[done : done + _READ_AT_MOST]], tensor.begin + done)
            except OSError as error:
                raise unreadable(self._path, error) from error
            if count <= 0:
                raise ends_within(self._path, tensor)
            done += count
        self.read_s += time.perf_counter() - began
        return buffer
