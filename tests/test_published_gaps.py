"""What nobody printed is no gap of a recording: NO BASELINE. A gap in what was measured stays an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from conftest import LOCAL, TIMED
from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.store import Absent, BaselineStore, Found
from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import BaselineError

ROOT = Path(__file__).parents[1]
CATALOG = load_catalog()
PART1 = Key(device="gb10", engine="comfyui", model_set="official", workload="turbo-1024", variant="fp8-cast")


def named(variant: str) -> Key:
    return Key(**{**{field: getattr(PART1, field) for field in Key.__struct_fields__}, "variant": variant})


@pytest.fixture
def folder(tmp_path):
    """A copy of the shipped folder of part 1, to be damaged."""
    made = tmp_path / "baselines" / PART1.folder()
    made.mkdir(parents=True)
    for path in (ROOT / "baselines" / PART1.folder()).glob("*.json"):
        (made / path.name).write_bytes(path.read_bytes())
    return made


@pytest.fixture
def store(tmp_path, folder):
    return BaselineStore(tmp_path / "baselines", tmp_path / "local", catalog=CATALOG, machine="here")


def as_measured(path: Path) -> None:
    document = json.loads(path.read_text())
    document["provenance"] = {"kind": "measured"}
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("metric", ["lpips", "clip_score", "psnr", "device_peak", "gpu_process_peak"])
def test_a_figure_that_was_not_printed_is_absent_with_its_reason(store, metric):
    found = store.find(PART1, metric)
    assert isinstance(found, Absent)
    assert found.reason.startswith(f"the published table has no {metric} for fp8-cast (")


def test_a_variant_that_was_not_printed_is_absent_with_its_reason(store, folder):
    found = store.find(named("mxfp8"), "warm_latency")
    assert isinstance(found, Absent)
    assert found.reason == f"the published table has no mxfp8 ({folder})"


def test_what_was_printed_is_still_judged(store):
    assert isinstance(store.find(PART1, "warm_latency"), Found)


def test_one_measured_file_makes_a_missing_one_a_gap(store, folder):
    as_measured(folder / "nvfp4.json")
    with pytest.raises(BaselineError, match="is missing, though the folder holds baselines of other variants"):
        store.find(named("mxfp8"), "warm_latency")
    assert isinstance(store.find(PART1, "lpips"), Absent), "for what a file lacks, that file's provenance counts"
    with pytest.raises(BaselineError, match="has no metric 'device_peak'"):
        store.find(named("nvfp4"), "device_peak")


@pytest.mark.parametrize("damage", ["{", '{"schema": 1}', "[]"])
def test_a_broken_neighbour_excuses_nothing(store, folder, damage):
    (folder / "nvfp4.json").write_text(damage)
    with pytest.raises(BaselineError, match="is missing, though"):
        store.find(named("mxfp8"), "warm_latency")


def test_a_broken_published_file_is_an_error_and_not_absent(store, folder):
    (folder / "fp8-cast.json").write_text("{")
    with pytest.raises(BaselineError, match="not JSON"):
        store.find(PART1, "lpips")


# ---- as a user sees it -----------------------------------------------------------


@pytest.fixture
def published(script):
    """bf16 and nvfp4 have a warm latency; bf16's file says that it was printed."""
    script.record("bf16,nvfp4", script.QUIET)
    script.project.makepyfile(test_suite=TIMED)
    script(default=script.QUIET)
    path = script.project.path / LOCAL / "bf16.json"
    document = json.loads(path.read_text())
    document["provenance"] = {"kind": "published", "source": "a table"}
    path.write_text(json.dumps(document))
    return script


def test_it_is_no_baseline_and_strict_fails_it(published, results):
    done = published.run("bf16")
    done.assert_outcomes(passed=1, skipped=0)
    assert done.ret == 0
    done.stdout.fnmatch_lines(["=* 1 passed, 1 without baseline in *"])
    (row,) = [row for row in results()["verdicts"] if row["metric"] == "cold_load"]
    assert row["verdict"] == "NO BASELINE"
    assert row["notes"][0].startswith("the published table has no cold_load for bf16 (")
    assert published.run("bf16", "--zimage-strict").ret == pytest.ExitCode.TESTS_FAILED


def test_a_measured_file_beside_it_fails_as_before(published):
    done = published.run("nvfp4")
    done.assert_outcomes(passed=1, failed=1)
    done.stdout.fnmatch_lines(["*nvfp4.json: has no metric 'cold_load'; it has warm_latency"])
    done = published.run("fp8-cast")
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(["*fp8-cast.json: is missing, though the folder holds baselines of other variants"])
