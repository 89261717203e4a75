"""Times of several machines of one kind, as if all had multiplied, or read from their disks, equally fast.

GPUs of one kind differ: H200s at their power limit drew the same image in 0.884 to 0.922 s, and multiplied a large
matrix at 803 to 775 TFLOP/s. Disks differ more: theirs gave the same files at 1.3 to 2.9 GB/s. Each time goes with a
figure that was taken beside it, so between machines a change is judged at an equal figure; what one machine loses over
time is judged as it is. A single reading of a figure scatters, so a machine's is the mean of its runs: how fast a GPU
multiplies depends on the heat of what it does, but a disk is the same for whoever reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
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
    of_any_variant: bool
    """Whether runs of other variants on a machine say the figure as well."""

    def of(self, run: Timed) -> float:
        """The figure; 0 where it, or the machine, is not known."""
        return (self.figure(run) if run.device else None) or 0.0


def _reading_share(run: Timed) -> float:
    return min(1.0, run.phases.get("read", 0.0) / fmean(run.rounds))


MULTIPLYING = Pace(lambda run: run.canary.matmul_tflops if run.canary is not None else None, lambda run: 1.0, False)
"""The matmul canary, in TFLOP/s."""
READING = Pace(lambda run: run.disk_gb_s if "read" in run.phases else None, _reading_share, True)
"""The disk's speed beside a load, in GB/s; what it holds up is the phase `read`."""


def pace_of(emptied: bool | None) -> Pace:
    """What goes with a time of which `emptied` says whether the page cache was empty; None: it is no cold load."""
    return MULTIPLYING if emptied is None else READING


def at_equal_speed(
    runs: Sequence[Timed], pace: Pace, like: Sequence[Timed] | None = None, recorded: Sequence[Timed] = ()
) -> list[Rounds] | None:
    """The rounds of `runs`, each machine's brought from its mean figure to that of `like` (None: of themselves).

    `recorded` are further baseline runs on the machines of `like`, of other variants. None where all are of one
    machine, and where one of them does not say its machine or its figure: then they are compared as they are.
    """
    base = runs if like is None else like
    every = [*runs, *base]
    if of_one_machine(every) or not all(pace.of(run) for run in every):
        return None
    theirs = _by_machine(base, pace, recorded)
    own = theirs if like is None else _by_machine(runs, pace)
    reference = _mean(theirs[run.device] for run in base)
    factors = [1 + pace.share(run) * (own[run.device] / reference - 1) for run in runs]
    return [tuple(seconds * factor for seconds in run.rounds) for run, factor in zip(runs, factors, strict=True)]


def of_one_machine(runs: Sequence[Timed]) -> bool:
    return len({run.device for run in runs}) < 2


def relative_speed(runs: Sequence[Timed], like: Sequence[Timed], pace: Pace, recorded: Sequence[Timed] = ()) -> float:
    """How fast the machines of `runs` are, those of `like` being 1."""
    theirs = _by_machine(like, pace, recorded)
    return _mean(map(pace.of, runs)) / _mean(theirs[run.device] for run in like)


def _by_machine(runs: Sequence[Timed], pace: Pace, recorded: Sequence[Timed] = ()) -> dict[str, float]:
    """The mean figure of each machine that made one of `runs`."""
    known = [*runs, *(recorded if pace.of_any_variant else ())]
    return {
        device: _mean(pace.of(run) for run in known if run.device == device and pace.of(run))
        for device in dict.fromkeys(run.device for run in runs)
    }


def _mean(figures: Iterable[float]) -> float:
    return math.exp(fmean(map(math.log, figures)))
