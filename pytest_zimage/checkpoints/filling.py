"""Puts tensor data into the parameters of a network, in the type that each is held in and once all its parts are there.

What goes where was settled before, by `assembly`, from names and shapes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from pytest_zimage.checkpoints.formats import QuantisedLayer
from pytest_zimage.checkpoints.linears import (
    FastFp8Linear,
    QuantisedActivationsLinear,
    WeightOnlyLinear,
    fp8_by_maximum,
)
from pytest_zimage.checkpoints.nibbles import to_comfy
from pytest_zimage.checkpoints.precision import Precision
from pytest_zimage.checkpoints.quantised import ScaleCheck, split_rows, split_scales, weight_tensor


class Filling:
    """The values of one network."""

    def __init__(self, network: nn.Module, path: Path, precision: Precision) -> None:
        """`path` is the file that the tensors come from, for errors."""
        self._network = network
        self._path = path
        self._precision = precision
        self._shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        self._scales = ScaleCheck(path)
        self.held: dict[str, torch.dtype] = {}
        """The type of each plain parameter, by name."""
        self._at_load: set[str] = set()

    def hold(self, name: str, dtype: torch.dtype, *, online: bool) -> None:
        """The plain parameter `name` is held in `dtype`; `online`: quantised from that to FP8 as it arrives."""
        self.held[name] = dtype
        if online:
            self._at_load.add(name)

    def finish(self) -> None:
        """Raises `CheckpointError` for a scale that cannot be right."""
        self._scales.finish()

    def plain(self, targets: list[str], tensor: torch.Tensor) -> None:
        """Put the equal parts of `tensor`'s rows into `targets`."""
        for name, part in zip(targets, tensor.chunk(len(targets)), strict=True):
            # A part is copied, since it would keep the whole fused tensor alive.
            held = part.to(self.held[name], copy=len(targets) > 1)
            self._set(name, held.reshape(self._shapes[name]))

    def third(self, fused: str, part: int, arrived: dict[int, torch.Tensor], tensor: torch.Tensor) -> None:
        """Keep one of the three parts of `fused` until the last has come."""
        arrived[part] = tensor
        if len(arrived) == 3:
            self.plain([fused], torch.cat([arrived[index] for index in range(3)]))
            arrived.clear()

    def part(
        self,
        targets: list[str],
        layer: QuantisedLayer,
        shape: tuple[int, int],
        arrived: dict[str, torch.Tensor],
        suffix: str,
        tensor: torch.Tensor,
    ) -> None:
        """Keep one tensor of a quantised layer until the last has come, then build its weight."""
        if suffix != "weight":
            self._scales.add(layer, suffix, tensor)
        arrived[suffix] = tensor
        if len(arrived) < len(layer.tensors):
            return
        tensors = to_comfy(layer.options, arrived)
        # What waits for other tensors must not keep these alive.
        arrived.clear()
        for name, part in zip(targets, self._weights(layer, tensors, shape, len(targets)), strict=True):
            module = self._set(name, part)
            if isinstance(module, WeightOnlyLinear | QuantisedActivationsLinear):
                module.pre_quant_scale = tensors.get("pre_quant_scale")
            if isinstance(module, QuantisedActivationsLinear):
                module.set_input_scale(tensors.get("input_scale"))
        if layer.scale_blocks is not None:
            scales = split_scales(self._path, layer, tensors["weight_scale"], len(targets))
            for name, scale in zip(targets, scales, strict=True):
                self._network.get_submodule(name.removesuffix(".weight")).weight_scale = scale

    def _weights(
        self, layer: QuantisedLayer, tensors: dict[str, torch.Tensor], shape: tuple[int, int], parts: int
    ) -> Sequence[torch.Tensor]:
        """The weight of `layer` in equal `parts` of its rows."""
        if layer.scale_blocks is not None:
            return tensors["weight"].chunk(parts)
        weight = weight_tensor(layer, tensors, shape, self._precision.compute)
        return [weight] if parts == 1 else split_rows(self._path, layer, weight, parts)

    def _set(self, name: str, value: torch.Tensor) -> nn.Module:
        path, _, leaf = name.rpartition(".")
        module = self._network.get_submodule(path)
        if isinstance(module, FastFp8Linear) and leaf == "weight":
            value = FastFp8Linear.pack(value, self._precision.compute)
        if name in self._at_load:
            value = fp8_by_maximum(value)
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        return module
