"""Which variants ComfyUI can draw, and the flags that its server must be started with for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from pytest_zimage.catalog import Variant, Workload
from pytest_zimage.engines.comfyui.messages import Device, SystemStats
from pytest_zimage.errors import MeasurementError, UnsupportedError

_ATTENTION = {"native": (), "sage": ("--use-sage-attention",), "flash": ("--use-flash-attention",)}
"""`native` is ComfyUI's own choice; which one that is stands in its log."""
_CHANGED = re.compile(r"\\[()]|(?:^|(?<=[ \n]))embedding:")
"""In front of the prompt stands a line's end."""
_SHOWN = 60


def refuse_unsupported(variant: Variant, *, own_workflow: bool) -> None:
    """Raises `UnsupportedError`, naming the field of the variant's table that this engine cannot serve.

    `own_workflow`: files may be of any format that the nodes of it read.
    """
    problems = tuple(_problems(variant, own_workflow))
    if problems:
        raise UnsupportedError(
            f"{variant.name}: ComfyUI cannot draw it: {'; '.join(problems)}",
            mend="draw it with --zimage-engine diffusers, or leave it out of --zimage-config",
        )


def refuse_changed_prompt(workload: Workload) -> None:
    """Raises `UnsupportedError` for a prompt that ComfyUI's tokenizer changes before it encodes it.

    It takes `\\(` for `(` and drops the blank before `embedding:`. Weights as in `(word:1.2)` stay text for Z-Image.
    """
    prompts = {"prompt": workload.prompt}
    if workload.guidance > 0:
        prompts["negative prompt"] = workload.negative_prompt
    for what, text in prompts.items():
        if found := _CHANGED.search(text):
            raise UnsupportedError(
                f"the {what} {text[:_SHOWN]!r} has {found[0]!r}, which ComfyUI's tokenizer does not leave as it is: it"
                " would draw another prompt than other engines",
                mend="write it otherwise, in a workload or prompt set of your own: --zimage-catalog",
            )


def needed_flags(variant: Variant) -> tuple[str, ...]:
    """Flags of `main.py` that make ComfyUI compute as the variant says, where that is not its default."""
    flags = list(_ATTENTION[variant.attention])
    if variant.compute_dtype == "float32":
        flags.append("--fp32-unet")
    if variant.vae_dtype == "float32":
        flags.append("--fp32-vae")
    return tuple(flags)


def refuse_missing_flags(variant: Variant, argv: Sequence[str]) -> None:
    """Raises `UnsupportedError` for a running server that was started without a flag that the variant needs."""
    # `--force-fp32` is wider than the two.
    given = {*argv, *(("--fp32-unet",) if "--force-fp32" in argv else ())}
    missing = [flag for flag in needed_flags(variant) if flag not in given]
    if missing:
        raise UnsupportedError(
            f"{variant.name}: the running ComfyUI was started without {' '.join(missing)}",
            mend=f"start it anew with {' '.join(missing)}, or let it be started: --zimage-comfyui-dir",
        )


def refuse_other_device(what: str, stats: SystemStats, device: str, name: str) -> None:
    """Raises `MeasurementError` for a server that draws on another device than the run's.

    `device` is the run's torch device, `name` NVML's name of its GPU: the numbers would stand under a wrong one.
    """
    drawing = stats.devices[0] if stats.devices else Device()
    if (drawing.type == "cpu") != (device == "cpu") or (device != "cpu" and name not in drawing.name):
        raise MeasurementError(
            f"{what}: draws on {drawing.name or 'no device that it names'!r}, and this run is of {name or device!r}",
            mend="check the server's flags and CUDA_VISIBLE_DEVICES, or name the device: --zimage-device",
        )


def _problems(variant: Variant, own_workflow: bool) -> Iterator[str]:
    for role, file in variant.files().items():
        if file.endswith("/"):
            yield f"{role} = {file!r} is a folder in diffusers' layout, and its loaders read single files"
        elif file.endswith(".gguf") and not own_workflow:
            yield f"{role} = {file!r} is GGUF, which only custom nodes read (give a workflow with them)"
    if variant.weight_dtype == "fp8_online":
        yield "weight_dtype = 'fp8_online' is vLLM-Omni's; UNETLoader knows default, fp8_e4m3fn and fp8_e4m3fn_fast"
    if variant.text_encoder_weight_dtype != "default":
        yield f"text_encoder_weight_dtype = {variant.text_encoder_weight_dtype!r} is vLLM-Omni's"
    if variant.text_encoder_dtype != "float32":
        yield f"text_encoder_dtype = {variant.text_encoder_dtype!r}: its text encoders compute in float32"
    if variant.kernels != "comfy":
        yield f"kernels = {variant.kernels!r}: it always computes with its own"
    if variant.compile:
        yield "compile = true: the published workflow compiles nothing"
    if variant.attention not in _ATTENTION:
        yield f"attention = {variant.attention!r}: it can be told {', '.join(_ATTENTION)}"
    if variant.compute_dtype == "float32" and variant.weight_dtype != "default":
        yield f"compute_dtype = 'float32' cannot be told together with weight_dtype = {variant.weight_dtype!r}"
