"""Numbers that may not enter a judgement. Nothing here is mended silently: each is an error that says which value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from pytest_zimage.errors import BaselineError, MeasurementError, ZImageError

Runs = Sequence[Sequence[float]]
"""Runs, each with its rounds, in the metric's unit. Runs may differ in their number of rounds."""


class Summary(Protocol):
    """A printed {n, mean, std}, as published tables have it."""

    @property
    def n(self) -> int: ...
    @property
    def mean(self) -> float: ...
    @property
    def std(self) -> float: ...


_MENDS: dict[type[ZImageError], str] = {
    MeasurementError: "measure again; if it repeats, the engine's report is wrong",
    BaselineError: "record it again: --update-baselines",
}


def require_runs(runs: Runs, error: type[ZImageError]) -> Runs:
    """`runs` again; `error`, which also names the side, if there are none or a value is not positive and finite."""
    side = "measurement" if error is MeasurementError else "baseline"
    if not runs:
        raise error(f"the {side} has no runs", mend=_MENDS[error])
    for number, rounds in enumerate(runs, 1):
        if not rounds:
            raise error(f"run {number} of the {side} has no rounds", mend=_MENDS[error])
        for index, value in enumerate(rounds, 1):
            if not (math.isfinite(value) and value > 0):
                raise error(
                    f"run {number}, round {index} of the {side} is {value}; it must be positive and finite",
                    mend=_MENDS[error],
                )
    return runs


def require_summary(base: Summary) -> Summary:
    """`base` again; `BaselineError` if it cannot be judged against."""
    sound = math.isfinite(base.mean) and base.mean > 0 and math.isfinite(base.std) and base.std >= 0 and base.n >= 1
    if not sound:
        raise BaselineError(
            f"the published summary n={base.n}, mean={base.mean}, std={base.std} is not usable",
            mend="n must be at least 1, mean positive, std not negative, all finite",
        )
    return base
