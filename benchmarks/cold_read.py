"""Does the reader reach what the disk gives? The same file by plain buffered reading and by `TensorReader`, in turns.

    python benchmarks/cold_read.py [--file PATH] [--device cuda:0] [--times 5]

Before each reading the file is dropped from the page cache. Plain is one thread and one buffer of 16 MiB; the reader
puts every tensor onto the device and keeps it, as a load does. Exits with 1 if the reader's median speed is below 0.9
of plain reading's, and with 2 if the cache could not be emptied, since then nothing cold was compared.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from pytest_zimage.checkpoints.header import read_header
from pytest_zimage.checkpoints.readahead import READ_THREADS
from pytest_zimage.checkpoints.reader import TensorReader
from pytest_zimage.errors import ZImageError
from pytest_zimage.probes import pagecache

LIMIT = 0.9
PLAIN_BYTES = 16 << 20


def plain_s(path: Path) -> float:
    buffer = bytearray(PLAIN_BYTES)
    began = time.perf_counter()
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
    return time.perf_counter() - began


def reader_s(path: Path, device: torch.device, threads: int) -> float:
    """From the header to the last byte on the device."""
    began = time.perf_counter()
    header = read_header(path)
    with TensorReader(header, device, threads=threads) as reader:
        held = list(reader.read(header.tensors.values()))
    seconds = time.perf_counter() - began
    assert sum(tensor.nbytes for _, tensor in held) == path.stat().st_size - header.header_bytes
    return seconds


def cold(read: Callable[[], float], path: Path) -> tuple[float, pagecache.CacheState]:
    state = pagecache.empty([path])
    return read(), state


def said(path: Path, seconds: float, state: pagecache.CacheState) -> str:
    resident = "unknown" if state.residency is None else f"{state.residency:.1%}"
    return f"{path.stat().st_size / 1e9 / seconds:6.2f} GB/s in {seconds:6.2f} s (resident before: {resident})"


def compare(path: Path, device: torch.device, threads: int, times: int) -> int:
    torch.empty(1, device=device)
    sides = {"plain": lambda: plain_s(path), "reader": lambda: reader_s(path, device, threads)}
    print(f"{path}: {path.stat().st_size / 1e9:.2f} GB to {device}, {threads} threads", flush=True)
    ratios: list[float] = []
    notes: set[str] = set()
    for number in range(1, times + 1):
        seconds = {}
        # Every other time the other one first, so that a drift of the disk hits both sides.
        for side in sorted(sides, reverse=number % 2 == 0):
            seconds[side], state = cold(sides[side], path)
            print(f"{number:3} {side:6}: {said(path, seconds[side], state)}", flush=True)
            if not state.emptied:
                notes.update(state.notes or ("its state is unknown",))
        ratios.append(seconds["plain"] / seconds["reader"])
    ratio = statistics.median(ratios)
    print(
        f"reader / plain: {ratio:.2f} (median of {', '.join(f'{one:.2f}' for one in ratios)}); at least {LIMIT} wanted"
    )
    if notes:
        print(
            "the page cache could not be emptied, so this says nothing about a cold load: " + "; ".join(sorted(notes))
        )
        return 2
    return int(ratio < LIMIT)


def write_file(folder: Path, nbytes: int) -> Path:
    """A file as models have them: a few large tensors, and many small ones among them."""
    generator = torch.Generator().manual_seed(0)
    large = 48 << 20
    tensors = {}
    for number in range(max(1, nbytes // large)):
        tensors[f"{number:03}.weight"] = torch.randint(0, 256, (large,), dtype=torch.uint8, generator=generator)
        for norm in range(4):
            tensors[f"{number:03}.norm{norm}"] = torch.rand(2560, generator=generator).to(torch.bfloat16)
    path = folder / "cold_read.safetensors"
    save_file(tensors, path)
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, help="a safetensors file; default: one of random bytes, written for this")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the file that is written")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", type=int, default=READ_THREADS)
    parser.add_argument("--times", type=int, default=5)
    options = parser.parse_args()
    try:
        if options.file is not None:
            return compare(options.file, options.device, options.threads, options.times)
        with tempfile.TemporaryDirectory() as folder:
            path = write_file(Path(folder), int(options.gigabytes * 1e9))
            return compare(path, options.device, options.threads, options.times)
    except (OSError, ZImageError) as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
