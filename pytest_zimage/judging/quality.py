"""From images to a verdict: scored, held against their baseline pair by pair, with more seeds where needed."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from pytest_zimage.baselines.compare import require_same_weights
from pytest_zimage.baselines.compare_quality import compare_quality
from pytest_zimage.baselines.images import previews_folder
from pytest_zimage.baselines.quality import Evidence, drawn_pairs, identity_to
from pytest_zimage.baselines.store import Absent, Found
from pytest_zimage.catalog import Metric, Variant
from pytest_zimage.judging.metric import published_note
from pytest_zimage.probes import environment
from pytest_zimage.quality.diagnosis import probable_causes
from pytest_zimage.reports import units
from pytest_zimage.reports.paths import shown_from
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.model import Judgement, Verdict
from pytest_zimage.verdict.paired import PairRule, judge_paired
from pytest_zimage.verdict.rows import SOUND, limit_row, verdict_row

DRIFT = "lpips_recorded"


def judge_images(session: ZImageSession, test: str, variant: Variant) -> Verdict:
    """Whether every image is one at all: not blank, not uniform, not saturated, of the right size."""
    evidence = session.desk.evidence(variant)
    count = len(evidence.pairs)
    return limit_row(
        test,
        variant,
        SOUND,
        unit="count",
        broken="BROKEN" if evidence.problems else "",
        value=float(count),
        k_new=count,
        notes=(*evidence.problems[:6], *_more(evidence.problems)),
        injected=evidence.injected,
    )


def judge_drift(session: ZImageSession, test: str, variant: Variant) -> Verdict:
    """How far the images are from the recorded ones of the same variant; none if they are bit-identical."""
    metric = session.catalog.metrics[DRIFT]
    evidence = session.desk.evidence(variant)
    found = session.store.find(session.key(variant), "lpips")
    notes: list[str] = []
    environment_changed: dict[str, tuple[str, str]] = {}
    if isinstance(found, Absent) or found.baseline.images is None:
        reason = found.reason if isinstance(found, Absent) else f"{found.path} holds no images"
        judgement = Judgement(outcome="no-baseline", scale="absolute", k_new=len(evidence.pairs), notes=(reason,))
    else:
        require_same_weights(found, "lpips", evidence.environment)
        identity = identity_to(evidence, found.baseline)
        assert identity is not None
        folder = previews_folder(found.path)
        recorded = {pair: folder / name for pair, name in found.baseline.images.previews.items()}
        distances = dict.fromkeys(identity.same, 0.0)
        if not identity.all_same:
            compared = session.desk.to_recorded(variant, recorded)
            distances |= {pair: one.lpips or 0.0 for pair, one in compared.items() if pair not in identity.same}
            decibels = [one.psnr_db for pair, one in compared.items() if one.psnr_db is not None]
            if decibels:
                notes.append(f"PSNR to the recorded previews: {units.decibel(fmean(decibels))} in the mean")
            environment_changed = environment.diff(found.baseline.environment, evidence.environment)
        judgement = judge_paired(
            distances, dict.fromkeys(evidence.pairs, 0.0), evidence.pairs, PairRule.of(metric), further=False
        )
        notes = [identity.note(), *judgement.notes, *notes]
        if judgement.outcome in ("regression", "inconclusive"):
            notes += [*_causes(session, variant, found), *_side_by_side(session, variant, found)]
    return verdict_row(
        test,
        variant,
        metric,
        judgement,
        notes=(*(notes or judgement.notes),),
        environment_changed=environment_changed,
        injected=evidence.injected,
    )


def judge_quality(session: ZImageSession, test: str, variant: Variant, name: str) -> Verdict:
    """The verdict on one image metric; inconclusive ones take more seeds, stage by stage."""
    metric = session.catalog.metrics[name]
    if blind := blind_scorer(session, test, variant, metric):
        return blind
    stages = session.desk.gallery.stages
    for stage, more in enumerate(stages):
        evidence = session.desk.evidence(variant, more)
        found = session.store.find(session.key(variant), name)
        following = stages[stage + 1] if stage + 1 < len(stages) else None
        further = drawn_pairs(session.desk.gallery.prompts, following)[len(evidence.pairs) :] if following else ()
        judgement = _judge(metric, evidence, found, further)
        if not judgement.wants_more:
            break
    return _explained(session, test, variant, metric, evidence, found, judgement)


def blind_scorer(session: ZImageSession, test: str, variant: Variant, metric: Metric) -> Verdict | None:
    """The verdict UNFIT, if the scorer tells no prompt's own images from the controls: then its scores say nothing."""
    outcomes = session.desk.controls(variant) if metric.controls else ()
    if not outcomes or any(outcome.fit for outcome in outcomes):
        return None
    worst = min(outcomes, key=lambda outcome: outcome.lead)
    evidence = session.desk.evidence(variant)
    notes = (
        f"the scorer is blind here: for none of the {len(outcomes)} prompts do {variant.reference}'s own images beat"
        f" every control by {worst.gap:g}; the worst is {worst.prompt}, where they score {worst.real:.3f} and"
        f" {worst.strongest} scores {worst.controls[worst.strongest]:.3f}",
        f"scorer: {evidence.scores[metric.name].scorer}",
    )
    unfit = Judgement(outcome="unfit", scale="absolute", k_new=len(evidence.pairs), notes=notes)
    return verdict_row(test, variant, metric, unfit, injected=evidence.injected)


