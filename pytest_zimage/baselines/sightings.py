"""Where variants were seen to draw: `baselines/seen.json`, which is shown and judges nothing.

It is for what has no measured baseline, which shows the same of more runs, and so is shown instead where there is one.
Written by `python -m pytest_zimage.baselines.seen`.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from pytest_zimage.baselines.schema import Baseline, Key, MetricBaseline
from pytest_zimage.baselines.update import centre
from pytest_zimage.baselines.writing import locked, to_bytes, write_atomically
from pytest_zimage.errors import BaselineError

FILE = "seen.json"
"""In the folder of the baselines, beside those of the device classes."""
SCHEMA = 1
_MEND = "restore the file from version control, or delete it and record anew: python -m pytest_zimage.baselines.seen"


class Sighting(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A variant drew: on a device class, through an engine, with a model set, a workload."""

    key: Key
    seen_at: str
    """When its run began: ISO 8601, UTC."""
    device_name: str
    warm_latency_s: float | None = None
    """Mean of the run's rounds; None: the machine was not fit to be timed."""
    device_peak_bytes: int | None = None
    """None: it has no memory of its own, or the engine does not say."""
    torch: str = ""
    comfy_kitchen: str = ""


class _Schema(Struct):
    schema: int


class _Seen(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    schema: int
    sightings: tuple[Sighting, ...]


def newest(sightings: Iterable[Sighting]) -> tuple[Sighting, ...]:
    """The newest of each key, sorted by key; one that was timed goes before one that was not."""
    ordered = sorted(sightings, key=lambda found: (found.warm_latency_s is not None, found.seen_at))
    by_key = {structs.astuple(found.key): found for found in ordered}
    return tuple(by_key[key] for key in sorted(by_key))


def read_sightings(path: Path) -> tuple[Sighting, ...]:
    """What the file holds; nothing where there is none. Raises `BaselineError` for one that cannot be trusted."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise BaselineError(f"{path}: cannot be read: {error.strerror}", mend="make the file readable") from error
    try:
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema > SCHEMA:
            raise BaselineError(
                f"{path}: is of schema {schema}, newer than {SCHEMA}, the newest this version of pytest-zimage reads",
                mend="pip install --upgrade pytest-zimage",
            )
        found = msgspec.json.decode(data, type=_Seen).sightings
    # msgspec leaves text that is no UTF-8 to Python.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise BaselineError(f"{path}: is no list of sightings: {error}", mend=_MEND) from error
    for number, sighting in enumerate(found):
        if why := fault(sighting):
            raise BaselineError(f"{path}: sightings[{number}].{why}", mend=_MEND)
    return found


def add_sightings(path: Path, fresh: Iterable[Sighting]) -> tuple[Sighting, ...]:
    """Take `fresh` into the file, while no other session may; returns those of them that it did not hold already.

    Raises `BaselineError`, and leaves the file as it was, where it cannot be trusted or written.
    """
    with locked(path.parent):
        before = read_sightings(path)
        after = newest((*before, *fresh))
        if after != before:
            write_atomically(path, to_bytes(_Seen(schema=SCHEMA, sightings=after)))
    return tuple(sighting for sighting in after if sighting not in before)


def fault(sighting: Sighting) -> str:
    """Which field holds what no run leaves behind, and why; "" for a sound one."""
    for field, text in (*structs.asdict(sighting.key).items(), ("device_name", sighting.device_name)):
        if not text.strip() or not text.isprintable():
            return f"{field} is {text!r}; it must be one line, and not empty"
    for field in ("warm_latency_s", "device_peak_bytes"):
        value = getattr(sighting, field)
        if value is not None and not 0 < value < float("inf"):
            return f"{field} is {value}; it must be positive and finite"
    with suppress(ValueError):
        if datetime.fromisoformat(sighting.seen_at).utcoffset() == timedelta(0):
            return ""
    return f"seen_at is {sighting.seen_at!r}; it must be a time of ISO 8601 in UTC"


def of_baseline(baseline: Baseline) -> Sighting | None:
    """What the runs of a baseline saw, under the date of the last; None where none was timed, as in a published one."""
    latency = baseline.metrics.get("warm_latency")
    if latency is None or not latency.runs:
        return None
    peak = baseline.metrics.get("device_peak")
    environment = baseline.environment_of("warm_latency")
    return Sighting(
        key=baseline.key,
        seen_at=max(run.recorded_at for run in latency.runs),
        device_name=environment.get("device", baseline.key.device),
        warm_latency_s=_centre(latency),
        device_peak_bytes=round(_centre(peak)) if peak and peak.runs else None,
        torch=environment.get("torch", ""),
        comfy_kitchen=environment.get("comfy-kitchen", ""),
    )


def _centre(stored: MetricBaseline) -> float:
    value = centre(stored)
    assert isinstance(value, float)
    return value
