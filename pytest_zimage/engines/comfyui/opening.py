"""A server of its own for one run, or one that runs already; either way a session that draws one variant on it."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pytest_zimage.catalog import Role
from pytest_zimage.engines.base import ReportProgress, RunPlan
from pytest_zimage.engines.comfyui.api import ComfyUIApi
from pytest_zimage.engines.comfyui.attached import listed_files
from pytest_zimage.engines.comfyui.launch import Installation, Launch
from pytest_zimage.engines.comfyui.log import startup_facts
from pytest_zimage.engines.comfyui.runlog import RunLog
from pytest_zimage.engines.comfyui.server import Server
from pytest_zimage.engines.comfyui.session import ComfyUISession
from pytest_zimage.engines.comfyui.stream import EventStream
from pytest_zimage.engines.comfyui.support import refuse_missing_flags, refuse_other_device
from pytest_zimage.engines.comfyui.workflow import Workflow
from pytest_zimage.engines.servers.http import Http
from pytest_zimage.engines.servers.process import ServerProcess
from pytest_zimage.errors import EngineError

_REQUEST_S = 60.0
"""Longest wait for one answer: a server that loads is slow to answer, but it answers."""
_PROBE_S = 5.0
_USED = (
    "this ComfyUI had drawn before this run, and /free does not hand back all that it held then: what it holds is not"
    " of this variant alone; start one to judge its memory: --zimage-comfyui-dir"
)
_NOT_FRESH = "drawn by a ComfyUI that ran already, from its own files of these names"


@contextmanager
def started(
    installation: Installation, plan: RunPlan, workflow: Workflow, progress: ReportProgress
) -> Iterator[ComfyUISession]:
    """One that sees the plan's files and no others; it is gone when the block is left."""
    what = f"ComfyUI with {plan.variant.name}, run {plan.index + 1}"
    with tempfile.TemporaryDirectory(prefix="zimage-comfyui-", ignore_cleanup_errors=True) as home:
        launch = Launch(plan, installation.flags, installation.python, installation.help, Path(home))
        process = ServerProcess(
            what,
            launch.command,
            cwd=installation.folder,
            log=plan.log,
            timeout_s=plan.timeout_s,
            progress=progress,
            gpu=plan.gpu,
        )
        with process, _connected(process.url, what, plan, progress, process.check) as (api, stream):
            process.wait_ready(lambda: api.answers(_PROBE_S))
            server = Server(
                what=what,
                api=api,
                stream=stream,
                log=process.log_text,
                check=process.check,
                pid=process.pid,
                started_s=process.started_s,
                run_log=RunLog(process.log_text),
                capability=_capability(plan),
                packages={"comfy-kitchen": installation.kitchen},
            )
            yield _session(server, plan, workflow, launch.names, progress)


@contextmanager
def attached(
    url: str, pid: int | None, known: dict[str, str], plan: RunPlan, workflow: Workflow, progress: ReportProgress
) -> Iterator[ComfyUISession]:
    """The one at `url`, whose process is `pid` where that is told; it runs on when the block is left.

    `known` keeps what its log said of its start, for later runs, when that has left the log.
    """
    what = f"ComfyUI at {url}"
    with _connected(url, what, plan, progress, lambda: None) as (api, stream):
        if not api.answers(min(_REQUEST_S, plan.timeout_s)):
            raise EngineError(f"{what}: does not answer", mend="start it, or check --zimage-comfyui-url")
        run_log = RunLog(api.log_text, known)
        if "vram_state" in (started_so := startup_facts(run_log.start)):
            # Its first lines are there: those of this start, whatever ran at that address before.
            known.clear()
            known.update(started_so)
        server = Server(
            what=what,
            api=api,
            stream=stream,
            log=api.log_text,
            check=lambda: None,
            pid=pid,
            started_s=0.0,
            run_log=run_log,
            capability=_capability(plan),
            used=_USED if api.has_drawn() or "got prompt" in run_log.start else "",
        )
        refuse_missing_flags(plan.variant, api.stats().system.argv)
        names = listed_files(what, api, workflow, plan.variant)
        session = _session(server, plan, workflow, names, progress, notes=(_NOT_FRESH,))
        server.require_idle()
        yield session


@contextmanager
def _connected(
    url: str, what: str, plan: RunPlan, progress: ReportProgress, check: Callable[[], None]
) -> Iterator[tuple[ComfyUIApi, EventStream]]:
    client, limit_s = uuid.uuid4().hex, min(_REQUEST_S, plan.timeout_s)
    waiting = f"waiting for {what}"
    http = Http(url, what=what, timeout_s=limit_s, check=check, waiting=lambda: progress(waiting, 0, 0))
    with http, EventStream(url, client, limit_s) as stream:
        yield ComfyUIApi(http, what, client), stream


def _session(
    server: Server,
    plan: RunPlan,
    workflow: Workflow,
    names: dict[Role, str],
    progress: ReportProgress,
    notes: tuple[str, ...] = (),
) -> ComfyUISession:
    refuse_other_device(server.what, server.api.stats(), plan.device, plan.environment.get("device", ""))
    return ComfyUISession(
        server,
        plan.variant,
        workflow,
        names,
        timeout_s=plan.timeout_s,
        ticked=lambda done, total: progress("step" if total else "drawing", done, total),
        notes=notes,
    )


def _capability(plan: RunPlan) -> str:
    return plan.environment.get("device_capability", "")
