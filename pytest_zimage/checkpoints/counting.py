"""What loaded networks hold and how they compute, counted from their modules."""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from pytest_zimage.checkpoints.linears import (
    FastFp8Linear,
    FinelyScaledFp8Linear,
    LinearModule,
    QuantisedActivationsLinear,
    WeightOnlyLinear,
)
from pytest_zimage.checkpoints.quantised import held_tensors, storage_type


def count_weights(networks: tuple[nn.Module, ...]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes held and number of weights, by storage type; a weight that two places share counts once.

    The scales of a quantised weight belong to its bytes; what only the multiplication needs (a scale of the
    activations, a scale of 1) does not, so that the counts are the same on every device.
    """
    sizes: Counter[str] = Counter()
    tensors: Counter[str] = Counter()
    seen: set[int] = set()
    for module in (module for network in networks for module in network.modules()):
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            kind = storage_type(parameter)
            tensors[kind] += 1
            unscaled = isinstance(module, FastFp8Linear) and parameter is module.weight
            sizes[kind] += held_tensors(parameter)[0].nbytes if unscaled else sum(map(_nbytes, held_tensors(parameter)))
        if isinstance(module, FinelyScaledFp8Linear) and module.weight_scale is not None:
            sizes[storage_type(module.weight)] += module.weight_scale.nbytes
        if isinstance(module, WeightOnlyLinear | QuantisedActivationsLinear) and module.pre_quant_scale is not None:
            sizes[storage_type(module.weight)] += module.pre_quant_scale.nbytes
    return dict(sorted(sizes.items())), dict(sorted(tensors.items()))


def count_compute(networks: tuple[nn.Module, ...]) -> dict[str, int]:
    """Number of linears by how they compute; a way that none takes is not there."""
    kinds = Counter(
        module.compute if isinstance(module, LinearModule) else "plain"
        for network in networks
        for module in network.modules()
        if isinstance(module, nn.Linear | LinearModule)
    )
    return dict(sorted(kinds.items()))


def _nbytes(tensor: torch.Tensor) -> int:
    return tensor.nbytes
