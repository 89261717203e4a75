"""vLLM-Omni as an engine: whole runs against the stand-in, and a user's session with it."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import nullcontext
from pathlib import Path

import psutil
import pytest
from PIL import Image
from scripted_nvml import GIB, Gpu, ScriptedNvml
from standins.vllm_omni_running import HUB, WORKLOAD, StandIn

from pytest_zimage.engines.protocol import Injection
from pytest_zimage.engines.vllm_omni.engine import VllmOmniEngine
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError
from pytest_zimage.verdict.metrics import take

PROFILED = ("--enable-diffusion-pipeline-profiler",)


def run(one: StandIn, variant="bf16", *, settings=None, **plan):
    return VllmOmniEngine(one.settings(**(settings or {}))).run(one.plan(variant, **plan), lambda *shown: None)


def pipeline(folder: Path) -> Path:
    """A whole pipeline in diffusers' layout, as far as it is looked at."""
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    for name in ("transformer", "text_encoder", "vae"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text("{}")
        (folder / name / "model.safetensors").write_bytes(name.encode() * 1000)
    return folder


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


# ---- one run -----------------------------------------------------------------


def test_a_run_is_one_fresh_server(tmp_path, nothing_left):
    one = StandIn(tmp_path, health_503=2, queue_s=0.01, child=True)
    record = run(one)
    assert (record.engine, record.variant, record.model_set) == ("vllm-omni", "bf16", "official")
    assert len(record.rounds) == 4
    assert len({one.pixels_sha256 for one in record.rounds}) == 4
    assert all(one.forwards is None and one.seconds > 0 for one in record.rounds)
    assert {key for one in record.rounds for key in one.beside_s} == {"queue", "server"}
    assert [one.seed for one in record.rounds] == [1236, 1237, 1238, 1239]
    assert record.cold.total_s == pytest.approx(sum(record.cold.phases_s.values()))
    assert set(record.cold.phases_s) == {"server_start", "first_image"}
    assert take("rss_peak", record).rounds[0] >= record.memory.rss_sampled_peak_bytes > 0
    assert record.memory.device_reserved_peak_bytes == 13000 << 20
    assert record.environment["vllm-omni"] == "0.30.0"
    assert record.environment["python"] == "3"
    assert record.faults == {}
    (start,) = one.starts
    assert not [pid for pid in (start["pid"], start["child"]) if psutil.pid_exists(pid)]
    assert "Resolved diffusion attention backend" in (tmp_path / "logs" / "bf16.log").read_text()


def test_its_files_are_those_that_the_server_reads(tmp_path):
    folder = pipeline(tmp_path / "Z-Image-Turbo")
    one = StandIn(tmp_path)
    comfy = tmp_path / "z_image_turbo_bf16.safetensors"
    comfy.write_bytes(b"another file")
    held = []

    def disks(files, progress):
        held.extend(files)
        return nullcontext()

    record = run(
        one,
        settings={"models": str(tmp_path)},
        files={"transformer": comfy},
        disks=disks,
        environment={"weights.transformer": "of the other file", "weights.lora": "x"},
    )
    assert one.starts[0]["words"][1] == str(folder)
    assert record.environment["vllm-omni.model"] == str(folder)
    networks = {"weights.transformer", "weights.text_encoder", "weights.vae"}
    assert {key for key in record.environment if key.startswith("weights.")} == networks
    assert record.environment["weights.transformer"] != "of the other file"
    assert sorted(held) == sorted(folder / network for network in ("transformer", "text_encoder", "vae"))
    assert record.disk_bytes == sum(p.stat().st_size for p in folder.glob("*/*"))
    assert record.cold.unavailable == ""
    other = run(one, "bf16-sage", settings={"models": str(tmp_path)})
    assert other.environment["weights.vae"] == record.environment["weights.vae"]


def test_files_that_may_have_been_fetched_meanwhile_give_no_cold_load(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    record = run(StandIn(tmp_path), environment={"weights.transformer": "of a file that it does not read"})
    assert "may have fetched its files" in record.cold.unavailable
    assert record.disk_bytes is None
    assert not [key for key in record.environment if key.startswith("weights.")]
    repository = tmp_path / "hub" / "models--Tongyi-MAI--Z-Image-Turbo"
    snapshot = pipeline(repository / "snapshots" / "abc123")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc123")
    record = run(StandIn(tmp_path))
    assert record.cold.unavailable == ""
    assert record.disk_bytes == sum(p.stat().st_size for p in snapshot.glob("*/*"))
    (snapshot / "vae" / "model.safetensors").unlink()
    assert run(StandIn(tmp_path)).cold.unavailable, "a part is missing still"


@pytest.mark.parametrize(
    ("script", "phases"),
    [
        ({}, {"text_encode", "denoise", "vae_decode"}),
        ({"faults": {"4": "no-metrics"}}, set()),
        ({"version": "0.16.0"}, set()),
    ],
)
def test_the_profilers_parts_are_phases_where_every_round_has_them(tmp_path, script, phases):
    record = run(StandIn(tmp_path, **script), settings={"vllm_omni_flags": PROFILED})
    assert [set(one.phases_s) for one in record.rounds] == [phases] * 4
    assert record.environment["vllm-omni.argv"].endswith(PROFILED[0])


def test_images_for_quality_are_kept_as_pictures_of_their_prompt_and_seed(tmp_path):
    one = StandIn(tmp_path)
    images = run(one, images=one.images(5, 6)).images
    assert [image.seed for image in images] == [5, 6]
    for image in images:
        with Image.open(image.path) as opened:
            assert (opened.format, opened.size) == ("PNG", (WORKLOAD.width, WORKLOAD.height))
    assert [(body["prompt"], body["seed"]) for body in one.requests[-2:]] == [("a prompt", 5), ("a prompt", 6)]
    again = VllmOmniEngine(one.settings()).draw(one.plan(images=one.images(5, 6)), lambda *shown: None)
    assert again == images


def test_variants_draw_pictures_of_their_own(tmp_path):
    shas = set()
    for variant in ("bf16", "bf16-sage", "online-fp8", "modelopt-full"):
        one = StandIn(tmp_path)
        (image,) = VllmOmniEngine(one.settings()).draw(one.plan(variant, images=one.images(5)), lambda *shown: None)
        shas.add(image.pixels_sha256)
    assert len(shas) == 4


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("size", MeasurementError, "32x32 where 64x32 was asked for"),
        ("jpeg", MeasurementError, "not a PNG"),
        ("same", MeasurementError, "gave the same picture"),
        ("black", MeasurementError, "gave a picture of one colour, (0, 0, 0)"),
        ("400", EngineError, "status 400"),
        ("die", EngineError, "CUDA out of memory"),
    ],
)
def test_a_round_that_is_not_one_fails_the_run_and_leaves_nothing(tmp_path, nothing_left, fault, error, says):
    one = StandIn(tmp_path, faults={"4": fault}, child=True)
    with pytest.raises(error) as caught:
        run(one)
    assert says in str(caught.value)
    assert not [pid for pid in (one.starts[0]["pid"], one.starts[0]["child"]) if psutil.pid_exists(pid)]


