"""How one weight of the synthetic model lies on disk: the tensors each storage format writes for it.

Every format is described twice, side by side: what it will write (names, dtypes, shapes, without any data, so that a
header can be planned) and the tensors themselves. The formats are those of the official files.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_zimage.checkpoints.header import tensor_bytes
from pytest_zimage.checkpoints.scales import block_scale_shape

if TYPE_CHECKING:
    import torch

Storage = Literal["bf16", "f32", "fp8_scale_weight", "fp8_blob", "nvfp4_header", "nvfp4_blob", "modelopt_fp8"]

_BLOBS: dict[Storage, bytes] = {
    "fp8_blob": json.dumps({"format": "float8_e4m3fn"}).encode(),
    "nvfp4_blob": json.dumps({"format": "nvfp4"}).encode(),
}
_NVFP4_COLUMNS_PER_SCALE = 16
_FP8_LARGEST = 448.0
_NVFP4_LARGEST = _FP8_LARGEST * 6.0
"""Largest magnitude at a per-tensor scale of 1: the largest E4M3 block scale times the largest E2M1 value."""
_INPUT_AMAX = 32.0
"""Largest activation the static input scales allow for; inputs of the synthetic linears stay below about 16."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a file, before it exists."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return tensor_bytes(self.dtype, self.shape)


def describe(storage: Storage, name: str, shape: tuple[int, ...]) -> list[Stored]:
    """The tensors that weight `name` of `shape` becomes; quantised formats need a matrix named `LAYER.weight`."""
    if storage == "bf16":
        return [Stored(name, "BF16", shape)]
    if storage == "f32":
        return [Stored(name, "F32", shape)]
    layer = name.removesuffix(".weight")
    rows, columns = shape
    if storage == "fp8_scale_weight":
        return [Stored(name, "F8_E4M3", shape), Stored(f"{layer}.scale_weight", "F32", (1,))]
    if storage == "modelopt_fp8":
        scales = [Stored(f"{layer}.{suffix}", "F32", ()) for suffix in ("weight_scale", "input_scale")]
        return [Stored(name, "F8_E4M3", shape), *scales]
    if storage == "fp8_blob":
        tensors = [Stored(name, "F8_E4M3", shape), Stored(f"{layer}.weight_scale", "F32", ())]
    else:
        if rows % 16 or columns % 16:
            raise ValueError(f"{name}: NVFP4 without padding needs multiples of 16, not {shape}")
        tensors = [
            Stored(name, "U8", (rows, columns // 2)),
            Stored(f"{layer}.weight_scale", "F8_E4M3", block_scale_shape(rows, columns, _NVFP4_COLUMNS_PER_SCALE)),
            Stored(f"{layer}.weight_scale_2", "F32", ()),
        ]
    if storage == "nvfp4_header":
        tensors.append(Stored(f"{layer}.input_scale", "F32", ()))
    if storage in _BLOBS:
        tensors.append(Stored(f"{layer}.comfy_quant", "U8", (len(_BLOBS[storage]),)))
    return tensors


def encode(storage: Storage, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """The tensors themselves, by name, on the device of `weight`; quantised by comfy-kitchen."""
    import torch

    if storage == "bf16":
        return {name: weight.to(torch.bfloat16)}
    if storage == "f32":
        return {name: weight.to(torch.float32)}
    layer = name.removesuffix(".weight")
    if storage == "modelopt_fp8":
        # Not rounded to the weight's type, which comfy-kitchen's own maximum would be.
        quantised, scale = _fp8(weight, weight.abs().amax().float() / _FP8_LARGEST)
        input_scale = torch.tensor(_INPUT_AMAX / _FP8_LARGEST, dtype=torch.float32)
        return {name: quantised, f"{layer}.weight_scale": scale.reshape(()), f"{layer}.input_scale": input_scale}
    if storage in ("fp8_scale_weight", "fp8_blob"):
        quantised, scale = _fp8(weight)
        old = storage == "fp8_scale_weight"
        tensors = {name: quantised, f"{layer}.{'scale_weight' if old else 'weight_scale'}": scale.reshape(old * (1,))}
    else:
        quantised, block_scale, scale = _nvfp4(weight)
        tensors = {name: quantised, f"{layer}.weight_scale": block_scale, f"{layer}.weight_scale_2": scale.reshape(())}
    if storage == "nvfp4_header":
        tensors[f"{layer}.input_scale"] = torch.tensor(_INPUT_AMAX / _NVFP4_LARGEST, dtype=torch.float32)
    if storage in _BLOBS:
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(_BLOBS[storage]), dtype=torch.uint8)
    return tensors


def _fp8(weight: torch.Tensor, scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    from comfy_kitchen.tensor import QuantizedTensor

    held = QuantizedTensor.from_float(weight, "TensorCoreFP8Layout", scale=scale)
    return held._qdata, held._params.scale


def _nvfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    from comfy_kitchen.tensor import QuantizedTensor

    held = QuantizedTensor.from_float(weight, "TensorCoreNVFP4Layout")
    return held._qdata, held._params.block_scale, held._params.scale
