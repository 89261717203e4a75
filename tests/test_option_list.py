"""`--zimage-list`: what there is, what each variant needs, and what is missing where; measures nothing."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from statistics import fmean

import pytest

from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.sightings import FILE, Sighting, add_sightings
from pytest_zimage.catalog import load_catalog
from pytest_zimage.reports import units
from pytest_zimage.verdict.rule import run_score

SHIPPED = Path(__file__).parents[1] / "baselines"
SUITE = """
def test_all(zimage):
    zimage.gate(zimage.warm_latency(), zimage.cold_load())
"""


@pytest.fixture
def official(pytester, monkeypatch):
    """A folder in ComfyUI's layout with every official file at its published size, none of it taking any space."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    root = pytester.mkdir("comfy")
    catalog = load_catalog()
    for variant in catalog.select([]):
        for role, name in variant.files().items():
            folder = {"transformer": "diffusion_models", "text_encoder": "text_encoders", "vae": "vae"}[role]
            path = root / "models" / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
            os.truncate(path, catalog.files[name].bytes)
    return root


def entries(result) -> dict[str, str]:
    """The text about each variant, by its name."""
    blocks = result.stdout.str().split("\n\n")[1:]
    return {block.split()[0]: block for block in blocks}


def test_it_works_where_there_is_no_suite(pytester, tiny):
    result = pytester.runpytest_subprocess("--zimage-list", "--zimage-device=cpu", f"--zimage-cache={tiny.parent}")
    assert result.ret == 0
    found = entries(result)
    variants = load_catalog().variants
    assert list(found) == list(variants)
    result.stdout.fnmatch_lines(
        ["device    cpu: CPU", f"models    synthetic-tiny in {tiny}", "workload  turbo-tiny: *"], consecutive=False
    )
    for name, text in found.items():
        assert ("only when asked for" in text) != variants[name].default
        assert f"lanes         {', '.join(variants[name].lanes) or 'any'}\n" in text, name
        assert "rough time    unknown: nothing recorded on this device yet" in text
        assert f"transformer   {variants[name].transformer}: " in text
        assert f"tokenizer     found: {tiny / 'tokenizer'}" in text
        assert f"seen          not known: there is no {pytester.path / 'baselines' / FILE}\n" in text
    assert "lanes         any\n" in found["nvfp4"]
    assert "h200" in found["bf16-compile"]
    assert not (pytester.path / ".zimage").exists()


def test_a_synthetic_set_not_written_yet_is_no_fault(pytester):
    cache = pytester.path / "nothing"
    result = pytester.runpytest_subprocess("--zimage-list", "--zimage-device=cpu", f"--zimage-cache={cache}")
    assert result.ret == 0
    result.stdout.fnmatch_lines(["*transformer   z_image_turbo_bf16.safetensors: written when a run first needs it"])
    assert "MISSING" not in result.stdout.str()
    assert not cache.exists()


def test_the_selection_is_listed(script):
    result = script.run("fp8*", "--zimage-list")
    assert list(entries(result)) == ["fp8-cast", "fp8-cast-fast", "fp8-scaled"]
    assert script.ran == []


def test_an_unknown_name_is_a_usage_error(script):
    result = script.run("nvpf4", "--zimage-list")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["ERROR: unknown variant 'nvpf4'; did you mean 'nvfp4'*"])


def test_the_rough_time_is_that_of_the_recorded_runs(script):
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    result = script.run("nvfp4", "--zimage-list", "--zimage-rounds=4")
    result.stdout.fnmatch_lines(["*rough time    14.0 s a run and the start of a process (recorded here)"])


def test_the_rough_time_of_a_variant_that_lacks_among_others_is_unknown_for_that_reason(script):
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    result = script.run("bf16", "--zimage-list")
    result.stdout.fnmatch_lines(["*rough time    unknown: *bf16.json: is missing, though the folder holds *"])


def test_official_files_are_found_and_what_lacks_says_where_it_was_looked_for(pytester, official):
    (official / "models/diffusion_models/z_image_turbo_nvfp4.safetensors").unlink()
    truncated = official / "models/text_encoders/qwen_3_4b_fp8_mixed.safetensors"
    os.truncate(truncated, 1000)
    result = pytester.runpytest_subprocess("--zimage-list", "--zimage-device=cpu", f"--zimage-models={official}")
    assert result.ret == 0
    result.stdout.fnmatch_lines([f"models    official in {official}", "workload  turbo-1024: *"])
    found = entries(result)
    assert f"found, 11.5 GiB: {official}/models/diffusion_models/z_image_turbo_bf16.safetensors" in found["bf16"]
    missing = found["nvfp4"]
    assert "z_image_turbo_nvfp4.safetensors: MISSING: " in missing
    for folder in ("diffusion_models", "unet", "models/diffusion_models", "split_files/diffusion_models"):
        assert f"{official / folder}" in missing
    assert "get it from https://huggingface.co/Comfy-Org/z_image_turbo" in missing
    assert f"UNUSABLE: {truncated}: 1000 bytes, where the official file has about" in found["nvfp4-fp8e"]
    assert "UNUSABLE" not in found["nvfp4"]
    assert "tokenizer     MISSING: no tokenizer found" in found["bf16"]
    assert "hf download Tongyi-MAI/Z-Image-Turbo" in found["bf16"]


def test_it_needs_no_workers(script):
    result = script.run("nvfp4", "--zimage-list", "-n", "2")
    assert result.ret == 0
    assert list(entries(result)) == ["nvfp4"]


