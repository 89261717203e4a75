"""A thousand images with accidents among them: no wrong sample, nothing left behind, every accident counted."""

from __future__ import annotations

import hashlib

import pytest
from standins.comfyui import pictures
from standins.comfyui_plan import make_files, silent, variant, workload
from standins.comfyui_server import standin

from pytest_zimage.engines.comfyui.workflow import build_workflow

IMAGES = 1000
SHARES = {"seed": 6, "dropped": 0.02, "500": 0.01, "hang": 0.01, "after": 2}
KINDS = {
    "dropped connection": ("drop_post", "drop_answer", "drop_view", "drop_history"),
    "dropped websocket": ("drop_websocket",),
    "status 500": ("500_post", "500_view", "500_history"),
    "timeout": ("hang_post", "hang_view", "stuck"),
}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    with standin(make_files(folder / "models", "bf16"), folder, "--step-ms", "0", "--load-ms", "0") as running:
        yield running


def expected(seed: int) -> str:
    """The pixels' hash that the stand-in's rules give for a seed."""
    drawn = workload(seed=seed)
    graph = build_workflow(variant(), drawn, None).graph(variant(), drawn, variant().files(), "any")
    return hashlib.sha256(pictures.picture(graph)[0]).hexdigest()


def test_a_thousand_images_with_accidents(server, nothing_left):
    server.faults(shares=SHARES)
    record = server.engine().run(server.plan(rounds=IMAGES, timeout_s=1.0), silent)
    happened = server.counts()
    assert len(record.rounds) == IMAGES
    assert [one.pixels_sha256 for one in record.rounds] == [expected(one.seed) for one in record.rounds]
    assert len({one.seed for one in record.rounds}) == IMAGES
    assert {frozenset(one.phases_s) for one in record.rounds} == {frozenset({"sampler", "vae_decode", "save_image"})}
    for kind, names in KINDS.items():
        count = sum(happened.get(name, 0) for name in names)
        assert count > 0, f"no {kind} happened"
        if kind == "timeout":
            # Of a busy machine a request may really take this long.
            assert record.faults[kind] >= count
        else:
            assert record.faults[kind] == count
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert server.get("/standin")["sockets"] == 0
