"""The page cache of the kernel: emptying it of a variant's files, and looking whether that worked.

`posix_fadvise(POSIX_FADV_DONTNEED)` drops clean pages that nobody maps, without privileges and for these files only;
`mincore` says which pages are left. Linux only: elsewhere the state is unknown and says so.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

from msgspec import Struct

EMPTY_BELOW = 0.01
"""Share of resident pages below which a cache counts as emptied."""
_WINDOW_BYTES = 1 << 30
_PROT_READ = 1
_MAP_SHARED = 1
_MAP_FAILED = ctypes.c_void_p(-1).value


class CacheState(Struct, frozen=True, kw_only=True):
    """What is known of the files' pages just before a load."""

    residency: float | None
    """Share of all pages that are in memory, over all files together; None where it cannot be known."""
    emptied: bool
    """True only if the residency is known and below `EMPTY_BELOW`."""
    notes: tuple[str, ...] = ()


def empty(paths: Iterable[str | os.PathLike[str]]) -> CacheState:
    """Drops the files' pages from the cache, and reports what is left of them.

    Written pages are synced first, because only clean ones can be dropped. Never raises: what fails becomes a note.
    """
    files = [Path(path) for path in paths]
    notes: list[str] = []
    if not hasattr(os, "posix_fadvise"):
        return CacheState(residency=None, emptied=False, notes=("this system cannot empty its page cache",))
    for path in files:
        try:
            _drop(path, notes)
        except OSError as error:
            notes.append(f"{path}: cannot be dropped from the page cache: {error.strerror}")
    left = residency(files)
    notes += left.notes
    if left.residency is not None and not left.emptied:
        notes.append(
            f"{left.residency:.1%} of the files is still in the page cache: another process maps them, or their "
            "file system lives in memory (tmpfs)"
        )
    return CacheState(residency=left.residency, emptied=left.emptied, notes=tuple(notes))


def _drop(path: Path, notes: list[str]) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            os.fsync(descriptor)
        except OSError as error:
            notes.append(f"{path}: cannot be synced ({error.strerror}), pages not yet written stay")
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def residency(paths: Iterable[str | os.PathLike[str]]) -> CacheState:
    """Share of the files' pages that are in memory, weighted by pages, without bringing any in. Never raises."""
    resident = pages = 0
    try:
        libc = _libc()
        for path in map(Path, paths):
            if not _may_ask(path):
                return _unknown(f"{path}: the kernel tells its residency only to its owner or who may write it")
            there, total = _count(libc, path)
            resident += there
            pages += total
    except OSError as error:
        return _unknown(f"{error.filename or 'mincore'}: residency cannot be read: {error.strerror}")
    except (AttributeError, ValueError) as error:
        return _unknown(f"this system has no mincore: {error}")
    if not pages:
        return _unknown("the files hold no pages at all")
    share = resident / pages
    return CacheState(residency=share, emptied=share < EMPTY_BELOW)


def _unknown(why: str) -> CacheState:
    return CacheState(residency=None, emptied=False, notes=(why,))


def _may_ask(path: Path) -> bool:
    """Since Linux 5.2 mincore tells everyone else that all pages are resident (mincore(2), NOTES)."""
    return path.stat().st_uid == os.geteuid() or os.access(path, os.W_OK)


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return libc


def _count(libc: ctypes.CDLL, path: Path) -> tuple[int, int]:
    """(resident, all) pages of one file. The mapping is never touched, so it faults nothing in."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        resident = pages = 0
        for offset in range(0, size, _WINDOW_BYTES):
            length = min(_WINDOW_BYTES, size - offset)
            seen = _resident_flags(libc, path, descriptor, offset, length)
            pages += len(seen)
            # The lowest bit is the answer, the others are undefined: mincore(2).
            resident += len(seen) - seen.translate(_LOWEST_BIT).count(0)
        return resident, pages
    finally:
        os.close(descriptor)


_LOWEST_BIT = bytes(value & 1 for value in range(256))


def _resident_flags(libc: ctypes.CDLL, path: Path, descriptor: int, offset: int, length: int) -> bytes:
    count = -(-length // mmap.PAGESIZE)
    flags = ctypes.create_string_buffer(count)
    address = libc.mmap(None, length, _PROT_READ, _MAP_SHARED, descriptor, offset)
    if address is None or address == _MAP_FAILED:
        raise _last_error(path)
    try:
        if libc.mincore(address, length, flags):
            raise _last_error(path)
    finally:
        libc.munmap(address, length)
    return flags.raw


def _last_error(path: Path) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number), str(path))
