"""pytest-xdist: what each worker is told, and one results file out of what they found.

Every worker gets a slot: its number among the workers of its host that are alive, which chooses its GPU. Workers of one
host share the session's folder; one that vanishes leaves there what it had found so far.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pytest_zimage.outcomes import is_ours, plain_nodeid, xdist_group
from pytest_zimage.stash import COLLECTED

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

_USAGE_ERROR = "zimage_usage_error"
_INPUT = "zimage"
_NODEID = "zimage_nodeid"


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker of xdist stands."""

    name: str
    """xdist's own: `gw0`, `gw1`, ..."""
    slot: int
    """Number among the workers of its host, from 0; a worker that takes the place of a vanished one gets its slot."""
    workers: int
    """How many workers this host has."""
    apart: bool
    """Whether it works in another folder than the controller, most likely of another host, which cannot read there."""


class XdistHooks:
    """The controller's side, and a worker's; registered only where xdist is."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._slots: dict[str, dict[str, int]] = {}
        self._down: set[str] = set()
        self._usage_error = ""

    def pytest_configure_node(self, node: WorkerController) -> None:
        from pytest_zimage.session import shared_folder

        host = host_of(node)
        taken = self._slots.setdefault(host, {})
        slot = next(number for number in range(len(taken) + 1) if number not in taken.values())
        taken[node.gateway.id] = slot
        folder = shared_folder(self._config)
        apart = _is_apart(node)
        node.workerinput[_INPUT] = {
            "slot": slot,
            "workers": sum(_spec_host(spec) == host for spec in node.nodemanager.specs),
            "apart": apart,
            # A folder of this host means nothing on another one; its name does.
            "folder": folder.name if apart else str(folder),
        }

    def pytest_xdist_make_scheduler(self, config: pytest.Config, log: Any) -> Any:
        if config.getoption("dist", "no") != "loadgroup":
            return None
        from pytest_zimage.foreseen import weigh
        from pytest_zimage.scheduling import GroupScheduling
        from pytest_zimage.session import start

        return GroupScheduling(config, log, lambda name, images: weigh(start(config), name, images=images))

    def pytest_xdist_node_collection_finished(self, ids: Sequence[str]) -> None:
        self._config.stash[COLLECTED] = ids

    def pytest_testnodedown(self, node: WorkerController, error: object) -> None:
        self._slots.get(host_of(node), {}).pop(node.gateway.id, None)
        if node.gateway.id in self._down:  # told again of one that was interrupted
            return
        self._down.add(node.gateway.id)
        output = getattr(node, "workeroutput", None)
        if output is None:
            self._vanished(node, error)
            return
        self._usage_error = output.get(_USAGE_ERROR, self._usage_error)
        if (found := output.get(_INPUT)) is not None:
            from pytest_zimage.closing import merge
            from pytest_zimage.session import start

            merge(start(self._config), found)

    def _vanished(self, node: WorkerController, error: object) -> None:
        """xdist itself fails the test that the worker was running and gives its other tests to the rest."""
        from pytest_zimage.closing import merge_vanished
        from pytest_zimage.session import start

        merge_vanished(start(self._config), node.gateway.id, host_of(node), str(error or "without a word"))

    def pytest_runtest_logfinish(self) -> None:
        if is_worker(self._config):
            from pytest_zimage.closing import save_part

            save_part(self._config)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if is_worker(self._config) and is_ours(item):
            setattr(report, _NODEID, plain_nodeid(item))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # xdist needs the group until here; a summary to copy from, `--lf` and JUnit's file must not have it.
        if not is_worker(self._config):
            report.nodeid = getattr(report, _NODEID, report.nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if is_worker(self._config) and self._config.getoption("loadgroup", False):
            keep_groups(items)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self._usage_error:
            session.exitstatus = pytest.ExitCode.USAGE_ERROR

    def pytest_unconfigure(self) -> None:
        if self._usage_error:
            print(f"ERROR: {self._usage_error}", file=sys.stderr)


def host_of(node: WorkerController) -> str:
    """The other machine that `node` runs on; empty for this one."""
    return _spec_host(node.gateway.spec)


def _spec_host(spec: Any) -> str:
    """Which machine execnet's `spec` means; empty for this one."""
    where = [getattr(spec, key, None) for key in ("ssh", "vagrant_ssh", "socket", "via", "installvia")]
    return " ".join(str(part) for part in where if part)


def _is_apart(node: WorkerController) -> bool:
    return bool(host_of(node) or node.gateway.spec.chdir)


def keep_groups(items: list[pytest.Item]) -> None:
    """Put the group of each of our tests behind its node id, where xdist 3.8 fails to.

    That is how `--dist loadgroup` tells its controller what belongs together, but from pytest 9.2 on what it writes is
    no longer the node id, and every group falls apart without a word (pytest-xdist issue 1386).
    """
    for item in filter(is_ours, items):
        group = xdist_group(item)
        if group and not item.nodeid.endswith(f"@{group}") and hasattr(item, "_id"):
            item._id = item.id.parse(f"{item.nodeid}@{group}")


def refuse_collection(config: pytest.Config, items: list[pytest.Item], error: pytest.UsageError) -> None:
    """Stop with a usage error found in collection; a worker of xdist cannot raise one, so it tells the controller."""
    if not is_worker(config):
        raise error
    items.clear()
    config.workeroutput[_USAGE_ERROR] = str(error)  # type: ignore[attr-defined]


def is_worker(config: pytest.Config) -> bool:
    """Whether this process is one of xdist's workers."""
    return hasattr(config, "workerinput")


def place_of(config: pytest.Config) -> WorkerPlace | None:
    """Where this worker stands; None in any other process."""
    given = getattr(config, "workerinput", {}).get(_INPUT)
    if given is None:
        return None
    name = config.workerinput["workerid"]  # type: ignore[attr-defined]
    return WorkerPlace(name, slot=given["slot"], workers=given["workers"], apart=given["apart"])


def given_folder(config: pytest.Config) -> Path | None:
    """The folder of the session that the controller named to this worker."""
    given = getattr(config, "workerinput", {}).get(_INPUT)
    if given is None:
        return None
    folder: str = given["folder"]
    return config.rootpath / ".zimage" / "sessions" / folder
