"""Linear layers by how they compute: the semantics ComfyUI gives each kind of weight.

Source: ComfyUI comfy/ops.py (`manual_cast`, `fp8_ops`, `mixed_precision_ops`). Each class replaces an `nn.Linear` of
the same place and shape; `compute` is the name under which it is counted. What a layer does is fixed when it is built:
nothing here tries one kernel and falls back on another.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class
from torch import nn
from torch.nn import functional as F

Compute = Literal["plain", "cast", "weight-only", "quantised-activations"]

FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
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


class FastFp8Linear(LinearModule):
    """`fp8_e4m3fn_fast`: an unscaled FP8 weight times the input clamped and cast to FP8; output and bias in its type.

    The weight is a `QuantizedTensor` of scale 1. Inputs of other ranks than 2 and 3 are computed as by `CastLinear`.
    """

    compute: ClassVar[Compute] = "quantised-activations"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.ndim not in (2, 3):
            return F.linear(x, self.weight.dequantize().to(x.dtype), self._bias(x.dtype))
        flat = x.reshape(-1, x.shape[-1])
        # Not in place, unlike ComfyUI: the values are the same and the caller may still need its tensor.
        codes = flat.clamp(-_FP8_MAX, _FP8_MAX).to(FP8)
        # The weight's scale of 1 serves both, so that no forward has to put a number on the device.
        params = get_layout_class(_FP8_LAYOUT).Params(
            scale=self.weight._params.scale, orig_dtype=x.dtype, orig_shape=tuple(flat.shape)
        )
        y = F.linear(QuantizedTensor(codes, _FP8_LAYOUT, params), self.weight, self._bias(x.dtype))
        return y.reshape(*x.shape[:-1], self.out_features)

    @staticmethod
    def pack(weight: torch.Tensor, dtype: torch.dtype) -> QuantizedTensor:
        """An FP8 `weight` as it is, with a scale of 1."""
        scale = torch.ones((), dtype=torch.float32, device=weight.device)
        params = get_layout_class(_FP8_LAYOUT).Params(scale=scale, orig_dtype=dtype, orig_shape=tuple(weight.shape))
        return QuantizedTensor(weight, _FP8_LAYOUT, params)


class WeightOnlyLinear(LinearModule):
    """A quantised weight dequantised in each forward; the activations are left alone."""

    compute: ClassVar[Compute] = "weight-only"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.pre_quant_scale: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        return F.linear(x, self.weight.dequantize().to(x.dtype), self._bias(x.dtype))


class QuantisedActivationsLinear(LinearModule):
    """Weight and activations quantised to the same layout and multiplied as such.

    FP8 takes the file's static `input_scale`, or 1 as ComfyUI does (comfy-kitchen alone would take the maximum);
    NVFP4 takes it or the maximum of the input; MXFP8 scales each block by its own maximum.
    """

    compute: ClassVar[Compute] = "quantised-activations"

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.pre_quant_scale: torch.Tensor | None = None
        self.input_scale: torch.Tensor | None = None

    def set_input_scale(self, scale: torch.Tensor | None) -> None:
        """The file's static scale, or None; to be called once the weight is there."""
        if scale is not None:
            self.input_scale = scale.reshape(())
        elif self.weight._layout_cls == _FP8_LAYOUT:
            self.input_scale = torch.ones((), dtype=torch.float32, device=self.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        flat = x.reshape(-1, x.shape[-1])
        quantised = QuantizedTensor.from_float(flat, self.weight._layout_cls, scale=self.input_scale)
        y = F.linear(quantised, self.weight, self._bias(x.dtype))
        return y.reshape(*x.shape[:-1], self.out_features)


class Int8Linear(WeightOnlyLinear):
    """INT8 on a device with the kernel: comfy-kitchen quantises each row of the input itself."""

    compute: ClassVar[Compute] = "quantised-activations"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        return F.linear(x, self.weight, self._bias(x.dtype))
