"""Where a run's wall time went."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Stages:
    """Seconds by stage, in the order in which they were first entered; a stage that comes again adds up."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.seconds: dict[str, float] = {}
        self._clock = clock
        self._began = clock()

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """The time until the block is left belongs to `stage`. Stages do not hold one another."""
        self.seconds.setdefault(stage, 0.0)
        began = self._clock()
        try:
            yield
        finally:
            self.seconds[stage] += self._clock() - began

    def total_s(self) -> float:
        """Since the beginning, with what belongs to no stage."""
        return self._clock() - self._began
