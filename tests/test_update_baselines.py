"""`--update-baselines`: a baseline changes only from complete runs, with a reason, and never by halves."""

from __future__ import annotations

import json
import sys

import pytest

SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())

def test_files(zimage):
    zimage.gate(zimage.disk_bytes(), zimage.weight_bytes())
"""
KEY = "diffusers-synthetic-tiny-turbo-tiny"
LOCAL = f".zimage/baselines/cpu/{KEY}/nvfp4.json"
PORTABLE = f"baselines/portable/{KEY}/nvfp4.json"
SLOW = [{"rounds": [2 * seconds]} for seconds in (1.000, 1.004, 0.997, 1.002, 0.999)]
UPDATE = ("--update-baselines", "--update-reason", "because")
FAILING_REPLACE = """
import errno, os
from scripted import ScriptedEngine

replace = os.replace

def failing(source, target, **options):
    if "baselines" in str(target):
        raise OSError(errno.{code}, os.strerror(errno.{code}))
    replace(source, target, **options)

os.replace = failing

def pytest_zimage_engines(config):
    return {{"diffusers": lambda: ScriptedEngine(config.rootpath)}}
"""


@pytest.fixture
def suite(script):
    script.project.makepyfile(test_suite=SUITE)
    script(default=script.QUIET)
    return script


@pytest.fixture
def recorded(suite):
    suite.record("nvfp4", suite.QUIET)
    suite(default=SLOW)
    return suite


def stored(script, path: str) -> dict:
    return json.loads((script.project.path / path).read_text(encoding="utf-8"))


def rounds(script) -> list[list[float]]:
    return [run["rounds"] for run in stored(script, LOCAL)["metrics"]["warm_latency"]["runs"]]


@pytest.mark.parametrize("reason", [(), ("--update-reason", ""), ("--update-reason", "  ")])
def test_a_reason_is_required(suite, reason):
    done = suite.run("nvfp4", "--update-baselines", *reason)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["ERROR: *--update-reason*"])
    assert (suite.ran, suite.baselines) == ([], {})


@pytest.mark.parametrize("option", ["--update-reason=because", "--update-mode=new"])
def test_what_records_nothing_by_itself_is_a_usage_error(suite, option):
    done = suite.run("nvfp4", option)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines([f"ERROR: {option.partition('=')[0]} records nothing by itself: add --update-baselines*"])
    assert suite.ran == []


def test_an_unknown_mode_is_a_usage_error(suite):
    done = suite.run("nvfp4", *UPDATE, "--update-mode=append")
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    done.stderr.fnmatch_lines(["*--update-mode*append*"])
    assert suite.ran == []


def test_the_first_recording(suite):
    """Five runs; what holds anywhere goes to the repository, a CPU's times to the folder of this machine."""
    done = suite.run("nvfp4", *UPDATE)
    assert done.ret == 0
    assert suite.ran == [f"nvfp4-{number}" for number in range(1, 6)]
    done.stdout.fnmatch_lines(
        [
            "*variant *metric *old *new*",
            "  nvfp4    warm_latency *-    1.00 s  first",
            "  nvfp4    weight_bytes *-    1000 B  first",
            "3 recorded",
            f"written to .zimage/baselines/cpu/{KEY}",
            f"written to baselines/portable/{KEY}",
        ],
        consecutive=False,
    )
    assert "zimage verdicts" not in done.stdout.str()
    assert sorted(suite.baselines) == [LOCAL, PORTABLE]
    local, portable = stored(suite, LOCAL), stored(suite, PORTABLE)
    assert list(local["metrics"]) == ["warm_latency"]
    assert rounds(suite) == [[run["rounds"][0]] * 10 for run in suite.QUIET]
    assert local["reason"] == portable["reason"] == "because"
    assert local["environment"]["machine"]
    assert "machine" not in portable["environment"]
    assert sorted(portable["metrics"]) == ["disk_bytes", "weight_bytes"]
    assert portable["metrics"]["weight_bytes"]["exact"] == {"bfloat16": 1000}


