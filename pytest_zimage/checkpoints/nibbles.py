"""NVFP4 as ModelOpt and compressed-tensors write it, turned into what comfy-kitchen multiplies.

Both have the even element of a pair in the low half of a byte and the block scales row by row; ComfyUI's files have it
in the high half and the scales in cuBLAS' tiles of 128 by 4. Read as the other, such a file decodes to noise without
any error, and most shapes fit both, so only a record or names of its own tell them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_zimage.checkpoints.header import TensorInfo
from pytest_zimage.errors import CheckpointError

if TYPE_CHECKING:
    import torch

LO_FIRST = "lo_first"
"""Key of a layer's record: nibbles and block scales lie in the other order."""
INVERSE = "inverse_scales"
"""Key of a layer's record: scales of whole tensors are divided by, not multiplied with."""

_PACKED = ".weight_packed"
_TODAY = {"weight_packed": "weight", "weight_global_scale": "weight_scale_2", "input_global_scale": "input_scale"}


def compressed_tensors_records(path: Path, tensors: dict[str, TensorInfo]) -> dict[str, dict[str, Any]]:
    """The record of each layer that compressed-tensors packed; its tensors in `tensors` get ComfyUI's names.

    Raises `CheckpointError` for a packed weight without a global scale, the mark of NVFP4 among what it packs.
    """
    records: dict[str, dict[str, Any]] = {}
    for name in [name for name in tensors if name.endswith(_PACKED)]:
        layer = name.removesuffix(_PACKED)
        if f"{layer}.weight_global_scale" not in tensors:
            raise CheckpointError(
                f"{path}: tensor {tensors[name].name!r} is packed by compressed-tensors, and without a tensor "
                f"'{layer}.weight_global_scale' it is not NVFP4",
                mend="of what compressed-tensors packs, only NVFP4 (nvfp4-pack-quantized) can be read",
            )
        for suffix, today in _TODAY.items():
            if f"{layer}.{suffix}" in tensors:
                tensors[f"{layer}.{today}"] = tensors.pop(f"{layer}.{suffix}")
        records[layer] = {"format": "nvfp4", LO_FIRST: True, INVERSE: True}
    return records


def to_comfy(record: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of an NVFP4 layer, by suffix, as ComfyUI's files have them; those of any other record as they are.

    `weight` is U8 `[N, K/2]`; `weight_scale` is `[N, K/16]` and gets tiled, padded with zeros. No code is rounded.
    """
    import torch
    from comfy_kitchen.float_utils import to_blocked

    converted = dict(tensors)
    if record.get(LO_FIRST):
        weight, scale = tensors["weight"], tensors["weight_scale"]
        converted["weight"] = (weight << 4) | (weight >> 4)
        # Bytes, since not every backend moves float8 about.
        converted["weight_scale"] = to_blocked(scale.view(torch.uint8), flatten=False).view(scale.dtype)
    if record.get(INVERSE):
        for suffix in ("weight_scale_2", "input_scale"):
            if suffix in tensors:
                converted[suffix] = tensors[suffix].reciprocal()
    return converted
