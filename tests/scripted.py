"""An engine whose clock and memory are a script: the same record every time, to the digit."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec

from pytest_zimage import errors
from pytest_zimage.engines.base import Engine, ReportProgress, RunPlan
from pytest_zimage.engines.protocol import DrawnImage, Loaded, Reported, Round
from pytest_zimage.engines.record import ColdLoad, RunRecord
from pytest_zimage.probes.fitness import Fitness

MIB = 1 << 20


class ScriptedEngine(Engine):
    """Reads `script.json`; applies injections by arithmetic; logs each run it makes."""

    name = "diffusers"

    def __init__(self, root: Path) -> None:
        self._root = root

    def run(self, plan: RunPlan, progress: ReportProgress) -> RunRecord:
        with (self._root / "ran.log").open("a") as log:
            log.write(f"{plan.variant.name}-{plan.index + 1}\n")
        script: dict[str, list[dict[str, Any]]] = json.loads((self._root / "script.json").read_text())
        runs = script.get(plan.variant.name) or script["default"]
        run = runs[min(plan.index, len(runs) - 1)]
        progress("rounds", 1, 2)
        if "error" in run:
            raise getattr(errors, run["error"])(run.get("message", "scripted failure"), mend="scripted mend")
        if run.get("die"):
            os._exit(int(run["die"]))
        return record(plan, run)

    def draw(self, plan: RunPlan, progress: ReportProgress) -> tuple[DrawnImage, ...]:
        raise NotImplementedError("no script draws images yet")


def fitness(run: dict[str, Any], name: str) -> Fitness | None:
    """What the script says of the machine, in the words of the results file."""
    return msgspec.convert(run[name], Fitness) if name in run else None


def record(plan: RunPlan, run: dict[str, Any]) -> RunRecord:
    slow = 1 + plan.inject.warm_latency
    rounds = (run["rounds"] * plan.rounds)[: plan.rounds]
    cold = run.get("cold", 10.0) * (1 + plan.inject.cold_load)
    idle = run.get("rss_idle", 900 * MIB)
    peak = run.get("rss_peak", 2000 * MIB)
    peak = None if peak is None else peak + plan.inject.memory_bytes
    steps = plan.workload.steps
    return RunRecord(
        variant=plan.variant.name,
        index=plan.index,
        engine="diffusers",
        model_set=plan.model_set,
        workload=plan.workload.name,
        device=plan.device,
        rounds=tuple(
            Round(
                seconds=seconds * slow,
                phases_s=run.get("phases")
                or {"text_encode": 0.1 * seconds, "step_1": 0.7 * seconds * slow, "vae_decode": 0.2 * seconds},
                forwards=run.get("forwards", steps),
                pixels_sha256=run.get("pixels", ["0" * 64] * plan.rounds)[number],
                seed=run.get("seeds", [None] * plan.rounds)[number],
            )
            for number, seconds in enumerate(rounds)
        ),
        cold=ColdLoad(
            total_s=cold,
            phases_s={"import": 5.0, "read": cold * 0.6, "build": cold * 0.1, "first_image": cold * 0.3},
            residency=0.0 if run.get("emptied", True) else 1.0,
            emptied=run.get("emptied", True),
            notes=tuple(run.get("cold_notes", ())),
            fitness=fitness(run, "cold_fitness"),
        ),
        memory=Reported(
            rss_peak_bytes=peak,
            rss_peak_source="script",
            rss_sampled_peak_bytes=peak,
            device_peak_bytes=run.get("device_peak"),
            device_reserved_peak_bytes=None,
            nvml_process_peak_bytes=run.get("gpu_process_peak"),
            device_held_bytes=run.get("device_held"),
            notes=tuple(run.get("memory_notes", ())),
            unavailable=run.get("unavailable", {}),
        ),
        rss_idle_bytes=idle,
        loaded=Loaded(
            phases_s={"read": 1.0},
            load_s=1.0,
            weight_bytes=run.get("weight_bytes", {"bfloat16": 1000}),
            tensors=run.get("tensors", {"bfloat16": 10}),
            compute=run.get("compute", {"plain": 10}),
            device_peak_bytes=run.get("device_load_peak"),
            flops_per_image=run.get("flops"),
        ),
        device_left_bytes=run.get("device_left"),
        disk_bytes=run.get("disk_bytes", 5000),
        dispatch=run.get("dispatch", {"rms_rope: eager": 32, "linear: plain": 232}),
        dequantised=run.get("dequantised", {}),
        emulated=tuple(run.get("emulated", ())),
        unquantised=tuple(run.get("unquantised", ())),
        faults=run.get("faults", {}),
        environment={**plan.environment, **run.get("environment", {})},
        inject=plan.inject,
        fitness=fitness(run, "fitness"),
        started_at="2026-01-01T00:00:00+00:00",
        wall_s=1.0,
    )
