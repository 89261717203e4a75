"""How a file's q, k and v meet the network's: one fused projection or three, decided for each attention at load."""

from __future__ import annotations

from torch import nn

from pytest_zimage.checkpoints.attention import FusedAttention
from pytest_zimage.checkpoints.formats import Contents
from pytest_zimage.checkpoints.keymap import Rename, fused_name


def separate_where_needed(network: nn.Module, contents: Contents, rename: Rename) -> None:
    """Give each fused attention of `network` three projections where its file's cannot be one weight.

    Three that are plain and of one type are read into the fused weight. Quantised ones have scales of their own, and
    putting them under one would change their values.
    """
    parts: dict[str, list[str]] = {}
    for name, tensor in contents.plain.items():
        _add(parts, rename(name), tensor.dtype)
    for layer in contents.quantised.values():
        _add(parts, rename(f"{layer.name}.weight"), "quantised")
    for path, kinds in parts.items():
        try:
            attention = network.get_submodule(path)
        except AttributeError:
            # Not this network's; whoever puts tensors in their places says so.
            continue
        if isinstance(attention, FusedAttention) and (len(kinds) != 3 or len({*kinds}) > 1 or "quantised" in kinds):
            attention.separate()


def _add(parts: dict[str, list[str]], target: str | None, kind: str) -> None:
    fused = fused_name(target) if target is not None and target.endswith(".weight") else None
    if fused is not None:
        parts.setdefault(fused[0].removesuffix(".qkv.weight"), []).append(kind)
