"""What every engine is: something that turns a plan into the record of one run.

An engine owns its process from start to end: when `run` returns or raises, nothing of it is left on the device. New
engines are offered by the hook `pytest_zimage_engines`; nothing after this module knows which engine it talks to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
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
    tokenizer: Path
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
    reading: Callable[[ReportProgress], AbstractContextManager[None]] = lambda progress: nullcontext()
    """Holds the disk of the files: entered before their page cache is emptied, left once they are loaded."""
    arrived: Callable[[DrawnImage], None] = lambda image: None
    """Called with those of `images` that are on disk while others are still drawn; an engine need not."""


class Engine(ABC):
    """Draws one variant in a process of its own."""

    name: str

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
