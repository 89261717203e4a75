"""The delta report: one verdict as the failing test's own text, for the person whose change it stopped.

What was expected, what was seen, how sure that is, what probably explains it, and the command to run next. No colours
inside: the caller paints.
"""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence

from pytest_zimage.reports import commands, units
from pytest_zimage.reports.machine import speed_text
from pytest_zimage.reports.phases import phase_lines
from pytest_zimage.verdict.model import Verdict

_RECORDED = "(not recorded)"
_MOST_RUNS_SHOWN = 8
_EXPLANATION_WIDTH = 100
_MOST_KEYS_NAMED = 4


def headline(verdict: Verdict, title: str = "") -> str:
    """One line: `nvfp4 warm latency: SLOWER  5.50 s -> 6.61 s  +20.1 % (95 % interval +18.9 .. +21.4 %)`."""
    start = f"{verdict.variant} {title or verdict.metric.replace('_', ' ')}: {verdict.verdict}"
    if verdict.unfit:
        start += f": {'; '.join(verdict.unfit)}"
    parts = [start, *_numbers(verdict), "[INJECTED]" if verdict.injected else ""]
    return "  ".join(part for part in parts if part)


def _numbers(verdict: Verdict) -> list[str]:
    if verdict.value is None:
        return []
    value = units.value(verdict.value, verdict.unit)
    if verdict.baseline is None:
        return [f"measured {value}"]
    if verdict.outcome == "changed":
        changed = units.differences(verdict.baseline, verdict.value, verdict.unit)
        return changed if len(changed) == 1 else [f"{len(changed)} of its parts changed"]
    if isinstance(verdict.value, dict):
        return [value]
    change = units.change(verdict.change, verdict.scale, verdict.unit) if verdict.change is not None else ""
    if verdict.interval is not None:
        change += f" (95 % interval {units.change_interval(verdict.interval, verdict.scale, verdict.unit)})"
    return [f"{units.value(verdict.baseline, verdict.unit)} -> {value}", change]


def delta_text(verdict: Verdict, title: str = "", options: Sequence[str] = ()) -> str:
    """The whole report of one verdict, without ANSI codes; a pass is its headline alone.

    `title` is the metric's own; `options` are this session's command line options that its commands must repeat.
    """
    first = headline(verdict, title)
    speed = speed_text(verdict)
    if verdict.outcome == "pass" and not verdict.injected:
        return f"{first}\n  speed       {speed}" if speed else first
    lines = [first, *_explained(verdict)]
    for name, body in (
        ("band", _band(verdict)),
        ("certainty", _certainty(verdict)),
        ("runs", _runs(verdict)),
        ("speed", [speed] if speed else []),
        ("machine", list(verdict.fitness)),
        ("changed", _changed(verdict)),
        ("phases", phase_lines(verdict)),
        ("dispatch", _dispatch(verdict)),
        ("environment", _environment(verdict)),
        ("reference", [verdict.reference] if verdict.reference else []),
        ("notes", [note for note in verdict.notes if note not in _changed(verdict)]),
        ("next", _next(verdict, options)),
    ):
        lines += [f"  {name if not index else '':<12}{line}" for index, line in enumerate(body)]
    return "\n".join(line.rstrip() for line in lines)


