"""How much of a session's wall time was spent loading and drawing: the rest is the harness.

    pytest suites --zimage-models=synthetic-full
    python benchmarks/pure_share.py                     # the newest results file; or name one

Pure time is what the workers report of each run: the load, the first image, the timed rounds, and one round for each
image that is drawn untimed (the traced one and those for quality), without saving, importing, starting or judging.
Exit status 1 below 0.85.
"""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import msgspec

from pytest_zimage.engines.record import RunRecord
from pytest_zimage.reports.results import Results

WANTED = 0.85


class Pure(NamedTuple):
    """Seconds of one run that were loading and drawing."""

    load: float
    first: float
    rounds: float
    untimed: float

    @property
    def total(self) -> float:
        return sum(self)


def pure_s(run: RunRecord) -> Pure:
    rounds = [each.seconds for each in run.rounds]
    return Pure(
        load=run.loaded.load_s,
        first=run.cold.phases_s["first_image"],
        rounds=sum(rounds),
        untimed=fmean(rounds) * (len(run.images) + (run.dispatch is not None)),
    )


def wall_s(results: Results) -> float:
    return (datetime.fromisoformat(results.finished_at) - datetime.fromisoformat(results.started_at)).total_seconds()


def main(arguments: list[str]) -> int:
    found = [Path(name) for name in arguments] or sorted(Path(".zimage/results").glob("*.json"))[-1:]
    if not found:
        print("no results file; run the suite first", file=sys.stderr)
        return 2
    results = msgspec.json.decode(found[0].read_bytes(), type=Results)
    if not results.runs:
        print(f"{found[0]} holds no run", file=sys.stderr)
        return 2
    wall, pure = wall_s(results), 0.0
    print(f"{'run':18s}{'wall':>8s}{'load':>8s}{'first':>8s}{'rounds':>8s}{'untimed':>9s}{'pure':>8s}   stages")
    for run in results.runs:
        each = pure_s(run)
        pure += each.total
        print(
            f"{run.variant + f' {run.index + 1}':18s}{run.wall_s:8.1f}{each.load:8.1f}{each.first:8.1f}"
            f"{each.rounds:8.1f}{each.untimed:9.1f}{each.total:8.1f}   "
            + ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in run.stages_s.items())
        )
    share = pure / wall
    print(f"{len(results.runs)} runs: {share:.1%} of {wall:.1f} s was loading and drawing (at least {WANTED:.0%})")
    return 0 if share >= WANTED else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
