"""Whether another engine draws the same picture of the same weights, prompt and seed: no baseline takes part.

Both draw with the euler sampler, which every engine has, on exactly the noise levels of the session's workload. So what
is left between two pictures is how each rounds: the limits of `quality/limits.toml`, by compute precision.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from msgspec import structs

from pytest_zimage.catalog import Prompt, Variant
from pytest_zimage.engines.base import Engine, ReportProgress, RunPlan
from pytest_zimage.engines.protocol import DrawnImage, Injection
from pytest_zimage.errors import CatalogError, MeasurementError, ZImageError
from pytest_zimage.images.shelf import Shelf, image_size
from pytest_zimage.probes import environment
from pytest_zimage.quality.client import Judge
from pytest_zimage.quality.diagnosis import probable_causes
from pytest_zimage.quality.limits import ParityLimits, load_limits
from pytest_zimage.quality.protocol import Comparison, ImageScore, ScorerChoice
from pytest_zimage.reports import units
from pytest_zimage.verdict.model import Verdict
from pytest_zimage.verdict.paired import pair_name
from pytest_zimage.verdict.rows import limit_row

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

PARITY = "parity"
"""The check that two engines draw the same; it has no baseline and no row in the catalogue."""

_SAMPLER = "euler"
_IMAGES = 2
"""Prompts that are drawn, each from its first seed."""


class _Side(NamedTuple):
    """One of the two, under the name that it is offered by: two engines may call themselves the same."""

    name: str
    engine: Engine
    own: bool


def judge_parity(session: ZImageSession, test: str, variant: Variant) -> Verdict:
    """The lowest PSNR between the pictures of the two engines, against the limit of the variant's precision.

    Raises `MeasurementError` where one of them did not draw what it was asked for, and what either engine raises.
    """
    if session.settings.parity is None or session.other_engine is None:
        raise CatalogError("no other engine is named, so there is no picture to compare", mend="--zimage-parity ENGINE")
    mine = _Side(session.settings.engine, session.engine, own=True)
    other = _Side(session.settings.parity, session.other_engine, own=False)
    pairs = tuple((prompt, prompt.seeds[0]) for prompt in session.desk.gallery.prompts.prompts[:_IMAGES])
    ours, theirs = (_drawn(session, variant, side, pairs) for side in (mine, other))
    scored = _compared(session, mine, ours, theirs)
    cap = session.catalog.metrics["psnr"].cap
    psnr = {pair_name(one.prompt, one.seed): _decibel(_against(one), cap) for one in scored}
    precision = precision_of(variant)
    limit = getattr(load_limits().parity, precision)
    worst = min(psnr, key=lambda pair: psnr[pair])
    differ = psnr[worst] < limit
    told = [
        f"{mine.name} and {other.name} draw {'different pictures' if differ else 'the same picture'}: PSNR"
        f" {', '.join(f'{pair} {units.decibel(value)}' for pair, value in psnr.items())};"
        f" {units.decibel(limit)} is the least in {precision}"
    ]
    if differ:
        told += [_how_far(scored, worst), *_causes(ours, theirs, other), *_beside(session, variant, mine, other)]
    return limit_row(
        test,
        variant,
        PARITY,
        unit="dB",
        broken="ENGINES DIFFER" if differ else "",
        value=psnr[worst],
        k_new=len(psnr),
        samples=(tuple(psnr.values()),),
        notes=tuple(told),
        injected=bool(session.injection),
    )


def precision_of(variant: Variant) -> str:
    """The field of `ParityLimits` that holds for `variant`: the coarsest type that any of its networks computes in."""
    coarse = "bfloat16" in (variant.compute_dtype, variant.text_encoder_dtype, variant.vae_dtype)
    found = "bfloat16" if coarse else "float32"
    assert found in ParityLimits.__struct_fields__
    return found


def _plan(session: ZImageSession, variant: Variant, side: _Side, progress: ReportProgress, purpose: str) -> RunPlan:
    plan = session.plan(variant, 0, progress, side.engine)
    return replace(
        plan,
        workload=structs.replace(plan.workload, sampler=_SAMPLER),
        same_schedule=True,
        rounds=1,
        # A fault on both sides would not show.
        inject=Injection(quality=plan.inject.quality) if side.own else Injection(),
        log=plan.log.with_name(f"{variant.name}-{PARITY}-{side.name}-{purpose}.log"),
    )


def _drawn(
    session: ZImageSession, variant: Variant, side: _Side, pairs: Sequence[tuple[Prompt, int]]
) -> tuple[DrawnImage, ...]:
    """What that engine draws, once in the whole session, in the order of `pairs`."""
    name = f"{variant.name}-{PARITY}-{side.name}"
    shelf = Shelf(session.folder / PARITY / name, *image_size(session.desk.gallery.prompts, session.workload))
    with session.reporting(variant.name) as progress:
        plan = replace(_plan(session, variant, side, progress, "images"), images=shelf.request(pairs))
        images = session.book.images(name, lambda: side.engine.draw(plan, progress), progress)
    asked = [(prompt.name, seed) for prompt, seed in pairs]
    if [(image.prompt, image.seed) for image in images] != asked:
        raise MeasurementError(
            f"{side.name} drew {', '.join(pair_name(i.prompt, i.seed) for i in images) or 'nothing'} where"
            f" {', '.join(pair_name(*pair) for pair in asked)} were asked for",
            mend="an engine draws each job of its plan, in their order",
        )
    return images


def _compared(
    session: ZImageSession, mine: _Side, ours: Sequence[DrawnImage], theirs: Sequence[DrawnImage]
) -> tuple[ImageScore, ...]:
    items = [session.desk.item(image, reference) for image, reference in zip(ours, theirs, strict=True)]
    log = session.folder / "logs" / f"judge-{PARITY}-{os.getpid()}.log"
    with session.reporting("quality judge") as progress, session.book.device(progress):
        # Pixels only: parity asks nothing of a scorer, so none needs weights on this machine.
        choice = ScorerChoice(clip="", lpips="")
        with Judge(choice, log=log, timeout_s=session.settings.timeout_s, progress=progress) as judge:
            scored = judge.score(items)
    broken = [f"{pair_name(one.prompt, one.seed)}: {one.findings[0].message}" for one in scored if one.findings]
    if broken:
        raise MeasurementError(
            f"{mine.name} drew no pictures that could be equal to another's: {'; '.join(broken)}",
            mend="see the tests of images, suites/test_quality.py",
        )
    return scored


def _against(score: ImageScore) -> Comparison:
    assert score.against is not None  # every item has a reference
    return score.against


def _decibel(against: Comparison, cap: float | None) -> float:
    value = float("inf") if against.psnr_db is None else against.psnr_db
    return value if cap is None else min(value, cap)


def _how_far(scored: Sequence[ImageScore], worst: str) -> str:
    against = next(_against(one) for one in scored if pair_name(one.prompt, one.seed) == worst)
    share = units.percent(against.changed_share, signed=False)
    return f"{worst}: {share} of its pixels differ, by up to {against.largest_step} of 255"


def _causes(ours: Sequence[DrawnImage], theirs: Sequence[DrawnImage], other: _Side) -> list[str]:
    where = [f"{one.path} and {two.path}" for one, two in zip(ours, theirs, strict=True)]
    return [*where, *probable_causes(ours, theirs, {}, other.name)]


def _beside(session: ZImageSession, variant: Variant, mine: _Side, other: _Side) -> list[str]:
    """What else differs between the engines; and what this verdict does not say."""
    told = [f"this is about two engines; whether {variant.name} regressed in one is for its own baselines to say"]
    try:
        here, there = (_environment(session, variant, side) for side in (mine, other))
    except ZImageError as error:
        return [*told, f"what the two run with could not be asked: {error.message}"]
    changed = environment.diff(here, there)
    told += [
        f"{key}: {old} in {mine.name}, {new} in {other.name}"
        for key, (old, new) in changed.items()
        if key in here and key in there
    ]
    for side, ours, theirs in ((mine, here, there), (other, there, here)):
        if alone := [f"{key} {value}" for key, value in ours.items() if key not in theirs]:
            told.append(f"only {side.name} says: {', '.join(alone)}")
    return told


def _environment(session: ZImageSession, variant: Variant, side: _Side) -> Mapping[str, str]:
    """What that engine runs with: of this session's run of the variant, or else of a run of one round."""
    if side.own and (runs := session.book.recorded(variant.name)):
        return runs[0].environment
    with session.reporting(variant.name) as progress:
        plan = _plan(session, variant, side, progress, "environment")
        unhurried = replace(plan, fit=replace(plan.fit, wait_s=0.0))
        with session.book.device(progress):
            return side.engine.run(unhurried, progress).environment
