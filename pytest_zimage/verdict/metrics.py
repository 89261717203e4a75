"""One table: metric name -> how its sample is taken out of a run. Whatever is judged or stored goes through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from msgspec import Struct

from pytest_zimage.engines.protocol import Round
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import MeasurementError
from pytest_zimage.probes.environment import DEVICE_ID, MACHINE_ID
from pytest_zimage.probes.fitness import CanaryFigures


class Sample(Struct, frozen=True, kw_only=True):
    """What one run says about one metric: rounds or an exact value, or neither and why."""

    rounds: tuple[float, ...] = ()
    """In the metric's unit; a metric taken once a run has one."""
    exact: int | dict[str, int] | None = None
    phases: dict[str, float] = {}
    """Mean seconds by phase, where the metric has phases."""
    emptied: bool | None = None
    """Cold load only: whether the page cache was empty. Runs are compared only with runs of the same kind."""
    canary: CanaryFigures | None = None
    """How fast the device was around the rounds, where it was timed."""
    device: str = ""
    """Which GPU of its kind took the rounds, for a cold load which machine; empty where that is not known."""
    disk_gb_s: float | None = None
    """Cold load only: how fast the disk read just before, where it was timed."""
    notes: tuple[str, ...] = ()
    """What to know of how it was taken."""
    unavailable: str = ""
    """Why this engine or machine cannot say; then there is neither rounds nor an exact value."""
    not_its_own: bool = False
    """`unavailable` though a figure was seen: it is not of this run alone, so none has vanished."""


def take(metric: str, record: RunRecord) -> Sample:
    """The sample of `metric` in one run.

    Raises `MeasurementError` when the record holds something that cannot be: no rounds, a time or size that is not
    positive, rounds that disagree on what must be equal.
    """
    if metric not in _TAKERS:
        raise MeasurementError(
            f"no run measures {metric!r}", mend=f"metrics that a run measures: {', '.join(sorted(_TAKERS))}"
        )
    return _TAKERS[metric](record)


def take_each(metric: str, records: Sequence[RunRecord]) -> tuple[list[Sample], tuple[str, ...]]:
    """The samples of several runs, and why there can be no more where a later run's figure is not its own.

    Such a sample is left out: it neither confirms nor refutes what the first one says. Raises as `take` does.
    """
    samples = [take(metric, record) for record in records]
    whole = [sample for number, sample in enumerate(samples) if not (number and sample.not_its_own)]
    why = dict.fromkeys(sample.unavailable for sample in samples[1:] if sample.not_its_own)
    return whole, tuple(f"{len(whole)} of {len(samples)} runs count, and no more can: {reason}" for reason in why)


def measurable() -> tuple[str, ...]:
    """Names of the metrics that `take` knows."""
    return tuple(_TAKERS)


def _warm_latency(record: RunRecord) -> Sample:
    rounds = _rounds(record)
    phases = {
        name: math.fsum(_phase(record, round_, name) for round_ in rounds) / len(rounds) for name in rounds[0].phases_s
    }
    times = tuple(_positive(record, "warm_latency", round_.seconds) for round_ in rounds)
    canary = record.fitness.canary() if record.fitness else CanaryFigures()
    timed = canary if canary != CanaryFigures() else None
    return Sample(rounds=times, phases=phases, canary=timed, device=record.environment.get(DEVICE_ID, ""))


def _cold_load(record: RunRecord) -> Sample:
    if record.cold.unavailable:
        return Sample(unavailable=record.cold.unavailable)
    total = _positive(record, "cold_load", record.cold.total_s)
    cold = record.cold
    return Sample(
        rounds=(total,),
        phases=dict(cold.phases_s),
        emptied=cold.emptied,
        device=record.environment.get(MACHINE_ID, ""),
        disk_gb_s=cold.disk_gb_s,
        notes=cold.notes,
    )


def _rss_peak(record: RunRecord) -> Sample:
    return _size(record, "rss_peak", _peak(record), _NO_PROCESS.format(record.engine))


def _working_set(record: RunRecord) -> Sample:
    peak, idle = _peak(record), record.rss_idle_bytes
    held = None if peak is None or idle is None else peak - _positive(record, "working_set", idle)
    return _size(record, "working_set", held, _NO_PROCESS.format(record.engine))


