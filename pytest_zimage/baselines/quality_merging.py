"""How the scores and images of one session join what is stored: pure, so that it can be done again under the lock."""

from __future__ import annotations

import math
from collections.abc import Mapping

from msgspec import structs

from pytest_zimage.baselines.images import digest, preview_name
from pytest_zimage.baselines.merging import Merged, Mode
from pytest_zimage.baselines.quality import Evidence, first_ceiling
from pytest_zimage.baselines.schema import BaseImages, Baseline, MetricBaseline
from pytest_zimage.catalog.model import Metric
from pytest_zimage.errors import MeasurementError
from pytest_zimage.verdict.paired import named, prompt_of, take_pairs

_RENEW = "record it anew: --update-mode replace"


def refusal(evidence: Evidence) -> Merged | None:
    """Why nothing of these images may be recorded."""
    if evidence.injected:
        return _refused("a fault was injected into these images", "repeat without --zimage-inject")
    if evidence.problems:
        return _refused(f"failing: {evidence.problems[0]}", "mend the error, then repeat")
    asked = set(evidence.pairs)
    whole = {f"{name}/{seed}" for name, prompt in evidence.prompts.items() for seed in prompt.seeds}
    if missing := sorted(whole - asked):
        return _refused(f"incomplete: {named(missing)} of the prompt set were not drawn", "draw the whole set")
    if missing := [pair for pair in evidence.pairs if pair not in evidence.fingerprints]:
        return _refused(f"incomplete: no fingerprint of {named(missing)}", "draw every prompt and seed asked for")
    return None


def changed_prompt(current: Baseline | None, evidence: Evidence) -> Merged | None:
    """Why these images cannot lie beside the stored ones: a prompt of the same name is another prompt."""
    for name, prompt in evidence.prompts.items():
        if current is not None and name in current.prompts and current.prompts[name] != prompt:
            return _refused(f"prompt {name!r} has another text, size or seeds than the stored one", _RENEW)
    return None


def stale_metrics(current: Baseline, evidence: Evidence) -> set[str]:
    """Stored metrics of a prompt that has changed: beside the new text their scores would be an untruth."""
    changed = {name for name, prompt in evidence.prompts.items() if current.prompts.get(name, prompt) != prompt}
    return {
        name for name, stored in current.metrics.items() if changed & {*map(prompt_of, stored.scores), *stored.unfit}
    }


def unfit_for(metric: Metric, evidence: Evidence) -> Merged | None:
    """Why `metric` cannot be recorded, where its scorer can say nothing of any prompt."""
    if not metric.controls or not evidence.pairs or {*map(prompt_of, evidence.pairs)} - evidence.unfit.keys():
        return None
    why = "; ".join(f"{prompt}: {reason}" for prompt, reason in evidence.unfit.items())
    return _refused(f"unfit: the scorer can say nothing of any prompt ({why})", "use another scorer: --zimage-clip")


