"""Hands measured rounds to pytest-benchmark's `benchmark` fixture, so that `--benchmark-json` has them to the digit.

The rounds were timed in the worker. pytest-benchmark calls its timer before and after each round; one that answers 0.0
and then the recorded duration makes the difference exactly that duration. pytest-benchmark records, it does not judge:
where it is absent, off or already in use, nothing happens and the reason is returned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pytest

from pytest_zimage.errors import MeasurementError


class ReplayTimer:
    """A clock that has been read before: 0.0 at the start of each round, the round's seconds at its end."""

    def __init__(self, rounds_s: Sequence[float]) -> None:
        self._rounds_s = tuple(rounds_s)
        self._calls = 0

    def __call__(self) -> float:
        """Raises `MeasurementError` once every round was told: a further one would be an invention."""
        at, end = divmod(self._calls, 2)
        if at >= len(self._rounds_s):
            raise MeasurementError(
                f"pytest-benchmark asked for more than the {len(self._rounds_s)} rounds measured",
                mend="leave --benchmark-warmup off",
            )
        self._calls += 1
        return self._rounds_s[at] if end else 0.0

    def __repr__(self) -> str:
        return "ReplayTimer()"


def replay(
    request: pytest.FixtureRequest,
    rounds_s: Sequence[float],
    group: str = "",
    extra_info: Mapping[str, object] | None = None,
) -> str:
    """Records `rounds_s` (seconds) as this test's benchmark; returns "", or why nothing was recorded.

    `group` gathers rows in pytest-benchmark's table, a group of the test's own marker wins; `extra_info` goes into the
    JSON beside the rounds. Call it before the verdict is raised. Raises `MeasurementError` without rounds, or with one
    that is not a positive number.
    """
    if not rounds_s or not all(math.isfinite(seconds) and seconds > 0 for seconds in rounds_s):
        raise MeasurementError(f"rounds that are no durations: {list(rounds_s)}", mend="look at the worker's report")
    if reason := _not_now(request):
        return reason
    node = request.node
    mine = {"timer": ReplayTimer(rounds_s), **({"group": group} if group else {})}
    theirs = {key: value for marker in node.iter_markers("benchmark") for key, value in marker.kwargs.items()}
    # In front, because pytest-benchmark reads the closest marker only.
    node.add_marker(pytest.mark.benchmark(**{**mine, **theirs, "timer": mine["timer"]}), append=False)
    benchmark = request.getfixturevalue("benchmark")
    benchmark.extra_info.update(extra_info or {})
    benchmark.pedantic(_nothing, rounds=len(rounds_s), iterations=1, warmup_rounds=0)
    return ""


def _not_now(request: pytest.FixtureRequest) -> str:
    session = request.config.pluginmanager.get_plugin("pytest-benchmark")
    if session is None:
        return "pytest-benchmark is not loaded"
    # Asking for the fixture would skip the test under --benchmark-skip, and is for nothing where it is disabled.
    if session.skip:
        return "--benchmark-skip"
    if session.disabled:
        return "pytest-benchmark is disabled"
    if "benchmark" in request.fixturenames:
        return "this test uses the benchmark fixture itself"
    return ""


def _nothing() -> None:
    """What pytest-benchmark times: the work was done elsewhere."""
