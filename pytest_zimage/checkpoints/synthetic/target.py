"""What the writing threads share: the files, the pieces that wait to be written, and where the time went."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pytest_zimage.checkpoints.synthetic.manifest import FileRecord


@dataclass(eq=False, slots=True)
class Target:
    """One file being written."""

    path: Path
    size: int
    """Bytes it will have; the counts below are bytes too, where nothing else is said."""
    fd: int
    written: int = 0
    pending: int = 0
    """Pieces handed to the threads and not written yet."""
    unflushed: int = 0
    flushing: bool = False
    """An early flush is under way; `flushed` is about the last one."""
    complete: bool = False
    """Nothing more will be put into it."""
    record: FileRecord | None = None
    flushed: bool = False


@dataclass(slots=True)
class Stages:
    """Seconds spent: the calling thread's first, then sums over the other threads."""

    blocked: float = 0.0
    """No buffer was free: the disk is behind."""
    finishing: float = 0.0
    """Everything was put, and files were still being written, flushed or hashed."""

    device: float = 0.0
    """What was left to wait of a tensor's making and copy."""
    write: float = 0.0
    flush: float = 0.0
    hash: float = 0.0


@dataclass(frozen=True, slots=True)
class WaitingPiece:
    """Bytes in a host buffer, and where they belong."""

    target: Target
    offset: int
    buffer: int
    """Its number in the pool."""
    nbytes: int
