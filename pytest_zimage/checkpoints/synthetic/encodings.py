"""How weights lie in the files that are written only when asked for: MXFP8, INT8 ConvRot, SVDQuant, a LoRA's factors.

As `storage`: each encoding says what it will write and writes it; comfy-kitchen quantises wherever it can.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pytest_zimage.checkpoints.scales import block_scale_shape
from pytest_zimage.checkpoints.synthetic.plan import Weight
from pytest_zimage.checkpoints.synthetic.storage import Storage, Stored, describe, encode

if TYPE_CHECKING:
    import torch

SVDQUANT_RANK = 32
_GROUP = 64
"""Columns of K that share a scale of SVDQuant's weights."""
_CONVROT_GROUPS = (256, 64, 16)
"""Sizes of a regular Hadamard rotation; the files have the first that divides K, and 256 at the real dimensions."""


class Encoding(Protocol):
    """One way to store a matrix named `LAYER.weight`."""

    def describe(self, name: str, shape: tuple[int, ...]) -> list[Stored]:
        """The tensors that it becomes."""
        ...

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """The tensors themselves, by name, on the device of `weight`."""
        ...


@dataclass(frozen=True, slots=True)
class EncodedWeight(Weight):
    """A weight in an encoding of this module instead of a `storage`."""

    encoding: Encoding | None = None

    def stored(self) -> list[Stored]:
        assert self.encoding is not None
        return self.encoding.describe(self.name, self.shape)

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        assert self.encoding is not None
        return self.encoding.encode(self.name, weight)


@dataclass(frozen=True, slots=True)
class Blob:
    """A `storage` of the official files with the record of convert-to-quant beside it."""

    storage: Storage
    record: dict[str, Any]

    def describe(self, name: str, shape: tuple[int, ...]) -> list[Stored]:
        return [*_without_blob(describe(self.storage, name, shape)), _blob_stored(name, self.record)]

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        blob = _blob_stored(name, self.record).name
        return {**encode(self.storage, name, weight), blob: _blob(self.record, weight)}


@dataclass(frozen=True, slots=True)
class Mxfp8:
    """FP8 codes, E8M0 scales of 32 columns as bytes in tiles, and a record."""

    record: dict[str, Any]

    def describe(self, name: str, shape: tuple[int, ...]) -> list[Stored]:
        scales = block_scale_shape(shape[0], shape[1], 32)
        return [
            Stored(name, "F8_E4M3", shape),
            Stored(f"{name}_scale", "U8", scales),
            _blob_stored(name, self.record_of(shape)),
        ]

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch
        from comfy_kitchen.tensor import QuantizedTensor

        held = QuantizedTensor.from_float(weight, "TensorCoreMXFP8Layout")
        record = self.record_of(tuple(weight.shape))
        return {
            name: held._qdata,
            f"{name}_scale": held._params.scale.view(torch.uint8),
            _blob_stored(name, record).name: _blob(record, weight),
        }

    def record_of(self, shape: tuple[int, ...]) -> dict[str, Any]:
        """The dedicated path of convert-to-quant also records the shape."""
        return {**self.record, "orig_shape": list(shape)} if "group_size" in self.record else self.record


class Int8ConvRot:
    """Rows of INT8 with a scale each, of the weight rotated in groups of columns."""

    def describe(self, name: str, shape: tuple[int, ...]) -> list[Stored]:
        record = self.record_of(shape)
        return [Stored(name, "I8", shape), Stored(f"{name}_scale", "F32", (shape[0], 1)), _blob_stored(name, record)]

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from comfy_kitchen.tensor import QuantizedTensor

        record = self.record_of(tuple(weight.shape))
        held = QuantizedTensor.from_float(
            # Wide, or the rotation would round before the quantisation does.
            weight.float(),
            "TensorWiseINT8Layout",
            per_channel=True,
            convrot=True,
            convrot_groupsize=record["convrot_groupsize"],
        )
        scale = held._params.scale.reshape(-1, 1)
        return {name: held._qdata, f"{name}_scale": scale, _blob_stored(name, record).name: _blob(record, weight)}

    def record_of(self, shape: tuple[int, ...]) -> dict[str, Any]:
        group = next(size for size in _CONVROT_GROUPS if shape[1] % size == 0)
        return {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}


