"""Readings that are not so, to prove that a machine can be found unfit: `--zimage-inject fitness=...`."""

from __future__ import annotations

from typing import Literal

from msgspec import structs

from pytest_zimage.catalog.device_class import FitnessLimits
from pytest_zimage.probes.fitness import CanaryFigures, GpuProcess, Reading

Moment = Literal["before", "after"]
_STRANGER = GpuProcess(4711, "(injected)", 3_100_000_000)
_MADE_UP_TFLOPS = 100.0
"""The canary of a device that has none, so that every machine can show a low one."""


def simulated(reading: Reading, fault: str, moment: Moment) -> Reading:
    """`reading` as it would be with `fault`: `throttle`, `process`, or `canary:SHARE`, which slows what comes after."""
    kind, _, share = fault.partition(":")
    if kind == "throttle":
        return structs.replace(reading, throttle=(*(reading.throttle or ()), "thermal throttle"))
    if kind == "process":
        return structs.replace(reading, processes=(*(reading.processes or ()), _STRANGER))
    if kind == "canary":
        true = reading.canary.matmul_tflops or _MADE_UP_TFLOPS
        shown = true if moment == "before" else true * float(share)
        figures = CanaryFigures(matmul_tflops=shown, copy_gb_s=reading.canary.copy_gb_s)
        return structs.replace(reading, canary=figures)
    return reading


def limits_for(limits: FitnessLimits, fault: str) -> FitnessLimits:
    """`limits`; where a machine is not judged, a fault put in on purpose counts all the same, and nothing else."""
    if limits.judged or not fault:
        return limits
    return structs.replace(limits, judged=True, host_load=1.0, swap_growth_bytes=1 << 62)
