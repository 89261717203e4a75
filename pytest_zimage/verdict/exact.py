"""Judging what must be equal on every machine: bytes, counts, and counts by name."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_zimage.errors import BaselineError, MeasurementError, ZImageError
from pytest_zimage.verdict.model import Judgement, Outcome
from pytest_zimage.verdict.moves import is_map_of_calls, moves

Exact = int | Mapping[str, int]


def judge_exact(new: Exact, base: Exact) -> Judgement:
    """Judge what must be equal, number by number; `notes` names each key that differs."""
    _require_exact(new, "measurement", MeasurementError)
    _require_exact(base, "baseline", BaselineError)
    if isinstance(new, Mapping) != isinstance(base, Mapping):
        raise BaselineError(
            f"the baseline holds {_kind(base)}, the measurement {_kind(new)}",
            mend="record it again: --update-baselines",
        )
    outcome: Outcome = "pass" if new == base else "changed"
    if isinstance(new, Mapping) and isinstance(base, Mapping):
        keys = sorted(new.keys() | base.keys())
        if is_map_of_calls(new) and is_map_of_calls(base):
            notes = moves(base, new)
        else:
            notes = tuple(_difference(k, base.get(k), new.get(k)) for k in keys if new.get(k) != base.get(k))
        value, baseline = sum(new.values()), sum(base.values())
    else:
        assert isinstance(new, int)
        assert isinstance(base, int)
        value, baseline = new, base
        notes = () if value == baseline else (f"{baseline} -> {value} ({value - baseline:+d})",)
    return Judgement(
        outcome=outcome,
        value=float(value),
        baseline=float(baseline),
        change=value / baseline - 1,
        band=0.0,
        k_base=1,
        k_new=1,
        notes=notes,
    )


def _require_exact(value: Exact, what: str, error: type[ZImageError]) -> None:
    if isinstance(value, Mapping) and not value:
        raise error(f"the {what} counts nothing", mend="measure again, or record it again: --update-baselines")
    for name, number in (value if isinstance(value, Mapping) else {"value": value}).items():
        if isinstance(number, bool) or not isinstance(number, int) or number <= 0:
            raise error(f"the {what} has {name} = {number}; it must be a whole number above 0", mend="measure again")


def _kind(value: Exact) -> str:
    return "counts by name" if isinstance(value, Mapping) else "one number"


def _difference(key: str, base: int | None, new: int | None) -> str:
    if base is None:
        return f"{key}: absent -> {new}"
    if new is None:
        return f"{key}: {base} -> absent"
    return f"{key}: {base} -> {new} ({new - base:+d})"