def _judge(metric: Metric, evidence: Evidence, found: Found | Absent, further: tuple[str, ...]) -> Judgement:
    if isinstance(found, Absent):
        scores = evidence.scores[metric.name].by_pair
        return Judgement(
            outcome="no-baseline",
            scale="absolute",
            value=sum(scores.values()) / len(scores),
            k_new=len(scores),
            notes=(found.reason,),
        )
    require_same_weights(found, metric.name, evidence.environment)
    return compare_quality(metric, evidence, found, further=further)


def _explained(
    session: ZImageSession,
    test: str,
    variant: Variant,
    metric: Metric,
    evidence: Evidence,
    found: Found | Absent,
    judgement: Judgement,
) -> Verdict:
    stored = found.baseline if isinstance(found, Found) else None
    explain = judgement.outcome in ("regression", "inconclusive", "unfit") and stored is not None
    notes = [*judgement.notes]
    if judgement.outcome in ("regression", "inconclusive"):
        causes_seen = evidence.problems[:3] or _causes(session, variant, found)
        notes += [*causes_seen, *_side_by_side(session, variant, found)]
    return verdict_row(
        test,
        variant,
        metric,
        judgement,
        samples=(tuple(evidence.scores[metric.name].by_pair.values()),),
        notes=tuple(notes),
        environment_changed=environment.diff(stored.environment, evidence.environment) if explain and stored else {},
        injected=evidence.injected,
        reference=published_note(session, variant, metric) if stored is None else "",
    )


def _causes(session: ZImageSession, variant: Variant, found: Found | Absent) -> list[str]:
    """What probably happened, in words; images that are blank have been told already."""
    recorded = found.baseline.images.fingerprints if isinstance(found, Found) and found.baseline.images else {}
    images, references = session.desk.gallery.images(variant), session.desk.gallery.references(variant)
    return probable_causes(images, references, recorded, variant.reference)


def _side_by_side(session: ZImageSession, variant: Variant, found: Found | Absent) -> list[str]:
    """Where to look, from the root folder: the recorded preview and the new image of the first pairs that differ."""
    if isinstance(found, Absent) or found.baseline.images is None:
        return []
    identity = identity_to(session.desk.evidence(variant), found.baseline)
    root = session.settings.rootdir
    new = {f"{image.prompt}/{image.seed}": Path(image.path) for image in session.desk.gallery.images(variant)}
    previews = found.baseline.images.previews
    folder = previews_folder(found.path)
    differ = identity.differ if identity else ()
    return [
        f"{pair}: recorded {shown_from(root, folder / previews[pair])}, now {shown_from(root, new[pair])}"
        for pair in differ[:3]
        if pair in previews
    ]


def _more(problems: tuple[str, ...]) -> tuple[str, ...]:
    return (f"and {len(problems) - 6} more",) if len(problems) > 6 else ()
