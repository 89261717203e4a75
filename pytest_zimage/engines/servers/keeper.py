"""Keeps one server: a program between the tests and the server, so that nothing of the server can outlive the tests.

It is run by path with nothing but the standard library: `keeper.py GRACE_S COMMAND...`. Standard error is the server's
log. It writes `pid N` or `error TEXT`, and `left STATUS` once the server has ended. When its standard input closes,
however that came about, it asks the server to leave, waits for at most GRACE_S, and kills all that descends from it: as
the reaper of orphans (prctl(2), PR_SET_CHILD_SUBREAPER) it has those that detached themselves among its own children.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_KILL_S = 10.0


def main(arguments: list[str]) -> int:
    grace_s, command = float(arguments[0]), arguments[1:]
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    # Ended by its standard input alone: a Ctrl-C goes to the tests, which then close it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    told, tell = os.pipe()
    for end in (told, tell):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(tell)
    try:
        server = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr,
            stderr=sys.stderr,
            start_new_session=True,
            preexec_fn=_usual_signals,  # noqa: PLW1509 - this program has one thread
        )
    except OSError as error:
        _say(f"error {error}")
        return 1
    _say(f"pid {server.pid}")
    running = True
    while True:
        ready, _, _ = select.select([0, told], [], [])
        if told in ready:
            os.read(told, 4096)
            running = _reap(server.pid, running)
        if 0 in ready and not os.read(0, 4096):
            break
    if running:
        with contextlib.suppress(ProcessLookupError):
            os.kill(server.pid, signal.SIGTERM)
    until = time.monotonic() + grace_s
    while running and (left_s := until - time.monotonic()) > 0:
        if select.select([told], [], [], left_s)[0]:
            os.read(told, 4096)
        running = _reap(server.pid, running)
    return _kill_all(server.pid, running)


def _kill_all(server: int, running: bool) -> int:
    """Kill every descendant until there is none; 0, or 1 if some would not go."""
    until = time.monotonic() + _KILL_S
    while family := descendants(os.getpid()):
        if time.monotonic() > until:
            _say(f"remain {' '.join(map(str, sorted(family)))}")
            return 1
        for pid in family:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
        running = _reap(server, running)
    return 0


def _reap(server: int, running: bool) -> bool:
    """Collect whoever ended; whether the server still runs."""
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                break
            if pid == server:
                running = False
                _say(f"left {os.waitstatus_to_exitcode(status)}")
    return running


def descendants(*roots: int) -> set[int]:
    """Everything below `roots`, as the kernel lists it."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with contextlib.suppress(OSError):
                # The name may hold spaces and brackets; what follows the last one is state and parent (proc(5)).
                fields = Path("/proc", entry, "stat").read_bytes().rpartition(b")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(entry))
    found: set[int] = set()
    waiting = [*roots]
    while waiting:
        below = set(children.get(waiting.pop(), ())) - found
        found |= below
        waiting += below
    return found


def _usual_signals() -> None:
    """An ignored signal stays ignored in the programs that one starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _say(line: str) -> None:
    # Whoever listened may be gone.
    with contextlib.suppress(OSError):
        os.write(1, line.encode(errors="replace") + b"\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
