"""From runs to a verdict: takes a metric out of a variant's runs, holds it against its baseline, asks for confirmation.

The rule itself is `verdict`, the choice of what may be compared `baselines.compare`; this module measures as often as
they ask and gathers what explains the answer.
"""

from __future__ import annotations

import math
from statistics import fmean

from msgspec import structs

from pytest_zimage.baselines.compare import base_phases, compare, compare_to_control, require_same_weights
from pytest_zimage.baselines.store import Absent, Found
from pytest_zimage.catalog import Metric, Variant
from pytest_zimage.errors import BaselineError
from pytest_zimage.judging.dispatch import DISPATCH, dispatch_moves
from pytest_zimage.judging.fitness import about_machine, as_unfit, unfit
from pytest_zimage.probes import environment
from pytest_zimage.probes.packages import PACKAGES, slow_kitchen
from pytest_zimage.reports import units
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.metrics import Sample, take_each
from pytest_zimage.verdict.model import Judgement, Verdict
from pytest_zimage.verdict.rows import verdict_row
from pytest_zimage.verdict.rule import run_score


def judge_metric(session: ZImageSession, test: str, variant: Variant, name: str) -> Verdict:
    """The verdict on one metric of one variant, measuring as many fresh runs as the rule needs.

    Raises a `ZImageError` where there can be no verdict: a run that failed, a baseline that cannot be trusted.
    """
    metric = session.catalog.metrics[name]
    count = session.settings.fresh_runs
    while True:
        records = [session.run(variant, index) for index in range(count)]
        samples, no_more = take_each(name, records)
        found = session.store.find(session.key(variant), name)
        judgement = _judge(session, variant, metric, samples, found)
        if no_more:
            judgement = structs.replace(judgement, wants_more=False, notes=(*judgement.notes, *no_more))
        why = unfit(session, metric, records, found)
        if why:
            judgement = as_unfit(judgement)
        if not judgement.wants_more:
            verdict = _explained(session, test, variant, metric, samples, found, judgement)
            return about_machine(session, verdict, metric, records, why)
        count += 1


def _judge(
    session: ZImageSession, variant: Variant, metric: Metric, samples: list[Sample], found: Found | Absent
) -> Judgement:
    if isinstance(found, Absent):
        return Judgement(outcome="no-baseline", k_new=len(samples), notes=(found.reason,))
    require_same_weights(found, metric.name, session.run(variant, 0).environment)
    return compare(
        metric,
        samples,
        found.metric,
        device=session.machine.device_class,
        neighbours=session.store.neighbours(session.key(variant), metric.name),
    )


def _explained(
    session: ZImageSession,
    test: str,
    variant: Variant,
    metric: Metric,
    samples: list[Sample],
    found: Found | Absent,
    judgement: Judgement,
) -> Verdict:
    exact = metric.kind == "exact"
    before = {} if isinstance(found, Absent) else base_phases(found.metric)
    return verdict_row(
        test,
        variant,
        metric,
        judgement,
        value=samples[0].exact if exact else _value(judgement, samples),
        baseline=found.metric.exact if exact and isinstance(found, Found) else judgement.baseline,
        samples=tuple(sample.rounds for sample in samples if sample.rounds),
        notes=(
            *judgement.notes,
            *dict.fromkeys(note for sample in samples for note in sample.notes),
            *_control_note(session, variant, metric, samples, found, judgement),
            *filter(None, [slow_kitchen(session.run(variant, 0).environment)]),
        ),
        phases={name: (before.get(name), seconds) for name, seconds in mean_phases(samples).items()},
        environment_changed=_environment_changed(session, variant, metric.name, found),
        dispatch_changed=dispatch_moves(session, variant) if _to_explain(judgement) and not exact else None,
        injected=bool(session.injection),
        reference=published_note(session, variant, metric) if isinstance(found, Absent) else "",
    )


def _value(judgement: Judgement, samples: list[Sample]) -> float:
    """As measured, whatever it was compared at."""
    if judgement.value is None or judgement.speed is not None:
        return centre(samples)
    return judgement.value


def _to_explain(judgement: Judgement) -> bool:
    return judgement.outcome in ("regression", "improvement", "inconclusive")


def centre(samples: list[Sample]) -> float:
    """Where the runs lie, in the metric's unit: the mean of their scores, as the rule scores them."""
    return math.exp(fmean(run_score(sample.rounds) for sample in samples))


def mean_phases(samples: list[Sample]) -> dict[str, float]:
    names = dict.fromkeys(name for sample in samples for name in sample.phases)
    return {name: fmean(s.phases[name] for s in samples if name in s.phases) for name in names}


def _environment_changed(
    session: ZImageSession, variant: Variant, metric: str, found: Found | Absent
) -> dict[str, tuple[str, str]]:
    if isinstance(found, Absent) or (found.layer == "portable" and metric != DISPATCH):
        return {}
    changed = environment.diff(found.baseline.environment_of(metric), session.run(variant, 0).environment)
    if found.layer == "portable":
        # Recorded on another machine, but with packages, and these choose the kernels.
        return {name: pair for name, pair in changed.items() if name in PACKAGES}
    return changed


def _control_note(
    session: ZImageSession,
    variant: Variant,
    metric: Metric,
    samples: list[Sample],
    found: Found | Absent,
    judgement: Judgement,
) -> tuple[str, ...]:
    """Whether the reference moved too in this session: what slowed the whole machine is no fault of the variant."""
    control = session.catalog.variant(variant.reference)
    if variant.name == control.name or not _to_explain(judgement) or isinstance(found, Absent):
        return ()
    records = session.book.recorded(control.name)
    try:
        base = session.store.find(session.key(control), metric.name)
    except BaselineError:
        return ()
    if not records or isinstance(base, Absent):
        return ()
    theirs, _ = take_each(metric.name, records)
    device = session.machine.device_class
    ratio = compare_to_control(metric, samples, found.metric, theirs, base.metric, device=device)
    if ratio is None or ratio.change is None or ratio.interval is None:
        return ()
    says = {
        "pass": f"{control.name} moved as much, so the machine or what all variants share did it",
        "regression": f"{control.name} did not move as much, so the change is this variant's own",
        "improvement": f"{control.name} did not move as much, so the change is this variant's own",
    }.get(ratio.outcome, f"too uncertain to say whether {control.name} moved as much")
    change = f"{units.percent(ratio.change)} (95 % interval {units.interval(ratio.interval)})"
    return (f"ratio to {control.name} of this session: {change}; {says}",)


def published_note(session: ZImageSession, variant: Variant, metric: Metric) -> str:
    found = session.store.published_reference(session.key(variant), metric.name)
    if found is None:
        return ""
    printed = units.value(found.published.mean, found.unit)
    return f"published: {printed} through {found.engine} with {found.model_set} weights ({found.source})"
