"""Linear layers by how they compute: the semantics ComfyUI gives each kind of weight.

Source: ComfyUI comfy/ops.py (`manual_cast`, `fp8_ops`, `mixed_precision_ops`). Each class replaces an `nn.Linear` of
the same place and shape; `compute` is the name under which it is counted. What a layer does is fixed when it is built:
nothing here tries one kernel and falls back on another.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import comfy_kitchen as ck
import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from torch import nn
from torch.nn import functional as F

Compute = Literal["plain", "cast", "weight-only", "quantised-activations", "low-rank"]

FP8 = torch.float8_e4m3fn
_FP8_LAYOUT = "TensorCoreFP8Layout"


class LinearModule(nn.Module):
    """What all replacements share: the shapes and the parameters of the linear they replace."""

    compute: ClassVar[Compute]
    """The name under which layers of this kind are counted."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        # Any: a quantised weight is a parameter with comfy-kitchen's fields.
        self.weight: Any = linear.weight
        self.bias: nn.Parameter | None = linear.bias

    def _bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        return None if self.bias is None else self.bias.to(dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, compute={self.compute}"


class CastLinear(LinearModule):
    """Weight and bias stored in one type and cast to the input's type in each forward."""

    compute: ClassVar[Compute] = "cast"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight.to(x.dtype), self._bias(x.dtype))


class QuantisingLinear(LinearModule):
    """Quantises its input before it multiplies; an input that is quantised already (`quantise`) is taken as it is."""

    compute: ClassVar[Compute] = "quantised-activations"

    def quantise(self, x: torch.Tensor) -> QuantizedTensor:
        """`[N, in]` as this layer multiplies it."""
        raise NotImplementedError

    def quantises_like(self, other: nn.Module) -> bool:
        """Whether `other` would quantise the same input to the same codes."""
        raise NotImplementedError

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        quantised = x if isinstance(x, QuantizedTensor) else self.quantise(x.reshape(-1, x.shape[-1]))
        # The bias has the type of the result, which is what the input had before it was quantised.
        y: torch.Tensor = F.linear(quantised, self.weight, self._bias(x.dtype))
        return y.reshape(*x.shape[:-1], self.out_features)


def input_shared_by(linears: Sequence[nn.Module], x: torch.Tensor) -> torch.Tensor:
    """`x` `[N, in]`, quantised once if all of `linears` would quantise it alike, else as it is."""
    first, *others = linears
    if isinstance(first, QuantisingLinear) and all(first.quantises_like(other) for other in others):
        x = first.quantise(x)
    return x


