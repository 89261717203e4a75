"""The end of a session: errors noted, xdist's parts merged, the results file written, the summary printed."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import ZImageError
from pytest_zimage.groups import without_group
from pytest_zimage.notes import session_notes
from pytest_zimage.outcomes import plain_nodeid
from pytest_zimage.reports import results as results_file
from pytest_zimage.reports.paths import shown_from
from pytest_zimage.reports.results import ErrorRow, Results
from pytest_zimage.reports.table import update_table, verdict_table
from pytest_zimage.runbook import runs_in
from pytest_zimage.session import ZImageSession, start
from pytest_zimage.stash import COLLECTED, SESSION
from pytest_zimage.xdist import is_worker, place_of

if TYPE_CHECKING:
    from pytest_zimage.verdict.model import Verdict

_KEPT = 40
"""Folders of sessions, and of images by build."""


def note_error(item: pytest.Item, error: BaseException, report: pytest.TestReport) -> None:
    """Keep an error that a test ended with; one of ours is shown by its message, without a traceback, and in full once.

    A file that cannot be read fails every test of its variant.
    """
    if not isinstance(error, Exception) or (report.skipped and not isinstance(error, ZImageError)):
        return  # verdicts are pytest's own outcomes, already told; Ctrl-C is no test's error
    variant = item.callspec.params.get("zimage_variant", "") if hasattr(item, "callspec") else ""
    row = ErrorRow(
        test=plain_nodeid(item),
        variant=str(variant),
        kind=type(error).__name__,
        message=getattr(error, "message", str(error)),
        mend=getattr(error, "mend", ""),
    )
    errors = start(item.config).errors
    if isinstance(error, ZImageError):
        first = next((known for known in errors if _what(known) == _what(row)), None)
        report.longrepr = str(error) if first is None else f"the same error as {first.test.rpartition('::')[2]}"
    errors.append(row)


def _what(row: ErrorRow) -> tuple[str, str, str]:
    return row.kind, row.message, row.mend


def finish(session: pytest.Session, ours: ZImageSession) -> None:
    """Hand the findings to xdist's controller, or write the results file."""
    ours.close()
    ours.progress.clear()
    part = _part(ours)
    if is_worker(session.config):
        session.config.workeroutput["zimage"] = results_file.to_json(part).decode()  # type: ignore[attr-defined]
        return
    if not (part.verdicts or part.errors or part.runs or ours.notes or ours.ending.terminated):
        return
    _write_results(ours, part)
    ours.notes = part.notes
    if ours.closing_error is not None and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    _prune(ours.folder.parent)
    _prune(ours.settings.work / "images")


def _write_results(ours: ZImageSession, part: Results) -> None:
    """Where it was asked for, or else where it is by default: hours of measuring must not be lost to a typing error."""
    default = ours.settings.work / "results" / f"{ours.folder.name}.json"
    for path in dict.fromkeys([ours.settings.results or default, default]):
        try:
            results_file.write(path, part)
        except ZImageError as error:
            ours.closing_error = ours.closing_error or error
        else:
            ours.results_path = path
            return


def save_part(config: pytest.Config) -> None:
    """Keep what this worker of xdist has found so far, for the controller to take over if the worker vanishes."""
    place, ours = place_of(config), config.stash.get(SESSION, None)
    if place is not None and ours is not None and (ours.verdicts or ours.errors or ours.updates):
        results_file.write(_part_file(ours, place.name), _part(ours))


def merge(ours: ZImageSession, found: str) -> None:
    """Take over what one of xdist's workers found, in the order that one process would have found it in."""
    part = results_file.from_json(found.encode())
    collected = ours.config.stash.get(COLLECTED, ())
    places = {without_group(nodeid): place for place, nodeid in enumerate(collected)}
    variants = {test.rpartition("[")[2].removesuffix("]"): place for test, place in reversed(places.items())}

    def place(row: Verdict | ErrorRow) -> int:
        return places.get(row.test, len(places))

    ours.verdicts = sorted((*ours.verdicts, *part.verdicts), key=place)
    ours.errors = sorted((*ours.errors, *part.errors), key=place)
    ours.updates = sorted((*ours.updates, *part.updates), key=lambda row: variants.get(row.variant, len(places)))
    ours.received.extend(run for run in part.runs if run not in ours.received)
    ours.notes = (*ours.notes, *part.notes)


