"""How a map of calls by `operation: backend` changed, by operation: `scaled_mm_nvfp4: cuda -> eager, 240 calls`."""

from __future__ import annotations

from collections.abc import Mapping

_BETWEEN = ": "


def is_map_of_calls(counts: object) -> bool:
    """Whether every key names an operation and what served it."""
    return isinstance(counts, Mapping) and bool(counts) and all(_BETWEEN in key for key in counts)


def moves(base: Mapping[str, int], new: Mapping[str, int]) -> tuple[str, ...]:
    """A line for each operation whose backends or counts differ, sorted; what both maps agree on is left out."""
    changed = {key for key in base.keys() | new.keys() if base.get(key) != new.get(key)}
    operations = sorted({key.partition(_BETWEEN)[0] for key in changed})
    return tuple(_move(name, _of(name, base, changed), _of(name, new, changed)) for name in operations)


def _of(operation: str, counts: Mapping[str, int], changed: set[str]) -> dict[str, int]:
    """Calls by backend, of those that differ."""
    own = {key for key in changed & counts.keys() if key.partition(_BETWEEN)[0] == operation}
    return {key.partition(_BETWEEN)[2]: counts[key] for key in sorted(own)}


def _move(operation: str, before: Mapping[str, int], after: Mapping[str, int]) -> str:
    if len(before) == len(after) == 1:
        ((old, was),), ((new, now),) = before.items(), after.items()
        if old == new:
            return f"{operation}: {old}, {was:,} -> {_calls(now)} ({now - was:+,})"
        if was == now:
            return f"{operation}: {old} -> {new}, {_calls(now)}"
    return f"{operation}: {_told(before)} -> {_told(after)}"


def _told(calls: Mapping[str, int]) -> str:
    return " and ".join(f"{backend}, {_calls(number)}" for backend, number in calls.items()) or "absent"


def _calls(number: int) -> str:
    return f"{number:,} call{'s' if number != 1 else ''}"
