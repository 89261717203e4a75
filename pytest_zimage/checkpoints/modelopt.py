"""What ModelOpt's quantisation config says of a file in diffusers' layout, checked against the file's tensors.

The config is `quantization_config` of the transformer's `config.json` (or of a single file's header), or the older
`hf_quant_config.json`. Every linear is quantised by the one algorithm named, except those on the ignore list.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pytest_zimage.checkpoints.header import Header, TensorInfo
from pytest_zimage.checkpoints.nibbles import LO_FIRST
from pytest_zimage.errors import CheckpointError, UnsupportedError

CONFIG_KEY = "quantization_config"
OLD_CONFIG_KEY = "hf_quant_config"
"""Keys of a header's metadata; `folders` puts there what a folder has in files."""

_ALGORITHMS: dict[str, dict[str, Any]] = {
    "FP8": {"format": "float8_e4m3fn"},
    "FP8_PER_CHANNEL_PER_TOKEN": {"format": "float8_e4m3fn"},
    "FP8_PB_WO": {"format": "float8_e4m3fn", "full_precision_matrix_mult": True},
    "NVFP4": {"format": "nvfp4", LO_FIRST: True},
}
"""ModelOpt's names, and the record that a ComfyUI file would have."""
_PACKED = ("F8_E4M3", "F8_E5M2", "U8", "I8")
_INVERSE = ".weight_scale_inv"
_NAMED_AT_MOST = 3
_ANEW = "have the file exported anew, or take another"
_SERVED = f"algorithms that are served: {', '.join(_ALGORITHMS)}"


@dataclass(frozen=True, slots=True)
class Policy:
    """Which linears a ModelOpt file has quantised, and how."""

    record: dict[str, Any]
    ignore: tuple[str, ...]

    def ignores(self, layer: str) -> bool:
        """Whether `layer`, in diffusers' naming, is left alone: by name, by a module above it, by glob or `re:`."""
        return any(_matches(pattern, name) for pattern in self.ignore for name in _names(layer))


def records(header: Header, tensors: dict[str, TensorInfo]) -> dict[str, dict[str, Any]] | None:
    """The record of each quantised layer of a ModelOpt file; None where nothing says that it is one.

    Raises `CheckpointError` for a config that cannot be followed and for a layer whose tensors contradict it, naming
    the layer; `UnsupportedError` for another method or algorithm. Inverse block scales in `tensors` get today's name.
    """
    policy = _policy(header)
    if policy is None:
        return None
    for name in [name for name in tensors if name.endswith(_INVERSE)]:
        # "Inverse" of what the weights were multiplied by: dequantising multiplies with it, as with any weight_scale.
        tensors[name.removesuffix("_inv")] = tensors.pop(name)
    layers = [name.removesuffix(".weight") for name, tensor in tensors.items() if _is_linear(name, tensor)]
    quantised = {layer for layer in layers if _is_quantised(layer, tensors)}
    ignored = {layer for layer in layers if policy.ignores(layer)}
    for wrong, what in (
        (quantised & ignored, "on the ignore list and quantised all the same"),
        (set(layers) - quantised - ignored, "not on the ignore list and not quantised"),
    ):
        if wrong:
            raise CheckpointError(
                f"{header.path}: the quantisation config contradicts the tensors: {_named(wrong)}: {what}",
                mend="take weights and config of the same export",
            )
    return {layer: dict(policy.record) for layer in sorted(quantised)}


def _policy(header: Header) -> Policy | None:
    for key in (CONFIG_KEY, OLD_CONFIG_KEY):
        if key not in header.metadata:
            continue
        try:
            config = json.loads(header.metadata[key])
        except ValueError as error:
            raise CheckpointError(f"{header.path}: {key} is not JSON: {error}", mend=_ANEW) from error
        if key == OLD_CONFIG_KEY and isinstance(config, dict):
            config = {"quant_method": "modelopt", **_table(header.path, config, "quantization")}
        return _read(header.path, key, config)
    return None


def _read(path: Path, key: str, config: object) -> Policy | None:
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: {key} is not a table", mend=_ANEW)
    method, algorithm = config.get("quant_method"), config.get("quant_algo")
    if method == "modelopt_fp4":
        method, algorithm = "modelopt", algorithm or "NVFP4"
    if method == "compressed-tensors":
        # It names its tensors otherwise, by which they are told.
        return None
    if method != "modelopt":
        raise UnsupportedError(f"{path}: {key} names the method {method!r}, not 'modelopt'", mend=_SERVED)
    if not isinstance(algorithm, str):
        raise CheckpointError(f"{path}: {key} names no quant_algo", mend=_ANEW)
    if algorithm not in _ALGORITHMS:
        raise UnsupportedError(f"{path}: ModelOpt's algorithm {algorithm!r} is not served", mend=_SERVED)
    groups = config.get("config_groups") or {}
    for name in groups if isinstance(groups, dict) else ():
        targets = _table(path, groups, name).get("targets", ["Linear"])
        if targets != ["Linear"]:
            raise UnsupportedError(
                f"{path}: {key} quantises {targets!r} in {name!r}, not all linears but the ignored", mend=_SERVED
            )
    ignore = config.get("ignore", config.get("exclude_modules", []))
    if not isinstance(ignore, list) or not all(isinstance(pattern, str) for pattern in ignore):
        raise CheckpointError(f"{path}: {key}: the ignore list is not a list of names", mend=_ANEW)
    for pattern in ignore:
        if pattern.startswith("re:"):
            _check_expression(path, pattern)
    return Policy(_ALGORITHMS[algorithm], tuple(ignore))


def _table(path: Path, tables: dict[str, Any], name: str) -> dict[str, Any]:
    table = tables.get(name)
    if not isinstance(table, dict):
        raise CheckpointError(f"{path}: its quantisation config has no table {name!r}", mend=_ANEW)
    return table


def _check_expression(path: Path, pattern: str) -> None:
    try:
        re.compile(pattern[3:])
    except re.error as error:
        raise CheckpointError(
            f"{path}: ignore list: {pattern!r} is not a regular expression: {error}", mend=_ANEW
        ) from error


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], name) is not None
    return name.startswith(f"{pattern}.") or fnmatchcase(name, pattern)


def _names(layer: str) -> list[str]:
    """The names a list may use for `layer`: diffusers', with the component before it, and vLLM-Omni's fused ones."""
    fused = re.sub(r"\.to_[qkv]$", ".to_qkv", layer).replace(".to_out.0", ".to_out")
    fused = re.sub(r"\.feed_forward\.w[13]$", ".feed_forward.w13", fused)
    return [f"{prefix}{name}" for name in dict.fromkeys((layer, fused)) for prefix in ("", "transformer.")]


def _is_linear(name: str, tensor: TensorInfo) -> bool:
    return name.endswith(".weight") and len(tensor.shape) == 2


def _is_quantised(layer: str, tensors: dict[str, TensorInfo]) -> bool:
    return tensors[f"{layer}.weight"].dtype in _PACKED or f"{layer}.weight_scale" in tensors


def _named(layers: set[str]) -> str:
    more = len(layers) - _NAMED_AT_MOST
    shown = ", ".join(map(repr, sorted(layers)[:_NAMED_AT_MOST]))
    return shown + (f" and {more} more" if more > 0 else "")
