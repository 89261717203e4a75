"""A command run under a keeper, seen from the tests: whether it runs, how it ended, and its end with all it started."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import psutil

from pytest_zimage.engines.servers import keeper

_KEEPER_S = 30.0
"""Longest wait for what a keeper does at once."""
_SIGN_S = 0.5
_PF_EXITING = 0x4
"""Of include/linux/sched.h."""


class Kept:
    """One command. `pid` is its process; whoever makes one calls `end`."""

    def __init__(
        self, command: Sequence[str], *, cwd: Path, env: Mapping[str, str], output: IO[bytes], grace_s: float
    ) -> None:
        """`output` gets both outputs of the command; `grace_s` is what it has to leave by itself when it is to end.

        Raises `OSError` if it cannot be started.
        """
        self._grace_s = grace_s
        self._told = b""
        self._status: int | None = None
        self._remain = ""
        self.pid = 0
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", "-S", keeper.__file__, str(grace_s), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            cwd=cwd,
            start_new_session=True,
            bufsize=0,
            env=env,
        )
        assert self._keeper.stdin is not None
        assert self._keeper.stdout is not None
        self._stdin, self._stdout = self._keeper.stdin, self._keeper.stdout
        try:
            kind, _, value = self._line(_KEEPER_S).partition(" ")
            if kind != "pid":
                raise OSError(value or "its keeper said nothing")
            self.pid = int(value)
        except BaseException:
            self.end(lambda: None)
            raise

    def ended(self) -> str:
        """How it ended, in words; empty while it runs."""
        # A connection that it drops while it dies is noticed before its keeper is told.
        while self._status is None and (line := self._line(_KEEPER_S if _is_exiting(self.pid) else 0.0)):
            self._hear(line)
        if self._status is not None:
            return _in_words(self._status)
        return f"lost its keeper, which {_in_words(status)}" if (status := self._keeper.poll()) is not None else ""

    def end(self, sign: Callable[[], None]) -> str:
        """End it and all it started, and wait until they are gone, calling `sign` meanwhile; safe to call twice.

        Returns the numbers of processes that would not go, as a rule none.
        """
        if self._stdout.closed:
            return self._remain
        self._stdin.close()
        try:
            until = time.monotonic() + self._grace_s + _KEEPER_S
            # It leaves when all is done, and has said by then what remains.
            while (line := self._line(_SIGN_S)) or (self._keeper.poll() is None and time.monotonic() < until):
                self._hear(line)
                sign()
        finally:
            if self._keeper.poll() is None or self._keeper.returncode < 0:
                self._end_by_hand()
            self._stdout.close()
        return self._remain

    def _end_by_hand(self) -> None:
        """For a keeper that is dead or hangs: what can still be found is killed from here."""
        family: list[psutil.Process] = []
        for pid in filter(None, (self._keeper.pid, self.pid)):
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                family += [process, *process.children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        _, alive = psutil.wait_procs(family, timeout=_KEEPER_S)
        self._keeper.wait()
        self._remain = " ".join(str(process.pid) for process in alive)

    def _hear(self, line: str) -> None:
        kind, _, value = line.partition(" ")
        if kind == "left":
            self._status = int(value)
        elif kind == "remain":
            self._remain = value

    def _line(self, wait_s: float) -> str:
        """The keeper's next line; empty if none comes in time or no more will."""
        until = time.monotonic() + wait_s
        while b"\n" not in self._told:
            left_s = max(until - time.monotonic(), 0.0)
            if self._stdout.closed or not select.select([self._stdout], [], [], left_s)[0]:
                return ""
            chunk = os.read(self._stdout.fileno(), 4096)
            if not chunk:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._keeper.wait(left_s)
                return ""
            self._told += chunk
        line, _, self._told = self._told.partition(b"\n")
        return line.decode(errors="replace")


def _is_exiting(pid: int) -> bool:
    """Whether it is beyond return, or gone: the flag is set before its files and sockets are closed."""
    try:
        # The name may hold spaces and brackets; the flags are the seventh field after it (proc(5)).
        flags = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[6]
    except (OSError, IndexError):
        return True
    return bool(int(flags) & _PF_EXITING)


def _in_words(status: int) -> str:
    """An exit status, negative for a signal."""
    if status >= 0:
        return f"left with exit status {status}"
    try:
        name = signal.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    hint = "; the kernel ends a process like this when memory runs out" if name == "SIGKILL" else ""
    return f"was killed by {name}{hint}"
