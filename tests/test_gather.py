"""`python -m pytest_zimage.baselines.gather`: one baseline from the results files of several machines."""

from __future__ import annotations

import json

import pytest
import scipy.stats  # noqa: F401 - before pytester notes the modules: what it takes away again numpy refuses to load twice

from pytest_zimage.baselines.gather import main

SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())

def test_forwards(zimage):
    zimage.gate(zimage.forwards())
"""
H200 = "h200/diffusers-synthetic-tiny-turbo-tiny/bf16.json"


@pytest.fixture
def two_machines(script, results):
    """Results files of two machines, three runs each; the second GPU is 4 % slower."""
    script.project.makepyfile(test_suite=SUITE)

    def make(**change):
        files = []
        for gpu, speed in (("a", 1.0), ("b", 0.96)):
            script(default=[{"rounds": [s / speed], "cold": 10 * s} for s in (1.000, 1.004, 0.997)])
            script.run("bf16", "--zimage-runs=3")
            data = results()
            for run in data["runs"]:
                run["environment"] |= {"device_class": "h200", "device_id": gpu}
                canary = {"matmul_tflops": 800.0 * speed}
                run["fitness"] = {"before": {"canary": canary}, "after": {"canary": canary}}
            data["runs"][-1] |= change.get(gpu, {})
            path = script.project.path / f"{gpu}.json"
            path.write_text(json.dumps(data))
            files.append(str(path))
        return files

    return make


def gather(script, files, *more):
    folder = script.project.path / "gathered"
    status = main([*files, "--baselines", str(folder), "--reason", "two machines", *more])
    path = folder / H200
    if not path.is_file():
        return status, []
    return status, json.loads(path.read_text())["metrics"].get("warm_latency", {"runs": []})["runs"]


def test_runs_of_both_become_one_baseline(script, two_machines, capsys):
    status, runs = gather(script, two_machines())
    assert status == 0
    assert [run["device"] for run in runs] == ["a", "a", "a", "b", "b", "b"]
    assert "left out" not in capsys.readouterr().out


def test_a_run_of_an_unfit_machine_is_left_out_and_told(script, two_machines, capsys):
    unfit = {"fitness": {"before": {}, "reasons": ["thermal throttle"]}}
    status, runs = gather(script, two_machines(b=unfit))
    assert (status, len(runs)) == (0, 5)
    assert "left out: bf16 of 2026-01-01T00:00:00+00:00: thermal throttle" in capsys.readouterr().out


def test_a_figure_that_lies_far_out_is_left_out_and_the_run_counts_for_the_rest(script, two_machines, capsys):
    """The first process of a session has been seen with 50 MB more; its images are as fast as any."""
    files = two_machines()
    data = json.loads((script.project.path / "b.json").read_text())
    data["runs"][-1]["memory"]["rss_peak_bytes"] *= 2
    (script.project.path / "b.json").write_text(json.dumps(data))
    status, runs = gather(script, files)
    assert (status, len(runs)) == (0, 6)
    stored = json.loads((script.project.path / "gathered" / H200).read_text())["metrics"]
    counted = {name: len(stored[name]["runs"]) for name in ("warm_latency", "cold_load", "rss_peak", "working_set")}
    assert counted == {"warm_latency": 6, "cold_load": 6, "rss_peak": 5, "working_set": 5}
    assert "left out: rss_peak, working_set of bf16 of 2026-01-01" in capsys.readouterr().out


def test_one_metric_alone_leaves_the_others_as_they_are(script, two_machines):
    files = two_machines()
    path = script.project.path / "gathered" / H200
    assert gather(script, files, "--metric", "cold_load") == (0, [])
    assert set(json.loads(path.read_text())["metrics"]) == {"cold_load"}
    gather(script, files)
    before = json.loads(path.read_text())["metrics"]
    assert gather(script, files[:1], "--metric", "cold_load", "--mode", "extend")[0] == 0
    after = json.loads(path.read_text())["metrics"]
    assert len(after["cold_load"]["runs"]) == len(before["cold_load"]["runs"]) + 3
    assert {name: one | {"environment": {}} for name, one in after.items() if name != "cold_load"} == {
        name: one | {"environment": {}} for name, one in before.items() if name != "cold_load"
    }
    assert str(after["rss_peak"]).count(".0") == str(before["rss_peak"]).count(".0") > 0, "byte by byte"


def test_fewer_than_five_fit_runs_are_refused(script, two_machines, capsys):
    status, runs = gather(script, two_machines()[:1])
    assert (status, runs) == (1, [])
    assert "3 of at least 5 runs" in capsys.readouterr().out


def test_an_injected_fault_never_becomes_a_baseline(script, two_machines, capsys):
    status, runs = gather(script, two_machines(a={"inject": {"warm_latency": 0.05}}))
    assert (status, runs) == (1, [])
    assert "a fault was injected" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{}", "not json"])
def test_what_is_no_results_file_is_told(script, tmp_path, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert main([str(path), "--baselines", str(tmp_path), "--reason", "x"]) == 1
    assert "x.json: not a results file" in capsys.readouterr().err
