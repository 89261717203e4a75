"""A session that SIGTERM ends, as a CI runner's cancel does, keeps what it measured, says so, and leaves nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import threading

import psutil
import pytest

from conftest import SUITE
from pytest_zimage import ending
from pytest_zimage.ending import Ending, Terminated

ENDED = "ended by SIGTERM: what was measured before is kept, the rest was not measured"

SCRIPTED = """
import os, signal, threading
from scripted import ScriptedEngine

class Ended(ScriptedEngine):
    def run(self, plan, progress):
        record = super().run(plan, progress)
        if plan.variant.name == "nvfp4":
            {whom}
            threading.Event().wait(60)
            raise AssertionError("the signal did nothing")
        return record

    def close(self):
        {closing}

def pytest_zimage_engines(config):
    return {{"diffusers": lambda: Ended(config.rootpath)}}

def pytest_keyboard_interrupt(excinfo):
    with open("interrupted", "a") as file:
        file.write(f"{{excinfo.typename}}\\n")
"""
ITSELF = "os.kill(os.getpid(), signal.SIGTERM)"


@pytest.fixture
def ended(script):
    """Sessions whose run of nvfp4 is where SIGTERM comes."""

    def session(whom=ITSELF, closing="pass", more=""):
        script(default=[{"rounds": [1.0]}])
        script.project.makeconftest(SCRIPTED.format(whom=whom, closing=closing) + more)
        return script

    return session


@pytest.fixture
def start(pytester):
    """Starts pytest as the leader of a process group of its own; gives its exit status and all it showed."""
    processes = []

    def run(*arguments, head=""):
        command = [sys.executable, "-c", f"import sys, signal, pytest\n{head}\nsys.exit(pytest.main(sys.argv[1:]))"]
        processes.append(
            subprocess.Popen(
                [*command, *arguments],
                cwd=pytester.path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
        shown, _ = processes[-1].communicate(timeout=120)
        return processes[-1].returncode, shown

    yield run
    for process in processes:
        process.kill()


def runs_of(data):
    return [(run["variant"], run["index"]) for run in data["runs"]]


def test_what_was_measured_before_is_written_and_what_was_broken_off_is_not(ended, start, results):
    session = ended()
    status, shown = start("--zimage-config=bf16,nvfp4,nvfp4-fp8e")
    assert status == pytest.ExitCode.INTERRUPTED, shown
    assert "Terminated: ended by SIGTERM !!!" in shown
    assert f"NOTE: {ENDED}\nNOTE: run 1 of nvfp4 is missing: it was broken off\nresults: " in shown
    assert session.ran == ["bf16-1", "nvfp4-1"]
    data = results()
    assert runs_of(data) == [("bf16", 0)]
    assert [(row["variant"], row["metric"]) for row in data["verdicts"]] == [("bf16", "warm_latency")]
    assert data["errors"] == []
    assert data["notes"] == [ENDED, "run 1 of nvfp4 is missing: it was broken off"]


def test_it_is_told_even_where_nothing_was_measured(ended, start, results):
    ended()
    assert start("--zimage-config=nvfp4")[0] == pytest.ExitCode.INTERRUPTED
    assert results()["notes"] == [ENDED, "run 1 of nvfp4 is missing: it was broken off"]


MET = """
import os, threading

{suite}

def test_next(zimage):
    open("pids", "a").write(f"{{os.getpid()}}\\n")
    # Now both workers have ended a test, and neither ends another.
    if zimage.variant.name == "bf16":
        os.close(os.open("met", os.O_WRONLY))
        threading.Event().wait(60)
    else:
        os.close(os.open("met", os.O_RDONLY))
        zimage._session.run(zimage.variant, 1)
