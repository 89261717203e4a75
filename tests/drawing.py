"""Latents to compare: what a loaded pipeline draws from fixed noise, without prompt and without VAE."""

from __future__ import annotations

import torch


def latents(loaded, steps: int = 2) -> torch.Tensor:
    """What the pipeline draws from fixed noise and a fixed embedding."""
    generator = torch.Generator().manual_seed(7)
    width = loaded.pipeline.transformer.config.cap_feat_dim
    with torch.inference_mode():
        return loaded.pipeline(
            prompt_embeds=[torch.randn(21, width, generator=generator).to(loaded.pipeline.transformer.dtype)],
            latents=torch.randn(1, 16, 16, 16, generator=generator),
            height=128,
            width=128,
            num_inference_steps=steps,
            sigmas=[1 - i / steps for i in range(steps)],
            guidance_scale=0.0,
            output_type="latent",
            return_dict=False,
        )[0]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())
