"""How the fresh runs of one metric join what is stored: pure, so that it can be done again under the file's lock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import Struct, structs

from pytest_zimage.baselines.schema import Baseline, BaseRun, MetricBaseline
from pytest_zimage.catalog.model import Metric
from pytest_zimage.probes.environment import PORTABLE, other_weights
from pytest_zimage.verdict.metrics import Sample

Mode = Literal["replace", "extend", "new"]
Action = Literal["recorded", "extended", "unchanged", "kept", "refused"]
"""What became of a (variant, metric); `kept`: not touched, `unchanged`: measured again and equal."""
MIN_RUNS = 5
"""Of a sampled baseline, best on different days."""


class Fresh(Struct, frozen=True, kw_only=True):
    """The samples of one metric, one a run, and when each run began."""

    metric: Metric
    samples: tuple[Sample, ...]
    recorded_at: tuple[str, ...]


class Merged(Struct, frozen=True, kw_only=True):
    """What the metric should be stored as; None where it stays as it is."""

    action: Action
    stored: MetricBaseline | None = None
    reason: str = ""
    mend: str = ""


def merge_metric(current: MetricBaseline | None, fresh: Fresh, mode: Mode) -> Merged:
    """`fresh` joined to `current` by `mode`; action `refused` with the reason where that would store an untruth."""
    if mode == "new" and current is not None:
        return Merged(action="kept", reason="has a baseline already; --update-mode new only adds")
    if fresh.metric.kind == "exact":
        return _merge_exact(current, fresh, mode)
    if fresh.metric.kind == "sampled":
        return _merge_sampled(current, fresh, mode)
    return _refused(f"is {fresh.metric.kind}: no run says it", "record image scores by update_quality")


def _merge_exact(current: MetricBaseline | None, fresh: Fresh, mode: Mode) -> Merged:
    value = fresh.samples[0].exact
    if any(sample.exact != value for sample in fresh.samples):
        return _refused(
            "differs between the runs of this session, though it must be equal", "find out why, then repeat"
        )
    if current is not None and current.exact == value:
        return Merged(action="unchanged", stored=structs.replace(current, environment={}))
    if current is not None and mode == "extend":
        return _refused("changed; an exact number cannot be extended", "record it anew: --update-mode replace")
    stored = MetricBaseline(
        unit=fresh.metric.unit, direction="equal", exact=value, band=current.band if current else None
    )
    return Merged(action="recorded", stored=stored)


def _merge_sampled(current: MetricBaseline | None, fresh: Fresh, mode: Mode) -> Merged:
    kinds = {sample.emptied for sample in fresh.samples}
    if len(kinds) > 1:
        return _refused(
            "some runs emptied the page cache and some did not", "repeat where it can be emptied every time"
        )
    cold = kinds == {True}
    warm = kinds == {False}
    stored_kinds = {run.emptied for run in current.runs} if current else set()
    if warm and current is not None and (current.published is not None or True in stored_kinds):
        return _refused(
            "unfit: the page cache was not emptied, while it was for the stored baseline",
            "use a file system where posix_fadvise empties the cache, not tmpfs or overlay",
        )
    earlier: tuple[BaseRun, ...] = ()
    if mode == "extend" and current is not None:
        if current.published is not None:
            return _refused("a published summary has no runs to extend", "record it anew: --update-mode replace")
        if cold and False in stored_kinds:
            return _refused("the stored runs did not empty the page cache", "record it anew: --update-mode replace")
        earlier = current.runs
    runs = earlier + tuple(
        BaseRun(
            rounds=sample.rounds,
            recorded_at=at,
            emptied=sample.emptied,
            phases=sample.phases,
            canary=sample.canary,
            device=sample.device,
            disk_gb_s=sample.disk_gb_s,
        )
        for sample, at in zip(fresh.samples, fresh.recorded_at, strict=True)
    )
    if len(runs) < MIN_RUNS:
        more = MIN_RUNS - len(earlier)
        return _refused(f"incomplete: {len(runs)} of at least {MIN_RUNS} runs", f"measure more: --zimage-runs {more}")
    stored = MetricBaseline(unit=fresh.metric.unit, runs=runs, band=current.band if current else None)
    return Merged(action="extended" if earlier else "recorded", stored=stored)


def refuse_other_weights(current: Baseline | None, name: str, present: Mapping[str, str], mode: Mode) -> Merged | None:
    """The refusal, where runs in the environment `present` would extend stored ones that had other weights."""
    if mode != "extend" or current is None or name not in current.metrics:
        return None
    others = [key.removeprefix("weights.") for key in other_weights(current.environment_of(name), present)]
    if not others:
        return None
    return _refused(f"the stored runs had other weights: {', '.join(others)}", "record it anew: --update-mode replace")


def _refused(reason: str, mend: str) -> Merged:
    return Merged(action="refused", reason=reason, mend=mend)


def environment_override(recorded_in: Mapping[str, str], file: Mapping[str, str]) -> dict[str, str]:
    """What `MetricBaseline.environment` must hold for a metric recorded in one environment, in a file of another."""
    keys = sorted({*recorded_in, *file})
    return {key: recorded_in.get(key, "") for key in keys if recorded_in.get(key, "") != file.get(key, "")}


def common_environment(environments: Sequence[Mapping[str, str]], *, portable: bool) -> dict[str, str]:
    """The last run's environment; of it only what matters to exact numbers when `portable`."""
    last = environments[-1]
    return {key: last[key] for key in PORTABLE if key in last} if portable else dict(last)
