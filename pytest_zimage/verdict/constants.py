"""The constants of one comparison, gathered from the catalogue, and the noise a machine has shown."""

from __future__ import annotations

from msgspec import Struct

from pytest_zimage.catalog.device_class import DeviceClass
from pytest_zimage.catalog.model import Metric

PRIOR_DOF = 8
"""nu0: how many degrees of freedom the prior run-to-run deviation counts for (moderated variance)."""
ALPHA_FAIL = 0.001
"""One-sided, fixed per comparison: never a function of how many tests were selected."""
ALPHA_PASS = 0.025
TRIM = 0.2
"""Share cut from each end of a run's sorted log times."""
MDE_POWER = 0.9
"""Quantile of t that the second term of MDE80 takes: the rule needs two runs beyond, and .9 squared is .8."""
MDE_RUNS = 3


class PooledNoise(Struct, frozen=True, kw_only=True):
    """Run-to-run standard deviation that the other variants' baselines of this machine show."""

    s0: float
    dof: int


class RuleConstants(Struct, frozen=True, kw_only=True):
    """Everything the rule needs beside the runs; deviations and the band are relative."""

    prior: float
    floor: float
    band: float
    band_absolute: float
    max_runs: int

    @classmethod
    def of(
        cls,
        metric: Metric,
        *,
        device: DeviceClass | None = None,
        band: float | None = None,
        band_absolute: float | None = None,
        pooled: PooledNoise | None = None,
        max_runs: int | None = None,
    ) -> RuleConstants:
        """The metric's constants. A band of the baseline itself (`band`) outranks the device's, that the metric's."""
        of_device = device.bands.get(metric.name) if device else None
        return cls(
            prior=pooled.s0 if pooled and pooled.dof >= PRIOR_DOF else metric.prior,
            floor=metric.floor,
            band=_first(band, of_device, metric.band),
            band_absolute=_first(band_absolute, metric.band_absolute),
            max_runs=metric.max_runs if max_runs is None else max_runs,
        )


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)
