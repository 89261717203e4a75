"""What to know of a session beside every verdict: told below the table, and kept in the results."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pytest_zimage.engines.record import RunRecord
from pytest_zimage.probes.environment import UNRECORDED
from pytest_zimage.probes.packages import slow_kitchen
from pytest_zimage.runbook import missing_from
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.model import Verdict
from pytest_zimage.xdist import is_worker, place_of


def session_notes(ours: ZImageSession, environment: Mapping[str, str], runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """What no single verdict would tell, because all of them may pass with it; of `runs` as far as they are known."""
    models = dict.fromkeys(verdict.environment_changed.get("device") for verdict in ours.verdicts)
    others = [
        f"baselines were recorded on {old}, this is {new}: another GPU of the device class"
        for old, new in filter(None, models)
        if old != UNRECORDED
    ]
    # A worker knows but some of the runs; its controller has them all.
    known = () if is_worker(ours.config) else runs
    told = [
        *(slow_kitchen(environment), fault_line(known), emulation_line(known)),
        *cold_lines(ours.verdicts, known),
        *(*others, *_elsewhere(ours), *_crowd(ours), *_terminated(ours), *_missing(ours)),
    ]
    return tuple(filter(None, told))


def fault_line(runs: Sequence[RunRecord]) -> str:
    """`faults: 12 dropped connections, 3 timeouts in bf16`: requests that failed and were made anew; empty for none."""
    counts: dict[str, Counter[str]] = {}
    for run in runs:
        counts.setdefault(run.variant, Counter()).update(run.faults)
    parts = [
        f"{', '.join(f'{number} {_plural(kind, number)}' for kind, number in kinds.items())} in {variant}"
        for variant, kinds in counts.items()
        if kinds.total()
    ]
    return f"faults: {'; '.join(parts)}" if parts else ""


def cold_lines(verdicts: Sequence[Verdict], runs: Sequence[RunRecord]) -> tuple[str, ...]:
    """`cold load of bf16, nvfp4: not a fresh process: ...`: what to know of cold loads that were judged."""
    judged = {verdict.variant for verdict in verdicts if verdict.metric == "cold_load"}
    told: dict[str, dict[str, None]] = {}
    for run in runs:
        if run.variant in judged and not run.cold.unavailable:
            for note in run.cold.notes:
                told.setdefault(note, {})[run.variant] = None
    return tuple(f"cold load of {', '.join(variants)}: {note}" for note, variants in told.items())


def emulation_line(runs: Sequence[RunRecord]) -> str:
    """What the engine says it computes by dequantising, so that a time is no surprise; empty for nothing."""
    said: dict[str, dict[str, None]] = {}
    for run in runs:
        said.setdefault(run.engine, {}).update(dict.fromkeys(run.emulated))
    parts = [f"{', '.join(names)} by {engine}" for engine, names in said.items() if names]
    return f"emulated here, that is dequantised and multiplied plainly: {'; '.join(parts)}" if parts else ""


def _plural(kind: str, number: int) -> str:
    # `status 500` is counted as it is.
    return kind if number == 1 or kind[-1:].isdigit() else f"{kind}s"


def _elsewhere(ours: ZImageSession) -> tuple[str, ...]:
    """Variants that a pattern or a tag asked for and that this lane has no place for."""
    if not ours.settings.config or "machine" not in vars(ours):
        return ()
    lane = ours.machine.device_class.name
    left_out = [v for v in ours.catalog.select(ours.settings.config) if not v.runs_on(lane)]
    return tuple(
        f"{v.name} was asked for and does not run on {lane}: its lanes are {', '.join(v.lanes)}" for v in left_out
    )


def _crowd(ours: ZImageSession) -> tuple[str, ...]:
    place = place_of(ours.config)
    if place is None or "machine" not in vars(ours) or not 0 < ours.machine.visible < place.workers:
        return ()
    gpus = f"{ours.machine.visible} GPU" + ("s" if ours.machine.visible > 1 else "")
    return (f"{place.workers} workers share {gpus} and wait for each other: -n {ours.machine.visible} is as fast",)


def _missing(ours: ZImageSession) -> tuple[str, ...]:
    # A worker cannot tell what is missing from what the others are still making.
    missing = [] if is_worker(ours.config) else missing_from(ours.runs_folder)
    return tuple(f"{what} is missing: it was broken off" for what in missing)


def _terminated(ours: ZImageSession) -> tuple[str, ...]:
    if not ours.ending.terminated:
        return ()
    place = place_of(ours.config)
    if place is not None:
        return (f"xdist's worker {place.name} was ended by SIGTERM",)
    return ("ended by SIGTERM: what was measured before is kept, the rest was not measured",)
