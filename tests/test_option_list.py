"""`--zimage-list`: what there is, what each variant needs, and what is missing where; measures nothing."""

from __future__ import annotations

import os

import pytest

from pytest_zimage.catalog import load_catalog


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
    script.project.makepyfile(
        test_suite="""
        def test_all(zimage):
            zimage.gate(zimage.warm_latency(), zimage.cold_load())
        """
    )
    script.record("nvfp4", script.QUIET)
    result = script.run("nvfp4", "--zimage-list", "--zimage-rounds=4")
    result.stdout.fnmatch_lines(["*rough time    14.0 s a run and the start of a process (recorded here)"])


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
