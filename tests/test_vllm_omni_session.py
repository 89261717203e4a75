"""One vLLM-Omni server and its images, against the stand-in: what counts, what is refused, what is left behind."""

from __future__ import annotations

import dataclasses
import socket

import psutil
import pytest
from msgspec import structs
from standins.vllm_omni_running import CATALOG, HUB, WORKLOAD, StandIn

from pytest_zimage.engines.servers.faults import RequestFault
from pytest_zimage.engines.servers.images import decoded
from pytest_zimage.engines.vllm_omni.engine import VllmOmniEngine
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError


@pytest.fixture
def stand_in(tmp_path, nothing_left):
    """Makes stand-ins; afterwards none of their processes may be there."""
    made: list[StandIn] = []

    def make(**script) -> StandIn:
        made.append(StandIn(tmp_path, **script))
        return made[-1]

    yield make
    pids = [line[key] for one in made for line in one.starts for key in ("pid", "child") if line[key]]
    assert not [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


@pytest.fixture
def port():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def opened(one: StandIn, variant: str = "bf16", *, settings=None, **plan):
    return VllmOmniEngine(one.settings(**(settings or {}))).open(one.plan(variant, **plan), lambda *shown: None)


def at(seed: int):
    return structs.replace(WORKLOAD, seed=seed)


# ---- a server that is started ------------------------------------------------


@pytest.mark.parametrize(("version", "profiled"), [("0.14.0", ()), ("0.16.0", ()), ("0.26.0", ()), ("0.30.0", ())])
def test_every_version_that_can_draw_draws(stand_in, version, profiled):
    one = stand_in(version=version, health_503=3, child=True)
    with opened(one) as session:
        first = session.draw(WORKLOAD, "cold")
        warm = session.draw(at(7), "warm")
        seen = session.seen()
    assert session.started_s > 0
    assert session.pid == one.starts[0]["pid"]
    pixels, sha256 = decoded(first.image, 64, 32)
    assert pixels.shape == (32, 64, 3)
    assert decoded(warm.image, 64, 32)[1] != sha256
    assert first.seconds > 0
    assert first.phases_s == {}
    assert set(warm.beside_s) == ({"queue", "server"} if version == "0.30.0" else {"server"})
    assert seen.reserved_peak_bytes == (13000 << 20 if version >= "0.26" else None)
    assert seen.environment == {
        "vllm-omni": version,
        "vllm-omni.model": HUB,
        "vllm-omni.argv": "--omni --host 127.0.0.1",
        "vllm-omni.attention": "TORCH_SDPA",
        "vllm-omni.useful_steps": "7 of 8",
    }
    assert [body["seed"] for body in one.requests] == [1235, 7]
    assert {body["guidance_scale"] for body in one.requests} == {0.0}
    assert {body.get("generator_device") for body in one.requests} == ({None} if version == "0.14.0" else {"cpu"})


@pytest.mark.parametrize("version", ["0.18.0", "0.20.0", "0.24.0"])
def test_versions_that_force_guidance_on_are_refused_before_anything_is_drawn(stand_in, version):
    one = stand_in(version=version)
    with pytest.raises(UnsupportedError, match=r"0\.18 to 0\.24"), opened(one):
        pass
    assert one.requests == []


def test_what_the_refused_versions_would_have_drawn_is_another_picture_in_twice_the_time(stand_in, monkeypatch):
    from pytest_zimage.engines.vllm_omni import versions

    pictures = {}
    for version in ("0.16.0", "0.20.0"):
        one = stand_in(version=version)
        monkeypatch.setattr(versions, "check", lambda *given, **more: None)
        with opened(one) as session:
            pictures[version] = decoded(session.draw(WORKLOAD, "cold").image, 64, 32)[1]
    assert pictures["0.16.0"] != pictures["0.20.0"]


def test_vllm_omnis_own_version_counts_where_the_log_tells_it(stand_in):
    one = stand_in(version="0.24.0", vllm_version="0.26.0")
    with pytest.raises(UnsupportedError, match=r"vLLM-Omni 0\.24\.0 reads guidance_scale"), opened(one):
        pass


@pytest.mark.parametrize(
    ("variant", "quantised", "backend"),
    [
        ("bf16-sage", [], "SAGE_ATTN"),
        ("modelopt-full", [], "TORCH_SDPA"),
        ("online-fp8-sage", ["--quantization-config", '{"method":"fp8"}'], "SAGE_ATTN"),
    ],
)
def test_the_variant_decides_how_the_server_is_started(stand_in, variant, quantised, backend):
    one = stand_in()
    flags = ("--gpu-memory-utilization", "0.9")
    with opened(one, variant, settings={"vllm_omni_flags": flags}) as session:
        session.draw(WORKLOAD, "cold")
        environment = session.seen().environment
    words = one.starts[0]["words"]
    assert words[:2] == ["serve", CATALOG.variant(variant).repository]
    assert words[words.index("--port") + 2 :] == [*quantised, *flags]
    assert environment["vllm-omni.attention"] == backend
    assert environment["vllm-omni.argv"].endswith(" ".join([*quantised, *flags]))


def test_only_the_chosen_gpu_is_seen(stand_in):
    one = stand_in()
    with opened(one, gpu="GPU-12345"):
        assert one.starts[0]["gpu"] == "GPU-12345"


def test_the_other_engines_noise_levels_take_one_step_more(stand_in):
    one = stand_in()
    with opened(one, same_schedule=True) as session:
        session.draw(WORKLOAD, "any")
        assert session.seen().environment["vllm-omni.useful_steps"] == "8 of 9"
    assert one.requests[0]["num_inference_steps"] == 9


@pytest.mark.parametrize(
    ("script", "error", "says"),
    [
        (
            {"backend": "TORCH_SDPA"},
            MeasurementError,
            "asked for attention backend SAGE_ATTN, the server resolved",
        ),
        ({"backend": ""}, MeasurementError, "does not say which attention backend"),
        ({"served": "someone/else"}, UnsupportedError, "serves 'someone/else', which is not the variant's model"),
        ({"dies_loading": True}, EngineError, "Only SM 8.9 and newer can compute FP8"),
        ({"version": "0.9.0"}, UnsupportedError, "its version is '0.9.0'"),
    ],
)
def test_a_server_that_is_not_the_variants_is_an_error(stand_in, script, error, says):
    one = stand_in(child=True, **script)
    with pytest.raises(error) as caught, opened(one, "bf16-sage"):
        pass
    assert says in str(caught.value)
    assert caught.value.mend
    assert one.requests == []


def test_a_flag_that_outranks_the_variants_attention_is_noticed(stand_in):
    one = stand_in()
    flags = ("--diffusion-attention-backend", "FLASH_ATTN")
    with (
        pytest.raises(MeasurementError, match="resolved FLASH_ATTN"),
        opened(one, settings={"vllm_omni_flags": flags}),
    ):
        pass


def test_a_flag_that_the_version_does_not_know_is_told_with_the_servers_words(stand_in):
    one = stand_in(version="0.14.0")
    with pytest.raises(EngineError, match="unrecognized arguments: --quantization-config"), opened(one, "online-fp8"):
        pass


def test_a_command_that_cannot_be_run_says_so(stand_in):
    one = stand_in()
    one.command.write_text("neither a program nor a script")
    with pytest.raises(EngineError, match="cannot be started"), opened(one):
        pass


@pytest.mark.parametrize("variant", ["nvfp4", "fp8-cast-fast"])
def test_what_it_cannot_serve_starts_nothing(stand_in, variant):
    one = stand_in()
    with pytest.raises(UnsupportedError, match=r"names single files|casts its weights"), opened(one, variant):
        pass
    assert one.starts == []


# ---- replies -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "error", "says"),
    [
        ("400", EngineError, "the server refused the request with status 400: steps: too many"),
        ("422", EngineError, "status 422"),
        ("size-field", MeasurementError, "asked for 64x32, the server drew '16x16'"),
        ("none", EngineError, "holds 0 images"),
        ("two", EngineError, "holds 2 images"),
        ("bad-base64", EngineError, "no base64"),
        ("no-json", EngineError, "the answer is not what it should be"),
        ("oversize", EngineError, "the answer is longer than"),
    ],
)
def test_a_reply_that_is_not_the_image_ends_the_variant(stand_in, fault, error, says):
    one = stand_in(faults={"2": fault})
    with opened(one) as session:
        session.draw(WORKLOAD, "cold")
        with pytest.raises(error) as caught:
            session.draw(at(2), "warm")
    assert not isinstance(caught.value, RequestFault)
    assert says in str(caught.value)