def test_what_was_recorded_is_what_is_judged_by(recorded):
    recorded(default=recorded.QUIET)
    recorded.run("nvfp4").assert_outcomes(passed=2)
    recorded(default=SLOW)
    recorded.run("nvfp4").assert_outcomes(passed=1, failed=1)


def test_replace_tells_old_and_new(recorded):
    done = recorded.run("nvfp4", *UPDATE)
    assert done.ret == 0
    done.stdout.fnmatch_lines(["  nvfp4    warm_latency    1.00 s    2.00 s  +100.0 %", "1 recorded, 2 unchanged"])
    assert rounds(recorded) == [[run["rounds"][0]] * 10 for run in SLOW]
    assert stored(recorded, LOCAL)["reason"] == "because"
    assert stored(recorded, PORTABLE)["reason"] == "first", "an exact number that stayed leaves its file alone"


def test_extend_adds_runs(recorded):
    recorded(default=recorded.QUIET)
    done = recorded.run("nvfp4", *UPDATE, "--update-mode=extend", "--zimage-runs=2")
    assert done.ret == 0
    done.stdout.fnmatch_lines(["*1 extended, 2 unchanged*"])
    assert len(rounds(recorded)) == 7


def test_new_touches_nothing_that_is_there(recorded):
    before = recorded.baselines
    done = recorded.run("bf16,nvfp4", *UPDATE, "--update-mode=new")
    assert done.ret == 0
    why = "kept: has a baseline already; --update-mode new only adds"
    done.stdout.fnmatch_lines(["*  kept", why, "3 recorded, 3 kept"])
    assert done.stdout.str().count("has a baseline already") == 1
    after = recorded.baselines
    assert {path: after[path] for path in before} == before
    assert sorted(set(after) - set(before)) == [LOCAL.replace("nvfp4", "bf16"), PORTABLE.replace("nvfp4", "bf16")]


def test_the_mode_may_be_an_ini_value(recorded):
    with (recorded.project.path / "tox.ini").open("a") as ini:
        ini.write("\nzimage_update_mode = new\n")
    before = recorded.baselines
    assert recorded.run("nvfp4", *UPDATE).ret == 0
    assert recorded.baselines == before


def test_too_few_runs_are_refused(recorded, results):
    before = recorded.baselines
    done = recorded.run("nvfp4", *UPDATE, "--zimage-runs", "2")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(
        [
            "nvfp4 warm latency: baseline REFUSED, the stored one is as it was",
            "  incomplete: 2 of at least 5 runs",
            "  mend: measure more: --zimage-runs 5",
            "! nvfp4    warm_latency *refused: incomplete: 2 of at least 5 runs (measure more: --zimage-runs 5)",
            "1 refused, 2 unchanged",
        ]
    )
    assert recorded.baselines == before
    assert [row["action"] for row in results()["updates"]] == ["refused", "unchanged", "unchanged"]


def test_a_variant_that_fails_is_left_and_the_others_are_recorded(recorded):
    before = recorded.baselines
    recorded(bf16=SLOW, nvfp4=[*SLOW[:3], {"error": "EngineError", "message": "was killed by SIGKILL"}])
    done = recorded.run("bf16,nvfp4", *UPDATE)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(passed=2, failed=2)
    after = recorded.baselines
    assert {path: after[path] for path in before} == before
    assert sorted(set(after) - set(before)) == [LOCAL.replace("nvfp4", "bf16"), PORTABLE.replace("nvfp4", "bf16")]


def test_an_exact_number_that_differs_between_runs_is_refused(suite):
    suite(default=[*suite.QUIET[:4], {"rounds": [1.0], "disk_bytes": 4999}])
    done = suite.run("nvfp4", *UPDATE)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["nvfp4 bytes of *: baseline REFUSED, nothing was stored", "  differs between *"])
    assert "disk_bytes" not in stored(suite, PORTABLE)["metrics"]


def test_a_run_that_cannot_be_is_refused(suite):
    suite(default=[{"rounds": [1.0], "disk_bytes": 0}])
    done = suite.run("nvfp4", *UPDATE)
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*disk_bytes is 0; it must be positive*"])
    assert "Traceback" not in done.stdout.str()