def _explained(verdict: Verdict) -> list[str]:
    """What the word means, to someone who meets it for the first time."""
    text = verdict.claim or {
        "regression": "Every fresh run and their mean lie beyond the band, and chance does not explain it (99.9 %)."
        if verdict.scale == "relative"
        else "Over the same prompts and seeds the mean is beyond the margin and chance does not explain it (99.9 %), "
        "or a single image or the ceiling decides it: see the notes.",
        "improvement": "Better than the baseline beyond the band. The gate now protects the older, worse figure: "
        "record the new one.",
        "inconclusive": _missing_sensitivity(verdict),
        "no-baseline": "Nothing recorded to compare with, so nothing was judged: this is not a pass.",
        "unfit": "The machine was not fit while this was timed, so nothing was concluded: this is not a pass."
        if verdict.unfit
        else "This was not fit to be judged, so nothing was concluded: this is not a pass.",
        "changed": "This must be equal on every machine and every run, so any difference counts.",
        "error": "There is no verdict on a number, because something is wrong with what was measured.",
    }.get(verdict.outcome, "")
    marked = ["A fault was injected on purpose; this can never become a baseline."] if verdict.injected else []
    # A number and its percent sign stay on one line: to textwrap a no-break space is no space.
    whole = [part.replace(" %", "\N{NO-BREAK SPACE}%") for part in (text, *marked)]
    lines = [line for part in whole for line in textwrap.wrap(part, _EXPLANATION_WIDTH)]
    return [f"  {line}".replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _missing_sensitivity(verdict: Verdict) -> str:
    """How much narrower the interval must become; the rule passes what stays inside the band up to its upper bound."""
    told = "The runs neither stay inside the band nor leave it for certain: this is not a pass."
    if verdict.interval is None or verdict.change is None or verdict.band is None:
        return told
    half, room = (verdict.interval[1] - verdict.interval[0]) / 2, verdict.band - verdict.change
    if room <= 0:
        return f"{told} The change lies beyond the band, but not in every run or not beyond chance."
    return (
        f"{told} To pass with this change, the interval must shrink from +/-{_amount(verdict, half)} to "
        f"+/-{_amount(verdict, room)}: more fresh runs, more baseline runs, or a quieter machine."
    )


def _band(verdict: Verdict) -> list[str]:
    if verdict.band is None:
        return []
    text = f"+/-{_amount(verdict, verdict.band)}"
    if isinstance(verdict.baseline, float | int):
        width = verdict.band if verdict.scale == "absolute" else verdict.band * verdict.baseline
        low, high = (_possible(verdict, verdict.baseline + sign * width) for sign in (-1, 1))
        text += f", that is {units.value(low, verdict.unit)} .. {units.value(high, verdict.unit)}"
    return [text]


def _possible(verdict: Verdict, value: float) -> float:
    """`value`, or the limit of the metric that it lies beyond; seconds and bytes are never below 0."""
    lowest, highest = verdict.limits or (0.0 if verdict.scale == "relative" else None, None)
    value = value if lowest is None else max(value, lowest)
    return value if highest is None else min(value, highest)


def _certainty(verdict: Verdict) -> list[str]:
    parts = []
    if verdict.noise is not None:
        of_what = "run-to-run noise" if verdict.scale == "relative" else "spread of the differences, image by image,"
        parts.append(f"{of_what} {_amount(verdict, verdict.noise)}")
    if verdict.mde is not None:
        parts.append(f"smallest change it finds 8 times out of 10: {_amount(verdict, verdict.mde)}")
    return ["; ".join(parts)] if parts else []


def _amount(verdict: Verdict, amount: float) -> str:
    return units.change(amount, verdict.scale, verdict.unit, signed=False)


def _runs(verdict: Verdict) -> list[str]:
    what = "run" if verdict.scale == "relative" else "images"
    counted = "" if what == "run" else " images"
    base = "of what it is compared with" if verdict.claim else "in the baseline"
    lines = [f"{verdict.k_base}{counted} {base}, {verdict.k_new} new"] if verdict.k_base or verdict.k_new else []
    for number, rounds in enumerate(verdict.samples[:_MOST_RUNS_SHOWN], start=1):
        name = f"new {what} {number}" if what == "run" else "new images"
        if not rounds:
            lines.append(f"{name}: no rounds")
            continue
        spread = f", {units.quantity(min(rounds), verdict.unit)} .. {units.quantity(max(rounds), verdict.unit)}"
        lines.append(
            f"{name}: median {units.quantity(statistics.median(rounds), verdict.unit)} of "
            f"{len(rounds)}{spread if len(rounds) > 1 else ''}"
        )
    if len(verdict.samples) > _MOST_RUNS_SHOWN:
        lines.append(f"and {len(verdict.samples) - _MOST_RUNS_SHOWN} more")
    return lines


def _changed(verdict: Verdict) -> list[str]:
    return units.differences(verdict.baseline, verdict.value, verdict.unit) if verdict.outcome == "changed" else []


def _dispatch(verdict: Verdict) -> list[str]:
    if verdict.dispatch_changed is None:
        return []
    return list(verdict.dispatch_changed) or ["the same operations on the same backends as in the baseline's map"]


def _environment(verdict: Verdict) -> list[str]:
    """Differences first; what the baseline never recorded explains nothing and takes one line together."""
    if verdict.baseline is None or verdict.claim:
        return []
    changed = verdict.environment_changed
    unknown = sorted(key for key, (old, _) in changed.items() if old == _RECORDED)
    lines = [f"{key}: {old} -> {new}" for key, (old, new) in sorted(changed.items()) if key not in unknown]
    if unknown:
        more = f" and {len(unknown) - _MOST_KEYS_NAMED} more" if len(unknown) > _MOST_KEYS_NAMED else ""
        lines.append(f"not recorded with the baseline: {', '.join(unknown[:_MOST_KEYS_NAMED])}{more}")
    return lines or ["no difference from what the baseline recorded"]


def _next(verdict: Verdict, options: Sequence[str]) -> list[str]:
    accept = f"to accept it:       {commands.accept(verdict, options)}"
    closer = f"to look closer:     {commands.closer(verdict, options)}"
    if verdict.injected or verdict.claim:
        return [closer]
    return {
        "regression": [accept, closer],
        "improvement": [accept, closer],
        "changed": [accept, closer],
        "inconclusive": [f"to settle it:       {commands.closer(verdict, options, runs=max(5, verdict.k_new + 2))}"],
        "no-baseline": [f"to record one:      {commands.record(verdict, options)}"],
        "unfit": [f"once it is quiet:   {commands.closer(verdict, options)}"],
        "error": [f"to try again:       {commands.closer(verdict, options, runs=1)}"],
    }.get(verdict.outcome, [])
