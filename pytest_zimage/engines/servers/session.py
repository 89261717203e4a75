"""What a server engine implements: one server with one variant, asked for images one after another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

from msgspec import Struct

from pytest_zimage.catalog import Workload

Expected = Literal["cold", "warm", "any"]
"""What an image must be to count: of a server that has loaded nothing yet, of one that has loaded all, or either."""


class Served(Struct, frozen=True, kw_only=True):
    """One image and its clocks, all in seconds."""

    seconds: float
    """What is judged: the server's own clock where it has one."""
    phases_s: dict[str, float]
    """Parts of `seconds`; the same names in every warm image."""
    beside_s: dict[str, float]
    """Other clocks of it: `client` (request to answer here), `queue`, `png`."""
    image: bytes
    """The file as the server gave it, not yet looked at."""


class Seen(Struct, frozen=True, kw_only=True):
    """What a server says of itself once it has drawn."""

    environment: dict[str, str] = {}
    """Versions, flags, backends: `comfyui`, `comfyui.argv`, `comfyui.native_ops`, ..."""
    emulated: tuple[str, ...] = ()
    unquantised: tuple[str, ...] = ()
    """As `RunRecord.unquantised`."""
    device_peak_bytes: int | None = None
    """As the server reports it, if it does; only where it means what `Reported.device_peak_bytes` says."""
    reserved_peak_bytes: int | None = None
    notes: tuple[str, ...] = ()


class ServerSession(ABC):
    """One server that draws one variant. A method may raise `RequestFault`, to be tried again, or another error."""

    started_s: float
    """Seconds from its start until it was ready; 0 for one that ran already."""
    pid: int | None
    """The root of its processes; None where it is not of this host or not told."""
    used: str = ""
    """Why what its process holds is not of this run alone, where it worked before; empty for a fresh one."""
    faults: dict[str, int]
    """Requests that failed and were made anew inside a method, by kind; `RequestFault`s are counted by who catches."""

    @abstractmethod
    def forget(self) -> tuple[str, ...]:
        """Have nothing loaded, so that the next image is a cold load; returns notes of what that cannot undo."""

    @abstractmethod
    def draw(self, workload: Workload, expected: Expected) -> Served:
        """One image of `workload`'s prompt, seed, size and steps.

        Raises `MeasurementError` for one that is not what was expected: cached, or not loaded where it should be.
        """

    @abstractmethod
    def seen(self) -> Seen:
        """What it says of itself; asked after the last image."""
