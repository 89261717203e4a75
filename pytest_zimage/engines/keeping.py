"""Images onto the disk while the next one is drawn: writing a PNG takes a fifth of the time an H200 draws for."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from pytest_zimage.engines.drawing import digest
from pytest_zimage.engines.png import write_png
from pytest_zimage.engines.protocol import DrawnImage, ImageJob


class Keeper:
    """A context that saves untimed images, one behind the drawing; left without an error, all of them are on disk."""

    def __init__(self) -> None:
        self._kept: list[DrawnImage] = []
        self._saving: Future[DrawnImage] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="keeper")

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._finish()
        finally:
            self._thread.shutdown()

    @property
    def kept(self) -> tuple[DrawnImage, ...]:
        """Those that are on disk, in the order they were drawn in."""
        return tuple(self._kept)

    def keep(self, job: ImageJob, pixels: torch.Tensor) -> None:
        """Save `pixels` (uint8, [height, width, 3]), which nobody changes any more, at `job.path`.

        Waits for the image before, and raises the `OSError` that saving it met.
        """
        self._finish()
        self._saving = self._thread.submit(_kept, job, pixels)

    def _finish(self) -> None:
        if self._saving is not None:
            saving, self._saving = self._saving, None
            self._kept.append(saving.result())


def _kept(job: ImageJob, pixels: torch.Tensor) -> DrawnImage:
    write_png(pixels.numpy(), Path(job.path))
    return DrawnImage(job.prompt, job.seed, job.path, digest(pixels))
