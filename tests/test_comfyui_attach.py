"""A ComfyUI that runs already: its own files, its own flags, its queue, and that nothing of it is ended."""

from __future__ import annotations

import json
import shutil

import pytest
from standins.comfyui_plan import (
    files_of,
    images_of,
    make_files,
    make_plan,
    make_settings,
    silent,
    variant,
    workload,
)
from standins.comfyui_server import ComfyUI, standin

from pytest_zimage.engines.comfyui.engine import ComfyUIEngine
from pytest_zimage.engines.comfyui.messages import Device, System, SystemStats
from pytest_zimage.engines.comfyui.support import refuse_other_device
from pytest_zimage.engines.protocol import ImageJob
from pytest_zimage.errors import EngineError, MeasurementError, MissingFileError, UnsupportedError
from pytest_zimage.verdict.metrics import take


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("standin")
    models = make_files(folder / "models", "bf16", "nvfp4")
    below = models / "diffusion_models" / "z-image"
    below.mkdir()
    shutil.move(models / "diffusion_models" / "z_image_turbo_nvfp4.safetensors", below)
    # What the server sees is not what the plan names: those are links made for it.
    with standin_of(models, folder) as running:
        yield running


def standin_of(models, folder):
    """A stand-in that sees the whole of `models`."""
    paths = folder / "all.yaml"
    names = ("diffusion_models", "text_encoders", "vae", "loras")
    paths.write_text(json.dumps({"all": {"base_path": str(models), **{name: name for name in names}}}))
    return standin(models, folder, "--extra-model-paths-config", str(paths))


@pytest.fixture
def free(server: ComfyUI):
    """The server, with an empty queue again afterwards."""
    yield server
    server.faults()
    server.post("/standin/queue", {"running": 0, "waiting": 0})


def test_a_file_below_a_folder_of_the_server_is_found_by_its_name(server):
    with server.attached("nvfp4") as session:
        assert session._files["transformer"] == "z-image/z_image_turbo_nvfp4.safetensors"
        assert session._files["vae"] == "ae.safetensors"


def test_every_file_that_it_lacks_is_named_with_those_it_has(server):
    with pytest.raises(MissingFileError) as caught, server.attached("nvfp4-fp8e", timeout_s=20.0):
        pass
    message = caught.value.message
    assert "not all files of nvfp4-fp8e are there once:" in message
    assert "qwen_3_4b_fp8_mixed.safetensors (models/text_encoders): CLIPLoader lists qwen_3_4b.safetensors" in message
    assert "diffusion_models" not in message
    assert "put them into its model folders" in caught.value.mend


def test_a_file_that_it_has_twice_is_not_guessed(tmp_path):
    models = make_files(tmp_path / "models", "bf16")
    first = files_of(variant(), models)["vae"]
    for name in ("a", "b"):
        (first.parent / name).mkdir()
        shutil.copy(first, first.parent / name)
    first.unlink()
    files_of(variant(), models)["vae"].write_bytes(b"for the link only")
    with standin_of(models, tmp_path) as running:
        first.unlink()
        with (
            pytest.raises(MissingFileError, match=r"VAELoader has it more than once: a/ae.*, b/ae"),
            running.attached(),
        ):
            pass


def test_without_files_here_nothing_is_said_of_their_size_and_the_page_cache(server):
    bare = ComfyUI(server.url, None, server.folder)
    assert bare.engine().needs_files is False
    record = bare.engine().run(bare.plan(), silent)
    assert record.disk_bytes is None
    assert len(record.rounds) == 3


def test_a_busy_queue_is_not_measured_beside_and_says_how_busy(free):
    free.post("/standin/queue", {"running": 1, "waiting": 3})
    with pytest.raises(EngineError, match=r"is busy with prompts of others: 1 running, 3 waiting") as caught:
        free.engine().run(free.plan(), silent)
    assert "wait until its queue is empty" in caught.value.mend
    assert len(free.get("/queue")["queue_pending"]) == 3, "prompts of others stay where they are"


def test_one_that_comes_between_two_images_is_noticed(free):
    with free.warm() as session:
        free.post("/standin/queue", {"running": 0, "waiting": 1})
        with pytest.raises(EngineError, match="0 running, 1 waiting"):
            session.draw(workload(seed=3), "warm")


