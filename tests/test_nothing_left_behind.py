"""However a session ends, no worker outlives it, no lock stays held, and what was measured is kept."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

WATCHED = """
import os, signal
from pathlib import Path

import psutil
from pytest_zimage.engines.local import LocalEngine

ROOT = Path(__file__).parent
STAGE, KILL = {stage!r}, {kill!r}

class Watched(LocalEngine):
    def run(self, plan, progress):
        def seen(stage, done, total):
            progress(stage, done, total)
            if stage != STAGE:
                return
            (server,) = [
                child for child in psutil.Process().children() if "pytest_zimage.engines.forkserver" in child.cmdline()
            ]
            # While it imports, the fork server is all there is of the worker.
            worker = (server.children() or [server])[0]
            (ROOT / "worker.tmp").write_text(str(worker.pid))
            (ROOT / "worker.tmp").replace(ROOT / "worker.pid")
            if KILL == plan.variant.name:
                worker.kill()
        return super().run(plan, seen)

def pytest_zimage_engines(config):
    return {{"diffusers": Watched}}
"""


@pytest.fixture
def own_cache(project, tiny):
    """A lock of its own, which the test can look at."""
    cache = project.mkdir("cache")
    (cache / "synthetic-tiny").symlink_to(tiny)
    return cache


def wait_for(path, process) -> str:
    deadline = time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the worker never got there"
        time.sleep(0.05)
    return path.read_text()


@pytest.mark.parametrize(
    ("stage", "whom", "workers"),
    [("import", "group", ()), ("image", "leader", ()), ("import", "group", ("-n1",))],
)
def test_ctrl_c_leaves_nothing(project, own_cache, stage, whom, workers):
    """As a terminal sends it, to the whole group, and as a runner does, to the one process it knows."""
    project.makeconftest(WATCHED.format(stage=stage, kill=""))
    # A shell that starts the tests in the background has them ignore Ctrl-C, and children inherit that.
    listen = "import signal, sys, pytest; signal.signal(signal.SIGINT, signal.default_int_handler); "
    command = [
        sys.executable,
        "-c",
        listen + "sys.exit(pytest.main())",
        "--zimage-config=bf16,nvfp4",
        "--zimage-rounds=5000",
    ]
    process = subprocess.Popen(
        [*command, f"--zimage-cache={own_cache}", *workers],
        cwd=project.path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        worker = psutil.Process(int(wait_for(project.path / "worker.pid", process)))
        (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == pytest.ExitCode.INTERRUPTED, shown
    assert "KeyboardInterrupt" in shown
    gone, _ = psutil.wait_procs([worker], timeout=0 if not workers else 10)
    assert gone, "the worker outlived the session"
    with (own_cache / "locks" / "cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_worker_that_is_killed_costs_its_own_variant_only(project, own_cache, results):
    project.makepyfile(
        test_suite="""
        def test_forwards(zimage):
            zimage.gate(zimage.forwards())

        def test_disk(zimage):
            zimage.gate(zimage.disk_bytes())
        """
    )
    project.makeconftest(WATCHED.format(stage="image", kill="bf16"))
    done = project.runpytest_subprocess(
        "--zimage-config=bf16,nvfp4", "--zimage-rounds=1", f"--zimage-cache={own_cache}"
    )
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.assert_outcomes(failed=2)
    done.stdout.fnmatch_lines(
        [
            "worker of bf16, run 1: was killed by SIGKILL during image; the kernel ends a process like *",
            "  mend: its whole log: */logs/bf16-1.log",
            "=* 2 failed, 2 without baseline in *",
        ]
    )
    assert "Traceback" not in done.stdout.str()
    data = results()
    assert [(error["variant"], error["kind"]) for error in data["errors"]] == [("bf16", "EngineError")] * 2
    assert [run["variant"] for run in data["runs"]] == ["nvfp4"]
    assert {(row["variant"], row["verdict"]) for row in data["verdicts"]} == {("nvfp4", "NO BASELINE")}
    assert not psutil.pid_exists(int((project.path / "worker.pid").read_text()))
