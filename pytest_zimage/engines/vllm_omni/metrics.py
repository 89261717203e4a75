"""Figures that vLLM-Omni gives beside an image: those of the reply, and its Prometheus page."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from msgspec import Struct, structs

from pytest_zimage.engines.protocol import Round

_FAMILIES = {"queue": "vllm_omni:request_queue_wait_s", "server": "vllm_omni:e2e_request_latency_s"}
"""Histograms of one observation a request; versions before 0.28 lack the first."""
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{[^\n]*\})? (?P<value>[^\s]+)(?: \d+)?$", re.MULTILINE)
_STAGES = {
    "text_encoder.forward": "text_encode",
    "diffuse": "denoise",
    "denoise": "denoise",
    "vae.decode": "vae_decode",
}
"""What the profiler calls the parts of one image, after the name of the pipeline's class; `forward` is their whole."""


class Total(Struct, frozen=True):
    """All requests since the server's start together."""

    count: float
    seconds: float


def totals(page: str) -> dict[str, Total]:
    """Time in the `queue`, and in the `server` altogether, from a page in Prometheus' text format; what it holds."""
    found: dict[str, float] = {}
    for match in _SAMPLE.finditer(page):
        if match["name"].startswith("vllm_omni:") and (value := _number(match["value"])) is not None:
            found[match["name"]] = found.get(match["name"], 0.0) + value
    # A histogram with labels may be announced, and have no figure before its first observation.
    none_yet = {
        clock: Total(count=0.0, seconds=0.0)
        for clock, family in _FAMILIES.items()
        if f"# TYPE {family} histogram" in page and f"{family}_" not in page
    }
    return none_yet | {
        clock: Total(count=found[f"{family}_count"], seconds=found[f"{family}_sum"])
        for clock, family in _FAMILIES.items()
        if f"{family}_count" in found and f"{family}_sum" in found
    }


def finished(page: str) -> float | None:
    """Requests that the server has finished since its start; None where its page does not count them."""
    return max((total.count for total in totals(page).values()), default=None)


def requests_between(before: Mapping[str, Total], after: Mapping[str, Total]) -> int:
    """How many requests the server finished between two pages; 0 where it does not count them."""
    return round(max((after[clock].count - before[clock].count for clock in after if clock in before), default=0))


def clocks_between(before: Mapping[str, Total], after: Mapping[str, Total]) -> dict[str, float]:
    """The server's clocks of the one request between two pages, in seconds; only those that counted exactly one."""
    return {
        clock: max(after[clock].seconds - before[clock].seconds, 0.0)
        for clock in after
        if clock in before and after[clock].count - before[clock].count == 1
    }


def phases(durations: dict[str, float], seconds: float) -> dict[str, float]:
    """Parts of an image that took `seconds`, of the profiler's durations; empty where they cannot be true."""
    found: dict[str, float] = {}
    for key, value in durations.items():
        _, _, stage = key.partition(".")
        if (phase := _STAGES.get(stage)) is not None:
            found[phase] = value
    if not all(math.isfinite(value) and value >= 0 for value in found.values()) or sum(found.values()) > seconds:
        return {}
    return found


def peak_bytes(peak_memory_mb: float | None) -> int | None:
    """Most device memory that torch had reserved during one image, from its MiB; None where it cannot be true."""
    if peak_memory_mb is None or not math.isfinite(peak_memory_mb) or not 0 < peak_memory_mb < 1 << 30:
        return None
    return round(peak_memory_mb * 2**20)


def same_phases(rounds: tuple[Round, ...]) -> tuple[Round, ...]:
    """The rounds with those phases only that each of them has."""
    if not rounds:
        return rounds
    shared = set.intersection(*(set(one.phases_s) for one in rounds))
    return tuple(
        structs.replace(one, phases_s={name: seconds for name, seconds in one.phases_s.items() if name in shared})
        for one in rounds
    )


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) and value >= 0 else None
