"""pytest-benchmark records the rounds that the worker measured, and does not decide anything."""

from __future__ import annotations

import json

import pytest

ROUNDS = [0.1 + 0.2, 1.000_000_000_000_000_2, 5.503_123_456_789_012, 1 / 3, 0.987_654_321_012_345_6]


@pytest.fixture
def measured(script):
    script(default=[{"rounds": ROUNDS}])
    return script


def test_the_rounds_are_there_to_the_digit(measured, results):
    done = measured.run("bf16,nvfp4", "--benchmark-json=out.json", "--zimage-rounds=5")
    assert done.ret == 0
    rows = json.loads((measured.project.path / "out.json").read_text())["benchmarks"]
    assert [row["name"] for row in rows] == ["test_warm_latency[bf16]", "test_warm_latency[nvfp4]"]
    for row in rows:
        assert row["stats"]["data"] == ROUNDS
        assert row["stats"]["rounds"] == 5
        assert row["group"] == "turbo-tiny cpu"
    assert rows[1]["extra_info"]["variant"] == "nvfp4"
    assert set(rows[1]["extra_info"]["phases_s"]) == {"text_encode", "step_1", "vae_decode"}
    assert [verdict["samples"] for verdict in results()["verdicts"]] == [[ROUNDS], [ROUNDS]]


@pytest.mark.parametrize(
    "arguments",
    [("-p", "no:benchmark"), ("--benchmark-disable",), ("--benchmark-skip",), ("-n", "2")],
    ids=" ".join,
)
def test_the_verdict_does_not_hang_on_it(script, results, arguments):
    script.record("nvfp4", script.QUIET)
    script(default=[{"rounds": [1.2]}])
    done = script.run("nvfp4", *arguments)
    done.assert_outcomes(failed=1)
    assert [verdict["verdict"] for verdict in results()["verdicts"]] == ["SLOWER"]


def test_a_regression_is_recorded_all_the_same(script):
    script.record("nvfp4", script.QUIET)
    script(default=[{"rounds": [1.2]}])
    script.run("nvfp4", "--benchmark-json=out.json").assert_outcomes(failed=1)
    (row,) = json.loads((script.project.path / "out.json").read_text())["benchmarks"]
    assert row["stats"]["data"] == [1.2] * 10
