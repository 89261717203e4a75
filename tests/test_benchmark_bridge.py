"""Measured rounds in pytest-benchmark's own report, to the digit, and no harm where it is off."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pytest_zimage.errors import MeasurementError
from pytest_zimage.reports.benchmark_bridge import ReplayTimer, replay

pytest_plugins = ["pytester"]
ROUNDS = [0.1 + 0.2, 5.503_123_456_789_012, 1e-7, 7.55, 1 / 3]
SUITE = f"""
    import pytest
    from pytest_zimage.reports.benchmark_bridge import replay

    ROUNDS = {ROUNDS!r}

    @pytest.fixture
    def gate(request):
        return lambda **options: replay(request, ROUNDS, "warm_latency", {{"variant": "nvfp4"}}, **options)
"""
ONE = """
    def test_one(gate):
        print(f"reason=[{gate()}]")
"""


@pytest.fixture
def suite(pytester):
    def make(tests: str = ONE):
        pytester.makepyfile(pytester_lines(SUITE) + pytester_lines(tests))
        return pytester

    return make


def pytester_lines(text: str) -> str:
    import textwrap

    return textwrap.dedent(text)


def run(pytester, *arguments: str):
    return pytester.runpytest_subprocess("-p", "no:zimage", "-p", "no:cacheprovider", "-rA", *arguments)


def rows(pytester, *arguments: str) -> list[dict]:
    run(pytester, "--benchmark-json=out.json", *arguments).assert_outcomes(passed=1)
    return json.loads((pytester.path / "out.json").read_text())["benchmarks"]


def test_json_has_the_rounds_to_the_digit(suite):
    (row,) = rows(suite())
    assert row["stats"]["data"] == ROUNDS
    assert (row["stats"]["rounds"], row["stats"]["iterations"]) == (len(ROUNDS), 1)
    assert (row["stats"]["min"], row["stats"]["max"]) == (min(ROUNDS), max(ROUNDS))
    assert row["group"] == "warm_latency"
    assert row["extra_info"] == {"variant": "nvfp4"}
    assert row["options"]["timer"] == "ReplayTimer()"


@pytest.mark.parametrize("option", ["--benchmark-disable-gc", "--benchmark-warmup=on", "--benchmark-min-rounds=50"])
def test_options_of_pytest_benchmark_change_no_round(suite, option):
    (row,) = rows(suite(), option)
    assert row["stats"]["data"] == ROUNDS


def test_profiling_option_does_no_harm(suite):
    (row,) = rows(suite(), "--benchmark-cprofile=tottime")
    assert row["stats"]["data"] == ROUNDS


def test_marker_of_the_test_itself_keeps_its_group_but_not_the_timer(suite):
    tests = """
    import time
    @pytest.mark.benchmark(group="mine", timer=time.time, min_rounds=3)
    """
    (row,) = rows(suite(tests + ONE))
    assert row["group"] == "mine"
    assert row["stats"]["data"] == ROUNDS


def test_failing_test_is_still_recorded(suite):
    pytester = suite("def test_one(gate):\n    gate()\n    assert False, 'SLOWER'\n")
    run(pytester, "--benchmark-json=out.json").assert_outcomes(failed=1)
    (row,) = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert row["stats"]["data"] == ROUNDS


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("-p", "no:benchmark"), "pytest-benchmark is not loaded"),
        (("--benchmark-disable",), "pytest-benchmark is disabled"),
        (("--benchmark-skip",), "--benchmark-skip"),
        (("-n", "1"), "pytest-benchmark is disabled"),
    ],
    ids=["absent", "disabled", "skip", "xdist"],
)
def test_where_it_is_off_the_test_runs_all_the_same(suite, arguments, reason):
    pytester = suite()
    result = run(pytester, "-W", "error", *arguments)
    result.assert_outcomes(passed=1)
    assert f"reason=[{reason}]" in result.stdout.str()
    assert "xdist plugin is active" not in result.stdout.str() + result.stderr.str()


def test_a_test_that_benchmarks_by_itself_keeps_its_fixture(suite):
    """Its fixture was made with a real clock: replaying through it would record the time of doing nothing."""
    tests = """
    def test_one(benchmark, gate):
        assert gate() == "this test uses the benchmark fixture itself"
        benchmark.pedantic(sum, args=([1],), rounds=2)
    """
    (row,) = rows(suite(tests))
    assert row["stats"]["rounds"] == 2
    assert row["extra_info"] == {}


def test_second_replay_in_one_test_is_declined(suite):
    tests = """
    def test_one(gate):
        assert gate() == ""
        assert gate() == "this test uses the benchmark fixture itself"
    """
    (row,) = rows(suite(tests))
    assert row["stats"]["data"] == ROUNDS


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [0.0], [-1.0], [float("inf")]])
def test_rounds_that_are_no_durations_are_refused(bad):
    with pytest.raises(MeasurementError, match="no durations"):
        replay(SimpleNamespace(), bad)


def test_timer_gives_each_round_exactly_and_invents_none():
    timer = ReplayTimer(ROUNDS)
    assert [-(timer() - timer()) for _ in ROUNDS] == ROUNDS
    with pytest.raises(MeasurementError, match="more than the 5 rounds"):
        timer()


def test_bridge_imports_nothing_heavy():
    code = (
        "import sys, pytest_zimage.reports.benchmark_bridge; print([m for m in ('torch', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
