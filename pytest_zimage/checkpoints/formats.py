"""Which tensors of a file are quantised layers, and how, by the records of ComfyUI, compressed-tensors and ModelOpt.

A file with ModelOpt's quantisation config is read by that alone. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from pytest_zimage.checkpoints import comfy_records, modelopt
from pytest_zimage.checkpoints.comfy_records import OLD_SUFFIXES, ComfySource
from pytest_zimage.checkpoints.gguf_header import GGUF_SUFFIX
from pytest_zimage.checkpoints.header import Header, TensorInfo
from pytest_zimage.checkpoints.keymap import TRANSFORMER_PREFIXES
from pytest_zimage.checkpoints.nibbles import LO_FIRST, compressed_tensors_records
from pytest_zimage.checkpoints.scales import check_layer, scale_blocks
from pytest_zimage.checkpoints.svdquant import SUFFIXES, SVDQUANT, check_svdquant
from pytest_zimage.errors import CheckpointError, UnsupportedError

Format = Literal["float8_e4m3fn", "float8_e5m2", "nvfp4", "mxfp8", "int8_tensorwise", "svdquant_w4a4", "gguf"]
Source = Literal[ComfySource, "modelopt", "compressed-tensors"]

GGUF: Format = "gguf"
"""Stands for all types of GGUF, which only a GGUF file has."""
KNOWN_FORMATS: tuple[Format, ...] = tuple(format_ for format_ in get_args(Format) if format_ != GGUF)
"""Formats of a layer that a safetensors file may name."""

SCALE_SUFFIXES = ("weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale")
"""Tensors that may stand beside a quantised layer's `weight`, unless its format has its own."""
_OWN_SUFFIXES: dict[str, tuple[str, ...]] = {SVDQUANT: SUFFIXES, GGUF: ()}

_COMFYUI_ONLY = ("convrot_w4a4", "asym_w4a8_int8", "awq_w4a16")
_ORPHANS = (*SCALE_SUFFIXES, *OLD_SUFFIXES, *SUFFIXES)
_PACKED_DTYPES = ("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8")
_GUESS = "; without one, NVFP4 may have either half of a byte first, and the wrong one decodes to noise"
_ANEW = "have the file written anew, or take the official one"


@dataclass(frozen=True, slots=True)
class QuantisedLayer:
    """One linear held in a quantised format."""

    name: str
    """The layer's name in the file, prefix removed."""
    format: Format
    weight_only: bool
    """The file asks for dequantised weights and untouched activations."""
    tensors: dict[str, TensorInfo]
    """By suffix: `weight` and those of `SCALE_SUFFIXES` that the file has. Scales keep the dtype they have on disk."""
    options: dict[str, Any] = field(default_factory=dict)
    """The layer's whole record, e.g. `convrot` and `convrot_groupsize` of INT8."""

    @property
    def scale_blocks(self) -> tuple[int, int] | None:
        """Rows and columns that share a scale in an FP8 weight with several; None: one scale, or the format's own."""
        return scale_blocks(self.format, self.tensors)


@dataclass(frozen=True, slots=True)
class Contents:
    """A file's tensors, sorted into plain ones and quantised layers; names have the prefix removed."""

    plain: dict[str, TensorInfo]
    quantised: dict[str, QuantisedLayer]
    source: Source
    """Where the quantisation was recorded; the strongest, if in several places."""
    prefix: str


def detect(header: Header, read: Callable[[TensorInfo], bytes]) -> Contents:
    """Sort the tensors of `header`; `read` gives a tensor's bytes and is asked for blobs and scalars only.

    Raises `CheckpointError` naming file and layer for a record that cannot be followed, a quantised layer that lacks a
    tensor or has one of the wrong shape or dtype, and a scale or packed weight that no record explains;
    `UnsupportedError` for formats and scale shapes that are sound but not served.
    """
    prefix, tensors = _strip_prefix(header)
    source: Source
    records, source = comfy_records.records(header, prefix, tensors, read)
    packed = compressed_tensors_records(header.path, tensors)
    if packed:
        source = "compressed-tensors"
        records |= packed
    exported = modelopt.records(header, tensors)
    if exported is not None:
        if records:
            raise CheckpointError(
                f"{header.path}: both ComfyUI's records and ModelOpt's config say how it is quantised", mend=_ANEW
            )
        source = "modelopt" if exported else "none"
        records = exported
    quantised = {layer: _layer(header, layer, record, tensors) for layer, record in records.items()}
    _check_rest(header, tensors)
    return Contents(tensors, quantised, source, prefix)


def _strip_prefix(header: Header) -> tuple[str, dict[str, TensorInfo]]:
    prefix = next((p for p in TRANSFORMER_PREFIXES if any(name.startswith(p) for name in header.tensors)), "")
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in header.tensors.items():
        bare = name.removeprefix(prefix)
        if bare in tensors:
            raise CheckpointError(f"{header.path}: tensor {bare!r} is there with and without {prefix!r}", mend=_ANEW)
        tensors[bare] = tensor
    return prefix, tensors


def _layer(header: Header, name: str, record: dict[str, Any], tensors: dict[str, TensorInfo]) -> QuantisedLayer:
    format_ = record["format"]
    if format_ not in KNOWN_FORMATS and not (format_ == GGUF and header.path.suffix == GGUF_SUFFIX):
        known = f"formats that can be read: {', '.join(KNOWN_FORMATS)}"
        if format_ in _COMFYUI_ONLY:
            raise UnsupportedError(f"{header.path}: layer {name!r}: format {format_!r} is not served", mend=known)
        raise CheckpointError(f"{header.path}: layer {name!r}: unknown quantisation format {format_!r}", mend=known)
    found = {
        suffix: tensors.pop(f"{name}.{suffix}")
        for suffix in ("weight", *_OWN_SUFFIXES.get(format_, SCALE_SUFFIXES))
        if f"{name}.{suffix}" in tensors
    }
    if format_ == SVDQUANT:
        check_svdquant(header.path, name, found, record)
    elif format_ != GGUF:
        check_layer(header.path, name, format_, found, tiled=not record.get(LO_FIRST, False))
    weight_only = record.get("full_precision_matrix_mult", False)
    if not isinstance(weight_only, bool):
        raise CheckpointError(
            f"{header.path}: layer {name!r}: full_precision_matrix_mult is {weight_only!r}, not true or false",
            mend=_ANEW,
        )
    return QuantisedLayer(name, cast(Format, format_), weight_only, found, dict(record))


def _check_rest(header: Header, tensors: dict[str, TensorInfo]) -> None:
    for name, tensor in tensors.items():
        if name.endswith(".weight_scale_inv"):
            raise UnsupportedError(
                f"{header.path}: tensor {tensor.name!r}: FP8 block scales are not served",
                mend="take a file with one scale per tensor, NVFP4 or MXFP8",
            )
    for name, tensor in tensors.items():
        layer, _, suffix = name.rpartition(".")
        if suffix in _ORPHANS:
            raise CheckpointError(
                f"{header.path}: tensor {tensor.name!r} is a scale, and no record says that {layer!r} is quantised"
                + (_GUESS if suffix == "weight_scale_2" else ""),
                mend=_ANEW,
            )
        if tensor.dtype in _PACKED_DTYPES:
            raise CheckpointError(
                f"{header.path}: tensor {tensor.name!r} is {tensor.dtype}, and nothing in the file says how it was "
                "quantised: no _quantization_metadata, .comfy_quant, scaled_fp8 or quantization_config covers it",
                mend='for a plain FP8 cast take the BF16 file and weight_dtype = "fp8_e4m3fn"',
            )
