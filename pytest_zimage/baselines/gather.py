"""One baseline from the results files of several sessions, such as those of several machines of a class.

    python -m pytest_zimage.baselines.gather RESULTS.json ... --baselines baselines --reason "three H200"

A device class has one baseline for all its machines, so it is best recorded on more than one: each measures with
`pytest suites`, and their results files come together here. The same is refused as with `--update-baselines`, but run
by run: one that the machine was not fit for is left out and told, and so is a figure that lies far out.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import get_args

from msgspec import structs

from pytest_zimage.baselines.merging import Mode
from pytest_zimage.baselines.recordable import Measured, outlying_runs
from pytest_zimage.baselines.schema import Key
from pytest_zimage.baselines.store import BaselineStore
from pytest_zimage.baselines.update import UpdateResult, update_baselines
from pytest_zimage.catalog import Catalog, load_catalog
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import MeasurementError, ZImageError
from pytest_zimage.probes.environment import machine_fingerprint
from pytest_zimage.reports.results import read
from pytest_zimage.reports.table import update_table
from pytest_zimage.verdict.metrics import measurable


def gathered(runs: Iterable[RunRecord]) -> dict[Key, tuple[RunRecord, ...]]:
    """Runs by what they are of, as they began. Raises `MeasurementError` for one of no known class."""
    found: dict[Key, list[RunRecord]] = {}
    for run in runs:
        found.setdefault(key_of(run), []).append(run)
    return {key: tuple(sorted(of, key=lambda run: run.started_at)) for key, of in found.items()}


def key_of(run: RunRecord) -> Key:
    """What `run` is a run of. Raises `MeasurementError` for one of no known device class."""
    device = run.environment.get("device_class", "")
    if not device:
        raise MeasurementError(
            f"run {run.index + 1} of {run.variant} does not say its device class", mend="measure it again"
        )
    return Key(device=device, engine=run.engine, model_set=run.model_set, workload=run.workload, variant=run.variant)


def unfit(run: RunRecord) -> tuple[str, ...]:
    """Why the machine was not fit for this run, for its load or its rounds."""
    seen = (run.cold.fitness, run.fitness)
    return tuple(dict.fromkeys(reason for fitness in seen if fitness is not None for reason in fitness.reasons))


def fit_runs(
    by_key: dict[Key, tuple[RunRecord, ...]], catalog: Catalog, metrics: tuple[str, ...], told: list[str]
) -> list[Measured]:
    """What may be recorded of `metrics`; each run that may not be joins `told`, with the reason."""
    measured = []
    for key, runs in by_key.items():
        fit = []
        for run in runs:
            if why := unfit(run):
                told.append(f"left out: {named(run)}: {why[0]}")
            else:
                fit.append(run)
        rounds = max((len(run.rounds) for run in fit), default=0)
        measured.append(Measured(key=key, runs=tuple(fit), metrics=metrics, rounds_asked=rounds))
    far = outlying_runs(measured, catalog)
    for index, one in enumerate(measured):
        positions = far.get(one.key.variant, {})
        for position, far_out in positions.items():
            told.append(f"left out: {', '.join(far_out)} of {named(one.runs[position])}: far from the others'")
        measured[index] = structs.replace(one, left_out=positions, remeasured=frozenset(range(len(one.runs))))
    return measured


def named(run: RunRecord) -> str:
    return f"{run.variant} of {run.started_at}"


def gather(
    files: Sequence[Path],
    store: BaselineStore,
    catalog: Catalog,
    *,
    metrics: tuple[str, ...],
    mode: Mode,
    reason: str,
    told: list[str],
) -> list[UpdateResult]:
    """Record `metrics` of the runs of results `files`; raises `ZImageError` for a file that is none."""
    runs = [run for path in files for run in read(path).runs]
    return update_baselines(
        store,
        catalog,
        fit_runs(gathered(runs), catalog, metrics, told),
        mode=mode,
        reason=reason,
        recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="record one baseline from the results of several sessions")
    parser.add_argument("results", type=Path, nargs="+", help="results files of `pytest suites`")
    parser.add_argument("--baselines", type=Path, required=True, help="folder of the stored baselines")
    parser.add_argument("--reason", required=True, help="why the numbers change")
    parser.add_argument("--mode", choices=get_args(Mode), default="replace")
    parser.add_argument(
        "--metric", choices=measurable(), action="append", default=[], help="record this one; default: all of a run"
    )
    parser.add_argument("--catalog", type=Path, action="append", default=[], help="a TOML file of your own")
    options = parser.parse_args(arguments)
    told: list[str] = []
    try:
        catalog = load_catalog(options.catalog)
        local = options.baselines.parent / ".zimage" / "baselines"
        store = BaselineStore(options.baselines, local, catalog=catalog, machine=machine_fingerprint())
        results = gather(
            options.results,
            store,
            catalog,
            metrics=tuple(options.metric) or measurable(),
            mode=options.mode,
            reason=options.reason,
            told=told,
        )
    except ZImageError as error:
        print(error, file=sys.stderr)
        return 1
    print("\n".join([*told, update_table(results)]))
    return int(any(result.action == "refused" for result in results))


if __name__ == "__main__":
    sys.exit(main())