@pytest.mark.parametrize(("fault", "says"), [("size", "32x32 where 64x32"), ("jpeg", "not a PNG")])
def test_a_picture_that_is_not_the_one_asked_for_is_found_by_its_contents(stand_in, fault, says):
    one = stand_in(faults={"1": fault})
    with opened(one) as session:
        image = session.draw(WORKLOAD, "cold").image
    with pytest.raises(MeasurementError, match=says):
        decoded(image, 64, 32)


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("drop", "dropped connection"),
        ("cut", "dropped connection"),
        ("500", "status 500"),
        ("503", "status 503"),
        ("hang", "timeout"),
    ],
)
def test_an_accident_may_be_tried_again_behind_a_picture_that_nobody_times(stand_in, fault, kind):
    one = stand_in(faults={"2": fault})
    with opened(one, timeout_s=1.0 if fault == "hang" else 30.0) as session:
        session.draw(WORKLOAD, "cold")
        with pytest.raises(RequestFault) as caught:
            session.draw(at(2), "warm")
        assert caught.value.kind == kind
        session.draw(at(3), "warm")
        session.draw(at(4), "warm")
        assert session.faults == {}, "whoever catches it counts it"
    seeds = [body["seed"] for body in one.requests]
    assert seeds[:2] + seeds[3:] == [1235, 2, 3, 4]
    assert seeds[2] > 500_000, "what was given up may still be drawn, and only this picture waits for it"