@pytest.mark.parametrize("number", [1, 2, 6], ids=["first", "warm-up", "last round"])
def test_a_black_image_is_no_sample_wherever_it_comes(tmp_path, port, number):
    one = StandIn(tmp_path, faults={str(number): "black"})
    with one.running(port=port) as (url, _), pytest.raises(MeasurementError, match="of one colour") as caught:
        run(one, settings={"vllm_omni_url": url})
    assert one.faults == {"black": 1}
    assert f"from seed {one.requests[-1]['seed']}" in caught.value.message


def test_accidents_are_counted_and_made_anew_from_other_seeds(tmp_path):
    one = StandIn(tmp_path, faults={"4": "drop", "7": "500"})
    record = run(one)
    assert record.faults == {"dropped connection": 1, "status 500": 1}
    assert len({one.seed for one in record.rounds}) == 4
    failed = {one.requests[3]["seed"], one.requests[6]["seed"]}
    assert not failed & {one.seed for one in record.rounds}


def test_a_first_image_that_failed_takes_another_server(tmp_path):
    one = StandIn(tmp_path, faults={})
    one.once({"1": "drop"})
    record = run(one)
    assert record.faults == {"dropped connection": 1}
    assert len(one.starts) == 2


def test_a_server_that_fails_every_time_ends_the_run_with_the_counts(tmp_path):
    one = StandIn(tmp_path, rates={"500": 1.0})
    with pytest.raises(EngineError, match=r"requests in a row failed \(status 500 \d\)"):
        run(one)


