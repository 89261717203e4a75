"""Which machines are of one kind, how they are timed, and when one is fit for it: the rows of `devices.toml`."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Throttle = Literal[
    "power cap",
    "thermal throttle",
    "hardware thermal throttle",
    "hardware slowdown",
    "power brake",
    "sync boost",
    "display clock",
]
"""Why a GPU holds its clocks down: the event reasons of nvml.h that are not a choice of its owner."""


class FitnessLimits(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """When a machine is fit to be timed; what a machine cannot say is never held against it."""

    judged: bool = True
    """False: looked at and shown, never unfit. So for `cpu`, where other work on the machine is the rule."""
    throttle: tuple[Throttle, ...] = (
        "thermal throttle",
        "hardware thermal throttle",
        "hardware slowdown",
        "power brake",
    )
    """Those that are a fault by themselves. A power cap is none: large GPUs work at theirs, and the canary says whether
    it costs anything."""
    canary_below: float = 0.05
    """A canary may be at most this share below its recorded value."""
    canary_apart: float = 0.05
    """Before and after the rounds it may differ by at most this share of the higher one."""
    sm_clock: float = 0.5
    """Least share of its maximum that the SM clock may have at any moment of the rounds."""
    process_bytes: int = 256 << 20
    """Device memory that processes of others may hold, each."""
    host_load: float = 0.9
    """Share of the host's cores that others may keep busy."""
    swap_growth_bytes: int = 256 << 20
    """By how much the swap in use may grow meanwhile."""

    def __post_init__(self) -> None:
        for key in ("canary_below", "canary_apart", "sm_clock", "host_load"):
            if not 0 <= getattr(self, key) <= 1:
                raise ValueError(f"key {key!r}: {getattr(self, key)} is no share between 0 and 1")
        for key in ("process_bytes", "swap_growth_bytes"):
            if getattr(self, key) < 0:
                raise ValueError(f"key {key!r}: {getattr(self, key)} is below 0")


class DeviceClass(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A kind of machine whose numbers may be compared; its name is also the lane marker."""

    name: str
    title: str
    pattern: str = ""
    """Regular expression over the whole NVML device name, without regard to case; empty for `cpu`."""
    capability: tuple[int, int] | None = None
    memory_gib: tuple[float, float] | None = None
    """Plausible range of the device's memory; tells a MIG slice from the whole device."""
    unified_memory: bool = False
    stored_timings: bool = True
    """False for `cpu`: no two hosts agree, so timings are judged only against runs of the same machine."""
    replays_forwards: bool = False
    """Whether the transformer's forwards of a warm image are replayed as a CUDA graph: for devices that compute
    quantised products about as fast as a host launches them, whose latency would be the host's. The graph keeps room
    for what a forward takes beside the weights: 0.9 GiB at 1024x1024."""
    bands: dict[str, float] = {}
    """Relative band by metric, where this device is quieter or noisier than the rule's default."""
    fitness: FitnessLimits = FitnessLimits()
    """When this device is fit to be timed."""
