"""The reader with threads, on the CPU: the same bytes whatever the sizes, and nothing left behind when it stops."""

from __future__ import annotations

import dataclasses
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pytest_zimage.checkpoints import readahead
from pytest_zimage.checkpoints.header import TensorInfo, read_header
from pytest_zimage.checkpoints.readahead import cut
from pytest_zimage.checkpoints.reader import TensorReader
from pytest_zimage.checkpoints.staging import Staging
from pytest_zimage.errors import CheckpointError, UnsupportedError

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("nothing_left")


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """Tensors from none to 300 kB, of several types, none of them constant."""
    rng = random.Random(1)
    tensors = {}
    for number in range(120):
        count = rng.choice((0, 1, 3, 50, 1000, 70_000))
        dtype = rng.choice((torch.float32, torch.bfloat16, torch.uint8, torch.float8_e4m3fn))
        tensors[f"t{number}"] = (torch.arange(count) * (number + 3) % 251).to(dtype)
    tensors["scalar"] = torch.tensor(4.5)
    tensors["matrix"] = torch.arange(60_000, dtype=torch.int32).reshape(300, 200)
    file = tmp_path_factory.mktemp("reader") / "model.safetensors"
    save_file(tensors, file)
    return file


def raw(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def staged(path: Path, *, count: int = 4, buffer_bytes: int = 4096, threads: int = 3) -> TensorReader:
    """A reader that goes through the ring on the CPU."""
    return TensorReader(read_header(path), CPU, Staging(CPU, count=count, buffer_bytes=buffer_bytes), threads)


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        assert raw(found[name]) == raw(tensor), name


@pytest.mark.parametrize(
    ("count", "buffer_bytes", "threads"),
    [(1, 1000, 1), (1, 4096, 8), (2, 999, 3), (16, 65536, 8), (4, 8 << 20, 8), (3, 17, 2)],
)
def test_ring_gives_the_bytes_of_the_file(path, count, buffer_bytes, threads) -> None:
    if buffer_bytes == 17:
        wanted = [tensor for tensor in read_header(path).tensors.values() if tensor.nbytes < 3000]
    else:
        wanted = list(read_header(path).tensors.values())
    with staged(path, count=count, buffer_bytes=buffer_bytes, threads=threads) as reader:
        order, found = [], {}
        for info, tensor in reader.read(wanted[::-1]):
            order.append(info)
            found[info.name] = tensor
        # A single piece may be read while its buffer is still being made, and then nothing waits for the reading.
        assert reader.read_s >= 0
        assert reader.to_device_s > 0
    names = {tensor.name for tensor in wanted}
    assert_same(found, {name: tensor for name, tensor in load_file(path).items() if name in names})
    assert order == sorted(order, key=lambda info: (info.begin, info.end)), "in file order"


def test_directly_on_the_cpu(path) -> None:
    with TensorReader(read_header(path), CPU) as reader:
        found = {info.name: tensor for info, tensor in reader.read(read_header(path).tensors.values())}
        assert reader.read_s > 0
        assert reader.to_device_s == 0
    assert_same(found, load_file(path))


def test_one_staging_serves_file_after_file(path, tmp_path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"x": torch.arange(5000)}, other)
    staging = Staging(CPU, count=3, buffer_bytes=4096)
    for file in (path, other, path):
        with TensorReader(read_header(file), CPU, staging) as reader:
            found = {info.name: tensor for info, tensor in reader.read(read_header(file).tensors.values())}
        assert_same(found, load_file(file))


def test_nothing_wanted(path) -> None:
    with staged(path) as reader:
        assert list(reader.read([])) == []


def infos(*spans: tuple[int, int]) -> list[TensorInfo]:
    return [TensorInfo(f"t{i}", "U8", (end - begin,), begin, end) for i, (begin, end) in enumerate(spans)]


def test_small_tensors_are_read_together_and_large_ones_in_pieces() -> None:
    pieces = cut(infos((100, 110), (110, 130), (130, 130), (130, 330)), 100)
    assert [(piece.begin, piece.end) for piece in pieces] == [(100, 200), (200, 300), (300, 330)]
    assert [[(part.tensor.name, part.start, part.offset, part.nbytes) for part in piece.parts] for piece in pieces] == [
        [("t0", 0, 0, 10), ("t1", 0, 10, 20), ("t2", 0, 30, 0), ("t3", 0, 30, 70)],
        [("t3", 70, 0, 100)],
        [("t3", 170, 0, 30)],
    ]


