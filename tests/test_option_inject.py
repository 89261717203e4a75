"""`--zimage-inject`: each gate can fail, and nothing fails without it."""

from __future__ import annotations

import pytest

from conftest import TIMED

SUITE = f"""{TIMED}
def test_memory(zimage):
    zimage.gate(zimage.rss_peak(), zimage.working_set())
"""


@pytest.fixture
def recorded(script):
    """A project with a baseline of five runs that differ by the spread of a quiet machine."""
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    script(default=script.QUIET)
    return script


def run(script, *arguments):
    return script.project.runpytest_subprocess("--zimage-config", "nvfp4", *arguments)


def test_nothing_is_caught_without_it(recorded):
    run(recorded).assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("injection", "test", "word"),
    [
        ("warm_latency=+5%", "test_warm_latency", "SLOWER"),
        ("cold_load=+40%", "test_cold_load", "SLOWER"),
        ("memory=+500MB", "test_memory", "BIGGER"),
    ],
)
def test_each_injection_is_caught_by_its_own_test(recorded, results, injection, test, word):
    result = run(recorded, "--zimage-inject", injection)
    result.assert_outcomes(failed=1, passed=2)
    caught = [verdict for verdict in results()["verdicts"] if verdict["verdict"] != "PASS"]
    assert {verdict["verdict"] for verdict in caught} == {word}
    assert all(test in verdict["test"] for verdict in caught)
    assert all(verdict["injected"] for verdict in results()["verdicts"])


def test_an_injected_run_never_becomes_a_baseline(script):
    script(default=[{"rounds": [1.0]}])
    result = run(script, "--zimage-inject", "memory=+1GB", "--update-baselines", "--update-reason", "why not")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*refuses --zimage-inject*"])
    assert script.ran == []


@pytest.mark.parametrize(
    "value", ["warm_latency", "warm_latency=5", "latency=+5%", "memory=+5%", "cold_load=-4%", "memory=0MB"]
)
def test_what_cannot_be_injected_is_a_usage_error(script, value):
    result = run(script, "--zimage-inject", value)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--zimage-inject {value}: write METRIC=AMOUNT*"])
