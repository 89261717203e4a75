"""Z-Image's transformer block in as few passes over memory as ready-made kernels allow, under diffusers' names.

A GPU multiplies at hundreds of TFLOP/s and copies at a few TB/s, so every tensor written and read again counts. The
modulation is folded into the weights of the norms, which are vectors: `rms_norm(x) * w * (1 + scale)` is one kernel.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pytest_zimage.checkpoints.attention import FusedAttention, NormWeight
from pytest_zimage.checkpoints.linears import input_shared_by


class FusedBlock(nn.Module):
    """Takes the place of diffusers' `ZImageTransformerBlock`; `modulation` is None in the context refiner.

    The mathematics is x + gate * norm(f(norm(x) * (1 + scale))), for attention and then for the feed-forward network,
    with scale and tanh(gate) from the timestep (diffusers transformer_z_image.py, ComfyUI comfy/ldm/lumina/model.py).
    """

    def __init__(
        self, dim: int, heads: int, hidden: int, *, eps: float, head_eps: float, modulation: nn.Module | None
    ) -> None:
        super().__init__()
        self.eps = eps
        self.attention = FusedAttention(dim, heads, head_eps)
        self.feed_forward = FusedFeedForward(dim, hidden)
        self.attention_norm1 = NormWeight(dim)
        self.attention_norm2 = NormWeight(dim)
        self.ffn_norm1 = NormWeight(dim)
        self.ffn_norm2 = NormWeight(dim)
        if modulation is not None:
            self.adaLN_modulation = modulation
        self.modulated = modulation is not None

    def forward(
        self,
        x: torch.Tensor,
        attn_mask: torch.Tensor | None,
        freqs_cis: torch.Tensor,
        adaln_input: torch.Tensor | None = None,
        *_unused: Any,
    ) -> torch.Tensor:
        """`[B, L, dim]` to the same; `adaln_input` is `[B, 256]`; what follows it is for Z-Image Omni."""
        before_attention, after_attention, before_ffn, after_ffn = self._norm_weights(x.dtype, adaln_input)
        mixed = self.attention(_norm(x, before_attention, self.eps), attention_mask=attn_mask, freqs_cis=freqs_cis)
        x = x + _norm(mixed, after_attention, self.eps)
        return x + _norm(self.feed_forward(_norm(x, before_ffn, self.eps)), after_ffn, self.eps)

    def _norm_weights(self, dtype: torch.dtype, adaln_input: torch.Tensor | None) -> tuple[torch.Tensor, ...]:
        """What each norm multiplies by, `[B, dim]` or `[dim]`: its own weight and the modulation in one."""
        norms = (self.attention_norm1, self.attention_norm2, self.ffn_norm1, self.ffn_norm2)
        weights = tuple(norm.weight.to(dtype) for norm in norms)
        if not self.modulated:
            return weights
        scale_attention, gate_attention, scale_ffn, gate_ffn = self.adaLN_modulation(adaln_input).chunk(4, dim=-1)
        factors = (1 + scale_attention, gate_attention.tanh(), 1 + scale_ffn, gate_ffn.tanh())
        return tuple(weight * factor for weight, factor in zip(weights, factors, strict=True))


class FusedFeedForward(nn.Module):
    """SwiGLU `w2(silu(w1 x) * w3 x)`; an input that both first linears quantise alike is quantised once."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1: nn.Module = nn.Linear(dim, hidden, bias=False)
        self.w2: nn.Module = nn.Linear(hidden, dim, bias=False)
        self.w3: nn.Module = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[B, L, dim]` to the same."""
        flat = input_shared_by((self.w1, self.w3), x.reshape(-1, x.shape[-1]))
        hidden = F.silu(self.w1(flat)) * self.w3(flat)
        out: torch.Tensor = self.w2(hidden)
        return out.reshape(x.shape)


def _norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of `[B, L, dim]` with a weight for all (`[dim]`) or for each (`[B, dim]`)."""
    if weight.ndim == 1:
        return F.rms_norm(x, weight.shape, weight, eps)
    if len(weight) == 1:
        return F.rms_norm(x, weight.shape[1:], weight[0], eps)
    return torch.stack([F.rms_norm(x[i], weight.shape[1:], weight[i], eps) for i in range(len(weight))])
