"""`--zimage-rounds`: timed images in each run."""

from __future__ import annotations

import pytest


def test_the_number_is_what_is_measured(script, results):
    script(default=[{"rounds": [1.0]}])
    script.project.runpytest_subprocess("--zimage-config", "nvfp4", "--zimage-rounds", "4")
    (verdict,) = results()["verdicts"]
    assert verdict["samples"] == [[1.0] * 4]


@pytest.mark.parametrize("value", ["0", "-3", "many", "1.5"])
@pytest.mark.parametrize("option", ["--zimage-rounds", "--zimage-runs"])
def test_what_is_no_count_is_a_usage_error(script, option, value):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess(f"{option}={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{option} {value}: must be a whole number of at least 1*"])
    assert script.ran == []
