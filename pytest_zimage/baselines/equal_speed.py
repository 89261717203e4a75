"""Times of several machines of one kind, as if all had multiplied, or read from their disks, equally fast.

GPUs of one kind differ: H200s at their power limit drew the same image in 0.884 to 0.922 s, and multiplied a large
matrix at 803 to 775 TFLOP/s. Disks differ more: theirs gave the same files at 1.3 to 2.9 GB/s. Each time goes with a
figure that was taken beside it, so between machines a change is judged at an equal figure; what one machine loses over
time is judged as it is. A single reading of a figure scatters, so a machine's is the mean of its runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Protocol

from pytest_zimage.probes.fitness import CanaryFigures

Rounds = tuple[float, ...]


class Timed(Protocol):
    """A fresh run's sample or a recorded run: seconds, and which machine took them how fast."""

    @property
    def rounds(self) -> Rounds: ...

    @property
    def phases(self) -> dict[str, float]: ...

    @property
    def canary(self) -> CanaryFigures | None: ...

    @property
    def disk_gb_s(self) -> float | None: ...

    @property
    def device(self) -> str: ...


@dataclass(frozen=True)
class Pace:
    """What machines of a kind differ in, and how a time goes with it."""

    figure: Callable[[Timed], float | None]
    share: Callable[[Timed], float]
    """Of the time, what is inversely proportional to the figure."""

    def of(self, run: Timed) -> float:
        """The figure; 0 where it, or the machine, is not known."""
        return (self.figure(run) if run.device else None) or 0.0


def _reading_share(run: Timed) -> float:
    return min(1.0, run.phases.get("read", 0.0) / fmean(run.rounds))


MULTIPLYING = Pace(lambda run: run.canary.matmul_tflops if run.canary is not None else None, lambda run: 1.0)
"""The matmul canary, in TFLOP/s."""
READING = Pace(lambda run: run.disk_gb_s if "read" in run.phases else None, _reading_share)
"""The disk's speed beside a load, in GB/s; what it holds up is the phase `read`."""


def pace_of(emptied: bool | None) -> Pace:
    """What goes with a time of which `emptied` says whether the page cache was empty; None: it is no cold load."""
    return MULTIPLYING if emptied is None else READING


def at_equal_speed(runs: Sequence[Timed], pace: Pace, like: Sequence[Timed] | None = None) -> list[Rounds] | None:
    """The rounds of `runs`, each machine's brought from its mean figure to that of `like` (None: of themselves).

    None where all are of one machine, and where one of them does not say its machine or its figure: then they are
    compared as they are.
    """
    every = [*runs, *(like or ())]
    if of_one_machine(every) or not all(pace.of(run) for run in every):
        return None
    reference = _centre(like if like is not None else runs, pace)
    own = {run.device: _centre([each for each in runs if each.device == run.device], pace) for run in runs}
    factors = [1 + pace.share(run) * (own[run.device] / reference - 1) for run in runs]
    return [tuple(seconds * factor for seconds in run.rounds) for run, factor in zip(runs, factors, strict=True)]


def of_one_machine(runs: Sequence[Timed]) -> bool:
    return len({run.device for run in runs}) < 2


def relative_speed(runs: Sequence[Timed], like: Sequence[Timed], pace: Pace) -> float:
    """How fast the machines of `runs` are, those of `like` being 1."""
    return _centre(runs, pace) / _centre(like, pace)


def _centre(runs: Sequence[Timed], pace: Pace) -> float:
    return math.exp(fmean(math.log(pace.of(run)) for run in runs))
