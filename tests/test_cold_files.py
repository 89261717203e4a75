"""The weights on the disk around a load: out of the page cache, the disk timed, and let go of once they are read."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from itertools import cycle

import pytest

from pytest_zimage.engines import coldfiles
from pytest_zimage.engines.coldfiles import ColdFiles
from pytest_zimage.errors import MeasurementError
from pytest_zimage.locks import disks
from pytest_zimage.probes import pagecache
from pytest_zimage.probes.diskspeed import read_gb_s
from pytest_zimage.probes.pagecache import CacheState

MIB = 1 << 20


class Disk:
    """What happens to scripted files; holding waits for `may_hold`, and emptying for `may_empty`."""

    def __init__(self, monkeypatch, emptied=True, gb_s=(1.5,)):
        self.events = []
        self.said = []
        self.may_hold, self.may_empty = threading.Event(), threading.Event()
        self.may_hold.set()
        self.may_empty.set()
        self.asked, self.timed, self.freed = threading.Event(), threading.Event(), threading.Event()
        self._state = CacheState(residency=0.0 if emptied else 0.9, emptied=emptied)
        self._gb_s = cycle(gb_s)
        monkeypatch.setattr(coldfiles.pagecache, "empty", self._empty)
        monkeypatch.setattr(coldfiles.diskspeed, "read_gb_s", self._time)

    @property
    def files(self):
        return ColdFiles([], self._reading, lambda stage, done, total: self._progress(stage))

    def _progress(self, stage):
        self.said.append(stage)
        self.may_hold.set()

    def _empty(self, files):
        assert self.may_empty.wait(10)
        self.events.append("emptied")
        return self._state

    def _time(self, files):
        self.events.append("timed")
        self.timed.set()
        return next(self._gb_s)

    @contextmanager
    def _reading(self, progress):
        if not self.may_hold.is_set():
            progress("waiting for the disk", 0, 0)
        self.asked.set()
        assert self.may_hold.wait(10)
        self.events.append("held")
        yield
        self.events.append("free")
        self.freed.set()


def test_the_disk_is_timed_with_an_empty_page_cache_and_leaves_it_so(monkeypatch):
    disk = Disk(monkeypatch)
    with disk.files as files:
        files.hold()
        assert files.ready() == (CacheState(residency=0.0, emptied=True), 1.5)
        assert disk.events == ["held", "emptied", "timed", "timed", "emptied"]
    assert disk.said == []


@pytest.mark.parametrize(("readings", "speed"), [((1.5, 0.8), 1.5), ((0.8, 1.5), 1.5), ((1.5, None), 1.5)])
def test_what_disturbs_one_reading_is_not_the_disks(monkeypatch, readings, speed):
    disk = Disk(monkeypatch, gb_s=readings)
    with disk.files as files:
        files.hold()
        assert files.ready()[1] == speed


def test_the_first_reading_is_taken_beside_what_goes_on_until_the_load(monkeypatch):
    disk = Disk(monkeypatch)
    with disk.files as files:
        files.hold()
        assert disk.timed.wait(10), "before anybody asks whether the files are ready"


@pytest.mark.parametrize(
    ("emptied", "gb_s", "expected"),
    [(False, [1.5], ["held", "emptied"]), (True, [None], ["held", "emptied", "timed"])],
    ids=["pages stay", "small files"],
)
def test_where_it_cannot_be_timed_it_is_not(monkeypatch, emptied, gb_s, expected):
    disk = Disk(monkeypatch, emptied, gb_s)
    with disk.files as files:
        files.hold()
        assert files.ready()[1] is None
        assert disk.events == expected


def test_a_disk_that_another_process_loads_from_is_waited_for_and_that_is_said(monkeypatch):
    disk = Disk(monkeypatch)
    disk.may_hold.clear()
    with disk.files as files:
        assert disk.asked.wait(10), "beside what its user does until then"
        assert disk.said == []
        files.hold()
        assert set(disk.said) == {"waiting for the disk"}
        assert disk.events[0] == "held"


def test_once_read_the_files_are_dropped_and_others_may_load_while_the_first_image_is_drawn(monkeypatch):
    disk = Disk(monkeypatch)
    with disk.files as files:
        files.hold()
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
    with disk.files as files:
        files.hold()
        files.ready()
        files.read()
    assert disk.events[-2:] == ["emptied", "free"]


def fails(disk, when):
    """A run that ends in an error as soon as `when` says so."""
    with disk.files as files:
        when(files)
        raise ValueError("broken")


def test_a_load_that_fails_lets_others_load(monkeypatch):
    disk = Disk(monkeypatch)
    with pytest.raises(ValueError, match="broken"):
        fails(disk, lambda files: files.hold())
    assert disk.events == ["held", "emptied", "timed", "free"]


def test_who_fails_before_waits_for_no_other_process_and_touches_nothing_of_it(monkeypatch):
    disk = Disk(monkeypatch)
    disk.may_hold.clear()
    with pytest.raises(ValueError, match="broken"):
        fails(disk, lambda files: disk.asked.wait(10))
    assert disk.events == []
    disk.may_hold.set()
    assert disk.freed.wait(10)
    assert disk.events == ["held", "free"], "another may be reading the same files"


def test_a_disk_that_cannot_be_held_is_told(monkeypatch, tmp_path):
    (tmp_path / "locks").write_text("no folder")
    weights = tmp_path / "weights"
    weights.write_bytes(b"0")
    with (
        pytest.raises(MeasurementError, match="cannot be written"),
        ColdFiles([weights], lambda say: disks(tmp_path / "locks", [weights], say), lambda *_: None) as files,
    ):
        files.hold()


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


def test_a_file_that_stays_in_memory_says_nothing_of_a_disk(file, monkeypatch):
    file.read_bytes()
    monkeypatch.setattr(pagecache, "_drop", lambda path, notes: None)
    assert read_gb_s([file], sample_bytes=32 * MIB) is None


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