class SvdQuant:
    """INT4 in groups of 64 columns of what a low-rank part leaves over; smoothed without calibration.

    Real files balance activations against weights; here each column is scaled by the root of its own largest weight,
    which exercises the factor and means nothing.
    """

    RECORD: dict[str, Any] = {"format": "svdquant_w4a4"}  # noqa: RUF012

    def describe(self, name: str, shape: tuple[int, ...]) -> list[Stored]:
        rows, columns = shape
        layer = name.removesuffix(".weight")
        return [
            Stored(name, "I8", (rows, columns // 2)),
            Stored(f"{name}_scale", "BF16", (columns // _GROUP, rows)),
            Stored(f"{layer}.smooth_factor", "BF16", (columns,)),
            Stored(f"{layer}.proj_down", "BF16", (columns, SVDQUANT_RANK)),
            Stored(f"{layer}.proj_up", "BF16", (rows, SVDQUANT_RANK)),
            _blob_stored(name, self.RECORD),
        ]

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        import torch

        rows, columns = weight.shape
        layer = name.removesuffix(".weight")
        up, down = low_rank(weight, SVDQUANT_RANK, name)
        up, down = up.to(torch.bfloat16), down.to(torch.bfloat16)
        largest = weight.float().abs().amax(dim=0).clamp(min=1e-6)
        smooth = (largest.mean() / largest).sqrt().to(torch.bfloat16)
        rest = (weight.float() - up.float() @ down.float()) * smooth.float()
        groups = rest.reshape(rows, columns // _GROUP, _GROUP)
        scale = (groups.abs().amax(dim=-1).clamp(min=1e-6) / 7).to(torch.bfloat16)
        codes = (groups / scale.float()[..., None]).round().clamp(-7, 7).to(torch.int32).reshape(rows, columns)
        packed = ((codes[:, 0::2] & 15) | ((codes[:, 1::2] & 15) << 4)).to(torch.uint8).view(torch.int8)
        return {
            name: packed,
            f"{name}_scale": scale.t().contiguous(),
            f"{layer}.smooth_factor": smooth,
            f"{layer}.proj_down": down.t().contiguous(),
            f"{layer}.proj_up": up,
            _blob_stored(name, self.RECORD).name: _blob(self.RECORD, weight),
        }


@dataclass(frozen=True, slots=True)
class LoraOf:
    """The low-rank part of what quantising to comfy-kitchen's `layout` takes away, named as by `--extract-lora`."""

    layout: str
    rank: int

    def describe(self, name: str, shape: tuple[int, ...]) -> list[Stored]:
        up, down = self._names(name)
        return [Stored(up, "F32", (shape[0], self.rank)), Stored(down, "F32", (self.rank, shape[1]))]

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        from comfy_kitchen.tensor import QuantizedTensor

        held = QuantizedTensor.from_float(weight, self.layout)
        up, down = low_rank(weight.double() - held.dequantize().double(), self.rank, name)
        names = self._names(name)
        return {names[0]: up.float(), names[1]: down.float()}

    def _names(self, name: str) -> tuple[str, str]:
        stem = f"diffusion_model.{name.removesuffix('.weight')}"
        return f"{stem}.lora_up.weight", f"{stem}.lora_down.weight"


def low_rank(matrix: torch.Tensor, rank: int, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors `[N, r]` and `[r, K]` whose product is nearly the best of that rank; float64.

    A randomised range finder with one power iteration (Halko, Martinsson, Tropp 2011): four thin products, where a
    singular value decomposition would take minutes at the real size.
    """
    import torch

    from pytest_zimage.checkpoints.synthetic.values import make_weight

    wide = matrix.double()
    probe = make_weight(f"probe/{name}", (wide.shape[1], rank), torch.float32, wide.device).double()
    basis, _ = torch.linalg.qr(wide @ (wide.t() @ (wide @ probe)))
    return basis.contiguous(), (basis.t() @ wide).contiguous()


def _without_blob(tensors: list[Stored]) -> list[Stored]:
    return [tensor for tensor in tensors if not tensor.name.endswith(".comfy_quant")]


def _blob_stored(name: str, record: dict[str, Any]) -> Stored:
    return Stored(f"{name.removesuffix('.weight')}.comfy_quant", "U8", (len(json.dumps(record).encode()),))


def _blob(record: dict[str, Any], beside: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.tensor(list(json.dumps(record).encode()), dtype=torch.uint8, device=beside.device)
