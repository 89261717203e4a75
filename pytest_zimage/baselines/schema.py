"""The baseline file: what it may hold, and what makes one unusable."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from pytest_zimage.catalog.model import Unit
from pytest_zimage.probes.fitness import CanaryFigures

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
    canary: CanaryFigures | None = None
    """How fast the device was around the rounds, where it was timed."""
    device: str = ""
    """Which GPU of its kind, as `device_id` of the environment has it, for a cold load which `machine`; empty: not
    known."""
    disk_gb_s: float | None = None
    """Cold load only: how fast the disk read just before, 1e9 bytes a second, where it was timed."""


class Published(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A printed summary; std is 0 where only one value was printed."""

    n: int
    mean: float
    std: float = 0.0
    min: float | None = None
    max: float | None = None
    by_prompt: dict[str, float] = {}
    """Image scores only: the mean over `seeds` of each prompt, where it was printed."""
    seeds: tuple[int, ...] = ()
    """Image scores only: what was drawn, of each prompt those of these that are its own."""
    bare: bool = False
    """Image scores only: the mean was printed without a standard deviation."""
    source: str = ""
    """Where it was printed, if not where the file's provenance says."""


class MetricBaseline(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly one of `runs`, `published`, `exact` and `scores` is filled."""

    unit: Unit
    direction: Literal["lower", "higher", "equal"] = "lower"
    runs: tuple[BaseRun, ...] = ()
    published: Published | None = None
    exact: int | dict[str, int] | None = None
    band: Band | None = None
    scores: dict[str, float] = {}
    """Image scores by `prompt/seed`."""
    scorer: str = ""
    """Identity of what scored; of a published table only as far as it was printed."""
    unfit: tuple[str, ...] = ()
    """Prompts of which the scorer could say nothing when this was recorded: they have no scores."""
    images: str = ""
    """Digest (`baselines.images.digest`) of the images that `scores` are of; "" where fingerprints are unknown."""
    margin: float | None = None
    """Outranks the catalogue's, in the metric's unit."""
    ceiling: float | None = None
    """The mean score may not be above it, in any later session and any later baseline."""
    environment: dict[str, str] = {}
    """Only where it differs from the file's, because this metric was recorded at another time. "" is: not recorded."""


class Provenance(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    kind: Literal["measured", "published"]
    source: str = ""


class BasePrompt(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the images of one prompt were drawn from. Another text, size or choice of seeds is another measurement."""

    text: str
    prompt_set: str
    seeds: tuple[int, ...]
    """Those drawn first; scores may have further ones."""
    width: int
    height: int


class BaseImages(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The images that were recorded, by `prompt/seed`."""

    fingerprints: dict[str, str]
    """SHA-256 of the decoded pixels."""
    drawn_on: str = ""
    """Device and processor: what else decides the last bit of a pixel."""
    previews: dict[str, str] = {}
    """File names in `<variant>.previews/` beside the baseline."""


class Baseline(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One file: `<device>/<engine>-<model set>-<workload>/<variant>.json`."""

    schema: int
    key: Key
    provenance: Provenance
    reason: str
    recorded_at: str
    environment: dict[str, str]
    metrics: dict[str, MetricBaseline]
    prompts: dict[str, BasePrompt] = {}
    """Of every prompt that has a score or an image here."""
    images: BaseImages | None = None

    def environment_of(self, metric: str) -> dict[str, str]:
        """The environment that `metric` was recorded in."""
        merged = {**self.environment, **self.metrics[metric].environment}
        return {key: value for key, value in merged.items() if value}
