"""Prompt to embeddings: the text encoder's layers, on a GPU replayed as one graph once a prompt of that length is warm.

Of a short prompt the layers are two thousand small kernels, and launching them takes the host three times as long as a
GPU computes: the time would be the host's, and differ between machines with the same GPU by more than a kernel's
regression. A replayed graph runs the same kernels on the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch


class PromptEncoder:
    """Qwen3's layers without the last one and without the final norm, as ComfyUI takes them (`layer_idx=-2`)."""

    def __init__(self, text_encoder: Any, device: torch.device) -> None:
        self._encoder = text_encoder
        self._device = device
        self._replays = device.type == "cuda"
        self._graphs: dict[int, _Graph] = {}
        self._refused = ""

    def __call__(self, ids: torch.Tensor, *, replay: bool = True) -> torch.Tensor:
        """`[tokens, hidden]` of `ids`, `[1, tokens]` on the host, in the encoder's type of activations.

        Without `replay` each kernel is launched by itself, so that what it calls can be counted.
        """
        graph = self._graphs.get(ids.shape[1]) if replay else None
        return self._layers(ids.to(self._device))[0] if graph is None else graph.replay(ids)

    @property
    def how(self) -> str:
        """`replayed as a graph`, `kernel by kernel`, or the latter and why."""
        return "replayed as a graph" if self._graphs else "kernel by kernel" + self._refused

    def capture(self, ids: torch.Tensor) -> None:
        """Have prompts as long as `ids` replayed from now on; does nothing on the CPU, and where it was done.

        `ids` must have been encoded before: what a first call sets up cannot be captured. Where the driver or a kernel
        refuses, prompts stay as they were and `how` says why.
        """
        if not self._replays or ids.shape[1] in self._graphs or self._refused:
            return
        try:
            self._graphs[ids.shape[1]] = _Graph(self._layers, ids.to(self._device))
        except RuntimeError as error:
            self._refused = f": {str(error).strip().partition(chr(10))[0]}"

    def _layers(self, ids: torch.Tensor) -> torch.Tensor:
        encoder = self._encoder
        states: torch.Tensor = encoder.embed_tokens(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        rotary = encoder.rotary_emb(states, positions)
        for layer in encoder.layers[:-1]:
            # Without a mask torch's attention is causal, which is all that one unpadded prompt needs.
            out = layer(states, attention_mask=None, position_ids=positions, position_embeddings=rotary)
            states = out if isinstance(out, torch.Tensor) else out[0]
        return states


class _Graph:
    """The layers over one length of prompt."""

    def __init__(self, layers: Any, ids: torch.Tensor) -> None:
        self._ids = ids.clone()
        self._graph = torch.cuda.CUDAGraph()
        stream: Any = torch.cuda.Stream
        side = stream(ids.device)
        side.wait_stream(torch.cuda.current_stream(ids.device))
        with torch.cuda.stream(side):
            layers(self._ids)  # on the stream of the capture, where libraries make what they keep for each stream
        torch.cuda.current_stream(ids.device).wait_stream(side)
        torch.cuda.synchronize(ids.device)
        # A workspace made before would be freed under the graph's hands by whoever clears them; inside it is its own.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(self._graph, stream=side):
            self._states: torch.Tensor = layers(self._ids)
        torch._C._cuda_clearCublasWorkspaces()

    def replay(self, ids: torch.Tensor) -> torch.Tensor:
        self._ids.copy_(ids)
        self._graph.replay()
        return self._states[0].clone()
