"""Letting baselines change: with a reason, only from what is recordable, each (variant, metric) on its own.

Nothing is half-written: what is refused stays as it was and says why, and a file is replaced as a whole under its
folder's lock, after merging with what another session may have put there meanwhile.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from msgspec import Struct

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
from pytest_zimage.baselines.recordable import Measured, fresh_of, outlying_runs, refusal, refused
from pytest_zimage.baselines.rewriting import rewritten
from pytest_zimage.baselines.schema import Baseline, Key, MetricBaseline
from pytest_zimage.baselines.store import BaselineStore
from pytest_zimage.catalog import Catalog
from pytest_zimage.errors import BaselineError
from pytest_zimage.verdict.rule import run_score


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
        stop = refusal(one)
        if stop is not None:
            results += [result_of(one.key, catalog, name, None, stop) for name in one.metrics]
            continue
        by_layer: dict[Layer, dict[str, Fresh]] = {}
        for name in one.metrics:
            found = fresh_of(one, catalog, name, outlying.get(one.key.variant, {}))
            if isinstance(found, Fresh):
                by_layer.setdefault(store.locate(one.key, name)[0], {})[name] = found
            else:
                results.append(result_of(one.key, catalog, name, None, found))
        for layer, fresh in by_layer.items():
            results += _write(store, catalog, one, layer, fresh, mode, reason.strip(), recorded_at)
    return results


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
        results.extend(result_of(one.key, catalog, name, old.get(name), answer) for name, answer in merged.items())
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
        return [result_of(one.key, catalog, name, None, refused(error.message, error.mend)) for name in fresh]
    return results


def result_of(key: Key, catalog: Catalog, name: str, old: MetricBaseline | None, answer: Merged) -> UpdateResult:
    """What became of the metric `name`, which was stored as `old`."""
    return UpdateResult(
        variant=key.variant,
        metric=name,
        unit=catalog.metrics[name].unit,
        action=answer.action,
        old=centre(old) if old else None,
        new=centre(answer.stored) if answer.stored else None,
        runs_old=_count(old) if old else 0,
        runs_new=_count(answer.stored) if answer.stored else 0,
        reason=answer.reason,
        mend=answer.mend,
    )


def _count(stored: MetricBaseline) -> int:
    """Runs, or images."""
    return len(stored.runs or stored.scores)


def centre(stored: MetricBaseline) -> float | dict[str, int]:
    """The one number (or the counts) that a stored metric is shown as, in its unit."""
    if stored.exact is not None:
        return stored.exact
    if stored.scores:
        return statistics.fmean(stored.scores.values())
    if stored.published is not None:
        return stored.published.mean
    return math.exp(statistics.fmean(run_score(run.rounds) for run in stored.runs))
