"""Image quality end to end on the real tiny model: nothing fails as it is, and each fault fails the right test.

A prompt set of two prompts keeps it short; images, judge, baselines and reports are the real ones.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.modelset import open_model_set
from pytest_zimage.engines.diffusers_engine import DiffusersEngine
from pytest_zimage.engines.protocol import DrawImages, ImageJob, Load
from pytest_zimage.quality.client import Judge
from pytest_zimage.quality.protocol import PathPair, ScorerChoice

REPOSITORY = Path(__file__).parents[1]
SMALL = """
[prompts.small]
title = "two prompts, so that a test is short"

[[prompts.small.prompts]]
name = "chinese"
text = "古風水墨畫,一位身穿青色長袍的書生站在竹林中"
seeds = [42, 7777, 12345]
more_seeds = [101]

[[prompts.small.prompts]]
name = "abstract"
text = "surreal floating islands suspended in pastel sky, waterfalls cascading"
seeds = [42, 7777, 12345]
more_seeds = [101]
"""
EULER = """
[workloads.turbo-tiny]
title = "the same with another sampler"
width = 128
height = 128
steps = 8
sampler = "euler"
schedule = "simple"
shift = 3.0
guidance = 0.0
seed = 42
prompt = "a lighthouse at dawn"
"""


class Project:
    """A folder with the quality suite and a small prompt set; `run` is one session."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.baselines = folder / "baselines"
        folder.mkdir()
        (folder / "small.toml").write_text(SMALL, encoding="utf-8")
        (folder / "euler.toml").write_text(EULER, encoding="utf-8")
        (folder / "pytest.ini").write_text(
            f"[pytest]\nzimage_cache = {cache}\nzimage_device = cpu\nzimage_prompts = small\n"
            "zimage_catalog = small.toml\nzimage_rounds = 2\n"
        )
        (folder / "suites").mkdir()
        shutil.copy(REPOSITORY / "suites" / "test_quality.py", folder / "suites")

    def run(self, *arguments: str, status: int = 0) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "suites", *arguments],
            cwd=self.folder,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        shown = done.stdout + done.stderr
        assert done.returncode == status, shown
        return shown

    @property
    def results(self) -> dict:
        newest = max((self.folder / ".zimage" / "results").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        return json.loads(newest.read_text(encoding="utf-8"))

    @property
    def verdicts(self) -> dict[str, str]:
        return {row["metric"]: row["verdict"] for row in self.results["verdicts"]}

    @property
    def logs(self) -> list[str]:
        sessions = self.folder / ".zimage" / "sessions"
        newest = max(sessions.iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return sorted(path.name for path in (newest / "logs").iterdir())


@pytest.fixture(scope="module")
def project(tmp_path_factory, tiny) -> Project:
    """bf16 and nvfp4 are recorded."""
    made = Project(tmp_path_factory.mktemp("quality") / "project", tiny.parent)
    shown = made.run(
        "--zimage-config=bf16,nvfp4", "--update-baselines", "--update-reason", "first", "--zimage-runs", "1"
    )
    assert "6 passed, 2 unfit" in shown
    return made


def test_nothing_fails_as_it_is_and_identical_images_are_said(project):
    shown = project.run("--zimage-config=nvfp4")
    assert "3 passed, 1 unfit" in shown
    assert project.verdicts == {
        "images": "PASS",
        "clip_score": "UNFIT",
        "lpips": "PASS",
        "lpips_recorded": "PASS",
        "psnr": "PASS",
        "ssim": "PASS",
    }
    limits = {row["metric"]: row["limits"] for row in project.results["verdicts"]}
    assert (limits["images"], limits["lpips"], limits["ssim"]) == (None, [0.0, None], [-1.0, 1.0])
    notes = {row["metric"]: row["notes"] for row in project.results["verdicts"]}
    assert "6 of 6 images bit-identical to baseline" in notes["lpips"]
    assert "the scorer is blind here" in notes["clip_score"][0]


def test_the_reference_of_the_same_build_is_not_drawn_again(project):
    """nvfp4 alone takes bf16's images from the session that recorded them."""
    project.run("--zimage-config=nvfp4")
    assert project.logs == [name for name in project.logs if "bf16" not in name]
    assert any(name.startswith("judge-") for name in project.logs)


FAULTS = {
    "noise:0.05": (
        {"test_lpips", "test_pixels"},
        r"probable cause: noise lies over 6 of 6 images: about 1[0-5] of 255",
    ),
    "black": ({"test_images", "test_lpips", "test_pixels"}, r"100\.0% of the pixels are black"),
    "swap-prompts": (
        {"test_lpips", "test_pixels"},
        r"probable cause: the prompts are swapped: 6 of 6 images are bit for bit",
    ),
    "wrong-seed": (
        {"test_lpips", "test_pixels"},
        r"probable cause: the composition is another: .*the seed, the noise generator",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_fails_the_right_tests_and_is_named(project, fault):
    tests, cause = FAULTS[fault]
    shown = project.run("--zimage-config=nvfp4", f"--zimage-inject=quality={fault}", status=1)
    assert set(re.findall(r"FAILED suites/test_quality.py::(\w+)\[nvfp4\]", shown)) == tests
    assert re.search(cause, shown), shown
    assert all(row["injected"] for row in project.results["verdicts"])


def test_another_sampler_on_both_sides_is_noticed(project):
    """bf16 and the variant move together, so their distance stays small; the recorded images tell."""
    shown = project.run("--zimage-config=bf16,nvfp4", "--zimage-catalog=small.toml,euler.toml", status=1)
    drifted = [row for row in project.results["verdicts"] if row["metric"] == "lpips_recorded"]
    assert [row["verdict"] for row in drifted] == ["DRIFTED", "DRIFTED"]
    assert all(row["value"] > 0.07 for row in drifted)
    assert "0 of 6 images bit-identical to baseline" in shown
    assert re.search(r"chinese/42: recorded \S+chinese-42-\w+\.webp, now \S+chinese-42\.png", shown)


def test_two_processes_draw_and_judge_once_and_agree(project):
    project.run("--zimage-config=bf16,nvfp4", "-n", "2")
    together = {(row["variant"], row["metric"]): row["verdict"] for row in project.results["verdicts"]}
    runs = [name for name in project.logs if not name.startswith(("judge-", "forkserver"))]
    assert runs == ["bf16-1.log", "nvfp4-1.log"]
    project.run("--zimage-config=bf16,nvfp4")
    assert {(row["variant"], row["metric"]): row["verdict"] for row in project.results["verdicts"]} == together
    assert len(together) == 12


def test_a_pair_missing_in_the_baseline_is_an_error_not_a_smaller_n(project):
    path = next(project.baselines.rglob("nvfp4.json"))
    whole = path.read_bytes()
    document = json.loads(whole)
    del document["metrics"]["lpips"]["scores"]["chinese/42"]
    path.write_text(json.dumps(document), encoding="utf-8")
    try:
        shown = project.run("--zimage-config=nvfp4", "-k", "lpips", status=1)
    finally:
        path.write_bytes(whole)
    assert "the baseline has no score of chinese/42" in shown
    assert "mend:" in shown
    assert "Traceback" not in shown


def test_what_is_recorded_keeps_its_chinese_and_its_size(project):
    path = next(project.baselines.rglob("nvfp4.json"))
    assert "古風水墨畫" in path.read_text(encoding="utf-8")
    previews = list(path.with_suffix(".previews").iterdir())
    assert len(previews) >= 6
    assert all(preview.stat().st_size <= 8192 for preview in previews)


def test_weight_only_in_place_of_quantised_activations_is_noticed(tiny, tmp_path, monkeypatch):
    """The same file computed in two ways on one device: other fingerprints, and a distance that can be stated."""
    catalog = load_catalog()
    models = open_model_set("synthetic-tiny", catalog, cache=tiny.parent)
    variant = catalog.variant("fp8-cast-fast")
    drawn = {}
    for way, native in (("quantised", True), ("weight-only", False)):
        monkeypatch.setattr("pytest_zimage.checkpoints.loader.multiplies_natively", lambda *_, native=native: native)
        engine = DiffusersEngine()
        engine.load(
            Load(
                variant=variant,
                workload=catalog.workload("turbo-tiny"),
                dims=models.dims,
                files={role: str(path) for role, path in models.files(variant).items()},
                tokenizer=str(models.find_tokenizer()),
                device="cpu",
            )
        )
        jobs = tuple(ImageJob("p", "a lighthouse", seed, str(tmp_path / f"{way}-{seed}.png")) for seed in (1, 2))
        drawn[way] = engine.draw_images(DrawImages(jobs, 128, 128), lambda *_: None).images
    assert torch.is_grad_enabled()
    pairs = [PathPair(a.path, b.path) for a, b in zip(drawn["quantised"], drawn["weight-only"], strict=True)]
    assert all(a.pixels_sha256 != b.pixels_sha256 for a, b in zip(*drawn.values(), strict=True))
    with Judge(ScorerChoice(), log=tmp_path / "log", timeout_s=120, progress=lambda *_: None) as judge:
        compared = judge.compare(pairs)
    assert all(not one.identical and one.lpips > 0.001 for one in compared), compared
