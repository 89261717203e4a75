"""UNFIT in the test's own report: named, never a pass, never a regression, never a baseline."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET

import pytest

from conftest import TIMED

SUITE = f"""{TIMED}
def test_memory(zimage):
    zimage.gate(zimage.rss_peak())
"""
JUDGED = """
[devices.cpu]
title = "CPU, judged as a GPU is"
stored_timings = false
"""
"""A table without `fitness` has the limits of a GPU."""
HOT = {"throttle": ["thermal throttle"], "sm_clock_mhz": 1005, "sm_clock_max_mhz": 1980, "temperature_c": 91}
CROWDED = {"processes": [{"pid": 4711, "name": "python", "bytes": 3_100_000_000}]}
QUIET = {"throttle": []}


def seen(before=QUIET, during=QUIET, after=QUIET, matmul=None, **more):
    """A run's fitness as the results file has it; `matmul` in TFLOP/s, before and after."""
    if matmul:
        before, after = ({**one, "canary": {"matmul_tflops": matmul, "copy_gb_s": 4000.0}} for one in (before, after))
    return {"before": before, "during": during, "after": after, **more}


def runs(fitness, spread=(1.000, 1.004, 0.997, 1.002, 0.999), **more):
    """Runs whose rounds take `spread`; one alone loads as the baseline does."""
    cold = [10 * x if len(spread) > 1 else 10.0 for x in spread]
    return [{"rounds": [x], "cold": y, "fitness": fitness, **more} for x, y in zip(spread, cold, strict=True)]


@pytest.fixture
def judged(script):
    """A project on a CPU that is judged as a GPU is, with a baseline of fit runs."""
    root = script.project.path
    script.project.makepyfile(test_suite=SUITE)
    (root / "own.toml").write_text(JUDGED)
    with (root / "tox.ini").open("a") as ini:
        ini.write("\nzimage_catalog = own.toml\n")
    script.record("nvfp4", runs(seen(matmul=790.0)))
    script(default=runs(seen(matmul=790.0), (1.0,)))
    return script


def update(script, *arguments):
    return script.run("nvfp4", "--update-baselines", "--update-reason", "why", *arguments)


def local(script):
    (data,) = [json.loads(data) for path, data in script.baselines.items() if path.startswith(".zimage")]
    return data


CASES = [
    (seen(during=HOT), "thermal throttle"),
    (seen(before=CROWDED), "another process holds 3.1 GB: pid 4711 python"),
    (seen(matmul=612.0), "matmul canary 612 TFLOP/s, 790 recorded (-23 %)"),
]


@pytest.mark.parametrize(("fitness", "reason"), CASES)
def test_it_is_skipped_by_its_own_word_and_names_the_reason(judged, results, fitness, reason):
    judged(default=runs(fitness, (1.2,)))
    done = judged.run("nvfp4", "--junitxml=out.xml")
    done.assert_outcomes(passed=2)
    done.stdout.fnmatch_lines(["test_suite.py U.. *", "[?] nvfp4 *warm_latency *UNFIT *", "=* 2 passed, 1 unfit in *"])
    assert f"  unfit: {reason} (nvfp4 warm_latency)" in done.stdout.str()
    (skipped,) = ET.parse(judged.project.path / "out.xml").getroot().iter("skipped")
    assert f"zimage UNFIT: nvfp4 warm latency: UNFIT: {reason}  1.00 s -> 1.20 s" in skipped.get("message")
    (verdict,) = [row for row in results()["verdicts"] if row["verdict"] == "UNFIT"]
    assert (verdict["metric"], verdict["outcome"], verdict["unfit"]) == ("warm_latency", "unfit", [reason])


@pytest.mark.parametrize("seconds", [1.0, 1.2, 0.8])
def test_it_is_neither_pass_nor_regression_nor_improvement_and_takes_no_further_run(judged, results, seconds):
    judged(default=runs(seen(during=HOT), (seconds,)))
    judged.run("nvfp4", "-k", "warm")
    assert [row["verdict"] for row in results()["verdicts"]] == ["UNFIT"]
    assert judged.ran == ["nvfp4-1"]