class FastFp8Linear(QuantisingLinear):
    """`fp8_e4m3fn_fast`: an unscaled FP8 weight times the input clamped and cast to FP8; output and bias in its type.

    The weight is a `QuantizedTensor` of scale 1. Inputs of other ranks than 2 and 3 are computed as by `CastLinear`.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim not in (2, 3):
            return F.linear(x, self.weight.dequantize().to(x.dtype), self._bias(x.dtype))
        return super().forward(x)

    def quantise(self, x: torch.Tensor) -> QuantizedTensor:
        # The weight's scale of 1 serves both, so that no forward has to put a number on the device.
        return _fp8(x, self.weight._params.scale)

    def quantises_like(self, other: nn.Module) -> bool:
        return isinstance(other, FastFp8Linear)

    @staticmethod
    def pack(weight: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """An FP8 `weight` as it is, with a scale of 1."""
        return _scaled(weight, torch.ones((), dtype=torch.float32, device=weight.device), dtype)


class DynamicFp8Linear(QuantisingLinear):
    """FP8 weights with one scale, times the input quantised with one scale from its own largest value."""

    def quantise(self, x: torch.Tensor) -> QuantizedTensor:
        return fp8_by_maximum(x)

    def quantises_like(self, other: nn.Module) -> bool:
        return isinstance(other, DynamicFp8Linear)


def fp8_by_maximum(x: torch.Tensor) -> QuantizedTensor:
    """`x` in FP8 with one scale: its largest magnitude becomes the largest that FP8 has."""
    # One pass without a copy, and not rounded to the type of `x` as comfy-kitchen's own would be.
    largest = torch.linalg.vector_norm(x, float("inf"), dtype=torch.float32)
    limits = torch.finfo(torch.float32), torch.finfo(FP8)
    return _fp8(x, (largest / limits[1].max).clamp_min(limits[0].tiny))


def _fp8(x: torch.Tensor, scale: torch.Tensor) -> QuantizedTensor:
    # One kernel clamps and casts. Not in place, unlike ComfyUI: the caller may still need its tensor.
    return _scaled(ck.quantize_per_tensor_fp8(x, scale, FP8), scale, x.dtype)


def _scaled(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
    params = get_layout_class(_FP8_LAYOUT).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(codes.shape))
    return QuantizedTensor(codes, _FP8_LAYOUT, params)


class WeightOnlyLinear(LinearModule):
    """A quantised weight dequantised in each forward; the activations are left alone."""

    compute: ClassVar[Compute] = "weight-only"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.pre_quant_scale: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        return F.linear(x, self._dequantised(x.dtype), self._bias(x.dtype))

    def _dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        weight: torch.Tensor = self.weight.dequantize()
        return weight.to(dtype)


class FinelyScaledFp8Linear(WeightOnlyLinear):
    """An FP8 weight with a scale for each channel or block; comfy-kitchen's FP8 has one for a whole weight.

    The weight is a plain FP8 parameter `[out, in]`.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.weight_scale: torch.Tensor | None = None
        """`[out / rows, 1, in / columns, 1]` float32, a scale for each block of rows by columns."""

    def _dequantised(self, dtype: torch.dtype) -> torch.Tensor:
        assert self.weight_scale is not None
        rows, _, columns, _ = self.weight_scale.shape
        blocks = self.weight.to(dtype).reshape(rows, self.out_features // rows, columns, self.in_features // columns)
        scaled: torch.Tensor = blocks * self.weight_scale.to(dtype)
        return scaled.reshape(self.out_features, self.in_features)


class QuantisedActivationsLinear(QuantisingLinear):
    """Weight and activations quantised to the same layout and multiplied as such.

    FP8 takes the file's static `input_scale`, or 1 as ComfyUI does (comfy-kitchen alone would take the maximum);
    NVFP4 takes it or the maximum of the input; MXFP8 scales each block by its own maximum.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.pre_quant_scale: torch.Tensor | None = None
        self.input_scale: torch.Tensor | None = None
        self._scale_value: float | None = None

    def set_input_scale(self, scale: torch.Tensor | None) -> None:
        """The file's static scale, or None; to be called once the weight is there."""
        if scale is not None:
            self.input_scale = scale.reshape(())
            self._scale_value = float(scale)
        elif self.weight._layout_cls == _FP8_LAYOUT:
            self.input_scale = torch.ones((), dtype=torch.float32, device=self.weight.device)
            self._scale_value = 1.0

    def quantise(self, x: torch.Tensor) -> QuantizedTensor:
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        return QuantizedTensor.from_float(x, self.weight._layout_cls, scale=self.input_scale)

    def quantises_like(self, other: nn.Module) -> bool:
        return (
            isinstance(other, QuantisedActivationsLinear)
            and other.weight._layout_cls == self.weight._layout_cls
            and other._scale_value == self._scale_value
            and self.pre_quant_scale is None
            and other.pre_quant_scale is None
        )


class Int8Linear(WeightOnlyLinear):
    """INT8 on a device with the kernel: comfy-kitchen quantises each row of the input itself."""

    compute: ClassVar[Compute] = "quantised-activations"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        return F.linear(x, self.weight, self._bias(x.dtype))