def test_gaps_between_wanted_tensors(monkeypatch) -> None:
    monkeypatch.setattr(readahead, "_GAP_BYTES", 50)
    pieces = cut(infos((0, 10), (60, 70), (121, 130)), 1000)
    assert [(piece.begin, piece.end) for piece in pieces] == [(0, 70), (121, 130)], "a small gap is read along"
    assert [(part.offset, part.nbytes) for part in pieces[0].parts] == [(0, 10), (60, 10)]


def test_a_gap_does_not_outgrow_the_buffer() -> None:
    pieces = cut(infos((0, 90), (150, 160)), 100)
    assert [(piece.begin, piece.end) for piece in pieces] == [(0, 90), (150, 160)]


@pytest.mark.parametrize("threads", [1, 8])
def test_file_that_ends_early(path, tmp_path, threads) -> None:
    short = tmp_path / "short.safetensors"
    header = read_header(path)
    short.write_bytes(path.read_bytes()[:-5000])
    stale = dataclasses.replace(header, path=short)
    staging = Staging(CPU, count=2, buffer_bytes=4096)
    cut_off = {tensor.name for tensor in header.tensors.values() if tensor.end > header.file_bytes - 5000}
    reader = TensorReader(stale, CPU, staging, threads)
    with reader, pytest.raises(CheckpointError, match=r"short\.safetensors: the file ends within") as caught:
        list(reader.read(header.tensors.values()))
    assert caught.value.mend
    assert caught.value.message.split("'")[1] in cut_off


def test_file_that_is_cut_short_while_it_is_read(path, tmp_path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    with staged(copy, count=2, buffer_bytes=4096) as reader:
        reading = reader.read(read_header(copy).tensors.values())
        next(reading)
        os.truncate(copy, 20_000)
        with pytest.raises(CheckpointError, match="ends within"):
            list(reading)


def test_file_that_vanishes_before_its_threads_open_it(path, tmp_path) -> None:
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(path.read_bytes())
    with staged(copy) as reader:
        copy.unlink()
        with pytest.raises(CheckpointError, match=r"copy\.safetensors: cannot be read: No such"):
            list(reader.read(read_header(path).tensors.values()))


def test_disk_that_fails(path, monkeypatch) -> None:
    real = os.preadv

    def preadv(fd, buffers, offset):
        if offset > 100_000:
            raise OSError(5, "Input/output error")
        return real(fd, buffers, offset)

    monkeypatch.setattr(readahead.os, "preadv", preadv)
    header = read_header(path)
    for reader in (staged(path), TensorReader(header, CPU)):
        with reader, pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
            list(reader.read(header.tensors.values()))


def test_short_reads_are_continued(path, monkeypatch) -> None:
    real = os.preadv
    monkeypatch.setattr(readahead.os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:100]], offset))
    wanted = [tensor for tensor in read_header(path).tensors.values() if tensor.nbytes < 5000]
    with staged(path) as reader:
        found = {info.name: tensor for info, tensor in reader.read(wanted)}
    assert_same(found, {name: tensor for name, tensor in load_file(path).items() if name in found})
    assert len(found) == len(wanted)


@pytest.mark.parametrize("taken", [0, 1, 30])
def test_consumer_that_stops_early(path, taken) -> None:
    with staged(path, count=2, buffer_bytes=1000) as reader:
        reading = reader.read(read_header(path).tensors.values())
        for _ in range(taken):
            next(reading)
    with pytest.raises(StopIteration):
        next(reading)


def test_consumer_that_fails(path) -> None:
    def consume():
        with staged(path, count=1, buffer_bytes=1000) as reader:
            for _ in reader.read(read_header(path).tensors.values()):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        consume()


def test_readers_never_overwrite_what_is_still_in_use(path) -> None:
    """A buffer is filled again only once it was given back and its copies are done."""
    events = []

    class Watched(Staging):
        def __getitem__(self, index):
            buffer = super().__getitem__(index)
            buffer.mark = lambda: events.append(("copied", index))
            buffer.wait = lambda: events.append(("wait", index))
            return buffer

    header = read_header(path)
    pieces = cut(sorted(header.tensors.values(), key=lambda tensor: tensor.begin), 4096)
    with TensorReader(header, CPU, Watched(CPU, count=3, buffer_bytes=4096), 4) as reader:
        list(reader.read(header.tensors.values()))
    for index in range(3):
        kinds = [kind for kind, number in events if number == index]
        uses = len(range(index, len(pieces), 3))
        assert kinds == ["wait", "copied"] * uses + ["wait"], "and at the end all copies are waited for"


def test_dtype_that_torch_lacks(path) -> None:
    with staged(path) as reader, pytest.raises(UnsupportedError, match="no type for F4"):
        list(reader.read([TensorInfo("odd", "F4", (2,), 0, 1)]))
