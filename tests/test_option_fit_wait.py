"""`--zimage-fit-wait`: how long a run waits for a machine that is fit to be timed."""

from __future__ import annotations

import pytest

ENGINE = """
import os
from scripted import ScriptedEngine

class Waiting(ScriptedEngine):
    def run(self, plan, progress):
        with (self._root / "asked").open("a") as asked:
            asked.write(f"{plan.fit.wait_s:g} {plan.fit.fault}\\n")
        (self._root / "pids").write_text(f"{plan.fit.root_pid} {os.getpid()} {os.getppid()}")
        return super().run(plan, progress)

def pytest_zimage_engines(config):
    return {"diffusers": lambda: Waiting(config.rootpath)}
"""


@pytest.fixture
def asked(script):
    script.project.makeconftest(ENGINE)
    script(default=[{"rounds": [1.0]}])

    def run(*arguments, ini=""):
        with (script.project.path / "tox.ini").open("a") as file:
            file.write(ini)
        done = script.run("bf16", *arguments)
        assert done.ret == 0, done.stdout.str()
        return (script.project.path / "asked").read_text().split("\n")[0].strip()

    return run


def test_a_minute_by_default(asked):
    assert asked() == "60"


def test_the_option_says_how_long(asked):
    assert asked("--zimage-fit-wait", "2.5") == "2.5"


def test_nothing_is_waited_for_with_zero(asked):
    assert asked("--zimage-fit-wait=0") == "0"


def test_the_ini_value_does_too(asked):
    assert asked(ini="\nzimage_fit_wait = 7\n") == "7"


def test_an_injected_reading_reaches_the_engine(asked):
    assert asked("--zimage-inject", "fitness=canary:0.8") == "60 canary:0.8"


@pytest.mark.parametrize(("arguments", "which"), [((), 1), (("-n1",), 2)])
def test_the_processes_of_all_xdist_workers_are_the_sessions_own(asked, script, arguments, which):
    """They descend from the process that pytest was started as."""
    asked(*arguments)
    root, *this_and_parent = (script.project.path / "pids").read_text().split()
    assert root == this_and_parent[which - 1]


@pytest.mark.parametrize("value", ["-1", "soon", "nan", "inf"])
def test_what_is_no_time_is_a_usage_error(script, value):
    script(default=[{"rounds": [1.0]}])
    result = script.run("bf16", f"--zimage-fit-wait={value}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: --zimage-fit-wait {value}: must be a number of seconds, 0 or more"])
    assert script.ran == []


@pytest.mark.parametrize(
    "value", ["fitness", "fitness=hot", "fitness=canary", "fitness=canary:0", "fitness=canary:1.2"]
)
def test_a_reading_that_cannot_be_injected_is_a_usage_error(script, value):
    script(default=[{"rounds": [1.0]}])
    result = script.run("bf16", "--zimage-inject", value)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*--zimage-inject {value}: write fitness=throttle, fitness=process or fitness=can*"])
    assert script.ran == []
