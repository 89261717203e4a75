"""`-m LANE` selects the suite on that device, and is a usage error anywhere else."""

from __future__ import annotations

import pytest

from pytest_zimage.lanes import check_expression

LANES = ("cpu", "gb10", "h200")


@pytest.mark.parametrize(
    "expression",
    ["", "cpu", "not gb10", "cpu or gb10", "slow", "cpu and not slow", "slow or gb10", "not (gb10 or h200)"],
)
def test_expressions_that_can_select_here(expression):
    check_expression(expression, LANES, "cpu")


@pytest.mark.parametrize(
    ("expression", "elsewhere"),
    [
        ("gb10", "gb10"),
        ("gb10 and not slow", "gb10"),
        ("not cpu", "gb10 or h200"),
        ("h200 or gb10", "gb10 or h200"),
        ("gb10 and (fast or slow)", "gb10"),
    ],
)
def test_expressions_that_ask_for_another_machine(expression, elsewhere):
    with pytest.raises(pytest.UsageError, match=rf"only on {elsewhere}, but this machine is 'cpu'"):
        check_expression(expression, LANES, "cpu")


def test_an_expression_that_selects_nothing_anywhere_is_left_to_pytest():
    check_expression("cpu and gb10", LANES, "cpu")


@pytest.mark.parametrize("workers", [(), ("-n", "2")])
def test_wrong_lane_stops_the_run(script, workers):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("-m", "gb10", *workers)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines_random(["*selects the zimage suite only on gb10, but this machine is 'cpu'*"])
    assert script.ran == []


def test_this_machines_lane_runs(script):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("-m", "cpu", "--zimage-config", "nvfp4")
    assert script.ran == ["nvfp4-1"]
    assert result.ret == 0


def test_lanes_of_other_projects_are_left_alone(pytester):
    """A project with a marker `gb10` of its own and no zimage test keeps its meaning."""
    pytester.makepyfile("def test_other(): pass")
    result = pytester.runpytest_subprocess("-m", "gb10")
    assert result.ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_lane_markers_are_registered(pytester):
    result = pytester.runpytest_subprocess("--markers")
    result.stdout.fnmatch_lines(["@pytest.mark.gb10: zimage lane: runs on DGX Spark (GB10)"])
