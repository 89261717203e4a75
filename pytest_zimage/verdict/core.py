"""The decision rule on arrays: every row is one comparison. The only implementation there is.

A real verdict is one row (`rule.judge`); the simulation in `benchmarks/decision_rule.py` is 20 000 of them, so what is
proved there holds here. Scores are logarithms, so differences are relative changes; `expm1` turns them back.

With m_j the score of run j, d = mean(m_new) - mean(m_base) and nu0 = 8:

    s^2 = max((nu0 s0^2 + SS_base + SS_new) / dof, floor^2),  dof = nu0 + (k_base - 1) + (k_new - 1)
    SE  = s sqrt(1/k_base + 1/k_new)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtrit

from pytest_zimage.verdict.constants import ALPHA_FAIL, ALPHA_PASS, MDE_POWER, MDE_RUNS, PRIOR_DOF, TRIM, RuleConstants

Floats = NDArray[np.float64]
Codes = NDArray[np.int8]
Flags = NDArray[np.bool_]

INCONCLUSIVE, PASS, REGRESSION, IMPROVEMENT = range(4)


class BaseSide(NamedTuple):
    """What the new runs are compared with: R baselines of k runs each."""

    centre: Floats
    """Mean score, shape (R,)."""
    squares: Floats
    """Sum of squared deviations of the scores from their mean, shape (R,)."""
    k: int
    extra_variance: Floats
    """Variance of the centre beyond run-to-run: that of a printed mean. Shape (R,)."""


class Decision(NamedTuple):
    """R answers after k new runs."""

    outcome: Codes
    """What holds if nothing more is measured."""
    wants_more: Flags
    change: Floats
    """d, in logarithms; so are the bounds."""
    lower: Floats
    upper: Floats
    """95 % interval of d."""
    noise: Floats
    """s"""
    band: Floats
    """Effective relative band."""
    mde: Floats
    """MDE80, relative."""


def run_scores(rounds: Any, axis: int = -1) -> Floats:
    """20 % trimmed mean of the logarithms along `axis`; the same as `scipy.stats.trim_mean`, without its import."""
    logs = np.sort(np.log(np.asarray(rounds, dtype=np.float64)), axis=axis)
    cut = int(TRIM * logs.shape[axis])
    kept = np.take(logs, np.arange(cut, logs.shape[axis] - cut), axis=axis)
    return np.asarray(kept.mean(axis=axis), dtype=np.float64)


def base_of_scores(scores: Floats) -> BaseSide:
    """Baselines of recorded runs; scores of shape (R, k)."""
    centre = scores.mean(axis=1)
    squares = np.square(scores - centre[:, None]).sum(axis=1)
    return BaseSide(centre, squares, scores.shape[1], np.zeros_like(centre))


def base_of_summary(n: Any, mean: Any, std: Any) -> BaseSide:
    """Baselines known only as a printed {n, mean, std}: one run, whose mean is known to (std/mean)^2 / n."""
    mean = np.atleast_1d(np.asarray(mean, dtype=np.float64))
    variance = np.square(np.asarray(std) / mean) / np.asarray(n)
    return BaseSide(np.log(mean), np.zeros_like(mean), 1, variance)


def decide(new: Floats, base: BaseSide, constants: RuleConstants) -> Decision:
    """Judge R comparisons of k new runs each; `new` holds their scores, shape (R, k)."""
    k = new.shape[1]
    deviations = new - base.centre[:, None]
    change = deviations.mean(axis=1)
    squares = base.squares + np.square(deviations - change[:, None]).sum(axis=1)
    dof = PRIOR_DOF + (base.k - 1) + (k - 1)
    variance = (PRIOR_DOF * constants.prior**2 + squares) / dof
    noise = np.sqrt(np.maximum(variance, constants.floor**2))

    def error(k_new: int) -> Floats:
        variance_of_change = np.square(noise) * (1 / base.k + 1 / k_new) + base.extra_variance
        return np.asarray(np.sqrt(variance_of_change), dtype=np.float64)

    band = np.maximum(constants.band, constants.band_absolute / np.exp(base.centre))
    edge = np.log1p(band)
    half_width = stdtrit(dof, 1 - ALPHA_PASS) * error(k)
    certain = stdtrit(dof, 1 - ALPHA_FAIL) * error(k)

    regression = _beyond(deviations, change, edge) & (change - certain > 0)
    improvement = _beyond(-deviations, -change, edge) & (change + certain < 0)
    passed = (change + half_width <= edge) & ~regression & ~improvement
    outcome = np.select([regression, improvement, passed], [REGRESSION, IMPROVEMENT, PASS], INCONCLUSIVE)
    # A run beyond the band on the good side passes at once; whether it is an improvement takes a second one to say.
    maybe_improved = passed & (deviations < -edge[:, None]).all(axis=1)
    wants_more = ((outcome == INCONCLUSIVE) | maybe_improved) & (k < constants.max_runs)

    dof_at_most = PRIOR_DOF + (base.k - 1) + (MDE_RUNS - 1)
    steps = [stdtrit(dof_at_most, p) * error(MDE_RUNS) for p in (1 - ALPHA_FAIL, MDE_POWER)]
    mde = np.expm1(np.maximum(edge, steps[0]) + steps[1])
    return Decision(
        outcome.astype(np.int8), wants_more, change, change - half_width, change + half_width, noise, band, mde
    )


def _beyond(deviations: Floats, change: Floats, edge: Floats) -> Flags:
    """At least two runs each beyond the band, and the mean of all."""
    return np.asarray(((deviations > edge[:, None]).sum(axis=1) >= 2) & (change > edge))


def settle(new: Floats, base: BaseSide, constants: RuleConstants) -> Codes:
    """Final outcomes when runs are taken one at a time for as long as the rule wants more; `new` has shape (R, max)."""
    outcome = np.full(len(new), INCONCLUSIVE, dtype=np.int8)
    rows = np.arange(len(new))
    for k in range(1, min(new.shape[1], constants.max_runs) + 1):
        side = BaseSide(base.centre[rows], base.squares[rows], base.k, base.extra_variance[rows])
        decision = decide(new[rows, :k], side, constants)
        outcome[rows] = decision.outcome
        rows = rows[decision.wants_more]
        if not rows.size:
            break
    return outcome
