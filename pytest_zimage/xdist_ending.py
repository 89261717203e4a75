"""pytest-xdist: an interrupted session ends its workers at once, and keeps what they had found.

A controller that is interrupted listens to its workers no more. What each left in the session's folder after every
test is taken over from there.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Generator
from typing import TYPE_CHECKING

import pytest

from pytest_zimage.outcomes import is_ours
from pytest_zimage.xdist import host_of, is_worker

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

_PID = "zimage_pid"
"""Attribute of the report of a test of ours: the process that ran it."""


class XdistEnding:
    """The controller's side, and a worker's; registered only where xdist is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._working: dict[str, tuple[WorkerController, int]] = {}
        """By xdist's name: workers that run tests of ours, and their processes."""

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if is_worker(self._config) and is_ours(item):
            report.__dict__[_PID] = os.getpid()
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A controller collects nothing: that the session is one of ours it learns from the first report of a test."""
        node, pid = getattr(report, "node", None), getattr(report, _PID, None)
        if node is None or pid is None:
            return
        from pytest_zimage.session import start

        start(self._config).ending.listen()
        self._working[node.gateway.id] = node, pid

    def pytest_testnodedown(self, node: WorkerController) -> None:
        self._working.pop(node.gateway.id, None)

    @pytest.hookimpl(tryfirst=True)
    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Pass SIGTERM on: xdist interrupts a busy worker after 5 s only, and kills it after another 5."""
        from pytest_zimage.ending import Terminated

        if isinstance(excinfo.value, Terminated):
            for node, pid in self._working.values():
                with contextlib.suppress(ProcessLookupError):
                    if not host_of(node):
                        os.kill(pid, signal.SIGTERM)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        """After xdist's own, which waits until every worker has ended."""
        if self._working:
            from pytest_zimage.closing import merge_unheard
            from pytest_zimage.session import start

            for name, (node, _) in self._working.items():
                merge_unheard(start(self._config), name, _out_of_reach(node))


def _out_of_reach(node: WorkerController) -> str:
    """Where `node` keeps what it measures, `on HOST` or `in FOLDER`; empty for the controller's own folder."""
    if host := host_of(node):
        return f"on {host}"
    return f"in {node.gateway.spec.chdir}" if node.gateway.spec.chdir else ""
