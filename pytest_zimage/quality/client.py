"""The judge as the test process sees it: started when first needed, asked, and never left behind."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.engines.client import ChildClient
from pytest_zimage.engines.processes import Command
from pytest_zimage.errors import EngineError, ZImageError
from pytest_zimage.quality.cache import ScoreCache
from pytest_zimage.quality.protocol import (
    Compared,
    ComparePairs,
    Comparison,
    ControlPrompt,
    ControlScores,
    ControlsScored,
    ImageScore,
    Item,
    MakePreviews,
    Open,
    PathPair,
    Preview,
    PreviewJob,
    PreviewsMade,
    Ready,
    Reply,
    Request,
    ScoreControls,
    Scored,
    ScoreImages,
    ScorerChoice,
    decode_reply,
)

PREVIEW_BYTES = 8 << 10
PREVIEW_SIDE = 256

Expected = TypeVar("Expected", Ready, Scored, ControlsScored, Compared, PreviewsMade)


def judge_command(device: str) -> tuple[str, ...]:
    """How the judge's process is started; `device` is a torch device."""
    return (sys.executable, "-m", "pytest_zimage.quality.worker", device)


@dataclass
class Ticket:
    """Images handed in by `Judge.submit`; `Judge.collect` has their scores."""

    items: tuple[Item, ...]
    known: dict[int, ImageScore] = field(default_factory=dict)
    """Scores by index in `items`."""
    error: ZImageError | None = None

    @property
    def missing(self) -> list[int]:
        return [index for index in range(len(self.items)) if index not in self.known]


