"""What may become a baseline: whole runs of a fit machine, without a fault, none of them far from the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct, structs

from pytest_zimage.baselines.equal_speed import at_equal_speed, pace_of
from pytest_zimage.baselines.merging import Fresh, Merged
from pytest_zimage.baselines.schema import Key
from pytest_zimage.catalog import Catalog
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import MeasurementError
from pytest_zimage.verdict.metrics import Sample, take
from pytest_zimage.verdict.noise import runs_to_remeasure


class Measured(Struct, frozen=True, kw_only=True):
    """What this session has of one variant."""

    key: Key
    runs: tuple[RunRecord, ...]
    metrics: tuple[str, ...]
    """Those to record; the others stay as they are."""
    rounds_asked: int
    problems: tuple[str, ...] = ()
    """Errors of this variant's tests. A regression is none: that is what an update may be for."""
    unfit: tuple[str, ...] = ()
    """Why the machine was not fit to judge, if it was not."""
    unfit_metrics: Mapping[str, tuple[str, ...]] = {}
    """Metrics that the machine was not fit to be timed for, and why; the others are recorded."""
    remeasured: frozenset[int] = frozenset()
    """Positions in `runs` that are a second measurement already; the record-time gate lets them be."""
    left_out: Mapping[int, tuple[str, ...]] = {}
    """Position in `runs` -> metrics for which that run does not count."""


def outlying_runs(measured: Sequence[Measured], catalog: Catalog) -> dict[str, dict[int, tuple[str, ...]]]:
    """The record-time gate: variant -> position of a run to measure once more -> the metrics that stand out in it.

    A run measured again takes the place of the first one in `runs`, and its position joins `remeasured`.
    """
    found: dict[str, dict[int, tuple[str, ...]]] = {}
    for name, metric in catalog.metrics.items():
        if metric.kind != "sampled":
            continue
        rounds = {}
        for one in measured:
            samples = _samples(one.runs, name) if name in one.metrics else []
            if isinstance(samples, list) and samples and not any(sample.unavailable for sample in samples):
                # A slower GPU or disk among them is no outlier.
                level = at_equal_speed(samples, pace_of(samples[0].emptied))
                rounds[one.key.variant] = level or [sample.rounds for sample in samples]
        again = {one.key.variant: one.remeasured for one in measured}
        for variant, positions in runs_to_remeasure(rounds, metric).items():
            for position in positions:
                if position not in again[variant]:
                    row = found.setdefault(variant, {})
                    row[position] = (*row.get(position, ()), name)
    return found


def refusal(one: Measured) -> Merged | None:
    """Why nothing of this variant may be recorded."""
    if not one.runs:
        return refused("incomplete: no run succeeded", "mend the error, then repeat")
    if any(run.inject for run in one.runs):
        return refused("a fault was injected into these runs", "repeat without --zimage-inject")
    if lost := max((run.dequantised for run in one.runs), key=len):
        return refused(
            f"{len(lost)} layers dequantised instead of computing quantised: {next(iter(lost))}, ...",
            "look at test_dispatch.py; the numbers would be another variant's",
        )
    if one.problems:
        return refused(f"failing: {one.problems[0]}", "mend the error, then repeat")
    if one.unfit:
        return refused(f"unfit: {'; '.join(one.unfit)}", "repeat when the machine is quiet")
    for run in one.runs:
        theirs = structs.replace(
            one.key, engine=run.engine, model_set=run.model_set, workload=run.workload, variant=run.variant
        )
        if theirs != one.key:
            return refused(f"run {run.index} is of {theirs.path()}, not {one.key.path()}", "report this as a bug")
        if len(run.rounds) < one.rounds_asked:
            return refused(
                f"incomplete: run {run.index} has {len(run.rounds)} of {one.rounds_asked} rounds", "repeat the run"
            )
    return None


def fresh_of(one: Measured, catalog: Catalog, name: str, outlying: Mapping[int, tuple[str, ...]]) -> Fresh | Merged:
    """What may be recorded of the metric `name`, or why it may not; `outlying` are the runs to measure once more."""
    if why := one.unfit_metrics.get(name):
        return refused(
            f"unfit: {'; '.join(why)}",
            "repeat when the machine is quiet; if it stays like this, delete its baseline file and record anew",
        )
    counted = tuple(run for position, run in enumerate(one.runs) if name not in one.left_out.get(position, ()))
    samples = _samples(counted, name)
    if isinstance(samples, MeasurementError):
        return refused(samples.message, samples.mend)
    silent = [sample.unavailable for sample in samples if sample.unavailable]
    if silent and len(silent) == len(samples):
        return Merged(action="kept", reason=f"not measured: {silent[0]}")
    if silent:
        return refused(f"only some runs could say: {silent[0]}", "repeat")
    positions = [position for position, metrics in outlying.items() if name in metrics]
    if positions:
        which = ", ".join(str(one.runs[position].index) for position in positions)
        return refused(
            f"run {which} lies more than 5 pooled MAD-SDs from the median", "measure that run once more, or repeat"
        )
    return Fresh(
        metric=catalog.metrics[name],
        samples=tuple(samples),
        recorded_at=tuple(run.started_at for run in counted),
    )


def _samples(runs: Sequence[RunRecord], name: str) -> list[Sample] | MeasurementError:
    try:
        return [take(name, run) for run in runs]
    except MeasurementError as error:
        return error


def refused(reason: str, mend: str) -> Merged:
    return Merged(action="refused", reason=reason, mend=mend)
