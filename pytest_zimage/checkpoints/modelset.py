"""From the name of a model set to the files of a variant: official weights in ComfyUI's folders, or a synthetic set."""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pytest_zimage.catalog import ROLE_FOLDERS, Catalog, ModelDims, ModelFile, Role, Variant
from pytest_zimage.checkpoints.folders import bytes_on_disk, weight_files
from pytest_zimage.checkpoints.header import MAX_HEADER_BYTES
from pytest_zimage.checkpoints.synthetic import MANIFEST, SET_NAMES, ensure_model_set, read_manifest, set_dims
from pytest_zimage.checkpoints.tokenizers import find_tokenizer
from pytest_zimage.errors import CatalogError, CheckpointError, MissingFileError

OFFICIAL = "official"

_BASES = ("", "models", "split_files")
"""Where role folders may lie below the named folder: ComfyUI's `models/`, and the hub repository's `split_files/`."""

_SMALLEST_SHARE = 0.98
"""Of the published size, which some tables round; anything smaller is a download that stopped."""

_BLOCKS, _BLOCK_BYTES = 256, 16384


@dataclass(frozen=True, slots=True)
class ModelSet:
    """Where the weights come from."""

    name: str
    """`official`, `synthetic-tiny` or `synthetic-full`; part of every baseline's key."""
    root: Path | None
    """None: only a name, for an engine that keeps its own files."""
    dims: ModelDims
    tokenizer: Path | None = None
    """A folder named by the user, for weights without one beside them."""
    published: Mapping[str, ModelFile] = field(default_factory=dict, repr=False)
    """What is known of official files beforehand, by file name."""
    recorded_bytes: Mapping[str, int] = field(default_factory=dict, repr=False)
    """Sizes by file name, from the record of a synthetic set in a folder of the user's."""
    managed: bool = False
    """A synthetic set in the cache, which `ensure_model_set` writes on demand."""

    def files(self, variant: Variant) -> dict[Role, Path]:
        """The variant's files. Raises `MissingFileError` or `CheckpointError` for the first that will not do."""
        return {role: self.find(role, file_name) for role, file_name in variant.files().items()}

    def find(self, role: Role, file_name: str) -> Path:
        """The file, or the folder `NAME/`, of that name, directly in one of the role's folders or anywhere below one.

        Raises `MissingFileError` listing every folder searched and how to get the file; `CheckpointError` for several
        files of that name below one folder, and for one smaller than it was published or recorded.
        """
        if self.root is None:
            raise MissingFileError(
                f"{file_name} ({role}): the model set {self.name!r} was named without a folder",
                mend="name the folder, in ComfyUI's layout: --zimage-models=DIR",
            )
        folders = [base / folder for base in self._bases() for folder in ROLE_FOLDERS[role]]
        is_there = Path.is_dir if file_name.endswith("/") else Path.is_file
        for folder in folders:
            if is_there(folder / file_name):
                return self._checked(folder / file_name)
        for folder in folders:
            below = sorted(path for path in folder.rglob(file_name.rstrip("/")) if is_there(path))
            if len(below) > 1:
                raise CheckpointError(
                    f"{file_name} is there more than once: {', '.join(map(str, below))}",
                    mend=f"keep one, or put the one that counts into {folder} itself",
                )
            if below:
                return self._checked(below[0])
        raise MissingFileError(
            f"{file_name} ({role}) is not in the model set {self.name!r}; searched {', '.join(map(str, folders))}",
            mend=self._how_to_get(role, file_name),
        )

    def ensure(
        self, files: Iterable[str] | None = None, *, device: str = "cpu", say: Callable[[str], None] = lambda line: None
    ) -> list[str]:
        """Have `files` (names; None: the default ones) of a managed set written and sound; nothing to do for others.

        Returns notes and raises errors as `ensure_model_set`.
        """
        if not self.managed or self.root is None:
            return []
        return ensure_model_set(self.name, self.dims, self.root, files, device=device, say=say)

    def find_tokenizer(self) -> Path:
        """The folder of the tokenizer's files: in the model folder, named by the user, or in the hub's local cache.

        Raises `MissingFileError` that says how to get one.
        """
        return find_tokenizer(self.tokenizer, self._bases(), use_hub_cache=self.name == OFFICIAL)

    def _bases(self) -> list[Path]:
        return [self.root / base for base in _BASES] if self.root is not None else []

    def _checked(self, path: Path) -> Path:
        size = bytes_on_disk(path)
        recorded = self.recorded_bytes.get(path.name)
        if recorded is not None and size != recorded:
            raise CheckpointError(f"{path}: {size} bytes, where its record says {recorded}", mend=self._write_again())
        known = self.published.get(path.name)
        if self.name == OFFICIAL and known is not None and size < known.bytes * _SMALLEST_SHARE:
            raise CheckpointError(
                f"{path}: {size} bytes, where the official file has about {known.bytes}: an incomplete download?",
                mend=f"download it again from {known.source or 'where it came from'}",
            )
        return path

    def _how_to_get(self, role: Role, file_name: str) -> str:
        if self.name != OFFICIAL:
            if self.managed:
                return "it is written when a run needs it; check the file's name"
            return self._write_again()
        known = self.published.get(file_name)
        target = self.root / ROLE_FOLDERS[role][0] if self.root is not None else ROLE_FOLDERS[role][0]
        if known is None or not known.source:
            return f"put it into {target}"
        return f"get it from https://huggingface.co/{known.source} and put it into {target}"

    def _write_again(self) -> str:
        return f"write the set again: python -m pytest_zimage.checkpoints.synthetic --set {self.name} --out {self.root}"