def test_strict_fails_it_with_what_was_read(judged):
    judged(default=runs(seen(during=HOT, matmul=700.0, waited_s=60.0, retried=True), (1.2,)))
    done = judged.run("nvfp4", "--zimage-strict", "-k", "warm")
    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [
            "nvfp4 warm latency: UNFIT: thermal throttle; matmul canary 700 TFLOP/s, 790 recorded (-11 %)  1.00 s -> *",
            "*The machine was not fit while this was timed, so nothing was concluded: this is not a pass.",
            "  machine     new run 1: SM clock 1,005 of 1,980 MHz, 91 C, thermal throttle; canary matmul 700 -> 700"
            " TFLOP/s, copy 4,000 -> 4,000 GB/s; waited 60 s, timed a second time",
            "  next        once it is quiet: *",
        ]
    )


def test_one_unfit_run_among_the_judged_is_enough(judged, results):
    judged(default=[*runs(seen(matmul=790.0), (1.05,)), *runs(seen(during=HOT), (1.0,))])
    judged.run("nvfp4", "-k", "warm")
    assert judged.ran == ["nvfp4-1", "nvfp4-2"]
    assert [row["verdict"] for row in results()["verdicts"]] == ["UNFIT"]


def test_a_cold_load_has_the_look_before_it(judged, results):
    judged(default=runs(seen(matmul=790.0), (1.0,), cold_fitness={"before": CROWDED}))
    judged.run("nvfp4").stdout.fnmatch_lines(["test_suite.py .U. *"])
    (verdict,) = [row for row in results()["verdicts"] if row["metric"] == "cold_load"]
    assert verdict["unfit"] == ["another process holds 3.1 GB: pid 4711 python"]


def test_memory_is_judged_all_the_same(judged, results):
    judged(default=runs(seen(during=HOT), (1.0,), rss_peak=4000 << 20))
    judged.run("nvfp4")
    words = {row["metric"]: row["verdict"] for row in results()["verdicts"]}
    assert words == {"warm_latency": "UNFIT", "cold_load": "PASS", "rss_peak": "BIGGER"}


def test_on_an_unfit_machine_nothing_is_offered_as_a_first_baseline(script):
    script.project.makepyfile(test_suite=SUITE)
    (script.project.path / "own.toml").write_text(JUDGED)
    script(default=runs(seen(during=HOT), (1.0,)))
    done = script.run("nvfp4", "--zimage-catalog", "own.toml")
    done.stdout.fnmatch_lines(["test_suite.py UNN *", "next: *--zimage-runs 3"])


def test_where_the_cpu_is_not_judged_the_readings_are_kept_and_no_more(script, results):
    script.record("nvfp4", script.QUIET)
    script(default=runs(seen(during=HOT, before={"host_load": 1.0}), (1.0,)))
    script.run("nvfp4").assert_outcomes(passed=1)
    assert results()["runs"][0]["fitness"]["before"]["host_load"] == 1.0


@pytest.mark.parametrize("fitness", [None, {"before": {}, "during": None, "after": None}])
def test_an_engine_or_machine_that_says_nothing_is_judged(judged, fitness):
    more = {} if fitness is None else {"fitness": fitness}
    judged(default=[{"rounds": [1.0], "cold": 10.0, **more}])
    judged.run("nvfp4").assert_outcomes(passed=3)


# ---- baselines -----------------------------------------------------------


def test_a_baseline_keeps_the_canary_of_its_runs(judged):
    stored = local(judged)["metrics"]
    assert [run["canary"] for run in stored["warm_latency"]["runs"]] == 5 * [
        {"copy_gb_s": 4000.0, "matmul_tflops": 790.0}
    ]
    assert "canary" not in stored["cold_load"]["runs"][0]
    assert "canary" not in stored["rss_peak"]["runs"][0]


def test_the_recorded_canary_is_the_median_of_the_runs(judged, results):
    judged(default=[*runs(seen(matmul=600.0), (1.0, 1.001)), *runs(seen(matmul=700.0), (0.999, 1.002, 1.0))])
    # Two of five are slow; recorded without a baseline to be held against.
    (path,) = [judged.project.path / path for path in judged.baselines if path.startswith(".zimage")]
    path.unlink()
    update(judged).assert_outcomes(passed=3)
    judged(default=runs(seen(matmul=650.0), (1.0,)))
    judged.run("nvfp4", "-k", "warm")
    assert results()["verdicts"][0]["unfit"] == ["matmul canary 650 TFLOP/s, 700 recorded (-7 %)"]


def test_another_torch_is_said_beside_the_canary(judged, results):
    judged(default=runs(seen(matmul=612.0), (1.0,), environment={"torch": "9.9"}))
    judged.run("nvfp4", "-k", "warm")
    (reason,) = results()["verdicts"][0]["unfit"]
    assert reason.startswith("matmul canary 612 TFLOP/s, 790 recorded (-23 %); torch 2.")
    assert reason.endswith(" when recorded, 9.9 now")


