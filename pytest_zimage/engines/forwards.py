"""The transformer's forward as the pipeline calls it: counted, and replayed as a graph where the device class asks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from pytest_zimage.engines.replay import Replays, Tensors


class Forwards:
    """Takes the place of `transformer.forward`.

    A quantised product is three kernels, and fast GPUs compute those of a forward as fast as a host launches them.
    """

    def __init__(self, transformer: Any, *, replays: bool) -> None:
        self.count = 0
        """Sequences computed; each image of a batch is a forward of its own."""
        self.replay = True
        """Whether captured forwards are replayed; else each kernel is launched, so that calls can be counted."""
        self._forward = transformer.forward
        self._replays = Replays(self._flat, able=replays)
        self._last: tuple[torch.Tensor, ...] = ()
        transformer.forward = self

    def __call__(
        self,
        latents: Sequence[torch.Tensor],
        timestep: torch.Tensor,
        prompts: Sequence[torch.Tensor],
        *,
        joint_attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> tuple[list[torch.Tensor]]:
        """As diffusers' pipeline calls it: `latents` `[16, 1, h, w]` and `prompts` `[tokens, hidden]` of each image."""
        if joint_attention_kwargs or return_dict:
            raise TypeError(
                "the pipeline calls the transformer in another way than it did: check the installed diffusers"
            )
        self.count += len(latents)
        self._last = (timestep, *latents, *prompts)
        return (list(self._replays(*self._last, replay=self.replay)),)

    @property
    def how(self) -> str:
        """As `Replays.how`."""
        return self._replays.how

    def capture(self) -> None:
        """Have forwards of the last one's shapes replayed from now on."""
        self._replays.capture(*self._last)

    def _flat(self, timestep: torch.Tensor, *tensors: torch.Tensor) -> Tensors:
        images = len(tensors) // 2
        out: list[torch.Tensor] = self._forward(
            list(tensors[:images]), timestep, list(tensors[images:]), return_dict=False
        )[0]
        return out