"""


LISTENS = "signal.signal(signal.SIGINT, signal.default_int_handler)"
"""A shell that starts the tests in the background has them ignore Ctrl-C."""


@pytest.mark.parametrize(
    ("whom", "kind", "notes"),
    [
        ("os.kill(os.getppid(), signal.SIGTERM)", "Terminated", {ENDED}),
        ("os.killpg(os.getpgid(0), signal.SIGTERM)", "Terminated", {ENDED}),
        ("os.killpg(os.getpgid(0), signal.SIGINT)", "KeyboardInterrupt", set()),
    ],
    ids=["leader", "group", "ctrl-c"],
)
def test_under_xdist(ended, start, results, whom, kind, notes):
    session = ended(whom=f"if plan.index == 0: return record\n            {whom}")
    session.project.makepyfile(test_suite=MET.format(suite=SUITE))
    os.mkfifo(session.project.path / "met")
    status, shown = start("--zimage-config=bf16,nvfp4", "-n2", "--dist=loadgroup", head=LISTENS)
    assert status == pytest.ExitCode.INTERRUPTED, shown
    assert (session.project.path / "interrupted").read_text().split() == [kind] * 3, "no worker is left to xdist"
    data = results()
    assert sorted(runs_of(data)) == [("bf16", 0), ("nvfp4", 0)]
    assert sorted((row["variant"], row["metric"]) for row in data["verdicts"]) == [
        ("bf16", "warm_latency"),
        ("nvfp4", "warm_latency"),
    ]
    assert set(data["notes"]) == {*notes, "run 2 of nvfp4 is missing: it was broken off"}
    pids = [int(pid) for pid in (session.project.path / "pids").read_text().split()]
    assert len(pids) == 2
    assert not any(map(psutil.pid_exists, pids)), "a worker outlived the session"


def test_a_worker_of_xdist_alone(ended, start, results):
    ended()
    status, shown = start("--zimage-config=bf16,nvfp4", "-n1", "--dist=loadgroup")
    assert status == pytest.ExitCode.INTERRUPTED, shown
    assert runs_of(results()) == [("bf16", 0)]
    assert "xdist's worker gw0 was ended by SIGTERM" in results()["notes"]


def test_a_second_one_ends_it_at_once(ended, start):
    session = ended(closing=ITSELF, more="\nfrom pytest_zimage import ending\nending._ONE_WISH_S = 0.0\n")
    status, shown = start("--zimage-config=bf16,nvfp4")
    assert status == -signal.SIGTERM, shown
    assert not (session.project.path / ".zimage" / "results").exists()


def test_a_session_that_is_closing_anyway_may_finish(ended, start, results):
    ended(closing=ITSELF)
    status, shown = start("--zimage-config=bf16")
    assert status == pytest.ExitCode.OK, shown
    assert runs_of(results()) == [("bf16", 0)]
    assert results()["notes"] == []


MINE = """
import signal

def mine(*_):
    raise RuntimeError("mine")

def pytest_configure(config):
    signal.signal(signal.SIGTERM, {handler})

def pytest_unconfigure(config):
    assert signal.getsignal(signal.SIGTERM) == {handler}
    print("still mine")
"""


def test_somebody_elses_answer_stays(ended, start, results):
    ended(more=MINE.format(handler="mine"))
    status, shown = start("--zimage-config=bf16,nvfp4")
    assert status == pytest.ExitCode.TESTS_FAILED, shown
    assert "RuntimeError: mine" in shown
    assert "still mine" in shown
    assert not any("SIGTERM" in note for note in results()["notes"])


def test_who_ignores_it_goes_on_ignoring_it(ended, start):
    ended(more=MINE.format(handler="signal.SIG_IGN").replace("print(", "print(signal.raise_signal(signal.SIGTERM), "))
    status, shown = start("--zimage-config=bf16")
    assert status == pytest.ExitCode.OK, shown
    assert "still mine" in shown


ASKED = """
import signal, sys

