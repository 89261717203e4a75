"""How many times as much several GPUs get done as one, and whether they say the same.

    CUDA_VISIBLE_DEVICES=0 pytest suites --zimage-models=synthetic-full --zimage-results one.json
    rm -r .zimage/images
    pytest suites --zimage-models=synthetic-full -n 2 --dist loadgroup --zimage-results two.json
    python benchmarks/several_gpus.py one.json two.json

Done is what was loaded and drawn (pure_share.py), in seconds of it for each second of the session: an undecided verdict
asks for another run, so two sessions may not have made the same number. Kept images would spare the second some work.
Exit status 1 where it is less than wanted (1.8 times on two GPUs, 3.4 on four), or where a metric is told differently;
2 for results that cannot be compared.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import msgspec
from pure_share import pure_s, wall_s

from pytest_zimage.reports.results import Results

WANTED_SHARE = {2: 0.9, 4: 0.85}
"""Of as many times as there are GPUs."""
_OTHERWISE = 0.85


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("one", type=Path, help="results of a session on one GPU")
    parser.add_argument("several", type=Path, help="results of a session on several of the same host")
    chosen = parser.parse_args(arguments)
    one, several = (msgspec.json.decode(path.read_bytes(), type=Results) for path in (chosen.one, chosen.several))
    if complaint := _not_comparable(one, several):
        print(complaint, file=sys.stderr)
        return 2
    speeds = [_say(results) for results in (one, several)]
    gpus, ratio = len(_gpus(several)), speeds[1] / speeds[0]
    wanted = gpus * WANTED_SHARE.get(gpus, _OTHERWISE)
    differing = _differing(one, several)
    for line in differing:
        print(line)
    print(
        f"{gpus} GPUs: {ratio:.2f} times one (at least {wanted:.1f} wanted); {_agreement(one, several, len(differing))}"
    )
    return 0 if ratio >= wanted and not differing else 1


def _not_comparable(one: Results, several: Results) -> str:
    if len(_gpus(one)) != 1 or len(_gpus(several)) < 2:
        return f"wanted runs of one GPU and of several, not of {len(_gpus(one))} and {len(_gpus(several))}"
    if _measured(one) != _measured(several):
        return "these sessions did not measure the same variants of the same workload and files"
    return ""


def _measured(results: Results) -> set[tuple[object, ...]]:
    return {
        (run.variant, run.workload, run.model_set, bool(run.images), len(run.rounds))
        for run in results.runs
        if run.index == 0
    }


def _gpus(results: Results) -> set[str]:
    return {run.environment.get("device_id", "") for run in results.runs}


def _say(results: Results) -> float:
    wall, pure = wall_s(results), sum(pure_s(run).total for run in results.runs)
    gpus = len(_gpus(results))
    print(
        f"{gpus} GPU{'s' * (gpus > 1)}: {len(results.runs)} runs, {pure:.1f} s of loading and drawing in {wall:.1f} s"
    )
    return pure / wall


def _verdicts(results: Results) -> dict[tuple[str, str], str]:
    return {(row.variant, row.metric): row.verdict for row in results.verdicts}


def _differing(one: Results, several: Results) -> list[str]:
    first, second = _verdicts(one), _verdicts(several)
    return [
        f"{variant} {metric}: {first.get((variant, metric), 'not judged')} on one GPU, "
        f"{second.get((variant, metric), 'not judged')} on several"
        for variant, metric in sorted(first.keys() | second.keys())
        if first.get((variant, metric)) != second.get((variant, metric))
    ]


def _agreement(one: Results, several: Results, differing: int) -> str:
    judged = len(_verdicts(one).keys() | _verdicts(several).keys())
    return f"{judged - differing} of {judged} verdicts the same"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
