"""The command that serves a variant: which quantisation, which attention, and what of it is not for the user."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.vllm_omni.log import backend_of
from pytest_zimage.errors import UnsupportedError

_OURS = ("--host", "--port", "--omni", "--served-model-name", "--uds")


def check_variant(variant: Variant) -> None:
    """Raises `UnsupportedError` for a variant that vLLM-Omni has no way to be."""
    backend_of(variant)
    problem = ""
    if variant.weight_dtype not in ("default", "fp8_online"):
        problem = f"casts its weights to {variant.weight_dtype}, which is ComfyUI's"
    elif variant.lora:
        problem = "has a LoRA, which is not sent to vLLM-Omni"
    elif not variant.repository and not variant.transformer.endswith("/"):
        problem = "names single files, and vLLM-Omni reads whole pipelines"
    if problem:
        raise UnsupportedError(
            f"{variant.name} {problem}",
            mend="choose others: --zimage-config=@pass-a,@pass-b; or name a `repository` in the variant's table",
        )


def command(executable: str, model: str, variant: Variant, flags: Sequence[str], port: int) -> list[str]:
    """Raises `UnsupportedError` for flags of the user's that would make it another server or another variant."""
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
    for name in names:
        if name in _OURS:
            raise UnsupportedError(
                f"--zimage-vllm-omni-flags: {name} is set here already", mend="take it out of the flags"
            )
        if "quantization" in name and not variant.transformer.endswith("/"):
            raise UnsupportedError(
                f"--zimage-vllm-omni-flags: {name} would make {variant.name} another variant",
                mend="take it out of the flags, and choose the variant that is quantised so",
            )
    # A path is meant from where the tests are; the server works in the folder of its log.
    program = str(Path(executable).expanduser().absolute()) if "/" in executable else executable
    return [
        *(program, "serve", model, "--omni", "--host", "127.0.0.1", "--port", str(port)),
        *_quantisation(variant),
        *flags,
    ]


def environment_of(variant: Variant) -> dict[str, str]:
    """By the environment, since the flag for attention is known from 0.22 on only; a flag outranks it.

    A prompt that was encoded before must be encoded again, or a warm image is not the work of one.
    """
    return {"DIFFUSION_ATTENTION_BACKEND": backend_of(variant), "OMNI_DIFFUSION_PROMPT_EMBED_CACHE": "0"}


def _quantisation(variant: Variant) -> list[str]:
    """Nothing for files that are quantised already: their own configuration says how."""
    transformer = variant.weight_dtype == "fp8_online"
    text_encoder = variant.text_encoder_weight_dtype == "fp8_online"
    fp8 = {"method": "fp8"}
    if transformer and text_encoder:
        config: dict[str, object] = {**fp8}
    elif transformer or text_encoder:
        config = {"transformer": fp8 if transformer else None, "text_encoder": fp8 if text_encoder else None}
    else:
        return []
    return ["--quantization-config", json.dumps(config, separators=(",", ":"))]
