"""The word a person reads for an outcome."""

from __future__ import annotations

from pytest_zimage.catalog.model import Metric
from pytest_zimage.verdict.model import Outcome

_WORDS: dict[Outcome, str] = {
    "pass": "PASS",
    "inconclusive": "INCONCLUSIVE",
    "no-baseline": "NO BASELINE",
    "unfit": "UNFIT",
    "changed": "CHANGED",
    "error": "ERROR",
    "seen": "SEEN",
}


def word(outcome: Outcome, metric: Metric) -> str:
    """`SLOWER`, `BIGGER`, ... in the metric's own terms; the other outcomes read the same for every metric."""
    if outcome == "regression":
        return metric.worse
    if outcome == "improvement":
        return metric.better
    return _WORDS[outcome]
