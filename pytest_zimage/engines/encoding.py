"""Prompt to embeddings: the text encoder's layers, on a GPU replayed as one graph once a prompt of that length is warm.

Of a short prompt the layers are two thousand small kernels, and launching them takes the host three times as long as a
GPU computes.
"""

from __future__ import annotations

from typing import Any

import torch

from pytest_zimage.engines.replay import Replays


class PromptEncoder:
    """Qwen3's layers without the last one and without the final norm, as ComfyUI takes them (`layer_idx=-2`)."""

    def __init__(self, text_encoder: Any, device: torch.device) -> None:
        self._encoder = text_encoder
        self._device = device
        self._layers = Replays(self._compute, able=device.type == "cuda")

    def __call__(self, ids: torch.Tensor, *, replay: bool = True) -> torch.Tensor:
        """`[tokens, hidden]` of `ids`, `[1, tokens]` on the host, in the encoder's type of activations.

        Without `replay` each kernel is launched by itself, so that what it calls can be counted.
        """
        return self._layers(ids.to(self._device), replay=replay)[0][0]

    @property
    def how(self) -> str:
        """As `Replays.how`."""
        return self._layers.how

    def capture(self, ids: torch.Tensor) -> None:
        """Have prompts as long as `ids` replayed from now on; `ids` must have been encoded before."""
        self._layers.capture(ids.to(self._device))

    def _compute(self, ids: torch.Tensor) -> tuple[torch.Tensor]:
        encoder = self._encoder
        states: torch.Tensor = encoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = encoder.rotary_emb(states, positions)
        for layer in encoder.layers[:-1]:
            # Without a mask torch's attention is causal, which is all that one unpadded prompt needs.
            out = layer(states, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            states = out if isinstance(out, torch.Tensor) else out[0]
        return (states,)
