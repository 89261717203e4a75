"""A baseline file that cannot be trusted is an error naming file, field and mend; never a default."""

import json
from pathlib import Path

import pytest
from documents import changed

from pytest_zimage.baselines.reading import NewerSchemaError, parse_baseline
from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.writing import to_bytes
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import BaselineError

METRICS = load_catalog().metrics
KEY = Key(device="h200", engine="diffusers", model_set="official", workload="turbo-1024", variant="nvfp4")
PATH = Path("baselines") / KEY.path()
SOUND = {
    "schema": 1,
    "key": {
        "device": "h200",
        "engine": "diffusers",
        "model_set": "official",
        "workload": "turbo-1024",
        "variant": "nvfp4",
    },
    "provenance": {"kind": "measured"},
    "reason": "first recording",
    "recorded_at": "2026-01-31T12:00:00+00:00",
    "environment": {"torch": "2.11.0"},
    "metrics": {
        "warm_latency": {
            "unit": "s",
            "runs": [
                {"rounds": [1.0, 1.1], "recorded_at": "2026-01-31", "phases": {"vae_decode": 0.1}},
                {"rounds": [1.0], "recorded_at": "2026-01-31"},
            ],
            "band": {"relative": 0.03},
        },
        "cold_load": {"unit": "s", "published": {"n": 3, "mean": 12.5, "std": 0.2, "min": 12.0, "max": 13.0}},
        "disk_bytes": {"unit": "bytes", "direction": "equal", "exact": 4_510_000_000},
        "weight_bytes": {"unit": "bytes", "direction": "equal", "exact": {"nvfp4": 100}},
    },
}


def parse(document):
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    return parse_baseline(data, PATH, KEY, METRICS)


def test_sound_file_is_read_whole():
    baseline = parse(SOUND)
    assert set(baseline.metrics) == set(SOUND["metrics"])
    assert baseline.metrics["warm_latency"].runs[0].rounds == (1.0, 1.1)
    assert baseline.metrics["weight_bytes"].exact == {"nvfp4": 100}


def test_written_and_read_again_it_is_the_same_to_the_byte():
    first = to_bytes(parse(SOUND))
    assert to_bytes(parse(first)) == first
    assert first.endswith(b"}\n")
    assert list(json.loads(first)) == sorted(SOUND)


@pytest.mark.parametrize("value", [0.1, 1 / 3, 5.5, 1e-9, 123456789012345.0, 0.1 + 0.2])
def test_floats_survive_exactly(value):
    again = parse(to_bytes(parse(changed(SOUND, "metrics.warm_latency.runs.0.rounds", [value]))))
    assert again.metrics["warm_latency"].runs[0].rounds == (value,)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe", b"<<<<<<< HEAD\n{}", b"not json", b"{} {}", b"[" * 100_000], ids=range(7)
)
def test_not_json(data):
    with pytest.raises(BaselineError, match="not JSON") as caught:
        parse(data)
    assert str(PATH) in caught.value.message
    assert "--update-baselines" in caught.value.mend


@pytest.mark.parametrize("document", [[], 1, None, "x"])
def test_json_that_is_no_object(document):
    with pytest.raises(BaselineError, match="not a JSON object"):
        parse(document)


def test_newer_schema_says_to_upgrade():
    with pytest.raises(NewerSchemaError, match="newer than 1") as caught:
        parse({**SOUND, "schema": 2, "invented_later": True})
    assert "upgrade" in caught.value.mend


RUN = "metrics.warm_latency.runs.0"
NUMBERS = [
    (f"{RUN}.rounds.1", "metrics.warm_latency.runs[0].rounds[1]"),
    ("metrics.cold_load.published.mean", "metrics.cold_load.published.mean"),
    ("metrics.cold_load.published.min", "metrics.cold_load.published.min"),
]


@pytest.mark.parametrize(("where", "named"), NUMBERS)
@pytest.mark.parametrize("bad", [0, -1.5, float("nan"), float("inf"), float("-inf")])
def test_numbers_that_no_measurement_leaves(where, named, bad):
    with pytest.raises(BaselineError) as caught:
        parse(changed(SOUND, where, bad))
    assert f"{PATH}: field {named!r}" in caught.value.message
    assert caught.value.mend


def test_a_number_too_large_for_a_float_is_infinite():
    data = json.dumps(changed(SOUND, f"{RUN}.rounds.1", 77777)).encode().replace(b"77777", b"1e999")
    with pytest.raises(BaselineError, match=r"rounds\[1\]"):
        parse(data)


