"""One metric of one variant against its stored baseline: picks what may be compared, then asks the rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from msgspec import structs

from pytest_zimage.baselines.equal_speed import (
    READING,
    Timed,
    at_equal_speed,
    of_one_machine,
    pace_of,
    relative_speed,
)
from pytest_zimage.baselines.schema import BaseRun, MetricBaseline, Published
from pytest_zimage.baselines.store import Found, Neighbours
from pytest_zimage.catalog.device_class import DeviceClass
from pytest_zimage.catalog.model import Metric
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.probes.environment import other_weights
from pytest_zimage.probes.fitness import CanaryFigures
from pytest_zimage.verdict.constants import RuleConstants
from pytest_zimage.verdict.exact import judge_exact
from pytest_zimage.verdict.metrics import Sample
from pytest_zimage.verdict.model import Judgement
from pytest_zimage.verdict.noise import pooled_noise
from pytest_zimage.verdict.rule import judge, judge_control

_UNKNOWN_DISK = (
    "recorded on another machine, and of one of the two it is not known how fast its disk reads: the change may be the "
    "disk's"
)
_FASTER_DISK = (
    "recorded on another machine, whose disk is slower: this load took no longer, but makes less of its disk; whether "
    "that is the software or what else limits a load cannot be told"
)
_ENOUGH = 3
"""Runs that say how fast their machine was, below which the noise of a single one would be taken for the baseline."""


def compare(
    metric: Metric,
    samples: Sequence[Sample],
    stored: MetricBaseline,
    *,
    device: DeviceClass,
    neighbours: Neighbours | None = None,
    max_runs: int | None = None,
) -> Judgement:
    """Judge the fresh samples so far, one a run, against `stored`.

    `unfit` when a cold load's page cache was emptied on one side only, and when it changed on another machine and the
    disks may have done it. Raises `MeasurementError` when the baseline has the metric and this engine or machine cannot
    say it: a figure that vanished is not a pass.
    """
    if metric.kind not in ("sampled", "exact"):
        raise MeasurementError(
            f"{metric.name} is {metric.kind}: no run says it", mend="judge image scores by compare_quality"
        )
    _require_said(metric, samples)
    if metric.kind == "exact":
        return _compare_exact(metric, samples, stored)
    kinds = {sample.emptied for sample in samples}
    if len(kinds) > 1:
        return Judgement(outcome="unfit", notes=("the page cache was emptied before some of the fresh runs only",))
    emptied = kinds.pop()
    base = _comparable(stored, emptied)
    if not base:
        ours, theirs = ("was", "was not") if emptied else ("was not", "was")
        note = f"the page cache {ours} emptied before the fresh runs and {theirs} before the baseline's"
        return Judgement(outcome="unfit", k_new=len(samples), notes=(note,))
    constants = _constants(metric, stored, device, emptied, neighbours, max_runs)
    runs = _alike(stored.runs, emptied)
    pace = pace_of(emptied)
    # Of a baseline that grew over time the older runs may not say; if enough others do, these are compared.
    paced = [run for run in runs if pace.of(run)]
    level = at_equal_speed(samples, pace, paced) if len(paced) >= _ENOUGH else None
    verdict = as_timed = judge([sample.rounds for sample in samples], base, constants)
    if level is not None:
        verdict = judge(level, at_equal_speed(paced, pace) or [run.rounds for run in paced], constants)
        verdict = structs.replace(verdict, speed=relative_speed(samples, paced, pace))
    every: list[Timed] = [*samples, *runs]
    if pace is READING and runs and not of_one_machine(every):
        verdict = _of_another_disk(as_timed, None if level is None else verdict)
    return structs.replace(verdict, notes=(*verdict.notes, *(neighbours.notes if neighbours else ())))


def compare_to_control(
    metric: Metric,
    samples: Sequence[Sample],
    stored: MetricBaseline,
    control_samples: Sequence[Sample],
    control_stored: MetricBaseline,
    *,
    device: DeviceClass,
) -> Judgement | None:
    """Judge the ratio to a control variant of the same session; None where the two sides cannot be paired.

    An explanation beside the verdict, never the verdict: what slowed the whole machine cancels in it.
    """
    said = [*samples, *control_samples]
    if metric.kind != "sampled" or not said or any(sample.unavailable for sample in said):
        return None
    kinds = {sample.emptied for sample in said}
    if len(kinds) > 1:
        return None
    emptied = kinds.pop()
    base, control = _comparable(stored, emptied), _comparable(control_stored, emptied)
    if not base or not control or isinstance(base, Published) != isinstance(control, Published):
        return None
    constants = _constants(metric, stored, device, emptied, None, None)
    return judge_control(
        [sample.rounds for sample in samples], base, [sample.rounds for sample in control_samples], control, constants
    )


def require_same_weights(found: Found, metric: str, present: Mapping[str, str]) -> None:
    """Raises `BaselineError` if the baseline of `metric` was recorded with other weights files than `present` names.

    Both sides are environment records. Published and portable baselines name no weights and are taken as they are.
    """
    others = other_weights(found.baseline.environment_of(metric), present)
    if not others:
        return
    told = ", ".join(f"{key.removeprefix('weights.')} {old} -> {new}" for key, (old, new) in others.items())
    raise BaselineError(
        f"{found.path}: {metric} was recorded with other weights than these (recorded -> present hash): {told}",
        mend="use the files that it was recorded with, or record it with these: "
        f'--zimage-config {found.baseline.key.variant} --update-baselines --update-reason "other weights"',
    )


def recorded_canary(stored: MetricBaseline) -> CanaryFigures | None:
    """Median over the stored runs that have it; None where none was timed, as in files of before there was a canary."""
    timed = [run.canary for run in stored.runs if run.canary is not None]

    def middle(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return median(known) if known else None

    if not timed:
        return None
    return CanaryFigures(
        matmul_tflops=middle(canary.matmul_tflops for canary in timed),
        copy_gb_s=middle(canary.copy_gb_s for canary in timed),
    )


def base_phases(stored: MetricBaseline) -> dict[str, float]:
    """Mean seconds by phase over the stored runs that have it; empty where none was recorded."""
    names = dict.fromkeys(name for run in stored.runs for name in run.phases)
    return {name: _mean([run.phases[name] for run in stored.runs if name in run.phases]) for name in names}


def _require_said(metric: Metric, samples: Sequence[Sample]) -> None:
    if not samples:
        raise MeasurementError(f"{metric.name} has no fresh run to judge", mend="measure at least one run")
    for sample in samples:
        if sample.unavailable:
            raise MeasurementError(
                f"{metric.name} has a baseline, but this run cannot say it: {sample.unavailable}",
                mend="measure where it was recorded, or remove the metric from the baseline file",
            )


def _compare_exact(metric: Metric, samples: Sequence[Sample], stored: MetricBaseline) -> Judgement:
    value = samples[0].exact
    for sample in samples[1:]:
        if sample.exact != value:
            raise MeasurementError(
                f"{metric.name} differs between runs of this session: {value} and {sample.exact}",
                mend="it must be equal in every run; find out why",
            )
    # Both are there: the samples are of an exact metric, and reading the file checked the stored kind.
    assert value is not None
    assert stored.exact is not None
    return structs.replace(judge_exact(value, stored.exact), k_new=len(samples))


def _comparable(stored: MetricBaseline, emptied: bool | None) -> Published | list[Sequence[float]] | None:
    """The base side of the same kind; a published cold load means an empty cache."""
    if stored.published is not None:
        return None if emptied is False else stored.published
    return [run.rounds for run in _alike(stored.runs, emptied)] or None


def _alike(runs: Sequence[BaseRun], emptied: bool | None) -> list[BaseRun]:
    return [run for run in runs if run.emptied == emptied]


def _of_another_disk(as_timed: Judgement, at_level: Judgement | None) -> Judgement:
    """What may be said of a cold load `as_timed` on another machine than recorded; `at_level`: at equal speed.

    Not every load is limited by its disk: where one disk is faster and the load is not, equal speed makes it look slow,
    and where one is slower and the load is not, fast.
    """
    slower, faster = _beyond_band(as_timed)
    if at_level is None:
        unknown = structs.replace(as_timed, outcome="unfit", wants_more=False, notes=(_UNKNOWN_DISK,))
        return unknown if slower or faster else as_timed
    slower_at_level, faster_at_level = _beyond_band(at_level)
    if slower_at_level and not slower:
        return structs.replace(at_level, outcome="unfit", wants_more=False, notes=(_FASTER_DISK,))
    if faster_at_level and not faster:
        return structs.replace(at_level, outcome="pass", wants_more=False)
    return at_level


def _beyond_band(verdict: Judgement) -> tuple[bool, bool]:
    """Whether it is slower by more than the band, and whether it is faster."""
    assert verdict.change is not None
    assert verdict.band is not None
    return verdict.change > verdict.band, verdict.change < -verdict.band


def _level_rounds(runs: Sequence[BaseRun], emptied: bool | None) -> Sequence[Sequence[float]]:
    """Of runs on several GPUs only what differs beside their speed is noise."""
    alike, pace = _alike(runs, emptied), pace_of(emptied)
    return at_equal_speed([run for run in alike if pace.of(run)], pace) or [run.rounds for run in alike]


def _constants(
    metric: Metric,
    stored: MetricBaseline,
    device: DeviceClass,
    emptied: bool | None,
    neighbours: Neighbours | None,
    max_runs: int | None,
) -> RuleConstants:
    others = [_level_rounds(other.runs, emptied) for other in neighbours.metrics] if neighbours else []
    return RuleConstants.of(
        metric,
        device=device,
        band=stored.band.relative if stored.band else None,
        band_absolute=stored.band.absolute if stored.band else None,
        pooled=pooled_noise(others),
        max_runs=max_runs,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
