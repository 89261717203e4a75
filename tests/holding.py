"""A process that holds as much memory as it is told to, itself or in its children."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import psutil

HOLDER = """
import subprocess, sys
held = []
print("ready", flush=True)
for line in sys.stdin:
    what, _, amount = line.strip().partition(" ")
    if what == "hold":
        held.append(b"x" * int(amount))
    elif what == "drop":
        held.clear()
    elif what == "child":
        child = subprocess.Popen(
            [sys.executable, "-c", sys.argv[1], sys.argv[1]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            start_new_session=True,
        )
        child.stdout.readline()
    elif what == "ask":
        print(amount, file=child.stdin, flush=True)
        child.stdout.readline()
    elif what == "detached":
        quiet = [sys.executable, "-c", "import signal; print(flush=True); signal.pause()"]
        subprocess.Popen(quiet, stdout=subprocess.PIPE).stdout.readline()
    elif what == "end":
        child.stdin.close()
        child.wait()
    print(what, flush=True)
"""


class Holder:
    """A process that holds what it is told to."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        assert self.process.stdout.readline() == "ready\n"

    def __call__(self, order: str) -> None:
        print(order, file=self.process.stdin, flush=True)
        assert self.process.stdout.readline().split() == order.split()[:1]


@contextmanager
def holding():
    holder = Holder()
    with holder.process:
        try:
            yield holder
        finally:
            for child in psutil.Process(holder.pid).children(recursive=True) if holder.process.poll() is None else ():
                child.kill()
            holder.process.kill()
