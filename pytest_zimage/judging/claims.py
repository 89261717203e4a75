"""A published claim, measured between variants of this session: it must hold where it was made, else it is told."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from msgspec import structs

from pytest_zimage.baselines.store import Absent
from pytest_zimage.catalog import Claim, Metric
from pytest_zimage.engines.record import RunRecord
from pytest_zimage.errors import MeasurementError
from pytest_zimage.judging.fitness import about_machine, unfit
from pytest_zimage.outcomes import plain_nodeid
from pytest_zimage.reports import claims
from pytest_zimage.reports.delta import delta_text, headline
from pytest_zimage.session import ZImageSession
from pytest_zimage.verdict.claims import Pair, judge_claim, judge_exact_ratio, worst
from pytest_zimage.verdict.constants import RuleConstants
from pytest_zimage.verdict.metrics import Sample, take_each
from pytest_zimage.verdict.model import Judgement, Verdict

_WORDS = {"pass": "HOLDS", "regression": "BROKEN", "inconclusive": "INCONCLUSIVE", "unfit": "UNFIT", "seen": "SEEN"}


@dataclass(frozen=True)
class _Seen:
    """What the runs so far say."""

    pairs: list[Pair]
    judgement: Judgement
    samples: dict[str, list[Sample]]
    records: dict[str, list[RunRecord]]
    no_more: tuple[str, ...]
    """Why further runs would say nothing."""


class ClaimCheck:
    """One case of one claim: `zimage_claim.check()` is the whole test."""

    def __init__(self, request: pytest.FixtureRequest, session: ZImageSession, claim: Claim, case: int) -> None:
        self._test = plain_nodeid(request.node)
        self._session = session
        self.claim = claim
        self.names = claim.cases()[case]

    def check(self) -> None:
        """Measure and judge; the test fails only where the claim was made, elsewhere it says what is seen.

        Raises the `ZImageError` of a run that failed.
        """
        if missing := self._missing():
            pytest.skip(f"zimage claim {self.claim.name}: not measured here: {missing}")
        verdict = self._verdict()
        self._session.verdicts.append(verdict)
        text = delta_text(verdict, self.claim.title, self._session.repeated_options)
        unjudged = verdict.outcome in ("inconclusive", "unfit")
        if verdict.outcome == "regression" or (unjudged and self._session.settings.strict):
            pytest.fail(text, pytrace=False)
        if unjudged:
            pytest.skip(f"zimage {verdict.verdict}: {headline(verdict, self.claim.title)}; {verdict.notes[0]}")
        if verdict.outcome == "seen":
            pytest.skip(
                f"zimage {verdict.verdict}: {self.claim.title}: {verdict.notes[0]}; claim of {verdict.claim_of}"
            )

    def _missing(self) -> str:
        known, selected = self._session.catalog.variants, {v.name for v in self._session.variants()}
        told = [
            f"variant {name} is not {'selected' if name in known else 'known'}"
            for name in self.names
            if name not in selected
        ]
        return ", ".join(told)

    @property
    def _elsewhere(self) -> list[str]:
        """In what this session differs from where the claim was made; there it cannot fail."""
        here, claim = self._session, self.claim
        lane = here.machine.device_class.name
        return [
            *([f"on {lane}"] if lane != claim.lane else []),
            *([f"through {here.engine.name}"] if here.engine.name != claim.engine else []),
            *([f"at {here.workload.name}"] if here.workload.name != claim.workload else []),
            *([f"with {here.model_set.name}"] if here.model_set.name not in claim.models else []),
        ]

    def _verdict(self) -> Verdict:
        metric = self._session.catalog.metrics[self.claim.metric]
        count = self._session.settings.fresh_runs
        while True:
            seen = self._look(metric, count)
            every = [record for records in seen.records.values() for record in records]
            why = unfit(self._session, metric, every, Absent(reason="a claim has no baseline"))
            if why or self._elsewhere or not seen.judgement.wants_more:
                break
            count += 1
        judged = seen.judgement.outcome
        outcome = "seen" if self._elsewhere else "unfit" if why else judged
        decisive = worst(seen.pairs)
        verdict = Verdict(
            test=self._test,
            variant=",".join(self.names),
            metric=self.claim.name,
            unit=metric.unit,
            verdict=_WORDS[outcome],
            outcome=outcome,
            value=seen.judgement.value,
            baseline=seen.judgement.baseline,
            change=seen.judgement.change,
            interval=seen.judgement.interval,
            band=seen.judgement.band,
            noise=seen.judgement.noise,
            mde=seen.judgement.mde,
            k_base=seen.judgement.k_base,
            k_new=seen.judgement.k_new,
            samples=tuple(sample.rounds for sample in seen.samples[decisive.variant] if sample.rounds),
            notes=(
                *claims.seen(self.claim, seen.pairs, decisive, metric.unit, judged=not self._elsewhere),
                *self._devices(every),
                *seen.no_more,
            ),
            injected=bool(self._session.injection),
            claim=claims.source(self.claim, self.names),
            claim_of=claims.place(self.claim, self._elsewhere),
        )
        judged_here = about_machine(self._session, verdict, metric, every, why)
        return structs.replace(judged_here, flops_per_image=None, ceiling_tflops=None)

    def _look(self, metric: Metric, count: int) -> _Seen:
        records = {
            name: [self._session.run(self._session.catalog.variant(name), index) for index in range(count)]
            for name in self.names
        }
        each = {name: take_each(metric.name, made) for name, made in records.items()}
        samples = {name: taken for name, (taken, _) in each.items()}
        no_more = tuple(dict.fromkeys(why for _, reasons in each.values() for why in reasons))
        for name, taken in samples.items():
            if taken[0].unavailable:
                pytest.skip(f"zimage claim {self.claim.name}: not measured here: {name}: {taken[0].unavailable}")
        if metric.kind == "exact":
            pairs = [self._exact_pair(samples, metric)]
        else:
            constants = RuleConstants.of(metric, device=self._session.machine.device_class)
            runs = {name: [sample.rounds for sample in taken] for name, taken in samples.items()}
            pairs = judge_claim(self.claim, self.names, runs, constants)
        more = any(pair.judgement.wants_more for pair in pairs)
        decisive = worst(pairs).judgement
        broken = decisive.outcome == "regression"
        more = more and not broken and not no_more
        return _Seen(pairs, structs.replace(decisive, wants_more=more), samples, records, no_more)

    def _exact_pair(self, samples: dict[str, list[Sample]], metric: Metric) -> Pair:
        name, against = self.names
        value, other = samples[name][0].exact, samples[against][0].exact
        if not isinstance(value, int) or not isinstance(other, int):
            raise MeasurementError(
                f"claim {self.claim.name}: {metric.name} counts by name", mend="claim a metric of one number"
            )
        judgement = judge_exact_ratio(self.claim, value, other, metric.band)
        return Pair(variant=name, against=against, ratio=value / other, judgement=judgement)

    def _devices(self, records: list[RunRecord]) -> list[str]:
        """Two GPUs of one kind are not equally fast: under xdist the two sides may come from different ones."""
        used = dict.fromkeys(record.environment.get("device_pci_bus", "") for record in records)
        return [f"measured on different GPUs: {', '.join(used)}"] if len(used) > 1 else []
