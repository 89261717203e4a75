"""Tables for the terminal summary: all verdicts, and what an update of baselines did. Text only, the caller paints.

Columns are as wide as their content. Where the terminal is narrower, columns go in the order of `_DROPPED_FIRST`;
variant, metric, verdict, measured and change always stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from pytest_zimage.baselines.merging import Action
from pytest_zimage.baselines.update import UpdateResult
from pytest_zimage.reports import commands, units
from pytest_zimage.reports.claims import claim_lines
from pytest_zimage.reports.machine import throughput_lines, unfit_lines
from pytest_zimage.verdict.model import Outcome, Verdict

_MARKS: dict[Outcome, str] = {
    "regression": "!",
    "changed": "!",
    "error": "!",
    "inconclusive": "?",
    "unfit": "?",
    "no-baseline": "?",
    "improvement": "+",
    "seen": " ",
    "pass": " ",
}
_NOUNS: tuple[Outcome, ...] = ("regression", "improvement", "error")
"""Outcomes that are counted as things; the others say what a verdict is."""
_LEGEND = {"!": "! failed", "?": "? not judged", "+": "+ better", "*": "* injected", "~": "~ machines at equal speed"}
_DROPPED_FIRST = ("noise", "finds", "95 % interval", "band", "baseline")
_LEFT = ("variant", "metric", "verdict", "")
_STAYED: tuple[Action, ...] = ("kept", "unchanged")
_OWN_SCALE = ("score", "dB")
"""Units whose changes are differences, not ratios."""
_MIN_WIDTH = 80
_GAP = "  "


def verdict_table(verdicts: Sequence[Verdict], *, width: int = _MIN_WIDTH, options: Sequence[str] = ()) -> str:
    """All verdicts in the order given, one line each; then the counts, and last the command to run next.

    Claims that are only seen have their own lines: against what was claimed of another machine, no change means much.
    `finds` is the smallest change found 8 times out of 10. `width` is the terminal's, at least 80 is used;
    `options` are this session's command line options that the command must repeat.
    """
    if not verdicts:
        return "no verdicts: nothing was measured"
    rows = [
        {name: cell(verdict) for name, cell in _COLUMNS.items()} for verdict in verdicts if verdict.outcome != "seen"
    ]
    legend = legend_line(verdicts)
    parts = (
        [*_fitted(list(_COLUMNS), rows, max(width, _MIN_WIDTH)), *([legend] if legend else [])] if rows else [],
        claim_lines(verdicts),
        [*unfit_lines(verdicts), *throughput_lines(verdicts)],
        [counts_line(verdicts), next_line(verdicts, options)],
    )
    return "\n\n".join("\n".join(lines) for lines in parts if lines)


def counts_line(verdicts: Sequence[Verdict]) -> str:
    """`8 verdicts: 4 pass, 2 regressions, 2 no baseline`"""
    counts = Counter(verdict.outcome for verdict in verdicts)
    told = ", ".join(
        _counted(counts[outcome], outcome.replace("-", " "), noun=outcome in _NOUNS)
        for outcome in reversed(_MARKS)
        if counts[outcome]
    )
    return f"{_counted(len(verdicts), 'verdict')}: {told}"


def _counted(count: int, word: str, *, noun: bool = True) -> str:
    return f"{count} {word}{'s' if noun and count != 1 else ''}"


def legend_line(verdicts: Sequence[Verdict]) -> str:
    """What the marks in the table mean, those that are there; empty where all is well."""
    marks = {_MARKS[verdict.outcome] for verdict in verdicts} | {"*" for verdict in verdicts if verdict.injected}
    marks |= {"~" for verdict in verdicts if verdict.speed is not None}
    return "   ".join(text for mark, text in _LEGEND.items() if mark in marks)


def next_line(verdicts: Sequence[Verdict], options: Sequence[str] = ()) -> str:
    """The command that helps most: look closer at the first failure, settle what is open, or record what is missing."""
    if failed := _first(verdicts, "regression", "changed", "error"):
        return f"next: {commands.closer(failed, options)}"
    # A noisy machine is no place to record a first baseline, nor is one that was not fit.
    if unsettled := _first([v for v in verdicts if v.outcome == "inconclusive" or v.unfit], "inconclusive", "unfit"):
        return f"next: {commands.closer(unsettled, options)}"
    if missing := [verdict for verdict in verdicts if verdict.outcome == "no-baseline"]:
        return f"next: {commands.record_all(missing, options)}"
    if unfit := _first(verdicts, "unfit"):
        return f"next: {commands.closer(unfit, options)}"
    if better := [verdict for verdict in verdicts if verdict.outcome == "improvement"]:
        return f"next: {commands.accept(better[0], options)}"
    if any(verdict.outcome == "pass" for verdict in verdicts):
        return "next: nothing to do, all that was judged is a pass"
    return "next: nothing to do: claims of another machine, engine or workload are told here and not judged"


def _first(verdicts: Sequence[Verdict], *outcomes: Outcome) -> Verdict | None:
    return next((verdict for verdict in verdicts if verdict.outcome in outcomes), None)


def update_table(rows: Sequence[UpdateResult], *, width: int = _MIN_WIDTH) -> str:
    """What an update changed, old -> new, a line per variant and metric; a refusal gives its reason instead.

    Why most of what stayed did so is told once, below the rows.
    """
    if not rows:
        return "no baselines updated: nothing was measured"
    shared = _shared_reasons(rows)
    cells = [
        {
            "variant": f"{'!' if row.action == 'refused' else ' '} {row.variant}",
            "metric": row.metric,
            "old": _short(row.old, row.unit),
            "new": _short(row.new, row.unit),
            "": row.action if shared.get(row.action) == row.reason else _update_change(row),
        }
        for row in rows
    ]
    counts = Counter(row.action for row in rows)
    lines = _fitted(list(cells[0]), cells, max(width, _MIN_WIDTH), keep_last=True)
    told = [f"{action}: {reason}" for action, reason in shared.items()]
    return "\n".join([*lines, *told, "", ", ".join(f"{count} {action}" for action, count in counts.items())])


def _shared_reasons(rows: Sequence[UpdateResult]) -> dict[Action, str]:
    """Per action that left a baseline as it was, the reason that most of its rows have, where several have it."""
    shared: dict[Action, str] = {}
    for action in _STAYED:
        for reason, count in Counter(row.reason for row in rows if row.action == action and row.reason).most_common(1):
            if count > 1:
                shared[action] = reason
    return shared


def _fitted(names: list[str], rows: Sequence[Mapping[str, str]], width: int, *, keep_last: bool = False) -> list[str]:
    """Header and rows, columns dropped until they fit; `keep_last` lets the last column run over the edge."""

    header = {name: "  variant" if name == "variant" else name for name in names}

    def wide(name: str) -> int:
        return max(len(row[name]) for row in (header, *rows))

    for dropped in _DROPPED_FIRST:
        if sum(wide(name) + len(_GAP) for name in names) - len(_GAP) <= width:
            break
        names = [name for name in names if name != dropped]
    widths = {name: wide(name) for name in names}
    if not keep_last:
        # Only names that a user made very long are left to shorten.
        over = sum(widths.values()) + len(_GAP) * (len(names) - 1) - width
        if over > 0:
            widths["variant"] = max(widths["variant"] - over, 8)
    lines = []
    for row in (header, *rows):
        cells = [_cut(row[name], widths[name]) for name in names]
        padded = [
            cell.ljust(widths[name]) if name in _LEFT else cell.rjust(widths[name])
            for name, cell in zip(names, cells, strict=True)
        ]
        lines.append(_GAP.join(padded).rstrip())
    return lines


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 2]}.."


def _short(value: units.Value, unit: str) -> str:
    """Several values by name become their sum: the report of the test itself has them one by one."""
    if isinstance(value, Mapping):
        return units.quantity(sum(value.values()), unit)
    return units.value(value, unit)


def _change(verdict: Verdict) -> str:
    if verdict.outcome == "changed":
        parts = len(units.differences(verdict.baseline, verdict.value, verdict.unit))
        return f"{parts} differ" + ("s" if parts == 1 else "")
    return units.change(verdict.change, verdict.scale, verdict.unit) + ("~" if verdict.speed is not None else "")


def _update_change(row: UpdateResult) -> str:
    if row.action == "refused":
        return f"refused: {row.reason} ({row.mend})" if row.mend else f"refused: {row.reason}"
    if row.action in _STAYED:
        return f"{row.action}: {row.reason}" if row.reason else row.action
    if row.old is None or row.new is None:
        return "first"
    if isinstance(row.old, Mapping) or isinstance(row.new, Mapping):
        return "; ".join(units.differences(row.old, row.new, row.unit)) or "the same"
    return units.change(row.new - row.old, "absolute", row.unit) if row.unit in _OWN_SCALE else _ratio(row.new, row.old)


def _ratio(new: float, old: float) -> str:
    return units.percent(new / old - 1) if old else "-"


_COLUMNS: dict[str, Callable[[Verdict], str]] = {
    "variant": lambda v: f"{_MARKS[v.outcome]} {v.variant}",
    "metric": lambda v: v.metric,
    "verdict": lambda v: v.verdict + ("*" if v.injected else ""),
    "baseline": lambda v: _short(v.baseline, v.unit),
    "measured": lambda v: _short(v.value, v.unit),
    "change": _change,
    "95 % interval": lambda v: units.change_interval(v.interval, v.scale, v.unit),
    "band": lambda v: units.change(v.band, v.scale, v.unit, signed=False),
    "noise": lambda v: units.change(v.noise, v.scale, v.unit, signed=False),
    "finds": lambda v: units.change(v.mde, v.scale, v.unit, signed=False),
}
