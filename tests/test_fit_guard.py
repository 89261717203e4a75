"""Waiting for a machine that is fit, and timing again on one that was not; with a clock that only sleeping moves."""

from __future__ import annotations

import pytest
from msgspec import structs

from pytest_zimage.catalog import FitnessLimits
from pytest_zimage.engines.fit import FitPlan, Guard
from pytest_zimage.engines.protocol import CanaryTimed
from pytest_zimage.errors import MeasurementError
from pytest_zimage.probes.fitness import CanaryFigures, GpuProcess, Reading, Recorded
from pytest_zimage.probes.observer import Watch

FIT = Reading(throttle=())
HOT = Reading(throttle=("thermal throttle",))
CROWDED = Reading(processes=(GpuProcess(4711, "python", 3_100_000_000),))


class Machine:
    """Says one reading a look, the last one for ever; and one a watched block."""

    def __init__(
        self, *looks: Reading, during: tuple[Reading | None, ...] = (None,), wait_s: float = 60.0, fault: str = ""
    ):
        self.looks, self.during = list(looks), list(during)
        self.now_s = 0.0
        self.shown: list[str] = []
        self.drawn = 0
        self.canaries = 0
        self.workers: list[int | None] = []
        recorded = Recorded(canary=CanaryFigures(matmul_tflops=790.0))
        plan = FitPlan(limits=FitnessLimits(), wait_s=wait_s, recorded=recorded, root_pid=1, fault=fault)
        self.guard = Guard(plan, self, self.progress, clock=lambda: self.now_s, sleep=self.sleep)

    def look(self, canary: CanaryTimed | None = None, worker: int | None = None) -> Reading:
        self.workers.append(worker)
        reading = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        if canary is None:
            return reading
        return structs.replace(reading, canary=CanaryFigures(matmul_tflops=canary.matmul_tflops))

    def watching(self, worker: int | None):
        watch = Watch(lambda number: FIT)
        watch.worst = self.during.pop(0) if len(self.during) > 1 else self.during[0]

        class Watching:
            def __enter__(self):
                return watch

            def __exit__(self, *_):
                return None

        return Watching()

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds

    def progress(self, stage: str, done: int, total: int) -> None:
        self.shown.append(stage)

    def canary(self) -> CanaryTimed:
        self.canaries += 1
        return CanaryTimed(790.0)

    def draw(self) -> int:
        self.drawn += 1
        return self.drawn

    def timed(self):
        return self.guard.timed(self.draw, worker=10, canary=self.canary)


def test_a_fit_machine_is_not_kept_waiting():
    machine = Machine(FIT)
    drawn, fitness = machine.timed()
    assert (drawn, machine.now_s, fitness.reasons, fitness.waited_s, fitness.retried) == (1, 0.0, (), 0.0, False)
    assert (machine.canaries, machine.workers) == (2, [10, 10])


def test_it_waits_until_the_machine_is_fit_and_says_for_what():
    machine = Machine(CROWDED, CROWDED, FIT)
    drawn, fitness = machine.timed()
    assert (drawn, fitness.reasons, fitness.waited_s, machine.now_s) == (1, (), 4.0, 4.0)
    assert set(machine.shown) == {"waiting until this machine is fit (another process holds 3.1 GB: pid 4711 python)"}
    assert len(machine.shown) == 8, "a sign of life at least once a second"


def test_what_stays_unfit_is_timed_once_and_keeps_its_reasons():
    machine = Machine(CROWDED, wait_s=5.0)
    drawn, fitness = machine.timed()
    assert (drawn, fitness.waited_s, fitness.retried) == (1, 5.0, False)
    assert fitness.reasons == ("another process holds 3.1 GB: pid 4711 python",)


@pytest.mark.parametrize(("looks", "during"), [((FIT, HOT, FIT), (None,)), ((FIT, FIT, FIT), (HOT, FIT))])
def test_rounds_on_a_machine_that_became_unfit_are_timed_again(looks, during):
    machine = Machine(*looks, during=during)
    drawn, fitness = machine.timed()
    assert (drawn, fitness.retried, fitness.reasons) == (2, True, ())
    assert fitness.waited_s == 2.0


def test_they_are_timed_twice_at_most():
    machine = Machine(FIT, during=(HOT,))
    drawn, fitness = machine.timed()
    assert (drawn, fitness.retried, fitness.reasons) == (2, True, ("thermal throttle",))


def test_without_waiting_there_is_no_second_time_either():
    machine = Machine(FIT, during=(HOT,), wait_s=0.0)
    drawn, fitness = machine.timed()
    assert (drawn, fitness.reasons, machine.now_s, machine.shown) == (1, ("thermal throttle",), 0.0, [])


def test_all_waits_of_a_run_share_one_limit():
    machine = Machine(HOT, wait_s=10.0)
    load = machine.guard.before_load().load
    _, fitness = machine.timed()
    assert (load.waited_s, fitness.waited_s, machine.now_s) == (10.0, 0.0, 10.0)
    assert load.reasons == fitness.reasons == ("thermal throttle",)


def test_the_load_is_looked_at_before_there_is_a_worker():
    machine = Machine(HOT, FIT)
    load = machine.guard.before_load().load
    assert (machine.workers, machine.canaries) == ([None, None], 0)
    assert (load.before, load.during, load.after, load.waited_s) == (FIT, None, None, 2.0)


def test_a_low_canary_is_waited_for_and_found_unfit():
    machine = Machine(FIT, wait_s=3.0)
    _, fitness = machine.guard.timed(machine.draw, worker=10, canary=lambda: CanaryTimed(612.0))
    assert fitness.reasons == ("matmul canary 612 TFLOP/s, 790 recorded (-23 %)",)
    assert fitness.waited_s == 3.0


def test_an_engine_without_a_canary_is_guarded_by_the_rest():
    machine = Machine(FIT, HOT, FIT)
    drawn, fitness = machine.guard.timed(machine.draw, worker=10)
    assert (drawn, fitness.retried, fitness.canary()) == (2, True, CanaryFigures())


@pytest.mark.parametrize(("fault", "times"), [("throttle", 1), ("process", 1), ("canary:0.8", 2)])
def test_an_injected_fault_goes_the_way_of_a_true_one(fault, times):
    machine = Machine(FIT, wait_s=6.0, fault=fault)
    drawn, fitness = machine.timed()
    assert drawn == times
    assert fitness.reasons


def test_an_error_of_the_block_is_not_held_up():
    def fail():
        raise MeasurementError("NaN")

    machine = Machine(FIT)
    with pytest.raises(MeasurementError, match="NaN"):
        machine.guard.timed(fail, worker=10)
