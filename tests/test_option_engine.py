"""`--zimage-engine` and the hook behind it: an engine of one's own, from a conftest file."""

from __future__ import annotations

import pytest

CONFTEST = """
from msgspec import structs
from pytest_zimage.errors import EngineError
from scripted import ScriptedEngine

class Unreachable(EngineError):
    pass

class Mine(ScriptedEngine):
    name = "mine"

    def run(self, plan, progress):
        record = super().run(plan, progress)
        if plan.variant.name == "bf16" and record.wall_s:
            {fault}
        return structs.replace(record, engine=self.name)

def pytest_zimage_engines(config):
    return {{"mine": lambda: Mine(config.rootpath), "diffusers": lambda: ScriptedEngine(config.rootpath)}}
"""
SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())

def test_forwards(zimage):
    zimage.gate(zimage.forwards())
"""


@pytest.fixture
def mine(script):
    def make(fault="pass"):
        script.project.makeconftest(CONFTEST.format(fault=fault))
        script.project.makepyfile(test_suite=SUITE)
        script(default=script.QUIET)
        return script

    return make


def test_it_draws_when_named_and_its_baselines_are_its_own(mine, results):
    script = mine()
    done = script.run("nvfp4", "--zimage-engine=mine", "--update-baselines", "--update-reason=first")
    assert done.ret == 0
    assert {run["engine"] for run in results()["runs"]} == {"mine"}
    assert sorted(script.baselines) == [
        ".zimage/baselines/cpu/mine-synthetic-tiny-turbo-tiny/nvfp4.json",
        "baselines/portable/mine-synthetic-tiny-turbo-tiny/nvfp4.json",
    ]
    script.run("nvfp4", "--zimage-engine=mine").assert_outcomes(passed=2)
    other = script.run("nvfp4")
    other.stdout.fnmatch_lines(["=* 2 without baseline in *"])


def test_the_ini_value_names_it_too(mine, results):
    script = mine()
    with (script.project.path / "tox.ini").open("a") as ini:
        ini.write("\nzimage_engine = mine\n")
    script.run("nvfp4")
    assert [run["engine"] for run in results()["runs"]] == ["mine"]


def test_an_unknown_one_lists_those_there_are(mine):
    result = mine().run("nvfp4", "--zimage-engine=mien")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(
        ["ERROR: unknown engine 'mien'", "  mend: engines here: comfyui, diffusers, mine, vllm-omni"]
    )


@pytest.mark.parametrize(
    ("fault", "kind", "says"),
    [
        ("raise EngineError('the server said 503', mend='start it')", "EngineError", "the server said 503"),
        ("raise Unreachable('no route', mend='start it')", "EngineError", "Unreachable: no route"),
    ],
)
def test_its_errors_are_those_of_the_variants_tests(mine, results, fault, kind, says):
    script = mine(fault)
    done = script.run("bf16,nvfp4", "--zimage-engine=mine")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert script.ran == ["bf16-1", "nvfp4-1"], "a run that failed is not made again"
    done.stdout.fnmatch_lines([f"{says}", "  mend: start it"])
    assert "Traceback" not in done.stdout.str()
    assert [(error["kind"], error["variant"]) for error in results()["errors"]] == [(kind, "bf16")] * 2


def test_a_fault_in_its_code_shows_where_once_and_is_not_repeated(mine, results):
    script = mine("raise ValueError('off by one')")
    done = script.run("bf16,nvfp4", "--zimage-engine=mine")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert script.ran == ["bf16-1", "nvfp4-1"]
    shown = done.stdout.str()
    assert shown.count("raise ValueError('off by one')") == 1
    assert "run 1 of bf16 ended with ValueError: off by one" in shown
    assert [error["kind"] for error in results()["errors"]] == ["ValueError", "EngineError"]
