"""ComfyUI's three ways of saying which tensors of a file are quantised layers, and how; no torch.

Rules as in ComfyUI comfy/utils.py `convert_old_quants` and comfy/ops.py `mixed_precision_ops`: what the header's
`_quantization_metadata` says of a layer wins over the layer's own `.comfy_quant` blob, which wins over the old
`scaled_fp8` marker.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from typing import Any, Literal

from pytest_zimage.checkpoints.header import Header, TensorInfo
from pytest_zimage.errors import CheckpointError

ComfySource = Literal["none", "header", "blobs", "scaled_fp8"]

OLD_SUFFIXES = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
"""Tensors beside a weight of old scaled FP8, and today's names of them."""

_BLOB_LIMIT_BYTES = 65536
_ANEW = "have the file written anew, or take the official one"


def records(
    header: Header, prefix: str, tensors: dict[str, TensorInfo], read: Callable[[TensorInfo], bytes]
) -> tuple[dict[str, dict[str, Any]], ComfySource]:
    """The record of each quantised layer, and the strongest of the places that recorded some.

    `tensors` are by their names without `prefix`; markers and blobs are taken out of them, and old scales get today's
    names. Raises `CheckpointError` naming file and layer for a record that cannot be followed.
    """
    marker = tensors.pop("scaled_fp8", None)
    found: dict[str, dict[str, Any]] = {}
    source: ComfySource = "none"
    if marker is not None:
        source = "scaled_fp8"
        found |= _from_marker(header, marker, tensors, read)
    blobs = _from_blobs(header, tensors, read)
    if blobs:
        source = "blobs"
        found |= blobs
    named = _from_header(header, prefix)
    if named is not None:
        source = "header"
        found |= named
    return found, source


def _from_marker(
    header: Header, marker: TensorInfo, tensors: dict[str, TensorInfo], read: Callable[[TensorInfo], bytes]
) -> dict[str, dict[str, Any]]:
    """Old scaled FP8: renames its scales in `tensors` to today's names. A marker of two elements means weight-only."""
    record: dict[str, Any] = {"format": "float8_e4m3fn"}
    if marker.elements == 2:
        record["full_precision_matrix_mult"] = True
    records: dict[str, dict[str, Any]] = {}
    for name in list(tensors):
        layer, _, suffix = name.rpartition(".")
        if suffix not in OLD_SUFFIXES:
            continue
        tensor = tensors.pop(name)
        if suffix == "scale_weight":
            records[layer] = record
        elif _is_one(header, tensor, read):
            continue
        today = f"{layer}.{OLD_SUFFIXES[suffix]}"
        if today in tensors:
            raise CheckpointError(f"{header.path}: both {name!r} and {today!r} are there", mend=_ANEW)
        tensors[today] = tensor
    return records


def _is_one(header: Header, tensor: TensorInfo, read: Callable[[TensorInfo], bytes]) -> bool:
    if tensor.dtype != "F32" or tensor.elements != 1:
        raise CheckpointError(
            f"{header.path}: tensor {tensor.name!r}: an input scale is one F32 number, "
            f"not {tensor.dtype} {list(tensor.shape)}",
            mend=_ANEW,
        )
    value: float = struct.unpack("<f", read(tensor))[0]
    return value == 1.0


def _from_blobs(
    header: Header, tensors: dict[str, TensorInfo], read: Callable[[TensorInfo], bytes]
) -> dict[str, dict[str, Any]]:
    """Per-layer JSON in U8 tensors; takes them out of `tensors`."""
    records = {}
    for name in [name for name in tensors if name.endswith(".comfy_quant")]:
        tensor, layer = tensors.pop(name), name.removesuffix(".comfy_quant")
        if tensor.dtype != "U8" or len(tensor.shape) != 1 or tensor.nbytes > _BLOB_LIMIT_BYTES:
            raise CheckpointError(
                f"{header.path}: tensor {tensor.name!r}: expected JSON in a short U8 vector, "
                f"found {tensor.dtype} {list(tensor.shape)}",
                mend=_ANEW,
            )
        try:
            value = json.loads(read(tensor))
        except ValueError as error:
            raise CheckpointError(f"{header.path}: tensor {tensor.name!r}: not JSON: {error}", mend=_ANEW) from error
        records[layer] = _record(header, layer, value)
    return records


def _from_header(header: Header, prefix: str) -> dict[str, dict[str, Any]] | None:
    text = header.metadata.get("_quantization_metadata")
    if text is None:
        return None
    try:
        document = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{header.path}: _quantization_metadata in the header is not JSON: {error}", mend=_ANEW
        ) from error
    layers = document.get("layers") if isinstance(document, dict) else None
    if not isinstance(layers, dict):
        raise CheckpointError(f"{header.path}: _quantization_metadata in the header has no table 'layers'", mend=_ANEW)
    return {name.removeprefix(prefix): _record(header, name, value) for name, value in layers.items()}


def _record(header: Header, layer: str, value: object) -> dict[str, Any]:
    """A layer's record is a table with a `format`, or in older files the bare name of the format."""
    if isinstance(value, str):
        return {"format": value}
    if not isinstance(value, dict) or not isinstance(value.get("format"), str):
        raise CheckpointError(f"{header.path}: layer {layer!r}: its quantisation record names no format", mend=_ANEW)
    return value
