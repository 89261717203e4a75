"""Which phase of an image moved: the phase times of a verdict, the largest mover first."""

from __future__ import annotations

import re

from pytest_zimage.reports import units
from pytest_zimage.verdict.model import Verdict

_STEP = re.compile(r"step_(\d+)")
_MOST_SHOWN = 5
Pair = tuple[float | None, float]


def phase_lines(verdict: Verdict) -> list[str]:
    """Lines such as `steps 1-8: 5.20 s -> 6.24 s  +20.0 %, 94 % of the change`, at most five.

    The sampler's steps count as one phase, since what slows one slows all; where one step alone explains most of what
    they moved, it is named.
    """
    if not verdict.phases:
        return []
    grouped, culprit = _steps_together(verdict.phases)
    known = {name: (old, new) for name, (old, new) in grouped.items() if old is not None}
    if not known:
        return ["the baseline has none; measured " + _plain({name: new for name, (_, new) in grouped.items()})]
    moved = sorted(known.items(), key=lambda item: -abs(item[1][1] - item[1][0]))
    total = _total_change(verdict, known)
    if moved and abs(total) < 0.5 * abs(moved[0][1][1] - moved[0][1][0]):
        # Phases that move against each other are each several times the whole: their shares would only confuse.
        total = 0.0
    lines = [
        _line(name, old, new, total) + (culprit if name.startswith("steps ") else "") for name, (old, new) in moved
    ]
    shown = lines[:_MOST_SHOWN]
    if len(lines) > _MOST_SHOWN:
        shown.append(f"and {len(lines) - _MOST_SHOWN} more that moved less")
    fresh = {name: new for name, (old, new) in grouped.items() if old is None}
    return [*shown, *([f"new, without a baseline: {_plain(fresh)}"] if fresh else [])]


def _line(name: str, old: float, new: float, total: float) -> str:
    text = f"{name}: {units.seconds(old)} -> {units.seconds(new)}"
    if old > 0:
        text += f"  {units.percent(new / old - 1)}"
    return text + (f", {(new - old) / total * 100:.0f} % of the change" if total else "")


def _total_change(verdict: Verdict, known: dict[str, tuple[float, float]]) -> float:
    """Seconds the metric moved; for a metric that is not one of time, the phases' own sum."""
    if verdict.unit == "s" and isinstance(verdict.value, float | int) and isinstance(verdict.baseline, float | int):
        return verdict.value - verdict.baseline
    return sum(new - old for old, new in known.values())


def _steps_together(phases: dict[str, Pair]) -> tuple[dict[str, Pair], str]:
    """`phases` with step_1..step_N summed in their place, and the step that explains most of their change, in words."""
    steps = {name: pair for name, pair in phases.items() if _STEP.fullmatch(name)}
    if len(steps) < 2:
        return phases, ""
    numbers = sorted(int(name.removeprefix("step_")) for name in steps)
    label = f"steps {numbers[0]}-{numbers[-1]}"
    olds = [old for old, _ in steps.values() if old is not None]
    together: Pair = (sum(olds) if len(olds) == len(steps) else None, sum(new for _, new in steps.values()))
    grouped: dict[str, Pair] = {}
    for name, pair in phases.items():
        grouped.setdefault(label if name in steps else name, together if name in steps else pair)
    if together[0] is None:
        return grouped, ""
    changes = {name: new - (old or 0.0) for name, (old, new) in steps.items()}
    name, most = max(changes.items(), key=lambda item: abs(item[1]))
    moved = sum(abs(change) for change in changes.values())
    return grouped, f", mostly {name}" if abs(most) > 0.5 * moved > 0 else ""


def _plain(phases: dict[str, float]) -> str:
    return ", ".join(f"{name} {units.seconds(new)}" for name, new in phases.items())