def test_a_server_that_ran_before_has_no_cold_load(tmp_path, port):
    one = StandIn(tmp_path)
    with one.running(port=port) as (url, pid):
        record = run(one, settings={"vllm_omni_url": url, "vllm_omni_pid": pid})
        unwatched = run(one, settings={"vllm_omni_url": url})
        assert psutil.pid_exists(pid)
    assert "there is no cold load to time" in record.cold.unavailable
    assert len(record.rounds) == 4
    assert record.memory.rss_sampled_peak_bytes > 0
    assert unwatched.memory.rss_sampled_peak_bytes is None
    assert "is taken from you" in " ".join(record.memory.notes)


def test_memory_of_a_server_that_loaded_before_is_seen_and_not_judged(tmp_path, port):
    """A baseline of one that is started has the peak of its load."""
    one = StandIn(tmp_path)
    with one.running(port=port) as (url, pid):
        record = run(one, settings={"vllm_omni_url": url, "vllm_omni_pid": pid})
    for metric in ("rss_peak", "working_set"):
        sample = take(metric, record)
        assert sample.unavailable.startswith("vllm-omni had loaded before this run, and the peak of its load is not")
    assert take("rss_peak", record).not_its_own, "a stored figure has not vanished"


@pytest.mark.parametrize(
    ("script", "first"), [({}, ""), ({"counts": False}, "does not say whether it had drawn before this run")]
)
def test_device_memory_is_judged_of_a_server_that_has_drawn_nothing_before(tmp_path, port, monkeypatch, script, first):
    """torch keeps what it reserved for another's larger images."""
    one = StandIn(tmp_path, **script)
    gpu = Gpu("NVIDIA H200", (9, 0), 139.8, "GPU-a")
    monkeypatch.setitem(sys.modules, "pynvml", ScriptedNvml(gpu))
    with one.running(port=port) as (url, pid):
        gpu.processes = ((pid, 20 * GIB),)
        settings = {"vllm_omni_url": url, "vllm_omni_pid": pid}
        samples = [take("gpu_process_peak", run(one, settings=settings, gpu="GPU-a")) for _ in range(2)]
    assert first in samples[0].unavailable
    assert samples[0].rounds == (() if first else (20 * GIB,))
    assert (first or "this vLLM-Omni had drawn before this run") in samples[1].unavailable
    assert samples[1].not_its_own


def test_slowness_can_be_injected(tmp_path):
    one = StandIn(tmp_path, draw_s=0.02)
    plain, slowed = run(one), run(one, inject=Injection(warm_latency=2.0))
    assert min(one.seconds for one in slowed.rounds) > 2 * min(one.seconds for one in plain.rounds)
    with pytest.raises(UnsupportedError, match="memory cannot be injected"):
        run(one, inject=Injection(memory_bytes=1000))


# ---- a user's session --------------------------------------------------------

