"""One vLLM-Omni server that draws one variant: every image timed from request to answer, as the published ones."""

from __future__ import annotations

import time
from collections.abc import Mapping

from msgspec import structs

from pytest_zimage.catalog import Workload
from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.http import Http, StatusError
from pytest_zimage.engines.servers.session import Expected, Seen, Served, ServerSession
from pytest_zimage.engines.vllm_omni import api, metrics, request, versions
from pytest_zimage.engines.vllm_omni.metrics import Total
from pytest_zimage.engines.vllm_omni.versions import Version
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError

_SETTLING = 500_009
"""Added to a seed: the picture that nobody looks at is not one that is asked for later."""


class VllmOmniSession(ServerSession):
    """Asks a ready server for images; it loaded its model while it started."""

    def __init__(
        self,
        http: Http,
        *,
        model: str,
        version: Version,
        same_schedule: bool,
        environment: Mapping[str, str],
        notes: tuple[str, ...] = (),
        started_s: float = 0.0,
        pid: int | None = None,
        used: str = "",
    ) -> None:
        self.started_s, self.pid, self.used = started_s, pid, used
        self.faults: dict[str, int] = {}
        self._http, self._model, self._version = http, model, version
        self._same_schedule = same_schedule
        self._environment = dict(environment)
        self._notes = notes
        self._asked = 0
        self._disturbed = False
        self._counts = True
        self._peaks: list[int | None] = []

    def forget(self) -> tuple[str, ...]:
        """Raises `UnsupportedError`: its model cannot be unloaded and loaded anew."""
        raise UnsupportedError(
            "a vLLM-Omni that ran before has its model loaded, and nothing unloads it: there is no cold load to time",
            mend="let it be started here for that: leave out --zimage-vllm-omni-url",
        )

    def draw(self, workload: Workload, expected: Expected) -> Served:
        """Raises `RequestFault` too where another client was served meanwhile: that image was not alone."""
        versions.check(self._version, workload, same_schedule=self._same_schedule)
        if expected == "cold" and self._asked:
            raise MeasurementError(
                f"the server was asked for {self._asked} images before the first one: that is no cold load",
                mend="see the log for what became of the first request, then measure again",
            )
        steps = versions.steps_sent(workload, same_schedule=self._same_schedule)
        self._environment["vllm-omni.useful_steps"] = versions.useful_steps(self._version, steps)
        if expected == "any":
            return self._image(workload, steps)
        if self._disturbed:
            # A request that was given up may still be drawn: behind it the next one would wait, and be timed waiting.
            self._image(structs.replace(workload, seed=workload.seed + _SETTLING), steps)
            self._disturbed = False
        before = self._totals()
        served = self._image(workload, steps)
        after = self._totals()
        if (others := metrics.requests_between(before, after) - 1) > 0:
            self._disturbed = True
            raise RequestFault("other client", f"the server finished {others} other requests meanwhile")
        return structs.replace(served, beside_s=metrics.clocks_between(before, after))

    def seen(self) -> Seen:
        peaks = [peak for peak in self._peaks if peak is not None]
        return Seen(
            environment=self._environment,
            reserved_peak_bytes=max(peaks) if peaks and len(peaks) == len(self._peaks) else None,
            notes=self._notes,
        )

    def _image(self, workload: Workload, steps: int) -> Served:
        body = request.body(self._model, workload, self._version, steps)
        self._asked += 1
        was_disturbed, self._disturbed = self._disturbed, True
        began = time.perf_counter()
        try:
            data = self._http.raw("POST", request.PATH, request.most_bytes(workload), body=body)
        except StatusError as error:
            raise request.refusal(error.status, error.body) from error
        seconds = time.perf_counter() - began
        self._disturbed = was_disturbed
        answer = self._http.typed("POST", request.PATH, data, request.Generated)
        image = request.image_of(answer, workload)
        figures = answer.metrics or request.Figures()
        self._peaks.append(metrics.peak_bytes(figures.peak_memory_mb))
        return Served(
            seconds=seconds, phases_s=metrics.phases(figures.stage_durations or {}, seconds), beside_s={}, image=image
        )

    def _totals(self) -> dict[str, Total]:
        """What the server has counted so far; empty where it does not say."""
        if not self._counts:
            return {}
        try:
            return metrics.totals(api.metrics_page(self._http))
        except RequestFault as fault:
            self.faults[fault.kind] = self.faults.get(fault.kind, 0) + 1
        except EngineError:
            self._counts = False
        return {}
