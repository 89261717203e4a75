"""Proves the rule for image scores: simulates comparisons with the very functions that judge real images.

    python benchmarks/paired_rule.py [--replicates 100000] [--seed 1]

Six prompts with three seeds each, 18 pairs; differences of a pair are normal with a standard deviation of 0.015, or, to
see how much that matters, heavy-tailed (Student's t with 5 degrees of freedom, scaled to the same deviation). The
constants are those of the shipped catalogue's CLIPScore. Adaptive is as a session does it: 3, then 6, then 9 seeds a
prompt for as long as the answer is inconclusive. A broken image is one that scores 0.20 lower.

Exits 1 when, for normal differences, false alarms exceed 0.1 %, a drop of 0.02 is found in less than 95 % (adaptive:
99.9 %), or one broken image of 18 is missed once; or when the drop printed as found 8 times out of 10 is not.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np

from pytest_zimage.catalog import load_catalog
from pytest_zimage.verdict import core
from pytest_zimage.verdict.pair_core import decide_pairs, settle_pairs
from pytest_zimage.verdict.paired import seed_stages

CATALOG = load_catalog()
METRIC = CATALOG.metrics["clip_score"]
PROMPTS = CATALOG.prompt_set("quality-6x3")
STAGES = tuple(len(PROMPTS.pairs(more)) for more in seed_stages(PROMPTS))
CONSTANTS = {"margin": METRIC.margin, "guard": METRIC.guard, "floor": METRIC.floor}

PAIR_SD = 0.015
DROPS = (0.0, 0.005, 0.01, 0.015, 0.02, 0.03)
BROKEN = 0.20
MAX_FALSE_ALARMS = 0.001
MIN_POWER, MIN_ADAPTIVE_POWER = 0.95, 0.999
MDE_TOLERANCE = 0.03
DOCUMENTED = {"18 pairs": (0.06, 95.9), "adaptive": (None, 100)}
"""Percent flagged at no drop and at 0.02, from the rule's specification."""
NOISES = ("normal", "heavy tails")


def draw(rng: np.random.Generator, noise: str, replicates: int) -> np.ndarray:
    """Differences of pairs without any drop, shape (replicates, pairs of all seeds)."""
    shape = (replicates, STAGES[-1])
    if noise == "normal":
        return rng.normal(scale=PAIR_SD, size=shape)
    return rng.standard_t(5, size=shape) * PAIR_SD / np.sqrt(5 / 3)


def rates(replicates: int, seed: int, noise: str) -> dict[str, dict[float, np.ndarray]]:
    """By rule and drop: the shares of each outcome, in the order of `core`'s codes."""
    rng = np.random.default_rng(seed)
    found: dict[str, dict[float, np.ndarray]] = {"18 pairs": {}, "adaptive": {}}
    for drop in DROPS:
        differences = draw(rng, noise, replicates) - drop
        first = decide_pairs(differences[:, : STAGES[0]], **CONSTANTS).outcome
        for rule, outcome in (("18 pairs", first), ("adaptive", settle_pairs(differences, STAGES, **CONSTANTS))):
            found[rule][drop] = np.bincount(outcome, minlength=4) / replicates
    return found


def broken_image_found(replicates: int, seed: int) -> tuple[float, float]:
    """Share of comparisons with one broken image of 18 that are flagged: by the rule, and by its mean test alone."""
    rng = np.random.default_rng(seed)
    differences = draw(rng, "normal", replicates)[:, : STAGES[0]]
    differences[np.arange(replicates), rng.integers(STAGES[0], size=replicates)] -= BROKEN
    guarded = decide_pairs(differences, **CONSTANTS).outcome
    without = decide_pairs(differences, **{**CONSTANTS, "guard": np.inf}).outcome
    return float((guarded == core.REGRESSION).mean()), float((without == core.REGRESSION).mean())


def mde_power(replicates: int, seed: int) -> tuple[float, float]:
    """The mean drop that verdicts print as found 8 times out of 10, and how often it is found."""
    rng = np.random.default_rng(seed)
    differences = draw(rng, "normal", replicates)[:, : STAGES[0]]
    printed = float(decide_pairs(differences, **CONSTANTS).mde.mean())
    outcome = decide_pairs(differences - printed, **CONSTANTS).outcome
    return printed, float((outcome == core.REGRESSION).mean())


def violations(found: dict[str, dict[float, np.ndarray]], broken: float, mde: float) -> list[str]:
    """What the rule promises and this simulation did not show."""
    missed = []
    for rule, least in (("18 pairs", MIN_POWER), ("adaptive", MIN_ADAPTIVE_POWER)):
        alarms, power = found[rule][0.0][core.REGRESSION], found[rule][0.02][core.REGRESSION]
        if alarms > MAX_FALSE_ALARMS:
            missed.append(f"{rule}: false alarms {alarms:.3%}, at most {MAX_FALSE_ALARMS:.1%}")
        if power < least:
            missed.append(f"{rule}: a drop of 0.02 found in {power:.2%}, at least {least:.1%}")
    if broken < 1:
        missed.append(f"one broken image of {STAGES[0]} found in {broken:.3%}, must be always")
    if abs(mde - 0.8) > MDE_TOLERANCE:
        missed.append(f"the drop printed as found 8 times out of 10 is found in {mde:.1%}")
    return missed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--replicates", type=int, default=100_000, help="comparisons a cell (default 100000)")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    by_noise = {noise: rates(options.replicates, options.seed, noise) for noise in NOISES}
    broken, by_mean = broken_image_found(options.replicates, options.seed)
    printed, power = mde_power(options.replicates, options.seed)

    names = {core.REGRESSION: "regression", core.PASS: "pass", core.INCONCLUSIVE: "inconclusive"}
    print(f"{options.replicates} comparisons a cell, %, by true drop of CLIPScore; specified value in brackets")
    print(f"{'differences':<13}{'rule':<10}{'outcome':<14}" + "".join(f"{drop:>16g}" for drop in DROPS))
    for noise, found in by_noise.items():
        for rule, row in found.items():
            said = dict(zip((0.0, 0.02), DOCUMENTED[rule], strict=True)) if noise == "normal" else {}
            for code, name in names.items():
                cells = []
                for drop in DROPS:
                    known = said.get(drop) if code == core.REGRESSION else None
                    cells.append(f"{100 * row[drop][code]:.3g}" + (f" ({known:g})" if known is not None else ""))
                print(f"{noise:<13}{rule:<10}{name:<14}" + "".join(f"{cell:>16}" for cell in cells))
    print(f"one broken image of {STAGES[0]}: found {broken:.1%}; by the mean alone {by_mean:.1%} (100, 0)")
    print(f"printed as found 8 times out of 10: a drop of {printed:.4f}; found {power:.1%}")
    missed = violations(by_noise["normal"], broken, power)
    for line in missed:
        print(f"VIOLATED: {line}")
    print(f"{time.perf_counter() - started:.1f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