def sighting(variant: str, *, device="cpu", engine="diffusers", **fields) -> Sighting:
    key = Key(device=device, engine=engine, model_set="synthetic-tiny", workload="turbo-tiny", variant=variant)
    told = {"seen_at": "2026-03-04T05:06:07+00:00", "device_name": "x", "warm_latency_s": 0.0212}
    return Sighting(key=key, **(told | fields))


@pytest.fixture
def ledger(script):
    """Lists variants beside what was seen; the lines about it by variant, and before the first one."""

    def lines(names, *sightings):
        if sightings:
            add_sightings(script.project.path / "baselines" / FILE, sightings)
        result = script.run(names, "--zimage-list")
        assert (result.ret, script.ran) == (0, [])
        head, *blocks = result.stdout.str().split("\n\n")
        found = {
            block.split()[0]: [
                line[4:] for line in block.splitlines()[1:] if line[4:].startswith(("seen ", "published ", " "))
            ]
            for block in blocks
        }
        return found | {"": [line for line in head.splitlines() if line.startswith("seen")]}

    return lines


def test_a_variant_says_where_it_was_seen(ledger):
    found = ledger("bf16,nvfp4,fp8-cast", sighting("bf16"), sighting("nvfp4"), sighting("mxfp8"))
    assert found == {
        "": [],
        "bf16": ["seen          cpu: synthetic-tiny at turbo-tiny, 21.2 ms (2026-03-04)"],
        "nvfp4": ["seen          cpu: synthetic-tiny at turbo-tiny, 21.2 ms (2026-03-04)"],
        "fp8-cast": ["seen          nowhere yet"],
    }


def test_another_engine_is_named_and_the_session_own_is_not(ledger):
    seen = [
        sighting("bf16", device="h200", warm_latency_s=0.906, device_peak_bytes=23280873472),
        sighting("bf16", device="gb10", engine="comfyui"),
    ]
    assert ledger("bf16", *seen)["bf16"] == [
        "seen          gb10: synthetic-tiny at turbo-tiny through comfyui, 21.2 ms (2026-03-04)",
        "              h200: synthetic-tiny at turbo-tiny, 906 ms, 21.7 GiB of the device (2026-03-04)",
    ]


def test_a_sighting_that_was_not_timed_says_so(ledger):
    assert ledger("bf16", sighting("bf16", warm_latency_s=None))["bf16"] == [
        "seen          cpu: synthetic-tiny at turbo-tiny, on a machine not fit to be timed (2026-03-04)"
    ]


def test_a_measured_baseline_is_shown_instead(script, ledger):
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    recorded = "seen          cpu: synthetic-tiny at turbo-tiny, 1.00 s (2026-01-01)"
    assert ledger("nvfp4")["nvfp4"] == [recorded], "without seen.json"
    found = ledger("nvfp4", sighting("nvfp4"), sighting("nvfp4", device="b200"))
    assert found["nvfp4"] == [
        "seen          b200: synthetic-tiny at turbo-tiny, 21.2 ms (2026-03-04)",
        recorded.replace("seen", "    "),
    ]


def test_a_broken_baseline_says_nothing(script, ledger):
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    path = next((script.project.path / ".zimage").rglob("nvfp4.json"))
    path.write_text(path.read_text().replace("1.0,", "-1.0,"))
    assert ledger("nvfp4", sighting("bf16"))["nvfp4"] == ["seen          nowhere yet"]


def test_a_broken_list_of_sightings_is_told_on_one_line_and_stops_nothing(script, ledger):
    script.project.makepyfile(test_suite=SUITE)
    script.record("nvfp4", script.QUIET)
    path = script.project.mkdir("baselines") / FILE
    path.write_text("{")
    found = ledger("nvfp4,bf16")
    (told,) = found[""]
    assert told.startswith(f"seen      UNUSABLE: {path}: is no list of sightings: ")
    assert "restore the file from version control" in told
    assert found["bf16"] == [f"seen          not known: {FILE} is unusable"]
    assert found["nvfp4"] == ["seen          cpu: synthetic-tiny at turbo-tiny, 1.00 s (2026-01-01)"]


def test_a_list_of_sightings_judges_nothing(script):
    script.project.makepyfile(test_suite=SUITE.replace("zimage.cold_load()", "zimage.forwards()"))
    script.record("nvfp4", script.QUIET)
    (script.project.path / "baselines" / FILE).write_text("{")
    script(default=script.QUIET)
    script.run("nvfp4").assert_outcomes(passed=1)


def test_what_was_printed_or_recorded_of_other_machines_is_shown_as_such(script):
    result = script.run("bf16,bf16-sage", "--zimage-list", f"--zimage-baselines={SHIPPED}")
    found = entries(result)
    measured = json.loads((SHIPPED / "h200/diffusers-synthetic-full-turbo-1024/bf16.json").read_text())
    runs = measured["metrics"]["warm_latency"]["runs"]
    date = max(run["recorded_at"] for run in runs)[:10]
    recorded = units.seconds(math.exp(fmean(run_score(run["rounds"]) for run in runs)))
    assert f"h200: synthetic-full at turbo-1024, {recorded}, 21.7 GiB of the device ({date})\n" in found["bf16"]
    assert "    published     gb10: official at turbo-1024 through comfyui, 7.55 s\n" in found["bf16"]
    assert f"\n{'':18}gb10: official at turbo-1024x512 through vllm-omni, " in found["bf16"]
    assert "    seen          nowhere yet\n" in found["bf16-sage"]
    assert "    published     gb10: official at turbo-1024x512 through vllm-omni, 7.83 s\n" in found["bf16-sage"]