def merge_vanished(ours: ZImageSession, worker: str, host: str, why: str) -> None:
    """Take over what a worker had found before it vanished, and say that it did."""
    _merge_saved(ours, worker)
    where = f" on {host}: what it had measured there is lost" if host else ""
    ours.notes = (*ours.notes, f"xdist's worker {worker} vanished ({why}){where}")


def merge_unheard(ours: ZImageSession, worker: str, place: str) -> None:
    """Take over what a worker had found when the controller was interrupted; `place`: where, if not in this folder."""
    _merge_saved(ours, worker)
    if place:
        ours.notes = (*ours.notes, f"xdist's worker {worker} was interrupted: what it had measured {place} is lost")


def _merge_saved(ours: ZImageSession, worker: str) -> None:
    saved = _part_file(ours, worker)
    if saved.is_file():
        merge(ours, saved.read_text(encoding="utf-8"))


def _part_file(ours: ZImageSession, worker: str) -> Path:
    return ours.folder / "parts" / f"{worker}.json"


def summarise(reporter: pytest.TerminalReporter, ours: ZImageSession) -> None:
    """The table of all verdicts, and where the results are."""
    width = reporter._tw.fullwidth
    started_in = ours.config.invocation_params.dir
    if ours.updates:
        reporter.section("zimage baselines")
        reporter.write_line(update_table(ours.updates, width=width))
        for folder in _written(ours):
            reporter.write_line(f"written to {shown_from(started_in, folder)}")
    elif ours.verdicts:
        reporter.section("zimage verdicts")
        reporter.write_line(verdict_table(ours.verdicts, width=width, options=ours.repeated_options))
    for note in ours.notes:
        reporter.write_line(f"NOTE: {note}", yellow=True)
    if ours.closing_error is not None:
        reporter.write_line(f"ERROR: {ours.closing_error}", red=True)
    if ours.results_path is not None:
        reporter.write_line(f"results: {shown_from(started_in, ours.results_path)}")


def _written(ours: ZImageSession) -> list[Path]:
    """The folders in which baselines changed."""
    changed = [row for row in ours.updates if row.action in ("recorded", "extended")]
    paths = [ours.store.locate(ours.key(ours.catalog.variant(row.variant)), row.metric)[1] for row in changed]
    return sorted({path.parent for path in paths})


def _part(ours: ZImageSession) -> Results:
    place = place_of(ours.config)
    made = _runs(ours) if place is None or place.apart else ()
    # The packages here may not be those that drew; a run says which were.
    environment = made[0].environment if made else ours.environment
    return Results(
        started_at=ours.started_at.isoformat(timespec="seconds"),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        environment=environment,
        settings={name: _plain(value) for name, value in vars(ours.settings).items()},
        verdicts=tuple(ours.verdicts),
        errors=tuple(ours.errors),
        runs=made,
        updates=tuple(ours.updates),
        notes=tuple(dict.fromkeys((*ours.notes, *session_notes(ours, environment, made)))),
    )


def _runs(ours: ZImageSession) -> tuple[RunRecord, ...]:
    """Every run of the session: in its folder, and from workers whose folder cannot be read from here."""
    here = runs_in(ours.runs_folder)
    return (*here, *(run for run in ours.received if run not in here))


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [str(item) if not isinstance(item, tuple) else "=".join(map(str, item)) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _prune(folder: Path) -> None:
    """Keep what the last sessions left only; what a running session uses is the newest."""
    kept = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns) if folder.is_dir() else []
    for old in kept[:-_KEPT]:
        shutil.rmtree(old, ignore_errors=True)
