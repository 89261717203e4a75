"""The commands a report ends with: how to accept a change, how to look closer, how to record a baseline."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePosixPath

from pytest_zimage.verdict.model import Verdict


def suite_of(test: str) -> str:
    """What to give pytest to run everything beside `test` (a node id): its folder, or its file where it has none."""
    file = test.partition("::")[0]
    folder = str(PurePosixPath(file).parent)
    return folder if folder != "." else file or "suites"


def function_of(test: str) -> str:
    """The bare name of the test function in a node id."""
    return test.partition("[")[0].rpartition("::")[2]


def accept(verdict: Verdict, options: Sequence[str] = ()) -> str:
    """Makes what is measured now the baseline; `options` are those of this session that select what runs."""
    return _line(verdict, options, "--update-baselines", "--update-reason", "why this is right")


def record(verdict: Verdict, options: Sequence[str] = ()) -> str:
    """Records the first baseline of this variant here."""
    return _line(verdict, options, "--update-baselines", "--update-reason", "first baseline of this machine")


def closer(verdict: Verdict, options: Sequence[str] = (), *, runs: int = 3) -> str:
    """Measures this one claim again with more runs."""
    return _line(verdict, options, "--zimage-runs", str(runs), keyword=function_of(verdict.test))


def record_all(verdicts: Sequence[Verdict], options: Sequence[str] = ()) -> str:
    """Records what none of these has yet, and leaves every existing baseline alone."""
    variants = ",".join(dict.fromkeys(verdict.variant for verdict in verdicts))
    reason = ("--update-mode", "new", "--update-reason", "first baseline of this machine")
    return _join(
        ["pytest", suite_of(verdicts[0].test), "--zimage-config", variants, *options, "--update-baselines", *reason]
    )


def _line(verdict: Verdict, options: Sequence[str], *more: str, keyword: str = "") -> str:
    parts = ["pytest", suite_of(verdict.test), *(["-k", keyword] if keyword else [])]
    parts += ["--zimage-config", verdict.variant, *options, *more]
    return _join(parts)


def _join(parts: Sequence[str]) -> str:
    # Double quotes in place of shlex's single ones: the reason reads better, and both shells and people take it.
    return " ".join(
        f'"{part}"' if part.replace(" ", "").isalnum() and " " in part else shlex.quote(part) for part in parts
    )
