"""`--zimage-timeout`: the longest silence of a worker."""

from __future__ import annotations

import psutil
import pytest

HUNG = """
import sys
from pytest_zimage.engines.base import Engine
from pytest_zimage.engines.client import WorkerClient
from pytest_zimage.engines.processes import Command
from pytest_zimage.engines.protocol import Report
from scripted import ScriptedEngine

BODY = "import sys; print('allocating', file=sys.stderr, flush=True); sys.stdin.read()"

class Hung(ScriptedEngine):
    def run(self, plan, progress):
        if plan.variant.name != "nvfp4":
            return super().run(plan, progress)
        what = f"worker of {plan.variant.name}, run {plan.index + 1}"
        start = Command([sys.executable, "-c", BODY])
        with WorkerClient(what, plan.log, start, timeout_s=plan.timeout_s, progress=progress) as worker:
            with (self._root / "pids").open("a") as pids:
                pids.write(f"{worker.pid}\\n")
            worker.ask(Report(), "load")

def pytest_zimage_engines(config):
    return {"diffusers": lambda: Hung(config.rootpath)}
"""


@pytest.mark.parametrize("value", ["0", "-1", "soon", "nan", "inf", "1e999"])
@pytest.mark.parametrize("way", ["option", "ini"])
def test_what_is_no_time_is_a_usage_error(script, value, way):
    script(default=[{"rounds": [1.0]}])
    if way == "ini":
        with (script.project.path / "tox.ini").open("a") as ini:
            ini.write(f"\nzimage_timeout = {value}\n")
    result = script.project.runpytest_subprocess(*([f"--zimage-timeout={value}"] if way == "option" else []))
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    name = "--zimage-timeout" if way == "option" else "zimage_timeout (ini)"
    result.stderr.fnmatch_lines([f"ERROR: {name} {value}: must be a number of seconds above 0"])
    assert script.ran == []


def test_a_worker_that_hangs_is_ended_and_the_others_go_on(script, results):
    script.project.makeconftest(HUNG)
    script(default=[{"rounds": [1.0]}])
    done = script.run("bf16,nvfp4,nvfp4-fp8e", "--zimage-timeout=0.8")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    assert script.ran == ["bf16-1", "nvfp4-fp8e-1"]
    done.stdout.fnmatch_lines(
        [
            "worker of nvfp4, run 1: said nothing for 0.8 s during load and was ended",
            "    allocating",
            "  mend: its whole log: */logs/nvfp4-1.log; *raise --zimage-timeout",
        ]
    )
    (error,) = results()["errors"]
    assert (error["kind"], error["variant"]) == ("EngineError", "nvfp4")
    (pid,) = (script.project.path / "pids").read_text().split()
    assert not psutil.pid_exists(int(pid))
