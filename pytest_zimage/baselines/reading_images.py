"""What a baseline file may hold about images: scores, fingerprints, previews and the prompts they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator

from pytest_zimage.baselines.images import is_fingerprint, is_preview_name
from pytest_zimage.baselines.schema import Baseline, MetricBaseline, Published
from pytest_zimage.catalog.model import Metric

Refuse = Callable[[str, str], None]
"""Field and what is wrong with it; raises."""
_ROUNDING = 0.001
"""How far the mean of printed means may lie from the printed mean."""


def check_paired(where: str, stored: MetricBaseline, metric: Metric, refuse: Refuse) -> None:
    """The fields of one metric that only image scores have."""
    _check_kind(where, stored, metric, refuse)
    for pair, score in stored.scores.items():
        _check_score(f"{where}.scores.{pair}", score, metric, refuse)
    for prompt in stored.unfit:
        if any(pair.startswith(f"{prompt}/") for pair in stored.scores):
            refuse(f"{where}.unfit", f"names {prompt!r}, which has scores")
    if stored.images and not is_fingerprint(stored.images):
        refuse(f"{where}.images", f"is {stored.images!r}, not 64 hexadecimal digits")
    for field in ("margin", "ceiling"):
        value = getattr(stored, field)
        if value is not None and not 0 < value < math.inf:
            refuse(f"{where}.{field}", f"is {value}; it must be positive and finite")
    if stored.published is not None and metric.kind == "paired":
        _check_printed(f"{where}.published", stored.published, metric, refuse)


def _check_kind(where: str, stored: MetricBaseline, metric: Metric, refuse: Refuse) -> None:
    if metric.kind == "paired":
        if not stored.scorer.strip():
            refuse(f"{where}.scorer", "is empty; scores of an unknown scorer compare with nothing")
        if stored.band is not None:
            refuse(f"{where}.band", f"does not belong to a metric that is {metric.kind}; its margin is `margin`")
        if stored.ceiling is not None and metric.ceiling_room is None:
            refuse(f"{where}.ceiling", f"{metric.name} has none")
        return
    for field in ("scorer", "unfit", "images", "margin", "ceiling"):
        if getattr(stored, field):
            refuse(f"{where}.{field}", f"does not belong to a metric that is {metric.kind}")
    if (printed := stored.published) is not None and (printed.by_prompt or printed.seeds or printed.bare):
        refuse(f"{where}.published.by_prompt", f"does not belong to a metric that is {metric.kind}")


def _check_score(where: str, score: float, metric: Metric, refuse: Refuse) -> None:
    low, high = metric.limits or (-math.inf, math.inf)
    if not (math.isfinite(score) and low <= score <= high):
        refuse(where, f"is {score}; {metric.name} lies in {low:g} .. {high:g}")
    if metric.cap is not None and score > metric.cap:
        refuse(where, f"is {score}; {metric.name} is stored up to {metric.cap:g}")


def _check_printed(where: str, printed: Published, metric: Metric, refuse: Refuse) -> None:
    _check_score(f"{where}.mean", printed.mean, metric, refuse)
    if not printed.seeds:
        refuse(f"{where}.seeds", "is empty; image scores are compared for the same seeds only")
    if printed.bare and (printed.std or printed.by_prompt):
        refuse(f"{where}.bare", "is set, though there is more than a mean")
    for prompt, mean in printed.by_prompt.items():
        _check_score(f"{where}.by_prompt.{prompt}", mean, metric, refuse)
    if printed.by_prompt:
        mean = math.fsum(printed.by_prompt.values()) / len(printed.by_prompt)
        if abs(mean - printed.mean) > _ROUNDING:
            refuse(f"{where}.by_prompt", f"has the mean {mean:.4f}, while the printed mean is {printed.mean}")


def check_images(baseline: Baseline, refuse: Refuse) -> None:
    """Prompts, fingerprints and previews of the whole file."""
    for name, prompt in baseline.prompts.items():
        where = f"prompts.{name}"
        if not prompt.text.strip():
            refuse(f"{where}.text", "is empty")
        if not prompt.seeds or len(set(prompt.seeds)) < len(prompt.seeds) or min(prompt.seeds) < 0:
            refuse(f"{where}.seeds", "must be at least one seed, none twice, none below 0")
        if prompt.width < 1 or prompt.height < 1:
            refuse(where, f"is {prompt.width}x{prompt.height} pixels")
    for name, stored in baseline.metrics.items():
        for pair in stored.scores:
            _check_pair(f"metrics.{name}.scores", pair, baseline, refuse)
        for prompt_name in _prompts_named(stored):
            if prompt_name not in baseline.prompts:
                refuse(f"metrics.{name}", f"has the prompt {prompt_name!r}, which `prompts` lacks")
    if baseline.images is None:
        return
    if not baseline.images.fingerprints:
        refuse("images.fingerprints", "is empty")
    for pair, sha256 in baseline.images.fingerprints.items():
        _check_pair("images.fingerprints", pair, baseline, refuse)
        if not is_fingerprint(sha256):
            refuse(f"images.fingerprints.{pair}", f"is {sha256!r}, not 64 hexadecimal digits")
    for pair, file in baseline.images.previews.items():
        if pair not in baseline.images.fingerprints:
            refuse(f"images.previews.{pair}", "has no fingerprint")
        if not is_preview_name(file):
            refuse(f"images.previews.{pair}", f"is {file!r}, not the plain name of a .jpg, .png or .webp file")


def _prompts_named(stored: MetricBaseline) -> Iterator[str]:
    yield from stored.unfit
    if stored.published is not None:
        yield from stored.published.by_prompt


def _check_pair(where: str, pair: str, baseline: Baseline, refuse: Refuse) -> None:
    prompt, _, seed = pair.rpartition("/")
    if not seed.isascii() or not seed.isdigit() or seed != str(int(seed)):
        refuse(f"{where}.{pair}", "is not named PROMPT/SEED")
    if prompt not in baseline.prompts:
        refuse(f"{where}.{pair}", f"is of the prompt {prompt!r}, which `prompts` lacks: {_list(baseline.prompts)}")


def _list(names: Iterable[str]) -> str:
    return ", ".join(names) or "it has none"
