"""Nothing listens on or talks to anything but loopback, unless a URL was given, and then to that one address only.

Every Python of a session, the server's too, writes down whom it asks for, connects to and listens on.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from standins.comfyui_plan import make_files
from standins.comfyui_server import STANDIN, standin
from standins.vllm_omni_running import StandIn

SUITES = Path(__file__).parents[1] / "suites"
WATCH = """
import os, sys

FILE = {file!r}

def heard(event, args):
    if event in ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        # Of a Unix socket the address is a path.
        address = args[:2] if event.startswith("socket.get") else args[1]
        if isinstance(address, tuple):
            told = f"{{event.partition('.')[2]}} {{os.path.basename(sys.argv[0])}} {{address[0]}} {{address[1]}}\\n"
            out = os.open(FILE, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(out, told.encode())
            os.close(out)

sys.addaudithook(heard)
"""


@pytest.fixture
def watched(project, tiny, monkeypatch):
    """Runs sessions of all suites but that of quality, and gives what was heard: (what, program, host, port)."""
    heard = project.path / "heard"
    folder = project.mkdir("watch")
    (folder / "sitecustomize.py").write_text(WATCH.format(file=str(heard)))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
    (project.path / "test_suite.py").unlink()
    shutil.copytree(SUITES, project.mkdir("suites"), dirs_exist_ok=True)
    # A cache of its own, and so a lock of its own: nobody waits for a real measurement beside this.
    cache = project.mkdir("cache")
    (cache / "synthetic-tiny").symlink_to(tiny)
    project.makeini(f"[pytest]\nzimage_cache = {cache}\nzimage_device = cpu\naddopts = -p no:cacheprovider\n")

    def run(*arguments: str, only: str = "not quality and not claim") -> set[tuple[str, ...]]:
        done = project.runpytest_subprocess("suites", "-k", only, "--zimage-rounds=1", *arguments)
        assert done.ret == 0, done.stdout.str()
        assert "NO BASELINE" in done.stdout.str(), "something was measured"
        return {tuple(line.split()) for line in heard.read_text().splitlines()} if heard.exists() else set()

    return run


def hosts(heard: set[tuple[str, ...]]) -> set[str]:
    return {host for _, _, host, _ in heard}


def listening(heard: set[tuple[str, ...]]) -> set[str]:
    return {program for what, program, _, _ in heard if what == "bind"}


def test_a_started_comfyui(watched):
    heard = watched("--zimage-engine=comfyui", f"--zimage-comfyui-dir={STANDIN}", "--zimage-config=bf16")
    assert hosts(heard) == {"127.0.0.1"}
    assert {"connect", "bind"} <= {what for what, *_ in heard}
    assert "main.py" in listening(heard), "the server is watched too"


def test_a_started_vllm_omni(watched, tmp_path):
    one = StandIn(tmp_path)
    command = f"--zimage-vllm-omni-command={one.command}"
    heard = watched("--zimage-engine=vllm-omni", command, "--zimage-config=bf16", "--zimage-models=official")
    assert hosts(heard) == {"127.0.0.1"}
    assert "vllm_omni_server.py" in listening(heard)


def test_the_engine_in_process(watched):
    # urllib3, which a package of the worker's imports, sees by a bind whether there is IPv6.
    assert hosts(watched("--zimage-config=nvfp4")) <= {"127.0.0.1", "::1"}


def test_of_a_server_that_runs_its_own_address_and_no_other(watched, tmp_path):
    with standin(make_files(tmp_path / "models", "bf16"), tmp_path) as server:
        heard = watched(
            "--zimage-engine=comfyui",
            f"--zimage-comfyui-url={server.url}",
            "--zimage-config=bf16",
            "--zimage-models=official",
        )
    assert {(host, port) for _, _, host, port in heard} == {("127.0.0.1", server.url.rpartition(":")[2])}
    assert listening(heard) == {"main.py"}, "the server, which was started here too"


def test_who_is_asked_beside_that_is_heard(watched, project):
    """Else none of these could fail."""
    project.makepyfile(
        **{
            "suites/test_talk": """
            import socket, subprocess, sys

            def test_talk(zimage):
                with socket.socket() as one:
                    one.setblocking(False)
                    one.connect_ex(("127.0.0.2", 9))
                with socket.socket() as one:
                    one.bind(("0.0.0.0", 0))
                subprocess.run([sys.executable, "-c", "import socket; socket.getaddrinfo('127.0.0.3', 9)"], check=True)
                zimage.gate(zimage.warm_latency())
            """
        }
    )
    heard = watched("--zimage-config=nvfp4", only="talk")
    assert {"127.0.0.2", "0.0.0.0", "127.0.0.3"} <= hosts(heard)
