"""A baseline that cannot be trusted fails its own tests, by name, and nobody else's."""

from __future__ import annotations

import json
import shlex

import pytest

SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())
"""
PATH = ".zimage/baselines/cpu/diffusers-synthetic-tiny-turbo-tiny/nvfp4.json"
METRIC = "metrics.warm_latency"
FIRST = f"{METRIC}.runs[0].rounds[0]"


@pytest.fixture
def recorded(script):
    script.project.makepyfile(test_suite=SUITE)
    script.record("bf16,nvfp4", script.QUIET)
    script(default=script.QUIET)
    return script


def change(*keys: object, value: object):
    def changed(text: str) -> str:
        document = node = json.loads(text)
        for key in keys[:-1]:
            node = node[key]
        node[keys[-1]] = value
        return json.dumps(document)

    return changed


def leave_out(*keys: object):
    def changed(text: str) -> str:
        document = node = json.loads(text)
        for key in keys[:-1]:
            node = node[key]
        del node[keys[-1]]
        return json.dumps(document)

    return changed


ROUNDS = ("metrics", "warm_latency", "runs", 0, "rounds")


@pytest.mark.parametrize(
    ("damage", "says", "mend"),
    [
        (lambda text: text[: len(text) // 2], "not JSON: ", "--update-baselines"),
        (change("schema", value=99), "field 'schema': is 99, newer than 1", "pip install --upgrade pytest-zimage"),
        (change(*ROUNDS, 0, value=0), f"field '{FIRST}': is 0", "--update-baselines"),
        (change(*ROUNDS, 0, value=-1.0), f"field '{FIRST}': is -1.0", "--update-baselines"),
        (change(*ROUNDS, 0, value=float("nan")), f"field '{FIRST}': is nan", "--update-baselines"),
        (change(*ROUNDS, value=[]), f"field '{METRIC}.runs[0].rounds': is empty", "--update-baselines"),
        (leave_out(*ROUNDS), f"field '{METRIC}.runs[0]': *missing required field*rounds*", "--update-baselines"),
        (change("metrics", "warm_latency", "unit", value="bytes"), f"field '{METRIC}.unit'", "--update-baselines"),
        (leave_out("metrics", "warm_latency"), "field 'metrics': must be an object", "--update-baselines"),
        (change("key", "variant", value="bf16"), "field 'key.variant': is 'bf16'", "--update-baselines"),
    ],
)
def test_it_is_named_with_its_field_and_the_mend(recorded, results, damage, says, mend):
    path = recorded.project.path / PATH
    path.write_text(damage(path.read_text()))
    before = path.read_bytes()
    done = recorded.run("bf16,nvfp4")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(passed=1, failed=1)
    says = says.replace("[", "[[]").replace("[[]0]", "[[]0]")
    done.stdout.fnmatch_lines([f"{path}: {says}*", f"  mend: *{mend}*"])
    assert "Traceback" not in done.stdout.str()
    assert recorded.ran == ["bf16-1", "nvfp4-1"]
    data = results()
    assert [(error["variant"], error["kind"]) for error in data["errors"]] == [("nvfp4", data["errors"][0]["kind"])]
    assert data["errors"][0]["kind"] in ("BaselineError", "NewerSchemaError")
    assert [(verdict["variant"], verdict["verdict"]) for verdict in data["verdicts"]] == [("bf16", "PASS")]
    assert path.read_bytes() == before


def test_a_variant_missing_among_others_is_a_gap_and_not_a_beginning(recorded):
    (recorded.project.path / PATH).unlink()
    done = recorded.run("bf16,nvfp4")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(
        [f"*{PATH}: is missing, though the folder holds baselines of other variants", "  mend: record it: *"]
    )


def test_a_metric_missing_among_others_is_a_gap(recorded):
    recorded.project.makepyfile(test_suite=SUITE.replace("warm_latency", "cold_load"))
    done = recorded.run("bf16")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*bf16.json: has no metric 'cold_load'; it has warm_latency", "  mend: record it: *"])


def test_a_gap_is_recorded_by_the_options_that_it_tells(recorded):
    (recorded.project.path / PATH).unlink()
    told = next(line for line in recorded.run("bf16,nvfp4").outlines if "mend: record it: " in line)
    config, variant, *options = shlex.split(told.partition("record it: ")[2])
    assert (config, recorded.run(variant, *options).ret) == ("--zimage-config", 0)
    recorded.run("bf16,nvfp4").assert_outcomes(passed=2)


def test_the_mend_that_is_told_mends_it(recorded):
    path = recorded.project.path / PATH
    path.write_text("{")
    assert recorded.run("nvfp4").ret == pytest.ExitCode.TESTS_FAILED
    assert recorded.run("nvfp4", "--update-baselines", "--update-reason=again").ret == 0
    recorded.run("nvfp4").assert_outcomes(passed=1)
