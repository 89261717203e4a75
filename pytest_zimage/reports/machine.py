"""What was read of the machine around a timed block, and how much of the device a latency makes use of, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from pytest_zimage.probes.fitness import CANARIES, Fitness, figure, gigabytes
from pytest_zimage.reports import units
from pytest_zimage.verdict.model import Verdict

_SCALES = ((1e12, "T"), (1e9, "G"), (1e6, "M"))


def fitness_lines(runs: Sequence[Fitness]) -> tuple[str, ...]:
    """A line or two a run: clocks and heat, the canary, who else was there, how long was waited, what is unknown."""
    lines: list[str] = []
    for number, fitness in enumerate(runs, 1):
        told = "; ".join(
            part for part in (_gpu(fitness), _canary(fitness), _company(fitness), _effort(fitness)) if part
        )
        lines.append(f"new run {number}: {told or 'nothing could be read'}")
    unknown = dict.fromkeys(text for fitness in runs for reading in fitness.readings() for text in reading.unknown)
    return (*lines, *([f"unknown: {'; '.join(unknown)}"] if unknown else []))


def _gpu(fitness: Fitness) -> str:
    readings = list(fitness.readings())
    busy = fitness.during or fitness.after or fitness.before
    parts: list[str] = []
    if busy.sm_clock_mhz is not None:
        most = max((reading.sm_clock_max_mhz or 0 for reading in readings), default=0)
        parts.append(f"SM clock {busy.sm_clock_mhz:,}{f' of {most:,}' if most else ''} MHz")
    if heat := [reading.temperature_c for reading in readings if reading.temperature_c is not None]:
        parts.append(f"{max(heat)} C")
    if power := [reading.power_w for reading in readings if reading.power_w is not None]:
        limits = [reading.power_limit_w for reading in readings if reading.power_limit_w is not None]
        parts.append(f"{max(power):.0f}{f' of {max(limits):.0f}' if limits else ''} W")
    return ", ".join([*parts, *fitness.throttles()])


def _canary(fitness: Fitness) -> str:
    parts: list[str] = []
    for title, unit, key in CANARIES:
        timed = [getattr(reading.canary, key) for reading in (fitness.before, fitness.after) if reading]
        if known := [figure(value) for value in timed if value is not None]:
            parts.append(f"{title} {' -> '.join(known)} {unit}")
    return f"canary {', '.join(parts)}" if parts else ""


def _company(fitness: Fitness) -> str:
    parts = [
        process.title + (f" holds {gigabytes(process.bytes)}" if process.bytes is not None else "")
        for process in fitness.processes()
    ]
    if busy := [reading.host_load for reading in fitness.readings() if reading.host_load is not None]:
        parts.append(f"others keep {max(busy) * 100:.0f} % of the host's cores busy")
    swap = [reading.swap_bytes for reading in (fitness.before, fitness.after) if reading and reading.swap_bytes]
    if swap:
        parts.append(f"{units.size(max(swap))} of swap in use")
    return ", ".join(parts)


def _effort(fitness: Fitness) -> str:
    waited = f"waited {fitness.waited_s:.0f} s" if fitness.waited_s >= 0.5 else ""
    return ", ".join(part for part in (waited, "timed a second time" if fitness.retried else "") if part)


def throughput(verdict: Verdict) -> str:
    """`0.47 PFLOP an image, 461 TFLOP/s, 58 % of this GPU's bf16 matmul (790)`; as much of it as is known."""
    flops = verdict.flops_per_image
    if not flops or not isinstance(verdict.value, float | int) or not verdict.value > 0:
        return ""
    rate = flops / verdict.value
    amount = f"{units.three_digits(flops / 1e15)} P" if flops >= 1e14 else _scaled(flops)
    text = f"{amount}FLOP an image, {_scaled(rate)}FLOP/s"
    if verdict.ceiling_tflops:
        share = rate / (verdict.ceiling_tflops * 1e12)
        percent = f"{share * 100:.0f}" if share >= 0.01 else "under 1"
        text += f", {percent} % of this GPU's bf16 matmul ({figure(verdict.ceiling_tflops)})"
    return text


def equal_speed(verdict: Verdict) -> str:
    """What is meant by the change, where it is between machines that are not equally fast."""
    if verdict.speed is None or verdict.change is None or not isinstance(verdict.baseline, float | int):
        return ""
    much = f"{units.percent(abs(verdict.speed - 1)).lstrip('+')} {'faster' if verdict.speed > 1 else 'slower'}"
    other = "disk than recorded, reading" if verdict.metric == "cold_load" else "GPU than recorded, multiplying"
    level = units.value(verdict.baseline * (1 + verdict.change), verdict.unit)
    return f"another {other} {much}: compared at equal speed, as {level}"


def unfit_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """A line for each way in which the machine was not fit, and what was timed meanwhile."""
    told: dict[str, list[str]] = {}
    for verdict in verdicts:
        for reason in verdict.unfit:
            told.setdefault(reason, []).append(f"{verdict.variant} {verdict.metric}")
    return [f"  unfit: {reason} ({', '.join(timed)})" for reason, timed in told.items()]


def throughput_lines(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """A line for each time that has one, the variants one below the other."""
    told = [(verdict.variant, text) for verdict in verdicts if (text := speed_text(verdict))]
    width = max((len(variant) for variant, _ in told), default=0)
    return (f"  {variant:<{width}}  {text}" for variant, text in told)


def speed_text(verdict: Verdict) -> str:
    """`throughput` and `equal_speed` in one line."""
    return "; ".join(filter(None, (throughput(verdict), equal_speed(verdict))))


def _scaled(number: float) -> str:
    """`461 T`, `38.4 G`; nothing above T, so that a rate can be held against the ceiling beside it."""
    for scale, prefix in _SCALES:
        if number >= scale:
            return f"{units.three_digits(number / scale)} {prefix}"
    return f"{number:,.0f} "
