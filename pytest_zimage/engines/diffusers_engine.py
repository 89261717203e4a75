"""The engine inside the worker process: loads one variant into a diffusers pipeline, and draws it as often as asked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from msgspec import structs

from pytest_zimage.checkpoints.loader import load_pipeline
from pytest_zimage.engines import faults
from pytest_zimage.engines.clock import hold
from pytest_zimage.engines.dispatch_faults import break_dispatch
from pytest_zimage.engines.drawing import LoadedVariant
from pytest_zimage.engines.keeping import Keeper
from pytest_zimage.engines.png import write_png
from pytest_zimage.engines.protocol import (
    Draw,
    DrawImages,
    Drawn,
    DrawnImages,
    Load,
    Loaded,
    Progress,
    Traced,
)
from pytest_zimage.engines.sampler import build_scheduler
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError

Report = Callable[[str, int, int], None]
"""What is being done, how many are done, of how many."""


class DiffusersEngine:
    """One variant in this process: `load` once, then `draw` as often as wanted."""

    def __init__(self) -> None:
        self._loaded: LoadedVariant | None = None
        self._ballast: list[torch.Tensor] = []

    @property
    def pipeline(self) -> Any:
        """The loaded `ZImagePipeline`. Raises `EngineError` before `load`."""
        return self._ready().pipeline

    def load(self, request: Load) -> Loaded:
        """Read the variant's files and make it ready to draw.

        Raises `UnsupportedError` for a device that is not there, and whatever `load_pipeline` raises.
        """
        device = _device(request.device)
        self._ballast = _ballast(request.inject.memory_bytes, device)
        files = {role: Path(path) for role, path in request.files.items()}
        loaded = load_pipeline(
            request.variant, request.dims, files, Path(request.tokenizer), build_scheduler(request.workload), device
        )
        phases_s = loaded.phases_s
        if request.inject.cold_load:
            hold(sum(phases_s.values()) * request.inject.cold_load)
            phases_s = {phase: seconds * (1 + request.inject.cold_load) for phase, seconds in phases_s.items()}
        break_dispatch(request.inject.dispatch, loaded.pipeline.transformer)
        self._loaded = LoadedVariant(request, loaded.pipeline, device)
        return Loaded(
            phases_s=phases_s,
            load_s=sum(phases_s.values()),
            weight_bytes=loaded.weight_bytes,
            tensors=loaded.tensors,
            compute=loaded.compute,
            notes=loaded.notes,
            flops_per_image=self._loaded.flops_per_image(),
        )

    def draw(self, request: Draw, progress: Report) -> Drawn:
        """Draw `request.rounds` images; `progress` is called between them only.

        Raises `MeasurementError` for an image that is not what was asked for: see `LoadedVariant.draw`.
        """
        loaded = self._ready()
        if request.rounds < 1:
            raise MeasurementError(f"{request.rounds} rounds are no measurement", mend="ask for at least one")
        clock = loaded.first_clock if request.first else loaded.clock
        rounds = []
        for done in range(request.rounds):
            progress("image", done, request.rounds)
            image, pixels = loaded.draw(clock, loaded.workload)
            rounds.append(image)
        if request.save:
            write_png(pixels.numpy(), Path(request.save))
        progress("image", request.rounds, request.rounds)
        return Drawn(tuple(rounds))

    def _ready(self) -> LoadedVariant:
        if self._loaded is None:
            raise EngineError("nothing is loaded, so nothing can be drawn", mend="send Load before Draw")
        return self._loaded

    def trace(self) -> Traced:
        """Draw one untimed image of the workload and count what served it.

        Raises as `draw` does; a layer that comfy-kitchen computed in another way is then named.
        """
        return self._ready().trace()

    def draw_images(self, request: DrawImages, say: Callable[[Progress], None]) -> DrawnImages:
        """Draw and keep the images of `request`, untimed; raises as `draw` does. Each is told once it is kept."""
        loaded = self._ready()
        jobs = faults.misdirected(request.jobs, loaded.inject.quality)
        with Keeper() as keeper:
            for done, (job, drawn) in enumerate(zip(request.jobs, jobs, strict=True)):
                say(Progress("image for quality", done, len(jobs), keeper.kept[-1] if keeper.kept else None))
                workload = structs.replace(
                    loaded.workload, prompt=drawn.text, seed=drawn.seed, width=request.width, height=request.height
                )
                _, pixels = loaded.draw(loaded.plain_clock, workload)
                keeper.keep(job, faults.damaged(pixels, loaded.inject.quality, job.seed))
        return DrawnImages(keeper.kept)


def _device(name: str) -> torch.device:
    """The device, its context made, so that a cold load does not pay for what a running server has."""
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
            raise UnsupportedError(f"torch sees no device {name!r}", mend="check the driver and how torch was built")
        torch.cuda.set_device(device)
        torch.cuda.synchronize(device)
    elif device.type != "cpu":
        raise UnsupportedError(f"the diffusers engine does not run on {name!r}", mend="use cpu or a CUDA device")
    return device


def _ballast(size: int, device: torch.device) -> list[torch.Tensor]:
    """`size` bytes of host memory, and of device memory where it is another, written so that they are really held."""
    if not size:
        return []
    places = {torch.device("cpu"), device}
    return [torch.ones(size, dtype=torch.uint8, device=place) for place in places]
