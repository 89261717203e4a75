"""A verdict and the results of a session, as the tests of reports start from them."""

from __future__ import annotations

from msgspec import structs

from pytest_zimage.reports.results import Results
from pytest_zimage.verdict.model import Verdict

STEPS = {f"step_{number}": (0.65, 0.78) for number in range(1, 9)}
SLOWER = Verdict(
    test="suites/test_warm_latency.py::test_warm_latency[nvfp4]",
    variant="nvfp4",
    metric="warm_latency",
    unit="s",
    verdict="SLOWER",
    outcome="regression",
    value=6.61,
    baseline=5.50,
    change=0.2014,
    interval=(0.189, 0.214),
    band=0.03,
    noise=0.007,
    mde=0.0312,
    k_base=5,
    k_new=2,
    samples=((6.60, 6.61, 6.63), (6.58, 6.70)),
    notes=("a fresh run was taken to confirm",),
    phases={"text_encode": (0.10, 0.10), **STEPS, "vae_decode": (0.20, 0.26)},
    environment_changed={"torch": ("2.10.0", "2.11.0"), "bios": ("(not recorded)", "5.36")},
)


def but(start: Verdict = SLOWER, /, **changes: object) -> Verdict:
    """`start` with other fields."""
    return structs.replace(start, **changes)


def results(*verdicts: Verdict, **changes: object) -> Results:
    """One hour on a GB10."""
    known = {
        "started_at": "2026-01-02T03:04:05+00:00",
        "finished_at": "2026-01-02T04:04:05+00:00",
        "environment": {"device": "NVIDIA GB10", "comfy-kitchen": "0.3.0", "torch": "2.12"},
    }
    return Results(**{**known, "verdicts": verdicts, **changes})
