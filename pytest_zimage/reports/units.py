"""Numbers as people read them. Plain ASCII, so that no terminal encoding can fail on them."""

from __future__ import annotations

from collections.abc import Mapping

from pytest_zimage.verdict.model import Scale
from pytest_zimage.verdict.moves import is_map_of_calls, moves

Value = float | Mapping[str, int] | None
NOTHING = "-"
"""Where there is no number."""


def seconds(value: float | None) -> str:
    """Three significant digits: `5.50 s`, `512 ms`, `60.9 s`."""
    if value is None:
        return NOTHING
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        # 0.9999 s is 1.00 s and not 1000 ms.
        if abs(value) >= scale * 0.9995:
            return f"{three_digits(value / scale)} {unit}"
    return f"{three_digits(value * 1e9)} ns" if value else "0 s"


def three_digits(value: float) -> str:
    """Three significant digits without an exponent; all digits before the point are kept."""
    magnitude = abs(value)
    decimals = 2 if magnitude < 9.995 else 1 if magnitude < 99.95 else 0
    return f"{value:.{decimals}f}"


def size(value: float | None) -> str:
    """Binary units, three significant digits: `11.5 GiB`, `512 B`."""
    if value is None:
        return NOTHING
    if abs(value) < 1024:
        return f"{value:.0f} B"
    for power, unit in ((1, "KiB"), (2, "MiB"), (3, "GiB"), (4, "TiB")):
        scaled = value / 1024**power
        if abs(scaled) < 1023.5 or unit == "TiB":
            return f"{three_digits(scaled)} {unit}"
    raise AssertionError("unreachable")


def percent(ratio: float | None, *, signed: bool = True) -> str:
    """A ratio as per cent: `+20.1 %`, and two decimals below one: `-0.35 %`."""
    if ratio is None:
        return NOTHING
    value = ratio * 100
    text = f"{value:+.{1 if abs(value) >= 0.995 else 2}f}"
    if float(text) == 0:
        text = "+0.00"
    return f"{text if signed else text.lstrip('+')} %"


def interval(bounds: tuple[float, float] | None) -> str:
    """`+18.9 .. +21.4 %`"""
    if bounds is None:
        return NOTHING
    return f"{percent(bounds[0]).removesuffix(' %')} .. {percent(bounds[1])}"


def change(amount: float | None, scale: Scale, unit: str, *, signed: bool = True) -> str:
    """A change, band or noise: `+20.1 %` where the scale is relative, else in the metric's own unit: `-0.0213`."""
    if amount is None or scale == "relative":
        return percent(amount, signed=signed)
    text = quantity(abs(amount), unit)
    if not signed:
        return text
    # What rounds to nothing has no sign of its own.
    return f"-{text}" if amount < 0 and text != quantity(0.0, unit) else f"+{text}"


def change_interval(bounds: tuple[float, float] | None, scale: Scale, unit: str) -> str:
    if bounds is None or scale == "relative":
        return interval(bounds)
    low, high = (change(bound, scale, unit) for bound in bounds)
    return f"{low} .. {high}"


def count(value: float) -> str:
    """A whole number with thin grouping: `12,309,866,400`."""
    return f"{value:,.0f}"


def value(value: Value, unit: str) -> str:
    """One number in its unit, or several by name, shortest faithful form."""
    if value is None:
        return NOTHING
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {quantity(number, unit)}" for key, number in sorted(value.items())) or "nothing"
    return quantity(value, unit)


def quantity(number: float, unit: str) -> str:
    """One number in its unit (`s`, `bytes`, `count`, `score`, `dB`)."""
    return {"s": seconds, "bytes": size, "score": score, "dB": decibel}.get(unit, count)(number)


def score(value: float) -> str:
    """A number without a unit, such as a cosine: `0.3344`."""
    return f"{value:.4f}"


def decibel(value: float) -> str:
    """`36.21 dB`; equal images are `inf dB` apart."""
    return f"{value:.2f} dB"


def exact(number: float | None, unit: str) -> str:
    """Every digit, for what must be equal: `12,309,866,400 B (11.5 GiB)`."""
    if number is None:
        return "absent"
    if unit != "bytes":
        return count(number)
    return f"{count(number)} B" + (f" ({size(number)})" if abs(number) >= 1024 else "")


def differences(old: Value, new: Value, unit: str) -> list[str]:
    """What differs between two exact values, a line each: `fp8: 4,096 B (4.00 KiB) -> absent`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping) and is_map_of_calls({**old, **new}):
        return list(moves(old, new))
    if isinstance(old, Mapping) or isinstance(new, Mapping):
        before = old if isinstance(old, Mapping) else {}
        after = new if isinstance(new, Mapping) else {}
        return [
            f"{key}: {exact(before.get(key), unit)} -> {exact(after.get(key), unit)}"
            for key in sorted({*before, *after})
            if before.get(key) != after.get(key)
        ]
    return [] if old == new else [f"{exact(old, unit)} -> {exact(new, unit)}"]
