"""How `--dist loadgroup` spreads the variants, and what becomes of those of a worker that vanishes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xdist.scheduler import LoadGroupScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController


class GroupScheduling(LoadGroupScheduling):  # type: ignore[misc]
    """xdist's own, which (3.8) does not survive a vanished worker.

    It hands out the crashed test again, which ends the next worker too, and groups that were finished already: then a
    worker has nothing to do, finishes nothing, is never given more, and the session waits for it for ever.
    """

    def remove_node(self, node: WorkerController) -> str | None:
        """The test that `node` was running, if any; it is not run again, the rest of its group is."""
        crashed: str | None = None
        for group, unit in self.assigned_work[node].items():
            running = next((test for test, finished in unit.items() if not finished), None)
            if running is not None:
                unit[running] = True
                crashed = running.removesuffix(f"@{group}")
                break
        super().remove_node(node)
        return crashed

    def _assign_work_unit(self, node: WorkerController) -> None:
        for group, unit in list(self.workqueue.items()):
            if all(unit.values()):
                del self.workqueue[group]
        if self.workqueue:
            super()._assign_work_unit(node)
        else:
            node.shutdown()
