"""Workers made by forking one process that has its imports behind it: each fresh, each accounted for, none left behind.

Most of it on a real server whose packages and worker are a few scripted lines, so that it starts at once; what the real
imports do to a server is asked of a real one.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from msgspec import structs

from pytest_zimage.catalog import load_catalog
from pytest_zimage.catalog.device_class import FitnessLimits
from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.client import WorkerClient
from pytest_zimage.engines.fit import FitPlan
from pytest_zimage.engines.forking import ForkedProcess, ForkServer
from pytest_zimage.engines.local import LocalEngine
from pytest_zimage.engines.protocol import Injection
from pytest_zimage.errors import CheckpointError, EngineError, ZImageError

# Stands where torch would be, the first package that the server imports.
PACKAGES = """
import json, os, signal, subprocess, sys, types
from pathlib import Path
from pytest_zimage.engines import worker
from pytest_zimage.engines.pipes import die_with_parent

server = sys.modules["__main__"]
for name in server.PRELOADED[1:]:
    sys.modules[name] = types.ModuleType(name)


def main(arguments, imported_s):
    die_with_parent()
    ask = lambda: json.loads(sys.stdin.buffer.readline())
    say = lambda thing: os.write(1, json.dumps(thing).encode() + b"\\n")
{body}


worker.main = main
"""

OBEDIENT = """
while True:
    match ask():
        case "who":
            say({
                "pid": os.getpid(),
                "parent": os.getppid(),
                "session": os.getsid(0),
                "environment": dict(os.environ),
                "device": arguments[0],
                "imported_s": imported_s,
                "open": sorted(os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
                               if os.path.exists(f"/proc/self/fd/{fd}")),
            })
        case "speak":
            print("one word", file=sys.stderr, flush=True)
            say("spoken")
        case "start":
            say(subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"]).pid)
        case "crash":
            raise RuntimeError("no such kernel")
        case int(status):
            return status
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Makes `body` the worker of every server that is started from now on, and its packages an empty shell."""
    folder = tmp_path / "packages"
    folder.mkdir()

    def write(body: str = OBEDIENT, *, source: str = PACKAGES) -> None:
        text = textwrap.indent(textwrap.dedent(body), "    ")
        (folder / "torch.py").write_text(source.replace("{body}", text))

    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    return write


@pytest.fixture
def server(tmp_path, packages):
    """A server of obedient workers, ready."""
    packages()
    server = ForkServer(tmp_path / "forkserver.log")
    server.ready(60, silent)
    yield server
    server.close()


@pytest.fixture
def fork(server, tmp_path):
    """Forks a worker; its log is named after its number."""
    made: list[Forked] = []

    def start(device: str = "cpu", **environment: str) -> Forked:
        made.append(Forked(server, tmp_path / f"worker-{len(made)}.log", device, environment))
        return made[-1]

    yield start
    for worker in made:
        worker.end()


class Forked:
    """A scripted worker and the test's end of it."""

    def __init__(self, server: ForkServer, log: Path, device: str, environment: dict[str, str]) -> None:
        self.log = log
        with log.open("wb") as stderr:
            self.process: ForkedProcess = server.worker(device)(stderr, environment)

    def ask(self, thing) -> object:
        self.tell(thing)
        return json.loads(self.process.stdout.readline())

    def tell(self, thing) -> None:
        self.process.stdin.write(json.dumps(thing).encode() + b"\n")

    def end(self) -> None:
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def silent(stage: str, done: int, total: int) -> None:
    pass


def server_of(worker: Forked) -> psutil.Process:
    return psutil.Process(psutil.Process(worker.process.pid).ppid())


def gone(*processes: psutil.Process) -> bool:
    """Whether they end; one that nobody has waited for yet has ended too."""
    _, alive = psutil.wait_procs(processes, timeout=30)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


# ---- a worker of a server ------------------------------------------------------------------------------------------


def test_a_worker_is_a_process_of_its_own(fork) -> None:
    worker = fork("cuda:1", CUDA_VISIBLE_DEVICES="GPU-7", ONLY="mine")
    told = worker.ask("who")
    assert told["pid"] == worker.process.pid != os.getpid()
    assert told["session"] == worker.process.pid, "Ctrl-C would reach it, and killpg would reach others"
    assert told["parent"] != os.getpid()
    assert told["device"] == "cuda:1"
    assert told["imported_s"] > 0


def test_a_worker_has_the_environment_it_was_given_and_no_other(fork, monkeypatch) -> None:
    monkeypatch.setenv("OF_THE_SERVER", "1")
    told = fork(CUDA_VISIBLE_DEVICES="GPU-7", ONLY="mine").ask("who")
    assert told["environment"] == {"CUDA_VISIBLE_DEVICES": "GPU-7", "ONLY": "mine"}


def test_each_worker_speaks_into_its_own_log(fork, tmp_path) -> None:
    first, second = fork(), fork()
    assert second.ask("speak") == "spoken"
    assert (first.log.read_text(), second.log.read_text()) == ("", "one word\n")
    assert (tmp_path / "forkserver.log").read_text() == ""


def test_a_worker_holds_nothing_of_the_server_or_of_its_neighbours(fork) -> None:
    """An end of a pipe that a neighbour holds too would hide the death of the one that it belongs to."""
    fork()
    found = fork().ask("who")["open"]
    assert sum(name.startswith("pipe:") for name in found) == 2, found
    assert not any(name.startswith("socket:") for name in found), found


def test_one_worker_after_another(fork) -> None:
    first = fork(NUMBER="1")
    who = first.ask("who")
    first.tell(0)
    assert first.process.wait() == 0
    second = fork(NUMBER="2").ask("who")
    assert second["pid"] != who["pid"]
    assert (second["parent"], second["environment"]) == (who["parent"], {"NUMBER": "2"})


# ---- how it ended ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("timeout", [None, 30.0])
@pytest.mark.parametrize("status", [0, 3])
def test_the_exit_status_comes_back(fork, status, timeout) -> None:
    worker = fork()
    assert worker.process.poll() is None
    worker.tell(status)
    assert worker.process.wait(timeout) == status
    assert worker.process.poll() == worker.process.wait() == status, "asked again, the kernel knows it no more"


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_a_signal_comes_back(fork, timeout) -> None:
    worker = fork()
    os.kill(worker.process.pid, signal.SIGKILL)
    assert worker.process.wait(timeout) == -signal.SIGKILL
    assert worker.process.poll() == -signal.SIGKILL


def test_an_exception_is_a_status_and_a_traceback_in_the_log(fork) -> None:
    worker = fork()
    worker.tell("crash")
    assert worker.process.wait(30) == 1
    assert "RuntimeError: no such kernel" in worker.log.read_text()


def test_waiting_has_an_end(fork) -> None:
    worker = fork()
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(0.01)
    assert worker.ask("speak") == "spoken", "it was ended, and only waited for"


# ---- a server that does not become ready ----------------------------------------------------------------------------


def test_packages_that_cannot_be_imported(packages, tmp_path) -> None:
    packages(source="raise ImportError('libcudart.so.13: cannot open shared object file')")
    server = ForkServer(tmp_path / "forkserver.log")
    with pytest.raises(EngineError, match="left with status 1") as caught:
        server.ready(60, silent)
    assert "ImportError: libcudart.so.13: cannot open" in caught.value.message
    assert str(tmp_path / "forkserver.log") in caught.value.mend
    assert not server.alive
    server.close()


def test_importing_has_a_limit(packages, tmp_path) -> None:
    packages(source="import signal\nsignal.pause()")
    server = ForkServer(tmp_path / "forkserver.log")
    told: list[str] = []
    with pytest.raises(EngineError, match=r"importing .* took more than 0.6 s") as caught:
        server.ready(0.6, lambda stage, *_: told.append(stage))
    assert "--zimage-timeout" in caught.value.mend
    assert set(told) == {"import"}
    assert not server.alive


# ---- a server that dies --------------------------------------------------------------------------------------------


def test_workers_go_with_their_server(fork, server) -> None:
    worker = fork()
    worker.ask("who")
    child = psutil.Process(worker.process.pid)
    server_of(worker).kill()
    assert gone(child)
    assert worker.process.wait(30) == -signal.SIGKILL
    assert not server.alive


@pytest.mark.parametrize("unread", [b"", b"{"], ids=["idle", "over a request"])
def test_a_worker_of_a_server_that_died_is_an_error(server, tmp_path, unread) -> None:
    """To end with something unread is another thing to the kernel: a reset, and not an end of file."""
    server._process.send_signal(signal.SIGSTOP)
    server._control.sendall(unread)
    server._process.kill()
    server._process.wait()
    with pytest.raises(EngineError, match="left with status -9") as caught:
        WorkerClient("worker", tmp_path / "log", server.worker("cpu"), timeout_s=60, progress=silent)
    assert "forkserver.log" in caught.value.mend


def plan(tmp_path: Path) -> RunPlan:
    """A run whose scripted worker never comes to its files."""
    catalog = load_catalog()
    return RunPlan(
        variant=catalog.variant("bf16"),
        index=0,
        workload=catalog.workload("turbo-tiny"),
        dims=catalog.models["synthetic-tiny"],
        model_set="synthetic-tiny",
        files={},
        tokenizer=tmp_path,
        device="cpu",
        gpu="",
        rounds=1,
        inject=Injection(),
        images=None,
        environment={},
        log=tmp_path / "worker.log",
        timeout_s=60,
        fit=FitPlan(limits=FitnessLimits(judged=False), wait_s=0, recorded=None, root_pid=os.getpid()),
    )


def test_the_next_run_starts_a_new_server(packages, tmp_path) -> None:
    (tmp_path / "deadly").touch()
    packages(
        f"""
        from pytest_zimage.engines.protocol import Failure, Hello, encode
        os.write(1, encode(Hello(pid=1, import_s=imported_s, rss_idle_bytes=1, environment={{}})))
        sys.stdin.buffer.readline()
        deadly = Path({str(tmp_path / "deadly")!r})
        if deadly.exists():
            deadly.unlink()
            os.kill(os.getppid(), signal.SIGKILL)
            signal.pause()
        os.write(1, encode(Failure("CheckpointError", f"told by a child of {{os.getppid()}}", "mend it")))
        sys.stdin.buffer.readline()
        """
    )
    engine = LocalEngine()
    servers = []
    try:
        with pytest.raises(EngineError, match="was killed by SIGKILL during load"):
            engine.run(plan(tmp_path), silent)
        for _ in range(2):
            with pytest.raises(CheckpointError, match="told by a child of") as caught:
                engine.run(plan(tmp_path), silent)
            servers.append(int(caught.value.message.split()[-1]))
        assert servers[0] == servers[1], "one server serves every run as long as it lives"
        assert psutil.pid_exists(servers[0])
    finally:
        engine.close()
    assert not psutil.pid_exists(servers[0])


# ---- nothing is left -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0, "crash", signal.SIGKILL])
def test_what_a_worker_had_started_goes_with_it(fork, end) -> None:
    """A process of the compiler that lived on would make the folder again that is removed behind its worker."""
    worker = fork()
    started = psutil.Process(worker.ask("start"))
    if end == signal.SIGKILL:
        os.kill(worker.process.pid, end)
    else:
        worker.tell(end)
    worker.process.wait(30)
    assert gone(started)


@pytest.mark.parametrize("end", ["failure", "kill"])
def test_a_run_compiles_into_an_empty_folder_that_goes_with_it(packages, tmp_path, monkeypatch, end) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    # Importing torch's compiler sets it.
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    packages(
        f"""
        from pytest_zimage.engines.protocol import Failure, Hello, encode
        os.write(1, encode(Hello(pid=1, import_s=imported_s, rss_idle_bytes=1, environment={{}})))
        sys.stdin.buffer.readline()
        folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
        held = list(folder.iterdir())
        (folder / "kernel.so").write_text("")
        if {end!r} == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        os.write(1, encode(Failure("CheckpointError", f"{{folder.parent}} {{held}}", "mend it")))
        sys.stdin.buffer.readline()
        """
    )
    made = plan(tmp_path)
    compiled = dataclasses.replace(made, variant=structs.replace(made.variant, compile=True))
    engine = LocalEngine()
    try:
        with pytest.raises(ZImageError) as caught:
            engine.run(compiled, silent)
        assert ("was killed by SIGKILL during load" if end == "kill" else f"{temporary} []") in caught.value.message
        assert list(temporary.iterdir()) == []
        with pytest.raises(ZImageError):
            engine.run(made, silent)
    finally:
        engine.close()
    assert "KeyError: 'TORCHINDUCTOR_CACHE_DIR'" in made.log.read_text(), "who compiles nothing is left alone"


def test_closing_ends_the_server_and_what_still_runs(fork, server) -> None:
    worker = fork()
    worker.ask("who")
    child, parent = psutil.Process(worker.process.pid), server_of(worker)
    server.close()
    server.close()
    assert gone(child)
    assert not parent.is_running()


def test_workers_leave_no_open_files(fork, server) -> None:
    def count() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(os.listdir(f"/proc/{server._process.pid}/fd"))

    before = count()
    for _ in range(5):
        worker = fork()
        worker.tell(0)
        assert worker.process.wait() == 0
        worker.end()
    assert count() == before


def test_a_server_leaves_no_open_files(packages, tmp_path) -> None:
    packages()
    before = len(os.listdir("/proc/self/fd"))
    server = ForkServer(tmp_path / "forkserver.log")
    server.ready(60, silent)
    server.close()
    assert len(os.listdir("/proc/self/fd")) == before


# ---- the real imports ----------------------------------------------------------------------------------------------


def test_the_real_server_has_one_thread_and_serves_real_workers(tmp_path) -> None:
    """A thread does not survive a fork, and a lock that it holds is never released in the fork."""
    server = ForkServer(tmp_path / "forkserver.log")
    try:
        server.ready(300, silent)
        assert len(os.listdir(f"/proc/{server._process.pid}/task")) == 1
        idle = psutil.Process(server._process.pid).memory_info().rss
        for number in range(2):
            log = tmp_path / f"worker-{number}.log"
            with WorkerClient(f"w{number}", log, server.worker("cpu"), timeout_s=300, progress=silent) as worker:
                hello = worker.receive("import")
                assert hello.pid == worker.pid
                assert hello.rss_idle_bytes > idle / 2
                worker.close()
    finally:
        server.close()


def test_what_is_imported_beforehand_leaves_the_gpu_and_comfy_kitchen_to_the_worker() -> None:
    """comfy-kitchen asks for the GPU's capability as it is imported; a driver that was asked serves no fork."""
    script = (
        "import importlib, sys\n"
        "from pytest_zimage.engines.forkserver import PRELOADED\n"
        "for name in PRELOADED: importlib.import_module(name)\n"
        "print(sorted(name for name in sys.modules if name.startswith('comfy_kitchen')))\n"
        "print(sys.modules['torch'].cuda.is_initialized())\n"
    )
    environment = {**os.environ, "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["[]", "False"]