def _device_peak(record: RunRecord) -> Sample:
    why = f"{record.engine} on {record.device} reports no device memory"
    return _size(record, "device_peak", record.memory.device_peak_bytes, why)


def _gpu_process_peak(record: RunRecord) -> Sample:
    why = f"NVML lists no process of {record.engine} on {record.device}"
    return _size(record, "gpu_process_peak", record.memory.nvml_process_peak_bytes, why)


_NO_PROCESS = "{} does not say which process draws"


def _size(record: RunRecord, metric: str, size: float | None, otherwise: str) -> Sample:
    """The sample of a size in bytes; `otherwise` is why there is none where the engine does not say."""
    reason = record.memory.unavailable.get(metric, "")
    if reason:
        return Sample(unavailable=reason, not_its_own=size is not None)
    if size is None:
        # An engine that tells no reason by metric tells it among its notes.
        return Sample(unavailable=("" if record.memory.unavailable else "; ".join(record.memory.notes)) or otherwise)
    # As a stored one is read again, so that a file rewritten for another metric does not change here.
    return Sample(rounds=(float(_positive(record, metric, size)),))


def _disk_bytes(record: RunRecord) -> Sample:
    if record.disk_bytes is None:
        return Sample(unavailable=f"the files that {record.engine} reads are not on this host")
    return Sample(exact=int(_positive(record, "disk_bytes", record.disk_bytes)))


def _forwards(record: RunRecord) -> Sample:
    seen = {round_.forwards for round_ in _rounds(record)}
    if None in seen:
        return Sample(unavailable=f"{record.engine} does not count forwards")
    counts = sorted(count for count in seen if count is not None)
    if len(counts) > 1:
        raise MeasurementError(
            f"{_where(record)}: forwards differ between rounds: {', '.join(map(str, counts))}",
            mend="the sampler must run the same number of steps every time; look at the workload's steps",
        )
    return Sample(exact=int(_positive(record, "forwards", counts[0])))


def _counts(name: str, read: Callable[[RunRecord], Mapping[str, int]]) -> Callable[[RunRecord], Sample]:
    def taker(record: RunRecord) -> Sample:
        counts = dict(read(record))
        if not counts:
            return Sample(unavailable=f"{record.engine} does not report {name}")
        for key, count in counts.items():
            _positive(record, f"{name}[{key}]", count)
        return Sample(exact=counts)

    return taker


def _dispatch(record: RunRecord) -> Sample:
    if record.dispatch is not None and not record.dispatch:
        raise MeasurementError(
            f"{_where(record)}: the traced image called nothing", mend="an engine that cannot trace leaves the map None"
        )
    return _counts("dispatch", lambda run: run.dispatch or {})(record)


_TAKERS: dict[str, Callable[[RunRecord], Sample]] = {
    "warm_latency": _warm_latency,
    "cold_load": _cold_load,
    "rss_peak": _rss_peak,
    "working_set": _working_set,
    "device_peak": _device_peak,
    "gpu_process_peak": _gpu_process_peak,
    "disk_bytes": _disk_bytes,
    "weight_bytes": _counts("weight_bytes", lambda record: record.loaded.weight_bytes),
    "tensors": _counts("tensors", lambda record: record.loaded.tensors),
    "linears": _counts("linears", lambda record: record.loaded.compute),
    "forwards": _forwards,
    "dispatch": _dispatch,
}


def _peak(record: RunRecord) -> int | None:
    """The kernel's mark and the sampler see the same process; the higher one is right."""
    seen = (record.memory.rss_peak_bytes, record.memory.rss_sampled_peak_bytes)
    return max((size for size in seen if size is not None), default=None)


def _rounds(record: RunRecord) -> tuple[Round, ...]:
    if not record.rounds:
        raise MeasurementError(f"{_where(record)} has no timed rounds", mend="ask for at least one: --zimage-rounds 1")
    return record.rounds


def _phase(record: RunRecord, round_: Round, name: str) -> float:
    if name not in round_.phases_s:
        raise MeasurementError(f"{_where(record)}: a round lacks the phase {name!r}", mend="measure again")
    return round_.phases_s[name]


def _positive(record: RunRecord, name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise MeasurementError(
            f"{_where(record)}: {name} is {value}; it must be positive and finite", mend="measure again"
        )
    return value


def _where(record: RunRecord) -> str:
    return f"run {record.index} of {record.variant}"
