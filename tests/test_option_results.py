"""`--zimage-results`: one JSON file a session, whole and valid whatever happened."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

SCHEMA = json.loads((Path(__file__).parents[1] / "docs" / "results.schema.json").read_text(encoding="utf-8"))
VERDICT_FIELDS = {
    *("test", "variant", "metric", "unit", "verdict", "value", "baseline", "change", "interval"),
    *("band", "noise", "mde", "k_base", "k_new", "samples", "notes"),
}
SUITE = """
def test_times(zimage):
    zimage.gate(zimage.warm_latency(), zimage.cold_load())

def test_files(zimage):
    zimage.gate(zimage.disk_bytes(), zimage.weight_bytes())
"""


def read(path: Path) -> dict:
    data = json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda word: pytest.fail(f"{word} in {path}"))
    jsonschema.validate(data, SCHEMA)
    return data


def newest(script) -> Path:
    found = (script.project.path / ".zimage" / "results").glob("*.json")
    return max(found, key=lambda path: path.stat().st_mtime_ns)


def test_by_default_it_lies_in_the_work_folder(script):
    script(default=[{"rounds": [1.0]}])
    done = script.run("nvfp4")
    assert done.ret == 0
    data = read(newest(script))
    done.stdout.fnmatch_lines([f"results: {newest(script).relative_to(script.project.path)}"])
    assert set(data) >= {"schema", "environment", "verdicts", "errors"}
    assert data["schema"] == 1


@pytest.mark.parametrize("file", ["out.json", "deep/er/out.json"])
def test_the_file_asked_for(script, file):
    script(default=[{"rounds": [1.0]}])
    done = script.run("nvfp4", f"--zimage-results={file}")
    assert done.ret == 0
    done.stdout.fnmatch_lines([f"results: {file}"])
    assert len(read(script.project.path / file)["verdicts"]) == 1
    assert not (script.project.path / ".zimage" / "results").exists()


def test_where_it_lies_is_told_as_it_can_be_typed_where_pytest_was_started(script, monkeypatch):
    script(default=[{"rounds": [1.0]}])
    root = script.project.path
    elsewhere = script.project.mkdir("elsewhere")
    monkeypatch.chdir(elsewhere)
    script.run("nvfp4", str(root)).stdout.fnmatch_lines([f"results: {newest(script)}"])
    below = script.run("nvfp4", str(root), "--zimage-results=out.json")
    below.stdout.fnmatch_lines(["results: out.json"])
    assert read(elsewhere / "out.json")["verdicts"]


def test_a_file_from_an_earlier_session_is_replaced(script):
    path = script.project.path / "out.json"
    path.write_text("{ half of a")
    script(default=[{"rounds": [1.0]}])
    script.run("nvfp4", "--zimage-results=out.json")
    read(path)


def test_every_kind_of_verdict_has_every_field(script):
    script.project.makepyfile(test_suite=SUITE)
    script.record("bf16,nvfp4", script.QUIET)
    script(
        bf16=script.QUIET,
        nvfp4=[{"rounds": [1.2], "cold": 10.0, "weight_bytes": {"bfloat16": 999, "nvfp4": 1}}],
        fp8_scaled=[{"error": "EngineError", "message": "worker of fp8-scaled: was killed by SIGKILL"}],
    )
    done = script.run("bf16,nvfp4,fp8-scaled")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    data = read(newest(script))
    assert {"PASS", "SLOWER", "CHANGED"} == {verdict["verdict"] for verdict in data["verdicts"]}
    for verdict in data["verdicts"]:
        assert set(verdict) >= VERDICT_FIELDS
    (slower,) = [verdict for verdict in data["verdicts"] if verdict["verdict"] == "SLOWER"]
    assert slower["test"] == "test_suite.py::test_times[nvfp4]"
    assert (slower["variant"], slower["metric"], slower["unit"]) == ("nvfp4", "warm_latency", "s")
    assert slower["value"] == pytest.approx(1.2)
    assert slower["baseline"] == pytest.approx(1.0004, abs=1e-4)
    assert slower["interval"][0] < slower["change"] < slower["interval"][1]
    assert (slower["band"], slower["k_base"], slower["k_new"]) == (0.03, 5, 2)
    assert slower["samples"] == [[1.2] * 10] * 2
    assert 0 < slower["noise"] < slower["mde"]
    (changed,) = [verdict for verdict in data["verdicts"] if verdict["verdict"] == "CHANGED"]
    assert (changed["baseline"], changed["value"]) == ({"bfloat16": 1000}, {"bfloat16": 999, "nvfp4": 1})


def test_errors_are_there_with_their_mend(script):
    script.project.makepyfile(test_suite=SUITE + "\ndef test_own(zimage):\n    raise KeyError('mine')\n")
    script(default=[{"error": "CheckpointError", "message": "x.safetensors: truncated"}])
    script.run("nvfp4")
    errors = read(newest(script))["errors"]
    assert [(error["kind"], error["variant"]) for error in errors] == [
        ("CheckpointError", "nvfp4"),
        ("CheckpointError", "nvfp4"),
        ("KeyError", "nvfp4"),
    ]
    assert (errors[0]["message"], errors[0]["mend"]) == ("x.safetensors: truncated", "scripted mend")


def test_an_error_is_told_in_full_once_and_named_by_every_other_test_it_failed(script):
    script.project.makepyfile(test_suite=SUITE + "\ndef test_own(zimage):\n    raise KeyError('mine')\n")
    script(
        bf16=[{"error": "CheckpointError", "message": "x.safetensors: truncated"}],
        nvfp4=[{"error": "CheckpointError", "message": "y.safetensors: truncated"}],
    )
    done = script.run("bf16,nvfp4")
    done.assert_outcomes(failed=6)
    told = [line for line in done.outlines if line.endswith("truncated") and not line.startswith("FAILED")]
    assert told == ["x.safetensors: truncated", "y.safetensors: truncated"]
    assert [line for line in done.outlines if line.startswith("the same error as")] == [
        "the same error as test_times[bf16]",
        "the same error as test_times[nvfp4]",
    ]
    assert [error["message"] for error in read(newest(script))["errors"]].count("x.safetensors: truncated") == 2


def test_a_metric_that_cannot_be_judged_does_not_hide_the_others(script):
    """One gate, two metrics: the regression is told beside the error of the other."""
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    (local,) = [path for path in script.baselines if path.startswith(".zimage")]
    stored = json.loads((script.project.path / local).read_text())
    del stored["metrics"]["cold_load"]
    (script.project.path / local).write_text(json.dumps(stored))
    script(nvfp4=[{"rounds": [1.2]}])
    done = script.run("nvfp4")
    done.assert_outcomes(failed=1, passed=1)
    done.stdout.fnmatch_lines(["nvfp4 warm latency: SLOWER *", "*has no metric 'cold_load'*", "*mend: record it: *"])
    data = read(newest(script))
    assert [verdict["verdict"] for verdict in data["verdicts"]] == ["SLOWER", "PASS", "PASS"]
    assert [error["kind"] for error in data["errors"]] == ["BaselineError"]


def test_a_place_that_cannot_be_written_is_told_and_nothing_is_lost(script):
    (script.project.path / "file").write_text("in the way")
    script(default=[{"rounds": [1.0]}])
    done = script.run("nvfp4", "--zimage-results=file/out.json")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        [
            f"ERROR: {script.project.path}/file/out.json: results cannot be written: *",
            "  mend: give a writable file to --zimage-results",
            f"results: {newest(script).relative_to(script.project.path)}",
        ]
    )
    assert len(read(newest(script))["verdicts"]) == 1


def test_ctrl_c_keeps_what_was_measured(script):
    script.project.makeconftest(
        """
        from scripted import ScriptedEngine

        class Interrupted(ScriptedEngine):
            def run(self, plan, progress):
                if plan.variant.name == "nvfp4":
                    raise KeyboardInterrupt
                return super().run(plan, progress)

        def pytest_zimage_engines(config):
            return {"diffusers": lambda: Interrupted(config.rootpath)}
        """
    )
    script(default=[{"rounds": [1.0]}])
    done = script.run("bf16,nvfp4")
    assert done.ret == pytest.ExitCode.INTERRUPTED
    data = read(newest(script))
    assert [verdict["variant"] for verdict in data["verdicts"]] == ["bf16"]
    assert data["errors"] == []


def test_a_session_that_measured_nothing_leaves_no_file(script):
    script(default=[{"rounds": [1.0]}])
    script.run("nvfp4", "--collect-only")
    assert not (script.project.path / ".zimage" / "results").exists()


def test_letters_of_the_whole_world_survive(script):
    prompt = '古風水墨畫 一隻貓 "quoted" \U0001f408'
    (script.project.path / "mine.toml").write_text(
        "[workloads.ink]\n"
        + "".join(f"{key} = {value}\n" for key, value in {"width": 64, "height": 64, "steps": 2, "seed": 7}.items())
        + 'title = "墨"\nsampler = "euler"\nschedule = "simple"\nshift = 3.0\nguidance = 0.0\n'
        + f"prompt = {json.dumps(prompt, ensure_ascii=False)}\n",
        encoding="utf-8",
    )
    script.project.makeconftest(
        """
        from scripted import ScriptedEngine

        class Telling(ScriptedEngine):
            def run(self, plan, progress):
                plan.environment["prompt"] = plan.workload.prompt
                return super().run(plan, progress)

        def pytest_zimage_engines(config):
            return {"diffusers": lambda: Telling(config.rootpath)}
        """
    )
    script(default=[{"rounds": [1.0]}])
    done = script.run("nvfp4", "--zimage-catalog=mine.toml", "--zimage-workload=ink")
    assert done.ret == 0
    assert read(newest(script))["environment"]["prompt"] == prompt
