"""Judging one metric of one variant: checked numbers in, a `Judgement` out.

The caller measures one fresh run at a time and asks again with all runs so far, for as long as `wants_more` says so.
`outcome` is always what holds if nothing more is measured.

A first run beyond the band on the good side passes, and wants a second one: "improvement" takes two, as "regression"
does. When the second is not beyond the band, it stays a pass.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.errors import BaselineError, MeasurementError, ZImageError
from pytest_zimage.verdict.checks import Runs, Summary, require_runs, require_summary
from pytest_zimage.verdict.constants import RuleConstants
from pytest_zimage.verdict.model import Judgement, Outcome

if TYPE_CHECKING:
    from pytest_zimage.verdict.core import BaseSide, Floats


def run_score(rounds: Sequence[float]) -> float:
    """Score of one run: 20 % trimmed mean of its log values."""
    from pytest_zimage.verdict import core

    return float(core.run_scores(require_runs([rounds], MeasurementError)[0]))


def judge(new: Runs, base: Runs | Summary, constants: RuleConstants) -> Judgement:
    """Judge the fresh runs so far against recorded runs or a published summary.

    Raises `MeasurementError` or `BaselineError` for an empty sample or a value that is not positive and finite.
    """
    new_scores, base_side = _scores(new, base)
    return _decide(new_scores, base_side, constants)


def judge_control(
    new: Runs, base: Runs | Summary, control_new: Runs, control_base: Runs | Summary, constants: RuleConstants
) -> Judgement:
    """Judge the ratio of the variant to a control variant (bf16) that ran in the same session, by the same rule.

    It removes whatever slowed the whole machine. Runs are paired in their order; those without a partner are left out.
    `value` and `baseline` are ratios. A published variant needs a published control.
    """
    from pytest_zimage.verdict import core

    new_scores, base_side = _scores(new, base)
    control_scores, control_side = _scores(control_new, control_base)
    pairs = min(new_scores.size, control_scores.size)
    ratios = new_scores[:, :pairs] - control_scores[:, :pairs]
    if isinstance(base, Sequence) and isinstance(control_base, Sequence):
        kept = min(len(base), len(control_base))
        ratio = _row(base, BaselineError)[:, :kept] - _row(control_base, BaselineError)[:, :kept]
        base_side = core.base_of_scores(ratio)
    elif isinstance(base, Sequence) or isinstance(control_base, Sequence):
        raise BaselineError(
            "the ratio to the control cannot be judged: one side is a published summary, the other recorded runs",
            mend="record both variants in one session: --update-baselines",
        )
    else:
        base_side = core.BaseSide(
            base_side.centre - control_side.centre,
            base_side.squares,
            base_side.k,
            base_side.extra_variance + control_side.extra_variance,
        )
    # An absolute band has no meaning for a ratio.
    constants = structs.replace(constants, band_absolute=0.0)
    return _decide(ratios, base_side, constants)


def _decide(new_scores: Floats, base: BaseSide, constants: RuleConstants) -> Judgement:
    from pytest_zimage.verdict import core

    decision = core.decide(new_scores, base, constants)
    words: dict[int, Outcome] = {
        core.INCONCLUSIVE: "inconclusive",
        core.PASS: "pass",
        core.REGRESSION: "regression",
        core.IMPROVEMENT: "improvement",
    }
    return Judgement(
        outcome=words[int(decision.outcome[0])],
        value=math.exp(float(new_scores.mean())),
        baseline=math.exp(float(base.centre[0])),
        change=math.expm1(float(decision.change[0])),
        interval=(math.expm1(float(decision.lower[0])), math.expm1(float(decision.upper[0]))),
        band=float(decision.band[0]),
        noise=float(decision.noise[0]),
        mde=float(decision.mde[0]),
        k_base=base.k,
        k_new=new_scores.shape[1],
        wants_more=bool(decision.wants_more[0]),
    )


def _scores(new: Runs, base: Runs | Summary) -> tuple[Floats, BaseSide]:
    """Scores of the new runs, shape (1, k), and the base side; like is scored with like."""
    import numpy as np

    from pytest_zimage.verdict import core

    if isinstance(base, Sequence):
        return _row(new, MeasurementError), core.base_of_scores(_row(base, BaselineError))
    require_summary(base)
    means = [math.fsum(rounds) / len(rounds) for rounds in require_runs(new, MeasurementError)]
    return np.log([means]), core.base_of_summary(base.n, base.mean, base.std)


def _row(runs: Runs, error: type[ZImageError]) -> Floats:
    import numpy as np

    from pytest_zimage.verdict import core

    return np.array([[float(core.run_scores(rounds)) for rounds in require_runs(runs, error)]])
