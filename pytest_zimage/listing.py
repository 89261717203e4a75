"""`--zimage-list`: the variants, the files each needs, where these are or were looked for, and where each was seen."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pytest
from msgspec import structs

from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.sightings import FILE, Sighting, of_baseline, read_sightings
from pytest_zimage.catalog import Role, Variant
from pytest_zimage.checkpoints.folders import bytes_on_disk
from pytest_zimage.errors import BaselineError, MissingFileError, UnsupportedError, ZImageError
from pytest_zimage.foreseen import run_duration
from pytest_zimage.reports import units
from pytest_zimage.session import ZImageSession, start


def list_variants(config: pytest.Config) -> int:
    """Print the list; returns pytest's exit status."""
    session = start(config)
    try:
        lines = list(_lines(session))
    except ZImageError as error:
        raise pytest.UsageError(str(error)) from error
    print("\n".join(lines))
    return int(pytest.ExitCode.OK)


def _lines(session: ZImageSession) -> Iterator[str]:
    machine, model_set, engine = session.machine, session.model_set, session.engine
    yield f"device    {machine.device_class.name}: {machine.name}" + "".join(f"\n          {n}" for n in machine.notes)
    yield f"engine    {session.settings.engine}: {engine.way}"
    if session.other_engine is not None:
        yield f"parity    {session.settings.parity}: {session.other_engine.way}"
    yield f"models    {model_set.name}" + (f" in {model_set.root}" if model_set.root else ", kept by the engine itself")
    yield f"workload  {session.workload.name}: {session.workload.title}"
    ledger = _ledger(session)
    if ledger.broken:
        yield f"seen      {ledger.broken}"
    for variant in session.catalog.select(session.settings.config or ("*",)):
        tags = "".join(f" @{tag}" for tag in variant.tags)
        yield f"\n{variant.name}  {variant.title} {tags}"
        if not variant.default:
            yield "    runs          only when asked for by name, glob or tag"
        yield f"    lanes         {', '.join(variant.lanes) or 'any'}"
        yield f"    rough time    {_rough_time(session, variant)}"
        yield from _seen(session, variant, ledger)
        yield from _needed(session, variant)


@dataclass(frozen=True)
class _Ledger:
    """What `seen.json` holds."""

    sightings: tuple[Sighting, ...]
    nowhere: str
    """What its silence about a variant means."""
    broken: str = ""


def _ledger(session: ZImageSession) -> _Ledger:
    path = session.settings.baselines / FILE
    try:
        return _Ledger(read_sightings(path), "nowhere yet" if path.is_file() else f"not known: there is no {path}")
    except BaselineError as error:
        return _Ledger((), f"not known: {FILE} is unusable", broken=f"UNUSABLE: {error.message}; {error.mend}")


def _seen(session: ZImageSession, variant: Variant, ledger: _Ledger) -> Iterator[str]:
    """Where it drew, by whatever engine, and where somebody printed that it did."""
    stored = list(session.store.recorded(variant.name))
    told = [sighting for sighting in ledger.sightings if sighting.key.variant == variant.name]
    # The last of a key stays: what its baseline knows, of more runs.
    drew = {sighting.key: sighting for sighting in (*told, *filter(None, map(of_baseline, stored)))}
    rows = [_sighting(session, drew[key]) for key in sorted(drew, key=structs.astuple)]
    yield from _rows("seen", rows or [ledger.nowhere])
    printed = [(one.key, one.metrics["warm_latency"].published) for one in stored if "warm_latency" in one.metrics]
    yield from _rows(
        "published",
        [f"{_place(session, key)}, {units.seconds(summary.mean)}" for key, summary in printed if summary is not None],
    )


def _sighting(session: ZImageSession, sighting: Sighting) -> str:
    latency = sighting.warm_latency_s
    said = [_place(session, sighting.key)]
    said.append("on a machine not fit to be timed" if latency is None else units.seconds(latency))
    if sighting.device_peak_bytes is not None:
        said.append(f"{units.size(sighting.device_peak_bytes)} of the device")
    return f"{', '.join(said)} ({sighting.seen_at[:10]})"


def _place(session: ZImageSession, key: Key) -> str:
    through = f" through {key.engine}" if key.engine != session.engine.name else ""
    return f"{key.device}: {key.model_set} at {key.workload}{through}"


def _rows(title: str, lines: Sequence[str]) -> Iterator[str]:
    for line in lines:
        yield f"    {title:13} {line}"
        title = ""


def _needed(session: ZImageSession, variant: Variant) -> Iterator[str]:
    """What the engine reads of the variant, or why it cannot draw it."""
    engine = session.engine
    try:
        engine.refuse(variant, session.workload)
        weights = "" if engine.needs_files else engine.reads(variant, session.model_set.name)
    except ZImageError as error:
        yield f"    engine        {_wrong(error)}"
        return
    if weights:
        yield f"    weights       {weights}"
        return
    for role, file_name in variant.files().items():
        yield f"    {role:13} {_found(session, role, file_name)}"
    if engine.needs_tokenizer:
        yield f"    tokenizer     {_found_tokenizer(session)}"


def _found(session: ZImageSession, role: Role, file_name: str) -> str:
    try:
        path = session.model_set.find(role, file_name)
    except ZImageError as error:
        if session.model_set.managed:
            return f"{file_name}: written when a run first needs it"
        return f"{file_name}: {_wrong(error)}"
    return f"{file_name}: found, {units.quantity(bytes_on_disk(path), 'bytes')}: {path}"


def _found_tokenizer(session: ZImageSession) -> str:
    try:
        return f"found: {session.model_set.find_tokenizer()}"
    except ZImageError as error:
        return "written when a run first needs it" if session.model_set.managed else _wrong(error)


def _wrong(error: ZImageError) -> str:
    words = {MissingFileError: "MISSING", UnsupportedError: "UNABLE"}
    word = words.get(type(error), "UNUSABLE")
    return f"{word}: {error.message}\n{'':18}{error.mend}"


def _rough_time(session: ZImageSession, variant: Variant) -> str:
    duration = run_duration(session, variant)
    if math.isinf(duration.seconds):
        return f"unknown: {duration.source}"
    return f"{units.quantity(duration.seconds, 's')} a run and the start of a process ({duration.source})"