INI = """
[pytest]
addopts = -p no:cacheprovider --strict-markers
zimage_device = cpu
zimage_engine = vllm-omni
zimage_models = official
zimage_rounds = 2
zimage_cache = {cache}
"""
SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())
"""


@pytest.fixture
def session(project, tiny):
    """A project that asks for vLLM-Omni; called with arguments, it runs."""
    project.makepyfile(test_suite=SUITE)
    # A cache of its own, and so a lock of its own: nobody waits for a real measurement beside this.
    cache = project.mkdir("cache")
    (cache / "synthetic-tiny").symlink_to(tiny)
    project.makeini(INI.format(cache=cache))

    def ask(one: StandIn, *arguments: str):
        return project.runpytest_subprocess(f"--zimage-vllm-omni-command={one.command}", *arguments)

    return ask


def test_pytest_measures_both_passes_by_default(session, tmp_path, results):
    one = StandIn(tmp_path)
    done = session(one, "--zimage-rounds=1")
    found = results()
    ran = {run["variant"] for run in found["runs"]}
    assert ran == {"bf16", "bf16-sage", "online-fp8", "online-fp8-sage", "modelopt-full", "modelopt-full-sage"}
    assert {(run["engine"], run["workload"]) for run in found["runs"]} == {("vllm-omni", "turbo-1024x512")}
    assert {error["variant"] for error in found["errors"]} == {
        f"modelopt-{policy}"
        for policy in (
            "ffn-attn-qkv",
            *(f"{p}-sage" for p in ("ffn-only", "ffn-attn-qkv", "ffn-attn-out")),
            *(f"{p}-sage" for p in ("attn-only", "attn-qkv-only", "attn-out-only")),
        )
    }
    assert "no whole pipeline of the model set 'official'" in done.stdout.str()
    assert {body["size"] for body in one.requests} == {"1024x512"}


def test_pytest_tells_a_version_that_cannot_be_measured(session, tmp_path, results):
    done = session(StandIn(tmp_path, version="0.20.0"), "--zimage-config=bf16")
    assert done.ret == pytest.ExitCode.TESTS_FAILED
    done.stdout.fnmatch_lines(["*So do 0.18 to 0.24*", "*mend: use vLLM-Omni 0.26 or newer*"])
    assert [error["kind"] for error in results()["errors"]] == ["UnsupportedError"]


def test_pytest_judges_by_baselines_of_this_engine(session, project, tmp_path):
    one = StandIn(tmp_path, draw_s=0.02)
    recorded = session(one, "--zimage-config=bf16", "--update-baselines", "--update-reason=first", "--zimage-rounds=1")
    assert recorded.ret == 0, recorded.stdout.str()
    folder = project.path / ".zimage" / "baselines" / "cpu" / "vllm-omni-official-turbo-1024x512"
    assert [path.name for path in folder.iterdir()] == ["bf16.json"]
    slower = session(one, "--zimage-config=bf16", "--zimage-inject=warm_latency=+900%", "--zimage-rounds=1")
    assert slower.ret == pytest.ExitCode.TESTS_FAILED
    assert "SLOWER" in slower.stdout.str()


def test_the_default_model_set_says_what_to_choose(session, tmp_path):
    done = session(StandIn(tmp_path), "--zimage-config=bf16", "--zimage-models=synthetic-tiny")
    done.stdout.fnmatch_lines(["*no whole pipeline of the model set 'synthetic-tiny'*", "*--zimage-models=official*"])


def test_a_folder_of_whole_pipelines_alone_will_do(session, tmp_path, project, results):
    pipeline = project.path / "models" / "Z-Image-Turbo"
    for network in ("transformer", "text_encoder", "vae"):
        (pipeline / network).mkdir(parents=True)
        (pipeline / network / "weights.safetensors").write_bytes(network.encode())
    (pipeline / "model_index.json").write_text("{}")
    one = StandIn(tmp_path)
    done = session(one, "--zimage-config=bf16", f"--zimage-models={pipeline.parent}")
    assert done.ret == 0, done.stdout.str()
    (run,) = results()["runs"]
    assert (run["model_set"], run["environment"]["vllm-omni.model"]) == ("official", str(pipeline))
    assert run["disk_bytes"] == len("transformer" + "text_encoder" + "vae")
    assert "weights.transformer" in run["environment"]


def test_the_requests_of_a_session_are_those_of_the_published_protocol(session, tmp_path):
    one = StandIn(tmp_path)
    session(one, "--zimage-config=bf16", "--zimage-rounds=3")
    first, _, *rounds = one.requests
    assert first["model"] == HUB
    assert len(rounds) == 3
    same = [json.dumps({**body, "seed": 0}, sort_keys=True) for body in one.requests]
    assert len(set(same)) == 1
    assert first["num_inference_steps"] == 8
    assert first["guidance_scale"] == 0.0
