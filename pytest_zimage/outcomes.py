"""How a verdict becomes a test's own outcome.

Passed: PASS and improvements. Failed: regressions, changed facts, errors. Skipped, under their own name and letter and
never among the passed: what could not be judged; `--zimage-strict` fails those too. A claim made of another machine is
told under its own name, and nothing fails it.
"""

from __future__ import annotations

import pytest

#: Word of an unjudged verdict, the letter of its dot, the category of the closing line.
UNJUDGED: dict[str, tuple[str, str]] = {
    "NO BASELINE": ("N", "without baseline"),
    "INCONCLUSIVE": ("I", "inconclusive"),
    "UNFIT": ("U", "unfit"),
    "SEEN": ("C", "claims seen"),
}


def is_ours(item: pytest.Item) -> bool:
    """Whether a test of the suite: one that measures a variant or a claim."""
    return not {"zimage_variant", "zimage_claim"}.isdisjoint(getattr(item, "fixturenames", ()))


def xdist_group(item: pytest.Item) -> str:
    """What `--dist loadgroup` keeps `item` together with; empty for none."""
    return next((str(mark.args[0]) for mark in item.iter_markers("xdist_group") if mark.args), "")


def plain_nodeid(item: pytest.Item) -> str:
    """The node id to type, without the group that `--dist loadgroup` puts behind it."""
    return item.nodeid.removesuffix(f"@{xdist_group(item)}")


def skip_status(report: pytest.CollectReport | pytest.TestReport) -> tuple[str, str, str] | None:
    """The status of a skip that is really an unjudged verdict; None for any other report."""
    if not (report.skipped and isinstance(report.longrepr, tuple)):
        return None
    reason = report.longrepr[2].removeprefix("Skipped: ")
    for word, (letter, category) in UNJUDGED.items():
        if reason.startswith(f"zimage {word}"):
            return category, letter, word
    return None
