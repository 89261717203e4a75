"""The tiny model set with files that are written only when asked for, loaded and drawn in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import drawing
import torch
from drawing import relative as relative
from msgspec import structs
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pytest_zimage.catalog import ROLE_FOLDERS, load_catalog
from pytest_zimage.catalog.model import Role
from pytest_zimage.checkpoints.loader import LoadedPipeline, load_pipeline
from pytest_zimage.checkpoints.synthetic import ensure_model_set
from pytest_zimage.engines.diffusers_engine import DiffusersEngine
from pytest_zimage.engines.protocol import Load
from pytest_zimage.engines.sampler import build_scheduler
from pytest_zimage.options import user_cache

CATALOG = load_catalog()
DIMS = CATALOG.models["synthetic-tiny"]
CPU = torch.device("cpu")


def files_of(name: str) -> dict[Role, Path]:
    """The files of a variant, written first if need be."""
    root = user_cache() / "synthetic-tiny"
    named = CATALOG.variant(name).files()
    ensure_model_set("synthetic-tiny", DIMS, root, named.values())
    return {role: root / ROLE_FOLDERS[role][0] / file for role, file in named.items()}


def load(name: str, files: dict[Role, Path] | None = None, **changed) -> LoadedPipeline:
    """A variant through the loader; `files` take the place of its own, `changed` are keys of its table."""
    paths = {**files_of(name), **(files or {})}
    variant = structs.replace(CATALOG.variant(name), **changed)
    tokenizer = user_cache() / "synthetic-tiny" / "tokenizer"
    return load_pipeline(variant, DIMS, paths, tokenizer, build_scheduler(CATALOG.workload("turbo-tiny")), CPU)


def load_request(name: str, workload: str = "turbo-tiny", **changed) -> Load:
    """What a worker is asked for to draw `workload`, with the keys `changed`, with a variant's tiny files."""
    return Load(
        variant=CATALOG.variant(name),
        workload=structs.replace(CATALOG.workload(workload), **changed),
        dims=DIMS,
        files={role: str(path) for role, path in files_of(name).items()},
        tokenizer=str(user_cache() / "synthetic-tiny" / "tokenizer"),
        device="cpu",
    )


def engine(name: str, workload: str = "turbo-tiny", **changed) -> DiffusersEngine:
    """A variant in the engine of the worker, ready to draw `workload` with the keys `changed`."""
    ready = DiffusersEngine()
    ready.load(load_request(name, workload, **changed))
    return ready


def latents(loaded: LoadedPipeline, steps: int = 8) -> torch.Tensor:
    """What the pipeline draws from fixed noise in as many steps as the published workload has."""
    return drawing.latents(loaded, steps)


def altered(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor], dict[str, str]], None]) -> Path:
    """`source` after `change(tensors, metadata)`, written to `target`."""
    tensors = load_file(source)
    with safe_open(source, framework="pt") as opened:
        metadata = dict(opened.metadata() or {})
    change(tensors, metadata)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata or None)
    return target


def silent(*_: object) -> None:
    pass
