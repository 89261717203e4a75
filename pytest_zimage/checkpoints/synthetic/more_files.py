"""Files that are written only when a variant asks for them: mixed NVFP4 and its LoRA, MXFP8, INT8, SVDQuant, GGUF.

Each holds the same BF16 values as the BF16 file, quantised. What is published of a file is followed; what is not is
said here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from pytest_zimage.catalog.model import ROLE_FOLDERS, Role
from pytest_zimage.checkpoints.synthetic.encodings import (
    Blob,
    EncodedWeight,
    Encoding,
    Int8ConvRot,
    LoraOf,
    Mxfp8,
    SvdQuant,
)
from pytest_zimage.checkpoints.synthetic.gguf_plan import GgufPlan
from pytest_zimage.checkpoints.synthetic.gguf_types import GgufBlocks
from pytest_zimage.checkpoints.synthetic.plan import FilePlan, Weight
from pytest_zimage.checkpoints.synthetic.storage import Storage

MIXED = "z_image_turbo_nvfp4_mixed.safetensors"
MIXED_LORA = "z_image_turbo_nvfp4_lora.safetensors"
MXFP8 = "z_image_turbo_mxfp8.safetensors"
INT8 = "z_image_turbo_int8_convrot.safetensors"
SVDQUANT = "z_image_turbo_svdquant_w4a4.safetensors"
Q8_0 = "z_image_turbo-Q8_0.gguf"
Q4_K = "z_image_turbo-Q4_K_S.gguf"

NAMES: dict[Role, tuple[str, ...]] = {
    "transformer": (MIXED, MXFP8, INT8, SVDQUANT, Q8_0, Q4_K),
    "lora": (MIXED_LORA,),
}

LORA_RANK = 32
_ORIG = {"orig_dtype": "torch.bfloat16"}
_Shapes = Mapping[str, tuple[int, ...]]
_Choose = Callable[[str], Encoding | Storage]

# The layer lists of InsecureErasure/Z-Image-Turbo-NVFP4, made by --custom-layers and --exclude-layers; the rest of the
# blocks' linears is NVFP4.
_MIXED_BF16 = re.compile(
    r"layers\.29\.attention\.qkv|layers\.2[2-9]\.adaLN_modulation\.0|context_refiner\.[01]\.attention\.out"
    r"|context_refiner\.1\.feed_forward\.w2|noise_refiner\.1\.attention\.(qkv|out)|noise_refiner\.1\.feed_forward\.w2"
    r"|noise_refiner\.[01]\.feed_forward\.w3"
)
_MIXED_MXFP8 = re.compile(
    r"layers\.[01]\.attention\.out|layers\.(10|16|26|27|28)\.attention\.qkv"
    r"|layers\.(3|6|9|1[1-4]|19|20|2[6-9])\.attention\.out|layers\.([3-9]|1\d|2\d)\.feed_forward\.w1"
    r"|layers\.(1[6-9]|2[01])\.adaLN_modulation\.0|context_refiner\.[01]\.attention\.qkv"
    r"|context_refiner\.[01]\.feed_forward\.w[123]|noise_refiner\.0\.attention\.(qkv|out)"
    r"|noise_refiner\.0\.feed_forward\.w[12]|noise_refiner\.1\.feed_forward\.w1"
)
_BLOCK = re.compile(r"(layers|noise_refiner|context_refiner)\.\d+\.")
_SVDQUANT = re.compile(r"layers\.\d+\.(attention|feed_forward)\.")


def plan_file(name: str, shapes: _Shapes) -> FilePlan:
    """The plan of the file `name`, one of `NAMES`, from the transformer's `shapes` in ComfyUI's naming."""
    plans: dict[str, Callable[[], FilePlan]] = {
        MIXED: lambda: _plan(MIXED, shapes, _mixed, "bf16", _mixed_metadata(shapes)),
        MIXED_LORA: lambda: _lora(shapes),
        # convert-to-quant --mxfp8 --comfy_quant: the blocks' linears with the modulation.
        MXFP8: lambda: _plan(MXFP8, shapes, lambda _: Mxfp8({"format": "mxfp8", "group_size": 32, **_ORIG}), "bf16"),
        INT8: lambda: _plan(INT8, shapes, lambda _: Int8ConvRot(), "f32"),
        # No file of Z-Image is published: attention and feed-forward of the main layers, as of other models.
        SVDQUANT: lambda: _plan(
            SVDQUANT, shapes, lambda layer: SvdQuant() if _SVDQUANT.match(layer) else "bf16", "bf16"
        ),
        Q8_0: lambda: GgufPlan.of(_path(Q8_0), _weights(shapes, lambda _: GgufBlocks("Q8_0"), "bf16")),
        Q4_K: lambda: GgufPlan.of(_path(Q4_K), _weights(shapes, lambda _: GgufBlocks("Q4_K"), "bf16")),
    }
    return plans[name]()


def mixed_format(layer: str) -> str:
    """`bf16`, `mxfp8` or `nvfp4`: how the mixed file holds the linear `layer` of a block."""
    if _MIXED_BF16.fullmatch(layer):
        return "bf16"
    return "mxfp8" if _MIXED_MXFP8.fullmatch(layer) else "nvfp4"


def _mixed(layer: str) -> Encoding | Storage:
    format_ = mixed_format(layer)
    if format_ == "mxfp8":
        return Mxfp8({"format": "mxfp8", **_ORIG})
    return Blob("nvfp4_blob", {"format": "nvfp4", **_ORIG}) if format_ == "nvfp4" else "bf16"


def _mixed_metadata(shapes: _Shapes) -> dict[str, str]:
    """As --save-quant-metadata writes it, which says more of a layer than its own record."""
    groups = {"nvfp4": 16, "mxfp8": 32}
    formats = {layer: mixed_format(layer) for layer in _block_linears(shapes)}
    layers: dict[str, Any] = {
        layer: {"format": format_, "group_size": groups[format_], **_ORIG}
        for layer, format_ in formats.items()
        if format_ in groups
    }
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def _lora(shapes: _Shapes) -> FilePlan:
    """A pair for every quantised layer of the mixed file; which ones the published LoRA has is not known."""
    layouts = {"nvfp4": "TensorCoreNVFP4Layout", "mxfp8": "TensorCoreMXFP8Layout"}
    weights = tuple(
        EncodedWeight(f"{layer}.weight", shapes[f"{layer}.weight"], "f32", encoding=LoraOf(layouts[format_], LORA_RANK))
        for layer in _block_linears(shapes)
        if (format_ := mixed_format(layer)) in layouts
    )
    # Of the transformer's weights, which it is made from.
    return FilePlan("transformer", f"{ROLE_FOLDERS['lora'][0]}/{MIXED_LORA}", weights)


def _plan(
    name: str, shapes: _Shapes, choose: _Choose, rest: Storage, metadata: dict[str, str] | None = None
) -> FilePlan:
    return FilePlan("transformer", _path(name), _weights(shapes, choose, rest), metadata or {})


def _path(name: str) -> str:
    return f"{ROLE_FOLDERS['transformer'][0]}/{name}"


def _weights(shapes: _Shapes, choose: _Choose, rest: Storage) -> tuple[Weight, ...]:
    """Every weight; `choose` says how a linear of the blocks is held, and `rest` how the others are."""
    linears = _block_linears(shapes)
    weights: list[Weight] = []
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        chosen = choose(layer) if layer in linears else rest
        if isinstance(chosen, str):
            weights.append(Weight(name, shape, chosen))
        else:
            weights.append(EncodedWeight(name, shape, rest, encoding=chosen))
    return tuple(weights)


def _block_linears(shapes: _Shapes) -> dict[str, None]:
    """Layers, in the order of the network: refiners and modulation included."""
    names = (n for n, shape in shapes.items() if len(shape) == 2 and n.endswith(".weight") and _BLOCK.match(n))
    return dict.fromkeys(name.removesuffix(".weight") for name in names)
