"""Which files a synthetic model set has and what is in each, worked out from the real classes without any data."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from pytest_zimage.catalog.model import ROLE_FOLDERS, ModelDims, Role
from pytest_zimage.checkpoints.header import DTYPE_BITS
from pytest_zimage.checkpoints.keymap import fused_name, text_encoder_to_comfy, transformer_to_comfy, vae_to_ldm
from pytest_zimage.checkpoints.networks import network_shapes
from pytest_zimage.checkpoints.synthetic.storage import Storage, Stored, describe, encode

if TYPE_CHECKING:
    import torch

FILE_NAMES: dict[Role, tuple[str, ...]] = {
    "transformer": (
        "z_image_turbo_bf16.safetensors",
        "z-image-turbo_fp8_scaled_e4m3fn_KJ.safetensors",
        "z_image_turbo_nvfp4.safetensors",
    ),
    "text_encoder": ("qwen_3_4b.safetensors", "qwen_3_4b_fp8_mixed.safetensors"),
    "vae": ("ae.safetensors",),
}

# The official FP8-mixed text encoder has 177 FP8, 12 NVFP4 and 63 BF16 projections of 252; which ones is not published.
# These reach its counts and its size: all down projections and the first layers' up and output projections BF16, the
# first layers' gates NVFP4. Shares are of the depth.
_MIXED_BF16_SHARE = {"mlp.down_proj": (36, 36), "mlp.up_proj": (12, 36), "self_attn.o_proj": (15, 36)}
_MIXED_NVFP4_SHARE = {"mlp.gate_proj": (12, 36)}


@dataclass(frozen=True, slots=True)
class Weight:
    """One weight as the BF16 file has it, and how this file stores it."""

    name: str
    shape: tuple[int, ...]
    storage: Storage
    parts: tuple[str, ...] = ()
    """This file's names for equal shares of its rows; empty: one, with the same name."""

    def stored(self) -> list[Stored]:
        """The tensors it becomes in this file."""
        parts = self.parts or (self.name,)
        shape = (self.shape[0] // len(parts), *self.shape[1:])
        return [tensor for part in parts for tensor in describe(self.storage, part, shape)]

    def encode(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Those tensors themselves, by name."""
        parts = self.parts or (self.name,)
        tensors: dict[str, torch.Tensor] = {}
        for part, rows in zip(parts, weight.chunk(len(parts)), strict=True):
            tensors |= encode(self.storage, part, rows)
        return tensors


@dataclass(frozen=True, slots=True)
class FilePlan:
    """One file: its place in the set, its header's metadata and its weights."""

    role: Role
    path: str
    """Relative to the set's folder."""
    weights: tuple[Weight, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    markers: tuple[Stored, ...] = ()
    """Tensors that belong to no weight; their values are zero."""
    beside: dict[str, str] = field(default_factory=dict)
    """Texts of further files of the same folder, by their path in the set."""

    def stored(self) -> list[Stored]:
        """Every tensor in file order: wide dtypes first, then by name, which keeps each one aligned to its own size."""
        tensors = [*self.markers]
        for weight in self.weights:
            tensors += weight.stored()
        return sorted(tensors, key=lambda tensor: (-DTYPE_BITS[tensor.dtype], tensor.name))

    def header(self) -> tuple[bytes, dict[str, tuple[Stored, int]], int]:
        """The file's first bytes, each tensor with its absolute offset, and the file's size."""
        table: dict[str, object] = {"__metadata__": self.metadata} if self.metadata else {}
        offset, relative = 0, {}
        for tensor in self.stored():
            relative[tensor.name] = (tensor, offset)
            span = [offset, offset + tensor.nbytes]
            table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": span}
            offset += tensor.nbytes
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        offsets = {name: (tensor, start + at) for name, (tensor, at) in relative.items()}
        return len(text).to_bytes(8, "little") + text, offsets, start + offset


def name_of(path: str) -> str:
    """What a variant calls the file at `path` in a set: its name, or `NAME/` of the folder it is in."""
    _, name, *below = PurePosixPath(path).parts
    return f"{name}/" if below else name


def plan_files(dims: ModelDims) -> list[FilePlan]:
    """The plans of the files that the default variants need, of a set of these dimensions."""
    transformer = transformer_shapes(dims)
    text_encoder = {text_encoder_to_comfy(name): shape for name, shape in network_shapes("text_encoder", dims).items()}
    depth = dims.text_encoder["num_hidden_layers"]
    assert isinstance(depth, int)
    bf16, kijai, nvfp4 = FILE_NAMES["transformer"]
    full, mixed = FILE_NAMES["text_encoder"]
    fp4_layers = [name.removesuffix(".weight") for name, shape in transformer.items() if _is_main_linear(name, shape)]
    return [
        _plan("transformer", bf16, transformer, {}, rest="bf16"),
        _plan(
            "transformer",
            kijai,
            transformer,
            {name: "fp8_scale_weight" for name, shape in transformer.items() if _is_linear(name, shape)},
            rest="f32",
            # Two elements ask for dequantised weights and plain BF16 matrix products.
            markers=(Stored("scaled_fp8", "F8_E4M3", (2,)),),
        ),
        _plan(
            "transformer",
            nvfp4,
            transformer,
            {f"{layer}.weight": "nvfp4_header" for layer in fp4_layers},
            rest="bf16",
            metadata={
                "_quantization_metadata": json.dumps(
                    {"format_version": "1.0", "layers": {layer: {"format": "nvfp4"} for layer in fp4_layers}}
                )
            },
        ),
        _plan("text_encoder", full, text_encoder, {}, rest="bf16"),
        _plan("text_encoder", mixed, text_encoder, _mixed_policy(text_encoder, depth), rest="bf16"),
        _plan("vae", FILE_NAMES["vae"][0], _vae_shapes(dims), {}, rest="f32"),
    ]


def _plan(
    role: Role,
    file_name: str,
    shapes: dict[str, tuple[int, ...]],
    quantised: dict[str, Storage],
    *,
    rest: Storage,
    metadata: dict[str, str] | None = None,
    markers: tuple[Stored, ...] = (),
) -> FilePlan:
    weights = tuple(Weight(name, shape, quantised.get(name, rest)) for name, shape in shapes.items())
    return FilePlan(role, f"{ROLE_FOLDERS[role][0]}/{file_name}", weights, metadata or {}, markers)


def transformer_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    """The transformer's weights in ComfyUI's naming, qkv fused."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in network_shapes("transformer", dims).items():
        fused = fused_name(name)
        if fused is None:
            shapes[transformer_to_comfy(name)] = shape
        else:
            rows = shapes.get(fused[0], (0,))[0]
            shapes[fused[0]] = (rows + shape[0], *shape[1:])
    return shapes


def _vae_shapes(dims: ModelDims) -> dict[str, tuple[int, ...]]:
    channels = dims.vae["block_out_channels"]
    assert isinstance(channels, (list, tuple))
    shapes = {}
    for name, shape in network_shapes("vae", dims).items():
        ldm = vae_to_ldm(name, len(channels))
        shapes[ldm.name] = (*shape, 1, 1) if ldm.pointwise else shape
    return shapes


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and name.endswith(".weight")


def _is_main_linear(name: str, shape: tuple[int, ...]) -> bool:
    return name.startswith("layers.") and _is_linear(name, shape)


def _mixed_policy(shapes: dict[str, tuple[int, ...]], depth: int) -> dict[str, Storage]:
    policy: dict[str, Storage] = {}
    for name, shape in shapes.items():
        if not _is_linear(name, shape) or not name.startswith("model.layers."):
            continue
        _, _, index, projection = name.removesuffix(".weight").split(".", 3)
        if int(index) < _first_layers(_MIXED_BF16_SHARE.get(projection), depth):
            continue
        fp4 = int(index) < _first_layers(_MIXED_NVFP4_SHARE.get(projection), depth)
        policy[name] = "nvfp4_blob" if fp4 else "fp8_blob"
    return policy


def _first_layers(share: tuple[int, int] | None, depth: int) -> int:
    return max(1, round(depth * share[0] / share[1])) if share else 0