def test_other_messages_and_previews_are_not_taken_for_its_own(free):
    free.faults(noise=True)
    with free.warm() as session:
        for seed in range(5):
            served = session.draw(workload(seed=50 + seed), "warm")
            assert set(served.phases_s) == {"sampler", "vae_decode", "save_image"}
            assert served.phases_s["sampler"] > served.phases_s["vae_decode"]


@pytest.mark.parametrize(("step_ms", "ticks"), [("2", [1, 4]), ("150", [1, 2, 3, 4])])
def test_steps_are_shown_as_they_are_told_and_never_timed(tmp_path, step_ms, ticks):
    """The server tells steps at most every 100 ms: of shorter ones only the first and the last."""
    shown = []
    with standin(make_files(tmp_path / "models", "bf16"), tmp_path, "--step-ms", step_ms) as running:
        with running.warm(workload=workload(steps=4)):
            pass
        record = running.engine().run(
            running.plan(rounds=1, workload=workload(steps=4)), lambda *told: shown.append(told)
        )
    last = len(shown) - 1 - [stage for stage, _, _ in reversed(shown)].index("image")
    told = [(done, total) for stage, done, total in shown[last:] if stage == "step"]
    assert told == [(tick, 4) for tick in ticks]
    assert set(record.rounds[0].phases_s) == {"sampler", "vae_decode", "save_image"}


