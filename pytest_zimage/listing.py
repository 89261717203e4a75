"""`--zimage-list`: the variants, the files each needs, where they are or were looked for, its lanes and rough time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pytest_zimage.baselines.store import Absent
from pytest_zimage.baselines.update import centre
from pytest_zimage.catalog import Role, Variant
from pytest_zimage.checkpoints.folders import weight_files
from pytest_zimage.errors import BaselineError, MissingFileError, UnsupportedError, ZImageError
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
    for variant in session.catalog.select(session.settings.config or ("*",)):
        tags = "".join(f" @{tag}" for tag in variant.tags)
        yield f"\n{variant.name}  {variant.title} {tags}"
        if not variant.default:
            yield "    runs          only when asked for by name, glob or tag"
        yield f"    lanes         {', '.join(variant.lanes) or 'any'}"
        yield f"    rough time    {_rough_time(session, variant)}"
        yield from _needed(session, variant)


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
    size = sum(file.stat().st_size for file in weight_files(path))
    return f"{file_name}: found, {units.quantity(size, 'bytes')}: {path}"


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
    """Of one run, from what this device recorded or somebody published for it."""
    seconds: dict[str, float] = {}
    source = "recorded here"
    for name in ("cold_load", "warm_latency"):
        try:
            found = session.store.find(session.key(variant), name)
        except BaselineError:
            return "unknown: its baseline cannot be read"
        if isinstance(found, Absent):
            reference = session.store.published_reference(session.key(variant), name)
            if reference is None:
                return "unknown: nothing recorded on this device yet"
            seconds[name], source = reference.published.mean, f"published for {reference.engine}"
        else:
            value = centre(found.metric)
            assert isinstance(value, float)
            seconds[name] = value
    total = seconds["cold_load"] + session.settings.rounds * seconds["warm_latency"]
    return f"{units.quantity(total, 's')} a run and the start of a process ({source})"
