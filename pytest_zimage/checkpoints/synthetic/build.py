"""Writes a synthetic set, or the files of it that are wanted, into a folder: beside it first, then into place."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from pytest_zimage.catalog.model import ModelDims
from pytest_zimage.checkpoints.synthetic import tokenizer
from pytest_zimage.checkpoints.synthetic.manifest import (
    PARTIAL,
    FileRecord,
    Manifest,
    read_manifest,
    record_file,
    write_manifest,
    writer_hash,
)
from pytest_zimage.checkpoints.synthetic.requested import plan_set
from pytest_zimage.checkpoints.synthetic.sink import FileSink
from pytest_zimage.checkpoints.synthetic.target import Stages
from pytest_zimage.checkpoints.synthetic.writer import Progress, check_space, write_files
from pytest_zimage.errors import CheckpointError

_HEARTBEAT_S = 5.0


def build_model_set(
    name: str,
    dims: ModelDims,
    root: Path,
    file_names: Iterable[str] | None = None,
    *,
    device: torch.device,
    say: Callable[[str], None],
) -> None:
    """Write `file_names` (None: the default variants') and the tokenizer into `root`, and record them in its manifest.

    Files of another writer or of other dimensions are removed; those of this one that are not named stay. Raises
    `CatalogError` for a file name that the set does not have and `CheckpointError` when the disk has no room.
    """
    plans = plan_set(dims, file_names)
    partial = root / f"{PARTIAL}{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        needed = check_space(partial, plans)
        say(f"{name}: writing {len(plans)} files, {needed / 1e9:.2f} GB, to {root}")
        records: dict[str, FileRecord] = {}
        began = time.perf_counter()
        with FileSink(device) as sink:
            for path, record in write_files(plans, partial, device, sink, _progress(name, needed, say)):
                records[path] = record
                say(f"{name}: {path} {record.bytes / 1e6:.1f} MB done")
        say(f"{name}: {_speed(needed, time.perf_counter() - began, sink.stages)}")
        for plan in plans:
            for path, text in plan.beside.items():
                (partial / path).write_text(text, encoding="utf-8")
                records[path] = record_file(partial / path)
        vocabulary = dims.text_encoder["vocab_size"]
        assert isinstance(vocabulary, int)
        tokenizer.write_tokenizer(partial, vocabulary)
        records |= {path: record_file(partial / path) for path in tokenizer.FILES}
        _publish(Manifest(name, dims, writer_hash(dims), records), partial, root)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or partial}: cannot be written: {error.strerror}",
            mend="free some space, or put the cache on another disk",
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _progress(name: str, needed: int, say: Callable[[str], None]) -> Progress:
    last = time.monotonic()

    def report(written: int) -> None:
        nonlocal last
        if time.monotonic() - last >= _HEARTBEAT_S:
            last = time.monotonic()
            say(f"{name}: {written / 1e9:.2f} of {needed / 1e9:.2f} GB written")

    return report


def _speed(written: int, seconds: float, stages: Stages) -> str:
    making = seconds - stages.blocked - stages.finishing
    return (
        f"{written / 1e9:.2f} GB in {seconds:.1f} s ({written / 1e9 / seconds:.2f} GB/s): {making:.1f} s making "
        f"weights, {stages.blocked:.1f} waiting for a free buffer, {stages.finishing:.1f} for the last files; threads "
        f"together: {stages.device:.1f} s copying, {stages.write:.1f} writing, {stages.flush:.1f} flushing, "
        f"{stages.hash:.1f} hashing"
    )


def _publish(manifest: Manifest, partial: Path, root: Path) -> None:
    try:
        old = read_manifest(root)
    except CheckpointError:
        old = None
    kept: dict[str, FileRecord] = {}
    if old is not None and (old.name, old.dims, old.writer) == (manifest.name, manifest.dims, manifest.writer):
        kept = {path: record for path, record in old.files.items() if path not in manifest.files}
    for path in manifest.files:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (partial / path).replace(root / path)
    if old is not None:
        for path in old.files:
            if path not in manifest.files and path not in kept:
                (root / path).unlink(missing_ok=True)
    # The manifest comes last: whoever dies before it leaves files that the old one calls damaged.
    write_manifest(root, Manifest(manifest.name, manifest.dims, manifest.writer, kept | manifest.files), manifest.files)
