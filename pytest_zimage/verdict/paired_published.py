"""Judging image scores against a printed table, which has means and no single images. Answers tell how weak they are.

Where the mean of each prompt was printed, over seeds that were drawn here too, the prompts are the pairs: the rule of
`pair_core` on six means instead of eighteen images. Where only an overall mean +/- std was printed, two samples are
compared, whose spread is that between prompts:

    SE^2 = std^2 / n + sd(new)^2 / k,  t quantiles with Welch's degrees of freedom

Where a bare mean was printed, nothing tells chance from change. Its images are of the same prompts and seeds as these,
so a mean worse by more than the guard says that at least one single image is, which is a regression by the rule of
pairs; one that is worse by less than the margin passes; between them no answer is possible.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import structs

from pytest_zimage.errors import BaselineError, MeasurementError
from pytest_zimage.verdict.checks import Summary
from pytest_zimage.verdict.model import Judgement, Outcome
from pytest_zimage.verdict.paired import PairRule, judge_paired, judgement, prompt_of, take_pairs


class PrintedScores(Summary, Protocol):
    """A printed summary of scores."""

    @property
    def bare(self) -> bool: ...
    @property
    def by_prompt(self) -> Mapping[str, float]: ...


def judge_printed(
    new: Mapping[str, float],
    printed: PrintedScores,
    pairs: Sequence[str],
    rule: PairRule,
    *,
    unfit: Mapping[str, str] | None = None,
) -> Judgement:
    """Judge the scores of `pairs`, which are those of the printed table, against its means.

    Raises `MeasurementError` for a pair without a score and `BaselineError` for a table without what it takes.
    """
    if printed.bare:
        return _by_bare_mean(new, printed, pairs, rule, unfit or {})
    take_pairs(new, [p for p in pairs if prompt_of(p) not in (unfit or {})], "measurement", MeasurementError, rule.cap)
    if printed.by_prompt:
        verdict = _by_prompt(new, printed, pairs, rule, unfit or {})
        how = f"printed are means of {len(printed.by_prompt)} prompts, not single images"
    else:
        verdict = _by_mean(new, printed, pairs, rule, unfit or {})
        how = f"printed is one mean +/- std of {printed.n} images, whose spread is that between prompts"
    if verdict.mde is None:
        return verdict
    weak = f"{how}: this finds a change for the worse of {verdict.mde:.2g} 8 times out of 10, and nothing smaller"
    return structs.replace(verdict, notes=(*verdict.notes, weak))


def _by_prompt(
    new: Mapping[str, float], printed: PrintedScores, pairs: Sequence[str], rule: PairRule, unfit: Mapping[str, str]
) -> Judgement:
    means = {
        prompt: statistics.fmean(new[pair] for pair in pairs if prompt_of(pair) == prompt)
        for prompt in dict.fromkeys(map(prompt_of, pairs))
        if prompt not in unfit
    }
    # A prompt's mean stands where a pair does: `mean` is a seed of no image.
    told = judge_paired(
        {f"{prompt}/mean": mean for prompt, mean in means.items()},
        {f"{prompt}/mean": mean for prompt, mean in printed.by_prompt.items()},
        [f"{prompt}/mean" for prompt in dict.fromkeys(map(prompt_of, pairs))],
        rule,
        unfit=unfit,
    )
    return structs.replace(told, k_base=printed.n, k_new=len([pair for pair in pairs if prompt_of(pair) in means]))


def _by_mean(
    new: Mapping[str, float], printed: PrintedScores, pairs: Sequence[str], rule: PairRule, unfit: Mapping[str, str]
) -> Judgement:
    import numpy as np

    from pytest_zimage.verdict import pair_core

    if unfit:
        return _lacking(unfit)
    if printed.std <= 0 or printed.n < 2:
        raise BaselineError(
            f"{rule.metric}: the published mean {printed.mean} has no standard deviation",
            mend="store n and std as printed, or record a baseline: --update-baselines",
        )
    scores = take_pairs(new, pairs, "measurement", MeasurementError, rule.cap)
    if len(scores) < pair_core.MIN_PAIRS:
        return Judgement(
            outcome="inconclusive", scale="absolute", k_base=printed.n, k_new=len(scores), notes=("too few images",)
        )
    ours = max(statistics.stdev(scores), rule.floor) ** 2 / len(scores)
    theirs = printed.std**2 / printed.n
    dof = (ours + theirs) ** 2 / (ours**2 / (len(scores) - 1) + theirs**2 / (printed.n - 1))
    decision = pair_core.decide_means(
        np.array([rule.gain(statistics.fmean(scores), printed.mean)]),
        np.array([math.sqrt(ours + theirs)]),
        dof,
        margin=rule.margin,
        spread=np.array([printed.std]),
        guarded=np.array([False]),
    )
    verdict = judgement(decision, scores, [printed.mean], rule, further=False)
    return structs.replace(verdict, k_base=printed.n)


def _by_bare_mean(
    new: Mapping[str, float], printed: PrintedScores, pairs: Sequence[str], rule: PairRule, unfit: Mapping[str, str]
) -> Judgement:
    if unfit:
        return _lacking(unfit)
    scores = take_pairs(new, pairs, "measurement", MeasurementError, rule.cap)
    mean = statistics.fmean(scores)
    gain = rule.gain(mean, printed.mean)
    outcome: Outcome = "inconclusive"
    if abs(gain) > rule.guard:
        outcome = "improvement" if gain > 0 else "regression"
    elif gain > -rule.margin:
        outcome = "pass"
    notes = [
        f"printed is one mean of {printed.n} images without its spread: worse by up to {rule.margin:g} passes, by more"
        f" than {rule.guard:g} fails, and between them nothing tells chance from change"
    ]
    if rule.ceiling is not None and mean > rule.ceiling:
        outcome = "regression"
        notes.insert(0, f"the mean {mean:.4g} lies above this variant's ceiling of {rule.ceiling:.4g}")
    return Judgement(
        outcome=outcome,
        scale="absolute",
        value=mean,
        baseline=printed.mean,
        change=gain if rule.higher else -gain,
        band=rule.margin,
        k_base=printed.n,
        k_new=len(scores),
        notes=tuple(notes),
    )


def _lacking(unfit: Mapping[str, str]) -> Judgement:
    why = "; ".join(f"{prompt}: {reason}" for prompt, reason in unfit.items())
    return Judgement(
        outcome="unfit", scale="absolute", notes=(f"the printed mean cannot be taken without a prompt; {why}",)
    )
