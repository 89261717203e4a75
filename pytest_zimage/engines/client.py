"""The test process's end of a worker: starts it, asks, waits with a limit, and never leaves it behind.

The worker gets a process session of its own, so that Ctrl-C reaches only the test process, which then ends it. Its
standard error goes to a log file whose last lines explain a death.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import msgspec
from msgspec import Struct

from pytest_zimage import errors
from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.engines.processes import Start, child_environment
from pytest_zimage.engines.protocol import Close, Closed, Failure, Progress, Reply, Request, decode_reply, encode
from pytest_zimage.errors import EngineError, ZImageError

_TICK_S = 0.5
_CLOSE_S = 10.0
_TAIL_LINES = 15

Asked = TypeVar("Asked", bound=Struct)
Answered = TypeVar("Answered", bound=Struct)


class ChildClient(Generic[Asked, Answered]):
    """One child process and its protocol. A context manager: leaving it ends the process, whatever state it is in."""

    def __init__(
        self,
        what: str,
        log: Path,
        start: Start,
        *,
        timeout_s: float,
        progress: ReportProgress,
        decode: Callable[[bytes], Answered],
        gpu: str = "",
    ) -> None:
        """`what` names the process in messages ("worker of nvfp4, run 1"); `gpu` is the UUID of the only GPU it sees.

        `start` makes the process; `decode` turns a line into one of the protocol's replies and raises
        `msgspec.MsgspecError` on anything else.

        Raises `EngineError` if it cannot start.
        """
        self._what = what
        self._log = log
        self._timeout_s = timeout_s
        self._progress = progress
        self._decode = decode
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as stderr:
            try:
                self._process = start(stderr, child_environment(gpu))
            except OSError as error:
                raise EngineError(f"{what}: cannot be started: {error}", mend=f"run by hand: {start}") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        self._buffer = b""
        self.on_progress: Callable[[Progress], None] = lambda progress: None
        """Called with each sign of life, beside the progress shown."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stdout, selectors.EVENT_READ)

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def ask(self, request: Asked | Close, stage: str) -> Answered:
        """Send one request and return its reply.

        Raises the error that the process reports, or `EngineError` if it died, hung or answered nonsense.
        """
        self.send(request)
        return self.receive(stage)

    def send(self, request: Asked | Close) -> None:
        """Send one request without waiting; replies come in the order of the requests."""
        with contextlib.suppress(BrokenPipeError):
            self._stdin.write(encode(request))

    def receive(self, stage: str) -> Answered:
        """The next reply that is not progress."""
        last_sign = time.monotonic()
        shown = Progress(stage)
        while True:
            line = self._line(_TICK_S)
            if line is None:
                if time.monotonic() - last_sign > self._timeout_s:
                    raise self._hung(shown.stage)
                self._progress(shown.stage, shown.done, shown.total)
                continue
            last_sign = time.monotonic()
            if line == b"":
                raise self._died(shown.stage)
            reply = self._parse(line)
            if isinstance(reply, Progress):
                shown = reply
                self.on_progress(reply)
                self._progress(shown.stage, shown.done, shown.total)
            elif isinstance(reply, Failure):
                raise self._failed(reply)
            else:
                return reply

    def close(self) -> None:
        """Ask it to leave in good order; a worker that will not is ended, and that is an error."""
        reply = self.ask(Close(), "close")
        if not isinstance(reply, Closed):
            raise self._nonsense(repr(reply))
        try:
            status = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            raise self._hung("close") from None
        if status != 0:
            raise self._died("close")

    def end(self) -> None:
        """End the process and everything it started, and wait until it is gone. Safe to call twice."""
        self._selector.close()
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._stdin.close()
        self._stdout.close()

    def _line(self, wait_s: float) -> bytes | None:
        """One line without its end; None if none came in time; empty when the worker closed its side."""
        while b"\n" not in self._buffer:
            if not self._selector.select(wait_s):
                return None
            chunk = os.read(self._stdout.fileno(), 1 << 16)
            if not chunk:
                return b""
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line or b" "

    def _parse(self, line: bytes) -> Answered:
        try:
            return self._decode(line)
        except msgspec.MsgspecError as error:
            raise self._nonsense(f"{error}: {line[:200]!r}") from error

    def _failed(self, failure: Failure) -> ZImageError:
        kind = getattr(errors, failure.kind, None)
        if isinstance(kind, type) and issubclass(kind, ZImageError):
            return kind(f"{self._what}: {failure.message}", mend=failure.mend)
        detail = f"\n{failure.traceback.rstrip()}" if failure.traceback else ""
        return EngineError(f"{self._what}: {failure.kind}: {failure.message}{detail}", mend=f"its log: {self._log}")

    def _died(self, stage: str) -> EngineError:
        try:
            status = self._process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:
            return EngineError(f"{self._what}: closed its pipe during {stage} without leaving", mend=self._mend())
        if status < 0:
            name = signal.Signals(-status).name
            how = f"was killed by {name}"
            hint = "; the kernel ends a process like this when memory runs out" if name == "SIGKILL" else ""
        else:
            how, hint = f"left with exit status {status}", ""
        return EngineError(f"{self._what}: {how} during {stage}{hint}{self._tail()}", mend=self._mend())

    def _hung(self, stage: str) -> EngineError:
        self.end()
        return EngineError(
            f"{self._what}: said nothing for {self._timeout_s:g} s during {stage} and was ended{self._tail()}",
            mend=f"{self._mend()}; if this machine is that slow, raise --zimage-timeout",
        )

    def _nonsense(self, what: str) -> EngineError:
        return EngineError(f"{self._what}: answered something else than the protocol: {what}", mend=self._mend())

    def _mend(self) -> str:
        return f"its whole log: {self._log}"

    def _tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        return "\nlast lines of its log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""


class WorkerClient(ChildClient[Request, Reply]):
    """The client of an engine's worker process."""

    def __init__(
        self,
        what: str,
        log: Path,
        start: Start,
        *,
        timeout_s: float,
        progress: ReportProgress,
        gpu: str = "",
    ) -> None:
        """As `ChildClient`, with the protocol of `engines.protocol`."""
        super().__init__(what, log, start, timeout_s=timeout_s, progress=progress, decode=decode_reply, gpu=gpu)