def test_other():
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "pytest_zimage.ending" not in sys.modules
"""
AFTER = "import atexit; atexit.register(lambda: print('after:', signal.getsignal(signal.SIGTERM)))"


def test_a_project_without_a_suite_keeps_the_default(pytester, start):
    pytester.makepyfile(ASKED)
    status, shown = start("-n0")
    assert status == pytest.ExitCode.OK, shown
    assert start("-n1")[0] == pytest.ExitCode.OK


def test_the_default_is_back_at_the_end(ended, start):
    session = ended()
    session.project.makepyfile(
        test_suite=SUITE + "\ndef test_now(zimage):\n    import signal\n    assert callable(signal.getsignal(15))\n"
    )
    status, shown = start("--zimage-config=bf16", head=AFTER)
    assert status == pytest.ExitCode.OK, shown
    assert "after: 0" in shown.replace("Handlers.SIG_DFL", "0")


def test_a_session_outside_of_the_main_thread_works(ended, start):
    ended()
    inside = (
        "import threading; main = pytest.main\n"
        "def threaded(arguments):\n"
        "    told = []\n"
        "    thread = threading.Thread(target=lambda: told.append(main(arguments)))\n"
        "    thread.start(); thread.join()\n"
        "    return told[0]\n"
        "pytest.main = threaded"
    )
    status, shown = start("--zimage-config=bf16", head=inside)
    assert status == pytest.ExitCode.OK, shown


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def answering(monkeypatch):
    """An answer to SIGTERM by a clock of the test's, and the signals that it sends."""
    clock, sent = Clock(), []
    monkeypatch.setattr(ending.os, "kill", lambda pid, number: sent.append(number))
    answer = Ending(clock)
    answer.listen()
    yield clock, sent
    answer.restore()


def test_signals_close_together_are_one_wish(answering):
    """`timeout` signals the process and then its group, which the process is in."""
    clock, sent = answering
    with pytest.raises(Terminated):
        signal.raise_signal(signal.SIGTERM)
    clock.now_s = 1.9
    signal.raise_signal(signal.SIGTERM)
    assert sent == []
    clock.now_s = 2.1
    signal.raise_signal(signal.SIGTERM)
    assert sent == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_another_thread_neither_takes_the_signal_nor_gives_it_back():
    before = signal.getsignal(signal.SIGTERM)
    failures = []

    def use():
        try:
            Ending().listen()
            Ending().restore()
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert failures == []
    assert signal.getsignal(signal.SIGTERM) == before


REAL = """
import os, signal
from pathlib import Path

import psutil
from pytest_zimage.engines.local import LocalEngine

class Ended(LocalEngine):
    def run(self, plan, progress):
        def seen(stage, done, total):
            progress(stage, done, total)
            if stage == "image" and plan.variant.name == "nvfp4":
                family = psutil.Process().children(recursive=True)
                (Path(__file__).parent / "pids").write_text(" ".join(str(each.pid) for each in family))
                os.kill(os.getpid(), signal.SIGTERM)
        return super().run(plan, seen)

def pytest_zimage_engines(config):
    return {"diffusers": Ended}
"""


def test_on_the_real_engine_workers_and_locks_are_gone(project, tiny, start, results):
    cache = project.mkdir("cache")
    (cache / "synthetic-tiny").symlink_to(tiny)
    project.makeconftest(REAL)
    status, shown = start("--zimage-config=bf16,nvfp4", "--zimage-rounds=2", f"--zimage-cache={cache}")
    assert status == pytest.ExitCode.INTERRUPTED, shown
    pids = [int(pid) for pid in (project.path / "pids").read_text().split()]
    assert len(pids) == 2, "the fork server and the worker"
    assert not any(map(psutil.pid_exists, pids)), "one of them outlived the session"
    with (cache / "locks" / "cpu.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    data = results()
    assert runs_of(data) == [("bf16", 0)]
    assert len(data["runs"][0]["rounds"]) == 2
    assert data["notes"][-2:] == [ENDED, "run 1 of nvfp4 is missing: it was broken off"]