def merge_scores(current: Baseline | None, metric: Metric, evidence: Evidence, mode: Mode) -> Merged:
    """What `metric` should be stored as; action `refused` with the reason where that would store an untruth."""
    if metric.kind != "paired":
        return _refused(f"is {metric.kind}, not an image score", "record it from runs")
    old = current.metrics.get(metric.name) if current else None
    if mode == "new" and old is not None:
        return Merged(action="kept", reason="has a baseline already; --update-mode new only adds")
    if metric.name not in evidence.scores:
        return Merged(action="kept", reason="not measured: nothing scored these images")
    scorer = evidence.scores[metric.name].scorer
    unfit = set(evidence.unfit) if metric.controls else set()
    fit = [pair for pair in evidence.pairs if prompt_of(pair) not in unfit]
    try:
        values = take_pairs(evidence.scores[metric.name].by_pair, fit, "measurement", MeasurementError, metric.cap)
    except MeasurementError as error:
        return _refused(f"incomplete: {error.message}", error.mend)
    fresh = dict(zip(fit, values, strict=True))
    if outside := _outside(fresh, metric):
        return _refused(f"has scores that cannot be: {named(outside)}", "find out what the scorer did")
    if not scorer.strip():
        return _refused("its scorer has no identity", "report this as a bug")
    prints = evidence.fingerprints
    if mode == "extend" and old is not None:
        if old.published is not None:
            return _refused("a published summary has no scores to extend", _RENEW)
        if old.scorer != scorer:
            return _refused(f"the stored scores are by {old.scorer!r}, these by {scorer!r}", _RENEW)
        added = {pair: score for pair, score in fresh.items() if pair not in old.scores}
        unfit = {*old.unfit, *unfit}
        if not added:
            return Merged(action="kept", reason="has a score of every pair already; --update-mode extend only adds")
        if clash := sorted({prompt_of(pair) for pair in (*old.scores, *added)} & unfit):
            return _refused(f"unfit now or then: {named(clash)}", _RENEW)
        # The digest of old and new together is known only while the stored fingerprints are those of the old scores.
        before = current.images.fingerprints if current is not None and current.images is not None else {}
        tied = bool(old.images) and digest(before, old.scores) == old.images
        prints = {**evidence.fingerprints, **before} if tied else {}
        fresh = {**old.scores, **added}
    mean = math.fsum(fresh.values()) / len(fresh)
    if too_high := _above_ceiling(mean, old):
        return _refused(too_high, "if it is right, raise `ceiling` in the file by hand, for a reviewer to see")
    stored = MetricBaseline(
        unit=metric.unit,
        direction=metric.direction,
        scores=dict(sorted(fresh.items())),
        scorer=scorer,
        unfit=tuple(sorted(unfit)),
        images=digest(prints, fresh),
        margin=old.margin if old else None,
        ceiling=old.ceiling if old and old.ceiling else first_ceiling(metric, mean),
    )
    same_prompts = changed_prompt(current, evidence) is None
    if old is not None and structs.replace(old, environment={}) == stored and same_prompts:
        return Merged(action="unchanged", stored=stored)
    told = f"without {', '.join(sorted(unfit))}, for which the scorer is unfit" if unfit else ""
    return Merged(action="extended" if mode == "extend" and old else "recorded", stored=stored, reason=told)


def merge_images(
    current: Baseline | None, evidence: Evidence, mode: Mode
) -> tuple[Merged, BaseImages, dict[str, bytes]]:
    """The images to store, and the preview files by name. Raises `BaselineError` for a preview that is none."""
    old = current.images if current else None
    files = {pair: preview_name(pair, data) for pair, data in evidence.previews.items() if pair in evidence.pairs}
    fresh = {pair: evidence.fingerprints[pair] for pair in evidence.pairs}
    new = BaseImages(fingerprints=fresh, drawn_on=evidence.drawn_on, previews=files)
    if old is not None and mode != "replace":
        added = {pair: sha for pair, sha in fresh.items() if pair not in old.fingerprints}
        new = BaseImages(
            fingerprints={**old.fingerprints, **added},
            drawn_on=old.drawn_on,
            previews={**{pair: name for pair, name in files.items() if pair in added}, **old.previews},
        )
    contents = {files[pair]: evidence.previews[pair] for pair in files}
    if old == new:
        return Merged(action="unchanged"), new, contents
    return Merged(action="extended" if old and mode != "replace" else "recorded"), new, contents


def _outside(scores: Mapping[str, float], metric: Metric) -> list[str]:
    low, high = metric.limits or (-math.inf, math.inf)
    return [f"{pair} = {score}" for pair, score in scores.items() if not low <= score <= high]


def _above_ceiling(mean: float, old: MetricBaseline | None) -> str:
    if old is None or old.ceiling is None or mean <= old.ceiling:
        return ""
    return f"the mean {mean:.4g} lies above this variant's ceiling of {old.ceiling:g}"


def _refused(reason: str, mend: str) -> Merged:
    return Merged(action="refused", reason=reason, mend=mend)
