"""A file that cannot be trusted fails its own variant with one clear message; the others are measured all the same.

What each kind of damage is called is the loader's own tests' matter; here it is that it reaches the user.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import save_file

BF16 = "z_image_turbo_bf16.safetensors"
NVFP4 = "z_image_turbo_nvfp4.safetensors"
KIJAI = "z-image-turbo_fp8_scaled_e4m3fn_KJ.safetensors"
OWN = """
[variants.{name}]
title = "damaged"
transformer = "{name}.safetensors"
text_encoder = "qwen_3_4b.safetensors"
"""


@pytest.fixture
def models(project, tiny) -> Path:
    """The tiny set as a folder of the user's."""
    return shutil.copytree(tiny, project.path / "models")


def altered(models: Path, source: str, name: str, change) -> None:
    """Write `name`.safetensors, which is `source` after `change` of its tensors and metadata."""
    folder = models / "diffusion_models"
    with safe_open(folder / source, "pt") as file:
        metadata = dict(file.metadata() or {})
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, folder / f"{name}.safetensors", metadata)


def scale_of_nothing(tensors, _metadata):
    tensors["layers.1.feed_forward.w2.scale_weight"].fill_(float("nan"))


def format_of_tomorrow(_tensors, metadata):
    record = json.loads(metadata["_quantization_metadata"])
    next(iter(record["layers"].values()))["format"] = "nvfp2"
    metadata["_quantization_metadata"] = json.dumps(record)


def test_each_damage_is_told_by_name_and_the_rest_is_measured(project, models, results):
    altered(models, KIJAI, "no-scale", scale_of_nothing)
    altered(models, NVFP4, "no-format", format_of_tomorrow)
    folder = models / "diffusion_models"
    (folder / "cut.safetensors").write_bytes((folder / BF16).read_bytes()[:-1000])
    said = {
        "no-scale": "*no-scale.safetensors*NaN*layers.1.feed_forward.w2*",
        "no-format": "*no-format.safetensors*nvfp2*",
        "cut": "*cut.safetensors*truncated*",
    }
    (project.path / "mine.toml").write_text("".join(OWN.format(name=name) for name in said))
    project.makepyfile(test_suite="def test_forwards(zimage): zimage.gate(zimage.forwards())")
    done = project.runpytest_subprocess(
        f"--zimage-models={models}",
        "--zimage-catalog=mine.toml",
        f"--zimage-config={','.join(said)},bf16",
        "--zimage-rounds=1",
    )
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(failed=len(said))
    done.stdout.fnmatch_lines(["=* 3 failed, 1 without baseline in *"])
    shown = done.stdout.str()
    assert "Traceback" not in shown
    assert shown.count("  mend: ") == len(said)
    data = results()
    errors = {error["variant"]: error for error in data["errors"]}
    assert set(errors) == set(said)
    for name, pattern in said.items():
        error = errors[name]
        assert error["kind"] == "CheckpointError", error
        assert error["mend"]
        pytest.LineMatcher([" ".join(error["message"].split())]).fnmatch_lines([pattern])
    assert [run["variant"] for run in data["runs"]] == ["bf16"]
    assert data["verdicts"][0]["value"] == 8


@pytest.mark.parametrize("size", [0, 1000])
def test_a_file_of_another_size_than_recorded_starts_no_worker(project, models, results, size):
    path = models / "diffusion_models" / NVFP4
    path.write_bytes(path.read_bytes()[:size])
    done = project.runpytest_subprocess(f"--zimage-models={models}", "--zimage-config=nvfp4")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines([f"{path}: {size} bytes, where its record says *", "  mend: write the set again: *"])
    assert [error["kind"] for error in results()["errors"]] == ["CheckpointError"]
    assert not list((project.path / ".zimage" / "sessions").glob("*/logs/*.log"))
