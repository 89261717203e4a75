"""Floating-point operations of one image, counted from the dimensions: what a latency is compared to a ceiling with."""

from __future__ import annotations

from typing import Any

from pytest_zimage.catalog.model import Workload

_PIXELS_PER_TOKEN = 16
"""Of one side: the VAE's 8 times the transformer's patch of 2."""
_PAD_TO = 32
_TIMESTEP_WIDTH = 256


def transformer_flops(config: Any, workload: Workload, caption_tokens: int) -> int:
    """Operations (a multiplication and an addition are two) of the transformer in one image of `workload`.

    Linears and attention, which are all but a thousandth of it. `config` is that of `ZImageTransformer2DModel`;
    sequences are padded to multiples of 32, as the model pads them.
    """
    image = _padded((workload.width // _PIXELS_PER_TOKEN) * (workload.height // _PIXELS_PER_TOKEN))
    caption = _padded(caption_tokens)
    forward = (
        config.n_layers * _block(config.dim, image + caption, modulated=True)
        + config.n_refiner_layers * _block(config.dim, image, modulated=True)
        + config.n_refiner_layers * _block(config.dim, caption, modulated=False)
        + _linear(image, 4 * config.in_channels, config.dim)
        + _linear(caption, config.cap_feat_dim, config.dim)
        + _linear(image + caption, config.dim, 4 * config.in_channels)
    )
    return int(workload.steps * workload.forwards_per_step * forward)


def _block(dim: int, tokens: int, *, modulated: bool) -> int:
    hidden = int(dim / 3 * 8)
    projections = _linear(tokens, dim, 4 * dim) + 3 * _linear(tokens, dim, hidden)
    attention = 2 * _linear(tokens, dim, tokens)
    modulation = _linear(1, min(dim, _TIMESTEP_WIDTH), 4 * dim) if modulated else 0
    return projections + attention + modulation


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def _padded(tokens: int) -> int:
    return -(-tokens // _PAD_TO) * _PAD_TO
