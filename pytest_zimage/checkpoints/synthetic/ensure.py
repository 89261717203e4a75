"""Sees to it that a synthetic set is there and sound; a child process writes what is not, so that torch stays there."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

import msgspec

from pytest_zimage.catalog import Catalog
from pytest_zimage.catalog.model import ModelDims
from pytest_zimage.checkpoints.synthetic.manifest import NOT_WRITTEN, PARTIAL, damaged_files, read_manifest, writer_hash
from pytest_zimage.checkpoints.synthetic.plan import name_of
from pytest_zimage.checkpoints.synthetic.requested import first_paths
from pytest_zimage.checkpoints.synthetic.tokenizer import FILES as TOKENIZER_FILES
from pytest_zimage.errors import CatalogError, CheckpointError

SET_NAMES = ("synthetic-tiny", "synthetic-full")

_MODULE = "pytest_zimage.checkpoints.synthetic"


def set_dims(name: str, catalog: Catalog) -> ModelDims:
    """Dimensions of the synthetic set `name`; `synthetic-full` has the official ones unless the catalogue says else."""
    for table in (name, "official") if name == "synthetic-full" else (name,):
        if table in catalog.models:
            return catalog.models[table]
    raise CatalogError(f"the catalogue has no [models.{name}]", mend=f"synthetic sets: {', '.join(SET_NAMES)}")


def ensure_model_set(
    name: str,
    dims: ModelDims,
    root: Path,
    files: Iterable[str] | None = None,
    *,
    device: str = "cpu",
    say: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """Have `files` (names as in a variant; None: the default ones') and the tokenizer of set `name` in `root`.

    What is there and not sound is written anew.

    Holds a lock beside `root`, so that of two sessions one writes and the other waits. `say` gets progress lines.
    Returns notes on what was written anew and why; none for a set that was simply not there yet. Raises `CatalogError`
    for a file the set does not have and `CheckpointError` when it cannot be written.
    """
    # Two caches may share one set by a link: one folder, one lock.
    root = root.resolve()
    paths = [*first_paths(files), *TOKENIZER_FILES]
    with _locked(root, say):
        unsound, notes = _unsound(name, dims, root, paths)
        if unsound:
            _remove_leftovers(root)
            names = dict.fromkeys(name_of(path) for path in unsound if path not in TOKENIZER_FILES)
            _write(name, dims, root, list(names), device, say)
            still, _ = _unsound(name, dims, root, paths)
            if still:
                raise CheckpointError(f"{root / still[0]}: not sound right after it was written", mend="check the disk")
    return notes


def _unsound(name: str, dims: ModelDims, root: Path, paths: list[str]) -> tuple[list[str], list[str]]:
    """Which of `paths` must be written, and what to tell of it."""
    try:
        manifest = read_manifest(root)
    except CheckpointError as error:
        return paths, [f"{name}: written anew: {error.message}"]
    if manifest is None:
        half = any((root / path).exists() for path in paths) or any(root.glob(f"{PARTIAL}*"))
        return paths, [f"{name}: written anew: an earlier writing of it was not finished"] if half else []
    if (manifest.name, manifest.dims) != (name, dims):
        return paths, [f"{name}: written anew: {root} held {manifest.name} of other dimensions"]
    if manifest.writer != writer_hash(dims):
        # One set a cache, since the full one has 37 GB. Where two writers share it each undoes the other's work.
        return paths, [
            f"{name}: written anew: the writer changed; if another checkout uses {root.parent}, give each its own by"
            " --zimage-cache"
        ]
    folders = {f"{PurePosixPath(path).parent}/" for path in paths if name_of(path).endswith("/")}
    paths = [*paths, *(path for path in manifest.files if path not in paths and path.startswith(tuple(folders)))]
    damaged = damaged_files(root, manifest, paths)
    return list(damaged), [f"{name}: {path} written anew: {why}" for path, why in damaged.items() if why != NOT_WRITTEN]


def _remove_leftovers(root: Path) -> None:
    # Under the lock nobody else writes here, so these belong to writers that were killed.
    for folder in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _locked(root: Path, say: Callable[[str], None]) -> Iterator[None]:
    path = root.with_name(f".{root.name}.lock")
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES) and root.is_dir():
            # Nobody writes to a cache that cannot be written to; a sound set in it may be used.
            yield
            return
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror}", mend="name a cache folder that can be written to"
        ) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another session to finish with {root}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _write(
    name: str, dims: ModelDims, root: Path, file_names: list[str], device: str, say: Callable[[str], None]
) -> None:
    command = [sys.executable, "-m", _MODULE, "--set", name, "--out", str(root), "--device", device]
    command += ["--dims", msgspec.json.encode(dims).decode(), "--files", *file_names]
    with tempfile.TemporaryFile() as stderr:
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, errors="replace"
        )
        try:
            assert child.stdout is not None
            with child.stdout:
                for line in child.stdout:
                    say(line.rstrip())
            status = child.wait()
        finally:
            # Ctrl-C included: no writer outlives the session that asked for it.
            if child.poll() is None:
                child.kill()
                child.wait()
                _remove_leftovers(root)
        if status:
            stderr.seek(0)
            raise _failure(name, status, stderr.read().decode(errors="replace"))


def _failure(name: str, status: int, stderr: str) -> CheckpointError:
    how = f"exit status {status}" if status > 0 else f"signal {signal.Signals(-status).name}"
    # A ZImageError prints itself with its mend; anything else is a traceback or silence.
    message, found, mend = stderr.strip().rpartition("\n  mend: ")
    last = "\n".join((message if found else mend).splitlines()[-12:]) or "without a word"
    return CheckpointError(
        f"{name} could not be written ({how}): {last}",
        mend=mend if found else f"run `python -m {_MODULE} --set {name} --out FOLDER` by hand",
    )
