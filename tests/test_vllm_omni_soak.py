"""A thousand images of a vLLM-Omni that drops, fails and hangs: none wrong, nothing left, every fault counted."""

from __future__ import annotations

import hashlib
import socket

import psutil
from standins.vllm_omni_running import HUB, WORKLOAD, StandIn
from standins.vllm_omni_script import picture

from pytest_zimage.engines.vllm_omni.engine import VllmOmniEngine

ROUNDS = 1000
RATES = {"drop": 0.02, "500": 0.01, "hang": 0.01}
KINDS = {"drop": "dropped connection", "500": "status 500", "hang": "timeout"}


def right_picture(seed: int) -> str:
    """sha256 of the pixels that the stand-in draws of that seed."""
    body = {
        "prompt": WORKLOAD.prompt,
        "seed": seed,
        "size": f"{WORKLOAD.width}x{WORKLOAD.height}",
        "num_inference_steps": WORKLOAD.steps,
    }
    return hashlib.sha256(picture(body, 0.0, "cpu", f"{HUB} None None").tobytes()).hexdigest()


def test_a_thousand_images_with_faults(tmp_path, nothing_left):
    one = StandIn(tmp_path, rates=RATES, rate_seed=3)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with one.running(port=port) as (url, pid):
        engine = VllmOmniEngine(one.settings(vllm_omni_url=url, vllm_omni_pid=pid))
        record = engine.run(one.plan(rounds=ROUNDS, timeout_s=1.5), lambda *shown: None)
        left = [c for c in psutil.Process(pid).net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
    assert left == []
    assert len(record.rounds) == ROUNDS
    assert len({one.seed for one in record.rounds}) == ROUNDS
    for one_round in record.rounds:
        assert one_round.pixels_sha256 == right_picture(one_round.seed)
    made = {KINDS[fault]: count for fault, count in one.faults.items()}
    assert set(made) == set(KINDS.values())
    assert record.faults == made
    assert sum(made.values()) > 0.03 * ROUNDS
    failed = {line["request"]["seed"] for line in one.lines if line.get("fault")}
    assert not failed & {one.seed for one in record.rounds}
