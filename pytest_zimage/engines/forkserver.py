"""A process that imports what a worker needs, once, and then becomes workers by forking.

Started as `python -m pytest_zimage.engines.forkserver FD`, FD being a socket over which requests come, each with the
three standard streams of the worker to be. Importing torch, diffusers and transformers takes longer than drawing; a
fork of a process that has done it is as fresh as one that does it again, as long as no thread and no GPU was touched.
comfy-kitchen is left to the worker, since it asks for the GPU's capability when it is imported.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import socket
import sys
import time
from typing import NoReturn

from msgspec import Struct, json

from pytest_zimage.engines import worker
from pytest_zimage.engines.pipes import die_with_parent

PRELOADED = (
    "torch",
    "torch._dynamo",
    "numpy",
    "PIL.Image",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.qwen3.modeling_qwen3",
    "diffusers.models.attention_dispatch",
    "diffusers.models.autoencoders.autoencoder_kl",
    "diffusers.models.transformers.transformer_z_image",
    "diffusers.pipelines.z_image.pipeline_z_image",
    "diffusers.schedulers.scheduling_flow_match_euler_discrete",
)


class Fork(Struct, frozen=True, tag=True):
    """Become one more worker, with the three file descriptors that come along as its standard streams."""

    device: str
    """As `engines.worker` takes it."""
    environment: dict[str, str]


class Wait(Struct, frozen=True, tag=True):
    """Ask for the exit status of a worker."""

    pid: int
    block: bool


class Imported(Struct, frozen=True, tag=True):
    """The first answer: ready to fork."""

    import_s: float


class Forked(Struct, frozen=True, tag=True):
    pid: int


class Status(Struct, frozen=True, tag=True):
    """None: it runs. Negative: the signal that ended it."""

    status: int | None


def main(arguments: list[str]) -> NoReturn:
    (descriptor,) = arguments
    control = socket.socket(fileno=int(descriptor))
    die_with_parent()
    began = time.perf_counter()
    # Nothing that an import makes is garbage soon, and looking for it again and again takes a quarter of the time.
    gc.disable()
    for name in PRELOADED:
        importlib.import_module(name)
    # What is alive now stays; a collection in a worker would copy every page of it.
    gc.freeze()
    gc.enable()
    import_s = time.perf_counter() - began
    _send(control, Imported(import_s))
    while True:
        line, descriptors, _, _ = socket.recv_fds(control, 1 << 20, 3)
        if not line:
            _leave(0)
        while not line.endswith(b"\n"):
            line += control.recv(1 << 20)
        request = json.decode(line, type=Fork | Wait)
        if isinstance(request, Wait):
            _send(control, Status(_status(request)))
            continue
        pid = os.fork()
        if pid == 0:
            control.close()
            _become_worker(request, descriptors)
            _leave(worker.main([request.device], import_s))
        for each in descriptors:
            os.close(each)
        _send(control, Forked(pid))


def _become_worker(request: Fork, descriptors: list[int]) -> None:
    os.setsid()
    for standard, given in enumerate(descriptors):
        os.dup2(given, standard)
        os.close(given)
    os.environ.clear()
    os.environ.update(request.environment)


def _leave(status: int) -> NoReturn:
    """End without taking apart what the packages built: the kernel does in milliseconds what takes Python a second."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _status(request: Wait) -> int | None:
    """What became of a worker. With one that has ended goes what it started, such as the processes of a compiler.

    They would go on for a moment, and write where the next run expects nothing. Before its status is taken, the
    worker's number cannot be another's.
    """
    if os.waitid(os.P_PID, request.pid, os.WEXITED | os.WNOWAIT | (0 if request.block else os.WNOHANG)) is None:
        return None
    with contextlib.suppress(ProcessLookupError):
        os.killpg(request.pid, signal.SIGKILL)
    _, status = os.waitpid(request.pid, 0)
    return os.waitstatus_to_exitcode(status)


def _send(control: socket.socket, answer: Struct) -> None:
    control.sendall(json.encode(answer) + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
