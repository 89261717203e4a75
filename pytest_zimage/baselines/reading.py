"""Bytes of a baseline file -> a `Baseline` that can be trusted, or a `BaselineError` naming file, field and mend."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec import structs

from pytest_zimage.baselines.reading_images import check_images, check_paired
from pytest_zimage.baselines.schema import SCHEMA, Band, Baseline, Key, MetricBaseline, Published
from pytest_zimage.catalog.model import Metric
from pytest_zimage.errors import BaselineError

T = TypeVar("T")
_RECORD_AGAIN = "restore the file from version control, or record it again: --update-baselines"


class NewerSchemaError(BaselineError):
    """Written by a newer version of the project; never to be overwritten by this one."""


def read_baseline(path: Path, key: Key, metrics: Mapping[str, Metric]) -> Baseline:
    """The baseline of `key`, which is stored at `path`.

    Raises `BaselineError` for a file that cannot be read, is not JSON, is of another schema or key, or holds a field or
    a number that no measurement leaves behind.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read: {error.strerror}", mend="make the file readable") from error
    return parse_baseline(data, path, key, metrics)


def parse_baseline(data: bytes, path: Path, key: Key, metrics: Mapping[str, Metric]) -> Baseline:
    """`read_baseline` on bytes; `path` is only named in errors."""
    document = _document(data, path)
    _check_schema(document, path)
    raw_metrics = document.get("metrics")
    if not isinstance(raw_metrics, dict) or not (raw_metrics or document.get("images")):
        _refuse(path, "metrics", "must be an object with at least one metric")
    # One by one, because msgspec names no keys of a dict in its errors.
    parsed = {n: _convert(path, f"metrics.{n}", raw, MetricBaseline) for n, raw in raw_metrics.items()}
    header = _convert(path, "", {**document, "metrics": {}}, Baseline)
    baseline = msgspec.structs.replace(header, metrics=parsed)
    _check_header(baseline, path, key)
    for name, stored in parsed.items():
        _check_metric(path, name, stored, metrics)
    check_images(baseline, lambda field, why: _refuse(path, field, why))
    return baseline


