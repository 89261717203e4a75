"""What a judgement says. Plain data: the words, the numbers behind them, and how sure they are."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Outcome = Literal[
    "pass", "regression", "improvement", "inconclusive", "no-baseline", "unfit", "changed", "error", "seen"
]
"""The class of a verdict; `Verdict.verdict` is the word a person reads (SLOWER, BIGGER, ...). `seen`: measured and
told, because what it is held against was claimed of another machine."""


Scale = Literal["relative", "absolute"]
"""Of change, interval, band, noise and mde: ratios (0.03 is 3 %, a change is new/base - 1), or the metric's own unit (a
change is new - base)."""


class Judgement(Struct, frozen=True, kw_only=True):
    """The decision rule's answer for one metric; ratios are relative (0.03 is 3 %), changes new/base - 1.

    With `scale` `absolute`, as for paired image scores, they are in the metric's unit, and runs are pairs of images.
    """

    outcome: Outcome
    value: float | None = None
    """Centre of the new runs, in the metric's unit."""
    baseline: float | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    """95 % interval of the change."""
    band: float | None = None
    """Effective relative band: the wider of relative and absolute."""
    noise: float | None = None
    """s: relative run-to-run standard deviation used."""
    mde: float | None = None
    """MDE80: smallest change caught 8 times out of 10 with three new runs."""
    k_base: int = 0
    k_new: int = 0
    wants_more: bool = False
    """True while another fresh run, or further seeds, could settle it."""
    notes: tuple[str, ...] = ()
    scale: Scale = "relative"
    speed: float | None = None
    """How fast the GPUs of the new runs multiply, or for a cold load their disks read, those of the baseline being 1,
    where they are others: it is taken out of `value`, `change` and `noise`. None: compared as they are."""


class Verdict(Struct, frozen=True, kw_only=True):
    """One row of the results file."""

    test: str
    variant: str
    metric: str
    unit: str
    verdict: str
    outcome: Outcome
    value: float | dict[str, int] | None = None
    baseline: float | dict[str, int] | None = None
    change: float | None = None
    interval: tuple[float, float] | None = None
    band: float | None = None
    noise: float | None = None
    mde: float | None = None
    k_base: int = 0
    k_new: int = 0
    samples: tuple[tuple[float, ...], ...] = ()
    """Per new run its rounds, in the metric's unit."""
    notes: tuple[str, ...] = ()
    phases: dict[str, tuple[float | None, float]] = {}
    """Phase name to (baseline, measured) seconds."""
    environment_changed: dict[str, tuple[str, str]] = {}
    """Environment key to (baseline, now), only where they differ."""
    dispatch_changed: tuple[str, ...] | None = None
    """What was served otherwise than in the baseline's map, where the verdict needs explaining; None: not compared."""
    unfit: tuple[str, ...] = ()
    """Why the machine was not fit to be timed."""
    fitness: tuple[str, ...] = ()
    """What was read of the machine, in words, where the verdict leaves a question."""
    flops_per_image: int | None = None
    """Operations of the transformer in one image; with `value`, how much of the device a latency makes use of."""
    ceiling_tflops: float | None = None
    """Matrix products on this device in these runs, bfloat16, 1e12 operations a second."""
    injected: bool = False
    reference: str = ""
    """A published figure shown beside a verdict that has no baseline of its own."""
    scale: Scale = "relative"
    """Of change, interval, band, noise and mde: `relative` are ratios, `absolute` is the metric's own unit, and what
    k_base and k_new count are then pairs of images."""
    speed: float | None = None
    """How fast this GPU multiplies, or for a cold load this disk reads, those of the baseline being 1, where they are
    others: `change`, `interval` and `noise` are then at equal speed, `value` and `samples` as measured."""
    limits: tuple[float | None, float | None] | None = None
    """Lowest and highest value of this metric that can be, in its unit; None where it has no such bound."""
    claim: str = ""
    """The published claim that this is about, with its source; `baseline` is then what the claim expects here."""
    claim_of: str = ""
    """Where that claim was made, and in what this session differs."""
