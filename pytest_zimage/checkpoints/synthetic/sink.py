"""Writes several files at once from tensors on any device, with threads that copy, write, flush and hash side by side.

    tensor --copy--> host buffer of a bounded pool --pwrite--> file --fsync, sha256--> FileRecord

The calling thread only makes tensors and issues copies. What goes wrong in a thread is raised by the next call.
"""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType

import torch

from pytest_zimage.checkpoints.staging import HostBuffer, Staging
from pytest_zimage.checkpoints.synthetic.manifest import FileRecord
from pytest_zimage.checkpoints.synthetic.target import Stages, Target, WaitingPiece
from pytest_zimage.errors import CheckpointError

_THREADS = 8
_BACKGROUND = 12
"""A flush and a hash for each of the six files at once."""
_BUFFERS, _BUFFER_BYTES = 32, 16 << 20
_FLUSH_BYTES = 256 << 20
"""Written to a file before a flush of it is started, since the kernel alone would leave the disk idle for seconds."""
_HASH_BYTES = 4 << 20


class FileSink:
    """The threads and their buffers; a context manager that leaves none of them behind, nor open files.

    `open` a file, `put` its tensors, `close` it; `finished` gives its record once it is on the disk. All of them raise
    `CheckpointError`, naming the file and the amounts, once any file could not be written.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        threads: int = _THREADS,
        buffers: int = _BUFFERS,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        self.stages = Stages()
        self._staging = Staging(device, count=buffers, buffer_bytes=buffer_bytes)
        self._free: SimpleQueue[int] = SimpleQueue()
        for index in range(buffers):
            self._free.put(index)
        self._jobs: SimpleQueue[WaitingPiece | None] = SimpleQueue()
        self._threads = [threading.Thread(target=self._work, name=f"write-{n}", daemon=True) for n in range(threads)]
        self._background = ThreadPoolExecutor(_BACKGROUND, thread_name_prefix="flush")
        self._done: SimpleQueue[Target] = SimpleQueue()
        self._lock = threading.Lock()
        self._targets: list[Target] = []
        self._failure: Exception | None = None
        self._stopped = False

    def __enter__(self) -> FileSink:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped = True
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()
        self._background.shutdown(cancel_futures=True)
        for target in self._targets:
            os.close(target.fd)

    @property
    def written(self) -> int:
        """Bytes written so far, in all files."""
        return sum(target.written for target in self._targets)

    def open(self, path: Path, size: int, start: bytes) -> Target:
        """A new file of `size` bytes that begins with `start`; what is never put reads as zeros."""
        path.parent.mkdir(parents=True, exist_ok=True)
        target = Target(path, size, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666))
        self._targets.append(target)
        with self._failing(target):
            os.ftruncate(target.fd, size)
            _write_all(target.fd, memoryview(start), 0)
        target.written = len(start)
        self._raise()
        return target

    def put(self, target: Target, offset: int, tensor: torch.Tensor) -> None:
        """Have the bytes of `tensor`, on whichever device, written at `offset`; waits for free buffers only."""
        data = tensor.contiguous().reshape(-1).view(torch.uint8)
        size = self._staging.buffer_bytes
        for start in range(0, data.numel(), size):
            began = time.perf_counter()
            index = self._free.get()
            self.stages.blocked += time.perf_counter() - began
            self._raise()
            part = data[start : start + size]
            buffer = self._staging[index]
            buffer.data[: part.numel()].copy_(part, non_blocking=True)
            buffer.mark()
            with self._lock:
                target.pending += 1
            self._jobs.put(WaitingPiece(target, offset + start, index, part.numel()))

    def close(self, target: Target) -> None:
        """Say that nothing more will be put into `target`."""
        with self._lock:
            target.complete = True
            self._after_writing(target)
        self._raise()

    def finished(self, timeout_s: float = 0.0) -> tuple[Target, FileRecord] | None:
        """A closed file that is on the disk and hashed, each of them once; None if none gets there in `timeout_s`."""
        began = time.perf_counter()
        target = None
        with suppress(Empty):
            target = self._done.get(block=timeout_s > 0, timeout=timeout_s)
        self.stages.finishing += time.perf_counter() - began
        self._raise()
        return None if target is None or target.record is None else (target, target.record)

    # ---- threads ---------------------------------------------------------------

    def _work(self) -> None:
        while (piece := self._jobs.get()) is not None:
            buffer = self._staging[piece.buffer]
            with self._failing(piece.target):
                if self._failure is None and not self._stopped:
                    self._write(piece, buffer)
            self._free.put(piece.buffer)

    def _write(self, piece: WaitingPiece, buffer: HostBuffer) -> None:
        began = time.perf_counter()
        buffer.wait()
        copied = time.perf_counter()
        _write_all(piece.target.fd, buffer.view[: piece.nbytes], piece.offset)
        ended = time.perf_counter()
        target = piece.target
        with self._lock:
            self.stages.device += copied - began
            self.stages.write += ended - copied
            target.written += piece.nbytes
            target.unflushed += piece.nbytes
            target.pending -= 1
            self._after_writing(target)

    def _after_writing(self, target: Target) -> None:
        if self._stopped:
            return
        if target.complete and not target.pending:
            self._background.submit(self._hash, target)
            self._background.submit(self._flush, target, last=True)
        elif target.unflushed >= _FLUSH_BYTES and not target.flushing:
            target.flushing = True
            target.unflushed = 0
            self._background.submit(self._flush, target)

    def _flush(self, target: Target, last: bool = False) -> None:
        began = time.perf_counter()
        with self._failing(target):
            os.fsync(target.fd)
        with self._lock:
            self.stages.flush += time.perf_counter() - began
            if last:
                target.flushed = True
                self._after_finishing(target)
            else:
                target.flushing = False

    def _hash(self, target: Target) -> None:
        began = time.perf_counter()
        digest, offset, buffer = hashlib.sha256(), 0, bytearray(_HASH_BYTES)
        with self._failing(target):
            while not self._stopped and (count := os.preadv(target.fd, [buffer], offset)):
                digest.update(memoryview(buffer)[:count])
                offset += count
        with self._lock:
            self.stages.hash += time.perf_counter() - began
            target.record = FileRecord(offset, digest.hexdigest())
            self._after_finishing(target)

    def _after_finishing(self, target: Target) -> None:
        if target.record is not None and target.flushed:
            self._done.put(target)

    # ---- failures --------------------------------------------------------------

    @contextmanager
    def _failing(self, target: Target) -> Iterator[None]:
        """Keep the first failure for the calling thread, since a thread that died could not free its buffer."""
        try:
            yield
        except Exception as error:
            if isinstance(error, OSError):
                amounts = f"{target.written / 1e9:.2f} of {target.size / 1e9:.2f} GB"
                error = CheckpointError(
                    f"{target.path}: cannot be written after {amounts}: {error.strerror}",
                    mend="free some space, or put the cache on another disk",
                )
            with self._lock:
                self._failure = self._failure or error

    def _raise(self) -> None:
        if self._failure is not None:
            raise self._failure


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
