"""pytest-xdist: the same verdicts, each run made once, one results file, however the tests are spread."""

from __future__ import annotations

from itertools import groupby
from xml.etree import ElementTree

import pytest

from conftest import TIMED

SUITE = f"""{TIMED}
def test_memory(zimage):
    zimage.gate(zimage.rss_peak())
"""
NOW = {
    "bf16": [{"rounds": [1.001]}],
    "nvfp4": [{"rounds": [1.2]}],
    "fp8_cast": [{"rounds": [1.031]}, {"rounds": [1.029]}, {"rounds": [1.030]}],
    "fp8_scaled": [{"error": "EngineError", "message": "worker of fp8-scaled: was killed by SIGKILL"}],
}
NAMES = "bf16,nvfp4,fp8-cast,fp8-scaled"


@pytest.fixture
def recorded(script):
    script.project.makepyfile(test_suite=SUITE)
    script.record(NAMES, script.QUIET)
    script(**NOW)
    return script


def outcomes(data):
    return {
        (verdict["test"], verdict["metric"]): (
            verdict["verdict"],
            verdict["value"],
            verdict["change"],
            verdict["k_new"],
        )
        for verdict in data["verdicts"]
    }


def failures(data):
    return [(error["test"], error["kind"]) for error in data["errors"]]


@pytest.mark.parametrize("workers", [("-n", "2"), ("-n", "2", "--dist", "loadgroup"), ("-n", "1")])
def test_same_verdicts_as_without(recorded, results, workers):
    plain = recorded.project.runpytest_subprocess("--zimage-config", NAMES, "-n", "0")
    alone = results()
    ran_alone = sorted(recorded.ran)
    (recorded.project.path / "ran.log").unlink()

    spread = recorded.project.runpytest_subprocess("--zimage-config", NAMES, *workers)
    together = results()

    assert len(alone["verdicts"]) == 9
    assert {verdict["verdict"] for verdict in alone["verdicts"]} == {"PASS", "SLOWER", "INCONCLUSIVE"}
    assert list(outcomes(together).items()) == list(outcomes(alone).items()), "in the same order too"
    assert failures(together) == failures(alone)
    assert len(alone["errors"]) == 3
    assert spread.ret == plain.ret == pytest.ExitCode.TESTS_FAILED
    assert sorted(recorded.ran) == ran_alone, "a run was made twice or not at all"


@pytest.mark.parametrize("workers", [("-n", "0"), ("-n", "2", "--dist", "loadgroup")])
def test_a_test_has_one_name_however_the_tests_are_spread(recorded, workers):
    """What the summary names can be typed, `--lf` finds it, and JUnit's file tells the same history every night."""
    project = recorded.project
    project.makeini((project.path / "tox.ini").read_text().replace("-p no:cacheprovider", ""))
    told = project.runpytest_subprocess("--zimage-config", NAMES, "--junitxml=junit.xml", *workers)
    names = {case.get("name") for case in ElementTree.parse(project.path / "junit.xml").iter("testcase")}
    assert names == {
        f"test_{what}[{variant}]" for what in ("warm_latency", "cold_load", "memory") for variant in NAMES.split(",")
    }
    failed = [line.split()[1] for line in told.outlines if line.startswith("FAILED ")]
    assert "test_suite.py::test_warm_latency[nvfp4]" in failed
    again = project.runpytest_subprocess("--zimage-config", NAMES, "--lf", "--collect-only", "-q")
    assert sorted(line for line in again.outlines if "::" in line) == sorted(failed)
    assert project.runpytest_subprocess("--zimage-config", NAMES, "--collect-only", "-q", failed[0]).ret == 0


def test_one_results_file_and_one_table(recorded):
    results_folder = recorded.project.path / ".zimage" / "results"
    before = len(list(results_folder.glob("*.json")))
    done = recorded.project.runpytest_subprocess("--zimage-config", NAMES, "-n", "2")
    assert len(list(results_folder.glob("*.json"))) == before + 1
    assert done.stdout.str().count("zimage verdicts") == 1


def test_updating_from_two_workers_loses_nothing(script, results):
    script.project.makepyfile(test_suite=SUITE)
    script(default=script.QUIET)
    done = script.project.runpytest_subprocess(
        "--update-baselines", "--update-reason", "first", "--zimage-config", NAMES, "-n", "2"
    )
    assert done.ret == 0
    told = [row["variant"] for row in results()["updates"]]
    assert [name for name, _ in groupby(told)] == ["bf16", "fp8-cast", "fp8-scaled", "nvfp4"], "as one process tells it"
    judged = script.project.runpytest_subprocess("--zimage-config", NAMES)
    judged.assert_outcomes(passed=12)


def test_a_worker_of_xdist_that_dies_is_not_green(recorded):
    recorded(**{**NOW, "nvfp4": [{"die": 9}]})
    done = recorded.project.runpytest_subprocess("--zimage-config", NAMES, "-n", "2")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines_random(["*worker 'gw*' crashed while running*nvfp4*"])