def test_one_run_far_out_is_measured_once_more(suite):
    suite(default=[*suite.QUIET[:2], {"rounds": [1.5]}, *suite.QUIET[3:], {"rounds": [1.003]}])
    done = suite.run("nvfp4", *UPDATE)
    assert done.ret == 0
    assert suite.ran == [f"nvfp4-{number}" for number in range(1, 7)]
    assert [run[0] for run in rounds(suite)] == [1.0, 1.004, 1.003, 1.002, 0.999]


def test_a_spread_that_stays_is_the_machines_own(suite):
    """Measured again it lies as far out: that is what this machine does, and the baseline must know."""
    suite(default=[*suite.QUIET[:2], {"rounds": [1.5]}, *suite.QUIET[3:], {"rounds": [1.49]}])
    assert suite.run("nvfp4", *UPDATE).ret == 0
    assert [run[0] for run in rounds(suite)] == [1.0, 1.004, 1.49, 1.002, 0.999]


def test_another_machines_times_are_no_baseline_here(recorded):
    local = stored(recorded, LOCAL)
    local["environment"]["machine"] = "somebody else's laptop"
    (recorded.project.path / LOCAL).write_text(json.dumps(local))
    done = recorded.run("nvfp4", "--zimage-strict")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(
        ["nvfp4 warm latency: NO BASELINE *", "*recorded on another machine (somebody else's laptop; this is *"]
    )


@pytest.mark.parametrize(("code", "says"), [("ENOSPC", "No space left on device"), ("EROFS", "Read-only file system")])
def test_a_disk_that_takes_no_more_leaves_the_old_file(recorded, code, says):
    before = recorded.baselines
    recorded.project.makeconftest(FAILING_REPLACE.format(code=code))
    done = recorded.run("nvfp4", *UPDATE)
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        [
            "nvfp4 warm latency: baseline REFUSED*",
            f"  */{KEY}: baselines cannot be written: {says}; the stored ones are unchanged",
            "  mend: *--zimage-baselines DIR",
        ]
    )
    assert "Traceback" not in done.stdout.str()
    assert recorded.baselines == before, "the old files, and no temporary one beside them"


def test_a_folder_that_cannot_be_made(suite):
    (suite.project.path / "file").write_text("in the way")
    done = suite.run("nvfp4", *UPDATE, "--zimage-baselines=file/below")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*file/below/*: baselines cannot be written: Not a directory*", "  mend: *"])
    assert sorted(suite.baselines) == [LOCAL], "the timings go elsewhere and are recorded"


def test_a_session_of_an_earlier_time_is_no_baseline(suite):
    """What is not valid JSON of ours is replaced on request only, and kept beside."""
    path = suite.project.path / PORTABLE
    path.parent.mkdir(parents=True)
    path.write_text("<<<<<<< HEAD")
    done = suite.run("nvfp4", *UPDATE, "--update-mode=extend")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert path.read_text() == "<<<<<<< HEAD"
    assert suite.run("nvfp4", *UPDATE).ret == 0
    assert path.with_name("nvfp4.json.unreadable").read_text() == "<<<<<<< HEAD"


def at_once(script, *sessions: tuple[str, ...]) -> None:
    running = [
        script.project.popen([sys.executable, "-m", "pytest", "-q", *UPDATE, *arguments], stdin=None)
        for arguments in sessions
    ]
    for process in running:
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == 0, shown


def test_two_sessions_of_two_variants_at_once(suite):
    at_once(suite, ("--zimage-config", "nvfp4"), ("--zimage-config", "bf16"))
    assert len(suite.baselines) == 4
    suite.run("bf16,nvfp4").assert_outcomes(passed=4)


def test_two_sessions_of_one_variant_at_once_lose_nothing(suite):
    """Each session has metrics of its own for the same files, and both bring runs to a third."""
    suite.record("nvfp4", suite.QUIET)
    extend = ("--zimage-config", "nvfp4", "--update-mode=extend", "--zimage-runs=2")
    at_once(suite, extend, extend)
    assert len(rounds(suite)) == 9
    suite.run("nvfp4").assert_outcomes(passed=2)
