"""One ComfyUI server with one variant: prompts, their clocks, and proof that each was really drawn."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping

from pytest_zimage.catalog import Role, Variant, Workload
from pytest_zimage.engines.comfyui.following import Followed, Follower, Ticked
from pytest_zimage.engines.comfyui.outcome import FOLDER, outcome, refuse_cached, refuse_logged, saved_image
from pytest_zimage.engines.comfyui.refusals import refusal
from pytest_zimage.engines.comfyui.server import Server
from pytest_zimage.engines.comfyui.sight import sight
from pytest_zimage.engines.comfyui.stream import EventStream, StreamLost, StreamRefused
from pytest_zimage.engines.comfyui.workflow import SAVE_PHASE, Workflow
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.images import largest_bytes
from pytest_zimage.engines.servers.session import Expected, Seen, Served, ServerSession
from pytest_zimage.errors import MeasurementError

_FREED_S = 0.2
"""Rest after `/free`: an idle server acts on it at once, and says nothing when it has."""
_CLOCK_S = 0.05
"""The server's clock may show an image so much longer than this process saw it take."""
LOST = "dropped websocket"


class ComfyUISession(ServerSession):
    """Draws one variant on one server."""

    def __init__(
        self,
        server: Server,
        variant: Variant,
        workflow: Workflow,
        files: Mapping[Role, str],
        *,
        timeout_s: float,
        ticked: Ticked,
        notes: tuple[str, ...] = (),
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """`files` are names as the server lists them; `ticked` as `Follower` has it."""
        self._server, self._api, self._variant, self._workflow = server, server.api, variant, workflow
        self._files, self._timeout_s, self._ticked, self._sleep = files, timeout_s, ticked, sleep
        self._notes = list(notes)
        self._streams = True
        self._warm: frozenset[str] | None = None
        self._run, self._count = uuid.uuid4().hex[:12], 0
        self.pid, self.started_s, self.faults = server.pid, server.started_s, server.api.faults
        self.used = server.used

    def forget(self) -> tuple[str, ...]:
        self._server.require_idle()
        self._api.free()
        self._sleep(_FREED_S)
        self._warm = None
        return ("not a fresh process: the weights and results that ComfyUI held were dropped by /free before the load",)

    def draw(self, workload: Workload, expected: Expected) -> Served:
        if not self.started_s:
            self._server.require_idle()
        stream = self._listening()
        self._count += 1
        prefix = f"{FOLDER}/{self._run}-{self._count}"
        graph, what = self._workflow.graph(self._variant, workload, self._files, prefix), self._server.what
        began = time.perf_counter()
        with self._server.settling(self._timeout_s, self._sleep):
            accepted = self._api.submit(graph, str(uuid.uuid4()))
            if accepted.node_errors:
                raise refusal(what, graph, None, accepted.node_errors)
            followed = self._follow(accepted.prompt_id, stream)
            result = outcome(what, followed.finished, self._server.log)
            refuse_cached(what, self._workflow, result.cached, expected)
            image = saved_image(what, followed.finished, self._workflow.save, prefix)
            data = self._api.view(image, largest_bytes(workload.width, workload.height))
        client_s = time.perf_counter() - began
        if self._workflow.loaders - result.cached:
            self._look()
        if result.seconds > client_s + _CLOCK_S:
            raise MeasurementError(
                f"{what}: says that an image took {result.seconds:g} s, which came within {client_s:.3f} s",
                mend="see what sets the clock of the server's machine",
            )
        phases_s = self._phases(followed, expected)
        beside_s = {"client": client_s}
        if result.queue_s is not None:
            beside_s["queue"] = result.queue_s
        if SAVE_PHASE in phases_s:
            beside_s["png"] = phases_s[SAVE_PHASE]
        return Served(seconds=result.seconds, phases_s=phases_s, beside_s=beside_s, image=data)

    def seen(self) -> Seen:
        server = self._server
        self._look()
        return sight(
            self._api.stats(),
            server.run_log,
            self._variant,
            self._workflow,
            tuple(self._notes),
            server.packages,
            server.capability,
        )

    def _look(self) -> None:
        """Read what is new in the log before it is lost; raises `MeasurementError` for what was drawn from nothing."""
        refuse_logged(self._server.what, self._variant.name, self._server.run_log.look())

    def _listening(self) -> EventStream | None:
        """The websocket, with nothing of earlier prompts in it; None for a server that serves none."""
        if not self._streams:
            return None
        stream = self._server.stream
        try:
            stream.ensure_open()
            stream.drain()
        except StreamRefused as refused:
            self._streams = False
            self._notes.append(f"no times of single nodes: the server serves no websocket ({refused})")
            return None
        except StreamLost as lost:
            self._server.check()
            raise RequestFault(LOST, f"{self._server.what}: no websocket: {lost}") from lost
        return stream

    def _follow(self, prompt_id: str, stream: EventStream | None) -> Followed:
        follower = Follower(
            self._api,
            stream,
            self._server.what,
            timeout_s=self._timeout_s,
            check=self._server.check,
            ticked=self._ticked,
            sleep=self._sleep,
        )
        return follower.follow(prompt_id)

    def _phases(self, followed: Followed, expected: Expected) -> dict[str, float]:
        """Raises `RequestFault` for a warm image whose nodes were not told, `MeasurementError` if others ran."""
        nodes_s = followed.nodes_s
        if nodes_s is None:
            if self._streams and expected == "warm":
                raise RequestFault(LOST, f"{self._server.what}: the websocket was lost, and with it the times of nodes")
            if self._streams:
                self.faults[LOST] = self.faults.get(LOST, 0) + 1
            return {}
        if expected == "warm":
            ran = frozenset(nodes_s)
            if self._warm is not None and ran != self._warm:
                told = ", ".join(self._workflow.told(id) for id in sorted(ran ^ self._warm))
                raise MeasurementError(
                    f"{self._server.what}: warm images differ in whether the cache served {told}",
                    mend="memory may be short, so that results are dropped; see the server's log",
                )
            self._warm = ran
        return {self._workflow.phases.get(id, id): seconds for id, seconds in nodes_s.items()}
