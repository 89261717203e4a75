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

from pure_share import pure_s, wall_s

from pytest_zimage.errors import ZImageError
from pytest_zimage.reports.results import Results, read

WANTED_SHARE = {2: 0.9, 4: 0.85}
"""Of as many times as there are GPUs."""
_OTHERWISE = 0.85


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("one", type=Path, help="results of a session on one GPU")
    parser.add_argument("several", type=Path, help="results of a session on several of the same host")
    chosen = parser.parse_args(arguments)
    try:
        one, several = read(chosen.one), read(chosen.several)
    except ZImageError as error:
        print(error, file=sys.stderr)
        return 2
    gpus = _gpus(several)
    if _gpus(one) != 1 or gpus < 2:
        print(f"wanted runs of one GPU and of several, not of {_gpus(one)} and {gpus}", file=sys.stderr)
        return 2
    if _measured(one) != _measured(several):
        print("these sessions did not measure the same variants of the same workload and files", file=sys.stderr)
        return 2
    alone, together = _say(one), _say(several)
    ratio, wanted = together / alone, gpus * WANTED_SHARE.get(gpus, _OTHERWISE)
    first, second = _verdicts(one), _verdicts(several)
    judged = sorted(first.keys() | second.keys())
    differing = [key for key in judged if first.get(key) != second.get(key)]
    for key in differing:
        told = [verdicts.get(key, "not judged") for verdicts in (first, second)]
        print(f"{' '.join(key)}: {told[0]} on one GPU, {told[1]} on several")
    same = f"{len(judged) - len(differing)} of {len(judged)} verdicts the same"
    print(f"{gpus} GPUs: {ratio:.2f} times one (at least {wanted:.1f} wanted); {same}")
    return 0 if ratio >= wanted and not differing else 1


def _gpus(results: Results) -> int:
    return len({run.environment.get("device_id", "") for run in results.runs})


def _measured(results: Results) -> set[tuple[object, ...]]:
    return {
        (run.variant, run.workload, run.model_set, bool(run.images), len(run.rounds))
        for run in results.runs
        if run.index == 0
    }


def _say(results: Results) -> float:
    """Prints what a session got done, and returns it for each second of the session."""
    wall, pure = wall_s(results), sum(pure_s(run).total for run in results.runs)
    gpus = f"{_gpus(results)} GPU{'s' * (_gpus(results) > 1)}"
    print(f"{gpus}: {len(results.runs)} runs, {pure:.1f} s of loading and drawing in {wall:.1f} s")
    return pure / wall


def _verdicts(results: Results) -> dict[tuple[str, str], str]:
    return {(row.variant, row.metric): row.verdict for row in results.verdicts}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
