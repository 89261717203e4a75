"""Plans and settings for tests that drive the comfyui engine by itself."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import structs

from pytest_zimage.catalog import ROLE_FOLDERS, load_catalog
from pytest_zimage.catalog.device_class import FitnessLimits
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.fit import FitPlan
from pytest_zimage.engines.protocol import DrawImages, Injection
from pytest_zimage.options import Settings

CATALOG = load_catalog()


def silent(stage: str, done: int, total: int) -> None:
    pass


def workload(name: str = "turbo-tiny", **changed):
    return structs.replace(CATALOG.workload(name), **changed)


def variant(name: str = "bf16", **changed):
    return structs.replace(CATALOG.variant(name), **changed)


def files_of(chosen, models: Path):
    return {role: models / ROLE_FOLDERS[role][0] / file for role, file in chosen.files().items()}


def make_files(models: Path, *names: str) -> Path:
    """Empty-handed weights: a few bytes under the names of the variants' files, by which a stand-in draws."""
    for name in names:
        for path in files_of(CATALOG.variant(name), models).values():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(f"weights of {path.name}".encode())
    return models


def make_plan(models: Path | None, folder: Path, chosen=None, drawn=None, **changed) -> RunPlan:
    """One run without any wait for a fit machine; `models` None: no files are here."""
    chosen = chosen or variant()
    given = {
        "variant": chosen,
        "workload": drawn or workload(),
        "model_set": "synthetic-tiny",
        "dims": CATALOG.models["synthetic-tiny"],
        "files": files_of(chosen, models) if models else {},
        "tokenizer": None,
        "device": "cpu",
        "gpu": "",
        "index": 0,
        "rounds": 3,
        "inject": Injection(),
        "images": None,
        "environment": {},
        "log": folder / "logs" / "server.log",
        "timeout_s": 30.0,
        "fit": FitPlan(FitnessLimits(judged=False), wait_s=0.0, recorded=None, root_pid=os.getpid()),
    }
    return RunPlan(**{**given, **changed})


def make_settings(root: Path, **changed) -> Settings:
    """Settings of which the engine reads only its own."""
    own = {"comfyui_dir": None, "comfyui_python": None, "comfyui_flags": (), "comfyui_url": None, "comfyui_pid": None}
    own |= {"comfyui_workflow": None, "rootdir": root}
    every = dict.fromkeys(Settings.__dataclass_fields__)
    return Settings(**{**every, **own, **changed})


def images_of(folder: Path, *jobs, size: int = 128) -> DrawImages:
    folder.mkdir(parents=True, exist_ok=True)
    return DrawImages(jobs=tuple(jobs), width=size, height=size)
