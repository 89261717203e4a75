"""A server of its own for one run, or one that runs already; either way a session that asks it for images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from pytest_zimage.engines.base import ReportProgress, RunPlan
from pytest_zimage.engines.servers.http import Http
from pytest_zimage.engines.servers.process import ServerProcess
from pytest_zimage.engines.vllm_omni import api, launch, log, versions
from pytest_zimage.engines.vllm_omni.session import VllmOmniSession


@contextmanager
def started(
    executable: str, flags: Sequence[str], model: str, plan: RunPlan, progress: ReportProgress
) -> Iterator[VllmOmniSession]:
    """One that serves `model`; it is gone when the block is left."""
    variant = plan.variant
    command = launch.command(executable, model, variant, flags, 0)
    what = f"vLLM-Omni with {variant.name}, run {plan.index + 1}"
    server = ServerProcess(
        what,
        lambda port: launch.command(executable, model, variant, flags, port),
        cwd=plan.log.parent,
        log=plan.log,
        timeout_s=plan.timeout_s,
        progress=progress,
        gpu=plan.gpu,
        env=launch.environment_of(variant),
    )
    with server, _http(server.url, what, plan, progress, server.check) as http:
        server.wait_ready(lambda: api.is_ready(http))
        text = server.log_text()
        version = api.version_of(http, text)
        versions.check(version, plan.workload, same_schedule=plan.same_schedule)
        yield VllmOmniSession(
            http,
            model=api.served(http, what, lambda card: card.id == model),
            version=version,
            same_schedule=plan.same_schedule,
            environment={
                "vllm-omni": version.text,
                "vllm-omni.model": model,
                "vllm-omni.argv": " ".join(_without_port(command[3:])),
                "vllm-omni.attention": log.check_backend(variant, text),
            },
            started_s=server.started_s,
            pid=server.pid,
        )


@contextmanager
def attached(url: str, pid: int | None, plan: RunPlan, progress: ReportProgress) -> Iterator[VllmOmniSession]:
    """The one at `url`, whose process is `pid` where that is told; it runs on when the block is left."""
    variant = plan.variant
    what = f"vLLM-Omni at {url}"
    with _http(url, what, plan, progress, lambda: None) as http:
        api.is_ready(http)
        version = api.version_of(http, "")
        versions.check(version, plan.workload, same_schedule=plan.same_schedule)
        model = api.served(http, what, lambda card: api.is_model_of(card, variant))
        yield VllmOmniSession(
            http,
            model=model,
            version=version,
            same_schedule=plan.same_schedule,
            environment={
                "vllm-omni": version.text,
                "vllm-omni.model": model,
                "vllm-omni.attention": "unknown",
            },
            notes=(
                f"{what} was not started here: that it is quantised as {variant.name} says and attends with"
                f" {log.backend_of(variant)} is taken from you",
            ),
            pid=pid,
            used=api.why_used(http),
        )


def _http(url: str, what: str, plan: RunPlan, progress: ReportProgress, check: Callable[[], None]) -> Http:
    return Http(
        url,
        what=what,
        timeout_s=plan.timeout_s,
        check=check,
        waiting=lambda: progress("waiting for the server", 0, 0),
    )


def _without_port(words: list[str]) -> list[str]:
    """The flags without those that differ from run to run."""
    at = words.index("--port")
    return words[:at] + words[at + 2 :]
