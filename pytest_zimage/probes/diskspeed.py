"""How fast the disk gives what lies on it: some of a large file by plain buffered reading, with an empty page cache.

Disks of one kind of machine differ, and a rented one differs from hour to hour: those of H200s gave the same files at
1.3 to 2.9 GB/s. A load is mostly reading, so its time says little of the software unless the disk's speed is known.
A reading is short, for a load waits for it, and scatters: by 9 % over twelve loads on one H200, whose own rates
differed by 5 %; on another 3 of 12 readings were a third to a half below the other nine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pytest_zimage.probes import pagecache

SAMPLE_BYTES = 512 << 20
_STRETCHES = 8
"""Spread over the file and read side by side, for one reader alone waits for a disk that could serve more."""
_BUFFER_BYTES = 8 << 20


def read_gb_s(paths: Iterable[Path], sample_bytes: int = SAMPLE_BYTES) -> float | None:
    """1e9 bytes a second, read from the largest of `paths`, which is dropped from the page cache before and after.

    None where that is too small to tell, cannot be read or stays in the page cache, or this system has no `preadv`.
    """
    path = max(paths, key=lambda path: path.stat().st_size, default=None)
    if path is None or path.stat().st_size < sample_bytes or not hasattr(os, "preadv"):
        return None
    if not pagecache.empty([path]).emptied:
        return None
    length = sample_bytes // _STRETCHES
    step = (path.stat().st_size - length) // (_STRETCHES - 1)
    try:
        with ThreadPoolExecutor(_STRETCHES) as pool:
            began = time.perf_counter()
            done = sum(pool.map(lambda number: _read(path, number * step, length), range(_STRETCHES)))
            seconds = time.perf_counter() - began
    except OSError:
        return None
    pagecache.empty([path])
    return done / seconds / 1e9 if done == length * _STRETCHES else None


def _read(path: Path, begin: int, length: int) -> int:
    """Bytes read of `length`."""
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, length)))
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        done = 0
        while done < length and (count := os.preadv(descriptor, [buffer[: length - done]], begin + done)):
            done += count
        return done
    finally:
        os.close(descriptor)
