"""Records where variants were seen to draw, from the results files of sessions on any machine.

    python -m pytest_zimage.baselines.seen RESULTS.json ... --baselines baselines

One run is enough, and it is compared with nothing. What did not draw the variant as it is, is left out and told: a
run with an injected fault, one whose layers dequantised where they compute quantised, and those of a variant that its
own session found not quantised, or its images broken. A run on an unfit machine counts, without its latency.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from pytest_zimage.baselines.gather import key_of, named, unfit
from pytest_zimage.baselines.sightings import FILE, Sighting, add_sightings, fault
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import MeasurementError, ZImageError
from pytest_zimage.reports.results import Results, read
from pytest_zimage.verdict.metrics import take
from pytest_zimage.verdict.rows import QUANTISED, SOUND


def sightings_of(results: Results, told: list[str]) -> list[Sighting]:
    """What the runs of `results` saw; each run that shows nothing joins `told`, with the reason."""
    found = []
    for run in results.runs:
        why = _drew_otherwise(run) or _found_otherwise(run, results)
        try:
            sighting = _sighting(run)
        except MeasurementError as error:
            why = why or error.message
        if why:
            told.append(f"left out: {named(run)}: {why}")
        else:
            found.append(sighting)
    return found


def _drew_otherwise(run: RunRecord) -> str:
    if run.inject:
        return "a fault was injected"
    served = [operation for operation in run.dispatch or {} if operation.endswith(": dequantised")]
    lost = [*run.dequantised, *served]
    return f"dequantised instead of computing quantised: {', '.join(lost[:3])}" if lost else ""


def _found_otherwise(run: RunRecord, results: Results) -> str:
    """What a check of the session says of the variant, where its runs do not show it themselves."""
    for row in results.verdicts:
        if row.variant == run.variant and row.metric in (QUANTISED, SOUND) and row.outcome == "error":
            return f"{row.metric}: {row.verdict}"
    return ""


def _sighting(run: RunRecord) -> Sighting:
    """Raises `MeasurementError` for a record that holds what cannot be."""
    rounds = take("warm_latency", run).rounds
    peak = take("device_peak", run).rounds
    key, environment = key_of(run), run.environment
    sighting = Sighting(
        key=key,
        seen_at=run.started_at,
        # A CPU is of the class `cpu` whichever it is.
        device_name=environment.get("cpu" if key.device == "cpu" else "device", run.device),
        warm_latency_s=None if unfit(run) else statistics.fmean(rounds),
        device_peak_bytes=int(peak[0]) if peak else None,
        torch=environment.get("torch", ""),
        comfy_kitchen=environment.get("comfy-kitchen", ""),
    )
    if why := fault(sighting):
        raise MeasurementError(f"its {why}", mend="measure it again")
    return sighting


def see(files: Sequence[Path], baselines: Path, told: list[str]) -> tuple[Sighting, ...]:
    """Record what the results `files` show; returns what was new. Raises `ZImageError` where there is nothing."""
    every = [read(path) for path in files]
    found = [sighting for results in every for sighting in sightings_of(results, told)]
    if not found:
        which = "no run that shows a variant as it is" if told else "no run"
        raise ZImageError(
            "\n".join([*told, f"{', '.join(map(str, files))}: {which}"]),
            mend="name the results of a session that drew: pytest suites/test_warm_latency.py --zimage-results FILE",
        )
    return add_sightings(baselines / FILE, found)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="record where variants were seen to draw, for --zimage-list")
    parser.add_argument("results", type=Path, nargs="+", help="results files of `pytest suites`")
    parser.add_argument("--baselines", type=Path, required=True, help=f"folder of the stored baselines: has {FILE}")
    options = parser.parse_args(arguments)
    told: list[str] = []
    try:
        new = see(options.results, options.baselines, told)
    except ZImageError as error:
        print(error, file=sys.stderr)
        return 1
    lines = [f"{found.key.variant} on {found.key.device}: seen on {found.seen_at}" for found in new]
    print("\n".join([*told, *lines, f"{len(new)} sightings recorded in {options.baselines / FILE}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
