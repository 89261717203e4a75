"""What watching the machine costs the images that are timed meanwhile: rounds with the watch and without, in turn.

    python benchmarks/sampling_cost.py [--pairs 60] [--variant bf16] [--device cpu] [--models synthetic-tiny]

One worker draws, and this process watches as the test process does: by a thread that asks NVML every 0.2 s for clock,
throttling, heat, power and processes. On the CPU a scripted NVML answers, at a tenth of the interval, so that every
image meets at least one look. Pairs alternate in their order, so that a drift of the machine hits both sides. Prints
the ratio and its 95 % interval, and exits with 1 if the whole interval lies above the limit.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

from pytest_zimage.catalog import Catalog, load_catalog
from pytest_zimage.checkpoints.modelset import open_model_set
from pytest_zimage.engines.client import WorkerClient
from pytest_zimage.engines.processes import Command
from pytest_zimage.engines.protocol import Draw, Drawn, Load, Loaded
from pytest_zimage.options import user_cache
from pytest_zimage.probes.device import detect
from pytest_zimage.probes.environment import memory_total_bytes
from pytest_zimage.probes.observer import WATCH_S, observing

LIMIT = 1.005
SCRIPTED_UUID = "GPU-scripted"


class ScriptedNvml:
    """Answers at once, with what an H200 under load answers."""

    NVMLError = RuntimeError

    def __init__(self) -> None:
        self.looks = 0

    def nvmlDeviceGetClockInfo(self, *_: object) -> int:
        self.looks += 1
        return 1755

    def nvmlDeviceGetComputeRunningProcesses(self, _: object) -> list[SimpleNamespace]:
        return [SimpleNamespace(pid=os.getpid(), usedGpuMemory=1 << 30)]

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("nvml"):
            raise AttributeError(name)
        return lambda *_: 4


def load_request(catalog: Catalog, variant: str, models: str, device: str) -> Load:
    chosen = catalog.variant(variant)
    model_set = open_model_set(models, catalog, cache=user_cache())
    model_set.ensure(chosen.files().values(), device=device)
    workload = "turbo-tiny" if models == "synthetic-tiny" else "turbo-1024"
    return Load(
        variant=chosen,
        workload=catalog.workload(workload),
        dims=model_set.dims,
        files={role: str(path) for role, path in model_set.files(chosen).items()},
        tokenizer=str(model_set.find_tokenizer()),
        device=device,
    )


def interval(logs: list[float], draws: int = 4000) -> tuple[float, float]:
    """95 % interval of the median, by resampling."""
    dice = random.Random(0)
    medians = sorted(statistics.median(dice.choices(logs, k=len(logs))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--variant", default="bf16")
    parser.add_argument("--device", default="cpu", help="cpu, or auto for the first GPU")
    parser.add_argument("--models", default="synthetic-tiny")
    arguments = parser.parse_args()
    catalog = load_catalog()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    machine = detect(catalog, visible, choice=arguments.device, memory_total_bytes=memory_total_bytes())
    scripted = None if machine.uuid else ScriptedNvml()
    uuid = machine.uuid or SCRIPTED_UUID
    interval_s = WATCH_S / 10 if scripted else WATCH_S
    device = "cuda:0" if machine.uuid else "cpu"
    request = load_request(catalog, arguments.variant, arguments.models, device)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    looks = 0
    with (
        tempfile.TemporaryDirectory() as folder,
        observing(uuid, os.getpid(), lib=scripted) as observer,
        WorkerClient(
            "worker",
            Path(folder) / "worker.log",
            Command((sys.executable, "-m", "pytest_zimage.engines.worker", device)),
            timeout_s=600,
            progress=lambda *_: None,
            gpu=machine.uuid,
        ) as worker,
    ):
        worker.receive("import")
        assert isinstance(worker.ask(request, "load"), Loaded)
        worker.ask(Draw(rounds=3, first=True), "warm-up")
        for turn in range(arguments.pairs):
            for watched in (turn % 2 == 0, turn % 2 == 1):
                with observer.watching(worker.pid, interval_s) if watched else nullcontext() as watch:
                    reply = worker.ask(Draw(rounds=1), "rounds")
                assert isinstance(reply, Drawn)
                seconds[watched].append(reply.rounds[0].seconds)
                if watch is not None and watch.worst is not None:
                    looks += watch.worst.looks
        worker.close()
    logs = [math.log(on / off) for on, off in zip(seconds[True], seconds[False], strict=True)]
    ratio, (low, high) = math.exp(statistics.median(logs)), map(math.exp, interval(logs))
    off_ms, on_ms = (statistics.median(seconds[watched]) * 1e3 for watched in (False, True))
    print(
        f"{arguments.variant} on {machine.name}: image {off_ms:.1f} ms without the watch, {on_ms:.1f} ms with it",
        end="",
    )
    print(f" ({looks} looks, {interval_s:g} s apart, {len(logs)} pairs)")
    verdict = "met" if low <= LIMIT else "EXCEEDED"
    print(f"ratio {ratio:.4f} (95 % interval {low:.4f} .. {high:.4f}); limit {LIMIT}: {verdict}")
    return int(low > LIMIT)


if __name__ == "__main__":
    sys.exit(main())
