"""Timed rounds of several GPUs of one kind, as if all had multiplied equally fast.

GPUs of one kind differ: H200s at their power limit drew the same image in 0.884 to 0.922 s, and multiplied a large
matrix at 803 to 775 TFLOP/s. Time and canary go together, so between GPUs a change is judged at equal canary; what one
GPU loses over time is judged as it is. A single reading of a canary scatters by 0.4 %, images less, so a GPU's speed is
the mean of its runs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Protocol

from pytest_zimage.probes.fitness import CanaryFigures

Rounds = tuple[float, ...]


class Timed(Protocol):
    """A fresh run's sample or a recorded run: seconds, and which GPU took them how fast."""

    @property
    def rounds(self) -> Rounds: ...

    @property
    def canary(self) -> CanaryFigures | None: ...

    @property
    def device(self) -> str: ...


def at_equal_speed(runs: Sequence[Timed], like: Sequence[Timed] | None = None) -> list[Rounds] | None:
    """The rounds of `runs`, each GPU's brought from its mean matmul canary to that of `like` (None: of themselves).

    None where all are of one GPU, and where one of them does not say its GPU or its canary: then they are compared as
    they are.
    """
    every = [*runs, *(like or ())]
    if len({run.device for run in every}) < 2:
        return None
    speeds = [_speed(run) for run in every]
    if not all(speeds):
        return None
    reference = _centre(like if like is not None else runs)
    own = {run.device: _centre([each for each in runs if each.device == run.device]) for run in runs}
    return [tuple(seconds * own[run.device] / reference for seconds in run.rounds) for run in runs]


def relative_speed(runs: Sequence[Timed], like: Sequence[Timed]) -> float:
    """How fast the GPUs of `runs` multiply, those of `like` being 1."""
    return _centre(runs) / _centre(like)


def _speed(run: Timed) -> float:
    """Matmul canary in TFLOP/s; 0 where it, or the GPU, is not known."""
    known = run.canary.matmul_tflops if run.canary is not None and run.device else None
    return known or 0.0


def _centre(runs: Sequence[Timed]) -> float:
    return math.exp(fmean(math.log(_speed(run)) for run in runs))
