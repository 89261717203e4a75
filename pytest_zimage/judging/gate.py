"""The gate: what a test measured is judged or recorded, and the verdicts become the test's own outcome."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pytest_zimage.catalog import Variant
from pytest_zimage.errors import ZImageError
from pytest_zimage.judging.dispatch import judge_quantised
from pytest_zimage.judging.memory import HELD, RETURNED, judge_held, judge_returned
from pytest_zimage.judging.metric import judge_metric
from pytest_zimage.judging.parity import PARITY, judge_parity
from pytest_zimage.judging.quality import DRIFT, judge_drift, judge_images, judge_quality
from pytest_zimage.judging.recording import REFUSED, record_metrics, record_quality
from pytest_zimage.reports.delta import delta_text, headline
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.model import Verdict
from pytest_zimage.verdict.rows import QUANTISED, SOUND

_LIMITS: dict[str, Callable[[ZImageSession, str, Variant], Verdict]] = {
    SOUND: judge_images,
    RETURNED: judge_returned,
    HELD: judge_held,
    QUANTISED: judge_quantised,
    PARITY: judge_parity,
}
"""Checks against a limit: judged also where baselines are recorded."""


def gate(session: ZImageSession, test: str, variant: Variant, names: tuple[str, ...]) -> None:
    """Judge what `names` names against its baselines, or record it with `--update-baselines`.

    Ends the test as failed, with the delta report of what regressed, or as skipped where something could not be judged.
    Raises the first `ZImageError` where a metric can have no verdict; the others are judged all the same.
    """
    verdicts: list[Verdict] = []
    errors: list[ZImageError] = []
    if session.settings.update_baselines:
        verdicts = _recorded(session, test, variant, names)
    else:
        for name in names:
            try:
                verdicts.append(_judged(session, test, variant, name))
            except ZImageError as error:
                errors.append(error)
    session.verdicts.extend(verdicts)
    _conclude(session, variant, verdicts, errors)


def _judged(session: ZImageSession, test: str, variant: Variant, name: str) -> Verdict:
    if name in _LIMITS:
        return _LIMITS[name](session, test, variant)
    if name == DRIFT:
        return judge_drift(session, test, variant)
    judged = judge_quality if _is_score(session, name) else judge_metric
    return judged(session, test, variant, name)


def _recorded(session: ZImageSession, test: str, variant: Variant, names: tuple[str, ...]) -> list[Verdict]:
    recordable = tuple(name for name in names if name != DRIFT and name not in _LIMITS)
    scores = tuple(name for name in recordable if _is_score(session, name))
    others = tuple(name for name in recordable if name not in scores)
    verdicts = [_LIMITS[name](session, test, variant) for name in names if name in _LIMITS]
    if others:
        verdicts += record_metrics(session, test, variant, others)
    if scores:
        verdicts += record_quality(session, test, variant, scores)
    return verdicts


def _is_score(session: ZImageSession, name: str) -> bool:
    return session.catalog.metrics[name].kind == "paired"


def _conclude(session: ZImageSession, variant: Variant, verdicts: list[Verdict], errors: list[ZImageError]) -> None:
    failed = [v for v in verdicts if v.outcome in ("regression", "changed", "error")]
    unjudged = [v for v in verdicts if v.outcome in ("no-baseline", "inconclusive", "unfit")]
    if errors:
        told = dict.fromkeys([*(_text(session, variant, verdict) for verdict in failed), *map(str, errors)])
        raise errors[0] if len(told) == 1 else type(errors[0])("\n\n".join(told))
    if failed or (session.settings.strict and unjudged):
        pytest.fail("\n\n".join(_text(session, variant, verdict) for verdict in verdicts), pytrace=False)
    if unjudged:
        first = unjudged[0]
        pytest.skip(f"zimage {first.verdict}: {headline(first, _title(session, variant, first))}")


def _text(session: ZImageSession, variant: Variant, verdict: Verdict) -> str:
    title = _title(session, variant, verdict)
    if verdict.verdict == REFUSED:
        kept = "the stored one is as it was" if verdict.baseline is not None else "nothing was stored"
        first = f"{verdict.variant} {title}: baseline {REFUSED}, {kept}"
        return "\n  ".join([first, *verdict.notes])
    return delta_text(verdict, title, session.repeated_options)


def _title(session: ZImageSession, variant: Variant, verdict: Verdict) -> str:
    metric = session.catalog.metrics.get(verdict.metric)
    return metric.title.replace("{reference}", variant.reference) if metric else verdict.metric
