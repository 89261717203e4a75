"""A ComfyUI that answers, and how nothing of ours is left in its queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

from pytest_zimage.engines.comfyui.api import ComfyUIApi
from pytest_zimage.engines.comfyui.runlog import RunLog
from pytest_zimage.engines.comfyui.stream import EventStream
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.wording import last_words
from pytest_zimage.errors import EngineError

_SETTLE_S = 10.0
_POLL_S = 0.05


@dataclass(frozen=True)
class Server:
    """One server, started here or not."""

    what: str
    """Its name in messages."""
    api: ComfyUIApi
    stream: EventStream
    log: Callable[[], str]
    check: Callable[[], None]
    """Raises if its process has ended."""
    pid: int | None
    started_s: float
    """0: it ran before."""
    run_log: RunLog
    """The same log, beside this run."""
    used: str = ""
    """As `ServerSession.used`."""
    capability: str = ""
    """Compute capability of the run's GPU, as `9.0`; empty on the CPU, and where it is not known."""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions by package, of a server that is too old to tell them."""

    def require_idle(self) -> None:
        """Raises `EngineError` if it has something to do for others."""
        queue = self.api.queue()
        if others := len(queue) - len(queue.of(self.api.client)):
            raise EngineError(
                f"{self.what}: is busy with prompts of others: {len(queue.queue_running)} running,"
                f" {len(queue.queue_pending)} waiting ({others} not from here)",
                mend="wait until its queue is empty, or let a server be started: --zimage-comfyui-dir",
            )

    @contextmanager
    def settling(self, timeout_s: float, sleep: Callable[[float], None]) -> Iterator[None]:
        """Takes our prompts out of its queue when something goes wrong within.

        Raises `EngineError` instead of a `RequestFault` if it does not answer, or does not let go of a prompt.
        """
        try:
            yield
        except RequestFault:
            self._settle(min(_SETTLE_S, timeout_s), sleep)
            raise
        except BaseException:
            with suppress(EngineError):
                self._settle(min(_SETTLE_S, timeout_s), sleep)
            raise

    def _settle(self, limit_s: float, sleep: Callable[[float], None]) -> None:
        until = time.monotonic() + limit_s
        try:
            while mine := self.api.queue(limit_s).of(self.api.client):
                if time.monotonic() > until:
                    raise self._hangs(f"prompt {mine[0]} runs on {limit_s:g} s after it was interrupted")
                for prompt_id in mine:
                    self.api.withdraw(prompt_id, limit_s)
                sleep(_POLL_S)
        except RequestFault as fault:
            self.check()
            raise self._hangs(fault.message) from fault

    def _hangs(self, how: str) -> EngineError:
        return EngineError(
            f"{self.what}: hangs: {how}{last_words(self.log())}",
            mend="see its log; a server that was started here is ended now",
        )
