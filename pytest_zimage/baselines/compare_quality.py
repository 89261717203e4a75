"""One image metric of one variant against its stored baseline: picks what may be compared, then asks the rule."""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

from msgspec import structs

from pytest_zimage.baselines.images import digest
from pytest_zimage.baselines.quality import Evidence, identity_to
from pytest_zimage.baselines.schema import Baseline, BasePrompt, MetricBaseline, Published
from pytest_zimage.baselines.store import Found
from pytest_zimage.catalog.model import Metric
from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.model import Judgement
from pytest_zimage.verdict.paired import PairRule, Scores, capped, judge_paired, named, pair_name, prompt_of
from pytest_zimage.verdict.paired_published import judge_printed

_UNFIT_THEN = "its control images did not lose when the baseline was recorded"


def compare_quality(metric: Metric, evidence: Evidence, found: Found, *, further: Sequence[str] = ()) -> Judgement:
    """Judge one image metric of this session against `found`.

    `further` are the pairs that the next stage of seeds would add; empty after the last. Images that are all
    bit-identical to those that the stored scores are of pass without a look at the scores. `unfit`: another scorer, or
    prompts whose controls do not lose. Raises `BaselineError` or `MeasurementError` for pairs missing on one side, for
    a prompt that is not the recorded one, and for scores that are no numbers.
    """
    if metric.kind != "paired":
        raise MeasurementError(f"{metric.name} is {metric.kind}, not an image score", mend="judge it by compare")
    stored = found.metric
    same = identity_to(evidence, found.baseline)
    _check_prompts(metric, evidence, found)
    seen = (same.note(),) if same is not None else ()
    if same is not None and same.all_same and _are_scored(stored, found.baseline, evidence.pairs):
        return _passed_as_same(metric, evidence, stored, seen)
    scores = _scores(metric, evidence)
    if not same_scorer(stored, scores.scorer):
        told = f"the baseline was scored by {stored.scorer!r}, these images by {scores.scorer!r}: they do not compare"
        return Judgement(outcome="unfit", scale="absolute", k_new=len(scores.by_pair), notes=(told, *seen))
    unfit = {**dict.fromkeys(stored.unfit, _UNFIT_THEN), **(evidence.unfit if metric.controls else {})}
    unfit = {prompt: why for prompt, why in unfit.items() if prompt in map(prompt_of, evidence.pairs)}
    rule = PairRule.of(metric, margin=stored.margin, ceiling=stored.ceiling)
    if stored.published is not None:
        pairs = _printed_pairs(metric, evidence, found, stored.published)
        verdict = judge_printed(scores.by_pair, stored.published, pairs, rule, unfit=unfit)
    else:
        known = [pair for pair in further if pair in stored.scores or prompt_of(pair) in unfit]
        can_go_on = bool(further) and len(known) == len(further)
        verdict = judge_paired(scores.by_pair, stored.scores, evidence.pairs, rule, unfit=unfit, further=can_go_on)
        if further and not can_go_on and verdict.outcome == "inconclusive":
            lacking = (
                "further seeds could settle it, but the baseline has none: --update-baselines --update-mode extend"
            )
            verdict = structs.replace(verdict, notes=(*verdict.notes, lacking))
    return structs.replace(verdict, notes=(*seen, *verdict.notes))


def same_scorer(stored: MetricBaseline, scorer: str) -> bool:
    """Whether the identities are equal; of a published table, whether every word that it prints is there.

    `open_clip ViT-B-32` is also `open_clip/ViT-B-32/laion2b_s34b_b79k@0123456789ab`, but not what begins `tiny-`.
    """
    if stored.published is None:
        return stored.scorer == scorer
    return bool(stored.scorer.strip()) and _words(stored.scorer) <= _words(scorer)


def _words(identity: str) -> set[str]:
    """Lower case, without version suffixes, which tables do not print."""
    words = re.split(r"[\s/:,@]+", identity.lower())
    return {re.sub(r"-v[0-9.]+$", "", word) for word in words if word}


