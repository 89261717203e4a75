"""The seven FP8 policies of the vLLM-Omni study as ModelOpt exports them: folders in diffusers' layout.

A policy says which linears of the blocks, refiners included, are FP8 with one static scale for the weight and one for
the input; the published peaks of memory fit 34 blocks. Everything else is BF16 and on the ignore list.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath

from pytest_zimage.catalog.model import ROLE_FOLDERS, ModelDims
from pytest_zimage.checkpoints.folders import CONFIG
from pytest_zimage.checkpoints.keymap import is_fused_qkv, split_qkv, transformer_to_diffusers
from pytest_zimage.checkpoints.synthetic.plan import FilePlan, Weight

_PREFIX = "Z-Image-Turbo-FP8-"
_FFN, _QKV, _OUT = "feed_forward.w", "attention.qkv", "attention.out"
POLICIES: dict[str, tuple[str, ...]] = {
    "full": (_FFN, _QKV, _OUT),
    "ffn-only": (_FFN,),
    "ffn-attn-qkv": (_FFN, _QKV),
    "ffn-attn-out": (_FFN, _OUT),
    "attn-only": (_QKV, _OUT),
    "attn-qkv-only": (_QKV,),
    "attn-out-only": (_OUT,),
}
"""What each quantises in every block, in ComfyUI's naming."""

FOLDERS = tuple(f"{_PREFIX}{policy}/" for policy in POLICIES)
SHARD_BYTES = 10 * 10**9
"""diffusers' default for the largest shard."""

_STEM = "diffusion_pytorch_model"
_ALWAYS_IGNORED = ("*adaLN_modulation*", "all_final_layer*", "all_x_embedder*", "cap_embedder*", "t_embedder*")
_IGNORED = {_FFN: "*.feed_forward.*", _QKV: "*.attention.to_[qkv]", _OUT: "*.attention.to_out.0"}


def plan_folder(
    folder: str, shapes: Mapping[str, tuple[int, ...]], dims: ModelDims, shard_bytes: int = SHARD_BYTES
) -> list[FilePlan]:
    """The shards of `folder`, one of `FOLDERS`, from the transformer's `shapes` in ComfyUI's naming.

    The last of them brings the folder's config and index.
    """
    policy = POLICIES[folder.removeprefix(_PREFIX).rstrip("/")]
    root = PurePosixPath(ROLE_FOLDERS["transformer"][0]) / folder
    shards = _shards([_weight(name, shape, policy) for name, shape in shapes.items()], shard_bytes)
    names = [f"{_STEM}.safetensors"]
    if len(shards) > 1:
        names = [f"{_STEM}-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    beside = {str(root / CONFIG): _config(dims, policy)}
    if len(shards) > 1:
        beside[str(root / f"{_STEM}.safetensors.index.json")] = _index(dict(zip(names, shards, strict=True)))
    plans = [
        FilePlan("transformer", str(root / name), tuple(weights), {"format": "pt"})
        for name, weights in zip(names, shards, strict=True)
    ]
    last = plans[-1]
    plans[-1] = FilePlan(last.role, last.path, last.weights, last.metadata, beside=beside)
    return plans


def _weight(name: str, shape: tuple[int, ...], policy: tuple[str, ...]) -> Weight:
    target = transformer_to_diffusers(name)
    assert target is not None
    parts = tuple(part.name for part in split_qkv(target, shape[0])) if is_fused_qkv(target) else (target,)
    quantised = len(shape) == 2 and any(f".{kind}" in name for kind in policy)
    return Weight(name, shape, "modelopt_fp8" if quantised else "bf16", parts)


def _shards(weights: list[Weight], shard_bytes: int) -> list[list[Weight]]:
    shards: list[list[Weight]] = [[]]
    filled = 0
    for weight in weights:
        size = sum(tensor.nbytes for tensor in weight.stored())
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(weight)
        filled += size
    return shards


def _index(shards: Mapping[str, list[Weight]]) -> str:
    stored = {name: [tensor for weight in weights for tensor in weight.stored()] for name, weights in shards.items()}
    total = sum(tensor.nbytes for tensors in stored.values() for tensor in tensors)
    weight_map = {tensor.name: name for name, tensors in stored.items() for tensor in tensors}
    return _json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))})


def _config(dims: ModelDims, policy: tuple[str, ...]) -> str:
    number = {"dynamic": False, "num_bits": 8, "type": "float"}
    return _json(
        {
            "_class_name": "ZImageTransformer2DModel",
            **dims.transformer,
            "quantization_config": {
                "quant_method": "modelopt",
                "quant_algo": "FP8",
                "producer": {"name": "modelopt"},
                "config_groups": {"group_0": {"input_activations": number, "weights": number, "targets": ["Linear"]}},
                "ignore": [*_ALWAYS_IGNORED, *(pattern for kind, pattern in _IGNORED.items() if kind not in policy)],
            },
        }
    )


def _json(document: dict[str, object]) -> str:
    return json.dumps(document, indent=2) + "\n"
