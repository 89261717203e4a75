"""A server is started on a port of its own, watched, and gone with all that it started, however its block is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.process import ServerProcess
from pytest_zimage.errors import EngineError

LISTEN = """
import os, signal, socket, subprocess, sys, time
listening = socket.create_server(({host!r}, int(sys.argv[1])))
print("listening", flush=True)
"""
READY = LISTEN.format(host="127.0.0.1")
STAY = "signal.pause()\n"
DETACHED = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork():
    os._exit(0)
os.setsid()
if os.fork():
    os._exit(0)
open(sys.argv[1] + ".part", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + ".part", sys.argv[1])
signal.pause()
"""


class Servers:
    """Makes servers of scripts, and knows whether their port answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.signs: list[str] = []

    def __call__(self, script, *arguments, timeout_s=20.0, **options) -> ServerProcess:
        given = {"cwd": self.folder, "log": self.folder / "logs" / "server.log", "gpu": ""}
        return ServerProcess(
            "server of nvfp4, run 1",
            lambda port: [sys.executable, "-c", script, str(port), *map(str, arguments)],
            timeout_s=timeout_s,
            progress=lambda stage, done, total: self.signs.append(stage),
            **given | options,
        )


@pytest.fixture
def server(tmp_path, nothing_left) -> Servers:
    return Servers(tmp_path)


def answers(server: ServerProcess):
    def probe() -> bool:
        try:
            socket.create_connection(("127.0.0.1", server.port)).close()
        except OSError:
            return False
        return True

    return probe


def gone(*pids: int) -> bool:
    return not any(psutil.pid_exists(pid) for pid in pids)


def test_a_server_is_ready_when_it_answers_and_gone_when_closed(server):
    with server(READY + STAY) as started:
        assert started.started_s == 0
        started.wait_ready(answers(started))
        started.check()
        process = psutil.Process(started.pid)
        assert process.cmdline()[0] == sys.executable
        assert str(started.port) in process.cmdline()
        assert started.url == f"http://127.0.0.1:{started.port}"
        assert 0 < started.started_s < 20
        assert started.log_text() == "listening\n"
        for one in (started.pid, process.ppid()):
            assert os.getsid(one) != os.getsid(0), "Ctrl-C must reach neither it nor its keeper"
    assert gone(started.pid)
    started.close()
    assert "server start" in server.signs


def test_a_server_that_dies_at_once_says_how_and_its_last_words(server):
    script = "import sys; print('\\n'.join(f'line {n}' for n in range(30))); sys.exit('no such model')"
    with server(script) as started, pytest.raises(EngineError) as caught:
        started.wait_ready(lambda: False)
    assert "server of nvfp4, run 1: the server left with exit status 1" in caught.value.message
    assert "no such model" in caught.value.message
    assert "line 29" in caught.value.message
    assert "line 3\n" not in caught.value.message
    assert str(server.folder / "logs" / "server.log") in caught.value.mend


def test_last_words_are_without_a_terminals_codes(server):
    codes = r"print('\x1b[32m[INFO]\x1b[0m ready\n\x1b]0;title\x07\x1b[1;31mno such model\x1b[0m\x1b[K')"
    script = f"{codes}; raise SystemExit(3)"
    with server(script) as started, pytest.raises(EngineError) as caught:
        started.wait_ready(lambda: False)
    assert caught.value.message.endswith("last lines of its log:\n    [INFO] ready\n    no such model")


def test_a_server_that_dies_later_is_told_dead(server):
    with server(READY + STAY) as started:
        started.wait_ready(answers(started))
        os.kill(started.pid, signal.SIGKILL)
        with pytest.raises(EngineError, match="killed by SIGKILL; the kernel ends a process like this when memory"):
            started.wait_ready(lambda: False)
        with pytest.raises(EngineError, match="SIGKILL"):
            started.check()


@pytest.mark.parametrize("number", range(3))
def test_a_dropped_connection_of_a_dying_server_is_its_death(server, number):
    die = "connection, _ = listening.accept()\nheld = b'x' * 200_000_000\nos.kill(os.getpid(), signal.SIGKILL)\n"
    with server(READY + die) as started:
        started.wait_ready(lambda: started.log_text() != "")
        with socket.create_connection(("127.0.0.1", started.port)) as connection:
            assert connection.recv(1) == b""
            with pytest.raises(EngineError, match="SIGKILL"):
                started.check()


def test_a_silent_server_that_never_gets_ready_is_ended(server):
    with server("print('loading', flush=True); import signal; signal.pause()", timeout_s=0.5) as started:
        with pytest.raises(
            EngineError, match=r"not become ready, and logged nothing for 0.5 s(?s:.*)loading"
        ) as caught:
            started.wait_ready(lambda: False)
        assert "--zimage-timeout" in caught.value.mend
    assert gone(started.pid)


def test_a_server_that_only_talks_is_ended_too(server, tmp_path):
    talk = ["sh", "-c", "while :; do echo retrying; sleep 0.01; done"]
    options = {"cwd": tmp_path, "log": tmp_path / "log", "progress": lambda *_: None, "gpu": ""}
    with (
        ServerProcess("it", lambda port: talk, timeout_s=0.5, **options) as started,
        pytest.raises(EngineError, match=r"did not become ready, however much it logged, within 3 s(?s:.*)retrying"),
    ):
        started.wait_ready(lambda: False)
    assert gone(started.pid)


def test_a_fault_of_the_probe_means_not_yet(server):
    asked = []

    def probe() -> bool:
        asked.append(1)
        if len(asked) < 3:
            raise RequestFault("status 503", "loading")
        return answers(started)()

    with server(READY + STAY) as started:
        started.wait_ready(probe)
    assert len(asked) >= 3


def test_detached_orphans_that_ignore_signals_go_too(server, tmp_path):
    script = (
        READY
        + f"""