def test_no_proxy_of_the_environment_is_asked(server, monkeypatch):
    for name in ("http_proxy", "ws_proxy", "all_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with server.warm() as session:
        assert session.draw(workload(seed=70), "warm").phases_s


def test_a_variant_that_needs_a_flag_is_not_drawn_without_it(server):
    chosen = variant(compute_dtype="float32")
    plan = make_plan(server.models, server.folder, chosen)
    with pytest.raises(UnsupportedError, match="the running ComfyUI was started without --fp32-unet"):
        server.engine().run(plan, silent)


def test_nobody_at_the_url_is_an_error_that_names_it(tmp_path):
    engine = ComfyUIEngine(make_settings(tmp_path, comfyui_url="http://127.0.0.1:9"))
    with pytest.raises(EngineError, match=r"ComfyUI at http://127\.0\.0\.1:9: does not answer") as caught:
        engine.run(make_plan(None, tmp_path), silent)
    assert "--zimage-comfyui-url" in caught.value.mend


def test_a_run_leaves_the_server_running_and_nothing_here(server, nothing_left):
    record = server.engine(comfyui_pid=server.process.pid).run(server.plan(), silent)
    assert record.rss_idle_bytes
    assert record.memory.rss_sampled_peak_bytes >= record.rss_idle_bytes
    assert "server_start" not in record.cold.phases_s
    assert any("ran already" in note for note in record.memory.notes)
    assert server.get("/standin")["sockets"] == 0
    server.process.check()


@pytest.fixture
def fresh(tmp_path):
    """One that has drawn nothing yet, and the models that it sees."""
    models = make_files(tmp_path / "models", "bf16", "nvfp4")
    with standin_of(models, tmp_path) as running:
        yield running


def test_memory_is_judged_of_a_server_that_has_drawn_nothing_before(fresh):
    engine = fresh.engine(comfyui_pid=fresh.process.pid)
    first, second = engine.run(fresh.plan(), silent), engine.run(fresh.plan("nvfp4"), silent)
    for metric in ("rss_peak", "working_set"):
        assert take(metric, first).rounds
        sample = take(metric, second)
        assert "this ComfyUI had drawn before this run" in sample.unavailable
        assert "start one to judge its memory: --zimage-comfyui-dir" in sample.unavailable
        assert sample.not_its_own
    assert "allocator" in take("device_peak", second).unavailable


def test_memory_of_which_no_process_is_told_says_that(fresh):
    fresh.engine().run(fresh.plan(), silent)
    assert "is not known" in take("rss_peak", fresh.engine().run(fresh.plan(), silent)).unavailable


def test_what_was_drawn_for_others_is_not_in_its_log(fresh):
    other = "model weight dtype torch.float8_e4m3fn, manual cast: torch.bfloat16"
    fresh.faults(at={"0": {"fault": "says", "log": other}})
    engine = fresh.engine()
    first, second = engine.run(fresh.plan("nvfp4"), silent), engine.run(fresh.plan(), silent)
    assert "float8_e4m3fn" in first.environment["comfyui.dtype"]
    assert second.environment["comfyui.dtype"] == "torch.bfloat16, manual cast None"
    assert second.environment["comfyui.vram_state"] == "DISABLED"


def test_what_it_said_at_its_start_is_known_when_its_log_has_lost_it(fresh):
    engine = fresh.engine()
    first = engine.run(fresh.plan(), silent)
    fresh.post("/standin/log", {})
    second = engine.run(fresh.plan(), silent)
    told = ("comfyui.vram_state", "comfyui.attention", "comfyui.kitchen_backends", "comfyui.dtype")
    assert [second.environment[name] for name in told] == [first.environment[name] for name in told]


def test_where_it_listens_and_reads_is_no_fact_of_a_measurement(fresh, server):
    ours, theirs = (one.engine().run(one.plan(), silent).environment["comfyui.argv"] for one in (fresh, server))
    assert ours == theirs
    assert "--disable-metadata" in ours
    assert "/" not in ours


@pytest.mark.parametrize("line", ["unet missing: ['layers.1.w2.weight']", "clip missing: ['model.norm.weight']"])
def test_weights_that_its_file_lacks_are_an_error_though_the_prompt_succeeds(fresh, line):
    fresh.faults(at={"0": {"fault": "says", "log": line}})
    with pytest.raises(MeasurementError, match=r"a prompt of bf16 succeeded, but its files lack '\w+\.") as caught:
        fresh.engine().run(fresh.plan(), silent)
    assert "damaged" in caught.value.mend
    assert len(fresh.get("/standin")["history"]) == 1, "nothing more is drawn of it"
    fresh.engine().run(fresh.plan("nvfp4"), silent)


@pytest.mark.parametrize("prompt", [r"a cat \(black\)", "a cat, embedding:x", "embedding:x", "a\nembedding:x"])
def test_a_prompt_that_its_tokenizer_changes_is_refused_before_anything_is_asked(tmp_path, prompt):
    engine = ComfyUIEngine(make_settings(tmp_path, comfyui_url="http://127.0.0.1:9"))
    with pytest.raises(UnsupportedError, match="ComfyUI's tokenizer does not leave as it is") as caught:
        engine.run(make_plan(None, tmp_path, drawn=workload(prompt=prompt)), silent)
    assert "--zimage-catalog" in caught.value.mend
    jobs = images_of(tmp_path / "drawn", ImageJob("one", prompt, 1, str(tmp_path / "1.png")))
    with pytest.raises(UnsupportedError, match="does not leave as it is"):
        engine.draw(make_plan(None, tmp_path, images=jobs), silent)


@pytest.mark.parametrize("prompt", ["a (black:1.2) cat", "my_embedding:x", "a cat (embedding:x)", "{a|b} \\ c", ""])
def test_a_prompt_that_it_leaves_alone_is_drawn(server, prompt):
    server.engine().refuse(variant(), workload(prompt=prompt))


def test_a_negative_prompt_counts_where_it_is_encoded(server):
    changed = {"prompt": "a cat", "negative_prompt": r"\(dog\)"}
    server.engine().refuse(variant(), workload(**changed, guidance=0.0))
    with pytest.raises(UnsupportedError, match="the negative prompt"):
        server.engine().refuse(variant(), workload(**changed, guidance=3.0))


def test_images_are_saved_below_one_folder_of_the_server(server):
    with server.warm() as session:
        session.draw(workload(seed=3), "warm")
    [last] = list(server.get(f"/history/{list_of_ids(server)[-1]}").values())
    assert {image["subfolder"] for output in last["outputs"].values() for image in output["images"]} == {
        "pytest-zimage"
    }


def list_of_ids(server) -> list[str]:
    return list(server.get("/standin")["history"])


@pytest.mark.parametrize(
    ("type", "shown", "device", "name", "fits"),
    [
        ("cpu", "cpu", "cpu", "", True),
        ("cuda", "cuda:0 NVIDIA H200 : cudaMallocAsync", "cuda:0", "NVIDIA H200", True),
        ("cuda", "cuda:0 NVIDIA H200 : cudaMallocAsync", "cpu", "", False),
        ("cpu", "cpu", "cuda:0", "NVIDIA H200", False),
        ("cuda", "cuda:0 NVIDIA L40S : native", "cuda:0", "NVIDIA H200", False),
    ],
)
def test_a_server_on_another_device_than_the_runs_is_refused(type, shown, device, name, fits):
    stats = SystemStats(System(), [Device(shown, type)])
    if fits:
        refuse_other_device("it", stats, device, name)
        return
    with pytest.raises(MeasurementError, match=f"it: draws on '{shown}', and this run is of '{name or device}'"):
        refuse_other_device("it", stats, device, name)
