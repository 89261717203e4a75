"""What a ComfyUI server must do for the engine; the same against the stand-in and, where one is named, a real server.

`ZIMAGE_COMFYUI_DIR` (with `ZIMAGE_COMFYUI_PYTHON` and `ZIMAGE_COMFYUI_FLAGS`) has one started, which must take the tiny
model set; `ZIMAGE_COMFYUI_URL` names one that runs and has files of the variant's names.
"""

from __future__ import annotations

import threading

import pytest
from standins.comfyui_plan import variant, workload
from standins.comfyui_server import KINDS, ComfyUI, real, standin

from pytest_zimage.engines.comfyui.workflow import build_workflow
from pytest_zimage.errors import EngineError, MeasurementError


@pytest.fixture(scope="module", params=KINDS)
def server(request, tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("comfyui")
    with standin(tiny, folder) if request.param == "stand-in" else real(tiny, folder) as running:
        yield running


def pixels(served, width=128, height=128) -> str:
    from pytest_zimage.engines.servers.images import decoded

    return decoded(served.image, width, height)[1]


def test_the_first_image_loads_and_the_next_ones_do_not(server: ComfyUI):
    with server.cold() as session:
        cold = session.draw(workload(), "cold")
        warm = [session.draw(workload(seed=100 + i), "warm") for i in range(3)]
    assert {"load_transformer", "load_text_encoder", "load_vae", "text_encode", "sampler"} <= set(cold.phases_s)
    assert {frozenset(image.phases_s) for image in warm} == {frozenset({"sampler", "vae_decode", "save_image"})}
    for image in (cold, *warm):
        assert 0 < image.seconds <= image.beside_s["client"] + 0.05
        assert sum(image.phases_s.values()) <= image.beside_s["client"]
        assert 0 <= image.beside_s["queue"] <= image.beside_s["client"]
        assert image.beside_s["png"] == image.phases_s["save_image"]


def test_the_seed_the_prompt_and_the_size_each_change_the_picture_and_nothing_else_does(server: ComfyUI):
    with server.warm() as session:
        first = pixels(session.draw(workload(seed=1), "warm"))
        assert pixels(session.draw(workload(seed=2), "warm")) != first
        assert pixels(session.draw(workload(seed=1), "warm")) == first
        assert pixels(session.draw(workload(seed=1, prompt="a red bicycle"), "any")) != first
        assert pixels(session.draw(workload(seed=1, width=64), "any"), 64) != first
    with server.warm() as session:
        assert pixels(session.draw(workload(seed=1), "warm")) == first


def test_the_same_seed_twice_is_no_sample(server: ComfyUI):
    with server.warm() as session:
        session.draw(workload(seed=1), "warm")
        with pytest.raises(MeasurementError) as caught:
            session.draw(workload(seed=1), "warm")
    assert "node 8 (KSampler) did not run: its result came from the cache" in caught.value.message
    assert "the workflow's seed" in caught.value.mend


def test_what_is_loaded_already_is_no_cold_load(server: ComfyUI):
    with server.warm() as session, pytest.raises(MeasurementError) as caught:
        session.draw(workload(seed=5), "cold")
    message = caught.value.message
    assert "a cold load was asked for" in message
    assert "node 1 (UNETLoader), node 2 (CLIPLoader), node 3 (VAELoader) had its weights already" in message


def test_what_is_not_loaded_yet_is_no_warm_image(server: ComfyUI):
    with server.cold() as session, pytest.raises(MeasurementError, match="loaded its weights again"):
        session.draw(workload(), "warm")


def test_it_forgets_so_that_the_next_image_loads_again(server: ComfyUI):
    with server.warm() as session:
        [note] = session.forget()
        assert "not a fresh process" in note
        session.draw(workload(), "cold")


def test_a_run_of_the_engine(server: ComfyUI):
    seen = []
    record = server.engine().run(server.plan(rounds=4), lambda *shown: seen.append(shown[0]))
    assert [one.seed for one in record.rounds] == [43, 44, 45, 46]
    assert len({one.pixels_sha256 for one in record.rounds}) == 4
    assert all(one.forwards is None for one in record.rounds)
    assert record.cold.phases_s == {"first_image": record.cold.total_s}
    assert any("not a fresh process" in note for note in record.cold.notes)
    assert record.faults == {}
    assert record.environment["comfyui"]
    assert record.environment["comfyui.workflow"] == "published"
    assert "manual cast" in record.environment["comfyui.dtype"]
    assert {"first image", "step"} <= set(seen)
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}


def draw_many(session) -> None:
    for seed in range(300, 350):
        session.draw(workload(seed=seed), "any")


def test_a_prompt_that_someone_interrupts_is_an_error(server: ComfyUI):
    def interrupt() -> None:
        while not stop.is_set():
            server.post("/interrupt", {})

    stop = threading.Event()
    thread = threading.Thread(target=interrupt)
    with server.warm() as session:
        thread.start()
        try:
            with pytest.raises(EngineError, match=r"the prompt was interrupted at node \d+ \(\w+\)") as caught:
                draw_many(session)
        finally:
            stop.set()
            thread.join()
    assert "let one be started: --zimage-comfyui-dir" in caught.value.mend


def test_a_file_that_it_lacks_is_named_with_those_it_has(server: ComfyUI):
    with server.warm() as session:
        session._files = {**session._files, "vae": "missing.safetensors"}
        with pytest.raises(EngineError, match="does not know this value") as caught:
            session.draw(workload(seed=5), "warm")
    assert "node 3 (VAELoader): input 'vae_name': the server does not know this value" in caught.value.message
    assert "missing.safetensors" in caught.value.message
    assert "put it into the server's folders" in caught.value.mend


def test_a_graph_that_asks_for_guidance_is_drawn(server: ComfyUI):
    chosen = workload("base-tiny")
    with server.cold(workload=chosen) as session:
        guided = pixels(session.draw(chosen, "cold"))
        assert pixels(session.draw(workload("base-tiny", negative_prompt="fog", seed=9), "warm")) != guided
    assert build_workflow(variant(), chosen, None).phases["6"] == "text_encode_6"
