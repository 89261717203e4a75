"""Judging image scores of the same prompts and seeds: checked numbers in, a `Judgement` out.

The caller asks with the pairs it has drawn, draws further seeds while `wants_more` says so (`seed_stages`), and asks
again with all of them. `outcome` is always what holds if nothing more is drawn. The claim covers this prompt set only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct, structs

from pytest_zimage.catalog.model import Metric, PromptSet
from pytest_zimage.errors import BaselineError, MeasurementError, ZImageError
from pytest_zimage.verdict.model import Judgement, Outcome

if TYPE_CHECKING:
    from pytest_zimage.verdict.core import Floats
    from pytest_zimage.verdict.pair_core import PairDecision

_NAMED = 6
"""Most pairs that one note names."""


class Scores(Struct, frozen=True, kw_only=True):
    """What one scorer says of one variant's images."""

    scorer: str
    """Identity: library, architecture, weights and their hash. Scores of two scorers are never compared."""
    by_pair: dict[str, float]
    """`pair_name` -> score, in the metric's unit."""


class PairRule(Struct, frozen=True, kw_only=True):
    """The constants of one comparison, in the metric's unit."""

    metric: str
    higher: bool
    margin: float
    guard: float
    floor: float
    cap: float | None = None
    ceiling: float | None = None
    """The mean may not be above it, whatever the baseline."""

    @classmethod
    def of(cls, metric: Metric, *, margin: float | None = None, ceiling: float | None = None) -> PairRule:
        """The metric's constants; a margin of the baseline itself outranks the metric's."""
        return cls(
            metric=metric.name,
            higher=metric.direction == "higher",
            margin=metric.margin if margin is None else margin,
            guard=metric.guard,
            floor=metric.floor,
            cap=metric.cap,
            ceiling=ceiling,
        )

    def gain(self, new: float, base: float) -> float:
        """How much better `new` is."""
        return capped(new, self.cap) - capped(base, self.cap) if self.higher else base - new


class Side(Protocol):
    """Which error a fault on one side is."""

    def __call__(self, message: str, *, mend: str) -> ZImageError: ...


def pair_name(prompt: str, seed: int) -> str:
    """`photo_woman/42`, as scores, fingerprints and reports call an image."""
    return f"{prompt}/{seed}"


def prompt_of(pair: str) -> str:
    return pair.rpartition("/")[0]


def seed_stages(prompts: PromptSet) -> tuple[int, ...]:
    """How many further seeds a prompt gets, stage by stage: (0, 3, 6) is 3 -> 6 -> 9 seeds."""
    base = max(len(prompt.seeds) for prompt in prompts.prompts)
    most = max(len(prompt.more_seeds) for prompt in prompts.prompts)
    return (*range(0, most, base), most) if most else (0,)


def capped(score: float, cap: float | None) -> float:
    return score if cap is None else min(score, cap)


def judge_paired(
    new: Mapping[str, float],
    base: Mapping[str, float],
    pairs: Sequence[str],
    rule: PairRule,
    *,
    unfit: Mapping[str, str] | None = None,
    further: bool = False,
) -> Judgement:
    """Judge the scores of `pairs`, each in `new` and in `base`.

    `unfit` maps a prompt to why its score says nothing: its pairs are left out, and what is not a regression on the
    others is `unfit`. `further` tells whether more seeds can be drawn. Fewer than three pairs can only fail, by the
    guard or the ceiling. Raises `MeasurementError` or `BaselineError` naming the pairs that one side lacks.
    """
    unfit = unfit or {}
    fit = [pair for pair in pairs if prompt_of(pair) not in unfit]
    told = tuple(f"{rule.metric} says nothing of {prompt}: {why}" for prompt, why in unfit.items())
    new_side = take_pairs(new, fit, "measurement", MeasurementError, rule.cap)
    base_side = take_pairs(base, fit, "baseline", BaselineError, rule.cap)
    if not fit:
        if not unfit:
            raise MeasurementError(f"{rule.metric} has no pairs to judge", mend="draw at least one prompt and seed")
        return Judgement(outcome="unfit", scale="absolute", notes=told)
    gains = [rule.gain(n, b) for n, b in zip(new_side, base_side, strict=True)]
    decision = _decide(gains, rule)
    verdict = judgement(decision, new_side, base_side, rule, further=further)
    notes = [*verdict.notes, *_guard_notes(fit, new_side, base_side, gains, rule)]
    if len(fit) < 3:
        notes.append(f"{len(fit)} pairs do not show their own spread; a verdict on the mean takes 3")
    outcome: Outcome = "unfit" if unfit and verdict.outcome != "regression" else verdict.outcome
    return structs.replace(verdict, outcome=outcome, notes=(*notes, *told))


