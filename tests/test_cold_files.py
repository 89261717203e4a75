"""The weights on the disk around a load: out of the page cache, the disk timed, and let go of once they are read."""

from __future__ import annotations

import threading
from contextlib import contextmanager

import pytest

from pytest_zimage.engines import coldfiles
from pytest_zimage.engines.coldfiles import ColdFiles
from pytest_zimage.probes import pagecache
from pytest_zimage.probes.diskspeed import read_gb_s
from pytest_zimage.probes.pagecache import CacheState

MIB = 1 << 20


class Disk:
    """What happens to scripted files; emptying waits for `may_empty`."""

    def __init__(self, monkeypatch, emptied=True, gb_s=1.5):
        self.events = []
        self.may_empty = threading.Event()
        self.may_empty.set()
        self.freed = threading.Event()
        self._state = CacheState(residency=0.0 if emptied else 0.9, emptied=emptied)
        self._gb_s = gb_s
        monkeypatch.setattr(coldfiles.pagecache, "empty", self._empty)
        monkeypatch.setattr(coldfiles.diskspeed, "read_gb_s", self._time)

    def _empty(self, files):
        assert self.may_empty.wait(10)
        self.events.append("emptied")
        return self._state

    def _time(self, files):
        self.events.append("timed")
        return self._gb_s

    @contextmanager
    def reading(self):
        self.events.append("held")
        yield
        self.events.append("free")
        self.freed.set()


def test_the_disk_is_timed_with_an_empty_page_cache_and_leaves_it_so(monkeypatch):
    disk = Disk(monkeypatch)
    with ColdFiles([], disk.reading()) as files:
        assert files.ready() == (CacheState(residency=0.0, emptied=True), 1.5)
        assert disk.events == ["held", "emptied", "timed", "emptied"]


@pytest.mark.parametrize(
    ("emptied", "gb_s", "expected"),
    [(False, 1.5, ["held", "emptied"]), (True, None, ["held", "emptied", "timed"])],
    ids=["pages stay", "small files"],
)
def test_where_it_cannot_be_timed_it_is_not(monkeypatch, emptied, gb_s, expected):
    disk = Disk(monkeypatch, emptied, gb_s)
    with ColdFiles([], disk.reading()) as files:
        assert files.ready()[1] is None
        assert disk.events == expected


def test_once_read_the_files_are_dropped_and_others_may_load_while_the_first_image_is_drawn(monkeypatch):
    disk = Disk(monkeypatch)
    with ColdFiles([], disk.reading()) as files:
        files.ready()
        disk.events.clear()
        disk.may_empty.clear()
        files.read()
        assert disk.events == [], "nobody waits for it"
        disk.may_empty.set()
        assert disk.freed.wait(10), "before it is left"
        assert disk.events == ["emptied", "free"]


def test_what_is_timed_next_begins_when_that_is_done(monkeypatch):
    disk = Disk(monkeypatch)
    with ColdFiles([], disk.reading()) as files:
        files.read()
    assert disk.events == ["held", "emptied", "emptied", "free"]


def test_a_load_that_fails_lets_others_load(monkeypatch):
    disk = Disk(monkeypatch)
    with pytest.raises(ValueError, match="broken"), ColdFiles([], disk.reading()):
        raise ValueError("broken")
    assert disk.events == ["held", "emptied", "free"]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(range(256)) * (40 * MIB // 256))
    return path


def test_a_disk_is_timed_on_the_largest_file(file, tmp_path):
    small = tmp_path / "small"
    small.write_bytes(b"0" * MIB)
    if not pagecache.empty([file, small]).emptied:
        pytest.skip("this file system does not let go of its pages")
    speed = read_gb_s([small, file], sample_bytes=32 * MIB)
    assert speed is not None
    assert 0 < speed < float("inf")
    assert pagecache.residency([file]).emptied, "the load that follows is cold"
    assert pagecache.residency([small]).residency == 0, "it was not read"


def test_a_small_file_says_nothing_of_a_disk(file, tmp_path):
    assert read_gb_s([file]) is None
    assert read_gb_s([]) is None


def test_a_file_that_cannot_be_read_gives_no_speed(file, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pytest_zimage.probes.diskspeed.os.preadv", broken)
    assert read_gb_s([file], sample_bytes=32 * MIB) is None
    monkeypatch.setattr("pytest_zimage.probes.diskspeed.os.preadv", lambda *_: 0)
    assert read_gb_s([file], sample_bytes=32 * MIB) is None, "it became shorter"
