"""Letting image quality become a baseline: only whole prompt sets of sound images, with a reason."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct, structs

from pytest_zimage.baselines.layers import IMAGES, PORTABLE, Layer, layer_key
from pytest_zimage.baselines.merging import Merged, Mode, common_environment
from pytest_zimage.baselines.quality import Evidence
from pytest_zimage.baselines.quality_merging import (
    changed_prompt,
    merge_images,
    merge_scores,
    refusal,
    stale_metrics,
    unfit_for,
)
from pytest_zimage.baselines.rewriting import rewritten
from pytest_zimage.baselines.schema import Baseline, Key
from pytest_zimage.baselines.store import BaselineStore
from pytest_zimage.baselines.update import UpdateResult, result_of
from pytest_zimage.catalog import Catalog
from pytest_zimage.errors import BaselineError


class MeasuredQuality(Struct, frozen=True, kw_only=True):
    """What this session has of one variant's images."""

    key: Key
    evidence: Evidence
    metrics: tuple[str, ...]
    """Those to record, all `paired`; the others stay as they are."""


def update_quality(
    store: BaselineStore,
    catalog: Catalog,
    measured: Sequence[MeasuredQuality],
    *,
    mode: Mode,
    reason: str,
    recorded_at: str,
) -> list[UpdateResult]:
    """Store what may be stored: one result for every (variant, metric), and one for the variant's images.

    The images (fingerprints and previews, `metric` is `images`) follow the scores: where a score is refused they stay,
    unless it was only because the scorer is unfit. With mode `replace`, stored scores of a prompt whose text changed
    go, for they are of other images. Raises `BaselineError` without a reason; everything else that goes wrong is a
    `refused` result of what it concerns.
    """
    if not reason.strip():
        raise BaselineError(
            "a baseline changes only with a reason", mend='add --update-reason "why the numbers changed"'
        )
    results: list[UpdateResult] = []
    for one in measured:
        stop = refusal(one.evidence)
        if stop is not None:
            results += [result_of(one.key, catalog, name, None, stop) for name in one.metrics]
            continue
        by_layer: dict[Layer, list[str]] = {}
        for name in one.metrics:
            by_layer.setdefault(store.locate(one.key, name)[0], []).append(name)
        for layer, names in by_layer.items():
            results += _write(store, catalog, one, layer, names, mode, reason.strip(), recorded_at)
    return results


def _write(
    store: BaselineStore,
    catalog: Catalog,
    one: MeasuredQuality,
    layer: Layer,
    names: Sequence[str],
    mode: Mode,
    reason: str,
    recorded_at: str,
) -> list[UpdateResult]:
    results: list[UpdateResult] = []
    previews: dict[str, bytes] = {}  # filled by `merge`, and read by `rewrite` after it
    evidence = one.evidence

    def merge(current: Baseline | None) -> Baseline | None:
        old = current.metrics if current else {}
        changed = changed_prompt(current, evidence) if mode != "replace" else None
        unfit = {name: answer for name in names if (answer := unfit_for(catalog.metrics[name], evidence))}
        answers = {
            name: changed or unfit.get(name) or merge_scores(current, catalog.metrics[name], evidence, mode)
            for name in names
        }
        results.extend(result_of(one.key, catalog, name, old.get(name), answer) for name, answer in answers.items())
        if any(answer.action == "refused" and name not in unfit for name, answer in answers.items()):
            images = None
        else:
            answer, images, files = merge_images(current, evidence, mode)
            previews.update(files)
            count = len(current.images.fingerprints) if current and current.images else 0
            results.append(_images_row(one, count, len(images.fingerprints), answer))
            answers[IMAGES] = answer
            renewed = {name for name, answer in answers.items() if answer.stored is not None}
            if current is not None and (stale := stale_metrics(current, evidence) - renewed):
                kept = {name: stored for name, stored in current.metrics.items() if name not in stale}
                current = structs.replace(current, metrics=kept)
        if not any(answer.action in ("recorded", "extended") for answer in answers.values()):
            return None
        return rewritten(
            current,
            key=layer_key(one.key, layer),
            reason=reason,
            recorded_at=recorded_at,
            environment=common_environment([evidence.environment], portable=layer == PORTABLE),
            metrics={name: answer.stored for name, answer in answers.items() if answer.stored is not None},
            prompts=evidence.prompts,
            images=images,
        )

    try:
        store.rewrite(one.key, layer, merge, replace_unreadable=mode == "replace", previews=previews)
    except BaselineError as error:
        return [
            result_of(one.key, catalog, name, None, Merged(action="refused", reason=error.message, mend=error.mend))
            for name in names
        ]
    return results


def _images_row(one: MeasuredQuality, old: int, new: int, answer: Merged) -> UpdateResult:
    return UpdateResult(
        variant=one.key.variant,
        metric=IMAGES,
        unit="count",
        action=answer.action,
        old=float(old) if old else None,
        new=float(new),
        runs_old=old,
        runs_new=new,
    )
