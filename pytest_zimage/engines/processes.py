"""How a child process comes to be: a program that is run, or a copy of one that has its imports behind it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Protocol


class ChildProcess(Protocol):
    """What the client needs of a child; a `subprocess.Popen` is one. It leads a process session of its own."""

    @property
    def pid(self) -> int: ...

    @property
    def stdin(self) -> IO[bytes] | None: ...

    @property
    def stdout(self) -> IO[bytes] | None: ...

    def poll(self) -> int | None:
        """Its exit status, negative for a signal; None while it runs."""

    def wait(self, timeout: float | None = None) -> int:
        """Raises `subprocess.TimeoutExpired`."""


Start = Callable[[IO[bytes], Mapping[str, str]], ChildProcess]
"""Starts a child with its standard error and its environment; raises `OSError` or `EngineError`."""


class Command:
    """Starts a program."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._arguments = tuple(arguments)

    def __call__(self, stderr: IO[bytes], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._arguments,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
            bufsize=0,
            env=environment,
        )

    def __str__(self) -> str:
        return " ".join(self._arguments)


def child_environment(gpu: str) -> dict[str, str]:
    """A child's environment: this one, the one GPU it may see, and OpenMP threads that soon stop spinning.

    Threads that spin while they wait for one that has lost its core to a neighbour burn the neighbour's time and their
    own: on two cores with one busy neighbour an image of the tiny model took 0.4 to 19 s. After 1000 spins to sleep it
    took 0.16 to 0.20 s there, and 0.075 s alone, as with endless spinning; never to spin took 0.11 and 0.15 s.
    """
    environment = {"GOMP_SPINCOUNT": "1000", **os.environ}
    if gpu:
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return environment