def open_model_set(spec: str, catalog: Catalog, *, cache: Path, tokenizer: Path | None = None) -> ModelSet:
    """The model set that `spec` names: `synthetic-tiny`, `synthetic-full`, or a folder in ComfyUI's layout; and
    `official` without a folder, for an engine that keeps its own files.

    Nothing is written: a synthetic set in `cache` may still need `ensure_model_set`. A folder with the synthetic
    writer's record is that synthetic set. Raises `MissingFileError` for a folder that is not there, `CatalogError` for
    a name that is no model set, `CheckpointError` for a record that cannot be read.
    """
    if spec in SET_NAMES:
        return ModelSet(spec, cache / spec, set_dims(spec, catalog), tokenizer, catalog.files, managed=True)
    root = Path(spec).expanduser()
    if spec == OFFICIAL and not root.is_dir():
        return ModelSet(OFFICIAL, None, catalog.models[OFFICIAL], tokenizer, catalog.files)
    if not root.is_dir():
        close = difflib.get_close_matches(spec, SET_NAMES, n=1)
        if close or "/" not in spec:
            raise CatalogError(
                f"{spec!r} is neither a model set nor a folder" + (f"; did you mean {close[0]!r}?" if close else ""),
                mend=f"name {', '.join(SET_NAMES)} or a folder in ComfyUI's layout",
            )
        raise MissingFileError(f"{root}: no such folder", mend="name a folder in ComfyUI's layout")
    for base in (root, root / "models"):
        manifest = read_manifest(base)
        if manifest is None:
            continue
        if manifest.name not in SET_NAMES:
            raise CheckpointError(f"{base / MANIFEST}: unknown model set {manifest.name!r}", mend="delete that file")
        sizes: Counter[str] = Counter()
        for path, record in manifest.files.items():
            # The path of a folder's file is role folder, folder, file.
            sizes[Path(path).parts[1]] += record.bytes
        return ModelSet(manifest.name, base, manifest.dims, tokenizer, catalog.files, sizes)
    return ModelSet(OFFICIAL, root, catalog.models[OFFICIAL], tokenizer, catalog.files)


def file_fingerprint(path: Path) -> str:
    """A quick identity of a file's contents: sha256 over its size, header and 256 evenly spaced blocks of 16 KiB.

    A file no larger than those blocks is hashed whole; a folder's is that of its files'. Not proof against someone who
    means to deceive.
    """
    if path.is_dir():
        lines = sorted(f"{file.name} {file_fingerprint(file)}\n" for file in weight_files(path))
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        size = file.seek(0, 2)
        digest = hashlib.sha256(f"{size}\n".encode())
        file.seek(0)
        if size <= _BLOCKS * _BLOCK_BYTES:
            digest.update(file.read())
            return digest.hexdigest()
        start = file.read(8)
        length = int.from_bytes(start, "little")
        digest.update(start)
        if length <= MAX_HEADER_BYTES:
            digest.update(file.read(length))
        for index in range(_BLOCKS):
            file.seek((size - _BLOCK_BYTES) * index // (_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()


class Fingerprints:
    """Fingerprints of files, each file read once: a plan is made for every run and every set of images."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, int], str] = {}

    def __call__(self, path: Path) -> str:
        """The start of `file_fingerprint`."""
        key = (path, path.stat().st_mtime_ns)
        if key not in self._known:
            self._known[key] = file_fingerprint(path)[:16]
        return self._known[key]
