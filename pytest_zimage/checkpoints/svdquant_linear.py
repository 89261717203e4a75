"""Linears whose INT4 weight stands beside a low-rank part: comfy-kitchen quantises the input and adds both products."""

from __future__ import annotations

from typing import ClassVar

import comfy_kitchen as ck
import torch

from pytest_zimage.checkpoints.linears import Compute, WeightOnlyLinear


class SvdQuantLinear(WeightOnlyLinear):
    """`int4(x / smooth) @ int4(W)^T + (x @ proj_down) @ proj_up^T`, in the type of the weight's scales.

    Through comfy-kitchen's public functions, since its tensor class calls the CUDA kernels past the registry, where
    neither its log nor torch's dispatcher sees what served a call.
    """

    compute: ClassVar[Compute] = "quantised-activations"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat, held = x.reshape(-1, x.shape[-1]), self.weight._params
        codes, scales, low_rank = ck.quantize_svdquant_w4a4(flat, smooth=held.smooth_factor, lora_down=held.proj_down)
        y: torch.Tensor = ck.scaled_mm_svdquant_w4a4(
            act=codes,
            wgt=self.weight._qdata,
            ascales=scales,
            wscales=held.scale,
            lora_act_in=low_rank,
            lora_up=held.proj_up,
            bias=self._bias(x.dtype),
        )
        # The kernel pads the rows of its input.
        return y[: len(flat)].reshape(*x.shape[:-1], self.out_features)
