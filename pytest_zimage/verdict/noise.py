"""What recorded runs say about a machine's noise, and which of them are too far out to record."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

from pytest_zimage.catalog.model import Metric
from pytest_zimage.verdict.checks import Runs
from pytest_zimage.verdict.constants import PRIOR_DOF, PooledNoise
from pytest_zimage.verdict.rule import run_score

GATE_SDS = 5.0
_MAD_TO_SD = 1.4826
"""Of a normal distribution: 1 / quantile(0.75)."""


def pooled_noise(baselines: Iterable[Runs]) -> PooledNoise | None:
    """Run-to-run deviation pooled over *other* variants' recorded runs of the same machine and metric.

    None until they have the degrees of freedom that the prior counts for.
    """
    squares, dof = 0.0, 0
    for runs in baselines:
        scores = [run_score(rounds) for rounds in runs]
        if len(scores) > 1:
            centre = statistics.fmean(scores)
            squares += math.fsum((score - centre) ** 2 for score in scores)
            dof += len(scores) - 1
    return PooledNoise(s0=math.sqrt(squares / dof), dof=dof) if dof >= PRIOR_DOF else None


def runs_to_remeasure(runs: Mapping[str, Runs], metric: Metric) -> dict[str, tuple[int, ...]]:
    """The record-time gate: positions in `runs` of each variant that lie more than 5 pooled MAD-SDs from its median.

    The deviation is pooled over all variants given and never below the metric's floor, so that identical values do not
    make the next byte an outlier.
    """
    deviations: dict[str, list[float]] = {}
    for variant, fresh in runs.items():
        scores = [run_score(rounds) for rounds in fresh]
        median = statistics.median(scores)
        deviations[variant] = [abs(score - median) for score in scores]
    if not deviations:
        return {}
    pooled = _MAD_TO_SD * statistics.median(d for row in deviations.values() for d in row)
    limit = GATE_SDS * max(pooled, metric.floor)
    found = {name: tuple(i for i, d in enumerate(row) if d > limit) for name, row in deviations.items()}
    return {name: positions for name, positions in found.items() if positions}
