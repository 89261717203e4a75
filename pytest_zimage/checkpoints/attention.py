"""Z-Image's attention as ComfyUI computes it: one fused qkv projection, RMSNorm and RoPE in one comfy-kitchen kernel.

A file whose projections are quantised apart has them computed apart, between which the same kernels are used.

Source of the semantics: ComfyUI comfy/ldm/lumina/model.py. Rotations are matrices `[..., D/2, 2, 2]` instead of
diffusers' complex numbers, since that is what comfy-kitchen's kernels read.
"""

from __future__ import annotations

from collections.abc import Sequence

import comfy_kitchen as ck
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from torch import nn

from pytest_zimage.checkpoints.linears import input_shared_by

_HAS_RMS_ROPE = hasattr(ck, "rms_rope")


class MatrixRope:
    """Rotary position embedding as rotation matrices; stands in for diffusers' `RopeEmbedder`.

    The table of an axis is computed once. A sequence's rotations are three look-ups, so that nothing has to be
    recognised or cached by position, which on a device would cost a synchronisation.
    """

    def __init__(self, theta: float, axes_dims: Sequence[int], axes_lens: Sequence[int], device: torch.device) -> None:
        self._tables = [
            _rotations(theta, dim, length).to(device) for dim, length in zip(axes_dims, axes_lens, strict=True)
        ]

    def __call__(self, ids: torch.Tensor) -> torch.Tensor:
        """Positions `[L, axes]` to rotations `[L, D/2, 2, 2]` in float32, D the head dimension.

        Real and with the sequence first, so that diffusers' `split`, `pad_sequence` and `cat` carry it unchanged.
        """
        return torch.cat([table[ids[:, axis]] for axis, table in enumerate(self._tables)], dim=1)


def _rotations(theta: float, dim: int, length: int) -> torch.Tensor:
    """`[length, dim/2, 2, 2]`: angles in float64 and rounded once, as diffusers' `precompute_freqs_cis`."""
    frequencies = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float64, device="cpu"), frequencies).float()
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([cos, -sin, sin, cos], dim=-1).reshape(*cos.shape, 2, 2)


class FusedAttention(nn.Module):
    """Takes the place of diffusers' `Attention` in a Z-Image block, under its parameter names but for `qkv`.

    After `separate` it has `to_q`, `to_k` and `to_v` instead.
    """

    to_q: nn.Module
    to_k: nn.Module
    to_v: nn.Module

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.eps = eps
        self.backend: AttentionBackendName | None = None
        """One of diffusers' attention backends; None is its default, torch's SDPA."""
        self.qkv: nn.Module | None = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = NormWeight(dim // heads)
        self.norm_k = NormWeight(dim // heads)

    def separate(self) -> None:
        """Have three projections in the place of the fused one; before any weight is there."""
        if self.qkv is None:
            return
        assert isinstance(self.qkv, nn.Linear)
        rows, columns = self.qkv.weight.shape
        for name in ("to_q", "to_k", "to_v"):
            setattr(self, name, nn.Linear(columns, rows // 3, bias=False, device=self.qkv.weight.device))
        self.qkv = None

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`[B, L, dim]` to query, key and value, each `[B, L, heads, D]`."""
        if self.qkv is not None:
            qkv: torch.Tensor = self.qkv(x)
            return qkv.reshape(*x.shape[:-1], 3, self.heads, -1).unbind(-3)
        projections = (self.to_q, self.to_k, self.to_v)
        flat = input_shared_by(projections, x.reshape(-1, x.shape[-1]))
        return tuple(project(flat).reshape(*x.shape[:-1], self.heads, -1) for project in projections)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        freqs_cis: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`[B, L, dim]` to the same; `freqs_cis` is `[B, L, D/2, 2, 2]`, `attention_mask` boolean `[B, L]`."""
        if freqs_cis is None:
            raise TypeError("FusedAttention needs freqs_cis: Z-Image has no attention without positions")
        query, key, value = self._project(hidden_states)
        query, key = _norm_and_rotate(
            query,
            key,
            freqs_cis.unsqueeze(2),
            self.norm_q.weight.to(query.dtype),
            self.norm_k.weight.to(key.dtype),
            self.eps,
        )
        if attention_mask is not None:
            attention_mask = attention_mask[:, None, None, :]
        mixed = dispatch_attention_fn(query, key, value, attn_mask=attention_mask, backend=self.backend)
        out: torch.Tensor = self.to_out[0](mixed.flatten(2, 3))
        return out


class NormWeight(nn.Module):
    """Holds the weight `[dim]` of an RMSNorm that another module's kernel applies; it has no forward."""

    casts_on_use = True

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def _norm_and_rotate(
    query: torch.Tensor,
    key: torch.Tensor,
    rotations: torch.Tensor,
    query_scale: torch.Tensor,
    key_scale: torch.Tensor,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-head RMSNorm, then interleaved RoPE, of `[B, L, H, D]` with rotations `[B, L, 1, D/2, 2, 2]`."""
    if _HAS_RMS_ROPE:
        rotated: tuple[torch.Tensor, torch.Tensor] = ck.rms_rope(query, key, rotations, query_scale, key_scale, eps)
        return rotated
    # comfy-kitchen before rms_rope, e.g. 0.2.8.
    size = (query.shape[-1],)
    turned: tuple[torch.Tensor, torch.Tensor] = ck.apply_rope(
        torch.nn.functional.rms_norm(query, size, query_scale, eps),
        torch.nn.functional.rms_norm(key, size, key_scale, eps),
        rotations,
    )
    return turned
