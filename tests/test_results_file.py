"""The results file and its published schema."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import verdicts
from msgspec import structs
from verdicts import SLOWER, but

from pytest_zimage.baselines.update import UpdateResult
from pytest_zimage.engines.protocol import Loaded, Reported, Round
from pytest_zimage.engines.record import ColdLoad, RunRecord
from pytest_zimage.errors import ZImageError
from pytest_zimage.reports import results
from pytest_zimage.reports.results import ErrorRow, Results
from pytest_zimage.reports.schema import results_schema, schema_text

SCHEMA_FILE = Path(__file__).parents[1] / "docs" / "results.schema.json"
REQUIRED = (
    *("test", "variant", "metric", "unit", "verdict", "value", "baseline", "change", "interval"),
    *("band", "noise", "mde", "k_base", "k_new", "samples", "notes"),
)

VERDICT = but(SLOWER, notes=())
RUN = RunRecord(
    variant="nvfp4",
    index=0,
    engine="diffusers",
    model_set="synthetic-tiny",
    workload="turbo-tiny",
    device="cpu",
    rounds=(Round(0.1 + 0.2, {"step_1": 0.1}, 8, "ab"),),
    cold=ColdLoad(total_s=1.0, phases_s={"read": 0.5}, residency=None, emptied=False),
    memory=Reported(1, "VmHWM", 1, None, None, None),
    rss_idle_bytes=1,
    loaded=Loaded({"read": 0.5}, 0.5, {"nvfp4": 1}, {"nvfp4": 1}, {"plain": 1}),
    disk_bytes=1,
    environment={"torch": "2.11"},
)
RESULTS = verdicts.results(
    VERDICT,
    but(VERDICT, value={"a": 1}, baseline={"a": 2}, unit="count"),
    settings={"rounds": 10, "config": ["nvfp4"], "strict": False, "results": None},
    errors=(ErrorRow(test="t", variant="bf16", kind="EngineError", message="died", mend="look"),),
    runs=(RUN,),
    updates=(UpdateResult(variant="bf16", metric="warm_latency", unit="s", action="recorded", old=None, new=1.0),),
)


def written(tmp_path: Path, what: Results = RESULTS) -> dict:
    path = tmp_path / "deep" / "results.json"
    results.write(path, what)
    return json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"{text} in the file"))


def test_a_file_written_is_valid_and_complete(tmp_path):
    document = written(tmp_path)
    jsonschema.validate(document, results_schema(), cls=jsonschema.Draft202012Validator)
    assert document["schema"] == results.SCHEMA
    assert set(REQUIRED) <= set(document["verdicts"][0])
    assert document["errors"][0]["mend"] == "look"


def test_numbers_come_back_to_the_last_digit(tmp_path):
    path = tmp_path / "results.json"
    results.write(path, RESULTS)
    assert results.from_json(path.read_bytes()) == RESULTS


def test_published_schema_is_current():
    assert SCHEMA_FILE.read_text() == schema_text(), (
        "run: python -m pytest_zimage.reports.results --schema > docs/results.schema.json"
    )


def test_command_prints_the_schema():
    run = [sys.executable, "-m", "pytest_zimage.reports.results"]
    assert subprocess.run([*run, "--schema"], capture_output=True, text=True, check=True).stdout == schema_text()
    assert subprocess.run(run, check=False, capture_output=True, text=True).returncode == 2


def test_schema_requires_what_consumers_rely_on():
    verdict = results_schema()["$defs"]["Verdict"]
    assert set(REQUIRED) <= set(verdict["required"])
    assert "Smallest change" not in json.dumps(verdict["properties"]["test"])
    assert verdict["properties"]["samples"]["description"] == "Per new run its rounds, in the metric's unit."


@pytest.mark.parametrize("name", [*REQUIRED, "outcome"])
def test_schema_refuses_a_verdict_without(name, tmp_path):
    document = written(tmp_path)
    del document["verdicts"][0][name]
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(document, results_schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_null_and_told(bad, tmp_path):
    broken = but(
        VERDICT,
        value=bad,
        mde=bad,
        interval=(bad, 0.1),
        samples=((1.0, bad), (2.0,)),
        phases={"read": (bad, 1.0), "build": (None, 1.0)},
    )
    document = written(tmp_path, structs.replace(RESULTS, verdicts=(broken,)))
    jsonschema.validate(document, results_schema(), cls=jsonschema.Draft202012Validator)
    row = document["verdicts"][0]
    assert (row["value"], row["mde"], row["interval"]) == (None, None, None)
    assert row["samples"] == [[1.0], [2.0]]
    assert row["phases"] == {"build": [None, 1.0]}
    assert {note.split()[0] for note in row["notes"]} == {"value", "mde", "interval", "samples", "phases"}
    assert str(bad) in row["notes"][0]


def test_a_sound_verdict_is_not_touched():
    assert results.finite(VERDICT) is VERDICT


def test_write_replaces_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    path.write_text("old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(ZImageError, match="No space left") as error:
        results.write(path, RESULTS)
    assert str(path) in error.value.message
    assert error.value.mend
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]


def test_a_file_in_the_way_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ZImageError, match=r"file/results\.json"):
        results.write(tmp_path / "file" / "results.json", RESULTS)


@pytest.mark.parametrize("data", [b"", b"{}", b"not json", b'{"schema": 1}'])
def test_reading_something_else_is_an_error(data):
    with pytest.raises(ZImageError, match="not a results file"):
        results.from_json(data)


def test_reading_another_schema_is_an_error():
    with pytest.raises(ZImageError, match="schema 99"):
        results.from_json(results.to_json(structs.replace(RESULTS, schema=99)))


def test_parts_of_one_session_merge():
    second = structs.replace(RESULTS, started_at="2026-01-01T00:00:00+00:00", errors=(), runs=())
    merged = results.merge([RESULTS, second])
    assert (merged.started_at, merged.finished_at) == (second.started_at, RESULTS.finished_at)
    assert (len(merged.verdicts), len(merged.errors), len(merged.runs), len(merged.updates)) == (4, 1, 1, 2)
    assert results.merge([RESULTS]) == RESULTS
    with pytest.raises(ValueError, match="no results"):
        results.merge([])
