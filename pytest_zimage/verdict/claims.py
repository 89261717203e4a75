"""Judging a published claim between variants of one session, by the decision rule's own interval.

A claim names a ratio of one variant to another. What it expects takes the place of a baseline: the other variant's
runs, shifted by the claimed ratio. So "at least 1.37 times as fast" passes, fails and stays open as a latency does
against its baseline, and a claim of inequality takes an interval that excludes equality.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct, structs

from pytest_zimage.catalog.claims import Claim, ClaimKind
from pytest_zimage.errors import MeasurementError
from pytest_zimage.verdict.checks import Runs, require_runs
from pytest_zimage.verdict.constants import ALPHA_FAIL, ALPHA_PASS, PRIOR_DOF, RuleConstants
from pytest_zimage.verdict.model import Judgement, Outcome


class Pair(Struct, frozen=True, kw_only=True):
    """One ratio that a claim says something about."""

    variant: str
    against: str
    ratio: float
    """Measured: variant / against."""
    judgement: Judgement
    """`baseline` is what the claim expects of the variant, `change` how far off it the variant is."""


def judge_claim(claim: Claim, case: Sequence[str], runs: Mapping[str, Runs], constants: RuleConstants) -> list[Pair]:
    """The pairs of one case of `claim.cases()`, each judged; `runs` holds all of their fresh runs.

    An outcome is `pass` (holds), `regression` (broken) or `inconclusive`, and `wants_more` asks for further runs.
    Raises `MeasurementError` for a sample that is empty or not positive and finite.
    """
    constants = structs.replace(constants, band=claim.band or constants.band, band_absolute=0.0)
    # An order says of each pair that the later one takes more, wherever the printed figures are that far apart.
    pairs = _ordered(claim, constants.band) if claim.kind == "order" else [(case[0], case[1])]
    return [_pair(claim, name, against, runs[name], runs[against], constants) for name, against in pairs]


def worst(pairs: Sequence[Pair]) -> Pair:
    """The pair that decides a claim: one that breaks it, else one that is open, else the one nearest to equality."""
    rank: dict[Outcome, int] = {"regression": 0, "inconclusive": 1}
    return min(pairs, key=lambda pair: (rank.get(pair.judgement.outcome, 2), abs(math.log(pair.ratio))))


def judge_exact_ratio(claim: Claim, value: int, against: int, band: float) -> Judgement:
    """The same for numbers without noise, such as bytes on disk."""
    expected = against * claimed_ratio(claim)
    change = value / expected - 1
    width = claim.band or band
    holds = {
        "slower_than": change > 0,
        "unchanged": abs(math.log1p(change)) <= math.log1p(width),
    }.get(claim.kind, change <= width)
    outcome: Outcome = "pass" if holds else "regression"
    return Judgement(
        outcome=outcome, value=float(value), baseline=expected, change=change, band=width, k_base=1, k_new=1
    )


def claimed_ratio(claim: Claim) -> float:
    """What the claim expects of variant / against; 1 where it names no figure."""
    if claim.factor is not None:
        return 1 / claim.factor
    return 1 - claim.share if claim.share is not None else 1.0


def _ordered(claim: Claim, band: float) -> list[tuple[str, str]]:
    names = claim.variants
    return [
        (later, earlier)
        for place, earlier in enumerate(names)
        for later in names[place + 1 :]
        if claim.printed[later] / claim.printed[earlier] > 1 + band
    ]


def _pair(claim: Claim, name: str, against: str, new: Runs, base: Runs, constants: RuleConstants) -> Pair:
    import numpy as np
    from scipy.special import stdtrit

    from pytest_zimage.verdict import core

    scores, others = (
        np.array([[float(core.run_scores(rounds)) for rounds in require_runs(side, MeasurementError)]])
        for side in (new, base)
    )
    expected = core.base_of_scores(others + math.log(claimed_ratio(claim)))
    decision = core.decide(scores, expected, constants)
    change, lower, upper = (float(side[0]) for side in (decision.change, decision.lower, decision.upper))
    enough = min(scores.size, others.size) >= 2
    dof = PRIOR_DOF + scores.size + others.size - 2
    certain = (upper - change) * float(stdtrit(dof, 1 - ALPHA_FAIL) / stdtrit(dof, 1 - ALPHA_PASS))
    outcome = _OUTCOMES[claim.kind](int(decision.outcome[0]), lower, change + certain, constants, enough)
    judgement = Judgement(
        outcome=outcome,
        value=math.exp(float(scores.mean())),
        baseline=math.exp(float(expected.centre[0])),
        change=math.expm1(change),
        interval=(math.expm1(lower), math.expm1(upper)),
        band=constants.band,
        noise=float(decision.noise[0]),
        mde=float(decision.mde[0]),
        k_base=others.size,
        k_new=scores.size,
        wants_more=outcome == "inconclusive" and scores.size < constants.max_runs,
    )
    return Pair(variant=name, against=against, ratio=math.exp(change) * claimed_ratio(claim), judgement=judgement)


def _at_most(code: int, lower: float, certainly_below: float, constants: RuleConstants, enough: bool) -> Outcome:
    from pytest_zimage.verdict import core

    outcomes: dict[int, Outcome] = {core.REGRESSION: "regression", core.INCONCLUSIVE: "inconclusive"}
    return outcomes.get(code, "pass")


def _equal(code: int, lower: float, certainly_below: float, constants: RuleConstants, enough: bool) -> Outcome:
    """As `_at_most`, on both sides."""
    from pytest_zimage.verdict import core

    if code in (core.REGRESSION, core.IMPROVEMENT):
        return "regression"
    return "pass" if code == core.PASS and lower >= -math.log1p(constants.band) else "inconclusive"


def _above(code: int, lower: float, certainly_below: float, constants: RuleConstants, enough: bool) -> Outcome:
    """More, by however little; broken once two runs a side show that it is no more than the band, at 99.9 %."""
    if lower > 0:
        return "pass"
    return "regression" if enough and certainly_below < math.log1p(constants.band) else "inconclusive"


_OUTCOMES: dict[ClaimKind, Callable[[int, float, float, RuleConstants, bool], Outcome]] = {
    "ratio_at_least": _at_most,
    "saves_bytes": _at_most,
    "unchanged": _equal,
    "slower_than": _above,
    "order": _above,
}
