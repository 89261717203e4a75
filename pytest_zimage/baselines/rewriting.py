"""A baseline file with some of its metrics recorded anew and the others as they were."""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import structs

from pytest_zimage.baselines.merging import environment_override
from pytest_zimage.baselines.schema import (
    SCHEMA,
    BaseImages,
    Baseline,
    BasePrompt,
    Key,
    MetricBaseline,
    Provenance,
)


def rewritten(
    current: Baseline | None,
    *,
    key: Key,
    reason: str,
    recorded_at: str,
    environment: Mapping[str, str],
    metrics: Mapping[str, MetricBaseline],
    prompts: Mapping[str, BasePrompt] | None = None,
    images: BaseImages | None = None,
) -> Baseline:
    """`current` with `metrics`, `prompts` and `images` in it, recorded in `environment`.

    Metrics that stay keep the environment that they were recorded in, as their own override. Prompts that nothing
    refers to any more are dropped.
    """
    old = current.metrics if current else {}
    kept = {
        name: structs.replace(
            stored,
            environment=environment_override(current.environment_of(name), environment) if current else {},
        )
        for name, stored in old.items()
        if name not in metrics
    }
    printed = current is not None and any(stored.published for stored in kept.values())
    images = images or (current.images if current else None)
    every = {**kept, **metrics}
    named = _prompts_named(every, images)
    known = {**(current.prompts if current else {}), **(prompts or {})}
    return Baseline(
        schema=SCHEMA,
        key=key,
        provenance=Provenance(kind="measured", source=current.provenance.source if current and printed else ""),
        reason=reason,
        recorded_at=recorded_at,
        environment=dict(environment),
        metrics=every,
        prompts={name: prompt for name, prompt in known.items() if name in named},
        images=images,
    )


def _prompts_named(metrics: Mapping[str, MetricBaseline], images: BaseImages | None) -> set[str]:
    pairs = [pair for stored in metrics.values() for pair in stored.scores]
    pairs += images.fingerprints if images else []
    named = {pair.rpartition("/")[0] for pair in pairs}
    for stored in metrics.values():
        named.update(stored.unfit, stored.published.by_prompt if stored.published else ())
    return named
