"""`--zimage-catalog` and the ini value: variants and workloads of the user's own, as TOML tables."""

from __future__ import annotations

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.errors import CatalogError

MINE = """
[variants.mine]
title = "my own"
transformer = "z_image_turbo_nvfp4.safetensors"
text_encoder = "qwen_3_4b.safetensors"
tags = ["own"]

[workloads.small]
title = "small and short"
width = 64
height = 64
steps = 2
sampler = "euler"
schedule = "simple"
shift = 3.0
guidance = 0.0
seed = 7
prompt = "古風水墨畫"
"""


def test_a_variant_is_one_table_and_no_code(script, results):
    script(default=[{"rounds": [1.0]}])
    (script.project.path / "mine.toml").write_text(MINE, encoding="utf-8")
    with (script.project.path / "tox.ini").open("a") as ini:
        ini.write("\nzimage_catalog = mine.toml\n")
    script.project.runpytest_subprocess("--zimage-config=@own", "--zimage-workload", "small")
    assert script.ran == ["mine-1"]
    assert [verdict["variant"] for verdict in results()["verdicts"]] == ["mine"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[variants.x\n", "not valid TOML"),
        ("[varients.x]\ntitle='t'\n", r"unknown table \[varients\]; did you mean 'variants'"),
        ("[variants]\ntitle='t'\n", r"\[variants\] has the key 'title' outside of a named table"),
        ("[variants.x]\ntitel='t'\n", r"\[variants.x\]: unknown key 'titel'; did you mean 'title'"),
        ("[variants.x]\ntitle='t'\n", r"\[variants.x\]: .*missing required field `transformer`"),
        (
            MINE.replace('transformer = "z', 'transformer = "../z'),
            r"\[variants.mine\]: key 'transformer': .* is not the plain name of a .safetensors file",
        ),
        (MINE.replace("steps = 2", "steps = 0"), r"\[workloads.small\]: key 'steps': 0 is not at least 1"),
        (MINE.replace("steps = 2", 'steps = "two"'), r"\[workloads.small\]: key 'steps': Expected `int`, got `str`"),
        (MINE.replace("width = 64", "width = 60"), r"key 'width': 60 is not a positive multiple of 16"),
        (MINE.replace('"euler"', '"heun"'), r"\[workloads.small\]: key 'sampler': Invalid enum value 'heun'"),
        (MINE.replace('tags = ["own"]', 'lanes = ["gb11"]'), r"'lanes': no device class 'gb11'; did you mean 'gb10'"),
        ('[devices.my-gpu]\ntitle="t"\n', r"\[devices.my-gpu\]: key 'name': .* cannot be a pytest marker"),
        ('[devices.mygpu]\ntitle="t"\npattern="("\n', r"\[devices.mygpu\]: key 'pattern': not a regular expression"),
    ],
)
def test_a_mistake_names_file_table_and_key(tmp_path, text, says):
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(CatalogError, match=says) as caught:
        load_catalog([path])
    if "lanes" not in says:
        assert str(path) in str(caught.value)
    assert caught.value.mend


def test_a_catalogue_that_is_not_there(script):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-catalog", "nowhere.toml")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*nowhere.toml: cannot be read: No such file or directory*"])


def test_an_unknown_workload_is_a_usage_error(script):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-workload", "turbo-1042")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unknown workload 'turbo-1042'; did you mean 'turbo-1024'*"])


def test_an_unknown_engine_is_a_usage_error(script):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-engine", "tensorrt")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines(["*unknown engine 'tensorrt'*", "*engines here: comfyui, diffusers, vllm-omni*"])


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cuda:99"])
def test_an_unknown_device_is_a_usage_error(script, device):
    script(default=[{"rounds": [1.0]}])
    result = script.project.runpytest_subprocess("--zimage-device", device)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert device in result.stderr.str()
