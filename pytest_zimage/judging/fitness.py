"""Whether the machine was fit while a metric was timed: gathers what the verdict, the update and the next run need.

The rule is `probes.fitness.reasons`; here it meets the device class's limits and the baseline's canary.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.baselines.compare import recorded_canary
from pytest_zimage.baselines.store import Absent, Found
from pytest_zimage.catalog import FitnessLimits, Metric, Variant
from pytest_zimage.engines.fit import FitPlan
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import BaselineError
from pytest_zimage.probes.fitness import Fitness, Recorded, reasons
from pytest_zimage.probes.fitness_fault import limits_for
from pytest_zimage.reports.machine import fitness_lines
from pytest_zimage.verdict.model import Judgement, Verdict
from pytest_zimage.xdist import is_worker

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

_MATTERS = ("torch", "driver", "machine")
"""Of the environment: what a canary depends on beside the device."""
_TIMED_ROUNDS = "warm_latency"


def fit_plan(session: ZImageSession, variant: Variant) -> FitPlan:
    """What a run of `variant` is to take for fit."""
    return FitPlan(
        limits=_limits(session),
        wait_s=session.settings.fit_wait_s,
        recorded=_recorded(_found(session, variant), _TIMED_ROUNDS, session.environment),
        root_pid=os.getppid() if is_worker(session.config) else os.getpid(),
        fault=session.injection.fitness,
    )


def fitness_of(metric: Metric, record: RunRecord) -> Fitness | None:
    """The fitness of the block that `metric` was timed in; None for what is no time, and where nobody looked."""
    if metric.kind != "sampled" or metric.unit != "s":
        return None
    return record.cold.fitness if metric.name == "cold_load" else record.fitness


def unfit(
    session: ZImageSession, metric: Metric, records: Sequence[RunRecord], found: Found | Absent
) -> tuple[str, ...]:
    """Why the machine was not fit in any of `records`, each reason once; empty where it was, or `metric` is no time."""
    limits = _limits(session)
    told = [
        reason
        for record in records
        if (fitness := fitness_of(metric, record)) is not None
        for reason in reasons(fitness, limits, _recorded(found, metric.name, record.environment))
    ]
    return tuple(dict.fromkeys(told))


def unfit_metrics(
    session: ZImageSession, variant: Variant, metrics: Sequence[str], records: Sequence[RunRecord]
) -> dict[str, tuple[str, ...]]:
    """Of `metrics`, those that may not be recorded from these runs, and why."""
    found = {
        name: unfit(session, session.catalog.metrics[name], records, _found(session, variant, name)) for name in metrics
    }
    return {name: why for name, why in found.items() if why}


def as_unfit(judgement: Judgement) -> Judgement:
    """`judgement` with its figures and without its conclusion."""
    return structs.replace(judgement, outcome="unfit", wants_more=False)


def about_machine(
    session: ZImageSession, verdict: Verdict, metric: Metric, records: Sequence[RunRecord], why: tuple[str, ...]
) -> Verdict:
    """`verdict` with what is known of the machine that it was timed on; `why` it was not fit."""
    read = [fitness for record in records if (fitness := fitness_of(metric, record)) is not None]
    ceilings = [
        tflops
        for fitness in read
        if not session.injection.fitness and (tflops := fitness.canary().matmul_tflops) is not None
    ]
    timed_rounds = metric.name == _TIMED_ROUNDS
    return structs.replace(
        verdict,
        unfit=why,
        fitness=fitness_lines(read) if verdict.outcome in ("unfit", "inconclusive") else (),
        flops_per_image=records[0].loaded.flops_per_image if timed_rounds else None,
        ceiling_tflops=max(ceilings, default=None) if timed_rounds else None,
    )


def _limits(session: ZImageSession) -> FitnessLimits:
    return limits_for(session.machine.device_class.fitness, session.injection.fitness)


def _found(session: ZImageSession, variant: Variant, metric: str = _TIMED_ROUNDS) -> Found | Absent:
    try:
        return session.store.find(session.key(variant), metric)
    except BaselineError as error:  # the judgement of that metric fails with it
        return Absent(reason=error.message)


def _recorded(found: Found | Absent, metric: str, environment: Mapping[str, str]) -> Recorded | None:
    """The canary that the runs of `environment` are held against."""
    if isinstance(found, Absent):
        return None
    canary = recorded_canary(found.metric)
    if canary is None:
        return None
    then = found.baseline.environment_of(metric)
    differs = [
        f"{key} {then[key]} when recorded, {environment[key]} now"
        for key in _MATTERS
        if key in then and key in environment and then[key] != environment[key]
    ]
    return Recorded(canary=canary, differs=", ".join(differs))
