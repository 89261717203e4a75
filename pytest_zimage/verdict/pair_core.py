"""The rule for paired image scores on arrays: every row is one comparison. The only implementation there is.

A real verdict is one row (`paired.judge_paired`); the simulation in `benchmarks/paired_rule.py` is 20 000 of them, so
what is proved there holds here. With d_i = new - baseline of the same (prompt, seed), turned so that more is better:

    SE = max(sd(d), floor) / sqrt(n),  t quantiles with n - 1 degrees of freedom

Pass: mean - t_.975 SE > -margin. Regression: mean < -margin and mean + t_.999 SE < 0, or any d_i < -guard.
Improvement is the mirror of the first regression: a single image that is much better proves nothing.
MDE80 = max(margin + t_.8 SE, nc SE), where a noncentral t of noncentrality nc exceeds t_.999 in .8 of cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import nctdtrinc, stdtrit

from pytest_zimage.verdict.constants import ALPHA_FAIL, ALPHA_PASS
from pytest_zimage.verdict.core import IMPROVEMENT, INCONCLUSIVE, PASS, REGRESSION, Codes, Flags, Floats

MIN_PAIRS = 3
"""Fewer say nothing about their own spread: only the guard, which needs no spread, can then decide."""
MDE_POWER = 0.8
"""How often MDE80 is found."""


class PairDecision(NamedTuple):
    """R answers about n pairs each; differences are turned so that more is better."""

    outcome: Codes
    mean: Floats
    lower: Floats
    upper: Floats
    """95 % interval of the mean difference; NaN for a single pair."""
    spread: Floats
    """Standard deviation of the differences, not below the floor; NaN for a single pair."""
    mde: Floats
    """MDE80: the smallest drop found 8 times out of 10 with as many pairs; NaN below MIN_PAIRS."""
    guarded: Flags
    """Whether a single pair decided it."""


def decide_pairs(differences: Floats, *, margin: float, guard: float, floor: float) -> PairDecision:
    """Judge R comparisons of n pairs each; `differences` has shape (R, n)."""
    n = differences.shape[1]
    mean = differences.mean(axis=1)
    spread = np.full_like(mean, np.nan)
    if n > 1:
        spread = np.maximum(differences.std(axis=1, ddof=1), floor)
    guarded = np.asarray((differences < -guard).any(axis=1))
    return decide_means(mean, spread / np.sqrt(n), n - 1, margin=margin, spread=spread, guarded=guarded)


def decide_means(
    mean: Floats, error: Floats, dof: float, *, margin: float, spread: Floats, guarded: Flags
) -> PairDecision:
    """Judge R mean differences with their standard errors, by `dof` degrees of freedom."""
    enough = dof >= MIN_PAIRS - 1
    half, certain, power = (
        stdtrit(dof, p) * error if dof > 0 else np.full_like(mean, np.nan)
        for p in (1 - ALPHA_PASS, 1 - ALPHA_FAIL, MDE_POWER)
    )
    worse = guarded | (enough & (mean < -margin) & (mean + certain < 0))
    better = enough & (mean > margin) & (mean - certain > 0) & ~guarded
    passed = enough & (mean - half > -margin)
    outcome = np.select([worse, better, passed], [REGRESSION, IMPROVEMENT, PASS], INCONCLUSIVE)
    mde = np.full_like(mean, np.nan)
    if enough:
        # A drop is found when T exceeds its quantile, and T of a true drop follows the noncentral distribution.
        needed = nctdtrinc(dof, 1 - MDE_POWER, stdtrit(dof, 1 - ALPHA_FAIL))
        mde = np.maximum(margin + power, needed * error)
    return PairDecision(outcome.astype(np.int8), mean, mean - half, mean + half, spread, mde, guarded)


def settle_pairs(differences: Floats, stages: Sequence[int], *, margin: float, guard: float, floor: float) -> Codes:
    """Final outcomes when pairs are added, stage by stage, for as long as the answer is inconclusive.

    `differences` has shape (R, at least stages[-1]), the pairs in the order in which they are drawn; `stages` are the
    numbers of pairs, ascending.
    """
    outcome = np.full(len(differences), INCONCLUSIVE, dtype=np.int8)
    rows = np.arange(len(differences))
    for n in stages:
        outcome[rows] = decide_pairs(differences[rows, :n], margin=margin, guard=guard, floor=floor).outcome
        rows = rows[outcome[rows] == INCONCLUSIVE]
    return outcome
