"""Fresh runs against recorded ones of perhaps another machine: as timed, and at equal speed where both sides say it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from msgspec import structs

from pytest_zimage.baselines.equal_speed import (
    READING,
    Pace,
    Timed,
    at_equal_speed,
    of_one_machine,
    pace_of,
    relative_speed,
)
from pytest_zimage.baselines.schema import BaseRun, MetricBaseline, Published
from pytest_zimage.verdict.constants import RuleConstants
from pytest_zimage.verdict.metrics import Sample
from pytest_zimage.verdict.model import Judgement
from pytest_zimage.verdict.rule import judge

_UNKNOWN_DISK = (
    "recorded on another machine, and of one of the two it is not known how fast its disk reads: the change may be the "
    "disk's"
)
_FASTER_DISK = (
    "recorded on another machine, whose disk is slower: this load took no longer, but makes less of its disk; whether "
    "that is the software or what else limits a load cannot be told"
)
ENOUGH = 3
"""Runs that say how fast their machine was, below which the noise of a single one would be taken for the baseline."""


class Recorded(NamedTuple):
    """A metric's stored runs of one kind: cold loads with the page cache emptied or not (None: no cold load)."""

    runs: list[BaseRun]
    others: list[list[BaseRun]]
    """Of the other variants, one list each."""
    pace: Pace

    @classmethod
    def of(cls, stored: MetricBaseline, others: Sequence[MetricBaseline], emptied: bool | None) -> Recorded:
        return cls(alike(stored.runs, emptied), [alike(other.runs, emptied) for other in others], pace_of(emptied))

    def noise(self) -> list[Sequence[Sequence[float]]]:
        """The rounds of the other variants' runs; of runs on several machines only what differs beside their speed."""
        found: list[Sequence[Sequence[float]]] = []
        for runs in self.others:
            beside = [run for each in (self.runs, *self.others) if each is not runs for run in each]
            level = at_equal_speed([run for run in runs if self.pace.of(run)], self.pace, recorded=beside)
            found.append(level or [run.rounds for run in runs])
        return found


def judge_between(
    samples: Sequence[Sample], base: Published | Sequence[Sequence[float]], recorded: Recorded, constants: RuleConstants
) -> Judgement:
    """Judge against `base`, the rounds of `recorded`, or what was published.

    `unfit` when a cold load changed on another machine and the disks may have done it.
    """
    pace, runs = recorded.pace, recorded.runs
    # Of a baseline that grew over time the older runs may not say; if enough others do, these are compared.
    paced = [run for run in runs if pace.of(run)]
    beside = [run for other in recorded.others for run in other]
    level = at_equal_speed(samples, pace, paced, beside) if len(paced) >= ENOUGH else None
    verdict = as_timed = judge([sample.rounds for sample in samples], base, constants)
    if level is not None:
        level_base = at_equal_speed(paced, pace, recorded=beside) or [run.rounds for run in paced]
        verdict = judge(level, level_base, constants)
        verdict = structs.replace(verdict, speed=relative_speed(samples, paced, pace, beside))
    every: list[Timed] = [*samples, *runs]
    if pace is READING and runs and not of_one_machine(every):
        return _of_another_disk(as_timed, None if level is None else verdict)
    return verdict


def alike(runs: Sequence[BaseRun], emptied: bool | None) -> list[BaseRun]:
    return [run for run in runs if run.emptied == emptied]


def _of_another_disk(as_timed: Judgement, at_level: Judgement | None) -> Judgement:
    """What may be said of a cold load `as_timed` on another machine than recorded; `at_level`: at equal speed.

    Not every load is limited by its disk: where one disk is faster and the load is not, equal speed makes it look slow,
    and where one is slower and the load is not, fast.
    """
    slower, faster = _beyond_band(as_timed)
    if at_level is None:
        unknown = structs.replace(as_timed, outcome="unfit", wants_more=False, notes=(_UNKNOWN_DISK,))
        return unknown if slower or faster else as_timed
    slower_at_level, faster_at_level = _beyond_band(at_level)
    if slower_at_level and not slower:
        return structs.replace(at_level, outcome="unfit", wants_more=False, notes=(_FASTER_DISK,))
    if faster_at_level and not faster:
        return structs.replace(at_level, outcome="pass", wants_more=False)
    return at_level


def _beyond_band(verdict: Judgement) -> tuple[bool, bool]:
    """Whether it is slower by more than the band, and whether it is faster."""
    assert verdict.change is not None
    assert verdict.band is not None
    return verdict.change > verdict.band, verdict.change < -verdict.band
