"""Faults put in on purpose into what a server gave: `--zimage-inject`, as far as it can be honest from outside."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.engines.protocol import Injection
from pytest_zimage.engines.servers.session import Served
from pytest_zimage.errors import UnsupportedError

if TYPE_CHECKING:
    from pytest_zimage.engines.servers.images import Pixels


def refuse_what_cannot_be(inject: Injection, engine: str) -> None:
    """Raises `UnsupportedError` for faults that only the process that draws can have."""
    if inject.memory_bytes:
        raise UnsupportedError(
            f"memory cannot be injected into {engine}: it is held by a process of its own",
            mend="inject it with --zimage-engine diffusers",
        )
    if inject.dispatch:
        raise UnsupportedError(
            f"dispatch={inject.dispatch} cannot be injected into {engine}: its kernels are chosen in its own process",
            mend="inject it with --zimage-engine diffusers, or start the server with flags that do it",
        )


def held(
    seconds: float,
    by: float,
    *,
    sleep: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Waits for the share `by` of `seconds`; seconds that really passed, 0 without a fault."""
    if not by:
        return 0.0
    began = clock()
    sleep(seconds * by)
    return clock() - began


def slowed(served: Served, waited_s: float) -> Served:
    """`served` as if the server had waited `waited_s` too, in every phase alike."""
    if not waited_s:
        return served
    factor = 1 + waited_s / served.seconds
    beside_s = dict(served.beside_s)
    if "client" in beside_s:
        beside_s["client"] += waited_s
    return structs.replace(
        served,
        seconds=served.seconds + waited_s,
        phases_s={name: seconds * factor for name, seconds in served.phases_s.items()},
        beside_s=beside_s,
    )


def damaged(pixels: Pixels, fault: str, seed: int) -> Pixels:
    """`pixels` as the fault `black` or `noise:SD` (of 1) leaves them; other faults are in what was asked for."""
    import numpy as np

    if fault == "black":
        return np.zeros_like(pixels)
    kind, _, amount = fault.partition(":")
    if kind != "noise":
        return pixels
    noise = np.random.default_rng(seed).standard_normal(pixels.shape, dtype=np.float32) * np.float32(
        255 * float(amount)
    )
    return (pixels + noise).round().clip(0, 255).astype(np.uint8)
