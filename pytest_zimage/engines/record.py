"""What one run leaves behind: the unit of statistics, the same for every engine.

A run is one fresh process: load, first image, rounds. All metrics of a variant come out of the same run, so that it is
loaded once.
"""

from __future__ import annotations

from msgspec import Struct, json

from pytest_zimage.engines.protocol import DrawnImage, Injection, Loaded, Reported, Round
from pytest_zimage.probes.fitness import Fitness


class ColdLoad(Struct, frozen=True, kw_only=True):
    """Load and first image of a fresh process."""

    total_s: float
    """Load plus first image: the published definition. The import of the packages is a phase beside it."""
    phases_s: dict[str, float]
    """`import`, `read`, `build`, `to_device`, `first_image`."""
    residency: float | None
    """Share of the variant's file pages that were in the page cache when the load began; None where unknown."""
    emptied: bool
    """Whether the cache was really empty. Runs are compared only with runs of the same kind."""
    notes: tuple[str, ...] = ()
    fitness: Fitness | None = None
    """The machine before it began; None: this engine does not look."""
    disk_gb_s: float | None = None
    """1e9 bytes a second, by plain reading of some of the files just before (`probes.diskspeed`)."""
    unavailable: str = ""
    """Why this was no cold load and cannot be judged as one: a server that ran already and cannot unload."""


class RunRecord(Struct, frozen=True, kw_only=True):
    """Everything one run observed."""

    variant: str
    index: int
    engine: str
    model_set: str
    workload: str
    device: str
    rounds: tuple[Round, ...]
    cold: ColdLoad
    memory: Reported
    rss_idle_bytes: int | None
    """None: the process cannot be looked at from here."""
    loaded: Loaded
    disk_bytes: int | None
    """None: the files are not on this host."""
    environment: dict[str, str]
    inject: Injection = Injection()
    fitness: Fitness | None = None
    """The machine before, during and after the rounds; None: this engine does not look."""
    dispatch: dict[str, int] | None = None
    """Calls of one untimed image by `operation: backend`, as `Traced` has them; None: this engine does not trace."""
    dequantised: dict[str, int] = {}
    """Calls in that image of layers that dequantised instead of computing quantised, by layer."""
    emulated: tuple[str, ...] = ()
    """Quantised formats that the engine says this machine computes by dequantising: `nvfp4`, `mxfp8`."""
    unquantised: tuple[str, ...] = ()
    """Why products of this variant may not be quantised here, as far as the engine knows."""
    faults: dict[str, int] = {}
    """Requests that failed and were made anew, by kind: `dropped connection`, `status 500`, ...; none is a round."""
    images: tuple[DrawnImage, ...] = ()
    """Drawn for quality after everything else was measured."""
    device_left_bytes: int | None = None
    """Device memory in use once the process was gone, less what was in use before it began; None where unknown."""
    started_at: str = ""
    wall_s: float = 0.0
    stages_s: dict[str, float] = {}
    """Seconds by stage, in their order: where the run's wall time went. Waiting for other processes is in none."""

    def to_json(self) -> bytes:
        return json.encode(self)

    @staticmethod
    def from_json(data: bytes) -> RunRecord:
        return json.decode(data, type=RunRecord)