def _document(data: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        for name in names:
            if names.count(name) > 1:
                _refuse(path, name, "is there twice")
        return dict(pairs)

    try:
        document = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise BaselineError(f"{path}: not JSON: {error}", mend=_RECORD_AGAIN) from error
    if not isinstance(document, dict):
        raise BaselineError(f"{path}: not a JSON object", mend=_RECORD_AGAIN)
    return document


def _check_schema(document: dict[str, Any], path: Path) -> None:
    schema = document.get("schema")
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        _refuse(path, "schema", f"is {schema!r}; this version writes {SCHEMA}")
    if schema > SCHEMA:
        raise NewerSchemaError(
            f"{path}: field 'schema': is {schema}, newer than {SCHEMA}, the newest this version of pytest-zimage reads",
            mend="pip install --upgrade pytest-zimage",
        )


def _check_header(baseline: Baseline, path: Path, key: Key) -> None:
    for field in Key.__struct_fields__:
        found, wanted = getattr(baseline.key, field), getattr(key, field)
        if found != wanted:
            _refuse(path, f"key.{field}", f"is {found!r}, but the file lies where {wanted!r} belongs")
    for field in ("reason", "recorded_at"):
        if not getattr(baseline, field).strip():
            _refuse(path, field, "is empty")


def _check_metric(path: Path, name: str, stored: MetricBaseline, metrics: Mapping[str, Metric]) -> None:
    where = f"metrics.{name}"
    if name not in metrics:
        _refuse(path, where, f"is no metric of the catalogue; known: {', '.join(metrics)}")
    metric = metrics[name]
    if stored.unit != metric.unit:
        _refuse(path, f"{where}.unit", f"is {stored.unit!r}, the catalogue's is {metric.unit!r}")
    filled = [f for f, there in _fillings(stored).items() if there]
    if len(filled) != 1:
        every = ", ".join(_fillings(stored))
        _refuse(path, where, f"must have one of {every}; has {' and '.join(filled) or 'none'}")
    if filled[0] not in _BY_KIND[metric.kind]:
        _refuse(path, f"{where}.{filled[0]}", f"does not belong to a metric that is {metric.kind}")
    direction = "equal" if metric.kind == "exact" else metric.direction
    if stored.direction != direction:
        _refuse(path, f"{where}.direction", f"is {stored.direction!r}, must be {direction!r}")
    for index, run in enumerate(stored.runs):
        if not run.rounds:
            _refuse(path, f"{where}.runs[{index}].rounds", "is empty")
        for number, value in enumerate(run.rounds):
            _positive(path, f"{where}.runs[{index}].rounds[{number}]", value)
        for phase, seconds in run.phases.items():
            _not_negative(path, f"{where}.runs[{index}].phases.{phase}", seconds)
        if run.disk_gb_s is not None:
            _positive(path, f"{where}.runs[{index}].disk_gb_s", run.disk_gb_s)
        for figure, value in (structs.asdict(run.canary) if run.canary else {}).items():
            if value is not None:
                _positive(path, f"{where}.runs[{index}].canary.{figure}", value)
    if stored.published is not None:
        _check_published(path, f"{where}.published", stored.published)
    if stored.exact is not None:
        _check_exact(path, f"{where}.exact", stored.exact)
    if stored.band is not None:
        _check_band(path, f"{where}.band", stored.band)
    check_paired(where, stored, metric, lambda field, why: _refuse(path, field, why))


_BY_KIND = {"sampled": ("runs", "published"), "exact": ("exact",), "paired": ("scores", "published")}
"""What a metric of each kind may be filled with."""


def _fillings(stored: MetricBaseline) -> dict[str, bool]:
    return {
        "runs": bool(stored.runs),
        "published": stored.published is not None,
        "exact": stored.exact is not None,
        "scores": bool(stored.scores),
    }


def _check_published(path: Path, where: str, summary: Published) -> None:
    _positive(path, f"{where}.n", summary.n)
    _positive(path, f"{where}.mean", summary.mean)
    _not_negative(path, f"{where}.std", summary.std)
    for field, value in (("min", summary.min), ("max", summary.max)):
        if value is not None:
            _positive(path, f"{where}.{field}", value)
    if not (summary.min or summary.mean) <= summary.mean <= (summary.max or summary.mean):
        _refuse(path, f"{where}.mean", f"is {summary.mean}, outside of min {summary.min} and max {summary.max}")


def _check_exact(path: Path, where: str, exact: int | dict[str, int]) -> None:
    if not isinstance(exact, dict):
        _positive(path, where, exact)
        return
    if not exact:
        _refuse(path, where, "is empty")
    for name, value in exact.items():
        _positive(path, f"{where}.{name}", value)


def _check_band(path: Path, where: str, band: Band) -> None:
    _positive(path, f"{where}.relative", band.relative)
    if band.relative >= 1:
        _refuse(path, f"{where}.relative", f"is {band.relative}; it is a fraction, 0.03 is 3 %")
    _not_negative(path, f"{where}.absolute", band.absolute)


def _positive(path: Path, where: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        _refuse(path, where, f"is {value}; it must be positive and finite")


def _not_negative(path: Path, where: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        _refuse(path, where, f"is {value}; it must be finite and not negative")


def _convert(path: Path, where: str, raw: object, kind: type[T]) -> T:
    try:
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        # msgspec: "Expected `int`, got `str` - at `$.runs[0]`"; people look for the field first.
        text, _, at = str(error).partition(" - at ")
        field = ".".join(part for part in (where, re.sub(r"[`$]|\[\.\.\.\]", "", at).lstrip(".")) if part)
        _refuse(path, field or "top level", text)


def _refuse(path: Path, field: str, why: str) -> NoReturn:
    raise BaselineError(f"{path}: field {field!r}: {why}", mend=_RECORD_AGAIN)
