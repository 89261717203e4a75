"""One run of any server: opened, watched, drawn from, judged by nobody here, and closed whatever happens."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager, ExitStack
from datetime import UTC, datetime
from functools import partial

from msgspec import structs

from pytest_zimage.checkpoints.folders import weight_files
from pytest_zimage.engines.base import Engine, ReportProgress, RunPlan
from pytest_zimage.engines.fit import guarding
from pytest_zimage.engines.protocol import DrawnImage, Loaded, Reported
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.engines.servers import spoiling
from pytest_zimage.engines.servers.asking import Asking, Seeds
from pytest_zimage.engines.servers.opening import Opened, opened
from pytest_zimage.engines.servers.pictures import Pictures
from pytest_zimage.engines.servers.rounds import Rounds, images
from pytest_zimage.engines.servers.session import Seen, ServerSession
from pytest_zimage.engines.stages import Stages
from pytest_zimage.probes.leftover import DeviceUse


class ServerEngine(Engine):
    """Draws by asking a server; what is peculiar to one kind of server is in its sessions."""

    draws_here = False
    needs_tokenizer = False
    loads_at_start = False
    """Whether a server that is ready has loaded: then its start belongs to the cold load, and it is never idle."""
    attached_pid: int | None = None
    """The process of a server that ran before the tests, where it is told: no stranger on the machine."""

    @abstractmethod
    def open(self, plan: RunPlan, progress: ReportProgress) -> AbstractContextManager[ServerSession]:
        """A server that answers and draws `plan.variant`; leaving the block ends it if it was started by this.

        `plan.log` is for what the server says. Raises a `ZImageError`, and a `RequestFault` for what may go better
        with another server.
        """

    def run(self, plan: RunPlan, progress: ReportProgress) -> RunRecord:
        self._refuse_plan(plan)
        spoiling.refuse_what_cannot_be(plan.inject, self.name)
        started_at = datetime.now(UTC).isoformat(timespec="seconds")
        files = sorted({file for path in plan.files.values() for file in weight_files(path)})
        use = DeviceUse(plan.gpu)
        stage = Stages()
        what = f"{self.name} of {plan.variant.name}, run {plan.index + 1}"
        asking = Asking(what, 2 + plan.rounds + (len(plan.images.jobs) if plan.images else 0))
        seeds, pictures = Seeds(plan.workload, plan.rounds), Pictures(what)
        with guarding(plan.fit, plan.gpu, progress, also=self.attached_pid) as guard, ExitStack() as stack:
            with stage("start and first image"):
                server = stack.enter_context(
                    opened(
                        plan,
                        files,
                        partial(self.open, plan, progress),
                        loads_at_start=self.loads_at_start,
                        asking=asking,
                        pictures=pictures,
                        progress=progress,
                    )
                )
            session = server.session
            draw = Rounds(plan, session, asking, seeds, pictures)
            with stage("warm-up"):
                progress("warm-up", 0, 0)
                draw(plan.rounds)
            with stage("rounds"):
                rounds, fitness = guard.timed(lambda: draw.all(progress), worker=session.pid)
            server.memory.now()
            seen = asking.ask(session.seen)
            memory = self._reported(plan, server, seen)
            with stage("images"):
                images_drawn = images(plan, session, asking, pictures, progress)
            faults = asking.all_faults
            with stage("close"):
                stack.close()
        with stage("memory back"):
            left_bytes = use.left_bytes() if server.started_here else None
        return RunRecord(
            variant=plan.variant.name,
            index=plan.index,
            engine=self.name,
            model_set=plan.model_set,
            workload=plan.workload.name,
            device=plan.device,
            rounds=rounds,
            cold=structs.replace(server.cold, fitness=guard.load),
            memory=memory,
            rss_idle_bytes=server.memory.idle_bytes,
            loaded=Loaded(phases_s={}, load_s=0.0, weight_bytes={}, tensors={}, compute={}),
            disk_bytes=sum(path.stat().st_size for path in files) if files and server.reads_them else None,
            environment={**_of_weights_read(plan.environment, server), **seen.environment},
            inject=plan.inject,
            fitness=fitness,
            emulated=seen.emulated,
            unquantised=seen.unquantised,
            faults=faults,
            images=images_drawn,
            device_left_bytes=left_bytes,
            started_at=started_at,
            wall_s=stage.total_s(),
            stages_s=stage.seconds,
        )

    def _refuse_plan(self, plan: RunPlan) -> None:
        """As `refuse`, of every prompt that will be asked."""
        self.refuse(plan.variant, plan.workload)
        for text in dict.fromkeys(job.text for job in (plan.images.jobs if plan.images else ())):
            self.refuse(plan.variant, structs.replace(plan.workload, prompt=text))

    def draw(self, plan: RunPlan, progress: ReportProgress) -> tuple[DrawnImage, ...]:
        assert plan.images is not None
        self._refuse_plan(plan)
        spoiling.refuse_what_cannot_be(plan.inject, self.name)
        what = f"{self.name} of {plan.variant.name}"
        asking, pictures = Asking(what, len(plan.images.jobs)), Pictures(what)
        with ExitStack() as reading, self.open(plan, progress) as session:
            asking.count(session.faults)
            reading.enter_context(plan.reading(progress))
            return images(plan, session, asking, pictures, progress, first_drawn=reading.close)

    def _reported(self, plan: RunPlan, server: Opened, seen: Seen) -> Reported:
        memory = server.memory
        return Reported(
            # Of a server that ran already, the kernel's mark may be of what it did before.
            rss_peak_bytes=memory.high_water_bytes if server.started_here else None,
            rss_peak_source="VmHWM of the largest process" if server.started_here else "",
            rss_sampled_peak_bytes=memory.peak_bytes,
            device_peak_bytes=seen.device_peak_bytes,
            device_reserved_peak_bytes=seen.reserved_peak_bytes,
            nvml_process_peak_bytes=memory.gpu_peak_bytes,
            notes=seen.notes,
            unavailable={metric: why for metric, why in self._unsaid(plan, server, seen).items() if why},
        )

    def _unsaid(self, plan: RunPlan, server: Opened, seen: Seen) -> dict[str, str]:
        """By metric, why it cannot be judged; empty where it can."""
        memory, used = server.memory, server.session.used
        no_size, no_gpu = memory.why_no_size or used, memory.why_no_gpu or used
        if self.loads_at_start and not server.started_here:
            missed = f"{self.name} had loaded before this run, and the peak of its load is not in what was seen"
            no_size = memory.why_no_size or f"{missed}; one that is started for a run is judged"
        never_idle = f"{self.name} loads before it is ready: there is no idle to take off"
        if memory.gpu_peak_bytes is None and not no_gpu:
            no_gpu = f"{self.name} on {plan.device}: NVML lists no process of it"
        no_allocator = f"{self.name} on {plan.device} does not say what its allocator held"
        return {
            "rss_peak": no_size,
            "working_set": no_size or (never_idle if self.loads_at_start else ""),
            "gpu_process_peak": no_gpu,
            "device_peak": no_allocator if seen.device_peak_bytes is None else "",
        }


def _of_weights_read(environment: dict[str, str], server: Opened) -> dict[str, str]:
    """The fingerprints of weights are kept only where the server may have read those."""
    return {key: value for key, value in environment.items() if server.reads_them or not key.startswith("weights.")}
