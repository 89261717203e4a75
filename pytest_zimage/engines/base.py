"""What every engine is: something that turns a plan into the record of one run.

An engine owns its process from start to end: when `run` returns or raises, nothing of it is left on the device. New
engines are offered by the hook `pytest_zimage_engines`; nothing after this module knows which engine it talks to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pytest_zimage.catalog import ModelDims, Role, Variant, Workload
    from pytest_zimage.engines.fit import FitPlan
    from pytest_zimage.engines.protocol import DrawImages, DrawnImage, Injection
    from pytest_zimage.engines.record import RunRecord


class ReportProgress(Protocol):
    """Called while a run is under way, at least once a second."""

    def __call__(self, stage: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class RunPlan:
    """One fresh run of one variant."""

    variant: Variant
    workload: Workload
    model_set: str
    dims: ModelDims
    files: dict[Role, Path]
    """Empty where the engine keeps its own weights."""
    tokenizer: Path | None
    """None: the engine brings its own."""
    device: str
    """A torch device: `cpu`, or `cuda:0` with only that GPU visible."""
    gpu: str
    """NVML's UUID of the GPU; empty on the CPU. CUDA and NVML may count devices in different orders."""
    index: int
    """0 for the session's first run of the variant."""
    rounds: int
    inject: Injection
    images: DrawImages | None
    """Images for quality, drawn last in the same process; None: none are wanted."""
    environment: dict[str, str]
    """What the test process knows of machine, packages and files; the engine adds what it sees itself."""
    log: Path
    """Where the engine's process writes what it has to say."""
    timeout_s: float
    """Longest silence before the engine's process counts as hung."""
    fit: FitPlan
    """When the machine is fit to be timed, and how long to wait until it is."""
    disks: Callable[[Collection[Path], ReportProgress], AbstractContextManager[None]] = lambda files, _: nullcontext()
    """Holds the disks that files lie on."""
    arrived: Callable[[DrawnImage], None] = lambda image: None
    """Called with those of `images` that are on disk while others are still drawn; an engine need not."""
    replays_forwards: bool = False
    """As `DeviceClass.replays_forwards`; an engine need not."""
    same_schedule: bool = False
    """Draw on exactly the workload's noise levels, even where the engine needs another number of steps for them: for
    images that are held against another engine's."""

    def reading(self, progress: ReportProgress) -> AbstractContextManager[None]:
        """Holds the disks of `files`: entered before their page cache is emptied, left once they are loaded."""
        return self.disks(self.files.values(), progress)


@dataclass(frozen=True)
class Defaults:
    """What runs where the user does not say: names of the catalogue."""

    variants: tuple[str, ...] = ()
    """Names, globs and `@tags`; empty: the catalogue's default ones."""
    workload: str = "turbo-1024"
    tiny_workload: str = "turbo-tiny"
    """For `synthetic-tiny`."""
    prompts: str = "quality-6x3"


class Engine(ABC):
    """Draws one variant in a process of its own."""

    name: str
    defaults = Defaults()
    needs_files = True
    """Whether the model set's files must be on this host; else `RunPlan.files` may be empty."""
    needs_tokenizer = True
    """Else `RunPlan.tokenizer` may be None."""
    draws_here = True
    """Whether the packages beside this process draw; else their versions are no facts of a run."""
    images_last = False
    """Whether its images may serve a later session too: nothing decides them but what the plan's environment tells."""

    @property
    def way(self) -> str:
        """How it comes to draw, for a person."""
        return "in a process of its own, started for every run"

    def refuse(self, variant: Variant, workload: Workload) -> None:  # noqa: B027 - an engine may find out as it draws
        """Raises `UnsupportedError` for what it can never draw, whatever the machine."""

    def refuse_choice(self, variants: Sequence[Variant]) -> None:  # noqa: B027 - most draw whatever a session names
        """Raises `UnsupportedError` where no session can draw all of these, before any of them is drawn."""

    def reads(self, variant: Variant, model_set: str) -> str:
        """Which weights it reads where `needs_files` is false, for a person; raises a `ZImageError` without any."""
        return "weights of its own keeping"

    @abstractmethod
    def run(self, plan: RunPlan, progress: ReportProgress) -> RunRecord:
        """Load, draw the first image, draw the rounds, report, close.

        Raises a `ZImageError`; whatever happens, no process and no device memory is left behind.
        """

    @abstractmethod
    def draw(self, plan: RunPlan, progress: ReportProgress) -> tuple[DrawnImage, ...]:
        """Load and draw `plan.images`, measuring nothing; raises as `run` does."""

    def close(self) -> None:  # noqa: B027 - an engine that keeps nothing between runs has nothing to end
        """End what was kept from one run to the next; called once, when the session is over."""


EngineFactory = Callable[[], Engine]
