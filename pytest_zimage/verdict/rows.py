"""From the rule's answer to a row of the results: what was judged joins how it was judged."""

from __future__ import annotations

from typing import Any

from pytest_zimage.catalog.model import Metric, Variant
from pytest_zimage.verdict.model import Judgement, Verdict
from pytest_zimage.verdict.words import word

_SHARED = tuple(name for name in Judgement.__struct_fields__ if name in Verdict.__struct_fields__)


def verdict_row(test: str, variant: Variant, metric: Metric, judgement: Judgement, **explained: Any) -> Verdict:
    """`judgement` on `metric` of `variant`, as `test` asked for it; `explained` are further fields, or better ones."""
    shared = {name: getattr(judgement, name) for name in _SHARED}
    named = {
        "test": test,
        "variant": variant.name,
        "metric": metric.name,
        "unit": metric.unit,
        "verdict": word(judgement.outcome, metric),
    }
    return Verdict(**{**shared, **named, **explained})
