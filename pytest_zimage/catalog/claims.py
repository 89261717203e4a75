"""A published claim about variants, as a row of the catalogue: what was said, of which machine, how it is tested."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

ClaimKind = Literal["ratio_at_least", "slower_than", "unchanged", "saves_bytes", "order"]


class Claim(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One claim; `claims.toml` says what each kind means."""

    name: str
    title: str
    """What was claimed, as a sentence."""
    source: str
    """Title of the publication."""
    lane: str
    """Device class that it was made on; only there, and with this engine and workload, it can fail."""
    engine: str
    workload: str
    models: tuple[str, ...] = ("official", "synthetic-full")
    """Model sets whose speed and sizes it speaks of: random weights of the real sizes weigh as much."""
    metric: str
    kind: ClaimKind
    variants: tuple[str, ...]
    """Each is compared with `against`; for `order` they are compared with each other, the least first. They need not be
    in the catalogue: a claim about others is reported as not measured."""
    against: str = ""
    factor: float | None = None
    """Of `ratio_at_least`: `against` / variant."""
    share: float | None = None
    """Of `saves_bytes`: 1 - variant / `against`."""
    band: float | None = None
    """Relative change that does not matter; None: that of the device or the metric."""
    printed: dict[str, float]
    """The figures as printed, by variant."""
    printed_unit: str

    def __post_init__(self) -> None:
        """Raises `ValueError` naming the key."""
        if not self.variants or len(set(self.variants)) < len(self.variants) or self.against in self.variants:
            raise ValueError("key 'variants': names each variant once, and not that of 'against'")
        if (self.kind == "order") != (not self.against):
            raise ValueError(f"key 'against': a claim of kind {self.kind!r} has {'none' if self.against else 'one'}")
        if self.kind == "order" and len(self.variants) < 2:
            raise ValueError("key 'variants': an order needs at least two")
        for key, kind, low in (("factor", "ratio_at_least", 1.0), ("share", "saves_bytes", 0.0)):
            value = getattr(self, key)
            if (value is None) == (self.kind == kind) or not (value is None or low < value < float("inf")):
                raise ValueError(f"key {key!r}: {kind!r} has it, above {low:g}, and no other kind")
        if self.share is not None and self.share >= 1:
            raise ValueError(f"key 'share': {self.share} is not below 1")
        if self.band is not None and not 0 < self.band < 1:
            raise ValueError(f"key 'band': {self.band} is not between 0 and 1")
        missing = [name for name in self.measured() if not self.printed.get(name, 0) > 0]
        if missing:
            raise ValueError(f"key 'printed': has no figure above 0 for {', '.join(missing)}")
        figures = [self.printed[name] for name in self.variants]
        if self.kind == "order" and figures != sorted(figures):
            raise ValueError("key 'variants': is not in the order of the printed figures")

    def measured(self) -> tuple[str, ...]:
        """Every variant it is about."""
        return (*self.variants, *([self.against] if self.against else []))

    def cases(self) -> tuple[tuple[str, ...], ...]:
        """What is judged one by one: an order as a whole, anything else variant by variant with what it is against."""
        return (self.variants,) if self.kind == "order" else tuple((name, self.against) for name in self.variants)
