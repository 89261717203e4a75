"""Where a tokenizer's files may lie on this machine; nothing is downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from pytest_zimage.errors import CheckpointError, MissingFileError

_HUB_FOLDERS = (("Tongyi-MAI/Z-Image-Turbo", "tokenizer"), ("Qwen/Qwen3-4B", ""))
_CHAT_TOKEN = b"<|im_start|>"
"""Tells Qwen's tokenizer from others that a folder of tokenizers may hold."""


def find_tokenizer(named: Path | None, bases: Iterable[Path], *, use_hub_cache: bool) -> Path:
    """The first folder that holds Qwen's tokenizer.

    In this order: `tokenizer/` and `tokenizers/*` of `bases`, since a tokenizer beside the weights is theirs; `named`
    by the user, which must then do; the hub's local cache. Raises `CheckpointError` if `named` is asked and holds
    none, `MissingFileError` if no folder does.
    """
    searched: list[str] = []
    for base in bases:
        searched += [str(base / "tokenizer"), str(base / "tokenizers" / "*")]
        for folder in (base / "tokenizer", *sorted((base / "tokenizers").glob("*/"))):
            if is_tokenizer(folder):
                return folder
    if named is not None:
        for folder in (named, named / "tokenizer"):
            if is_tokenizer(folder):
                return folder
        raise CheckpointError(
            f"{named}: no Qwen tokenizer there: needs tokenizer_config.json and tokenizer.json (or vocab.json and "
            "merges.txt)",
            mend=_how_to_get(),
        )
    if use_hub_cache:
        cache = hub_cache()
        for repository, below in _HUB_FOLDERS:
            for snapshot in _snapshots(cache, repository):
                if is_tokenizer(snapshot / below):
                    return snapshot / below
            searched.append(str(_repository_folder(cache, repository)))
    raise MissingFileError(f"no tokenizer found; searched {', '.join(searched)}", mend=_how_to_get())


def is_tokenizer(folder: Path) -> bool:
    """Whether `folder` holds the files of a tokenizer with Qwen's chat tokens."""
    files = [folder / "tokenizer_config.json", folder / "tokenizer.json"]
    if not files[0].is_file():
        return False
    if not files[1].is_file():
        if not all((folder / name).is_file() for name in ("vocab.json", "merges.txt")):
            return False
        files.pop()
    return any(_CHAT_TOKEN in file.read_bytes() for file in files)


def hub_cache() -> Path:
    """The hub's cache folder, found as huggingface_hub finds it, which is too slow to import for this."""
    for name, below in (
        ("HF_HUB_CACHE", ""),
        ("HUGGINGFACE_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        value = os.environ.get(name)
        if value:
            return Path(os.path.expandvars(value)).expanduser() / below
    return Path("~/.cache/huggingface/hub").expanduser()


def _repository_folder(cache: Path, repository: str) -> Path:
    return cache / f"models--{repository.replace('/', '--')}"


def _snapshots(cache: Path, repository: str) -> Iterator[Path]:
    """The snapshot of branch main first, then the others, newest first."""
    folder = _repository_folder(cache, repository)
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    snapshots = [path for path in (folder / "snapshots").glob("*") if path.is_dir()]
    yield from sorted(snapshots, key=lambda path: (path.name != main, -path.stat().st_mtime, path.name))


def _how_to_get() -> str:
    return (
        "hf download Tongyi-MAI/Z-Image-Turbo --include 'tokenizer/*', or put those files into the model folder's "
        "tokenizer/, or name their folder"
    )
