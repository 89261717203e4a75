"""The `diffusers` engine as the test process sees it: one run is one worker process."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import TypeVar

from pytest_zimage.checkpoints.folders import weight_files
from pytest_zimage.engines.base import Engine, ReportProgress, RunPlan
from pytest_zimage.engines.client import WorkerClient
from pytest_zimage.engines.coldfiles import ColdFiles
from pytest_zimage.engines.compile_cache import compile_cache
from pytest_zimage.engines.fit import guarding
from pytest_zimage.engines.forking import ForkServer
from pytest_zimage.engines.protocol import (
    Canary,
    CanaryTimed,
    Draw,
    Drawn,
    DrawnImage,
    DrawnImages,
    Hello,
    Load,
    Loaded,
    Reply,
    Report,
    Reported,
    Request,
    Trace,
    Traced,
)
from pytest_zimage.engines.record import ColdLoad, RunRecord
from pytest_zimage.engines.stages import Stages
from pytest_zimage.errors import EngineError, MeasurementError
from pytest_zimage.probes.leftover import DeviceUse

Expected = TypeVar("Expected", Hello, Loaded, Drawn, DrawnImages, Reported, Traced, CanaryTimed)


class LocalEngine(Engine):
    """Draws with diffusers and comfy-kitchen in a child process of this one."""

    name = "diffusers"
    images_last = True

    def __init__(self) -> None:
        self._server: ForkServer | None = None

    def run(self, plan: RunPlan, progress: ReportProgress) -> RunRecord:
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        files = sorted({file for path in plan.files.values() for file in weight_files(path)})
        use = DeviceUse(plan.gpu)
        stage = Stages()

        def ask(kind: type[Expected], request: Request, name: str) -> Expected:
            with stage(name):
                return _expect(kind, worker.ask(request, name))

        with guarding(plan.fit, plan.gpu, progress) as guard, ExitStack() as stack:
            server = self._importing(plan)
            with ColdFiles(files, plan.reading, progress) as cold_files:
                with stage("import"):
                    server.ready(plan.timeout_s, progress)
                worker = stack.enter_context(self._worker(plan, progress))
                with stage("start"):
                    hello = _expect(Hello, worker.receive("import"))
                _check_device(plan, hello)
                with stage("waiting for the disk"):
                    cold_files.hold()
                with stage("page cache and disk"):
                    cache, disk_gb_s = cold_files.ready()
                loaded = ask(Loaded, _load_request(plan), "load")
                cold_files.read()
                first = ask(Drawn, Draw(rounds=1, first=True), "first image").rounds[0]
                # Untimed, and so the image that warms up what the first one left cold.
                traced = ask(Traced, Trace(), "trace")
            drawn, fitness = guard.timed(
                lambda: ask(Drawn, Draw(rounds=plan.rounds), "rounds"),
                worker=worker.pid,
                canary=lambda: ask(CanaryTimed, Canary(), "canary"),
            )
            memory = ask(Reported, Report(), "report")
            worker.on_progress = lambda shown: plan.arrived(shown.image) if shown.image else None
            images = ask(DrawnImages, plan.images, "images").images if plan.images else ()
            with stage("close"):
                worker.close()
        with stage("memory back"):
            left_bytes = use.left_bytes()
        return RunRecord(
            variant=plan.variant.name,
            index=plan.index,
            engine=self.name,
            model_set=plan.model_set,
            workload=plan.workload.name,
            device=plan.device,
            rounds=drawn.rounds,
            cold=ColdLoad(
                total_s=loaded.load_s + first.seconds,
                phases_s={"import": hello.import_s, **loaded.phases_s, "first_image": first.seconds},
                residency=cache.residency,
                emptied=cache.emptied,
                notes=cache.notes,
                disk_gb_s=disk_gb_s,
                fitness=guard.load,
            ),
            memory=memory,
            rss_idle_bytes=hello.rss_idle_bytes,
            loaded=loaded,
            disk_bytes=sum(path.stat().st_size for path in files),
            environment={
                **plan.environment,
                **hello.environment,
                "text_encoding": traced.text_encoding,
                "transformer_forwards": traced.transformer_forwards,
            },
            inject=plan.inject,
            fitness=fitness,
            dispatch=traced.dispatch,
            dequantised=traced.dequantised,
            images=images,
            device_left_bytes=left_bytes,
            started_at=started_at,
            wall_s=stage.total_s(),
            stages_s=stage.seconds,
        )

    def draw(self, plan: RunPlan, progress: ReportProgress) -> tuple[DrawnImage, ...]:
        assert plan.images is not None
        with self._worker(plan, progress) as worker:
            _check_device(plan, _expect(Hello, worker.receive("import")))
            with plan.reading(progress):
                _expect(Loaded, worker.ask(_load_request(plan), "load"))
            images = _expect(DrawnImages, worker.ask(plan.images, "images")).images
            worker.close()
        return images

    def _importing(self, plan: RunPlan) -> ForkServer:
        """The fork server, which begins its imports now if it is new."""
        if self._server is None or not self._server.alive:
            self._server = ForkServer(plan.log.with_name(f"forkserver-{os.getpid()}.log"))
        return self._server

    @contextmanager
    def _worker(self, plan: RunPlan, progress: ReportProgress) -> Iterator[WorkerClient]:
        what = f"worker of {plan.variant.name}, run {plan.index + 1}"
        with compile_cache(plan.variant.compile) as environment:
            server = self._importing(plan)
            server.ready(plan.timeout_s, progress)
            start = server.worker(plan.device, environment)
            with WorkerClient(
                what, plan.log, start, timeout_s=plan.timeout_s, progress=progress, gpu=plan.gpu
            ) as worker:
                yield worker

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None


def _check_device(plan: RunPlan, hello: Hello) -> None:
    """NVML chose the device class and torch draws; if they mean two devices, the numbers would carry a wrong name."""
    chosen, drawing = plan.environment.get("device", ""), hello.environment.get("device", "")
    if plan.gpu and chosen != drawing:
        raise MeasurementError(
            f"NVML's {plan.gpu} is {chosen!r}, but torch draws on {drawing!r}",
            mend="check CUDA_VISIBLE_DEVICES, or name the device: --zimage-device cuda:N",
        )


def _load_request(plan: RunPlan) -> Request:
    return Load(
        variant=plan.variant,
        workload=plan.workload,
        dims=plan.dims,
        files={role: str(path) for role, path in plan.files.items()},
        tokenizer=str(plan.tokenizer),
        device=plan.device,
        inject=plan.inject,
        replays_forwards=plan.replays_forwards,
    )


def _expect(kind: type[Expected], reply: Reply) -> Expected:
    if not isinstance(reply, kind):
        raise EngineError(f"a worker answered {type(reply).__name__} where {kind.__name__} was due")
    return reply
