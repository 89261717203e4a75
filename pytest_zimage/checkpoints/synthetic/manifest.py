"""The record beside a synthetic set: what was written, by which writer, with which hash; and the check against it.

Torch-free, since the test process checks a set and only a child writes one.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
from msgspec import Struct

from pytest_zimage.catalog.model import ModelDims
from pytest_zimage.errors import CheckpointError

MANIFEST = "model-set.json"
"""Marks a folder as a synthetic set, under the name written inside."""

PARTIAL = ".partial-"
"""Prefix of the folder, inside the set's own, that files are written in; what a killed writer leaves behind."""

NOT_WRITTEN = "not written yet"

_STAMP = ".verified.json"
_WRITER_SOURCES = (
    "keymap.py",
    "networks.py",
    "scales.py",
    "synthetic/encodings.py",
    "synthetic/gguf_plan.py",
    "synthetic/gguf_types.py",
    "synthetic/more_files.py",
    "synthetic/plan.py",
    "synthetic/policies.py",
    "synthetic/sink.py",
    "synthetic/storage.py",
    "synthetic/tokenizer.py",
    "synthetic/values.py",
    "synthetic/writer.py",
)


class FileRecord(Struct, frozen=True, forbid_unknown_fields=True):
    """One written file."""

    bytes: int
    sha256: str


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What a set holds, by path relative to its folder."""

    name: str
    dims: ModelDims
    writer: str
    """`writer_hash` of the writer that wrote it."""
    files: dict[str, FileRecord]


class _Seen(Struct, frozen=True):
    """A file as it stood when its whole hash was found right."""

    bytes: int
    mtime_ns: int
    sha256: str


def writer_hash(dims: ModelDims) -> str:
    """Changes whenever the writer could write other bytes: its source files and the dimensions."""
    folder = Path(__file__).parent.parent
    digest = hashlib.sha256(msgspec.json.encode(dims, order="deterministic"))
    for name in _WRITER_SOURCES:
        source = (folder / name).read_bytes()
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of the set in `root`, None if there is none. Raises `CheckpointError` if it cannot be read."""
    path = root / MANIFEST
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a readable model-set record: {error}", mend="delete the folder") from error


def record_file(path: Path) -> FileRecord:
    """Size and hash of a file, read from end to end."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return FileRecord(os.fstat(file.fileno()).st_size, digest)


def write_manifest(root: Path, manifest: Manifest, hashed: Iterable[str]) -> None:
    """Replace the manifest of `root`; the files in `hashed` were just read and found as recorded."""
    stamp = _read_stamp(root)
    _replace(root / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest, order="deterministic")))
    for path in hashed:
        found = (root / path).stat()
        stamp[path] = _Seen(found.st_size, found.st_mtime_ns, manifest.files[path].sha256)
    _write_stamp(root, {path: seen for path, seen in stamp.items() if path in manifest.files})


def damaged_files(root: Path, manifest: Manifest, paths: Iterable[str]) -> dict[str, str]:
    """Which of `paths` are not as the manifest says, and why.

    A file that still has the size and time it had when it was last hashed is taken at its word; any other is hashed.
    """
    stamp = _read_stamp(root)
    before = dict(stamp)
    damaged: dict[str, str] = {}
    for path in paths:
        record = manifest.files.get(path)
        if record is None:
            damaged[path] = NOT_WRITTEN
            continue
        try:
            found = (root / path).stat()
            seen = _Seen(found.st_size, found.st_mtime_ns, record.sha256)
            if found.st_size != record.bytes:
                damaged[path] = f"{found.st_size} bytes instead of {record.bytes}"
            elif stamp.get(path) != seen:
                if record_file(root / path) == record:
                    stamp[path] = seen
                else:
                    damaged[path] = "its hash is not the recorded one"
        except FileNotFoundError:
            damaged[path] = "missing"
        except OSError as error:
            damaged[path] = f"unreadable: {error.strerror}"
    if stamp != before:
        _write_stamp(root, stamp)
    return damaged


def _read_stamp(root: Path) -> dict[str, _Seen]:
    try:
        return msgspec.json.decode((root / _STAMP).read_bytes(), type=dict[str, _Seen])
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        # Without a stamp every file is hashed again, which is slower and just as safe.
        return {}


def _write_stamp(root: Path, stamp: dict[str, _Seen]) -> None:
    try:
        _replace(root / _STAMP, msgspec.json.encode(stamp, order="deterministic"))
    except OSError:
        # A read-only set is hashed on every use instead.
        return


def _replace(path: Path, text: bytes) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(text)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
