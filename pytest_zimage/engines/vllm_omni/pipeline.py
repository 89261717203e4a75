"""Which weights a server reads: a whole pipeline in diffusers' layout, in a folder or in the hub's repository."""

from __future__ import annotations

from pathlib import Path

from pytest_zimage.catalog import Role, Variant
from pytest_zimage.checkpoints.modelset import OFFICIAL
from pytest_zimage.errors import UnsupportedError

_INDEX = "model_index.json"
"""What makes a folder a whole pipeline."""
_NETWORKS: tuple[Role, ...] = ("transformer", "text_encoder", "vae")


def model_of(variant: Variant, model_set: str, root: Path | None) -> str:
    """What to serve: a whole pipeline in the model set's folder, else, for official weights, the hub's repository.

    Raises `UnsupportedError` where there is neither: other weights than the model set's must not bear its name.
    """
    names = [variant.transformer.rstrip("/")] if variant.transformer.endswith("/") else []
    if variant.repository:
        names.insert(0, variant.repository.rstrip("/").rpartition("/")[2])
    folders = [root / name for name in dict.fromkeys(names)] if root is not None else []
    for folder in folders:
        if (folder / _INDEX).is_file():
            return str(folder)
    if model_set == OFFICIAL and variant.repository:
        return variant.repository
    searched = f"; searched {', '.join(map(str, folders))}" if folders else ""
    raise UnsupportedError(
        f"{variant.name}: no whole pipeline of the model set {model_set!r} for vLLM-Omni to read{searched}",
        mend=f"put it, in diffusers' layout with its {_INDEX}, into DIR/{names[0]} of --zimage-models=DIR"
        + ("; or take the hub's: --zimage-models=official" if variant.repository else ""),
    )


def folder_of(model: str) -> Path | None:
    """Where a model lies on this host: its folder, or its snapshot in the hub's cache. None: it is not here."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(model, _INDEX)
    return Path(cached).parent if isinstance(cached, str) else None


def networks(folder: Path) -> dict[Role, Path]:
    """The folders of its networks; empty unless all are there: some may still have to be fetched."""
    found: dict[Role, Path] = {role: folder / role for role in _NETWORKS}
    return found if all(any(path.glob("*.safetensors")) for path in found.values()) else {}
