"""A variant is loaded once a session; only a verdict that needs confirmation starts another run."""

from __future__ import annotations

import pytest

from conftest import TIMED

SUITE = f"""{TIMED}
def test_memory(zimage):
    zimage.gate(zimage.rss_peak(), zimage.working_set())

def test_files(zimage):
    zimage.gate(zimage.disk_bytes(), zimage.weight_bytes(), zimage.tensors(), zimage.linears(), zimage.forwards())
"""


@pytest.fixture
def recorded(script):
    script.project.makepyfile(test_suite=SUITE)
    script.record("bf16,nvfp4", script.QUIET)
    script(default=script.QUIET)
    return script


def test_one_run_serves_every_metric(recorded):
    done = recorded.project.runpytest_subprocess("--zimage-config", "bf16,nvfp4")
    assert done.ret == 0
    assert recorded.ran == ["bf16-1", "nvfp4-1"]


def test_variants_are_grouped(recorded):
    done = recorded.project.runpytest_subprocess("--zimage-config", "bf16,nvfp4", "-v")
    order = [line.split("[")[1].split("]")[0] for line in done.outlines if "::test_" in line and "%]" in line]
    assert order == ["bf16"] * 4 + ["nvfp4"] * 4


def test_a_regression_is_confirmed_by_a_second_run_of_that_variant_only(recorded, results):
    recorded(bf16=recorded.QUIET, nvfp4=[{"rounds": [1.1]}])
    done = recorded.project.runpytest_subprocess("--zimage-config", "bf16,nvfp4")
    done.assert_outcomes(failed=1, passed=7)
    assert recorded.ran == ["bf16-1", "nvfp4-1", "nvfp4-2"]
    (slower,) = [verdict for verdict in results()["verdicts"] if verdict["verdict"] == "SLOWER"]
    assert (slower["variant"], slower["metric"], slower["k_new"]) == ("nvfp4", "warm_latency", 2)


def test_one_slow_run_alone_is_no_regression(recorded):
    recorded(bf16=recorded.QUIET, nvfp4=[{"rounds": [1.1]}, {"rounds": [1.0]}, {"rounds": [1.001]}])
    done = recorded.project.runpytest_subprocess("--zimage-config", "nvfp4")
    done.assert_outcomes(passed=3, skipped=0, failed=0)
    assert recorded.ran == ["nvfp4-1", "nvfp4-2", "nvfp4-3"]
    done.stdout.fnmatch_lines(["*1 inconclusive*"])


def test_a_failed_run_is_every_tests_error_and_made_once(recorded):
    recorded(
        bf16=recorded.QUIET,
        nvfp4=[{"error": "CheckpointError", "message": "x.safetensors: truncated, 12 bytes missing"}],
    )
    done = recorded.project.runpytest_subprocess("--zimage-config", "bf16,nvfp4")
    done.assert_outcomes(passed=4, failed=4)
    assert recorded.ran == ["bf16-1", "nvfp4-1"]
    done.stdout.fnmatch_lines(["*x.safetensors: truncated, 12 bytes missing*", "*mend: scripted mend*"])
    assert "Traceback" not in done.stdout.str()


def test_fresh_runs_can_be_asked_for(recorded, results):
    recorded(bf16=recorded.QUIET)
    recorded.project.runpytest_subprocess("--zimage-config", "bf16", "--zimage-runs", "3", "-k", "warm_latency")
    assert recorded.ran == ["bf16-1", "bf16-2", "bf16-3"]
    (verdict,) = results()["verdicts"]
    assert verdict["k_new"] == 3
