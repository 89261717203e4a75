"""Where the progress line goes on a terminal: below pytest's own line, so that its dots stay what they were."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest

from pytest_zimage.reports.progress import Progress
from pytest_zimage.xdist import is_worker


def open_progress(config: pytest.Config) -> Progress:
    """The progress of this process: a line that moves on a terminal, now and then a whole line anywhere else."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if is_worker(config):
        return Progress(Heartbeat(config), is_tty=False)
    if reporter is None:
        return Progress(lambda text: None, is_tty=False)
    return Progress(LiveLine(config, reporter), can_redraw(reporter), width=lambda: shutil.get_terminal_size().columns)


def can_redraw(reporter: pytest.TerminalReporter) -> bool:
    """Whether the report goes to a terminal that can move its cursor."""
    return bool(reporter.isatty) and os.environ.get("TERM", "") not in ("", "dumb")


class Heartbeat:
    """Writes the lines of one of xdist's workers, whose only way to the person is standard error."""

    def __init__(self, config: pytest.Config) -> None:
        self._uncaptured = _uncaptured(config)

    def __call__(self, text: str) -> None:
        with self._uncaptured():
            sys.stderr.write(text)
            sys.stderr.flush()


class LiveLine:
    """Writes what `Progress` says: text that starts with a carriage return redraws, one that ends with it erases."""

    def __init__(self, config: pytest.Config, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter
        self._uncaptured = _uncaptured(config)
        self._column: int | None = None
        """Where pytest's own line ends while ours is shown below it."""

    def __call__(self, text: str) -> None:
        with self._uncaptured():
            self._write(text)

    def _write(self, text: str) -> None:
        if not text.startswith("\r"):
            self._reporter.ensure_newline()
            self._reporter.write(text, flush=True)
            return
        writer = self._reporter._tw
        # Not through the writer itself: it counts columns, and would put pytest's per cent sign in the wrong one.
        file = writer._file
        if self._column is None:
            self._column = writer.width_of_current_line % shutil.get_terminal_size().columns
            file.write("\n" if self._column else "")
        file.write(text)
        if text.endswith("\r"):
            file.write(f"\x1b[1A\x1b[{self._column}C" if self._column else "")
            self._column = None
        file.flush()


def _uncaptured(config: pytest.Config) -> Callable[[], AbstractContextManager[None]]:
    """The work is done inside a test, whose output pytest keeps to itself."""
    capture = config.pluginmanager.get_plugin("capturemanager")
    return capture.global_and_fixture_disabled if capture is not None else nullcontext
