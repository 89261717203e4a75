"""A baseline of other weights, or of another GPU of the same class."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture
def recorded(script):
    script.record("bf16,nvfp4", script.QUIET)
    script(default=[{"rounds": [1.0]}])
    return script


def baseline(script) -> Path:
    (path,) = (script.project.path / ".zimage" / "baselines" / "cpu").glob("*/bf16.json")
    return path


def rewrite(script, **environment: str) -> None:
    """Give the stored bf16 baseline another environment."""
    document = json.loads(baseline(script).read_text())
    document["environment"].update({key.replace("__", "."): value for key, value in environment.items()})
    baseline(script).write_text(json.dumps(document))


def test_other_weights_are_an_error_that_names_role_and_hashes(recorded, results):
    rewrite(recorded, weights__transformer="0123456789abcdef")
    done = recorded.run("bf16,nvfp4")
    done.assert_outcomes(passed=1, failed=1)
    (error,) = results()["errors"]
    now = results()["runs"][0]["environment"]["weights.transformer"]
    assert (error["variant"], error["kind"]) == ("bf16", "BaselineError")
    assert f"transformer 0123456789abcdef -> {now}" in error["message"]
    assert str(baseline(recorded)) in error["message"]
    assert "--zimage-config bf16 --update-baselines" in error["mend"]


def test_the_mend_that_is_told_mends_it(recorded):
    rewrite(recorded, weights__vae="0123456789abcdef")
    recorded(default=recorded.QUIET)
    done = recorded.run("bf16", "--update-baselines", "--update-reason", "other weights")
    assert done.ret == pytest.ExitCode.OK, done.stdout.str()
    recorded.run("bf16").assert_outcomes(passed=1)


def test_runs_with_other_weights_extend_nothing(recorded):
    rewrite(recorded, weights__text_encoder="0123456789abcdef")
    before = baseline(recorded).read_bytes()
    done = recorded.run("bf16", "--update-baselines", "--update-mode=extend", "--update-reason", "more")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*the stored runs had other weights: text_encoder*"])
    assert baseline(recorded).read_bytes() == before


def test_a_baseline_that_names_no_weights_is_judged(recorded):
    """As published ones do; what was not recorded is no difference."""
    document = json.loads(baseline(recorded).read_text())
    names = [key for key in document["environment"] if key.startswith("weights.")]
    assert len(names) == 3
    for key in names:
        del document["environment"][key]
    baseline(recorded).write_text(json.dumps(document))
    recorded.run("bf16").assert_outcomes(passed=1)


def test_the_same_weights_in_another_place_are_the_same(recorded, tiny, tmp_path):
    """Neither path nor time of a file is part of its identity."""
    import shutil

    copy = tmp_path / "copied"
    shutil.copytree(tiny, copy, copy_function=shutil.copyfile)
    recorded.run("bf16", f"--zimage-models={copy}").assert_outcomes(passed=1)


def test_another_gpu_of_the_class_is_told_at_the_end_and_in_the_delta(recorded, results):
    rewrite(recorded, device="NVIDIA H200 NVL")
    passing = recorded.run("bf16")
    passing.assert_outcomes(passed=1)
    passing.stdout.fnmatch_lines(["NOTE: baselines were recorded on NVIDIA H200 NVL, this is CPU*"])
    assert any("NVIDIA H200 NVL" in note for note in results()["notes"])
    recorded(bf16=[{"rounds": [1.3]}])
    recorded.run("bf16").stdout.fnmatch_lines(["*environment device: NVIDIA H200 NVL -> CPU"])


def test_the_same_machine_is_no_note(recorded, results):
    done = recorded.run("bf16")
    assert "NOTE" not in done.stdout.str()
    assert results()["notes"] == []
