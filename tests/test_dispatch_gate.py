"""The gate of the dispatch map: what moved is named, what is missing is no pass, and it explains a changed time."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from conftest import PORTABLE
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.exact import judge_exact
from pytest_zimage.verdict.moves import moves

SUITES = Path(__file__).parents[1] / "suites"
MAP = {
    "linear: plain": 64,
    "linear: quantised-activations": 240,
    "quantize_nvfp4: cuda": 240,
    "rms_rope: cuda": 1240,
    "scaled_mm_nvfp4: cuda": 240,
}
COMPUTE = {"plain": 8, "quantised-activations": 30}


def run(**changes: object) -> dict:
    return {"rounds": [1.0], "dispatch": MAP, "compute": COMPUTE, **changes}


def without(*keys: str, **more: int) -> dict[str, int]:
    return {key: number for key, number in MAP.items() if key not in keys} | more


@pytest.fixture
def suite(script):
    """A project with the suite of this repository, and nothing recorded."""
    (script.project.path / "test_suite.py").unlink(missing_ok=True)
    shutil.copy(SUITES / "test_dispatch.py", script.project.path / "test_suite.py")
    return script


@pytest.fixture
def recorded(suite):
    suite.record("nvfp4", [run()])
    return suite


# ---- what moved ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("after", "line"),
    [
        ({"a: eager": 240, "b: cuda": 8}, "a: cuda -> eager, 240 calls"),
        ({"a: eager": 1200, "b: cuda": 8}, "a: cuda, 240 calls -> eager, 1,200 calls"),
        ({"a: cuda": 248, "b: cuda": 8}, "a: cuda, 240 -> 248 calls (+8)"),
        ({"a: cuda": 1, "b: cuda": 8}, "a: cuda, 240 -> 1 call (-239)"),
        ({"b: cuda": 8}, "a: cuda, 240 calls -> absent"),
        ({"a: cuda": 240, "b: cuda": 8, "c: torch": 3}, "c: absent -> torch, 3 calls"),
        (
            {"a: cuda": 200, "a: eager": 40, "b: cuda": 8},
            "a: cuda, 240 calls -> cuda, 200 calls and eager, 40 calls",
        ),
    ],
)
def test_each_kind_of_move_reads_as_one_line(after, line) -> None:
    before = {"a: cuda": 240, "b: cuda": 8}
    assert moves(before, after) == (line,)
    judgement = judge_exact(after, before)
    assert judgement.outcome == "changed"
    assert judgement.notes == (line,)


def test_what_stayed_does_not_blur_what_moved() -> None:
    before = {"linear: plain": 16, "linear: quantised-activations": 216}
    after = {"linear: plain": 16, "linear: dequantised": 216}
    assert moves(before, after) == ("linear: quantised-activations -> dequantised, 216 calls",)
    assert moves(before, before) == ()


def test_counts_that_are_no_map_of_calls_read_as_before() -> None:
    assert judge_exact({"plain": 3}, {"plain": 2}).notes == ("plain: 2 -> 3 (+1)",)


def test_an_empty_map_is_no_measurement_and_no_baseline() -> None:
    with pytest.raises(MeasurementError, match="counts nothing"):
        judge_exact({}, MAP)
    with pytest.raises(BaselineError, match="counts nothing"):
        judge_exact(MAP, {})


# ---- the suite -------------------------------------------------------------------


def test_the_same_map_passes(recorded) -> None:
    recorded(nvfp4=[run()])
    recorded.run("nvfp4").assert_outcomes(passed=2)


def test_a_backend_that_changed_fails_with_the_arrow(recorded) -> None:
    recorded(nvfp4=[run(dispatch=without("scaled_mm_nvfp4: cuda", **{"scaled_mm_nvfp4: eager": 240}))])
    done = recorded.run("nvfp4")
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["*CHANGED*scaled_mm_nvfp4: cuda -> eager, 240 calls*"])


def test_a_count_that_changed_fails(recorded) -> None:
    recorded(nvfp4=[run(dispatch={**MAP, "rms_rope: cuda": 1200})])
    done = recorded.run("nvfp4")
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["*rms_rope: cuda, 1,240 -> 1,200 calls (-40)*"])


def test_a_layer_that_dequantised_fails_without_any_baseline(suite) -> None:
    lost = {f"layers.{index}.attention.qkv": 8 for index in range(30)}
    told = without("linear: quantised-activations", **{"linear: dequantised": 240, "scaled_mm_nvfp4: dequantised": 240})
    suite(nvfp4=[run(dispatch=told, dequantised=lost)])
    done = suite.run("nvfp4", "-k", "quantised_layers")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "nvfp4 quantised_layers: DEQUANTISED  measured 240",
            "*linear: dequantised, 240 calls",
            "*scaled_mm_nvfp4: dequantised, 240 calls",
            "*layers.0.attention.qkv: 8 calls",
            "*and 22 more layers",
        ]
    )


def test_such_a_run_never_becomes_a_baseline(suite) -> None:
    suite(nvfp4=[run(dequantised={"layers.0.attention.qkv": 8})])
    done = suite.run("nvfp4", "--update-baselines", "--update-reason", "no", "-k", "test_dispatch")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*1 layers dequantised instead of computing quantised: layers.0.attention.qkv*"])
    assert not (suite.project.path / PORTABLE).exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dispatch": {}}, "the traced image called nothing"),
        ({"dispatch": {"rms_rope: cuda": 5}}, "the trace saw no linear at all"),
        (
            {"dispatch": {"linear: plain": 64}},
            "30 layers compute quantised and 0 such calls were seen",
        ),
        (
            {"dispatch": {"linear: plain": 64, "linear: quantised-activations": 80, "linear: not observed": 20}},
            "could not tell how 20 of its linears computed",
        ),
        (
            {"dispatch": {"linear: compiled": 38, "compiled: modules": 30, "quantize_nvfp4: cuda": 240}},
            "30 layers compute quantised and compiled graphs made 0 products",
        ),
    ],
)
def test_a_trace_that_cannot_tell_fails_and_is_not_skipped(suite, changes, told) -> None:
    suite(nvfp4=[run(**changes)])
    done = suite.run("nvfp4", "-k", "quantised_layers")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([f"*{told}*"])


@pytest.mark.parametrize(
    "changes",
    [
        {"compute": {"plain": 8, "weight-only": 30}, "dispatch": {"linear: plain": 64, "linear: weight-only": 240}},
        {"dispatch": {"linear: compiled": 38, "compiled: modules": 30, "scaled_mm_fp8: torch": 240}},
    ],
)
def test_layers_that_do_as_they_say_pass(suite, changes) -> None:
    suite(nvfp4=[run(**changes)])
    suite.run("nvfp4", "-k", "quantised_layers").assert_outcomes(passed=1)


def test_an_engine_that_does_not_trace_is_skipped_by_name(suite) -> None:
    suite(nvfp4=[run(dispatch=None)])
    done = suite.run("nvfp4", "-rs")
    done.assert_outcomes(skipped=2)
    done.stdout.fnmatch_lines(["*zimage dispatch: diffusers does not report dispatch*"])


def test_a_map_that_was_recorded_and_is_no_more_is_an_error(recorded) -> None:
    recorded(nvfp4=[run(dispatch=None)])
    done = recorded.run("nvfp4")
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["*dispatch has a baseline, but this run cannot say it*"])


# ---- what explains a time ----------------------------------------------------------


def test_a_changed_time_is_explained_by_what_moved(script) -> None:
    script.project.makepyfile(
        test_suite="""
        def test_both(zimage):
            zimage.gate(zimage.dispatch(), zimage.warm_latency())
        """
    )
    quiet = [{**one, "dispatch": MAP, "compute": COMPUTE} for one in script.QUIET]
    script.record("nvfp4", quiet)
    slow = without("scaled_mm_nvfp4: cuda", **{"scaled_mm_nvfp4: eager": 240})
    script(nvfp4=[{**one, "rounds": [2 * one["rounds"][0]], "dispatch": slow} for one in quiet])
    text = script.run("nvfp4").stdout.str()
    slower = text[text.index("warm latency: SLOWER") :]
    assert "  dispatch    scaled_mm_nvfp4: cuda -> eager, 240 calls\n" in slower


def test_a_changed_time_with_the_same_map_says_so(script) -> None:
    script.project.makepyfile(
        test_suite="""
        def test_map(zimage):
            zimage.gate(zimage.dispatch())

        def test_time(zimage):
            zimage.gate(zimage.warm_latency())
        """
    )
    quiet = [{**one, "dispatch": MAP} for one in script.QUIET]
    script.record("nvfp4", quiet)
    script(nvfp4=[{**one, "rounds": [2 * one["rounds"][0]]} for one in quiet])
    done = script.run("nvfp4")
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["  dispatch    the same operations on the same backends as in the baseline's map"])


# ---- the option ----------------------------------------------------------------------


@pytest.mark.parametrize("value", ["dispatch", "dispatch=", "dispatch=+5%", "dispatch=eager"])
def test_other_faults_of_dispatch_are_usage_errors(suite, value) -> None:
    done = suite.run("nvfp4", "--zimage-inject", value)
    assert done.ret == pytest.ExitCode.USAGE_ERROR
    assert suite.ran == []


@pytest.mark.parametrize("fault", ["fallback", "dequantise"])
def test_the_real_worker_refuses_a_fault_that_a_cpu_cannot_have(project, fault) -> None:
    shutil.copy(SUITES / "test_dispatch.py", project.path / "test_suite.py")
    done = project.runpytest_subprocess(
        "--zimage-config", "nvfp4", "--zimage-rounds", "1", "--zimage-inject", f"dispatch={fault}"
    )
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines([f"*dispatch={fault}: *"])


def test_the_real_worker_traces_once_a_run(project, results) -> None:
    shutil.copy(SUITES / "test_dispatch.py", project.path / "test_suite.py")
    baselines = project.path / "baselines"
    record = ("--zimage-config", "nvfp4", "--zimage-rounds", "1", "--zimage-runs", "1")
    done = project.runpytest_subprocess(*record, "--update-baselines", "--update-reason", "first")
    done.assert_outcomes(passed=2)
    assert '"dispatch"' in next(baselines.rglob("nvfp4.json")).read_text()
    project.runpytest_subprocess(*record).assert_outcomes(passed=2)
    (run_,) = results()["runs"]
    assert run_["dispatch"]["linear: weight-only"] % run_["rounds"][0]["forwards"] == 0
    assert run_["dequantised"] == {}
