"""Timing on a machine that is fit for it: look before, wait if need be, watch meanwhile, look again, time once more.

One run waits for `FitPlan.wait_s` at most, all its waits together. What stays unfit is timed all the same and says so
in its record: the verdict is the gate's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

from msgspec import structs

from pytest_zimage.catalog.device_class import FitnessLimits
from pytest_zimage.engines.base import ReportProgress
from pytest_zimage.engines.protocol import CanaryTimed
from pytest_zimage.probes.fitness import Fitness, Reading, Recorded, reasons
from pytest_zimage.probes.fitness_fault import Moment, simulated
from pytest_zimage.probes.observer import Observer, observing

_POLL_S = 2.0
"""Between two looks of a wait: a canary each must not keep the device warm."""
_TICK_S = 0.5
"""Between two signs of life."""

Timed = TypeVar("Timed")


@dataclass(frozen=True)
class FitPlan:
    """What counts as fit, and what to do where a machine is not."""

    limits: FitnessLimits
    wait_s: float
    """Longest wait of a run; with 0 there is neither a wait nor a second time."""
    recorded: Recorded | None
    """The canary of the variant's baseline."""
    root_pid: int
    """The process that all of this session descend from."""
    fault: str = ""
    """`Injection.fitness`."""


class Guard:
    """The fitness of one run. `canary` may be None for an engine without one."""

    def __init__(
        self,
        plan: FitPlan,
        observer: Observer,
        progress: ReportProgress,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._plan, self._observer, self._progress = plan, observer, progress
        self._clock, self._sleep = clock, sleep
        self._left_s = plan.wait_s
        self.load = Fitness(before=Reading(unknown=("not looked at yet",)))
        """The machine before the load."""

    def before_load(self) -> Guard:
        """Wait until the machine is fit to begin a run. No process of the run may be there yet."""
        budget_s = self._left_s
        reading = self._until_fit(lambda: self._look("before"))
        self.load = self._settled(Fitness(before=reading), budget_s)
        return self

    def timed(
        self, block: Callable[[], Timed], *, worker: int | None, canary: Callable[[], CanaryTimed] | None = None
    ) -> tuple[Timed, Fitness]:
        """What `block` gives, timed on a fit machine as far as waiting can make it one, and what was seen of it.

        `worker` is the process that holds device memory, or from which the one descends that does; None: not known.
        """
        budget_s = self._left_s
        retried = False
        while True:
            before = self._until_fit(lambda: self._look("before", canary, worker))
            unfit_from_the_start = bool(self._why(Fitness(before=before)))
            with self._observer.watching(worker) as watch:
                result = block()
            after = self._look("after", canary, worker)
            fitness = Fitness(before=before, during=watch.worst, after=after, retried=retried)
            fitness = self._settled(fitness, budget_s)
            if retried or unfit_from_the_start or not fitness.reasons or self._left_s <= 0:
                return result, fitness
            retried = True
            self._rest(fitness.reasons)

    def _look(
        self, moment: Moment, canary: Callable[[], CanaryTimed] | None = None, worker: int | None = None
    ) -> Reading:
        timed = canary() if canary is not None else None
        return simulated(self._observer.look(timed, worker), self._plan.fault, moment)

    def _until_fit(self, look: Callable[[], Reading]) -> Reading:
        while True:
            reading = look()
            why = self._why(Fitness(before=reading))
            if not why or self._left_s <= 0:
                return reading
            self._rest(why)

    def _rest(self, why: tuple[str, ...]) -> None:
        """Wait for a while, showing what for; it counts against the run's limit."""
        until_s = self._clock() + min(_POLL_S, self._left_s)
        while (now_s := self._clock()) < until_s and self._left_s > 0:
            self._progress(f"waiting until this machine is fit ({why[0]})", 0, 0)
            step_s = min(_TICK_S, until_s - now_s)
            self._sleep(step_s)
            self._left_s -= max(step_s, self._clock() - now_s)

    def _why(self, fitness: Fitness) -> tuple[str, ...]:
        return reasons(fitness, self._plan.limits, self._plan.recorded)

    def _settled(self, fitness: Fitness, budget_s: float) -> Fitness:
        return structs.replace(fitness, reasons=self._why(fitness), waited_s=budget_s - max(self._left_s, 0.0))


@contextmanager
def guarding(plan: FitPlan, gpu: str, progress: ReportProgress, also: int | None = None) -> Iterator[Guard]:
    """The guard of a run on the GPU with NVML's UUID `gpu`; on entry the machine is as fit as waiting can make it.

    Enter it before any process of the run is started: what holds device memory by then is not of the run, but for
    `also` and what descends from it, a server that ran already.
    """
    with observing(gpu, plan.root_pid, also) as observer:
        yield Guard(plan, observer, progress).before_load()
