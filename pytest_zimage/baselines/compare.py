"""One metric of one variant against its stored baseline: picks what may be compared, then asks the rule."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import median

from msgspec import structs

from pytest_zimage.baselines.other_machine import Recorded, alike, judge_between
from pytest_zimage.baselines.schema import MetricBaseline, Published
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
from pytest_zimage.verdict.rule import judge_control


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
    recorded = Recorded.of(stored, neighbours.metrics if neighbours else (), emptied)
    constants = _constants(metric, stored, device, recorded.noise(), max_runs)
    verdict = judge_between(samples, base, recorded, constants)
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
    constants = _constants(metric, stored, device, (), None)
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
    return [run.rounds for run in alike(stored.runs, emptied)] or None


def _constants(
    metric: Metric,
    stored: MetricBaseline,
    device: DeviceClass,
    noise: Sequence[Sequence[Sequence[float]]],
    max_runs: int | None,
) -> RuleConstants:
    """`noise`: the rounds of the other variants' runs."""
    return RuleConstants.of(
        metric,
        device=device,
        band=stored.band.relative if stored.band else None,
        band_absolute=stored.band.absolute if stored.band else None,
        pooled=pooled_noise(noise),
        max_runs=max_runs,
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
