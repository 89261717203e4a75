"""What device memory must satisfy on every machine, whatever was recorded: it holds the weights once and comes back."""

from __future__ import annotations

from pytest_zimage.catalog import Variant
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import MeasurementError
from pytest_zimage.probes.leftover import ALLOWED_BYTES
from pytest_zimage.reports import units
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.model import Verdict
from pytest_zimage.verdict.rows import limit_row

RETURNED = "device_memory_returned"
HELD = "device_memory_held"
"""Checks against a limit, not a baseline: neither has a row in the catalogue."""


def unsaid(session: ZImageSession, record: RunRecord, name: str) -> str:
    """Why the machine of `record` cannot be asked `name`; empty where it can."""
    device = session.machine.device_class
    if session.machine.torch_device == "cpu":
        return "the CPU has no memory of its own"
    if device.unified_memory:
        return f"{device.title} shares the machine's memory, so nothing tells what of it a variant holds"
    if name == RETURNED:
        return "" if record.device_left_bytes is not None else f"NVML does not say what is in use on {record.device}"
    memory = record.memory
    said = (memory.device_held_bytes, memory.device_peak_bytes, record.loaded.device_peak_bytes, _weights(record))
    return "" if all(said) else f"{record.engine} on {record.device} does not say what its tensors hold"


def judge_returned(session: ZImageSession, test: str, variant: Variant) -> Verdict:
    """Whether the device's free memory was as before once the process of each run was gone."""
    records = _records(session, variant)
    left = {record.index: record.device_left_bytes for record in records if record.device_left_bytes is not None}
    if not left:
        raise MeasurementError(
            f"{variant.name}: no run says what device memory it left behind", mend="measure where NVML tells"
        )
    worst = max(left, key=lambda index: left[index])
    kept = left[worst] > ALLOWED_BYTES
    told = (
        f"{units.size(left[worst])} of device memory stayed in use for seconds after the process of run {worst + 1} was"
        f" gone; {units.size(ALLOWED_BYTES)} may",
        "another process may have taken it meanwhile: compare nvidia-smi before and after",
    )
    return limit_row(
        test,
        variant,
        RETURNED,
        unit="bytes",
        broken="NOT RETURNED" if kept else "",
        value=float(max(left[worst], 0)),
        k_new=len(left),
        band=float(ALLOWED_BYTES),
        notes=told if kept else (),
        injected=bool(session.injection),
    )


def judge_held(session: ZImageSession, test: str, variant: Variant) -> Verdict:
    """Whether the peak is the weights, counted from the loaded networks, plus what drawing took on top of them.

    torch says what its tensors ask of the device between images and the most they held while loading; neither may be
    off the count of the weights by more than the band of `device_peak`. So weights held twice, a dequantised copy kept
    after the first image and a load that needs twice the room each show, and what is left of the peak is activations.
    """
    records = _records(session, variant)
    metric = session.catalog.metrics["device_peak"]
    problems: list[str] = []
    for record in records:
        problems += _unexplained(record, metric.band, metric.band_absolute)
    first = records[0]
    weights, held, peak = _weights(first), first.memory.device_held_bytes or 0, first.memory.device_peak_bytes or 0
    sums = f"peak {units.size(peak)} = weights {units.size(weights)} + activations {units.size(peak - held)}"
    return limit_row(
        test,
        variant,
        HELD,
        unit="bytes",
        broken="NOT EXPLAINED" if problems else "",
        value=float(held),
        k_new=len(records),
        scale="relative",
        baseline=float(weights),
        change=held / weights - 1,
        band=max(metric.band, metric.band_absolute / weights),
        notes=(*problems, *([] if problems else [sums])),
        injected=bool(session.injection),
    )


def _unexplained(record: RunRecord, band: float, band_absolute: float) -> list[str]:
    weights, held, loading = _weights(record), record.memory.device_held_bytes, record.loaded.device_peak_bytes
    if held is None or loading is None:
        raise MeasurementError(
            f"run {record.index + 1} of {record.variant}: torch does not say what its tensors hold on {record.device}",
            mend="measure on a GPU with memory of its own",
        )
    room = max(band * weights, band_absolute)
    run = f"run {record.index + 1}: the weights are {units.size(weights)}"
    told = []
    if abs(held - weights) > room:
        told.append(f"{run}, and tensors hold {units.size(held)} between images")
    if loading - weights > room:
        told.append(f"{run}, and loading held up to {units.size(loading)}")
    return told


def _weights(record: RunRecord) -> int:
    return sum(record.loaded.weight_bytes.values())


def _records(session: ZImageSession, variant: Variant) -> list[RunRecord]:
    session.run(variant, 0)
    return session.book.recorded(variant.name)
