"""Modules whose parameters are stored in another type than they compute in, cast on use as ComfyUI's `manual_cast`.

diffusers and transformers take a parameter's type for the type to compute in, which would make FP8 storage compute in
FP8; these modules keep the two apart.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import ZImageTransformer2DModel
from diffusers.models.normalization import RMSNorm
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from torch import nn
from torch.nn import functional as F


class CastRMSNorm(nn.Module):
    """diffusers' `RMSNorm` over a weight of any type: statistics in float32, scale and result in the input's type."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        self.weight: Any = norm.weight

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        dtype = hidden_states.dtype
        variance = hidden_states.to(torch.float32).pow(2).mean(-1, keepdim=True)
        normed = (hidden_states * torch.rsqrt(variance + self.eps)).to(dtype)
        return normed * cast(torch.Tensor, self.weight.to(dtype))


class CastEmbedding(nn.Module):
    """Rows of a table stored in one type, returned in another."""

    def __init__(self, embedding: nn.Embedding, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight: Any = embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)


class QuantisedEmbedding(CastEmbedding):
    """The same for an FP8 table with one scale: only the rows looked up are dequantised."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        # Bytes, since not every backend looks up float8.
        rows = F.embedding(ids, self.weight._qdata.view(torch.uint8)).view(self.weight._qdata.dtype)
        scale: torch.Tensor = self.weight._params.scale
        return rows.to(self.dtype) * scale.to(self.dtype)


class TypedTimestepEmbedder(nn.Module):
    """diffusers' `TimestepEmbedder` computing in `dtype`, whatever its weights are stored as."""

    def __init__(self, embedder: TimestepEmbedder, dtype: torch.dtype) -> None:
        super().__init__()
        self.mlp = embedder.mlp
        self.dtype = dtype
        self._size = embedder.frequency_embedding_size
        self._frequencies: Any = embedder.timestep_embedding

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        frequencies = self._frequencies(timestep, self._size)
        embedded: torch.Tensor = self.mlp(frequencies.to(self.dtype))
        return embedded


class TypedZImageTransformer(ZImageTransformer2DModel):
    """diffusers' transformer that says in which type it computes and casts its pad tokens to it."""

    compute_dtype: torch.dtype = torch.bfloat16
    casts_on_use = True

    @property
    def dtype(self) -> torch.dtype:
        """The type its input has to have; diffusers would report that of the first parameter stored."""
        return self.compute_dtype

    def _prepare_sequence(
        self,
        feats: list[torch.Tensor],
        pos_ids: list[torch.Tensor],
        inner_pad_mask: list[torch.Tensor],
        pad_token: torch.Tensor,
        *rest: Any,
        **named: Any,
    ) -> Any:
        pad_token = pad_token.to(feats[0].dtype)
        prepare: Any = super()._prepare_sequence  # type: ignore[misc]
        return prepare(feats, pos_ids, inner_pad_mask, pad_token, *rest, **named)
