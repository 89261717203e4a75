"""Signs of life: one live line on a terminal that leaves pytest's own lines as they were, none elsewhere."""

from __future__ import annotations

import os
import pty
import re
import sys

import pytest

COLUMNS = 80
_STEP = re.compile(r"\x1b\[(?P<number>\d*)(?:;\d+)*(?P<letter>[A-Za-z])|(?P<text>[^\x1b])", re.DOTALL)


class Screen:
    """What a person sees of what a program wrote to a terminal."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0

    def show(self, data: str) -> list[str]:
        for match in _STEP.finditer(data):
            if match["text"] is not None:
                self._put(match["text"])
                continue
            count = int(match["number"] or 1)
            if match["letter"] == "A":
                self.row = max(self.row - count, 0)
            elif match["letter"] == "C":
                self.column = min(self.column + count, COLUMNS - 1)
            else:
                assert match["letter"] == "m", f"the screen does not know {match[0]!r}"
        return [line.rstrip() for line in self.lines]

    def _put(self, character: str) -> None:
        if character == "\r":
            self.column = 0
        elif character == "\n":
            self._down()
        else:
            if self.column == COLUMNS:
                self._down()
                self.column = 0
            line = self.lines[self.row].ljust(self.column)
            self.lines[self.row] = line[: self.column] + character + line[self.column + 1 :]
            self.column += 1

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.lines):
            self.lines.append("")


def on_a_terminal(script, *arguments: str, term: str = "xterm-256color") -> str:
    """All that a session writes to a terminal of 80 columns."""
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(script.project.path)
        environment = {**os.environ, "TERM": term, "COLUMNS": str(COLUMNS), "LINES": "24"}
        os.execve(sys.executable, [sys.executable, "-m", "pytest", "-p", "no:benchmark", *arguments], environment)
    data = b""
    while True:
        try:
            chunk = os.read(terminal, 1 << 16)
        except OSError:  # Linux says so when the last writer is gone
            break
        if not chunk:
            break
        data += chunk
    os.close(terminal)
    os.waitpid(pid, 0)
    return data.decode()


@pytest.fixture
def suite(script):
    script.project.makepyfile(
        test_suite="""
        def test_warm_latency(zimage):
            zimage.gate(zimage.warm_latency())

        def test_forwards(zimage):
            zimage.gate(zimage.forwards())
        """
    )
    script.record("bf16,nvfp4", script.QUIET)
    script(default=[{"rounds": [0.95]}, {"rounds": [1.0]}])
    return script


ARGUMENTS = ("--zimage-config", "bf16,nvfp4")


def test_the_live_line_comes_and_goes_and_the_dots_stay(suite):
    data = on_a_terminal(suite, *ARGUMENTS)
    assert "bf16, run 1: rounds 1/2, 0 s" in data
    assert "nvfp4, run 2: rounds 1/2, 0 s" in data
    seen = Screen().show(data)
    # pytest leaves the last column free.
    assert "test_suite.py ....".ljust(COLUMNS - 7) + "[100%]" in seen
    assert not [line for line in seen if "run 1" in line or "run 2" in line]


def test_with_whole_names_each_stays_on_its_line(suite):
    data = on_a_terminal(suite, *ARGUMENTS, "-v")
    assert "nvfp4, run 1: rounds 1/2, 0 s" in data
    seen = Screen().show(data)
    names = [line for line in seen if line.startswith("test_suite.py::")]
    assert [name.split()[1] for name in names] == ["PASSED"] * 4
    assert not [line for line in seen if "run 1:" in line]


@pytest.mark.parametrize("term", ["dumb", ""])
def test_a_terminal_that_cannot_move_its_cursor_gets_no_live_line(suite, term):
    data = on_a_terminal(suite, *ARGUMENTS, term=term)
    assert "rounds 1/2" not in data
    assert "test_suite.py ...." in data


@pytest.mark.parametrize("arguments", [(), ("-s",), ("-n", "2")])
def test_elsewhere_short_work_is_silent(suite, arguments):
    done = suite.project.runpytest_subprocess(*ARGUMENTS, *arguments)
    assert done.ret == 0
    assert "run 1" not in done.stdout.str()
    assert "\r" not in done.stdout.str()


@pytest.mark.parametrize("arguments", [(), ("-s",), ("-v",), ("-n", "2", "--dist", "loadgroup")])
def test_elsewhere_long_work_has_a_heartbeat(suite, arguments):
    """With an interval of nothing, so that each sign of a worker is one."""
    conftest = suite.project.path / "conftest.py"
    conftest.write_text(
        conftest.read_text() + "\nfrom pytest_zimage.reports import progress\nprogress.HEARTBEAT_S = 0.0\n"
    )
    done = suite.project.runpytest_subprocess(*ARGUMENTS, *arguments)
    assert done.ret == 0
    beats = [line for line in done.outlines + done.errlines if line.startswith("zimage: ") and "rounds" in line]
    assert sorted(beats) == [
        f"zimage: {variant}, run {number}: rounds 1/2, 0 s" for variant in ("bf16", "nvfp4") for number in (1, 2)
    ]
