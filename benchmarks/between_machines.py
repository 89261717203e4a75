"""Does one baseline serve all machines of a class? Each of those that recorded it is judged by the others.

    python benchmarks/between_machines.py [--folder baselines/h200/diffusers-synthetic-full-turbo-1024] [--slower 0.04]
    python benchmarks/between_machines.py --metric cold_load --slower 0.6

For every variant and every GPU (of cold loads: machine) that the stored times name, the runs of the others are the
baseline and its own are the fresh ones, judged by the rule of the suite: as they were timed, and with each round made
slower. Runs that do not say how fast their GPU, or disk, was are left out. A verdict that wants more runs than were
recorded there is INCONCLUSIVE here. Exit status 1 if an unchanged one is called slower or faster, or a slower one
passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import structs

from pytest_zimage.baselines.compare import compare
from pytest_zimage.baselines.equal_speed import pace_of
from pytest_zimage.baselines.other_machine import ENOUGH
from pytest_zimage.baselines.schema import Baseline, BaseRun, MetricBaseline
from pytest_zimage.baselines.store import Neighbours
from pytest_zimage.catalog import DeviceClass, Metric, load_catalog
from pytest_zimage.verdict.metrics import Sample
from pytest_zimage.verdict.model import Judgement
from pytest_zimage.verdict.words import word

METRICS = ("warm_latency", "cold_load")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("baselines/h200/diffusers-synthetic-full-turbo-1024"))
    parser.add_argument("--slower", type=float, default=0.04, help="by how much, as a share (default: 0.04)")
    parser.add_argument("--metric", choices=METRICS, default=METRICS[0], help=f"default: {METRICS[0]}")
    options = parser.parse_args(arguments)
    catalog = load_catalog()
    metric, lane = catalog.metrics[options.metric], catalog.device(options.folder.parent.name)
    stored: dict[str, MetricBaseline] = {}
    for path in sorted(options.folder.glob("*.json")):
        metrics = msgspec.json.decode(path.read_bytes(), type=Baseline).metrics
        if options.metric in metrics and (paced := _paced(metrics[options.metric])).runs:
            stored[path.stem] = paced
    judged, wrong = 0, 0
    print(f"{'variant':16s}{'recorded on':14s}{'runs':>5s}{'others':>8s}   {'as timed':28s}{options.slower:+.0%}")
    for variant, baseline in stored.items():
        for device in dict.fromkeys(run.device for run in baseline.runs):
            own = [run for run in baseline.runs if run.device == device]
            base = _without(baseline, device)
            if not device or len(base.runs) < ENOUGH:
                continue
            without = [_without(each, device) for name, each in stored.items() if name != variant]
            neighbours = Neighbours(metrics=tuple(without))
            unchanged, slower = (
                judged_by(metric, lane, base, neighbours, own, factor) for factor in (1, 1 + options.slower)
            )
            judged += 1
            wrong += unchanged.outcome not in ("pass", "inconclusive") or slower.outcome == "pass"
            counts = f"{len(own):5d}{len(base.runs):8d}"
            print(f"{variant:16s}{device:14s}{counts}   {_told(metric, unchanged):28s}{_told(metric, slower)}")
    print(f"{judged} judged, {wrong} wrong")
    return int(wrong > 0 or judged == 0)


def judged_by(
    metric: Metric,
    lane: DeviceClass,
    base: MetricBaseline,
    neighbours: Neighbours,
    own: Sequence[BaseRun],
    factor: float,
) -> Judgement:
    """The rule over as many of `own`, in order, as it asks for; each round times `factor`."""
    fresh = [_sample(run, factor) for run in own]
    for count in range(1, len(fresh) + 1):
        judgement = compare(metric, fresh[:count], base, device=lane, neighbours=neighbours)
        if not judgement.wants_more:
            break
    return judgement


def _sample(run: BaseRun, factor: float) -> Sample:
    return Sample(
        rounds=tuple(seconds * factor for seconds in run.rounds),
        phases={name: seconds * factor for name, seconds in run.phases.items()},
        emptied=run.emptied,
        canary=run.canary,
        disk_gb_s=run.disk_gb_s,
        device=run.device,
    )


def _paced(stored: MetricBaseline) -> MetricBaseline:
    """With the runs that say how fast their GPU or disk was, and no others."""
    return structs.replace(stored, runs=tuple(run for run in stored.runs if pace_of(run.emptied).of(run)))


def _without(stored: MetricBaseline, device: str) -> MetricBaseline:
    return structs.replace(stored, runs=tuple(run for run in stored.runs if run.device != device))


def _told(metric: Metric, judgement: Judgement) -> str:
    change = f"{judgement.change:+.1%}" if judgement.change is not None else ""
    return f"{word(judgement.outcome, metric)} {change} ({judgement.k_new} runs)"


if __name__ == "__main__":
    sys.exit(main())
