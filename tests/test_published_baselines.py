"""The GB10 baselines that the project ships: readable, as printed, and able to judge."""

import json
import math
from pathlib import Path

import pytest

from pytest_zimage.baselines import published
from pytest_zimage.baselines.compare import compare
from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.store import BaselineStore
from pytest_zimage.catalog import load_catalog
from pytest_zimage.verdict.metrics import Sample
from pytest_zimage.verdict.words import word

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()
GB10 = CATALOG.device("gb10")
GIB = 2**30
SOURCE = "Z-Image Turbo part 1: choosing the right config"
PRINTED = {
    "bf16": (7.55, 0.01, 60.9, 21.62, 20.64),
    "fp8-cast": (8.27, 0.1, 47.2, 21.62, 20.63),
    "fp8-cast-fast": (8.45, 0.01, 24.6, 21.68, 20.69),
    "fp8-scaled": (8.19, 0.04, 21.4, 15.95, 14.97),
    "nvfp4": (5.5, 0.07, 12.5, 14.75, 13.76),
    "nvfp4-fp8e": (5.52, 0.1, 16.3, 12.5, 11.52),
}
"""Warm mean and standard deviation of 10 images, cold load, peak RSS and working set in GiB."""


@pytest.fixture
def store(tmp_path):
    return BaselineStore(ROOT / "baselines", tmp_path, catalog=CATALOG, machine="here")


def key(variant, engine="comfyui"):
    return Key(device="gb10", engine=engine, model_set="official", workload="turbo-1024", variant=variant)


def judge_runs(store, variant, metric, runs, emptied=None):
    stored = store.find(key(variant), metric).metric
    samples = [Sample(rounds=tuple(rounds), emptied=emptied) for rounds in runs]
    row = CATALOG.metrics[metric]
    got = compare(row, samples, stored, device=GB10)
    return word(got.outcome, row), got


def test_there_is_one_for_each_variant_of_part_1_and_no_other():
    folder = ROOT / "baselines" / key("bf16").folder()
    part1 = {variant.name for variant in CATALOG.select(["@part1"])}
    assert {path.stem for path in folder.iterdir()} == part1 == set(PRINTED)


@pytest.mark.parametrize("variant", PRINTED)
def test_figures_are_as_printed(store, variant):
    mean, std, cold, peak, working_set = PRINTED[variant]
    warm = store.find(key(variant), "warm_latency")
    assert (warm.metric.published.n, warm.metric.published.mean, warm.metric.published.std) == (10, mean, std)
    assert warm.baseline.provenance.kind == "published"
    assert warm.baseline.provenance.source == SOURCE
    environment = warm.baseline.environment
    assert (environment["comfyui"], environment["torch"], environment["comfy-kitchen"]) == (
        "0.20.1",
        "2.10.0+cu130",
        "0.2.8",
    )
    once = {name: store.find(key(variant), name).metric.published for name in ("cold_load", "rss_peak", "working_set")}
    assert {summary.n for summary in once.values()} == {1}
    assert once["cold_load"].mean == cold
    assert once["rss_peak"].mean == pytest.approx(peak * GIB, abs=1)
    assert once["working_set"].mean == pytest.approx(working_set * GIB, abs=1)
    assert "disk_bytes" not in warm.baseline.metrics


@pytest.mark.parametrize("variant", PRINTED)
def test_a_machine_that_draws_as_printed_passes_at_once(store, variant):
    mean, _, cold, peak, working_set = PRINTED[variant]
    assert judge_runs(store, variant, "warm_latency", [[mean] * 10])[0] == "PASS"
    assert judge_runs(store, variant, "cold_load", [[cold]], emptied=True)[0] == "PASS"
    assert judge_runs(store, variant, "rss_peak", [[peak * GIB]])[0] == "PASS"
    assert judge_runs(store, variant, "working_set", [[working_set * GIB]])[0] == "PASS"


@pytest.mark.parametrize("variant", PRINTED)
def test_a_machine_that_is_a_fifth_slower_or_bigger_fails(store, variant):
    mean, _, cold, peak, _ = PRINTED[variant]
    said, got = judge_runs(store, variant, "warm_latency", [[mean * 1.2] * 10] * 2)
    assert (said, got.wants_more, got.change) == ("SLOWER", False, pytest.approx(0.2))
    assert judge_runs(store, variant, "rss_peak", [[peak * GIB * 1.2]] * 2)[0] == "BIGGER"
    assert judge_runs(store, variant, "cold_load", [[cold * 2]] * 2, emptied=True)[0] == "SLOWER"


def test_nvfp4_at_bf16_speed_is_slower_and_bf16_at_nvfp4_speed_faster(store):
    assert judge_runs(store, "nvfp4", "warm_latency", [[7.55] * 10] * 2)[0] == "SLOWER"
    assert judge_runs(store, "bf16", "warm_latency", [[5.5] * 10] * 2)[0] == "FASTER"


def test_a_cold_load_from_a_warm_cache_is_not_held_against_the_published_one(store):
    assert judge_runs(store, "nvfp4", "cold_load", [[3.0]], emptied=False)[0] == "UNFIT"


def test_another_engine_is_shown_the_published_figure(store):
    reference = store.published_reference(key("nvfp4", engine="diffusers"), "warm_latency")
    assert (reference.published.mean, reference.engine, reference.source) == (5.5, "comfyui", SOURCE)


def table():
    return {
        "title": "a table",
        "engine": "comfyui",
        "hardware": "a box",
        "stack": {"comfy_kitchen": "0.2.8"},
        "variants": {
            "bf16": {
                "warm_s": {"n": 10, "mean": 7.55, "std": 0.01, "min": 7.54, "max": 7.57},
                "cold_s": 60.9,
                "rss_peak_gb": 21.62,
                "working_set_gb": 20.64,
            }
        },
    }


def test_the_script_writes_what_the_store_reads(tmp_path, capsys):
    source = tmp_path / "table.json"
    source.write_text(json.dumps(table()))
    assert published.main([str(source), str(tmp_path / "out"), "--recorded-at", "2026-01-31"]) == 0
    store = BaselineStore(tmp_path / "out", tmp_path / "local", catalog=CATALOG, machine="here")
    found = store.find(key("bf16"), "rss_peak")
    assert found.metric.published.mean == math.floor(21.62 * GIB + 0.5)
    assert found.baseline.environment == {"comfy-kitchen": "0.2.8", "hardware": "a box"}
    assert str(found.path) in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_the_script_refuses_another_file(tmp_path, capsys, text):
    source = tmp_path / "table.json"
    source.write_text(text)
    assert published.main([str(source), str(tmp_path / "out"), "--recorded-at", "2026-01-31"]) == 1
    assert str(source) in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
