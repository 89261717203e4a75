"""The client of a worker: a dead, hung or babbling one is an error with its last words, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from pytest_zimage.engines.client import WorkerClient
from pytest_zimage.engines.processes import Command
from pytest_zimage.engines.protocol import Closed, Draw, Hello, Progress, Report, encode
from pytest_zimage.errors import CheckpointError, EngineError

HELLO = Hello(pid=1, import_s=0.0, rss_idle_bytes=1, environment={})


@pytest.fixture
def worker(tmp_path):
    """Starts a worker whose body is a few lines of Python; `say(bytes)` answers, `ask()` reads a request line."""
    clients = []

    def start(body: str, *, timeout_s: float = 30.0) -> WorkerClient:
        script = tmp_path / "worker.py"
        script.write_text(
            "import os, signal, sys, time\n"
            "say = lambda data: (sys.stdout.buffer.write(data), sys.stdout.buffer.flush())\n"
            "ask = sys.stdin.buffer.readline\n" + textwrap.dedent(body)
        )
        client = WorkerClient(
            "worker of nvfp4, run 1",
            tmp_path / "worker.log",
            Command([sys.executable, str(script)]),
            timeout_s=timeout_s,
            progress=lambda stage, done, total: None,
        )
        clients.append(client)
        return client

    yield start
    for client in clients:
        client.end()
        assert not psutil.pid_exists(client.pid)


def test_replies_come_back_typed(worker):
    client = worker(
        f"say({encode(HELLO)!r})\nask()\nsay({encode(Progress('rounds', 1, 2))!r})\nsay({encode(Closed())!r})"
    )
    assert client.receive("import") == HELLO
    client.close()


def test_death_names_status_stage_and_last_words(worker):
    client = worker("ask()\nprint('boom: no such kernel', file=sys.stderr)\nsys.exit(3)")
    with pytest.raises(EngineError) as caught:
        client.ask(Draw(rounds=1), "rounds")
    text = str(caught.value)
    assert "worker of nvfp4, run 1: left with exit status 3 during rounds" in text
    assert "boom: no such kernel" in text
    assert "worker.log" in text


def test_death_by_signal_names_the_signal(worker):
    client = worker("ask()\nos.kill(os.getpid(), signal.SIGKILL)")
    with pytest.raises(EngineError, match="was killed by SIGKILL during report; the kernel ends a process like this"):
        client.ask(Report(), "report")


def test_silence_is_ended_and_said(worker):
    client = worker("ask()\nsignal.pause()", timeout_s=0.6)
    with pytest.raises(EngineError, match=r"said nothing for 0.6 s during load and was ended(.|\n)*--zimage-timeout"):
        client.ask(Draw(rounds=1), "load")
    assert not psutil.pid_exists(client.pid)


@pytest.mark.parametrize("line", [b"hello\n", b'{"type":"Nonsense"}\n', b"\n"])
def test_nonsense_is_an_error(worker, line):
    client = worker(f"ask()\nsay({line!r})\nask()")
    with pytest.raises(EngineError, match="answered something else than the protocol"):
        client.ask(Report(), "report")


def test_a_reported_failure_comes_back_as_itself(worker):
    failure = (
        b'{"type":"Failure","kind":"CheckpointError","message":"x.safetensors: truncated","mend":"fetch it again"}\n'
    )
    client = worker(f"ask()\nsay({failure!r})\nask()")
    with pytest.raises(
        CheckpointError, match=r"worker of nvfp4, run 1: x.safetensors: truncated\n  mend: fetch it again"
    ):
        client.ask(Report(), "report")


def test_an_unforeseen_failure_carries_its_traceback(worker):
    failure = b'{"type":"Failure","kind":"RuntimeError","message":"CUDA error","traceback":"Traceback: line 7"}\n'
    client = worker(f"ask()\nsay({failure!r})\nask()")
    with pytest.raises(EngineError, match=r"RuntimeError: CUDA error\nTraceback: line 7"):
        client.ask(Report(), "report")


def test_children_of_the_worker_end_with_it(worker, tmp_path):
    client = worker(
        f"""
        import subprocess
        child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
        open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
        say({encode(HELLO)!r})
        ask()
        """
    )
    client.receive("import")
    child = psutil.Process(int((tmp_path / "child").read_text()))
    client.end()
    _gone, alive = psutil.wait_procs([child], timeout=10)
    assert not alive or child.status() == psutil.STATUS_ZOMBIE


def test_a_program_that_is_not_there(tmp_path):
    with pytest.raises(EngineError, match="cannot be started"):
        WorkerClient("worker", tmp_path / "log", Command([str(tmp_path / "nothing")]), timeout_s=1, progress=print)


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_the_real_worker_ends_when_its_parent_is_killed(tmp_path, end):
    """Even a test process that had no time to clean up leaves no worker behind."""
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            textwrap.dedent(
                f"""
                import signal
                from pathlib import Path
                from pytest_zimage.engines.client import WorkerClient
                from pytest_zimage.engines.forking import ForkServer
                log = Path({str(tmp_path / "log")!r})
                server = ForkServer(log.with_name("forkserver.log"))
                server.ready(60, lambda *_: None)
                client = WorkerClient("w", log, server.worker("cpu"), timeout_s=60, progress=lambda *_: None)
                print(client.pid, flush=True)
                client.receive("import")
                print("ready", flush=True)
                signal.pause()
                """
            ),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    assert parent.stdout.readline() == "ready\n"
    assert worker.is_running()
    os.kill(parent.pid, end)
    parent.wait(30)
    deadline = time.monotonic() + 30
    while worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker outlived its parent"
