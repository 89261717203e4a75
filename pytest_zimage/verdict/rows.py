"""From the rule's answer to a row of the results: what was judged joins how it was judged."""

from __future__ import annotations

import math
from typing import Any

from pytest_zimage.catalog.model import Metric, Variant
from pytest_zimage.verdict.model import Judgement, Outcome, Verdict
from pytest_zimage.verdict.words import word

QUANTISED = "quantised_layers"
"""The check that layers which compute quantised do; it has no baseline and no row in the catalogue."""
SOUND = "images"
"""The check of images that asks no scorer; it has no baseline and no row in the catalogue."""

_SHARED = tuple(name for name in Judgement.__struct_fields__ if name in Verdict.__struct_fields__)


def limit_row(
    test: str, variant: Variant, metric: str, *, unit: str, broken: str, value: float, k_new: int, **explained: Any
) -> Verdict:
    """A check of `variant` against a limit, which no baseline tells: `broken` is the word for a failure, "" for none.

    `explained` are further fields of the row.
    """
    figures = {"unit": unit, "value": value, "k_new": k_new, "scale": "absolute", **explained}
    outcome: Outcome = "error" if broken else "pass"
    return Verdict(test=test, variant=variant.name, metric=metric, verdict=broken or "PASS", outcome=outcome, **figures)


def verdict_row(test: str, variant: Variant, metric: Metric, judgement: Judgement, **explained: Any) -> Verdict:
    """`judgement` on `metric` of `variant`, as `test` asked for it; `explained` are further fields, or better ones."""
    shared = {name: getattr(judgement, name) for name in _SHARED}
    named = {
        "test": test,
        "variant": variant.name,
        "metric": metric.name,
        "unit": metric.unit,
        "verdict": word(judgement.outcome, metric),
        "limits": _bounds(metric),
    }
    return Verdict(**{**shared, **named, **explained})


def _bounds(metric: Metric) -> tuple[float | None, float | None] | None:
    """The metric's limits as the results file can say them: JSON knows no infinity."""
    if metric.limits is None:
        return None
    low, high = metric.limits
    return low if math.isfinite(low) else None, high if math.isfinite(high) else None