def _scores(metric: Metric, evidence: Evidence) -> Scores:
    if metric.name not in evidence.scores:
        raise MeasurementError(
            f"{metric.name} has a baseline, but nothing scored these images",
            mend="find out why in the judge's log; a figure that vanished is not a pass",
        )
    scores = evidence.scores[metric.name]
    if not scores.scorer.strip():
        raise MeasurementError(f"{metric.name}: its scorer has no identity", mend="report this as a bug")
    strangers = [pair for pair in scores.by_pair if pair not in evidence.pairs]
    if strangers:
        raise MeasurementError(
            f"{metric.name}: scores of images that were not asked for: {named(strangers)}", mend="report this as a bug"
        )
    return scores


def _check_prompts(metric: Metric, evidence: Evidence, found: Found) -> None:
    """Every asked prompt is the recorded one, and every recorded prompt of the set is asked for."""
    recorded = found.baseline.prompts
    for name in dict.fromkeys(map(prompt_of, evidence.pairs)):
        if name in recorded and recorded[name] != evidence.prompts[name]:
            raise BaselineError(
                f"{found.path}: prompt {name!r} was recorded as {_told(recorded[name])}; "
                f"now it is {_told(evidence.prompts[name])}",
                mend="give the changed prompt another name, or record it again: --update-baselines",
            )
    sets = {prompt.prompt_set for prompt in evidence.prompts.values()}
    ours = {prompt_of(pair) for pair in found.metric.scores}
    lost = [n for n in sorted(ours) if recorded[n].prompt_set in sets and n not in map(prompt_of, evidence.pairs)]
    if lost:
        raise MeasurementError(
            f"{metric.name}: the baseline has scores of {named(lost)}, which were not drawn",
            mend="draw the whole prompt set; fewer pairs are another claim",
        )


def _printed_pairs(metric: Metric, evidence: Evidence, found: Found, printed: Published) -> list[str]:
    """The images that the printed means are of; further seeds are left out, so that like is held against like."""
    prompts = found.baseline.prompts
    strangers = [pair for pair in evidence.pairs if prompt_of(pair) not in prompts]
    if strangers:
        raise BaselineError(
            f"{found.path}: {metric.name} was printed for {named(list(prompts))}, not for {named(strangers)}",
            mend="judge the published prompt set, or record a baseline of your own: --update-baselines",
        )
    pairs = [
        pair_name(name, seed) for name, prompt in prompts.items() for seed in prompt.seeds if seed in printed.seeds
    ]
    if len(pairs) != printed.n:
        raise BaselineError(
            f"{found.path}: {metric.name} was printed for {printed.n} images, and its prompts and seeds are of"
            f" {len(pairs)}",
            mend="correct n, seeds or prompts as printed",
        )
    missing = [pair for pair in pairs if pair not in evidence.pairs]
    if missing:
        raise MeasurementError(
            f"{metric.name}: {named(missing)} were printed and not drawn", mend="draw the whole prompt set"
        )
    return pairs


def _told(prompt: BasePrompt) -> str:
    seeds = ", ".join(map(str, prompt.seeds))
    return f"{prompt.text!r} of {prompt.prompt_set}, {prompt.width}x{prompt.height}, seeds {seeds}"


def _are_scored(stored: MetricBaseline, baseline: Baseline, pairs: Sequence[str]) -> bool:
    """Whether the recorded fingerprints are of the very images that the stored scores are of, and all of `pairs`."""
    if baseline.images is None or not stored.images:
        return False
    covered = all(pair in stored.scores or prompt_of(pair) in stored.unfit for pair in pairs)
    return covered and digest(baseline.images.fingerprints, stored.scores) == stored.images


def _passed_as_same(metric: Metric, evidence: Evidence, stored: MetricBaseline, notes: tuple[str, ...]) -> Judgement:
    """Equal pixels need no scorer: one that is missing, another or unfit changes nothing."""
    base = {pair: stored.scores[pair] for pair in evidence.pairs if pair in stored.scores}
    scores = evidence.scores.get(metric.name)
    new = scores.by_pair if scores is not None and same_scorer(stored, scores.scorer) else {}
    return Judgement(
        outcome="pass",
        scale="absolute",
        value=fmean(capped(new[pair], metric.cap) for pair in base) if base and base.keys() <= new.keys() else None,
        baseline=fmean(base.values()) if base else None,
        band=stored.margin or metric.margin,
        k_base=len(base),
        k_new=len(evidence.pairs),
        notes=notes,
    )
