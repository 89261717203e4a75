"""A function over tensors of fixed shapes as one CUDA graph: the same kernels on the same numbers, launched at once.

Where a GPU computes faster than a host launches, a time is the host's, and differs between machines with the same GPU
by more than a kernel's regression.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Tensors = Sequence[torch.Tensor]
Shapes = tuple[tuple[int, ...], ...]


class Replays:
    """`function`, launched kernel by kernel until inputs of their shapes have been captured, and replayed from then on.

    `function` takes tensors and returns tensors; it must do the same for the same shapes, whatever the values, and must
    have run on them before they are captured, since what a first call sets up cannot be captured.
    """

    def __init__(self, function: Callable[..., Tensors], *, able: bool) -> None:
        """`able`: whether to capture at all; on a CPU there is nothing to capture."""
        self._function = function
        self._able = able
        self._graphs: dict[Shapes, Graph] = {}
        self._refused = ""

    def __call__(self, *inputs: torch.Tensor, replay: bool = True) -> Tensors:
        """What `function` returns for `inputs`. Without `replay` it is called, so that what it calls can be counted."""
        graph = self._graphs.get(_shapes(inputs)) if replay else None
        return self._function(*inputs) if graph is None else graph.replay(inputs)

    @property
    def how(self) -> str:
        """`replayed as a graph`, `kernel by kernel`, or the latter and why."""
        return "replayed as a graph" if self._graphs else "kernel by kernel" + self._refused

    def capture(self, *inputs: torch.Tensor) -> None:
        """Have inputs of these shapes replayed from now on; does nothing where it was done.

        Where the driver or a kernel refuses, all stays as it was and `how` says why.
        """
        if not self._able or self._refused or _shapes(inputs) in self._graphs:
            return
        try:
            self._graphs[_shapes(inputs)] = Graph(self._function, inputs)
        except RuntimeError as error:
            self._refused = f": {str(error).strip().partition(chr(10))[0]}"


class Graph:
    """`function` over inputs of one set of shapes."""

    def __init__(self, function: Callable[..., Tensors], inputs: Tensors) -> None:
        """Runs `function` once and captures it. Raises `RuntimeError` where that cannot be."""
        device = inputs[0].device
        self._inputs = [tensor.clone() for tensor in inputs]
        self._graph = torch.cuda.CUDAGraph()
        stream: Any = torch.cuda.Stream
        side = stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            function(*self._inputs)  # on the stream of the capture, where libraries make what they keep for each stream
        torch.cuda.current_stream(device).wait_stream(side)
        torch.cuda.synchronize(device)
        # A workspace made before would be freed under the graph's hands by whoever clears them; inside it is its own.
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.graph(self._graph, stream=side):
            self._outputs = function(*self._inputs)
        torch._C._cuda_clearCublasWorkspaces()

    def replay(self, inputs: Tensors) -> list[torch.Tensor]:
        """Copies, since the next replay overwrites what the graph returns."""
        for held, tensor in zip(self._inputs, inputs, strict=True):
            held.copy_(tensor)
        self._graph.replay()
        return [tensor.clone() for tensor in self._outputs]


def _shapes(tensors: Tensors) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors)
