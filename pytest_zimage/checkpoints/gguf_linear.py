"""Linears with a GGUF weight: dequantised in each forward by diffusers' GGUF quantiser.

The dequantisation is an operation of its own to torch's dispatcher, so that what really ran can be counted.
"""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
from torch.nn import functional as F

from pytest_zimage.checkpoints.linears import Compute, LinearModule
from pytest_zimage.errors import UnsupportedError


class GgufLinear(LinearModule):
    """The weight is diffusers' `GGUFParameter`: bytes `[N, K / block * bytes of a block]` that know their type."""

    compute: ClassVar[Compute] = "weight-only"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = dequantize_gguf(self.weight.as_tensor(), int(self.weight.quant_type), x.dtype)
        return F.linear(x, weight, self._bias(x.dtype))


@torch.library.custom_op("pytest_zimage::dequantize_gguf", mutates_args=())
def dequantize_gguf(data: torch.Tensor, quant_type: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of the GGUF type of that number to `[N, K]`; as diffusers, first in the block's own float16."""
    from diffusers.quantizers.gguf import utils

    quantiser: Any = utils
    dense: torch.Tensor = quantiser.dequantize_gguf_tensor(gguf_parameter(data, quant_type))
    return dense.to(dtype)


@dequantize_gguf.register_fake
def _shape_of(data: torch.Tensor, quant_type: int, dtype: torch.dtype) -> torch.Tensor:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(quant_type)]
    return data.new_empty((data.shape[0], data.shape[1] // block_bytes * block), dtype=dtype)


def gguf_parameter(data: torch.Tensor, quant_type: int | str) -> Any:
    """diffusers' parameter of GGUF type `quant_type`, by number or name, over the bytes `data`.

    Raises `UnsupportedError` for a type that the installed diffusers does not dequantise.
    """
    from diffusers.quantizers.gguf.utils import SUPPORTED_GGUF_QUANT_TYPES, GGUFParameter
    from gguf import GGMLQuantizationType

    kind = GGMLQuantizationType[quant_type] if isinstance(quant_type, str) else GGMLQuantizationType(quant_type)
    if kind not in SUPPORTED_GGUF_QUANT_TYPES:
        raise UnsupportedError(
            f"GGUF type {kind.name} is not dequantised by the installed diffusers",
            mend=f"types that are: {', '.join(sorted(known.name for known in SUPPORTED_GGUF_QUANT_TYPES))}",
        )
    return cast(Any, GGUFParameter)(data, requires_grad=False, quant_type=kind)
