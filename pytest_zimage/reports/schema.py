"""The JSON Schema of the results file, generated from its types, with their docstrings as descriptions."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect as types

from pytest_zimage.reports.results import Results


def schema_text() -> str:
    """The document kept in `docs/results.schema.json`, newline included."""
    return json.dumps(results_schema(), indent=2, sort_keys=True) + "\n"


def results_schema() -> dict[str, Any]:
    """Draft 2020-12. Every field is required, because every field is always written."""
    (top,), definitions = msgspec.json.schema_components([Results], ref_template="#/$defs/{name}")
    documented = {struct.__name__: _field_docs(struct) for struct in _structs(types.type_info(Results))}
    for name, definition in definitions.items():
        if "properties" not in definition:
            continue
        definition["required"] = sorted(definition["properties"])
        for field, about in definition["properties"].items():
            about.pop("default", None)
            if text := documented.get(name, {}).get(field):
                about["description"] = text
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Results of one pytest-zimage session",
        **top,
        "$defs": definitions,
    }


def _structs(kind: types.Type, seen: set[type] | None = None) -> Iterator[type]:
    """Every Struct that `kind` can hold, itself included."""
    seen = set() if seen is None else seen
    if isinstance(kind, types.StructType):
        if kind.cls in seen:
            return
        seen.add(kind.cls)
        yield kind.cls
        for field in kind.fields:
            yield from _structs(field.type, seen)
    elif isinstance(kind, types.UnionType):
        for part in kind.types:
            yield from _structs(part, seen)
    elif isinstance(kind, types.CollectionType):
        yield from _structs(kind.item_type, seen)
    elif isinstance(kind, types.TupleType):
        for part in kind.item_types:
            yield from _structs(part, seen)
    elif isinstance(kind, types.DictType):
        yield from _structs(kind.value_type, seen)


def _field_docs(struct: type) -> dict[str, str]:
    """The string below each field of a class, by field name."""
    body = ast.parse(textwrap.dedent(inspect.getsource(struct))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(text, ast.Expr)
            and isinstance(text.value, ast.Constant)
            and isinstance(text.value.value, str)
        ):
            found[field.target.id] = " ".join(text.value.value.split())
    return found
