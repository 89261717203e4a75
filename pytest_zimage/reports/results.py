"""The results file: one JSON document a session, for machines to read.

`python -m pytest_zimage.reports.results --schema` prints its JSON Schema, which `docs/results.schema.json` keeps.
"""

from __future__ import annotations

import math
import os
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from pytest_zimage.baselines.update import UpdateResult
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import ZImageError
from pytest_zimage.verdict.model import Verdict

SCHEMA = 1
Setting = str | int | float | bool | list[str] | None


class ErrorRow(Struct, frozen=True, kw_only=True):
    """A test that came to no verdict."""

    test: str
    variant: str
    kind: str
    """Class name of the error."""
    message: str
    mend: str = ""


class Results(Struct, frozen=True, kw_only=True):
    """Everything one session concluded, and from what."""

    schema: int = SCHEMA
    started_at: str
    """ISO 8601 with its offset."""
    finished_at: str
    environment: dict[str, str]
    """What the tests ran on and with."""
    settings: dict[str, Setting] = {}
    """The options in force."""
    verdicts: tuple[Verdict, ...] = ()
    errors: tuple[ErrorRow, ...] = ()
    runs: tuple[RunRecord, ...] = ()
    """Every run, as it was observed."""
    updates: tuple[UpdateResult, ...] = ()
    notes: tuple[str, ...] = ()
    """What to know of this machine beside every verdict."""


class _Schema(Struct):
    schema: int = SCHEMA


def to_json(results: Results) -> bytes:
    """The document, indented, free of NaN and infinity."""
    clean = structs.replace(results, verdicts=tuple(map(finite, results.verdicts)))
    return msgspec.json.format(msgspec.json.encode(clean), indent=1) + b"\n"


def finite(verdict: Verdict) -> Verdict:
    """`verdict` without NaN and infinity, which JSON cannot write: None, and a note that tells what was there."""
    fixed: dict[str, object] = {}
    for name in ("value", "baseline", "change", "band", "noise", "mde"):
        number = getattr(verdict, name)
        if isinstance(number, float) and not math.isfinite(number):
            fixed[name] = None
    if verdict.interval is not None and not all(map(math.isfinite, verdict.interval)):
        fixed["interval"] = None
    if not all(math.isfinite(number) for rounds in verdict.samples for number in rounds):
        fixed["samples"] = tuple(tuple(filter(math.isfinite, rounds)) for rounds in verdict.samples)
    if bad := [name for name, pair in verdict.phases.items() if not all(math.isfinite(x or 0.0) for x in pair)]:
        fixed["phases"] = {name: pair for name, pair in verdict.phases.items() if name not in bad}
    if not fixed:
        return verdict
    notes = tuple(f"{name} was not a finite number: {getattr(verdict, name)}" for name in fixed)
    return msgspec.convert(structs.asdict(verdict) | fixed | {"notes": verdict.notes + notes}, Verdict)


def from_json(data: bytes) -> Results:
    """Raises `ZImageError` on anything that is not a results file of this schema."""
    try:
        # Before its fields, which another schema may have otherwise.
        schema = msgspec.json.decode(data, type=_Schema).schema
        if schema != SCHEMA:
            raise ZImageError(f"results of schema {schema}, this is {SCHEMA}", mend="update pytest-zimage")
        return msgspec.json.decode(data, type=Results)
    # msgspec leaves text that is no UTF-8 to Python.
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ZImageError(f"not a results file: {error}", mend="give a file that --zimage-results wrote") from error


def read(path: Path) -> Results:
    """The results file at `path`; raises `ZImageError` that names it where it is none or cannot be read."""
    try:
        return from_json(path.read_bytes())
    except OSError as error:
        raise ZImageError(f"{path}: cannot be read: {error.strerror}", mend="name a results file") from error
    except ZImageError as error:
        raise ZImageError(f"{path}: {error.message}", mend=error.mend) from error


def merge(parts: Iterable[Results]) -> Results:
    """The parts of one session (xdist's workers) as one; raises `ValueError` without any."""
    every = list(parts)
    if not every:
        raise ValueError("no results to merge")
    return structs.replace(
        every[0],
        started_at=min(part.started_at for part in every),
        finished_at=max(part.finished_at for part in every),
        verdicts=tuple(row for part in every for row in part.verdicts),
        errors=tuple(row for part in every for row in part.errors),
        runs=tuple(row for part in every for row in part.runs),
        updates=tuple(row for part in every for row in part.updates),
        notes=tuple(dict.fromkeys(note for part in every for note in part.notes)),
    )


def write(path: Path, results: Results) -> None:
    """Writes whole or not at all; raises `ZImageError` that names the file where it cannot."""
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            # NamedTemporaryFile is private to its owner; a results file is not.
            os.chmod(temporary, 0o644)
            file.write(to_json(results))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            with suppress(OSError):
                os.unlink(temporary)
        raise ZImageError(
            f"{path}: results cannot be written: {error.strerror}", mend="give a writable file to --zimage-results"
        ) from error


def main(arguments: list[str]) -> int:
    """`--schema` prints the JSON Schema."""
    if arguments != ["--schema"]:
        print("usage: python -m pytest_zimage.reports.results --schema", file=sys.stderr)
        return 2
    # Run as __main__ this module exists twice; the schema is that of the imported one.
    from pytest_zimage.reports.schema import schema_text

    print(schema_text(), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
