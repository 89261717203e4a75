"""A published claim in words: what was claimed of which machine, and what is seen of it here."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from pytest_zimage.catalog import Claim
from pytest_zimage.catalog.model import Unit
from pytest_zimage.reports import units
from pytest_zimage.verdict.claims import Pair, claimed_ratio
from pytest_zimage.verdict.model import Outcome, Verdict

_SEEN: dict[Outcome, str] = {
    "pass": "as claimed",
    "regression": "not as claimed",
    "inconclusive": "too uncertain to say",
}
_MOST_COLUMNS = 160


def source(claim: Claim, names: Sequence[str]) -> str:
    """The claim about the variants `names` as it was printed, and where."""
    printed = ", ".join(f"{name} {claim.printed[name]:g} {claim.printed_unit}" for name in names)
    return f"{claim.title} ({claim.source}: {printed}; {_made_on(claim)})"


def place(claim: Claim, elsewhere: Sequence[str]) -> str:
    """`gb10 through comfyui at turbo-1024, seen on cpu`: where it was made, and in what this session differs."""
    return ", seen ".join(filter(None, (_made_on(claim), " ".join(elsewhere))))


def seen(claim: Claim, pairs: Sequence[Pair], decisive: Pair, unit: Unit, *, judged: bool) -> list[str]:
    """What the runs say, the whole first, then each pair of an order that is not as claimed.

    `judged`: the verdict tells whether it is as claimed, so these lines need not.
    """
    alone = len(pairs) == 1
    told = _ratio(claim, decisive) if alone else _order(pairs, unit)
    first = told if judged else f"{told}; {_SEEN[_outcome(claim, decisive)]}"
    if alone:
        return [first]
    return [
        first,
        *(
            f"{pair.against} before {pair.variant}: {_ratio(claim, pair)}; {_SEEN[_outcome(claim, pair)]}"
            for pair in pairs
            if pair.judgement.outcome != "pass"
        ),
    ]


def claim_lines(verdicts: Sequence[Verdict]) -> list[str]:
    """For the terminal summary: where claims were made, then a line for each, with what is seen of it."""
    claims = [verdict for verdict in verdicts if verdict.claim and verdict.notes]
    column = max((len(verdict.metric) for verdict in claims), default=0)
    lines: list[str] = []
    for where in dict.fromkeys(verdict.claim_of for verdict in claims):
        lines += _wrapped(f"  claims of {where}", indent=4)
        for verdict in claims:
            if verdict.claim_of == where:
                lines += _wrapped(f"    {verdict.metric:{column}}  {verdict.notes[0]}", indent=column + 6)
    return lines


def _wrapped(line: str, indent: int) -> list[str]:
    return textwrap.wrap(line, _MOST_COLUMNS, subsequent_indent=" " * indent, break_on_hyphens=False)


def _made_on(claim: Claim) -> str:
    return f"{claim.lane} through {claim.engine} at {claim.workload}"


def _outcome(claim: Claim, pair: Pair) -> Outcome:
    """The pair's own; where one run a side may not conclude, what its 95 % interval shows all the same."""
    judged = pair.judgement
    if judged.outcome != "inconclusive" or judged.interval is None or judged.band is None:
        return judged.outcome
    (low, high), band = judged.interval, judged.band
    beyond = {
        "slower_than": high < band,
        "order": high < band,
        "unchanged": low > band or high < 1 / (1 + band) - 1,
    }.get(claim.kind, low > band)
    return "regression" if beyond else judged.outcome


def _ratio(claim: Claim, pair: Pair) -> str:
    expected, interval = claimed_ratio(claim), pair.judgement.interval
    claimed = {"slower_than": "> 1", "order": "> 1", "unchanged": "1"}.get(claim.kind, f"<= {expected:.3f}")
    text = f"{pair.variant} / {pair.against} = {pair.ratio:.3f}"
    if interval is not None:
        low, high = ((1 + bound) * expected for bound in interval)
        text += f" (95 % interval {low:.3f} .. {high:.3f})"
    return f"{text}, claimed {claimed}"


def _order(pairs: Sequence[Pair], unit: Unit) -> str:
    centres = {pair.variant: pair.judgement.value or 0.0 for pair in pairs}
    centres |= {pair.against: pair.judgement.baseline or 0.0 for pair in pairs}
    ascending = sorted(centres, key=centres.__getitem__)
    return " < ".join(f"{name} {units.value(centres[name], unit)}" for name in ascending)
