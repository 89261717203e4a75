"""Images of another build are never used again; those of the same build are, if they are all there."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import msgspec
import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.protocol import DrawnImage
from pytest_zimage.images.shelf import open_shelf

CATALOG = load_catalog()
ENVIRONMENT = {"torch": "2.15.0", "comfy-kitchen": "0.2.40", "device": "CPU", "weights.transformer": "ab", "os": "x"}
PROMPTS = CATALOG.prompts["quality-6x3"]


def shelf(root: Path, **changes):
    given = {
        "variant": CATALOG.variants["bf16"],
        "prompts": PROMPTS,
        "workload": CATALOG.workloads["turbo-tiny"],
        "environment": ENVIRONMENT,
        "fault": "",
        **changes,
    }
    return open_shelf(root, **given)


def test_the_same_build_is_the_same_place(tmp_path):
    assert shelf(tmp_path) == shelf(tmp_path, environment={**ENVIRONMENT, "os": "another", "hostname": "b"})


@pytest.mark.parametrize(
    "changes",
    [
        {"environment": {**ENVIRONMENT, "torch": "2.16.0"}},
        {"environment": {**ENVIRONMENT, "comfy-kitchen": "0.2.41"}},
        {"environment": {**ENVIRONMENT, "device": "NVIDIA H200"}},
        {"environment": {**ENVIRONMENT, "weights.transformer": "cd"}},
        {"workload": msgspec.structs.replace(CATALOG.workloads["turbo-tiny"], sampler="euler")},
        {"workload": CATALOG.workloads["turbo-1024"]},
        {"variant": CATALOG.variants["nvfp4"]},
        {"variant": msgspec.structs.replace(CATALOG.variants["bf16"], kernels="plain")},
        {"prompts": CATALOG.prompts["vllm-3x1"]},
        {"fault": "black"},
    ],
)
def test_another_build_is_another_place(tmp_path, changes):
    assert shelf(tmp_path, **changes).folder != shelf(tmp_path).folder


def test_other_drawing_code_is_another_build(tmp_path, monkeypatch):
    before = shelf(tmp_path).folder
    monkeypatch.setattr("pytest_zimage.images.shelf.drawing_code", lambda: "edited")
    assert shelf(tmp_path).folder != before


def test_kept_images_are_found_again_only_if_all_are_there(tmp_path):
    place = shelf(tmp_path)
    pairs = PROMPTS.pairs()
    request = place.request(pairs)
    assert (request.width, request.height) == (128, 128)
    assert len(request.jobs) == 18
    assert place.find(pairs) is None
    for job in request.jobs:
        Path(job.path).write_bytes(b"png")
    images = tuple(DrawnImage(job.prompt, job.seed, job.path, "0" * 64) for job in request.jobs)
    place.keep(images)
    assert place.find(pairs) == images
    assert place.find(PROMPTS.pairs(3)) is None, "further seeds were not drawn"
    Path(images[4].path).unlink()
    assert place.find(pairs) is None


def test_a_shelf_is_data_and_not_state(tmp_path):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        shelf(tmp_path).width = 1


def test_noting_images_from_several_processes_never_fails(tmp_path):
    """Each of them writes the index whole; the last one stays."""
    place = shelf(tmp_path)
    images = [DrawnImage("abstract", seed, str(tmp_path / f"{seed}.png"), "0" * 64) for seed in range(40)]
    place.request(())
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(place.keep, [[image] for image in images]))
    place.keep(images)
    assert [path.name for path in place.folder.iterdir()] == ["index.json"]
