"""What a row must satisfy beyond the types of its keys, by itself and among the others.

A mistake is a `CatalogError` that names table and key, and the file where one row alone shows it.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from msgspec import Struct

from pytest_zimage.catalog.catalog import Catalog, did_you_mean
from pytest_zimage.catalog.device_class import DeviceClass
from pytest_zimage.catalog.model import Metric, PromptSet, Variant, Workload
from pytest_zimage.errors import CatalogError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OR_FOLDER = {"transformer": ", nor of a .gguf file, nor that of a folder with a '/' at its end"}
_PIXELS_UNIT = 16
"""Pixels per latent patch side: eight of the VAE times two of the patch."""


def check_row(where: str, row: Struct) -> None:
    """Raise `CatalogError` for a value that its type allows and its meaning does not; `where` names file and table."""

    def refuse(key: str, why: str) -> None:
        raise CatalogError(f"{where}: key {key!r}: {why}", mend="correct that key")

    if isinstance(row, Workload | PromptSet):
        for key in ("width", "height"):
            size = getattr(row, key)
            if size is not None and (size < _PIXELS_UNIT or size % _PIXELS_UNIT):
                refuse(key, f"{size} is not a positive multiple of {_PIXELS_UNIT}")
    if isinstance(row, PromptSet):
        _check_prompts(row, refuse)
    if isinstance(row, Workload):
        if row.steps < 1:
            refuse("steps", f"{row.steps} is not at least 1")
        if not row.prompt.strip():
            refuse("prompt", "is empty")
        if not row.shift > 0:
            refuse("shift", f"{row.shift} is not above 0")
        if not 0 <= row.guidance < float("inf"):
            refuse("guidance", f"{row.guidance} is not a finite number of at least 0")
        if row.negative_prompt and not row.guidance:
            refuse("negative_prompt", "without guidance nothing leads away from it: Turbo draws with guidance 0")
    elif isinstance(row, Variant):
        for role, file in row.files().items():
            folder = role == "transformer" and file.endswith("/")
            kinds = (".safetensors", ".gguf") if role == "transformer" else (".safetensors",)
            name = file[:-1] if folder else file.removesuffix(next((k for k in kinds if file.endswith(k)), "\0"))
            if name in ("", ".", "..", *(() if folder else (file,))) or "/" in name or "\\" in name:
                refuse(role, f"{file!r} is not the plain name of a .safetensors file" + _OR_FOLDER.get(role, ""))
        if not abs(row.lora_strength) < float("inf"):
            refuse("lora_strength", f"{row.lora_strength} is not finite")
        if row.lora_strength != 1.0 and not row.lora:
            refuse("lora_strength", "there is no key 'lora' whose strength it could be")
    elif isinstance(row, DeviceClass):
        if not row.name.isidentifier():
            refuse("name", f"{row.name!r} cannot be a pytest marker; use letters, digits and '_'")
        try:
            re.compile(row.pattern)
        except re.error as error:
            refuse("pattern", f"not a regular expression: {error}")
    elif isinstance(row, Metric):
        for key in ("prior", "floor", "band", "band_absolute"):
            if not 0 <= getattr(row, key) < float("inf"):
                refuse(key, f"{getattr(row, key)} is not a finite number of at least 0")
        if row.kind == "sampled" and not (row.prior > 0 and row.floor > 0 and row.max_runs >= 1):
            refuse("kind", "'sampled' needs prior and floor above 0 and max_runs of at least 1")


def _check_prompts(row: PromptSet, refuse: Callable[[str, str], None]) -> None:
    if not row.prompts:
        refuse("prompts", "is empty")
    if (row.width is None) != (row.height is None):
        refuse("width", "width and height go together")
    names = [prompt.name for prompt in row.prompts]
    for prompt in row.prompts:
        seeds = (*prompt.seeds, *prompt.more_seeds)
        if not NAME.fullmatch(prompt.name) or names.count(prompt.name) > 1:
            refuse("prompts", f"{prompt.name!r} is not a name of its own")
        if not prompt.text.strip():
            refuse("prompts", f"{prompt.name!r} has an empty text")
        if not prompt.seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            refuse("prompts", f"{prompt.name!r} needs at least one seed, none twice, none below 0")


def cross_check(catalog: Catalog) -> None:
    """Raise `CatalogError` for a row that names one that is not there."""
    for variant in catalog.variants.values():
        for key in ("reference", "twin"):
            named = getattr(variant, key)
            if named not in catalog.variants and (named or key == "reference"):
                raise CatalogError(
                    f"[variants.{variant.name}]: key {key!r}: no variant {named!r}"
                    + did_you_mean(named, catalog.variants),
                    mend="name one of the catalogue, or add a table of your own",
                )
        if variant.twin == variant.name:
            raise CatalogError(
                f"[variants.{variant.name}]: key 'twin': it cannot be its own", mend="name another variant, or none"
            )
        for lane in variant.lanes:
            if lane not in catalog.devices:
                raise CatalogError(
                    f"[variants.{variant.name}]: key 'lanes': no device class {lane!r}"
                    + did_you_mean(lane, catalog.devices),
                    mend=f"known device classes: {', '.join(catalog.devices)}",
                )
    for claim in catalog.claims.values():
        for key, rows in (("metric", catalog.metrics), ("workload", catalog.workloads), ("lane", catalog.devices)):
            if getattr(claim, key) not in rows:
                raise CatalogError(
                    f"[claims.{claim.name}]: key {key!r}: {getattr(claim, key)!r} is not in the catalogue"
                    + did_you_mean(getattr(claim, key), rows),
                    mend="name one of the catalogue, or add a table of your own",
                )
    for device in catalog.devices.values():
        for metric in device.bands:
            if metric not in catalog.metrics:
                raise CatalogError(
                    f"[devices.{device.name}]: key 'bands': no metric {metric!r}"
                    + did_you_mean(metric, catalog.metrics),
                    mend=f"known metrics: {', '.join(catalog.metrics)}",
                )
