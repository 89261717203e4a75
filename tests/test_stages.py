"""Where a run's wall time went: by stage, and all of it."""

from __future__ import annotations

import pytest

from pytest_zimage.engines.stages import Stages


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_a_stage_that_comes_again_adds_up_and_what_lies_between_belongs_to_none(clock):
    stage = Stages(clock)
    for seconds in (2.0, 3.0):
        with stage("load"):
            clock.now += seconds
        clock.now += 1
    with stage("rounds"):
        clock.now += 4
    assert list(stage.seconds.items()) == [("load", 5.0), ("rounds", 4.0)]
    assert stage.total_s() == 11.0


def test_a_stage_that_fails_has_its_time(clock):
    stage = Stages(clock)

    def fail():
        with stage("load"):
            clock.now += 2
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        fail()
    assert stage.seconds == {"load": 2.0}
