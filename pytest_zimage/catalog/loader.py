"""Reads the catalogue: the shipped TOML tables, then the user's own on top.

Merged by table name, a user's table replacing a shipped one of the same name. A mistake is a `CatalogError` that names
file, table and key.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from pytest_zimage.catalog.catalog import Catalog, did_you_mean
from pytest_zimage.catalog.checks import NAME, check_row, cross_check
from pytest_zimage.catalog.claims import Claim
from pytest_zimage.catalog.device_class import DeviceClass
from pytest_zimage.catalog.model import Metric, ModelDims, ModelFile, PromptSet, Variant, Workload
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


def load_catalog(extra: Iterable[Path] = ()) -> Catalog:
    """The shipped catalogue with the tables of `extra` on top."""
    here = Path(__file__).parent
    rows: dict[str, dict[str, Struct]] = {section: {} for section in _SECTIONS}
    for path in [*(here / name for name in _SHIPPED), *extra]:
        for section, name, table in _tables(path):
            rows[section][name] = _row(path, section, name, table)
    catalog = msgspec.convert(rows, Catalog)
    cross_check(catalog)
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
                f"{path}: unknown table [{section}]" + did_you_mean(section, _SECTIONS),
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
    if not NAME.fullmatch(name):
        raise CatalogError(f"{where}: {name!r} is not a name", mend="use letters, digits, '.', '_' and '-'")
    kind = _SECTIONS[section]
    for key in table:
        if key not in kind.__struct_fields__ or key == "name":
            known = [field for field in kind.__struct_fields__ if field != "name"]
            raise CatalogError(
                f"{where}: unknown key {key!r}" + did_you_mean(key, known), mend=f"known keys: {', '.join(known)}"
            )
    try:
        row = msgspec.convert({"name": name, **table}, kind)
    except msgspec.ValidationError as error:
        raise CatalogError(f"{where}: {_plain(error)}", mend="correct that key") from error
    check_row(where, row)
    return row


def _plain(error: msgspec.ValidationError) -> str:
    """msgspec says 'Expected `int`, got `str` - at `$.steps`'; people say which key."""
    text = str(error)
    match = re.search(r" - at `\$\.?([^`]*)`$", text)
    return f"key {match[1]!r}: {text[: match.start()]}" if match and match[1] else text