def _decide(gains: Sequence[float], rule: PairRule) -> PairDecision:
    import numpy as np

    from pytest_zimage.verdict import pair_core

    return pair_core.decide_pairs(np.array([gains]), margin=rule.margin, guard=rule.guard, floor=rule.floor)


def judgement(
    decision: PairDecision, new: Sequence[float], base: Sequence[float], rule: PairRule, *, further: bool
) -> Judgement:
    """The one row of `decision` as a `Judgement`, its changes new - base; the ceiling has the last word."""
    from pytest_zimage.verdict import core

    words: dict[int, Outcome] = {
        core.INCONCLUSIVE: "inconclusive",
        core.PASS: "pass",
        core.REGRESSION: "regression",
        core.IMPROVEMENT: "improvement",
    }
    outcome = words[int(decision.outcome[0])]
    low, high = float(decision.lower[0]), float(decision.upper[0])
    value = math.fsum(new) / len(new)
    notes = []
    if rule.ceiling is not None and value > rule.ceiling:
        outcome = "regression"
        notes.append(f"the mean {value:.4g} lies above this variant's ceiling of {rule.ceiling:.4g}")
    return Judgement(
        outcome=outcome,
        scale="absolute",
        value=value,
        baseline=math.fsum(base) / len(base),
        change=float(decision.mean[0]) * (1 if rule.higher else -1),
        interval=None if math.isnan(low) else (low, high) if rule.higher else (-high, -low),
        band=rule.margin,
        noise=_number(decision.spread),
        mde=_number(decision.mde),
        k_base=len(base),
        k_new=len(new),
        wants_more=further and outcome == "inconclusive",
        notes=tuple(notes),
    )


def take_pairs(
    scores: Mapping[str, float], pairs: Sequence[str], what: str, error: Side, cap: float | None = None
) -> list[float]:
    """The scores of `pairs` in their order; `error` naming those that are missing or no number."""
    missing = [pair for pair in pairs if pair not in scores]
    if missing:
        raise error(f"the {what} has no score of {named(missing)}", mend=_MENDS[what])
    values = [capped(scores[pair], cap) for pair in pairs]
    broken = [f"{pair} = {value}" for pair, value in zip(pairs, values, strict=True) if not math.isfinite(value)]
    if broken:
        raise error(f"the {what} has scores that are no numbers: {named(broken)}", mend=_MENDS[what])
    return values


_MENDS = {
    "measurement": "score every image again; look at the judge's log if it repeats",
    "baseline": "record these pairs too: --update-baselines, with --update-mode extend to keep the stored ones",
}


def named(pairs: Sequence[str]) -> str:
    """`a/1, a/2, b/1`, or the first six and how many more."""
    more = f" and {len(pairs) - _NAMED} more" if len(pairs) > _NAMED else ""
    return ", ".join(pairs[:_NAMED]) + more


def _guard_notes(
    pairs: Sequence[str], new: Sequence[float], base: Sequence[float], gains: Sequence[float], rule: PairRule
) -> list[str]:
    broken = sorted((gain, i) for i, gain in enumerate(gains) if gain < -rule.guard)
    if not broken:
        return []
    told = [f"{pairs[i]} {base[i]:.4g} -> {new[i]:.4g}" for _, i in broken]
    return [f"single images worse by more than {rule.guard:g}: {named(told)}"]


def _number(array: Floats) -> float | None:
    value = float(array[0])
    return None if math.isnan(value) else value
