"""`--zimage-models`: where the weights come from, and what is said when they do not."""

from __future__ import annotations

import json
import os
import shutil

import pytest

from pytest_zimage.catalog import load_catalog

OFFICIAL_BF16 = {
    "diffusion_models": "z_image_turbo_bf16.safetensors",
    "text_encoders": "qwen_3_4b.safetensors",
    "vae": "ae.safetensors",
}


@pytest.fixture
def comfy(script, monkeypatch):
    """ComfyUI's folder with the official files of bf16 alone: their sizes, but none of their contents."""
    for name in ("HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    script(default=[{"rounds": [1.0]}])
    root = script.project.mkdir("comfy")
    for folder, name in OFFICIAL_BF16.items():
        path = root / "models" / folder / name
        path.parent.mkdir(parents=True)
        path.touch()
        os.truncate(path, load_catalog().files[name].bytes)
    return root


@pytest.fixture
def tokenizer(comfy, tiny):
    return shutil.copytree(tiny / "tokenizer", comfy / "models" / "tokenizer")


def verdicts(data):
    return {verdict["variant"]: verdict["verdict"] for verdict in data["verdicts"]}


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("nowhere/models", "*/nowhere/models: no such folder*"),
        ("synthetic-tinny", "*'synthetic-tinny' is neither a model set nor a folder; did you mean 'synthetic-tiny'*"),
    ],
)
@pytest.mark.parametrize("way", ["option", "ini", "environment"])
def test_what_is_no_model_set_is_a_usage_error(script, monkeypatch, value, says, way):
    arguments = [f"--zimage-models={value}"] if way == "option" else []
    if way == "environment":
        monkeypatch.setenv("ZIMAGE_MODELS", value)
    if way == "ini":
        with (script.project.path / "tox.ini").open("a") as ini:
            ini.write(f"\nzimage_models = {value}\n")
    result = script.project.runpytest_subprocess(*arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([says])
    assert "Traceback" not in result.stderr.str() + result.stdout.str()
    assert script.ran == []


def test_the_option_wins_over_the_environment(script, monkeypatch):
    script(default=[{"rounds": [1.0]}])
    monkeypatch.setenv("ZIMAGE_MODELS", "/nowhere")
    result = script.run("nvfp4", "--zimage-models=synthetic-tiny")
    assert (result.ret, script.ran) == (0, ["nvfp4-1"])


def test_the_environment_is_honoured(comfy, tokenizer, script, results, monkeypatch):
    monkeypatch.setenv("ZIMAGE_MODELS", str(comfy))
    assert script.run("bf16").ret == 0
    (run,) = results()["runs"]
    assert (run["model_set"], run["workload"]) == ("official", "turbo-1024")


@pytest.mark.parametrize("way", ["option", "ini"])
def test_a_path_starts_where_it_was_written(comfy, tokenizer, script, results, monkeypatch, way):
    """On the command line from the folder one is in, in the ini file from the ini file's."""
    below = script.project.mkdir("below")
    monkeypatch.chdir(below)
    if way == "ini":
        with (script.project.path / "tox.ini").open("a") as ini:
            ini.write("\nzimage_models = comfy\n")
    arguments = ["--zimage-models=../comfy"] if way == "option" else []
    done = script.run("bf16", "..", *arguments)
    assert done.ret == 0
    assert results()["runs"][0]["model_set"] == "official"


def test_a_missing_file_fails_its_own_variants_and_names_the_folders(comfy, tokenizer, script, results):
    done = script.run("bf16,nvfp4", f"--zimage-models={comfy}")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert script.ran == ["bf16-1"]
    assert verdicts(results()) == {"bf16": "NO BASELINE"}
    (error,) = results()["errors"]
    assert (error["variant"], error["kind"]) == ("nvfp4", "MissingFileError")
    shown = done.stdout.str()
    for text in (error["message"], error["mend"]):
        assert text in shown
    assert f"{comfy / 'models' / 'diffusion_models'}" in error["message"]
    assert "https://huggingface.co/Comfy-Org/z_image_turbo" in error["mend"]
    assert "Traceback" not in shown


def test_an_incomplete_download_is_told_before_it_is_loaded(comfy, tokenizer, script):
    os.truncate(comfy / "models/vae/ae.safetensors", 4096)
    done = script.run("bf16", f"--zimage-models={comfy}")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*ae.safetensors: 4096 bytes, where the official file has about 335304388*"])
    assert script.ran == []


def test_a_missing_tokenizer_says_how_to_get_it(comfy, script):
    done = script.run("bf16", f"--zimage-models={comfy}")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(
        ["no tokenizer found; searched *", "  mend: hf download Tongyi-MAI/Z-Image-Turbo --include 'tokenizer/[*]'*"]
    )


def test_an_engine_that_brings_its_own_tokenizer_needs_none(comfy, script):
    script.project.makeconftest(
        """
        from scripted import ScriptedEngine

        class Bringing(ScriptedEngine):
            needs_tokenizer = False

            def run(self, plan, progress):
                assert plan.tokenizer is None
                assert len(plan.files) == 3
                return super().run(plan, progress)

        def pytest_zimage_engines(config):
            return {"diffusers": lambda: Bringing(config.rootpath)}
        """
    )
    done = script.run("bf16", f"--zimage-models={comfy}")
    assert (done.ret, script.ran) == (0, ["bf16-1"])


def test_an_engine_that_keeps_its_own_weights_is_given_them_where_all_are_here(comfy, script, tmp_path):
    script.project.makeconftest(
        """
        from scripted import ScriptedEngine

        class Keeping(ScriptedEngine):
            needs_files = False

            def run(self, plan, progress):
                (self._root / "given").open("a").write(f"{plan.variant.name} {len(plan.files)}\\n")
                assert plan.tokenizer is None
                return super().run(plan, progress)

        def pytest_zimage_engines(config):
            return {"diffusers": lambda: Keeping(config.rootpath)}
        """
    )
    assert script.run("bf16,nvfp4", f"--zimage-models={comfy}").ret == 0
    assert (script.project.path / "given").read_text().splitlines() == ["bf16 3", "nvfp4 0"]


def test_a_tokenizer_may_be_named(comfy, script, tiny):
    done = script.run("bf16", f"--zimage-models={comfy}", f"--zimage-tokenizer={tiny / 'tokenizer'}")
    assert (done.ret, script.ran) == (0, ["bf16-1"])


def test_a_folder_that_the_synthetic_writer_wrote_is_that_set(script, results, tiny):
    """Its verdicts are those of the same set in the cache: the folder's place is no part of a baseline's key."""
    script.record("bf16,nvfp4", script.QUIET)
    script(default=script.QUIET)
    elsewhere = shutil.copytree(tiny, script.project.path / "elsewhere")
    (elsewhere / "diffusion_models" / "z_image_turbo_nvfp4.safetensors").unlink()
    done = script.run("bf16,nvfp4", f"--zimage-models={elsewhere}")
    done.assert_outcomes(passed=1, failed=1)
    data = results()
    assert (data["runs"][0]["model_set"], verdicts(data)) == ("synthetic-tiny", {"bf16": "PASS"})
    (error,) = data["errors"]
    assert f"searched {elsewhere}" in error["message"]
    assert "python -m pytest_zimage.checkpoints.synthetic" in error["mend"]
    assert "NaN" not in json.dumps(data)


def test_a_folder_that_pytest_takes_for_tests_is_refused(script, tmp_path_factory):
    """pytest looks for its ini file before it knows the option, so the space before the folder misleads it."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    result = script.project.runpytest_subprocess("--zimage-models", str(elsewhere))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*write --zimage-models={elsewhere}"])
    assert not (elsewhere / ".zimage").exists()
