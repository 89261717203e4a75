"""From a variant's files to a diffusers pipeline, with the time and the bytes it took."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import ZImagePipeline
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pytest_zimage.catalog.model import ModelDims, Role, Variant
from pytest_zimage.checkpoints import keymap
from pytest_zimage.checkpoints.assembly import Assembly
from pytest_zimage.checkpoints.building import build_text_encoder, build_transformer, build_vae, torch_dtype
from pytest_zimage.checkpoints.counting import count_compute, count_weights
from pytest_zimage.checkpoints.folders import read_weights
from pytest_zimage.checkpoints.formats import detect
from pytest_zimage.checkpoints.keymap import Rename
from pytest_zimage.checkpoints.linears import FP8
from pytest_zimage.checkpoints.lora import attach_lora
from pytest_zimage.checkpoints.precision import Precision
from pytest_zimage.checkpoints.quantised import multiplies_natively
from pytest_zimage.checkpoints.shard_reader import ShardReader
from pytest_zimage.checkpoints.staging import Staging
from pytest_zimage.errors import CheckpointError, MissingFileError, UnsupportedError


@dataclass
class LoadedPipeline:
    """A pipeline that is ready to draw, and what loading it showed."""

    pipeline: Any
    phases_s: dict[str, float]
    """`read`: in the file; `to_device`: waiting for the device; `build`: all the rest. They add up to the load."""
    weight_bytes: dict[str, int]
    tensors: dict[str, int]
    compute: dict[str, int]
    notes: tuple[str, ...] = ()


@dataclass
class _Times:
    began: float = field(default_factory=time.perf_counter)
    read_s: float = 0.0
    to_device_s: float = 0.0

    def phases_s(self) -> dict[str, float]:
        build_s = time.perf_counter() - self.began - self.read_s - self.to_device_s
        return {"read": self.read_s, "build": build_s, "to_device": self.to_device_s}


def load_pipeline(
    variant: Variant,
    dims: ModelDims,
    files: Mapping[Role, Path],
    tokenizer: Path,
    scheduler: object,
    device: torch.device,
) -> LoadedPipeline:
    """Load `variant` onto `device`.

    Raises `MissingFileError` and `CheckpointError` naming file and tensor, `UnsupportedError` for a format or a
    combination that the device or the installed packages cannot serve.
    """
    times = _Times()
    # One for all files, since pinning its memory takes time.
    staging = Staging(device) if device.type == "cuda" else None
    transformer = build_transformer(dims, variant, device)
    precision = transformer_precision(variant, device)
    notes = _fill(transformer, files["transformer"], keymap.transformer_to_diffusers, precision, device, times, staging)
    if "lora" in files:
        strength = variant.lora_strength
        read_s, to_device_s = attach_lora(transformer, files["lora"], strength, precision.compute, device, staging)
        times.read_s += read_s
        times.to_device_s += to_device_s

    text_encoder = build_text_encoder(dims, device)
    # ComfyUI computes a quantised text encoder weight-only, whatever the device can do.
    precision = Precision(
        torch_dtype(variant.text_encoder_dtype),
        quantise_activations=False,
        online_fp8=variant.text_encoder_weight_dtype == "fp8_online",
    )
    notes += _fill(
        text_encoder, files["text_encoder"], keymap.text_encoder_to_transformers, precision, device, times, staging
    )

    vae = build_vae(dims)
    levels = len(vae.config.block_out_channels)
    vae_dtype = torch_dtype(variant.vae_dtype)
    precision = Precision(vae_dtype, store=vae_dtype)
    _fill(vae, files["vae"], lambda name: keymap.vae_to_diffusers(name, levels).name, precision, device, times, staging)

    kind: Any = ZImagePipeline
    pipeline = kind(
        scheduler=scheduler,
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=load_tokenizer(tokenizer),
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    if device.type == "cuda":
        began = time.perf_counter()
        torch.cuda.synchronize(device)
        times.to_device_s += time.perf_counter() - began
    phases_s = times.phases_s()
    networks = (transformer, text_encoder, vae)
    weight_bytes, tensors = count_weights(networks)
    return LoadedPipeline(
        pipeline, phases_s, weight_bytes, tensors, count_compute(networks), _notes(variant, device, notes)
    )


def transformer_precision(variant: Variant, device: torch.device) -> Precision:
    """How the transformer of `variant` computes on `device`."""
    compute = torch_dtype(variant.compute_dtype)
    if variant.weight_dtype == "default":
        return Precision(compute)
    if variant.weight_dtype == "fp8_online":
        return Precision(compute, online_fp8=True)
    return Precision(compute, store=FP8, fast_fp8=_multiplies_fp8(variant, device))


def _multiplies_fp8(variant: Variant, device: torch.device) -> bool:
    return variant.weight_dtype == "fp8_e4m3fn_fast" and multiplies_natively("float8_e4m3fn", device)


def _notes(variant: Variant, device: torch.device, said: list[str]) -> tuple[str, ...]:
    notes = list(dict.fromkeys(said))
    if variant.weight_dtype == "fp8_e4m3fn_fast" and not _multiplies_fp8(variant, device):
        notes.append(f"{device} does not multiply in FP8: {variant.weight_dtype} is computed as a plain cast")
    return tuple(notes)


def _fill(
    network: nn.Module,
    path: Path,
    rename: Rename,
    precision: Precision,
    device: torch.device,
    times: _Times,
    staging: Staging | None,
) -> list[str]:
    """Read the file or folder at `path` into `network`; notes on what is dequantised and why."""
    weights = read_weights(path)
    with ShardReader(weights, device, staging) as reader:
        contents = detect(weights.header, reader.read_bytes)
        if contents.quantised and (precision.store is not None or precision.online_fp8):
            raise UnsupportedError(
                f"{path}: the file is quantised already ({len(contents.quantised)} layers) and the variant asks for "
                f"its weights in {precision.store or FP8}",
                mend='set weight_dtype = "default", or name an unquantised file',
            )
        assembly = Assembly(network, path, contents, rename, precision, device)
        for info, tensor in reader.read(assembly.wanted):
            assembly.accept(info, tensor)
        assembly.finish()
        times.read_s += reader.read_s
        times.to_device_s += reader.to_device_s
    notes = [f"{device} does not multiply {name}: its layers are dequantised" for name in sorted(assembly.dequantised)]
    if assembly.finely_scaled:
        notes.append(
            f"{path.name}: {assembly.finely_scaled} FP8 layers have scales per channel or per block, where products "
            "take one: they are dequantised"
        )
    return notes


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `folder`, which must carry Qwen's chat template."""
    if not folder.is_dir():
        raise MissingFileError(f"{folder}: no such tokenizer folder", mend="name the folder that holds tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder}: not a tokenizer that transformers can read: {error}", mend="fetch the tokenizer folder again"
        ) from error
    if not tokenizer.chat_template:
        raise CheckpointError(
            f"{folder}: the tokenizer has no chat template", mend="fetch the tokenizer folder of Z-Image-Turbo"
        )
    return tokenizer
