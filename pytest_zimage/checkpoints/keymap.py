"""Names of the same tensor in ComfyUI's files and in diffusers' and transformers' modules, both ways.

A name may be a tensor's (`layers.0.attention.out.weight`) or a layer's (`layers.0.attention.out`). A name already in
the target's naming, or known to neither, comes back unchanged, so that the loader can report it by its own name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pytest_zimage.errors import CheckpointError

TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""Prefixes that ComfyUI accepts before the names of a transformer file."""

_PATCH = "2-1"
"""diffusers keeps one embedder and one final layer per (patch size, frame patch size); Z-Image has only 2 and 1."""

_TRANSFORMER_HEADS = (
    ("x_embedder.", f"all_x_embedder.{_PATCH}."),
    ("final_layer.", f"all_final_layer.{_PATCH}."),
)
_ATTENTION = (("out", "to_out.0"), ("q_norm", "norm_q"), ("k_norm", "norm_k"))
_ATTENTION_TO_DIFFUSERS = dict(_ATTENTION)
_ATTENTION_TO_COMFY = {theirs: ours for ours, theirs in _ATTENTION}
_IN_ATTENTION = re.compile(r"(.*\.attention)\.(out|q_norm|k_norm)(\.\w+)?")
_IN_DIFFUSERS_ATTENTION = re.compile(r"(.*\.attention)\.(to_out\.0|norm_q|norm_k)(\.\w+)?")
_FUSED = re.compile(r"(.*\.attention)\.qkv(\.\w+)?")
_PART = re.compile(r"(.*\.attention)\.to_([qkv])(\.\w+)?")


Rename = Callable[[str], str | None]
"""A name of the file to the network's; None drops the tensor."""


class Rows(NamedTuple):
    """One of the three projections inside a fused qkv: rows `[begin, end)` of its weight."""

    name: str
    begin: int
    end: int


class VaeName(NamedTuple):
    """A VAE tensor's name on the other side, and whether a 1x1 convolution stands for a linear."""

    name: str
    pointwise: bool
    """The LDM file holds `[C, C, 1, 1]` where diffusers holds `[C, C]`."""


# ---- transformer ----------------------------------------------------------


def transformer_to_diffusers(name: str) -> str | None:
    """ComfyUI's name (without prefix) to diffusers'; the fused qkv keeps its name. None: diffusers has no such tensor.

    Source: diffusers loaders/single_file_utils.py, ComfyUI comfy/utils.py `z_image_to_diffusers`.
    """
    if name == "norm_final" or name.startswith("norm_final."):
        return None
    for ours, theirs in _TRANSFORMER_HEADS:
        if name.startswith(ours):
            return theirs + name[len(ours) :]
    match = _IN_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_ATTENTION_TO_DIFFUSERS[match[2]]}{match[3] or ''}" if match else name


def transformer_to_comfy(name: str) -> str:
    """diffusers' name to ComfyUI's, except for `to_q`, `to_k` and `to_v`: see `fused_name`."""
    for ours, theirs in _TRANSFORMER_HEADS:
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    match = _IN_DIFFUSERS_ATTENTION.fullmatch(name)
    return f"{match[1]}.{_ATTENTION_TO_COMFY[match[2]]}{match[3] or ''}" if match else name


def is_diffusers_transformer(names: Iterable[str]) -> bool:
    """Whether a transformer file (prefix removed) is in diffusers' naming already."""
    return any(name.startswith("all_x_embedder.") or _PART.fullmatch(name) for name in names)


def is_fused_qkv(name: str) -> bool:
    return _FUSED.fullmatch(name) is not None


def split_qkv(name: str, rows: int) -> tuple[Rows, Rows, Rows]:
    """The three diffusers names behind the fused `...attention.qkv[.weight]` of `rows` rows, in the order q, k, v.

    The rows are equal thirds, since Z-Image has as many key/value heads as query heads. Raises `CheckpointError` for a
    name that is no fused qkv and for rows that do not divide by three.
    """
    match = _FUSED.fullmatch(name)
    if not match:
        raise CheckpointError(f"{name!r} is not a fused qkv projection", mend="split only `...attention.qkv`")
    if rows <= 0 or rows % 3:
        raise CheckpointError(f"{name!r}: {rows} rows are not three equal projections", mend="check the file's shapes")
    third, suffix = rows // 3, match[2] or ""
    q, k, v = (Rows(f"{match[1]}.to_{part}{suffix}", i * third, (i + 1) * third) for i, part in enumerate("qkv"))
    return q, k, v


