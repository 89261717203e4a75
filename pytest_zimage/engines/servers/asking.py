"""Requests of a server: what fails by accident is made anew within bounds, and no seed is drawn twice."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import TypeVar

from msgspec import structs

from pytest_zimage.catalog import Workload
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.errors import EngineError

IN_A_ROW = 3
"""Requests for one image that may fail."""
SHARE = 0.05
"""Of all images of a run, whose requests may fail; `IN_A_ROW` of them may in any case. So may as many beside them."""
_PAUSE_S = 0.05
"""Before a request is made anew: a server that is dying needs a moment to be dead."""

Answer = TypeVar("Answer")


class Asking:
    """The requests of one run, and what went wrong with them."""

    def __init__(self, what: str, requests: int, *, sleep: Callable[[float], None] = time.sleep) -> None:
        """`what` names the run in messages, `requests` is how many images it will ask for."""
        self._what, self._sleep = what, sleep
        self._requests = requests
        self._allowed = max(IN_A_ROW, int(SHARE * requests))
        self._in_a_row = 0
        self._last = ""
        self.faults: dict[str, int] = {}
        """Requests for an image that failed, by kind."""
        self._beside: list[Mapping[str, int]] = []

    @property
    def all_faults(self) -> dict[str, int]:
        """Requests of every kind that failed, those counted by sessions too, by kind."""
        counts = Counter(self.faults)
        for faults in self._beside:
            counts.update(faults)
        return dict(sorted(counts.items()))

    def count(self, faults: Mapping[str, int]) -> None:
        """Count what a session counts of requests that it makes anew by itself, from now on."""
        self._beside.append(faults)

    def ask(self, request: Callable[[], Answer]) -> Answer:
        """What `request` gives, made anew after a `RequestFault`.

        Raises `EngineError` when too many fail, and whatever else `request` raises.
        """
        while True:
            try:
                answer = request()
            except RequestFault as fault:
                self.failed(fault)
            else:
                self.succeeded()
                return answer

    def failed(self, fault: RequestFault) -> None:
        """Count one that failed, and rest before the next; raises `EngineError` when it was one too many."""
        self.faults[fault.kind] = self.faults.get(fault.kind, 0) + 1
        self._in_a_row += 1
        total = sum(self.faults.values())
        if self._in_a_row > IN_A_ROW:
            raise self._too_many(f"{self._in_a_row} requests in a row failed", fault) from fault
        if total > self._allowed:
            raise self._too_many(f"{total} of {self._requests} requests failed", fault) from fault
        self._sleep(_PAUSE_S)

    def succeeded(self) -> None:
        """Raises `EngineError` where too many requests beside it had to be made anew."""
        self._in_a_row = 0
        beside = sum(sum(faults.values()) for faults in self._beside)
        if beside > self._allowed:
            raise EngineError(
                f"{self._what}: {beside} requests beside those for its {self._requests} images failed"
                f" ({self._counts()})",
                mend="look at what the server says in its log, and at what is between here and there",
            )

    def _too_many(self, how: str, fault: RequestFault) -> EngineError:
        return EngineError(
            f"{self._what}: {how} ({self._counts()}); the last one: {fault.message}",
            mend=fault.mend or "look at what the server says in its log",
        )

    def _counts(self) -> str:
        return ", ".join(f"{kind} {count}" for kind, count in self.all_faults.items())


class Seeds:
    """The seeds of one run, none of them given twice: a server that has seen one may answer from its cache."""

    def __init__(self, workload: Workload, rounds: int) -> None:
        self._workload = workload
        self._stride = max(1000, rounds + 2)
        self._given = {workload.seed}

    def workload(self, number: int) -> Workload:
        """The workload of round `number`, with a further seed each time it is asked for."""
        seed = self._workload.seed + 1 + number
        while seed in self._given:
            seed += self._stride
        self._given.add(seed)
        return structs.replace(self._workload, seed=seed)
