"""The test process's end of the fork server: starts it with the first worker, and has it make each one."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import IO, TypeVar

from msgspec import json

from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.engines.forkserver import Fork, Forked, Imported, Status, Wait
from pytest_zimage.engines.processes import child_environment
from pytest_zimage.errors import EngineError

_POLL_S = 0.02
_TICK_S = 0.5
_NO_ENVIRONMENT: Mapping[str, str] = MappingProxyType({})

Answer = TypeVar("Answer", Imported, Forked, Status)


class ForkServer:
    """One process with its imports done. `close()` ends it; so does the end of this process, however it comes."""

    def __init__(self, log: Path) -> None:
        """Starts importing; `ready` waits for it. `log` takes its standard error.

        Raises `EngineError` if it cannot start.
        """
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        self._control, theirs = socket.socketpair()
        # comfy-kitchen, torch and diffusers ask whether there is a GPU; asked through the driver, no fork could use it.
        # A thread of numpy's BLAS would not survive the fork, and no worker multiplies with numpy.
        settings = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "OPENBLAS_NUM_THREADS": "1"}
        environment = {**child_environment(""), **settings}
        with theirs, log.open("wb") as stderr:
            try:
                self._process = subprocess.Popen(
                    (sys.executable, "-m", "pytest_zimage.engines.forkserver", str(theirs.fileno())),
                    stdin=subprocess.DEVNULL,
                    stdout=stderr,
                    stderr=stderr,
                    start_new_session=True,
                    pass_fds=(theirs.fileno(),),
                    env=environment,
                )
            except OSError as error:
                raise EngineError(f"the fork server cannot be started: {error}") from error
        self._imported = False

    def ready(self, timeout_s: float, progress: ReportProgress) -> None:
        """Wait until everything is imported. Raises `EngineError` if that fails, or takes longer than `timeout_s`."""
        began = time.monotonic()
        while not self._imported:
            if select.select([self._control], [], [], _TICK_S)[0]:
                self._receive(Imported)
                self._imported = True
            elif time.monotonic() - began > timeout_s:
                self.close()
                raise EngineError(
                    f"importing torch and diffusers took more than {timeout_s:g} s",
                    mend=f"its log: {self._log}; if this machine is that slow, raise --zimage-timeout",
                )
            progress("import", 0, 0)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def worker(self, device: str, environment: Mapping[str, str] = _NO_ENVIRONMENT) -> ForkedStart:
        """How a worker for `device` is started; `environment` is what its own has beside the usual one."""
        return ForkedStart(self, device, environment)

    def fork(self, device: str, environment: Mapping[str, str], streams: tuple[int, int, int]) -> int:
        """The process number of a new worker. Raises `EngineError` if the server is not there any more."""
        line = json.encode(Fork(device, dict(environment))) + b"\n"
        with contextlib.suppress(BrokenPipeError):
            sent = socket.send_fds(self._control, [line], list(streams))
            self._control.sendall(line[sent:])
        return self._receive(Forked).pid

    def status(self, pid: int, *, block: bool) -> int | None:
        """As `waitpid`; a worker whose server has died went with it."""
        try:
            self._control.sendall(json.encode(Wait(pid, block)) + b"\n")
            return self._receive(Status).status
        except (OSError, EngineError):
            return -signal.SIGKILL

    def close(self) -> None:
        """End the server. Workers that still run go with it."""
        self._control.close()
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _receive(self, kind: type[Answer]) -> Answer:
        line = b""
        while not line.endswith(b"\n"):
            try:
                part = self._control.recv(1 << 16)
            except ConnectionResetError:  # it ended with a request unread
                part = b""
            if not part:
                raise self._gone()
            line += part
        return json.decode(line, type=kind)

    def _gone(self) -> EngineError:
        self._process.wait()
        words = self._log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
        told = "".join(f"\n    {word}" for word in words)
        return EngineError(
            f"the process that imports torch and diffusers left with status {self._process.returncode}{told}",
            mend=f"its whole log: {self._log}",
        )


class ForkedStart:
    """Starts one worker by forking the server."""

    def __init__(self, server: ForkServer, device: str, environment: Mapping[str, str]) -> None:
        self._server, self._device, self._environment = server, device, environment

    def __call__(self, stderr: IO[bytes], environment: Mapping[str, str]) -> ForkedProcess:
        input_read, input_write = os.pipe()
        output_read, output_write = os.pipe()
        try:
            own = {**environment, **self._environment}
            pid = self._server.fork(self._device, own, (input_read, output_write, stderr.fileno()))
        except BaseException:
            os.close(input_write)
            os.close(output_read)
            raise
        finally:
            os.close(input_read)
            os.close(output_write)
        return ForkedProcess(self._server, pid, input_write, output_read)

    def __str__(self) -> str:
        return f"{sys.executable} -m pytest_zimage.engines.worker {self._device}"


class ForkedProcess:
    """A worker that the server has forked; only the server can ask the kernel how it ended."""

    def __init__(self, server: ForkServer, pid: int, stdin: int, stdout: int) -> None:
        self._server = server
        self.pid = pid
        self.stdin: IO[bytes] = os.fdopen(stdin, "wb", buffering=0)
        self.stdout: IO[bytes] = os.fdopen(stdout, "rb", buffering=0)
        self._status: int | None = None

    def poll(self) -> int | None:
        if self._status is None:
            self._status = self._server.status(self.pid, block=False)
        return self._status

    def wait(self, timeout: float | None = None) -> int:
        if timeout is None:
            self._status = self._server.status(self.pid, block=True) if self._status is None else self._status
            assert self._status is not None
            return self._status
        until = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            time.sleep(_POLL_S)
        return status
