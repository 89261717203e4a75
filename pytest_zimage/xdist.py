"""Hooks of pytest-xdist's controller: one shared folder for all workers, one results file out of theirs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

_USAGE_ERROR = "zimage_usage_error"


class XdistHooks:
    """Registered only where xdist is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._folder: Path | None = None
        self._usage_error = ""

    def pytest_configure_node(self, node: WorkerController) -> None:
        from pytest_zimage.session import shared_folder

        self._folder = self._folder or shared_folder(self._config)
        node.workerinput["zimage_folder"] = str(self._folder)

    def pytest_testnodedown(self, node: WorkerController, error: object) -> None:
        # A worker that crashed has no output; xdist itself fails the test it was running.
        output = getattr(node, "workeroutput", {})
        self._usage_error = output.get(_USAGE_ERROR, self._usage_error)
        found = output.get("zimage")
        if found is not None:
            from pytest_zimage.closing import merge
            from pytest_zimage.session import start

            merge(start(self._config), found)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._usage_error:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_unconfigure(self) -> None:
        if self._usage_error:
            print(f"ERROR: {self._usage_error}", file=sys.stderr)


def refuse_collection(config: pytest.Config, items: list[pytest.Item], error: pytest.UsageError) -> None:
    """Stop with a usage error found in collection; a worker of xdist cannot raise one, so it tells the controller."""
    if not is_worker(config):
        raise error
    items.clear()
    config.workeroutput[_USAGE_ERROR] = str(error)  # type: ignore[attr-defined]


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is one of xdist's workers."""
    return hasattr(config, "workerinput")
