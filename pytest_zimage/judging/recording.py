"""`--update-baselines`: a test records what it measured instead of judging it, and fails if that is refused."""

from __future__ import annotations

from datetime import UTC, datetime

from msgspec import structs

from pytest_zimage.baselines.quality_update import MeasuredQuality, update_quality
from pytest_zimage.baselines.recordable import Measured, outlying_runs
from pytest_zimage.baselines.update import UpdateResult, update_baselines
from pytest_zimage.catalog import Variant
from pytest_zimage.judging.fitness import unfit_metrics
from pytest_zimage.judging.quality import blind_scorer
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.metrics import take
from pytest_zimage.verdict.model import Scale, Verdict
from pytest_zimage.verdict.rows import SOUND

REFUSED = "REFUSED"
"""The word of a verdict whose metric was not recorded."""


def record_metrics(session: ZImageSession, test: str, variant: Variant, metrics: tuple[str, ...]) -> list[Verdict]:
    """Measure, record, and say what became of each metric. Raises a `ZImageError` if a run fails."""
    measured = _measured(session, variant, metrics)
    results = update_baselines(
        session.store,
        session.catalog,
        [measured],
        mode=session.settings.update_mode,
        reason=session.settings.update_reason,
        recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    session.updates.extend(results)
    return [_verdict(test, measured, result) for result in results]


def record_quality(session: ZImageSession, test: str, variant: Variant, metrics: tuple[str, ...]) -> list[Verdict]:
    """Record the scores of `metrics` instead of judging them, with fingerprints and previews.

    All seeds are recorded, also those that only an inconclusive verdict draws: it needs the baseline's side of them.
    """
    evidence = session.desk.evidence(variant, session.desk.gallery.stages[-1])
    blind = [blind_scorer(session, test, variant, session.catalog.metrics[name]) for name in metrics]
    recordable = tuple(name for name, verdict in zip(metrics, blind, strict=True) if verdict is None)
    results = update_quality(
        session.store,
        session.catalog,
        [MeasuredQuality(key=session.key(variant), evidence=evidence, metrics=recordable)] if recordable else [],
        mode=session.settings.update_mode,
        reason=session.settings.update_reason,
        recorded_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    # Every test of the variant records the same images; once is enough to be told.
    session.updates.extend(row for row in results if row.metric != SOUND or row.action != "unchanged")
    unfit = [verdict for verdict in blind if verdict is not None]
    return unfit + [_row(test, result, len(evidence.pairs), "absolute") for result in results]


def _measured(session: ZImageSession, variant: Variant, metrics: tuple[str, ...]) -> Measured:
    """The runs to record; one that lies far out is measured once more, and the second measurement stands."""
    count = session.settings.fresh_runs
    indices = list(range(count))
    measured = Measured(
        key=session.key(variant),
        runs=tuple(session.run(variant, index) for index in indices),
        metrics=metrics,
        rounds_asked=session.settings.rounds,
    )
    outlying = sorted(outlying_runs([measured], session.catalog).get(variant.name, {}))
    for spare, position in enumerate(outlying):
        indices[position] = count + spare
    runs = tuple(session.run(variant, index) for index in indices)
    return Measured(
        key=measured.key,
        runs=runs,
        metrics=metrics,
        rounds_asked=measured.rounds_asked,
        unfit_metrics=unfit_metrics(session, variant, metrics, runs),
        remeasured=frozenset(outlying),
    )


def _verdict(test: str, measured: Measured, result: UpdateResult) -> Verdict:
    old, new = result.old, result.new
    # What was refused may be a sample that cannot be taken.
    refused = result.action == "refused"
    samples = [] if refused else [take(result.metric, run).rounds for run in measured.runs]
    return structs.replace(
        _row(test, result, len(measured.runs)),
        change=new / old - 1 if isinstance(old, float) and isinstance(new, float) else None,
        samples=tuple(rounds for rounds in samples if rounds),
    )


def _row(test: str, result: UpdateResult, k_new: int, scale: Scale = "relative") -> Verdict:
    """What became of one metric, as a row of the results; a refusal is an error of its test."""
    refused = result.action == "refused"
    return Verdict(
        test=test,
        variant=result.variant,
        metric=result.metric,
        unit=result.unit,
        verdict=REFUSED if refused else result.action.upper(),
        outcome="error" if refused else "pass",
        value=result.new,
        baseline=result.old,
        scale=scale,
        k_base=result.runs_old,
        k_new=k_new,
        notes=tuple(text for text in (result.reason, result.mend and f"mend: {result.mend}") if text),
    )