def test_a_file_of_before_there_was_a_canary_stays_valid(judged):
    (path,) = [judged.project.path / path for path in judged.baselines if path.startswith(".zimage")]
    data = json.loads(path.read_text())
    for run in data["metrics"]["warm_latency"]["runs"]:
        del run["canary"]
    path.write_text(json.dumps(data))
    judged(default=runs(seen(matmul=100.0), (1.0,)))
    judged.run("nvfp4").assert_outcomes(passed=3)


@pytest.mark.parametrize(
    ("canary", "field"),
    [
        ({"matmul_tflops": 0}, "runs[0].canary.matmul_tflops"),
        ({"matmul": 1}, "runs[0].canary"),
        ({"copy_gb_s": "x"}, ""),
    ],
)
def test_a_canary_that_cannot_be_is_refused_by_field(judged, canary, field):
    (path,) = [judged.project.path / path for path in judged.baselines if path.startswith(".zimage")]
    data = json.loads(path.read_text())
    data["metrics"]["warm_latency"]["runs"][0]["canary"] = canary
    path.write_text(json.dumps(data))
    done = judged.run("nvfp4", "-k", "warm")
    done.assert_outcomes(failed=1)
    assert f"{path}: field 'metrics.warm_latency" in done.stdout.str()
    assert field in done.stdout.str()


@pytest.mark.parametrize(("fitness", "reason"), CASES)
def test_an_update_refuses_what_was_timed_and_records_the_rest(judged, results, fitness, reason):
    before = local(judged)["metrics"]
    judged(default=runs(fitness, (2.0, 2.01, 1.99, 2.0, 2.0), rss_peak=4000 << 20))
    done = update(judged)
    done.assert_outcomes(failed=1, passed=2)
    assert f"unfit: {reason}" in done.stdout.str()
    after = local(judged)["metrics"]
    assert after["warm_latency"]["runs"] == before["warm_latency"]["runs"]
    assert after["rss_peak"]["runs"] != before["rss_peak"]["runs"]
    assert after["cold_load"]["runs"] != before["cold_load"]["runs"]
    actions = {row["metric"]: row["action"] for row in results()["updates"]}
    assert actions == {"warm_latency": "refused", "cold_load": "recorded", "rss_peak": "recorded"}


# ---- injected ------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "reason", "tests"),
    [
        ("throttle", "thermal throttle", "UUN"),
        ("canary:0.8", "matmul canary 100 TFLOP/s before and 80.0 after the rounds (-20 %)", "UNN"),
    ],
)
def test_anyone_can_see_it_with_the_real_worker_and_no_gpu(project, results, fault, reason, tests):
    project.makepyfile(test_suite=SUITE)
    arguments = ("--zimage-config=bf16", "--zimage-rounds=1", "--zimage-fit-wait=0.1")
    done = project.runpytest_subprocess(*arguments, f"--zimage-inject=fitness={fault}")
    assert done.ret == 0, done.stdout.str()
    done.stdout.fnmatch_lines(
        [f"test_suite.py {tests} *", f"  unfit: {reason.replace('[', '[[]')} (bf16 warm_latency*"]
    )
    (run,) = results()["runs"]
    assert run["fitness"]["waited_s"] + run["cold"]["fitness"]["waited_s"] == pytest.approx(0.1, rel=0.2)
    assert all(row["injected"] for row in results()["verdicts"])
    assert run["loaded"]["flops_per_image"] is None or "of this GPU" not in done.stdout.str()


def test_what_to_know_of_a_cold_load_stands_with_its_verdict(judged, results):
    """Of each run once, also where it passes."""
    note = "not a fresh process: what it held was dropped"
    judged(default=runs(seen(matmul=790.0), (1.0,), cold_notes=[note]))
    done = judged.run("nvfp4", "-k", "cold", "--zimage-runs=2")
    done.assert_outcomes(passed=1, deselected=2)
    done.stdout.fnmatch_lines([f"NOTE: cold load of nvfp4: {note}"])
    (verdict,) = results()["verdicts"]
    assert verdict["notes"].count(note) == 1
    judged(default=[{**run, "cold": 30.0} for run in runs(seen(matmul=790.0), (1.0,), cold_notes=[note])])
    judged.run("nvfp4", "-k", "cold").stdout.fnmatch_lines(["nvfp4 cold load *: SLOWER*", f"  notes * {note}"])
    assert note not in judged.run("nvfp4", "-k", "warm").stdout.str(), "nobody asked for it"