def test_a_first_image_that_failed_is_no_cold_load_any_more(stand_in):
    one = stand_in(faults={"1": "500"})
    with opened(one) as session:
        with pytest.raises(RequestFault):
            session.draw(WORKLOAD, "cold")
        with pytest.raises(MeasurementError, match="asked for 1 images before the first one"):
            session.draw(WORKLOAD, "cold")


def test_a_server_that_dies_during_a_request_is_told_with_its_last_words(stand_in):
    one = stand_in(faults={"2": "die"}, child=True)
    with opened(one) as session:
        session.draw(WORKLOAD, "cold")
        with pytest.raises(EngineError) as caught:
            session.draw(at(2), "warm")
        if isinstance(caught.value, RequestFault):  # the connection ended before the process was seen to
            with pytest.raises(EngineError) as caught:
                session.draw(at(3), "warm")
    assert "exit status 137" in str(caught.value)
    assert "CUDA out of memory" in str(caught.value)


def test_an_image_beside_which_another_client_was_served_is_no_sample(stand_in):
    one = stand_in(others=2)
    with opened(one) as session, pytest.raises(RequestFault, match="2 other requests") as caught:
        session.draw(WORKLOAD, "cold")
    assert caught.value.kind == "other client"


def test_the_servers_figures_are_shown_beside(stand_in):
    one = stand_in(queue_s=0.25, draw_s=0.01, faults={"3": "no-metrics"})
    flags = ("--enable-diffusion-pipeline-profiler",)
    with opened(one, settings={"vllm_omni_flags": flags}) as session:
        first, second, third = (session.draw(at(seed), kind) for seed, kind in ((1, "cold"), (2, "warm"), (3, "warm")))
        assert session.seen().reserved_peak_bytes is None, "one image has no figure"
    assert set(first.phases_s) == {"text_encode", "denoise", "vae_decode"}
    assert 0 < sum(second.phases_s.values()) <= second.seconds
    assert second.beside_s["queue"] == pytest.approx(0.25)
    assert third.phases_s == {}