class Judge:
    """One judge. A context manager: leaving it ends the process, whatever state it is in.

    Every request may raise the error that the judge reports (`MeasurementError` and `MissingFileError` name the image,
    `CheckpointError` and `UnsupportedError` the scorer), or `EngineError` if it died or hung; the next request then
    starts a fresh one. Scorers that cannot be opened stay so: the same error again, without another attempt.
    """

    def __init__(
        self,
        choice: ScorerChoice,
        *,
        log: Path,
        timeout_s: float,
        progress: ReportProgress,
        cache: Path | None = None,
        device: str = "cpu",
        gpu: str = "",
        threads: int = 0,
        command: Sequence[str] = (),
    ) -> None:
        """`log`: where the process's standard error goes; `cache`: a folder of scores shared between processes.

        `timeout_s`: the longest silence, in seconds; `gpu`: NVML's UUID of the only GPU it may see.
        """
        self._open = Open(choice, threads)
        self._log = log
        self._timeout_s = timeout_s
        self._progress = progress
        self._folder = cache
        self._gpu = gpu
        self._command = tuple(command) or judge_command(device)
        self._client: ChildClient[Request, Reply] | None = None
        self._ready: Ready | None = None
        self._cache: ScoreCache | None = None
        self._unusable: ZImageError | None = None
        self._pending: Ticket | None = None

    def __enter__(self) -> Judge:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def start(self) -> None:
        """Start the process and let it load, without waiting; it uses a core for some seconds."""
        if self._client is None and self._unusable is None:
            self._client = ChildClient(
                "quality judge",
                self._log,
                Command(self._command),
                timeout_s=self._timeout_s,
                progress=self._progress,
                decode=decode_reply,
                gpu=self._gpu,
            )
            self._client.send(self._open)

    def ready(self) -> Ready:
        """The opened scorers; waits for them, and starts them if need be."""
        if self._unusable is not None:
            raise self._unusable
        self.start()
        if self._ready is None:
            try:
                self._ready = self._receive(Ready, "opening the scorers")
            except EngineError:
                raise
            except ZImageError as error:
                self._unusable = error
                self.end()
                raise
            self._cache = ScoreCache(self._folder, self._ready) if self._folder else None
        return self._ready

    def score(self, items: Sequence[Item]) -> tuple[ImageScore, ...]:
        """One score an item, in their order."""
        return self.collect(self.submit(items))

    def submit(self, items: Sequence[Item]) -> Ticket:
        """Hand in images without waiting for their scores. Images handed in before are waited for first."""
        self._finish_pending()
        self.ready()
        ticket = Ticket(tuple(items))
        if self._cache is not None:
            found = {index: self._cache.get(item) for index, item in enumerate(items)}
            ticket.known = {index: score for index, score in found.items() if score is not None}
        if ticket.missing:
            self._running().send(ScoreImages(tuple(ticket.items[index] for index in ticket.missing)))
            self._pending = ticket
        return ticket

    def collect(self, ticket: Ticket) -> tuple[ImageScore, ...]:
        """The scores of `ticket`, in the order of its items."""
        if ticket is self._pending:
            self._finish_pending()
        if ticket.error is not None:
            raise ticket.error
        if ticket.missing:
            raise EngineError("these images are not with the judge", mend="submit them again")
        return tuple(ticket.known[index] for index in range(len(ticket.items)))

    def controls(self, prompts: Sequence[ControlPrompt], *, noise_seed: int = 0) -> tuple[ControlScores, ...]:
        """Per prompt, the CLIPScores of its own images and of the controls, for `controls.judge_controls`."""
        return self._ask(ControlsScored, ScoreControls(tuple(prompts), noise_seed), "controls").prompts

    def compare(self, pairs: Sequence[PathPair]) -> tuple[Comparison, ...]:
        """How far the first image of each pair is from the second: LPIPS, PSNR, SSIM and the pixels that differ."""
        return self._ask(Compared, ComparePairs(tuple(pairs)), "comparing images").pairs

    def preview(
        self, jobs: Sequence[PreviewJob], *, limit_bytes: int = PREVIEW_BYTES, side: int = PREVIEW_SIDE
    ) -> tuple[Preview, ...]:
        """Write one small image a job."""
        return self._ask(PreviewsMade, MakePreviews(tuple(jobs), limit_bytes, side), "previews").previews

    def close(self) -> None:
        """Let it leave in good order; a judge that will not is ended, and that is an error."""
        try:
            if self._client is not None and self._ready is not None:
                self._finish_pending()
                self._running().close()
        finally:
            self.end()

    def end(self) -> None:
        """End the process, if there is one, and wait until it is gone. Safe to call twice."""
        client, self._client = self._client, None
        self._ready = None
        self._drop_pending(EngineError("the judge was ended before it scored these images", mend="score them again"))
        if client is not None:
            client.end()

    def _ask(self, kind: type[Expected], request: Request, stage: str) -> Expected:
        self._finish_pending()
        self.ready()
        self._running().send(request)
        return self._receive(kind, stage)

    def _receive(self, kind: type[Expected], stage: str) -> Expected:
        try:
            reply = self._running().receive(stage)
            if not isinstance(reply, kind):
                raise EngineError(f"the judge answered {type(reply).__name__} where {kind.__name__} was due")
        except EngineError as error:
            self._drop_pending(error)
            self.end()
            raise
        return reply

    def _finish_pending(self) -> None:
        """Receive the scores that are under way; an error among them is kept for who collects them."""
        ticket = self._pending
        if ticket is None:
            return
        missing = ticket.missing
        try:
            images = self._receive(Scored, "scoring images").images
        except ZImageError as error:
            self._drop_pending(error)
            return
        self._pending = None
        if len(images) != len(missing):
            ticket.error = EngineError(f"the judge scored {len(images)} of {len(missing)} images")
            return
        for index, score in zip(missing, images, strict=True):
            ticket.known[index] = score
            if self._cache is not None:
                self._cache.put(ticket.items[index], score)

    def _drop_pending(self, error: ZImageError) -> None:
        if self._pending is not None:
            self._pending.error = error
            self._pending = None

    def _running(self) -> ChildClient[Request, Reply]:
        if self._client is None:
            raise EngineError("the judge is not running", mend="ask it again")
        return self._client
