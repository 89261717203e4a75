"""Does one baseline serve all GPUs of a class? Each of those that recorded it is judged by the others.

    python benchmarks/between_machines.py [--folder baselines/h200/diffusers-synthetic-full-turbo-1024] [--slower 0.04]

For every variant and every GPU that the stored warm latencies name, the runs of the other GPUs are the baseline and its
own are the fresh ones, judged by the rule of the suite: as they were timed, and with each round made slower. A verdict
that wants more runs than the GPU recorded is INCONCLUSIVE here. Exit status 1 if an unchanged GPU is called slower or
faster, or a slower one passes.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
from msgspec import structs

from pytest_zimage.baselines.compare import compare
from pytest_zimage.baselines.schema import Baseline, BaseRun, MetricBaseline
from pytest_zimage.baselines.store import Neighbours
from pytest_zimage.catalog import DeviceClass, Metric, load_catalog
from pytest_zimage.verdict.metrics import Sample
from pytest_zimage.verdict.model import Judgement
from pytest_zimage.verdict.words import word

METRIC = "warm_latency"
FEWEST_OTHERS = 3
"""Recorded runs of other GPUs, below which there is nothing to judge by."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("baselines/h200/diffusers-synthetic-full-turbo-1024"))
    parser.add_argument("--slower", type=float, default=0.04, help="by how much, as a share (default: 0.04)")
    options = parser.parse_args(arguments)
    catalog = load_catalog()
    metric, lane = catalog.metrics[METRIC], catalog.device(options.folder.parent.name)
    stored: dict[str, MetricBaseline] = {}
    for path in sorted(options.folder.glob("*.json")):
        metrics = msgspec.json.decode(path.read_bytes(), type=Baseline).metrics
        if METRIC in metrics and metrics[METRIC].runs:
            stored[path.stem] = metrics[METRIC]
    judged, wrong = 0, 0
    print(f"{'variant':16s}{'GPU':14s}{'runs':>5s}{'others':>8s}   {'as timed':28s}{options.slower:+.0%}")
    for variant, baseline in stored.items():
        for device in dict.fromkeys(run.device for run in baseline.runs):
            own = [run for run in baseline.runs if run.device == device]
            base = _without(baseline, device)
            if not device or len(base.runs) < FEWEST_OTHERS:
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
    fresh = [Sample(rounds=tuple(t * factor for t in run.rounds), canary=run.canary, device=run.device) for run in own]
    for count in range(1, len(fresh) + 1):
        judgement = compare(metric, fresh[:count], base, device=lane, neighbours=neighbours)
        if not judgement.wants_more:
            break
    return judgement


def _without(stored: MetricBaseline, device: str) -> MetricBaseline:
    return structs.replace(stored, runs=tuple(run for run in stored.runs if run.device != device))


def _told(metric: Metric, judgement: Judgement) -> str:
    change = f"{judgement.change:+.1%}" if judgement.change is not None else ""
    return f"{word(judgement.outcome, metric)} {change} ({judgement.k_new} runs)"


if __name__ == "__main__":
    sys.exit(main())
