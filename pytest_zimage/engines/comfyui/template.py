"""The workflow of the published numbers, in ComfyUI's API format."""

from __future__ import annotations

from typing import Any

from pytest_zimage.engines.comfyui.slots import Graph


def published(*, guided: bool, lora: bool) -> Graph:
    """Node classes and links as in ComfyUI's template `image_z_image_turbo`; what varies is filled in later.

    `guided`: a negative prompt is encoded; else the positive one is zeroed. `lora`: a LoRA of the transformer.
    """
    negative = (
        _node("CLIPTextEncode", "negative prompt", clip=["2", 0], text="")
        if guided
        else _node("ConditioningZeroOut", "no negative prompt", conditioning=["5", 0])
    )
    nodes: Graph = {
        "1": _node("UNETLoader", "transformer", unet_name="", weight_dtype="default"),
        "2": _node("CLIPLoader", "text encoder", clip_name="", type="lumina2"),
        "3": _node("VAELoader", "vae", vae_name=""),
        "4": _node("ModelSamplingAuraFlow", "shift", model=["11" if lora else "1", 0], shift=3.0),
        "5": _node("CLIPTextEncode", "prompt", clip=["2", 0], text=""),
        "6": negative,
        "7": _node("EmptySD3LatentImage", "latent", width=0, height=0, batch_size=1),
        "8": _node(
            "KSampler",
            "sampler",
            model=["4", 0],
            positive=["5", 0],
            negative=["6", 0],
            latent_image=["7", 0],
            seed=0,
            steps=0,
            cfg=1.0,
            sampler_name="",
            scheduler="",
            denoise=1.0,
        ),
        "9": _node("VAEDecode", "decode", samples=["8", 0], vae=["3", 0]),
        "10": _node("SaveImage", "save", images=["9", 0], filename_prefix=""),
    }
    if lora:
        nodes["11"] = _node("LoraLoaderModelOnly", "lora", model=["1", 0], lora_name="", strength_model=1.0)
    return nodes


def _node(kind: str, title: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs, "_meta": {"title": title}}
