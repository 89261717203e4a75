"""What one run leaves behind: the unit of statistics, the same for every engine.

A run is one fresh process: load, first image, rounds. All metrics of a variant come out of the same run, so that it is
loaded once.
"""

from __future__ import annotations

from msgspec import Struct, json

from pytest_zimage.engines.protocol import DrawnImage, Injection, Loaded, Reported, Round


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
    rss_idle_bytes: int
    loaded: Loaded
    disk_bytes: int
    environment: dict[str, str]
    inject: Injection = Injection()
    images: tuple[DrawnImage, ...] = ()
    """Drawn for quality after everything else was measured."""
    started_at: str = ""
    wall_s: float = 0.0

    def to_json(self) -> bytes:
        return json.encode(self)

    @staticmethod
    def from_json(data: bytes) -> RunRecord:
        return json.decode(data, type=RunRecord)
