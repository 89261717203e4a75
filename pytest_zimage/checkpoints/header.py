"""The header of a safetensors file, read without torch and trusted only after it was checked.

Layout (https://github.com/huggingface/safetensors#format): eight bytes of little-endian header length, that many bytes
of JSON, then the tensors back to back. Every offset, shape and length is checked here, so that what comes after may
slice the file without further thought.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_zimage.errors import CheckpointError, MissingFileError

MAX_HEADER_BYTES = 100_000_000
"""The format's own limit; a larger number means the first eight bytes are not a length."""

DTYPE_BITS: dict[str, int] = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "F8_E4M3": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2": 8,
    "F8_E5M2FNUZ": 8,
    "F8_E8M0": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}
"""Bits of one element by safetensors dtype code."""

_AGAIN = "download the file again"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies; `begin` and `end` are offsets from the start of the file."""

    name: str
    dtype: str
    """safetensors code: `BF16`, `F8_E4M3`, `U8`, ..."""
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """A checked header: tensors in file order, without gaps, ending where the file ends."""

    path: Path
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]
    header_bytes: int
    """Length field and JSON together, i.e. the offset of the first tensor."""
    file_bytes: int


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """Bytes a tensor of `dtype` and `shape` occupies; raises `KeyError` for an unknown dtype code."""
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def read_header(path: Path) -> Header:
    """Read and check the header of `path`; no tensor data is touched.

    Raises `MissingFileError` if there is no such file and `CheckpointError` for anything that is not a sound
    safetensors file, naming file and tensor.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            start = file.read(8)
            length = _header_length(path, start, start + file.read(504), file_bytes)
            file.seek(8)
            text = file.read(length)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: no such file", mend=f"put it there, or {_AGAIN}") from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}", mend="check the file's permissions"
        ) from error
    document = _document(path, text)
    metadata = _metadata(path, document.pop("__metadata__", {}))
    header_bytes = 8 + length
    tensors = [_tensor(path, name, entry, header_bytes) for name, entry in document.items()]
    tensors.sort(key=lambda tensor: (tensor.begin, tensor.end))
    _check_layout(path, tensors, header_bytes, file_bytes)
    return Header(path, metadata, {tensor.name: tensor for tensor in tensors}, header_bytes, file_bytes)


def _header_length(path: Path, start: bytes, head: bytes, file_bytes: int) -> int:
    if file_bytes == 0:
        raise CheckpointError(f"{path}: the file is empty", mend=_AGAIN)
    kind = _foreign_kind(head)
    if kind:
        raise CheckpointError(f"{path}: not a safetensors file, but {kind[0]}", mend=kind[1])
    if file_bytes < 8:
        raise CheckpointError(f"{path}: {file_bytes} bytes are too few for a safetensors file", mend=_AGAIN)
    length = int.from_bytes(start, "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"{path}: not a safetensors file: its first eight bytes give a header of {length} bytes", mend=_AGAIN
        )
    if 8 + length > file_bytes:
        raise CheckpointError(
            f"{path}: truncated: the header alone needs {8 + length} bytes, the file has {file_bytes}", mend=_AGAIN
        )
    return length


def _foreign_kind(head: bytes) -> tuple[str, str] | None:
    """What the first bytes give away, and the mend; None if they could be safetensors."""
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer: the text that stands in for a file not yet fetched", "run `git lfs pull` there"
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:16].lower().startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "an HTML page, probably an error or a log-in page saved by a download", f"{_AGAIN}, logged in"
    # A sound header's length may begin with these bytes too, but is followed by JSON.
    if head.startswith((b"PK\x03\x04", *(bytes((0x80, version)) for version in range(2, 6)))) and head[8:9] != b"{":
        return "a pickle (.pt, .ckpt, .bin), which is never opened here", "get the .safetensors file instead"
    if head.startswith(b"GGUF"):
        return "a GGUF file", "get the .safetensors file instead"
    return None


def _document(path: Path, text: bytes) -> dict[str, Any]:
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            seen: set[str] = set()
            repeated.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return table

    try:
        document = json.loads(text, object_pairs_hook=collect)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path}: not a safetensors file: its header is not JSON ({error})", mend=_AGAIN
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a safetensors file: its header is not a JSON object", mend=_AGAIN)
    if repeated:
        raise CheckpointError(
            f"{path}: the header has the key {repeated[0]!r} twice", mend="have the file written anew"
        )
    return document


def _metadata(path: Path, table: object) -> dict[str, str]:
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise CheckpointError(
            f"{path}: the header's __metadata__ is not a table of strings", mend="have the file written anew"
        )
    return table


def _tensor(path: Path, name: str, entry: object, header_bytes: int) -> TensorInfo:
    def refuse(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {why}", mend=_AGAIN)

    if not isinstance(entry, dict):
        raise refuse("its header entry is not an object")
    dtype: Any = entry.get("dtype")
    shape: Any = entry.get("shape")
    offsets: Any = entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise refuse(f"unknown dtype {dtype!r}; known: {', '.join(DTYPE_BITS)}")
    if not _naturals(shape):
        raise refuse(f"shape {shape!r} is not a list of whole numbers of at least 0")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise refuse(f"data_offsets {offsets!r} are not a begin and an end")
    expected = tensor_bytes(dtype, shape)
    if offsets[1] - offsets[0] != expected:
        raise refuse(f"{dtype} {shape} needs {expected} bytes, its offsets span {offsets[1] - offsets[0]}")
    return TensorInfo(name, dtype, tuple(shape), header_bytes + offsets[0], header_bytes + offsets[1])


def _naturals(value: Any) -> bool:
    # bool is an int to Python, but not a size.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_layout(path: Path, tensors: list[TensorInfo], header_bytes: int, file_bytes: int) -> None:
    expected, before = header_bytes, ""
    for tensor in tensors:
        if tensor.begin < expected:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} overlaps {before!r} by {expected - tensor.begin} bytes", mend=_AGAIN
            )
        if tensor.begin > expected:
            raise CheckpointError(
                f"{path}: {tensor.begin - expected} bytes before tensor {tensor.name!r} belong to no tensor",
                mend=_AGAIN,
            )
        expected, before = tensor.end, tensor.name
    if file_bytes < expected:
        cut = next(tensor for tensor in tensors if tensor.end > file_bytes)
        raise CheckpointError(
            f"{path}: truncated: {expected - file_bytes} of {expected} bytes are missing, from tensor {cut.name!r} on",
            mend=_AGAIN,
        )
    if file_bytes > expected:
        raise CheckpointError(
            f"{path}: {file_bytes - expected} bytes after the last tensor belong to none: the file has {file_bytes} "
            f"bytes, the header accounts for {expected}",
            mend=_AGAIN,
        )
