"""Which module computes each layer: the choice between the classes of `linears` and `casting`, made once at load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers.models.normalization import RMSNorm
from torch import nn

from pytest_zimage.checkpoints.casting import CastEmbedding, CastRMSNorm, QuantisedEmbedding
from pytest_zimage.checkpoints.formats import GGUF, Format, QuantisedLayer
from pytest_zimage.checkpoints.gguf_linear import GgufLinear
from pytest_zimage.checkpoints.linears import (
    FP8,
    CastLinear,
    FastFp8Linear,
    FinelyScaledFp8Linear,
    Int8Linear,
    LinearModule,
    QuantisedActivationsLinear,
    WeightOnlyLinear,
)
from pytest_zimage.checkpoints.quantised import multiplies_natively
from pytest_zimage.checkpoints.svdquant import SVDQUANT
from pytest_zimage.checkpoints.svdquant_linear import SvdQuantLinear
from pytest_zimage.errors import UnsupportedError

_OWN_KINDS: dict[Format, type[LinearModule]] = {"int8_tensorwise": Int8Linear, SVDQUANT: SvdQuantLinear}
"""Formats whose kernel quantises the input itself."""


@dataclass(frozen=True)
class Precision:
    """How one network holds its weights and computes."""

    compute: torch.dtype
    store: torch.dtype | None = None
    """Type every parameter is held in; None keeps the file's."""
    fast_fp8: bool = False
    """Multiply FP8-stored linears in FP8; the caller has made sure that the device can."""
    online_fp8: bool = False
    """Quantise the blocks' linears to FP8 while they are loaded."""
    quantise_activations: bool = True
    """Where the file wants it and the device can; False computes every quantised layer weight-only."""

    def held_as(self, parent: nn.Module, file_dtype: torch.dtype, mixed_file: bool) -> torch.dtype:
        """The type a plain parameter of `parent` is held in; `mixed_file`: others in its file are quantised."""
        if self.store is not None:
            return self.store
        if torch.promote_types(file_dtype, self.compute) == self.compute:
            return file_dtype
        # Wider than the type computed in. ComfyUI narrows the unquantised linears of a quantised file; and a module
        # that does not cast relies on promotion, which must not end above that type.
        narrow = mixed_file if isinstance(parent, nn.Linear) else not _casts_on_use(parent)
        return self.compute if narrow else file_dtype


def _casts_on_use(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding | RMSNorm) or getattr(module, "casts_on_use", False)


def install_casts(network: nn.Module, held: Mapping[str, torch.dtype], precision: Precision) -> None:
    """Replace each module of `network` whose parameters, by name, are not `held` in the type computed in."""
    for path, module in list(network.named_modules()):
        own = [held.get(f"{path}.{name}", precision.compute) for name, _ in module.named_parameters(recurse=False)]
        if all(dtype == precision.compute for dtype in own):
            continue
        if isinstance(module, nn.Linear):
            fast = precision.fast_fp8 and held[f"{path}.weight"] == FP8
            network.set_submodule(path, FastFp8Linear(module) if fast else CastLinear(module))
        elif isinstance(module, RMSNorm):
            network.set_submodule(path, CastRMSNorm(module))
        elif isinstance(module, nn.Embedding):
            network.set_submodule(path, CastEmbedding(module, precision.compute))


def install_quantised(
    network: nn.Module, path: str, layer: QuantisedLayer, file: Path, precision: Precision, device: torch.device
) -> bool:
    """Replace the linear, or FP8 embedding, at `path` by one that holds `layer`.

    Returns whether `layer` is dequantised only because `device` cannot multiply its format. Raises
    `UnsupportedError` for any other module, and where the installed comfy-kitchen lacks the format.
    """
    module = network.get_submodule(path)
    scaled_once = layer.format in ("float8_e4m3fn", "float8_e5m2") and layer.scale_blocks is None
    if isinstance(module, nn.Embedding) and scaled_once:
        network.set_submodule(path, QuantisedEmbedding(module, precision.compute))
        return False
    if not isinstance(module, nn.Linear):
        raise UnsupportedError(
            f"{file}: layer {layer.name!r} is quantised to {layer.format} and is no linear",
            mend="take a file that quantises linears only",
        )
    if layer.format == GGUF:
        network.set_submodule(path, GgufLinear(module))
        return False
    kind: type[LinearModule] = WeightOnlyLinear
    # FP8 multiplies E4M3 by E4M3; E5M2 is a storage format.
    asked = precision.quantise_activations and not layer.weight_only and layer.format != "float8_e5m2"
    if layer.scale_blocks is not None:
        network.set_submodule(path, FinelyScaledFp8Linear(module))
        return False
    native = asked and multiplies_natively(layer.format, device)
    if layer.format == SVDQUANT and not native and asked:
        raise UnsupportedError(
            f"{file}: layer {layer.name!r}: {device} has no INT4 product, and SVDQuant is defined by it",
            mend="use a GPU of compute capability 8.0 or above, or the CPU",
        )
    if native:
        kind = _OWN_KINDS.get(layer.format, QuantisedActivationsLinear)
    network.set_submodule(path, kind(module))
    return asked and not native
