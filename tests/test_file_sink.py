"""Writing several files at once: every byte in its place within bounded memory, and nothing left when it fails."""

from __future__ import annotations

import errno
import hashlib
import os
import threading

import pytest
import torch

from pytest_zimage.checkpoints.synthetic import sink as module
from pytest_zimage.checkpoints.synthetic.manifest import record_file
from pytest_zimage.checkpoints.synthetic.sink import FileSink
from pytest_zimage.errors import CheckpointError

CPU = torch.device("cpu")

pytestmark = pytest.mark.usefixtures("nothing_left")


def small(**changed) -> FileSink:
    return FileSink(CPU, **{"threads": 3, "buffers": 2, "buffer_bytes": 1000, **changed})


def all_finished(sink, count):
    found = {}
    while len(found) < count:
        done = sink.finished(1.0)
        if done is not None:
            found[done[0].path.name] = done[1]
    return found


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("buffers", [1, 5])
def test_several_files_in_any_order(tmp_path, monkeypatch, threads, buffers):
    monkeypatch.setattr(module, "_FLUSH_BYTES", 3000)
    generator = torch.Generator().manual_seed(1)
    blocks = [torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator) for size in (1, 999, 1000, 7777)]
    expected = {}
    with small(threads=threads, buffers=buffers) as sink:
        for number in range(3):
            name, gap = f"f{number}", 50 * number
            order = blocks[number:] + blocks[:number]
            size = 8 + gap + sum(block.numel() for block in order)
            target = sink.open(tmp_path / "deep" / name, size, b"headers!")
            offset = size
            for block in reversed(order):
                offset -= block.numel()
                sink.put(target, offset, block)
            sink.close(target)
            expected[name] = b"headers!" + bytes(gap) + b"".join(bytes(block.numpy()) for block in order)
        found = all_finished(sink, 3)
        assert sink.written == sum(map(len, expected.values())) - 50 - 100, "gaps are not written"
        assert sink.finished() is None, "each file once"
    for name, content in expected.items():
        path = tmp_path / "deep" / name
        assert path.read_bytes() == content
        assert found[name] == record_file(path)
        assert found[name].sha256 == hashlib.sha256(content).hexdigest()


def test_types_scalars_and_views(tmp_path):
    tensors = [
        torch.tensor(1.5),
        torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
        torch.arange(4.0).to(torch.float8_e4m3fn),
        torch.arange(5.0).to(torch.bfloat16),
    ]
    size = sum(tensor.nbytes for tensor in tensors)
    with small() as sink:
        target = sink.open(tmp_path / "f", size, b"")
        offset = 0
        for tensor in tensors:
            sink.put(target, offset, tensor)
            offset += tensor.nbytes
        sink.close(target)
        all_finished(sink, 1)
    expected = b"".join(bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()) for tensor in tensors)
    assert (tmp_path / "f").read_bytes() == expected


def test_file_without_tensors(tmp_path):
    with small() as sink:
        sink.close(sink.open(tmp_path / "f", 100, b"start"))
        assert all_finished(sink, 1)["f"].bytes == 100
    assert (tmp_path / "f").read_bytes() == b"start" + bytes(95)


def test_memory_is_bounded_when_the_disk_is_slow(tmp_path, monkeypatch):
    """The calling thread waits once all buffers are full, and no buffer is filled again before it is written."""
    blocked, let_go, real = threading.Event(), threading.Event(), module._write_all
    used = []

    def write_all(fd, view, offset):
        blocked.set()
        assert let_go.wait(30)
        real(fd, view, offset)

    class Watched(module.Staging):
        def __getitem__(self, index):
            if threading.current_thread() is producer:
                used.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr(module, "Staging", Watched)
    data = (torch.arange(10_000) % 251).to(torch.uint8)
    with small(threads=1) as sink:
        target = sink.open(tmp_path / "f", 10_000, b"")
        monkeypatch.setattr(module, "_write_all", write_all)
        producer = threading.Thread(target=sink.put, args=(target, 0, data))
        producer.start()
        assert blocked.wait(30)
        assert set(used) <= {0, 1}
        assert len(used) <= 2
        let_go.set()
        producer.join(30)
        sink.close(target)
        all_finished(sink, 1)
        assert sink.stages.blocked > 0
    assert len(used) == 10
    assert (tmp_path / "f").read_bytes() == bytes(data.numpy())


def test_early_flush_that_outlasts_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FLUSH_BYTES", 1000)
    early_began, last_is_done, calls, real = threading.Event(), threading.Event(), [], os.fsync

    def fsync(fd):
        calls.append(fd)
        if len(calls) == 1:
            early_began.set()
            assert last_is_done.wait(30)
            return
        real(fd)
        last_is_done.set()

    monkeypatch.setattr(module.os, "fsync", fsync)
    with small() as sink:
        target = sink.open(tmp_path / "f", 1500, b"")
        sink.put(target, 0, torch.ones(1500, dtype=torch.uint8))
        assert early_began.wait(30)
        sink.close(target)
        assert all_finished(sink, 1)["f"].bytes == 1500
    assert len(calls) == 2


def test_early_flush_is_not_taken_for_the_last_one(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_FLUSH_BYTES", 1000)
    early, last, let_go, real = threading.Event(), threading.Event(), threading.Event(), os.fsync

    def fsync(fd):
        if early.is_set():
            last.set()
            assert let_go.wait(30)
        real(fd)
        early.set()

    monkeypatch.setattr(module.os, "fsync", fsync)
    with small() as sink:
        target = sink.open(tmp_path / "f", 1500, b"")
        sink.put(target, 0, torch.ones(1500, dtype=torch.uint8))
        assert early.wait(30)
        sink.close(target)
        assert last.wait(30)
        assert sink.finished(0.05) is None
        let_go.set()
        assert all_finished(sink, 1)["f"].bytes == 1500


def test_short_writes_are_continued(tmp_path, monkeypatch):
    real = os.pwrite
    monkeypatch.setattr(module.os, "pwrite", lambda fd, data, offset: real(fd, data[:70], offset))
    data = (torch.arange(2500) % 251).to(torch.uint8)
    with small() as sink:
        target = sink.open(tmp_path / "f", 2508, b"headers!")
        sink.put(target, 8, data)
        sink.close(target)
        all_finished(sink, 1)
    assert (tmp_path / "f").read_bytes() == b"headers!" + bytes(data.numpy())


@pytest.mark.parametrize("call", ["pwrite", "fsync", "preadv"])
def test_failure_in_a_thread_is_raised_by_the_next_call(tmp_path, monkeypatch, call):
    def fail(*args):
        raise OSError(errno.EIO, "Input/output error")

    def write(sink):
        target = sink.open(tmp_path / "f", 5000, b"")
        monkeypatch.setattr(module.os, call, fail)
        sink.put(target, 0, torch.zeros(5000, dtype=torch.uint8))
        sink.close(target)
        all_finished(sink, 1)

    why = r"f: cannot be written after 0\.00 of 0\.00 GB: Input/output"
    with small() as sink, pytest.raises(CheckpointError, match=why) as caught:
        write(sink)
    assert caught.value.mend


def test_caller_that_stops_half_way(tmp_path):
    with small() as sink:
        target = sink.open(tmp_path / "f", 50_000, b"")
        sink.put(target, 0, torch.zeros(50_000, dtype=torch.uint8))
    assert sink.written <= 50_000
    assert (tmp_path / "f").stat().st_size == 50_000


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with small() as sink, pytest.raises(OSError, match="taken"):
        sink.open(tmp_path / "taken" / "f", 1, b"")
