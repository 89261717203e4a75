"""What an engine says of a whole session, requests that failed and formats it emulates, stands below the table."""

from __future__ import annotations

import pytest

from conftest import SUITE

FAULTS = {"dropped connection": 7, "timeout": 1, "status 500": 2}
LINE = "faults: 12 dropped connections, 1 timeout, 2 status 500 in bf16; 3 timeouts in nvfp4"
EMULATED = "emulated here, that is dequantised and multiplied plainly: nvfp4, mxfp8 by diffusers"


@pytest.fixture
def faulty(script):
    script.project.makepyfile(test_suite=SUITE)
    quiet = {"rounds": [1.0]}
    script(
        bf16=[{**quiet, "faults": FAULTS}, {**quiet, "faults": {"dropped connection": 5}}],
        nvfp4=[{**quiet, "faults": {"timeout": 3}, "emulated": ["nvfp4", "mxfp8"]}, quiet],
        default=[quiet],
    )
    return script


def test_all_runs_are_counted_by_kind_and_variant(faulty, results):
    done = faulty.run("bf16,nvfp4,fp8-cast", "--zimage-runs=2")
    done.stdout.fnmatch_lines([f"NOTE: {LINE}", f"NOTE: {EMULATED}"])
    assert results()["notes"] == [LINE, EMULATED]
    by_run = [run["faults"] for run in results()["runs"] if run["variant"] == "bf16"]
    assert by_run == [FAULTS, {"dropped connection": 5}]


def test_workers_tell_it_once(faulty, results):
    faulty.run("bf16,nvfp4,fp8-cast", "--zimage-runs=2", "-n2")
    notes = results()["notes"]
    (line,) = [note for note in notes if note.startswith("faults: ")]
    assert sorted(line.removeprefix("faults: ").split("; ")) == sorted(LINE.removeprefix("faults: ").split("; "))
    assert [note for note in notes if note.startswith("emulated")] == [EMULATED]


def test_nothing_is_said_of_nothing(faulty, results):
    faulty.run("fp8-cast")
    assert results()["notes"] == []