subprocess.run([sys.executable, "-c", {DETACHED!r}, sys.argv[2]])
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"], start_new_session=True)
print(child.pid, flush=True)
"""
        + STAY
    )
    noted = tmp_path / "orphan"
    with server(script, noted) as started:
        started.wait_ready(lambda: noted.exists() and len(started.log_text().split()) == 2)
        orphan, child = int(noted.read_text()), int(started.log_text().split()[1])
        assert psutil.pid_exists(orphan)
        assert psutil.Process(orphan).ppid() != started.pid, "it must have lost its parent for this to prove anything"
        assert os.getsid(orphan) not in (os.getsid(started.pid), os.getsid(0))
    assert gone(started.pid, orphan, child)


def test_orphans_of_a_dead_server_go_too(server, tmp_path):
    noted = tmp_path / "orphan"
    script = READY + f"subprocess.run([sys.executable, '-c', {DETACHED!r}, sys.argv[2]])\nsys.exit(7)"
    with server(script, noted) as started, pytest.raises(EngineError, match="exit status 7"):
        started.wait_ready(lambda: False)
    assert gone(int(noted.read_text()))


def test_a_server_is_asked_to_leave_before_it_is_killed(server):
    clean = "import signal, sys\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit(print('cleaned up')))\n"
    with server(clean + READY + STAY) as started:
        started.wait_ready(answers(started))
    assert started.log_text() == "listening\ncleaned up\n"


def test_a_server_that_ignores_the_request_is_killed(server):
    script = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY + STAY
    with server(script, grace_s=0.1) as started:
        started.wait_ready(answers(started))
    assert gone(started.pid)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
def test_nothing_is_left_whatever_leaves_the_block(server, error):
    def probe() -> bool:
        raise error

    with pytest.raises(error), server(READY + STAY) as started:
        started.wait_ready(probe)
    assert gone(started.pid)


def test_nothing_is_left_when_the_tests_are_killed(tmp_path):
    script = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pathlib import Path
from pytest_zimage.engines.servers.process import ServerProcess
server = ServerProcess("it", lambda port: [sys.executable, "-c", {READY + STAY!r}, str(port)], cwd=Path("."),
    log=Path("log"), timeout_s=20, progress=lambda *_: None, gpu="")
server.wait_ready(lambda: server.log_text() != "")
print(server.pid, flush=True)
server.wait_ready(lambda: False)
"""
    tests = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    with tests:
        assert tests.stdout is not None
        serving = psutil.Process(int(tests.stdout.readline()))
        keeper = serving.parent()
        tests.kill()
    assert psutil.wait_procs([serving, keeper], timeout=20)[1] == []


def test_a_keeper_that_is_killed_does_not_leave_the_server(server):
    with server(READY + STAY) as started:
        started.wait_ready(answers(started))
        psutil.Process(started.pid).parent().kill()
        with pytest.raises(EngineError, match="lost its keeper, which was killed by SIGKILL"):
            started.wait_ready(lambda: False)
        assert not gone(started.pid)
    assert gone(started.pid)


def test_what_cannot_be_started_says_why(server, tmp_path):
    options = {"cwd": tmp_path, "log": tmp_path / "log", "timeout_s": 1.0, "progress": lambda *_: None, "gpu": ""}
    with pytest.raises(EngineError, match=r"cannot be started: .*No such file") as caught:
        ServerProcess("it", lambda port: ["no-such-vllm", "--port", str(port)], **options)
    assert caught.value.mend.startswith("run by hand: no-such-vllm --port ")
    with pytest.raises(EngineError, match=r"cannot be started: .*nowhere"):
        ServerProcess("it", lambda port: ["true"], **options | {"cwd": tmp_path / "nowhere"})


def test_a_stranger_on_the_port_is_not_taken_for_the_server(server):
    with server("import signal; signal.pause()") as started:
        stranger = socket.create_server(("127.0.0.1", started.port))
        with stranger, pytest.raises(EngineError, match=f"port {started.port} is answered by a process that is not"):
            started.wait_ready(answers(started))


def test_a_server_that_listens_for_everyone_is_refused(server):
    with (
        server(LISTEN.format(host="0.0.0.0") + STAY) as started,
        pytest.raises(EngineError, match=r"listens on 0.0.0.0 and not on 127.0.0.1 alone"),
    ):
        started.wait_ready(answers(started))


def test_a_server_sees_one_gpu_and_what_it_is_given(server, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    say = "print([os.environ.get(name) for name in ('CUDA_VISIBLE_DEVICES', 'MODE')])\n"
    with server(READY + say + STAY, gpu="GPU-a", env={"MODE": "x"}) as started:
        # Nothing flushes that line.
        started.wait_ready(lambda: started.log_text().count("\n") == 2)
        assert started.log_text() == "listening\n['GPU-a', 'x']\n"


def test_servers_share_a_log_and_know_their_own_part(server):
    for _ in range(2):
        with server(READY + STAY) as started:
            started.wait_ready(answers(started))
        assert started.log_text() == "listening\n"
    assert (server.folder / "logs" / "server.log").read_text() == "listening\nlistening\n"
