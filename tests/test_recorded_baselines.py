"""The baselines of a device class that are shipped hold for each machine that recorded them."""

from __future__ import annotations

import json
import shutil
from collections import Counter

import pytest
from loading import ROOT, module_of

FOLDER = ROOT / "baselines/h200/diffusers-synthetic-full-turbo-1024"


@pytest.fixture
def between_machines():
    return module_of("benchmarks/between_machines.py").main


@pytest.mark.parametrize(("metric", "slower"), [("warm_latency", "0.04"), ("cold_load", "0.6")])
def test_each_machine_passes_by_the_others_and_not_when_it_is_slower(between_machines, capsys, metric, slower):
    assert between_machines(["--folder", str(FOLDER), "--metric", metric, "--slower", slower]) == 0
    told = capsys.readouterr().out
    assert " 0 wrong" in told
    assert "SLOWER" in told


@pytest.mark.parametrize(("metric", "times"), [("warm_latency", 1.1), ("cold_load", 2.0)])
def test_a_machine_that_was_slower_when_it_recorded_is_found(between_machines, capsys, tmp_path, metric, times):
    folder = shutil.copytree(FOLDER, tmp_path / "baselines/h200" / FOLDER.name)
    path = folder / "bf16.json"
    stored = json.loads(path.read_text())
    runs = [run for run in stored["metrics"][metric]["runs"] if run.get("disk_gb_s") or run.get("canary")]
    # One run alone convicts nobody.
    slow = next(device for device, count in Counter(run["device"] for run in runs[::-1]).items() if count > 1)
    for run in (run for run in runs if run["device"] == slow):
        run["rounds"] = [seconds * times for seconds in run["rounds"]]
        run["phases"] = {name: seconds * times for name, seconds in run["phases"].items()}
    path.write_text(json.dumps(stored))
    assert between_machines(["--folder", str(folder), "--metric", metric]) == 1
    told = capsys.readouterr().out.splitlines()
    (line,) = (line for line in told if line.startswith("bf16 ") and slow in line)
    assert "SLOWER" in line.split("(")[0], "as timed"
