"""How `--dist loadgroup` spreads the variants, and what becomes of those of a worker that vanishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadGroupScheduling

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController


def spread(groups: Sequence[str], workers: int, weigh: Callable[[str], int]) -> list[str]:
    """The order to hand out `groups` in; `weigh` says how many bytes one has to load.

    The first stays, since the others' images are held against its own. All workers begin at once and load one after
    another, so the others begin with the lightest. The rest goes by weight, for the last of them should be short.
    """
    if not groups:
        return []
    first, *others = groups
    weights = {group: weigh(group) for group in others}
    light = sorted(others, key=weights.__getitem__)[: workers - 1]
    rest = [group for group in others if group not in light]
    return [first, *light, *sorted(rest, key=weights.__getitem__, reverse=True)]


class GroupScheduling(LoadGroupScheduling):  # type: ignore[misc]
    """xdist's own, which hands out groups in the order of their tests, and (3.8) does not survive a vanished worker.

    It hands out the crashed test again, which ends the next worker too, and groups that were finished already: then a
    worker has nothing to do, finishes nothing, is never given more, and the session waits for it for ever.
    """

    def __init__(self, config: pytest.Config, log: Any, weigh: Callable[[str], int]) -> None:
        """`weigh`: bytes that the variant of this name has to load, 0 if unknown."""
        super().__init__(config, log)
        self._weigh = weigh

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
        if not any(self.assigned_work.values()):
            self._spread()
        if self.workqueue:
            super()._assign_work_unit(node)
        else:
            node.shutdown()

    def _spread(self) -> None:
        """Put the variants in the order of `spread`; groups of other tests keep their places."""
        names = list(self.workqueue)
        variants = [name for name in names if any(test.endswith(f"[{name}]@{name}") for test in self.workqueue[name])]
        ordered = iter(spread(variants, len(self.nodes), self._weigh))
        for name in [next(ordered) if name in variants else name for name in names]:
            self.workqueue.move_to_end(name)
