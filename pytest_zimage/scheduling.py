"""How `--dist loadgroup` spreads the variants, and what becomes of those of a worker that vanishes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pytest
from xdist.scheduler import LoadGroupScheduling

from pytest_zimage.groups import judges_images, variant_of, without_group
from pytest_zimage.xdist import host_of

if TYPE_CHECKING:
    from xdist.workermanage import WorkerController

    from pytest_zimage.foreseen import Weight


def spread(variants: Sequence[str], workers: int, weigh: Callable[[str], Weight]) -> list[str]:
    """The order to hand out `variants` in, the reference first among them.

    All workers begin at once and load one after another: so they begin with the reference, whose images everybody
    needs, and with the lightest, and of these the lightest is the first to load. The rest goes by how long it takes,
    for the last of them should be short.
    """
    if not variants:
        return []
    weights = {variant: weigh(variant) for variant in variants}

    def load_bytes(variant: str) -> int:
        return weights[variant].load_bytes

    def length(variant: str) -> tuple[float, int]:
        return (weights[variant].run_s, load_bytes(variant))

    reference, *others = variants
    opening = [reference, *sorted(others, key=load_bytes)[: workers - 1]]
    rest = [variant for variant in others if variant not in opening]
    return [*sorted(opening, key=load_bytes), *sorted(rest, key=length, reverse=True)]


class GroupScheduling(LoadGroupScheduling):  # type: ignore[misc]
    """xdist's own, which hands out groups in the order of their tests, and (3.8) does not survive a vanished worker.

    It hands out the crashed test again, which ends the next worker too, and groups that were finished already: then a
    worker has nothing to do, finishes nothing, is never given more, and the session waits for it for ever.

    Images are judged once all runs are under way. By then the judge has scored them, and no GPU waits for it or for
    the reference's images.
    """

    def __init__(self, config: pytest.Config, log: Any, weigh: Callable[[str, bool], Weight]) -> None:
        """`weigh`: the variant of this name, whose run draws images to be judged too if the second is true."""
        super().__init__(config, log)
        self._weigh = weigh
        self._runs_at: dict[str, WorkerController] = {}
        """Which worker was given the runs of a variant."""

    def remove_node(self, node: WorkerController) -> str | None:
        """The test that `node` was running, if any; it is not run again, the rest of its group is."""
        crashed: str | None = None
        for unit in self.assigned_work[node].values():
            running = next((test for test, finished in unit.items() if not finished), None)
            if running is not None:
                unit[running] = True
                crashed = without_group(running)
                break
        super().remove_node(node)
        return crashed

    def _assign_work_unit(self, node: WorkerController) -> None:
        for group, unit in list(self.workqueue.items()):
            if all(unit.values()):
                del self.workqueue[group]
        if not any(self.assigned_work.values()):
            self._spread()
        group = self._next_for(node)
        if group is None:
            node.shutdown()
            return
        if not judges_images(group):
            self._runs_at[variant_of(group)] = node
        self._runs_at.setdefault(variant_of(group), node)
        self.workqueue.move_to_end(group, last=False)
        super()._assign_work_unit(node)

    def _next_for(self, node: WorkerController) -> str | None:
        """The first group for `node`, of images rather those that its own judge has scored."""
        groups = [group for group in self.workqueue if self._may_take(node, group)]
        at_hand = (g for g in groups if not judges_images(g) or self._runs_at.get(variant_of(g), node) is node)
        return next(at_hand, groups[0] if groups else None)

    def _may_take(self, node: WorkerController, group: str) -> bool:
        """Images lie on the host that drew them, and those of a run that goes on are left to whoever makes it."""
        variant = variant_of(group)
        drew = self._runs_at.get(variant, node)
        if drew is node or not judges_images(group):
            return True
        hosts = {host_of(other) for other in self.nodes}
        if host_of(drew) not in hosts:
            return True
        goes_on = not all(self.assigned_work.get(drew, {}).get(variant, {}).values())
        return host_of(node) == host_of(drew) and not goes_on

    def _spread(self) -> None:
        """Put our groups in the order of `spread`, images last; groups of other tests keep their places."""
        names = list(self.workqueue)
        groups: dict[str, list[str]] = {}
        for name in names:
            if any(test.endswith(f"[{variant_of(name)}]@{name}") for test in self.workqueue[name]):
                groups.setdefault(variant_of(name), []).append(name)
        images = any(judges_images(name) for found in groups.values() for name in found)
        variants = spread(list(groups), len(self.nodes), lambda variant: self._weigh(variant, images))
        # The first of a variant's groups makes its run, also where a session is about images alone.
        runs = [min(groups[variant], key=judges_images) for variant in variants]
        ours = [*runs, *(group for variant in variants for group in groups[variant] if group not in runs)]
        ordered = iter(ours)
        for name in [next(ordered) if name in ours else name for name in names]:
            self.workqueue.move_to_end(name)