@pytest.mark.parametrize(
    ("where", "value", "named"),
    [
        ("schema", ..., "schema"),
        ("schema", 0, "schema"),
        ("schema", "1", "schema"),
        ("schema", True, "schema"),
        ("metrics", ..., "metrics"),
        ("metrics", {}, "metrics"),
        ("metrics", [], "metrics"),
        ("key.device", "gb10", "key.device"),
        ("key.variant", "bf16", "key.variant"),
        ("key.workload", ..., "key"),
        ("reason", " ", "reason"),
        ("recorded_at", ..., "top level"),
        ("extra", 1, "top level"),
        ("environment.torch", 2, "environment"),
        ("provenance.kind", "guessed", "provenance.kind"),
        ("metrics.speed", {"unit": "s", "published": {"n": 1, "mean": 1.0}}, "metrics.speed"),
        ("metrics.warm_latency.unit", "bytes", "metrics.warm_latency.unit"),
        ("metrics.warm_latency.unit", "ms", "metrics.warm_latency.unit"),
        ("metrics.warm_latency.unit", ..., "metrics.warm_latency"),
        ("metrics.warm_latency.direction", "equal", "metrics.warm_latency.direction"),
        ("metrics.disk_bytes.direction", ..., "metrics.disk_bytes.direction"),
        ("metrics.warm_latency.runs", [], "metrics.warm_latency"),
        ("metrics.warm_latency.runs", ..., "metrics.warm_latency"),
        ("metrics.warm_latency.exact", 5, "metrics.warm_latency"),
        ("metrics.warm_latency.published", {"n": 1, "mean": 1.0}, "metrics.warm_latency"),
        ("metrics.warm_latency.tolerance", 0.1, "metrics.warm_latency"),
        (f"{RUN}.rounds", [], "metrics.warm_latency.runs[0].rounds"),
        (f"{RUN}.rounds", ..., "metrics.warm_latency.runs[0]"),
        (f"{RUN}.rounds.0", "1.0", "metrics.warm_latency.runs[0].rounds[0]"),
        (f"{RUN}.rounds.0", None, "metrics.warm_latency.runs[0].rounds[0]"),
        (f"{RUN}.phases.vae_decode", -0.1, "metrics.warm_latency.runs[0].phases.vae_decode"),
        ("metrics.warm_latency.band.relative", 0, "metrics.warm_latency.band.relative"),
        ("metrics.warm_latency.band.relative", 3, "metrics.warm_latency.band.relative"),
        ("metrics.warm_latency.band.absolute", float("nan"), "metrics.warm_latency.band.absolute"),
        ("metrics.cold_load.published.n", 0, "metrics.cold_load.published.n"),
        ("metrics.cold_load.published.std", -0.1, "metrics.cold_load.published.std"),
        ("metrics.cold_load.published.mean", 14.0, "metrics.cold_load.published.mean"),
        ("metrics.cold_load.published.mean", ..., "metrics.cold_load.published"),
        ("metrics.disk_bytes.exact", 0, "metrics.disk_bytes.exact"),
        ("metrics.disk_bytes.exact", 1.5, "metrics.disk_bytes.exact"),
        ("metrics.weight_bytes.exact", {}, "metrics.weight_bytes.exact"),
        ("metrics.weight_bytes.exact", {"nvfp4": 0}, "metrics.weight_bytes.exact.nvfp4"),
        ("metrics.disk_bytes", {"unit": "bytes", "published": {"n": 1, "mean": 1.0}}, "metrics.disk_bytes.published"),
    ],
)
def test_every_mistake_names_its_field(where, value, named):
    with pytest.raises(BaselineError) as caught:
        parse(changed(SOUND, where, value))
    assert caught.value.message.startswith(f"{PATH}: field {named!r}: ")
    assert caught.value.mend


def test_a_field_that_is_there_twice_is_refused():
    data = json.dumps(SOUND).encode().replace(b'"schema": 1', b'"schema": 1, "schema": 1')
    with pytest.raises(BaselineError, match="'schema': is there twice"):
        parse(data)


def test_environment_of_a_metric_recorded_at_another_time():
    baseline = parse(changed(SOUND, "metrics.disk_bytes.environment", {"torch": "2.10.0", "driver": "580"}))
    assert baseline.environment_of("disk_bytes") == {"torch": "2.10.0", "driver": "580"}
    assert baseline.environment_of("warm_latency") == {"torch": "2.11.0"}
    absent = parse(changed(SOUND, "metrics.disk_bytes.environment", {"torch": ""}))
    assert absent.environment_of("disk_bytes") == {}
