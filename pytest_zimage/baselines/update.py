"""Letting baselines change: only from fit and complete runs, with a reason, each (variant, metric) on its own.

Nothing is half-written: what is refused stays as it was and says why, and a file is replaced as a whole under its
folder's lock, after merging with what another session may have put there meanwhile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from msgspec import Struct, structs

from pytest_zimage.baselines.equal_speed import at_equal_speed
from pytest_zimage.baselines.layers import PORTABLE, Layer, layer_key
from pytest_zimage.baselines.merging import (
    Action,
    Fresh,
    Merged,
    Mode,
    common_environment,
    merge_metric,
    refuse_other_weights,
)
from pytest_zimage.baselines.rewriting import rewritten
from pytest_zimage.baselines.schema import Baseline, Key, MetricBaseline
from pytest_zimage.baselines.store import BaselineStore
from pytest_zimage.catalog import Catalog
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.metrics import Sample, take
from pytest_zimage.verdict.noise import runs_to_remeasure
from pytest_zimage.verdict.rule import run_score


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


class UpdateResult(Struct, frozen=True, kw_only=True):
    """One line of the table old -> new."""

    variant: str
    metric: str
    unit: str
    action: Action
    old: float | dict[str, int] | None = None
    new: float | dict[str, int] | None = None
    runs_old: int = 0
    runs_new: int = 0
    reason: str = ""
    """Why it was refused or kept."""
    mend: str = ""


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
            samples = _samples(one, name) if name in one.metrics else []
            if isinstance(samples, list) and samples and not any(sample.unavailable for sample in samples):
                # A slower GPU among them is no outlier.
                rounds[one.key.variant] = at_equal_speed(samples) or [sample.rounds for sample in samples]
        again = {one.key.variant: one.remeasured for one in measured}
        for variant, positions in runs_to_remeasure(rounds, metric).items():
            for position in positions:
                if position not in again[variant]:
                    row = found.setdefault(variant, {})
                    row[position] = (*row.get(position, ()), name)
    return found


def update_baselines(
    store: BaselineStore,
    catalog: Catalog,
    measured: Sequence[Measured],
    *,
    mode: Mode,
    reason: str,
    recorded_at: str,
) -> list[UpdateResult]:
    """Store what may be stored; one result for every (variant, metric) of `measured`.

    `recorded_at` is an ISO 8601 time. Raises `BaselineError` without a reason; everything else that goes wrong is a
    `refused` result of what it concerns.
    """
    if not reason.strip():
        raise BaselineError(
            "a baseline changes only with a reason", mend='add --update-reason "why the numbers changed"'
        )
    outlying = outlying_runs(measured, catalog)
    results: list[UpdateResult] = []
    for one in measured:
        stop = _refusal(one)
        if stop is not None:
            results += [_result(one, catalog, name, None, stop) for name in one.metrics]
            continue
        by_layer: dict[Layer, dict[str, Fresh]] = {}
        for name in one.metrics:
            found = _fresh(one, catalog, name, outlying.get(one.key.variant, {}))
            if isinstance(found, Fresh):
                by_layer.setdefault(store.locate(one.key, name)[0], {})[name] = found
            else:
                results.append(_result(one, catalog, name, None, found))
        for layer, fresh in by_layer.items():
            results += _write(store, catalog, one, layer, fresh, mode, reason.strip(), recorded_at)
    return results


def _refusal(one: Measured) -> Merged | None:
    """Why nothing of this variant may be recorded."""
    if not one.runs:
        return _refused("incomplete: no run succeeded", "mend the error, then repeat")
    if any(run.inject for run in one.runs):
        return _refused("a fault was injected into these runs", "repeat without --zimage-inject")
    if lost := max((run.dequantised for run in one.runs), key=len):
        return _refused(
            f"{len(lost)} layers dequantised instead of computing quantised: {next(iter(lost))}, ...",
            "look at test_dispatch.py; the numbers would be another variant's",
        )
    if one.problems:
        return _refused(f"failing: {one.problems[0]}", "mend the error, then repeat")
    if one.unfit:
        return _refused(f"unfit: {'; '.join(one.unfit)}", "repeat when the machine is quiet")
    for run in one.runs:
        theirs = structs.replace(
            one.key, engine=run.engine, model_set=run.model_set, workload=run.workload, variant=run.variant
        )
        if theirs != one.key:
            return _refused(f"run {run.index} is of {theirs.path()}, not {one.key.path()}", "report this as a bug")
        if len(run.rounds) < one.rounds_asked:
            return _refused(
                f"incomplete: run {run.index} has {len(run.rounds)} of {one.rounds_asked} rounds", "repeat the run"
            )
    return None


def _fresh(one: Measured, catalog: Catalog, name: str, outlying: Mapping[int, tuple[str, ...]]) -> Fresh | Merged:
    if why := one.unfit_metrics.get(name):
        return _refused(
            f"unfit: {'; '.join(why)}",
            "repeat when the machine is quiet; if it stays like this, delete its baseline file and record anew",
        )
    samples = _samples(one, name)
    if isinstance(samples, MeasurementError):
        return _refused(samples.message, samples.mend)
    silent = [sample.unavailable for sample in samples if sample.unavailable]
    if len(silent) == len(samples):
        return Merged(action="kept", reason=f"not measured: {silent[0]}")
    if silent:
        return _refused(f"only some runs could say: {silent[0]}", "repeat")
    positions = [position for position, metrics in outlying.items() if name in metrics]
    if positions:
        which = ", ".join(str(one.runs[position].index) for position in positions)
        return _refused(
            f"run {which} lies more than 5 pooled MAD-SDs from the median", "measure that run once more, or repeat"
        )
    return Fresh(
        metric=catalog.metrics[name],
        samples=tuple(samples),
        recorded_at=tuple(run.started_at for run in one.runs),
    )


def _samples(one: Measured, name: str) -> list[Sample] | MeasurementError:
    try:
        return [take(name, run) for run in one.runs]
    except MeasurementError as error:
        return error


def _write(
    store: BaselineStore,
    catalog: Catalog,
    one: Measured,
    layer: Layer,
    fresh: Mapping[str, Fresh],
    mode: Mode,
    reason: str,
    recorded_at: str,
) -> list[UpdateResult]:
    results: list[UpdateResult] = []

    def merge(current: Baseline | None) -> Baseline | None:
        old = current.metrics if current else {}
        environment = common_environment([run.environment for run in one.runs], portable=layer == PORTABLE)
        merged = {
            name: refuse_other_weights(current, name, environment, mode) or merge_metric(old.get(name), found, mode)
            for name, found in fresh.items()
        }
        results.extend(_result(one, catalog, name, old.get(name), answer) for name, answer in merged.items())
        if not any(answer.action in ("recorded", "extended") for answer in merged.values()):
            return None
        metrics = {name: answer.stored for name, answer in merged.items() if answer.stored is not None}
        return rewritten(
            current,
            key=layer_key(one.key, layer),
            reason=reason,
            recorded_at=recorded_at,
            environment=environment,
            metrics=metrics,
        )

    try:
        store.rewrite(one.key, layer, merge, replace_unreadable=mode == "replace")
    except BaselineError as error:
        return [_result(one, catalog, name, None, _refused(error.message, error.mend)) for name in fresh]
    return results


def _refused(reason: str, mend: str) -> Merged:
    return Merged(action="refused", reason=reason, mend=mend)


def _result(one: Measured, catalog: Catalog, name: str, old: MetricBaseline | None, answer: Merged) -> UpdateResult:
    return UpdateResult(
        variant=one.key.variant,
        metric=name,
        unit=catalog.metrics[name].unit,
        action=answer.action,
        old=centre(old) if old else None,
        new=centre(answer.stored) if answer.stored else None,
        runs_old=len(old.runs) if old else 0,
        runs_new=len(answer.stored.runs) if answer.stored else 0,
        reason=answer.reason,
        mend=answer.mend,
    )


def centre(stored: MetricBaseline) -> float | dict[str, int]:
    """The one number (or the counts) that a stored metric is shown as, in its unit."""
    if stored.exact is not None:
        return stored.exact
    if stored.scores:
        return statistics.fmean(stored.scores.values())
    if stored.published is not None:
        return stored.published.mean
    return math.exp(statistics.fmean(run_score(run.rounds) for run in stored.runs))
