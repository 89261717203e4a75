"""Is CLIPScore fit to judge a prompt? Only if the prompt's own images win against controls that must lose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from msgspec import Struct

from pytest_zimage.errors import MeasurementError
from pytest_zimage.quality.protocol import ControlScores


class ControlOutcome(Struct, frozen=True):
    """One prompt's answer, with its numbers."""

    prompt: str
    fit: bool
    real: float
    """Mean CLIPScore of the prompt's own images."""
    controls: dict[str, float]
    """Mean CLIPScore of `black`, `noise` and `image of PROMPT`, with this prompt's text."""
    strongest: str
    """The control that came closest to the real images, or past them."""
    lead: float
    """`real` minus the strongest control."""
    gap: float
    """The lead that was asked for."""
    reason: str


def judge_controls(scores: Sequence[ControlScores], gap: float) -> tuple[ControlOutcome, ...]:
    """One outcome a prompt: fit if the real images' mean exceeds every control's mean by more than `gap`.

    Raises `MeasurementError` for a prompt without scores or with one that is not a finite number.
    """
    return tuple(_judge(prompt, gap) for prompt in scores)


def _judge(scores: ControlScores, gap: float) -> ControlOutcome:
    groups = {"black": scores.black, "noise": scores.noise}
    if scores.other_prompt:
        groups[f"image of {scores.other_prompt}"] = scores.other
    controls = {name: _mean(scores.prompt, name, values) for name, values in groups.items()}
    real = _mean(scores.prompt, "the prompt's own images", scores.real)
    strongest = max(controls, key=lambda name: controls[name])
    lead = real - controls[strongest]
    fit = lead > gap
    verb = "exceed" if fit else "do not exceed"
    return ControlOutcome(
        prompt=scores.prompt,
        fit=fit,
        real=real,
        controls=controls,
        strongest=strongest,
        lead=lead,
        gap=gap,
        reason=f"its own images ({real:.4f}) {verb} the strongest control, {strongest} ({controls[strongest]:.4f}), "
        f"by more than {gap:g}: the lead is {lead:+.4f}"
        + ("" if scores.other_prompt else "; a set of one prompt has no other prompt's image to lose"),
    )


def _mean(prompt: str, what: str, values: Sequence[float]) -> float:
    if not values or not all(math.isfinite(value) for value in values):
        raise MeasurementError(
            f"controls of {prompt}: {what}: {list(values)} are no scores", mend="score the controls again"
        )
    return fmean(values)
