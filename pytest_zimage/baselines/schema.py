"""The baseline file: what it may hold, and what makes one unusable."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

SCHEMA = 1


class Key(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a baseline is a baseline of."""

    device: str
    engine: str
    model_set: str
    workload: str
    variant: str

    def folder(self) -> str:
        """`<device>/<engine>-<model set>-<workload>`, relative to the baselines folder."""
        return f"{self.device}/{self.engine}-{self.model_set}-{self.workload}"

    def path(self) -> str:
        return f"{self.folder()}/{self.variant}.json"


class Band(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    relative: float
    absolute: float = 0.0


class BaseRun(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One recorded run of one metric."""

    rounds: tuple[float, ...]
    recorded_at: str
    emptied: bool | None = None
    """Cold load only: whether the page cache was empty."""
    phases: dict[str, float] = {}
    """Mean seconds by phase, where the metric has phases."""


class Published(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A printed summary; std is 0 where only one value was printed."""

    n: int
    mean: float
    std: float = 0.0
    min: float | None = None
    max: float | None = None


class MetricBaseline(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of `runs`, `published` and `exact` is filled."""

    unit: Literal["s", "bytes", "count"]
    direction: Literal["lower", "equal"] = "lower"
    runs: tuple[BaseRun, ...] = ()
    published: Published | None = None
    exact: int | dict[str, int] | None = None
    band: Band | None = None
    environment: dict[str, str] = {}
    """Only where it differs from the file's, because this metric was recorded at another time. "" is: not recorded."""


class Provenance(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    kind: Literal["measured", "published"]
    source: str = ""


class Baseline(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file: `<device>/<engine>-<model set>-<workload>/<variant>.json`."""

    schema: int
    key: Key
    provenance: Provenance
    reason: str
    recorded_at: str
    environment: dict[str, str]
    metrics: dict[str, MetricBaseline]

    def environment_of(self, metric: str) -> dict[str, str]:
        """The environment that `metric` was recorded in."""
        merged = {**self.environment, **self.metrics[metric].environment}
        return {key: value for key, value in merged.items() if value}
