"""What a session knows of one variant's images: the plain data that is judged and stored."""

from __future__ import annotations

import math

from msgspec import Struct

from pytest_zimage.baselines.schema import Baseline, BasePrompt
from pytest_zimage.catalog.model import Metric, PromptSet, Workload
from pytest_zimage.errors import MeasurementError
from pytest_zimage.verdict.paired import Scores, named, pair_name


class Evidence(Struct, frozen=True, kw_only=True):
    """What this session knows of one variant's images."""

    prompts: dict[str, BasePrompt]
    """By name: `drawn_prompts`."""
    pairs: tuple[str, ...]
    """`pair_name` of every image asked for, in the order drawn."""
    fingerprints: dict[str, str]
    """SHA-256 of the decoded pixels, of every pair."""
    scores: dict[str, Scores]
    """By metric. A score of equal images may be infinite where the metric has a cap."""
    unfit: dict[str, str] = {}
    """Prompt -> which control image did not lose; counts for metrics that have `controls`."""
    drawn_on: str = ""
    """Device and processor."""
    previews: dict[str, bytes] = {}
    """By pair: a small JPEG, PNG or WebP."""
    problems: tuple[str, ...] = ()
    """What forbids recording: blank images, prompts that lost tokens, errors."""
    injected: bool = False
    environment: dict[str, str] = {}


class Identity(Struct, frozen=True, kw_only=True):
    """How many images are bit-identical to recorded ones."""

    same: tuple[str, ...]
    differ: tuple[str, ...]
    unknown: tuple[str, ...]
    """Not recorded."""
    drawn_on: tuple[str, str] = ("", "")
    """Where the recorded ones were drawn, and these."""

    @property
    def all_same(self) -> bool:
        return bool(self.same) and not self.differ and not self.unknown

    def note(self) -> str:
        """`17 of 18 images bit-identical to baseline; differing: abstract/42`"""
        text = f"{len(self.same)} of {len(self.same + self.differ + self.unknown)} images bit-identical to baseline"
        if self.differ:
            text += f"; differing: {named(self.differ)}"
        if self.unknown:
            text += f"; without a recorded fingerprint: {named(self.unknown)}"
        before, now = self.drawn_on
        if self.differ and before and now and before != now:
            text += f"; recorded on {before}, drawn on {now}, which may explain last bits"
        return text


def drawn_prompts(prompts: PromptSet, workload: Workload) -> dict[str, BasePrompt]:
    """What the images of each prompt are drawn from, by prompt name."""
    return {
        prompt.name: BasePrompt(
            text=prompt.text,
            prompt_set=prompts.name,
            seeds=prompt.seeds,
            width=prompts.width or workload.width,
            height=prompts.height or workload.height,
        )
        for prompt in prompts.prompts
    }


def drawn_pairs(prompts: PromptSet, more: int = 0) -> tuple[str, ...]:
    """`pair_name` of every image of the set, with the first `more` further seeds of each prompt."""
    return tuple(pair_name(prompt.name, seed) for prompt, seed in prompts.pairs(more))


def identity_to(evidence: Evidence, baseline: Baseline) -> Identity | None:
    """How many images are bit-identical to those of `baseline`; None where it has no fingerprints.

    Raises `MeasurementError` where an image of this session has none.
    """
    without = [pair for pair in evidence.pairs if pair not in evidence.fingerprints]
    if without:
        raise MeasurementError(f"no fingerprint of {named(without)}", mend="draw every prompt and seed asked for")
    if baseline.images is None:
        return None
    stored = baseline.images.fingerprints
    return Identity(
        same=tuple(pair for pair in evidence.pairs if stored.get(pair) == evidence.fingerprints[pair]),
        differ=tuple(p for p in evidence.pairs if p in stored and stored[p] != evidence.fingerprints[p]),
        unknown=tuple(pair for pair in evidence.pairs if pair not in stored),
        drawn_on=(baseline.images.drawn_on, evidence.drawn_on),
    )


def first_ceiling(metric: Metric, mean: float) -> float | None:
    """The ceiling that a first baseline of this mean sets: rounded up to hundredths, as people write such a limit."""
    if metric.ceiling_room is None:
        return None
    # Rounded first, because 100 * (0.2 + 0.1) is a little more than 30.
    return math.ceil(round(100 * (mean + metric.ceiling_room), 6)) / 100
