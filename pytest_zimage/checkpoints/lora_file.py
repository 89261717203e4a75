"""What a LoRA file holds, told from its header: pairs of factors by the layer they are for.

As convert-to-quant's `--extract-lora` writes it (`diffusion_model.LAYER.lora_up.weight` `[N, r]`,
`.lora_down.weight` `[r, K]`, fused qkv, no alpha), and as kohya's and diffusers' trainers do: `lora_unet_LAYER` with
underscores, `lora_B`/`lora_A`, `.alpha`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pytest_zimage.checkpoints.header import Header, TensorInfo
from pytest_zimage.checkpoints.keymap import TRANSFORMER_PREFIXES
from pytest_zimage.errors import CheckpointError

_PREFIXES = (*TRANSFORMER_PREFIXES, "transformer.", "base_model.model.")
_KOHYA = "lora_unet_"
_ROLES = {"lora_up": "up", "lora_down": "down", "lora_B": "up", "lora_A": "down"}
_FLOATS = ("F32", "F16", "BF16")
_ANEW = "have the LoRA written anew, or take another"


@dataclass(frozen=True, slots=True)
class LoraPair:
    """The two factors of one layer's change `up @ down`, scaled by `alpha / r` where there is an alpha."""

    layer: str
    """As the file names it, prefix removed."""
    up: TensorInfo
    down: TensorInfo
    alpha: TensorInfo | None

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def lora_pairs(header: Header) -> list[LoraPair]:
    """Every pair of the file, by layer.

    Raises `CheckpointError` naming the tensor that is none of a LoRA's, has no partner, or does not fit it.
    """
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, tensor in header.tensors.items():
        layer, role = _parsed(name)
        if not role:
            raise CheckpointError(f"{header.path}: tensor {name!r} is none that a LoRA has", mend=_ANEW)
        if role in found.setdefault(layer, {}):
            raise CheckpointError(f"{header.path}: tensor {name!r} is there under two names", mend=_ANEW)
        found[layer][role] = tensor
    if not found:
        raise CheckpointError(f"{header.path}: the LoRA has no tensors", mend=_ANEW)
    return [_pair(header, layer, parts) for layer, parts in found.items()]


def _parsed(name: str) -> tuple[str, str]:
    """Layer and role of a tensor; no role for a name that is not a LoRA's."""
    bare = name
    for prefix in _PREFIXES:
        bare = bare.removeprefix(prefix)
    stem, _, last = bare.rpartition(".")
    if last == "alpha":
        return stem, "alpha"
    if last != "weight":
        return bare, ""
    layer, _, kind = stem.removesuffix(".default").rpartition(".")
    return layer, _ROLES.get(kind, "")


def _pair(header: Header, layer: str, parts: dict[str, TensorInfo]) -> LoraPair:
    for role, other in (("up", "down"), ("down", "up")):
        if role not in parts:
            there = parts.get(other) or parts["alpha"]
            raise CheckpointError(
                f"{header.path}: tensor {there.name!r} has no partner: the LoRA lacks the {role} factor of {layer!r}",
                mend=_ANEW,
            )
    up, down, alpha = parts["up"], parts["down"], parts.get("alpha")
    for tensor in (up, down):
        if len(tensor.shape) != 2 or 0 in tensor.shape or tensor.dtype not in _FLOATS:
            raise CheckpointError(
                f"{header.path}: tensor {tensor.name!r}: expected a matrix of {', '.join(_FLOATS)}, "
                f"found {tensor.dtype} {list(tensor.shape)}",
                mend=_ANEW,
            )
    if up.shape[1] != down.shape[0]:
        raise CheckpointError(
            f"{header.path}: tensors {up.name!r} {list(up.shape)} and {down.name!r} {list(down.shape)} do not multiply",
            mend=_ANEW,
        )
    if alpha is not None and (alpha.elements != 1 or alpha.dtype not in _FLOATS):
        raise CheckpointError(
            f"{header.path}: tensor {alpha.name!r}: expected one number, found {alpha.dtype} {list(alpha.shape)}",
            mend=_ANEW,
        )
    return LoraPair(layer, up, down, alpha)


def dotted(layer: str, known: Iterable[str]) -> str:
    """kohya's `lora_unet_layers_0_attention_qkv` as that one of `known` which it spells; any other name as it is."""
    if not layer.startswith(_KOHYA):
        return layer
    spelled = layer.removeprefix(_KOHYA)
    return next((name for name in known if name.replace(".", "_") == spelled), layer)
