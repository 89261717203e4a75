"""Emptying the page cache of some files, and looking whether that worked, on the real kernel."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from pytest_zimage.probes import pagecache

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="posix_fadvise and mincore are Linux's")
PAGES = 2048


def file_system(path: Path) -> str:
    """Type of the file system that holds `path`, from the kernel's own table."""
    best, kind = "", "unknown"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        mount = left.split()[4].encode().decode("unicode_escape")
        if str(path.resolve()).startswith(mount.rstrip("/") + "/") and len(mount) >= len(best):
            best, kind = mount, right.split()[0]
    return kind


def written(path: Path, pages: int = PAGES) -> Path:
    path.write_bytes(os.urandom(pages * mmap.PAGESIZE))
    return path


def in_memory(path: Path) -> bool:
    return file_system(path) in ("tmpfs", "ramfs")


def test_a_file_just_written_is_resident(tmp_path):
    state = pagecache.residency([written(tmp_path / "a")])
    assert state.residency == 1.0
    assert not state.emptied


def test_empty_drops_the_pages_or_says_that_it_could_not(tmp_path):
    path = written(tmp_path / "a")
    state = pagecache.empty([path])
    if in_memory(path):
        assert state.residency == 1.0
        assert not state.emptied
        assert "still in the page cache" in state.notes[0]
    else:
        assert state.residency < pagecache.EMPTY_BELOW
        assert state.emptied
        assert state.notes == ()
    assert path.stat().st_size == PAGES * mmap.PAGESIZE


@pytest.mark.skipif(not os.access("/dev/shm", os.W_OK), reason="no tmpfs to write to")
def test_tmpfs_is_never_called_emptied():
    path = Path("/dev/shm") / f"zimage-page-cache-{os.getpid()}"
    try:
        state = pagecache.empty([written(path)])
        assert in_memory(path)
        assert (state.residency, state.emptied) == (1.0, False)
        assert "tmpfs" in state.notes[0]
    finally:
        path.unlink()


def test_pages_that_another_mapping_holds_stay_and_are_reported(tmp_path):
    path = written(tmp_path / "a")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        assert sum(mapping[:: mmap.PAGESIZE]) > 0
        held = pagecache.empty([path])
    assert held.residency > 0.9
    assert not held.emptied
    assert "still in the page cache" in held.notes[0]
    if not in_memory(path):
        assert pagecache.empty([path]).emptied, "nothing holds them any more"


def test_looking_brings_nothing_in(tmp_path):
    path = written(tmp_path / "a")
    if in_memory(path):
        assert pagecache.empty([path]).residency == 1.0
        return
    pagecache.empty([path])
    assert [pagecache.residency([path]).residency for _ in range(3)] == [0.0] * 3


def test_residency_counts_pages_not_files(tmp_path):
    """A quarter of the pages are resident, in one of two files: neither 0, 50 % nor 100 %."""
    small, large = written(tmp_path / "small", 512), written(tmp_path / "large", 1536)
    pagecache.empty([large])
    share = pagecache.residency([small, large]).residency
    assert share == pytest.approx(1.0 if in_memory(large) else 0.25, abs=0.01)


def test_windows_add_up(tmp_path, monkeypatch):
    path = written(tmp_path / "a", 37)
    with path.open("ab") as file:
        file.write(b"tail")
    monkeypatch.setattr(pagecache, "_WINDOW_BYTES", 16 * mmap.PAGESIZE)
    assert pagecache._count(pagecache._libc(), path) == (38, 38)


def test_missing_file_leaves_the_state_unknown(tmp_path):
    state = pagecache.empty([written(tmp_path / "a"), tmp_path / "absent"])
    assert (state.residency, state.emptied) == (None, False)
    assert any("absent" in note for note in state.notes)


def test_no_pages_is_unknown_not_empty(tmp_path):
    (tmp_path / "nothing").touch()
    for paths in ([], [tmp_path / "nothing"]):
        state = pagecache.empty(paths)
        assert (state.residency, state.emptied) == (None, False)
        assert "no pages" in state.notes[0]


def test_somebody_elses_file_is_unknown_because_the_kernel_would_lie(tmp_path, monkeypatch):
    path = written(tmp_path / "a", 4)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    monkeypatch.setattr(os, "access", lambda *_: False)
    state = pagecache.empty([path])
    assert (state.residency, state.emptied) == (None, False)
    assert "only to its owner" in state.notes[0]


def test_failed_sync_is_noted(tmp_path, monkeypatch):
    def refuse(_descriptor):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", refuse)
    assert any("cannot be synced (Read-only" in note for note in pagecache.empty([written(tmp_path / "a")]).notes)


def test_other_systems_say_unknown(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    assert pagecache.empty([written(tmp_path / "a")]).residency is None

    def no_mincore(*_args, **_kwargs):
        raise AttributeError("undefined symbol: mincore")

    monkeypatch.setattr(pagecache.ctypes, "CDLL", no_mincore)
    state = pagecache.residency([tmp_path / "a"])
    assert (state.residency, state.emptied) == (None, False)
    assert "mincore" in state.notes[0]