@pytest.mark.parametrize("changed", [{"sampler": "res_multistep"}, {"shift": 1.0}])
def test_a_workload_that_it_draws_otherwise_is_refused(stand_in, changed):
    one = stand_in()
    workload = structs.replace(WORKLOAD, **changed)
    with pytest.raises(UnsupportedError, match="vLLM-Omni draws Z-Image with"), opened(one, workload=workload):
        pass
    assert one.starts == []


# ---- a server that runs already ----------------------------------------------


def test_a_server_that_runs_is_used_and_left_running(stand_in, port):
    one = stand_in()
    with one.running(port=port) as (url, pid):
        settings = {"vllm_omni_url": url, "vllm_omni_pid": pid}
        with opened(one, settings=settings) as session:
            with pytest.raises(UnsupportedError, match="there is no cold load to time"):
                session.forget()
            decoded(session.draw(WORKLOAD, "any").image, 64, 32)
            seen = session.seen()
        assert (session.pid, session.started_s) == (pid, 0.0)
        assert psutil.pid_exists(pid)
    assert seen.environment["vllm-omni.attention"] == "unknown"
    assert "is taken from you" in seen.notes[0]


@pytest.mark.parametrize(
    ("model", "variant", "fits"),
    [
        (HUB, "bf16-sage", True),
        ("/models/Z-Image-Turbo", "online-fp8", True),
        ("/models/Z-Image-Turbo-FP8-attn-only", "modelopt-attn-only", True),
        ("bahadirakdemir/Z-Image-Turbo-FP8-full", "modelopt-full", True),
        ("bahadirakdemir/Z-Image-Turbo-FP8-full", "bf16", False),
        ("someone/Z-Image-Turbo", "bf16", False),
    ],
)
def test_it_must_serve_the_variants_model(stand_in, port, model, variant, fits):
    one = stand_in()
    with one.running(model=model, port=port) as (url, _):
        if fits:
            with opened(one, variant, settings={"vllm_omni_url": url}) as session:
                session.draw(WORKLOAD, "any")
            assert one.requests[0]["model"] == model
            return
        with (
            pytest.raises(UnsupportedError, match="which is not the variant's model"),
            opened(one, variant, settings={"vllm_omni_url": url}),
        ):
            pass


def test_it_is_one_variant_only(stand_in, port):
    one = stand_in()
    with one.running(port=port) as (url, _):
        settings = {"vllm_omni_url": url}
        with pytest.raises(UnsupportedError), opened(one, "modelopt-full", settings=settings):
            pytest.fail("served")
        for _ in range(2):
            with opened(one, settings=settings):
                pass
        # Each is an engine of its own, as every process of xdist has one.
        with (
            pytest.raises(UnsupportedError, match="was measured as bf16 in this session: it cannot be online-fp8 too"),
            opened(one, "online-fp8", settings=settings),
        ):
            pass


def test_nobody_there_is_an_accident_that_says_where(stand_in, port):
    one = stand_in()
    with (
        pytest.raises(RequestFault, match=f"vLLM-Omni at http://127.0.0.1:{port}: GET /health"),
        opened(one, settings={"vllm_omni_url": f"http://127.0.0.1:{port}"}),
    ):
        pass


def test_plans_are_not_changed(stand_in):
    one = stand_in()
    plan = one.plan()
    before = dataclasses.replace(plan)
    with VllmOmniEngine(one.settings()).open(plan, lambda *shown: None):
        pass
    assert plan == before
