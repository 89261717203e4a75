"""The three networks with the modules a variant asks for, built without storage and ready to be filled."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL
from transformers import Qwen3Model

from pytest_zimage.catalog.model import ModelDims, Variant
from pytest_zimage.checkpoints.acceleration import choose_attention, compile_blocks
from pytest_zimage.checkpoints.attention import MatrixRope
from pytest_zimage.checkpoints.blocks import FusedBlock
from pytest_zimage.checkpoints.casting import TypedTimestepEmbedder, TypedZImageTransformer
from pytest_zimage.checkpoints.networks import meta_network


def torch_dtype(name: str) -> torch.dtype:
    """`bfloat16` to `torch.bfloat16`."""
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def build_transformer(dims: ModelDims, variant: Variant, device: torch.device) -> Any:
    """The transformer with the blocks and the attention that `variant` names; parameters on `meta`, tables on `device`.

    Raises `UnsupportedError` for an attention backend that is not there.
    """
    compute = torch_dtype(variant.compute_dtype)
    transformer = meta_network("transformer", dims, TypedZImageTransformer)
    transformer.compute_dtype = compute
    transformer.t_embedder = TypedTimestepEmbedder(transformer.t_embedder, compute)
    if variant.kernels == "comfy":
        _fuse_blocks(transformer)
        config = transformer.config
        transformer.rope_embedder = MatrixRope(config.rope_theta, config.axes_dims, config.axes_lens, device)
    choose_attention(transformer, variant)
    if variant.compile:
        compile_blocks(transformer)
    return transformer.eval()


def build_text_encoder(dims: ModelDims, device: torch.device) -> Any:
    """The text encoder; parameters on `meta`, rotary frequencies in float32 on `device`."""
    encoder = meta_network("text_encoder", dims, Qwen3Model)
    # Its frequencies are computed, not read; and never cast, which would change every embedding.
    encoder.rotary_emb = type(encoder.rotary_emb)(config=encoder.config).to(device)
    return encoder.eval()


def build_vae(dims: ModelDims) -> Any:
    """The VAE, parameters on `meta`."""
    return meta_network("vae", dims, AutoencoderKL).eval()


def _fuse_blocks(transformer: Any) -> None:
    for blocks in (transformer.noise_refiner, transformer.context_refiner, transformer.layers):
        for index, block in enumerate(blocks):
            attention, hidden = block.attention, block.feed_forward.w1.out_features
            modulation = block.adaLN_modulation if block.modulation else None
            with torch.device("meta"):
                blocks[index] = FusedBlock(
                    attention.query_dim,
                    attention.heads,
                    hidden,
                    eps=block.attention_norm1.eps,
                    head_eps=attention.norm_q.eps,
                    modulation=modulation,
                )
