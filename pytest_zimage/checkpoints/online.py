"""Weights that a file holds in BF16 and that are quantised to FP8 while they are loaded, as vLLM-Omni's `fp8` does.

One scale per weight, from its largest value; the input of each product gets one from its own. Only linears of the
blocks: what vLLM-Omni computes with torch's own `Linear` (modulation, embedders, the final layer) stays, as do norms.
Source: vLLM-Omni diffusion/models/z_image/z_image_transformer.py, vLLM's `Fp8LinearMethod` for unquantised files.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from pytest_zimage.checkpoints.linears import DynamicFp8Linear, LinearModule, WeightOnlyLinear
from pytest_zimage.checkpoints.quantised import multiplies_natively

_IN_BLOCKS = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.(attention|feed_forward|self_attn|mlp)\..+")


def quantises_at_load(network: nn.Module, path: str) -> bool:
    """Whether the module at `path` of a transformer or of a text encoder is one that gets FP8 weights."""
    return _IN_BLOCKS.fullmatch(path) is not None and isinstance(network.get_submodule(path), nn.Linear)


def install_online(network: nn.Module, path: str, device: torch.device) -> bool:
    """Replace the linear at `path` by one that is to hold FP8; returns whether `device` can only dequantise it."""
    module = network.get_submodule(path)
    assert isinstance(module, nn.Linear)
    native = multiplies_natively("float8_e4m3fn", device)
    kind: type[LinearModule] = DynamicFp8Linear if native else WeightOnlyLinear
    network.set_submodule(path, kind(module))
    return not native
