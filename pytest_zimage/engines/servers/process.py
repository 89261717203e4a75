"""A server as a child of the tests: started on a free loopback port, watched, and gone with all it started when closed.

A keeper (`keeper.py`) stands between the tests and the server and ends it even where the tests are killed.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Self

import psutil

from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.engines.processes import child_environment
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.keeper import descendants
from pytest_zimage.engines.servers.kept import Kept
from pytest_zimage.engines.servers.wording import last_words
from pytest_zimage.errors import EngineError

HOST = "127.0.0.1"
GRACE_S = 10.0
"""Given to a server to leave by itself, so that it can clean up what would outlive it, such as shared memory."""
_POLL_S = 0.1
_TIMEOUTS = 6
"""A start may take as many limits of silence."""
_TAIL_BYTES = 1 << 16
_NO_ENVIRONMENT: Mapping[str, str] = MappingProxyType({})


class ServerProcess:
    """One server and its processes. A context manager: leaving it ends all of them, whatever state they are in.

    `url` is where the server listens, `pid` its first process, `started_s` the seconds until it was ready (0 before).
    """

    def __init__(
        self,
        what: str,
        make_command: Callable[[int], Sequence[str]],
        *,
        cwd: Path,
        log: Path,
        timeout_s: float,
        progress: ReportProgress,
        gpu: str,
        env: Mapping[str, str] = _NO_ENVIRONMENT,
        grace_s: float = GRACE_S,
    ) -> None:
        """`what` names the server in messages; `make_command` makes its command of the port it is to listen on.

        Both its outputs are appended to `log`. `timeout_s` limits its silence until it is ready; `gpu` is the UUID of
        the only GPU it sees, `env` what its environment has beside this process's own.

        Raises `EngineError` if it cannot be started.
        """
        self._what, self._log, self._timeout_s, self._progress = what, log, timeout_s, progress
        self.port = _free_port()
        self.url = f"http://{HOST}:{self.port}"
        self.started_s = 0.0
        self._began = time.monotonic()
        command = [str(part) for part in make_command(self.port)]
        environment = {"PYTHONUNBUFFERED": "1", **child_environment(gpu), **env}
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._log_begins = output.tell()
            try:
                self._kept = Kept(command, cwd=cwd, env=environment, output=output, grace_s=grace_s)
            except OSError as error:
                raise EngineError(
                    f"{what}: cannot be started: {error}", mend=f"run by hand: {' '.join(command)}"
                ) from error
        self.pid = self._kept.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        remain = self._kept.end(lambda: self._progress("server end", 0, 0))
        if remain and error is None:
            raise EngineError(f"{self._what}: processes that could not be ended: {remain}", mend="end them by hand")

    def close(self) -> None:
        """End the server and all it started; raises `EngineError` if a process will not go. Safe to call twice."""
        self.__exit__(None, None, None)

    def wait_ready(self, probe: Callable[[], bool]) -> None:
        """Wait until `probe` says that the server answers; a `RequestFault` of it means not yet.

        Raises `EngineError` if the server ends first, is silent in its log for `timeout_s`, takes six times that long,
        or is not the one that listens on its port.
        """
        size, since = -1, time.monotonic()
        while not _says_yes(probe):
            self.check()
            self._progress("server start", 0, 0)
            now = time.monotonic()
            if (grown := self._log.stat().st_size) != size:
                size, since = grown, now
            if now - since > self._timeout_s:
                raise self._not_ready(f"and logged nothing for {self._timeout_s:g} s")
            if now - self._began > _TIMEOUTS * self._timeout_s:
                raise self._not_ready(f"however much it logged, within {_TIMEOUTS * self._timeout_s:g} s")
            time.sleep(_POLL_S)
        self.started_s = time.monotonic() - self._began
        self.check()
        self._check_port()

    def check(self) -> None:
        """Raises `EngineError` with exit status and last words if the server has ended."""
        if how := self._kept.ended():
            raise EngineError(f"{self._what}: the server {how}{self._tail()}", mend=self._mend())

    def log_text(self) -> str:
        """All that the server has written so far."""
        with self._log.open("rb") as log:
            log.seek(self._log_begins)
            return log.read().decode(errors="replace")

    def _check_port(self) -> None:
        """Another process may have taken the port before the server did, and answer in its place."""
        addresses = _listening(self.pid, self.port)
        if not addresses:
            raise EngineError(
                f"{self._what}: port {self.port} is answered by a process that is not of this server{self._tail()}",
                mend="run it again: another port will be chosen",
            )
        if others := sorted(addresses - {HOST}):
            raise EngineError(
                f"{self._what}: listens on {', '.join(others)} and not on {HOST} alone", mend="drop flags that make it"
            )

    def _not_ready(self, why: str) -> EngineError:
        return EngineError(
            f"{self._what}: did not become ready, {why}{self._tail()}",
            mend=f"{self._mend()}; if it is that slow, raise --zimage-timeout",
        )

    def _mend(self) -> str:
        return f"its whole log: {self._log}"

    def _tail(self) -> str:
        with self._log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_begins, size - _TAIL_BYTES))
            return last_words(log.read().decode(errors="replace"))


def _free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _says_yes(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except RequestFault:
        return False


def _listening(root_pid: int, port: int) -> set[str]:
    """Addresses on which `root_pid` or a descendant listens on `port`."""
    found: set[str] = set()
    for pid in (root_pid, *descendants(root_pid)):
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            # Of psutil 6 on; before it, the other name.
            connections = getattr(process, "net_connections", None) or process.connections
            found |= {
                c.laddr.ip for c in connections(kind="tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port
            }
    return found
