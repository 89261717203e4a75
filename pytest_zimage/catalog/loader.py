"""Reads the catalogue: the shipped TOML tables, then the user's own on top.

Merged by table name, a user's table replacing a shipped one of the same name. A mistake is a `CatalogError` that names
file, table and key.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from pytest_zimage.catalog.claims import Claim
from pytest_zimage.catalog.model import DeviceClass, Metric, ModelDims, ModelFile, PromptSet, Variant, Workload
from pytest_zimage.errors import CatalogError

_SECTIONS: dict[str, type[Struct]] = {
    "variants": Variant,
    "files": ModelFile,
    "workloads": Workload,
    "devices": DeviceClass,
    "prompts": PromptSet,
    "metrics": Metric,
    "models": ModelDims,
    "claims": Claim,
}
_SHIPPED = tuple(
    f"{name}.toml" for name in ("variants", "workloads", "prompts", "devices", "metrics", "models", "claims")
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_OR_FOLDER = {"transformer": ", nor of a .gguf file, nor that of a folder with a '/' at its end"}
_PIXELS_UNIT = 16
"""Pixels per latent patch side: eight of the VAE times two of the patch."""

Row = TypeVar("Row", bound=Struct)


class Catalog(Struct, frozen=True):
    """Everything the TOML files define, by name, in file order."""

    variants: dict[str, Variant]
    files: dict[str, ModelFile]
    workloads: dict[str, Workload]
    prompts: dict[str, PromptSet]
    devices: dict[str, DeviceClass]
    metrics: dict[str, Metric]
    models: dict[str, ModelDims]
    claims: dict[str, Claim]

    def variant(self, name: str) -> Variant:
        return _pick(self.variants, name, "variant", "--zimage-list shows them all")

    def workload(self, name: str) -> Workload:
        return _pick(self.workloads, name, "workload", "name one of the catalogue, or add a table of your own")

    def prompt_set(self, name: str) -> PromptSet:
        return _pick(self.prompts, name, "prompt set", "name one of the catalogue, or add a table of your own")

    def device(self, name: str) -> DeviceClass:
        return _pick(self.devices, name, "device class", "name one of the catalogue, or add a table of your own")

    def select(self, patterns: Iterable[str]) -> list[Variant]:
        """Variants in catalogue order that any of `patterns` names: a name, a glob, or `@tag`.

        No patterns: the default ones, which is what runs when nobody says what to run.

        Raises `CatalogError` for a pattern that names nothing.
        """
        import fnmatch

        wanted = list(patterns)
        if not wanted:
            return [variant for variant in self.variants.values() if variant.default]
        chosen: set[str] = set()
        for pattern in wanted:
            if pattern.startswith("@"):
                hits = [v.name for v in self.variants.values() if pattern[1:] in v.tags]
                if not hits:
                    tags = sorted({tag for v in self.variants.values() for tag in v.tags})
                    raise CatalogError(f"no variant has the tag {pattern}", mend=f"known tags: {', '.join(tags)}")
            else:
                hits = fnmatch.filter(self.variants, pattern)
                if not hits:
                    self.variant(pattern)
            chosen.update(hits)
        return [v for v in self.variants.values() if v.name in chosen]


def load_catalog(extra: Iterable[Path] = ()) -> Catalog:
    """The shipped catalogue with the tables of `extra` on top."""
    here = Path(__file__).parent
    rows: dict[str, dict[str, Struct]] = {section: {} for section in _SECTIONS}
    for path in [*(here / name for name in _SHIPPED), *extra]:
        for section, name, table in _tables(path):
            rows[section][name] = _row(path, section, name, table)
    catalog = msgspec.convert(rows, Catalog)
    _cross_check(catalog)
    return catalog


def _tables(path: Path) -> Iterable[tuple[str, str, dict[str, Any]]]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CatalogError(
            f"{path}: cannot be read: {error.strerror}", mend="correct the ini value zimage_catalog"
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"{path}: not valid TOML: {error}", mend="correct the file at that line") from error
    for section, tables in document.items():
        if section not in _SECTIONS:
            raise CatalogError(
                f"{path}: unknown table [{section}]" + _did_you_mean(section, _SECTIONS),
                mend=f"a catalogue file holds {', '.join(f'[{s}.NAME]' for s in _SECTIONS)}",
            )
        if not isinstance(tables, dict):
            raise CatalogError(f"{path}: {section} must be a table of tables", mend=f"write [{section}.NAME]")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise CatalogError(
                    f"{path}: [{section}] has the key {name!r} outside of a named table", mend=f"write [{section}.NAME]"
                )
            yield section, name, table


def _row(path: Path, section: str, name: str, table: dict[str, Any]) -> Struct:
    where = f"{path}: [{section}.{name}]"
    if not _NAME.fullmatch(name):
        raise CatalogError(f"{where}: {name!r} is not a name", mend="use letters, digits, '.', '_' and '-'")
    kind = _SECTIONS[section]
    for key in table:
        if key not in kind.__struct_fields__ or key == "name":
            known = [field for field in kind.__struct_fields__ if field != "name"]
            raise CatalogError(
                f"{where}: unknown key {key!r}" + _did_you_mean(key, known), mend=f"known keys: {', '.join(known)}"
            )
    try:
        row = msgspec.convert({"name": name, **table}, kind)
    except msgspec.ValidationError as error:
        raise CatalogError(f"{where}: {_plain(error)}", mend="correct that key") from error
    _check_row(where, row)
    return row


def _plain(error: msgspec.ValidationError) -> str:
    """msgspec says 'Expected `int`, got `str` - at `$.steps`'; people say which key."""
    text = str(error)
    match = re.search(r" - at `\$\.?([^`]*)`$", text)
    return f"key {match[1]!r}: {text[: match.start()]}" if match and match[1] else text


def _check_row(where: str, row: Struct) -> None:
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
        if not _NAME.fullmatch(prompt.name) or names.count(prompt.name) > 1:
            refuse("prompts", f"{prompt.name!r} is not a name of its own")
        if not prompt.text.strip():
            refuse("prompts", f"{prompt.name!r} has an empty text")
        if not prompt.seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
            refuse("prompts", f"{prompt.name!r} needs at least one seed, none twice, none below 0")


def _cross_check(catalog: Catalog) -> None:
    for variant in catalog.variants.values():
        for key in ("reference", "twin"):
            named = getattr(variant, key)
            if named not in catalog.variants and (named or key == "reference"):
                raise CatalogError(
                    f"[variants.{variant.name}]: key {key!r}: no variant {named!r}"
                    + _did_you_mean(named, catalog.variants),
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
                    + _did_you_mean(lane, catalog.devices),
                    mend=f"known device classes: {', '.join(catalog.devices)}",
                )
    for claim in catalog.claims.values():
        for key, rows in (("metric", catalog.metrics), ("workload", catalog.workloads), ("lane", catalog.devices)):
            if getattr(claim, key) not in rows:
                raise CatalogError(
                    f"[claims.{claim.name}]: key {key!r}: {getattr(claim, key)!r} is not in the catalogue"
                    + _did_you_mean(getattr(claim, key), rows),
                    mend="name one of the catalogue, or add a table of your own",
                )
    for device in catalog.devices.values():
        for metric in device.bands:
            if metric not in catalog.metrics:
                raise CatalogError(
                    f"[devices.{device.name}]: key 'bands': no metric {metric!r}"
                    + _did_you_mean(metric, catalog.metrics),
                    mend=f"known metrics: {', '.join(catalog.metrics)}",
                )


def _pick(rows: dict[str, Row], name: str, what: str, mend: str) -> Row:
    if name in rows:
        return rows[name]
    raise CatalogError(f"unknown {what} {name!r}" + _did_you_mean(name, rows), mend=mend)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