def fused_name(name: str) -> tuple[str, int] | None:
    """`...attention.to_k.weight` to (`...attention.qkv.weight`, 1), its place in the fused weight; else None."""
    match = _PART.fullmatch(name)
    return (f"{match[1]}.qkv{match[3] or ''}", "qkv".index(match[2])) if match else None


# ---- VAE ------------------------------------------------------------------

_UP = re.compile(r"decoder\.up\.(\d+)\.(.*)")
_UP_BLOCKS = re.compile(r"decoder\.up_blocks\.(\d+)\.(.*)")
_VAE_PATTERNS: tuple[tuple[str, str], ...] = (
    ("{}.down.#.block.#.nin_shortcut", "{}.down_blocks.#.resnets.#.conv_shortcut"),
    ("{}.down.#.block.#", "{}.down_blocks.#.resnets.#"),
    ("{}.down.#.downsample.conv", "{}.down_blocks.#.downsamplers.0.conv"),
    ("{}.up.#.block.#.nin_shortcut", "{}.up_blocks.#.resnets.#.conv_shortcut"),
    ("{}.up.#.block.#", "{}.up_blocks.#.resnets.#"),
    ("{}.up.#.upsample.conv", "{}.up_blocks.#.upsamplers.0.conv"),
    ("{}.mid.block_1", "{}.mid_block.resnets.0"),
    ("{}.mid.block_2", "{}.mid_block.resnets.1"),
    ("{}.mid.attn_1.norm", "{}.mid_block.attentions.0.group_norm"),
    ("{}.mid.attn_1.q", "{}.mid_block.attentions.0.to_q"),
    ("{}.mid.attn_1.k", "{}.mid_block.attentions.0.to_k"),
    ("{}.mid.attn_1.v", "{}.mid_block.attentions.0.to_v"),
    ("{}.mid.attn_1.proj_out", "{}.mid_block.attentions.0.to_out.0"),
    ("{}.norm_out", "{}.conv_norm_out"),
)
_POINTWISE = re.compile(r"\.mid\.attn_1\.(q|k|v|proj_out)\.weight$")


def _rules(from_ldm: bool) -> tuple[tuple[re.Pattern[str], str], ...]:
    rules = []
    for ldm, diffusers in _VAE_PATTERNS:
        for half in ("encoder", "decoder"):
            source, target = (ldm, diffusers) if from_ldm else (diffusers, ldm)
            pattern = re.escape(source.format(half)).replace(r"\#", r"(\d+)")
            rules.append((re.compile(pattern + r"(?=\.|$)"), target.format(half)))
    return tuple(rules)


_FROM_LDM, _TO_LDM = _rules(from_ldm=True), _rules(from_ldm=False)


def _rename(name: str, rules: tuple[tuple[re.Pattern[str], str], ...]) -> str:
    for pattern, target in rules:
        match = pattern.match(name)
        if match:
            for number in match.groups():
                target = target.replace("#", number, 1)
            return target + name[match.end() :]
    return name


def vae_to_diffusers(name: str, levels: int) -> VaeName:
    """LDM name (as in `ae.safetensors`) to diffusers'; `levels` is `len(block_out_channels)`.

    diffusers numbers the decoder's levels from the latent up, LDM from the image down.
    """
    pointwise = _POINTWISE.search(name) is not None
    match = _UP.fullmatch(name)
    if match:
        name = f"decoder.up.{levels - 1 - int(match[1])}.{match[2]}"
    return VaeName(_rename(name, _FROM_LDM), pointwise)


def vae_to_ldm(name: str, levels: int) -> VaeName:
    """diffusers' name to the LDM name."""
    match = _UP_BLOCKS.fullmatch(name)
    if match:
        name = f"decoder.up_blocks.{levels - 1 - int(match[1])}.{match[2]}"
    ldm = _rename(name, _TO_LDM)
    return VaeName(ldm, _POINTWISE.search(ldm) is not None)


# ---- text encoder ---------------------------------------------------------


def text_encoder_to_transformers(name: str) -> str | None:
    """File name (`model.layers.0...`) to `transformers.Qwen3Model`'s; None for the language-model head, unused here."""
    if name == "lm_head" or name.startswith("lm_head."):
        return None
    return name.removeprefix("model.")


def text_encoder_to_comfy(name: str) -> str:
    """`transformers.Qwen3Model`'s name to the file's."""
    return f"model.{name}"
