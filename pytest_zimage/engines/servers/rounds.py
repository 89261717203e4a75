"""What is drawn of a server once it is open: the timed rounds, and the images for quality."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from msgspec import structs

from pytest_zimage.catalog import Workload
from pytest_zimage.engines.base import ReportProgress, RunPlan
from pytest_zimage.engines.faults import misdirected
from pytest_zimage.engines.protocol import DrawnImage, Round
from pytest_zimage.engines.servers import spoiling
from pytest_zimage.engines.servers.asking import Asking, Seeds
from pytest_zimage.engines.servers.images import digest, save_png
from pytest_zimage.engines.servers.pictures import Pictures
from pytest_zimage.engines.servers.session import Served, ServerSession


class Rounds:
    """Draws warm images of the workload, each from a seed that the server has not seen."""

    def __init__(self, plan: RunPlan, session: ServerSession, asking: Asking, seeds: Seeds, pictures: Pictures) -> None:
        self._plan, self._session, self._asking, self._seeds, self._pictures = plan, session, asking, seeds, pictures

    def all(self, progress: ReportProgress) -> tuple[Round, ...]:
        rounds: list[Round] = []
        for number in range(self._plan.rounds):
            progress("image", number, self._plan.rounds)
            rounds.append(self(number))
        return tuple(rounds)

    def __call__(self, number: int) -> Round:
        asked: list[Workload] = []

        def request() -> Served:
            asked.append(self._seeds.workload(number))
            return self._session.draw(asked[-1], "warm")

        served = self._asking.ask(request)
        _, sha256 = self._pictures.checked(served, asked[-1])
        served = spoiling.slowed(served, spoiling.held(served.seconds, self._plan.inject.warm_latency))
        return Round(
            seconds=served.seconds,
            phases_s=served.phases_s,
            forwards=None,
            pixels_sha256=sha256,
            seed=asked[-1].seed,
            beside_s=served.beside_s,
        )


def images(
    plan: RunPlan,
    session: ServerSession,
    asking: Asking,
    pictures: Pictures,
    progress: ReportProgress,
    first_drawn: Callable[[], None] = lambda: None,
) -> tuple[DrawnImage, ...]:
    """The images for quality, kept as PNG; a picture that was drawn before is as good, so caches may answer."""
    if plan.images is None:
        return ()
    width, height, fault = plan.images.width, plan.images.height, plan.inject.quality
    drawn: list[DrawnImage] = []
    for job, asked in zip(plan.images.jobs, misdirected(plan.images.jobs, fault), strict=True):
        progress("image for quality", len(drawn), len(plan.images.jobs))
        workload = structs.replace(plan.workload, prompt=asked.text, seed=asked.seed, width=width, height=height)
        served = asking.ask(partial(session.draw, workload, "any"))
        first_drawn()
        pixels = spoiling.damaged(pictures.checked(served, workload)[0], fault, job.seed)
        save_png(pixels, Path(job.path))
        drawn.append(DrawnImage(job.prompt, job.seed, job.path, digest(pixels)))
        plan.arrived(drawn[-1])
    return tuple(drawn)
