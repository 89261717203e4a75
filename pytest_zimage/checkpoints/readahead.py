"""Reads pieces of one file ahead of their use: several threads, a ring of host buffers, pieces handed out in order.

One thread alone waits for a disk that could serve more, and copies out of the page cache slower than the bus to a
device takes; os.preadv lets go of the interpreter's lock, so that threads are enough.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pytest_zimage.checkpoints.header import TensorInfo
from pytest_zimage.checkpoints.staging import HostBuffer, Staging
from pytest_zimage.errors import CheckpointError

READ_THREADS = 8
_GAP_BYTES = 256 << 10
"""Unwanted bytes that are read along, since skipping them would cost more."""


@dataclass(frozen=True, slots=True)
class Part:
    """Bytes of one tensor within a piece."""

    tensor: TensorInfo
    start: int
    """From which byte of the tensor."""
    offset: int
    """From which byte of the piece."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class Piece:
    """One stretch of the file, read at once: small tensors together, large ones in several pieces."""

    begin: int
    end: int
    parts: tuple[Part, ...]


def cut(tensors: Iterable[TensorInfo], piece_bytes: int) -> list[Piece]:
    """Pieces of at most `piece_bytes` that hold all of `tensors`, which must be in file order."""
    pieces: list[Piece] = []
    parts: list[Part] = []
    begin = end = 0
    for tensor in tensors:
        start = 0
        while True:
            at = tensor.begin + start
            if parts and (at - end > _GAP_BYTES or at - begin >= piece_bytes):
                pieces.append(Piece(begin, end, tuple(parts)))
                parts = []
            if not parts:
                begin = at
            nbytes = min(tensor.nbytes - start, begin + piece_bytes - at)
            parts.append(Part(tensor, start, at - begin, nbytes))
            start += nbytes
            end = at + nbytes
            if start >= tensor.nbytes:
                break
    if parts:
        pieces.append(Piece(begin, end, tuple(parts)))
    return pieces


class ReadAhead:
    """The threads that fill the ring; a context manager that leaves none of them behind.

    For each piece in turn: `take` its buffer, issue what copies from it, `mark` the buffer, and `give_back`. Piece
    `i` lies in buffer `i % staging.count`, so a reader never runs further ahead than the ring is long.
    """

    def __init__(self, path: Path, pieces: Sequence[Piece], staging: Staging, threads: int = READ_THREADS) -> None:
        self._path = path
        self._pieces = pieces
        self._staging = staging
        self._changed = threading.Condition()
        self._claimed = 0
        self._given_back = 0
        self._blocked_s: dict[int, float] = {}
        """By piece that was read and not taken yet."""
        self._failure: Exception | None = None
        self._stopped = False
        self._threads = [
            threading.Thread(target=self._work, name=f"read-{number}", daemon=True)
            for number in range(min(threads, len(pieces)))
        ]

    def __enter__(self) -> ReadAhead:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join()

    def take(self, index: int) -> tuple[HostBuffer, float]:
        """The buffer that holds piece `index`, once it was read, and the seconds its reading waited for the device.

        Raises what the reader of this piece, or of another one still missing, came upon: `CheckpointError` for a file
        that ends early or cannot be read.
        """
        with self._changed:
            self._changed.wait_for(lambda: index in self._blocked_s or self._failure is not None)
            blocked_s = self._blocked_s.pop(index, None)
        if blocked_s is None:
            assert self._failure is not None
            raise self._failure
        return self._staging[index % self._staging.count], blocked_s

    def give_back(self) -> None:
        """The buffer taken last may be overwritten once the copies before its mark are done."""
        with self._changed:
            self._given_back += 1
            self._changed.notify_all()

    # ---- threads -----------------------------------------------------------

    def _work(self) -> None:
        try:
            # Each thread has a descriptor of its own, since the kernel keeps one read-ahead window for each.
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                while (index := self._claim()) is not None:
                    began = time.perf_counter()
                    buffer = self._staging[index % self._staging.count]
                    buffer.wait()
                    blocked_s = time.perf_counter() - began
                    self._fill(fd, self._pieces[index], buffer.view)
                    with self._changed:
                        self._blocked_s[index] = blocked_s
                        self._changed.notify_all()
            finally:
                os.close(fd)
        except Exception as error:
            with self._changed:
                reason = unreadable(self._path, error) if isinstance(error, OSError) else error
                self._failure = self._failure or reason
                self._stopped = True
                self._changed.notify_all()

    def _claim(self) -> int | None:
        """The next piece, once its buffer is free; None when there is nothing more to read.

        Pieces are claimed in order, and the first one not given back always has its buffer, so this never deadlocks.
        """
        with self._changed:
            if self._stopped or self._claimed == len(self._pieces):
                return None
            index = self._claimed
            self._claimed += 1
            self._changed.wait_for(lambda: self._stopped or index < self._given_back + self._staging.count)
            return None if self._stopped else index

    def _fill(self, fd: int, piece: Piece, view: memoryview) -> None:
        done, size = 0, piece.end - piece.begin
        while done < size:
            count = os.preadv(fd, [view[done:size]], piece.begin + done)
            if count <= 0:
                there = [part.tensor for part in piece.parts if part.offset + part.nbytes > done]
                raise ends_within(self._path, there[0])
            done += count


def ends_within(path: Path, tensor: TensorInfo) -> CheckpointError:
    return CheckpointError(f"{path}: the file ends within tensor {tensor.name!r}", mend="download the file again")


def unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read: {error.strerror}", mend="check the disk and the file's permissions"
    )
