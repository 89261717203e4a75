"""Weights in GGUF's block types, quantised by torch: Q8_0, Q5_0 and Q4_K.

Blocks as https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h lays them out. Scales come from the
extremes of a block, without llama.cpp's search for better ones, so files differ from its in quality and not in format.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pytest_zimage.checkpoints.synthetic.storage import Stored

if TYPE_CHECKING:
    import torch

GgufType = Literal["Q8_0", "Q5_0", "Q4_K"]
BLOCKS: dict[GgufType, tuple[int, int]] = {"Q8_0": (32, 34), "Q5_0": (32, 22), "Q4_K": (256, 144)}
"""Columns of K and bytes of one block."""


@dataclass(frozen=True, slots=True)
class GgufBlocks:
    """A matrix in blocks of one type; one whose columns no Q4_K block divides is Q5_0, as llama.cpp falls back."""

    type: GgufType

    def type_of(self, shape: tuple[int, ...]) -> GgufType:
        return self.type if shape[1] % BLOCKS[self.type][0] == 0 else "Q5_0"

    def describe(self, name: str, shape: tuple[int, ...]) -> list[Stored]:
        block, size = BLOCKS[self.type_of(shape)]
        if shape[1] % block:
            raise ValueError(f"{name}: {shape[1]} columns are no whole number of blocks of {block}")
        return [Stored(name, "U8", (shape[0], shape[1] // block * size))]

    def encode(self, name: str, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        kind = self.type_of(tuple(weight.shape))
        quantise = {"Q8_0": _q8_0, "Q5_0": _q5_0, "Q4_K": _q4_k}[kind]
        return {name: quantise(weight.float().reshape(-1, BLOCKS[kind][0])).reshape(len(weight), -1)}


def _q8_0(blocks: torch.Tensor) -> torch.Tensor:
    """float16 scale, 32 signed bytes."""
    import torch

    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).half()
    codes = _divided(blocks, scale).clamp(-127, 127).to(torch.int8)
    return torch.cat([scale.view(torch.uint8), codes.view(torch.uint8)], dim=1)


def _q5_0(blocks: torch.Tensor) -> torch.Tensor:
    """float16 scale, the fifth bits of 32 codes, their low halves: first sixteen in the low nibbles."""
    import torch

    at = blocks.abs().argmax(dim=1, keepdim=True)
    # The signed extreme is code 0, so that the one code without a partner is used.
    scale = (blocks.gather(1, at) / -16).half()
    codes = (_divided(blocks, scale) + 16).clamp(0, 31).to(torch.uint8)
    weights = 2 ** torch.arange(8, device=blocks.device, dtype=torch.int32)
    high = ((codes >> 4).reshape(-1, 4, 8).to(torch.int32) * weights).sum(dim=2).to(torch.uint8)
    low = (codes[:, :16] & 15) | ((codes[:, 16:] & 15) << 4)
    return torch.cat([scale.view(torch.uint8), high, low], dim=1)


def _q4_k(blocks: torch.Tensor) -> torch.Tensor:
    """Two float16 scales, eight scales and eight minima of six bits, eight sub-blocks of 32 four-bit codes."""
    import torch

    parts = blocks.reshape(-1, 8, 32)
    least = parts.amin(dim=2).clamp(max=0)
    step = (parts.amax(dim=2) - least) / 15
    d, d_min = ((values.amax(dim=1, keepdim=True) / 63).half() for values in (step, -least))
    steps, minima = (_divided(values, unit).clamp(0, 63) for values, unit in ((step, d), (-least, d_min)))
    offset = (d_min.float() * minima)[..., None]
    codes = _divided(parts + offset, (d.float() * steps)[..., None]).clamp(0, 15).to(torch.uint8)
    low = codes.reshape(-1, 4, 2, 32)
    packed = (low[:, :, 0] | (low[:, :, 1] << 4)).reshape(-1, 128)
    scales = _pack_six_bits(steps.to(torch.uint8), minima.to(torch.uint8))
    return torch.cat([d.view(torch.uint8), d_min.view(torch.uint8), scales, packed], dim=1)


def _pack_six_bits(steps: torch.Tensor, minima: torch.Tensor) -> torch.Tensor:
    """Eight scales and eight minima in twelve bytes: the upper two bits of the last four go above the first four."""
    import torch

    first = steps[:, :4] | ((steps[:, 4:] >> 4) << 6)
    second = minima[:, :4] | ((minima[:, 4:] >> 4) << 6)
    third = (steps[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4)
    return torch.cat([first, second, third], dim=1)


def _divided(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    """`values / unit`, rounded; zero where the unit is zero."""
    wide = unit.float()
    return (values / wide.where(wide != 0, 1.0)).round()
