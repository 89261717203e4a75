"""What is sent to vLLM-Omni and read from it: the request, the reply, its metrics, its log, and how it is started."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path

import pytest
from msgspec import structs

from pytest_zimage.catalog import load_catalog
from pytest_zimage.engines.protocol import Round
from pytest_zimage.engines.servers.http import Http
from pytest_zimage.engines.vllm_omni import launch, log, metrics, pipeline, request
from pytest_zimage.engines.vllm_omni.metrics import Total
from pytest_zimage.engines.vllm_omni.versions import parse
from pytest_zimage.errors import EngineError, MeasurementError, UnsupportedError

CATALOG = load_catalog()
TURBO = CATALOG.workload("turbo-1024x512")
NEW, OLD = parse("0.30.0"), parse("0.14.0")
BF16 = CATALOG.variant("bf16")


# ---- the request -------------------------------------------------------------


def test_every_field_that_decides_about_the_picture_is_sent():
    assert request.body("a/b", TURBO, NEW, 8) == {
        "model": "a/b",
        "prompt": TURBO.prompt,
        "n": 1,
        "size": "1024x512",
        "num_inference_steps": 8,
        "guidance_scale": 0.0,
        "seed": 1235,
        "response_format": "b64_json",
        "output_format": "png",
        "generator_device": "cpu",
    }
    assert "generator_device" not in request.body("a/b", TURBO, OLD, 8)
    assert request.body("a/b", CATALOG.workload("base-1024"), NEW, 28)["negative_prompt"].startswith("low quality")


# ---- the reply ---------------------------------------------------------------


def read(data: bytes):
    return Http("http://127.0.0.1:9", what="it", timeout_s=1).typed("POST", request.PATH, data, request.Generated)


def reply(**changed):
    answer = {"created": 1, "data": [{"b64_json": base64.b64encode(b"png").decode(), "url": None}], "size": "1024x512"}
    return json.dumps({**answer, **changed}).encode()


def test_what_is_not_read_does_not_matter():
    answer = read(reply(output_format="png", cot_output=None, metrics={"peak_memory_mb": 1.5, "more": {}}))
    assert request.image_of(answer, TURBO) == b"png"
    assert answer.metrics.peak_memory_mb == 1.5
    assert request.image_of(read(reply(size=None, metrics=None)), TURBO) == b"png"


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"data": []}, EngineError, "holds 0 images, where 1 was due"),
        ({"data": [{"b64_json": "AA=="}] * 2}, EngineError, "holds 2 images"),
        ({"data": [{"b64_json": None}]}, EngineError, "holds 0 images"),
        ({"data": [{"b64_json": "A" * 4_000_000}]}, EngineError, "4000000 characters of base64"),
        ({"data": [{"b64_json": "!!!!"}]}, EngineError, "no base64"),
        ({"data": [{"b64_json": "äöüß"}]}, EngineError, "no base64"),
        ({"size": "512x1024"}, MeasurementError, "asked for 1024x512, the server drew '512x1024'"),
        ({"size": 1024}, EngineError, "Expected `str | null`, got `int`"),
        ({"output_format": "jpeg"}, MeasurementError, "asked for png, the server sent 'jpeg'"),
        ({"metrics": {"peak_memory_mb": "much"}}, EngineError, "got `str`"),
        ({"metrics": {"stage_durations": {"a.diffuse": None}}}, EngineError, "got `null`"),
    ],
)
def test_a_reply_that_is_not_one_image_of_that_size_is_an_error(changed, error, says):
    with pytest.raises(error) as caught:
        request.image_of(read(reply(**changed)), TURBO)
    assert says in str(caught.value)
    assert len(str(caught.value)) < 800


@pytest.mark.parametrize("data", [b"", b"<html>", b"[]", b'{"data": 1}', b"\xff" * 10, b"[" * 100_000])
def test_what_is_no_reply_is_an_error(data):
    with pytest.raises(EngineError, match="it: POST /v1/images/generations: the answer is not what it should be"):
        read(data)


def test_an_uncompressed_image_is_not_too_long():
    png = 1024 * 512 * 4 + 512 + 1000
    assert request.most_bytes(TURBO) > png * 4 / 3


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ('{"error": {"message": "Model mismatch: x", "type": "BadRequestError", "code": 400}}', ": Model mismatch: x"),
        ('{"detail": "too many steps"}', ": too many steps"),
        ('{"detail": [{"loc": ["body", "size"], "msg": "bad"}]}', "'msg': 'bad'|\"msg\": \"bad\""),
        ('{"error": {"message": "a\\u001b[31mred\\nb"}}', r": a \[31mred b"),
        ("<html>nginx</html>", "nginx"),
        ("x" * 100_000, "xxx"),
    ],
)
def test_a_refusal_is_the_servers_own_sentence(body, says):
    error = request.refusal(400, body)
    assert type(error) is EngineError
    assert "status 400" in error.message
    assert re.search(says, error.message)
    assert len(error.message) < 500


def test_a_server_without_that_path_is_no_vllm_omni():
    assert isinstance(request.refusal(404, "{}"), UnsupportedError)


# ---- its metrics -------------------------------------------------------------

PAGE = """# HELP vllm_omni:request_queue_wait_s Per-request queue wait
# TYPE vllm_omni:request_queue_wait_s histogram
vllm_omni:request_queue_wait_s_bucket{le="0.1",model_name="a b}c"} 3.0
vllm_omni:request_queue_wait_s_count{model_name="a b}c"} 3.0
vllm_omni:request_queue_wait_s_sum{model_name="a b}c"} 0.25
vllm_omni:e2e_request_latency_s_count 4
vllm_omni:e2e_request_latency_s_sum 40.5 1700000000
python_gc_objects_collected_total{generation="0"} 1e3
"""


def test_the_clocks_of_the_page_are_read():
    assert metrics.totals(PAGE) == {"queue": Total(count=3, seconds=0.25), "server": Total(count=4, seconds=40.5)}
    assert metrics.totals(PAGE.replace("_sum", "_total")) == {}
    assert metrics.totals("<html>") == {}


def test_requests_since_the_start_are_counted_or_not_known():
    assert metrics.finished(PAGE) == 4
    announced = "# TYPE vllm_omni:e2e_request_latency_s histogram\n"
    assert metrics.totals(announced) == {"server": Total(count=0, seconds=0)}
    assert metrics.finished(announced) == 0
    for unknown in ("", "<html>", announced + "vllm_omni:e2e_request_latency_s_count NaN\n"):
        assert metrics.finished(unknown) is None


@pytest.mark.parametrize("value", ["NaN", "+Inf", "-1", "many", "0x10", "1e999"])
def test_a_figure_that_is_none_is_not_read(value):
    page = PAGE.replace("40.5", value).replace(" 0.25", f" {value}")
    assert metrics.totals(page) == {}


def test_a_request_has_a_clock_only_where_it_was_alone():
    before = {"queue": Total(3, 0.25), "server": Total(4, 40.5)}
    after = {"queue": Total(4, 0.5), "server": Total(5, 42.5)}
    assert metrics.clocks_between(before, after) == {"queue": 0.25, "server": 2.0}
    assert metrics.requests_between(before, after) == 1
    assert metrics.requests_between(before, {"server": Total(7, 50.0)}) == 3
    assert metrics.clocks_between(before, {"server": Total(7, 50.0)}) == {}
    assert metrics.clocks_between({}, after) == {}
    assert metrics.requests_between({}, after) == 0


def test_the_profilers_parts_are_phases_if_they_can_be_true():
    parts = {"Z.forward": 9.0, "Z.text_encoder.forward": 0.5, "Z.diffuse": 7.0, "Z.vae.decode": 1.0, "odd": 3.0}
    assert metrics.phases(parts, 9.5) == {"text_encode": 0.5, "denoise": 7.0, "vae_decode": 1.0}
    assert metrics.phases(parts, 8.0) == {}, "more than the whole"
    assert metrics.phases({"Z.diffuse": -1.0}, 8.0) == {}
    assert metrics.phases({"Z.diffuse": float("nan")}, 8.0) == {}


@pytest.mark.parametrize(
    ("said", "is_bytes"),
    [(1.5, 3 << 19), (None, None), (0.0, None), (-5.0, None), (float("inf"), None), (1e30, None)],
)
def test_peak_memory_is_mebibytes(said, is_bytes):
    assert metrics.peak_bytes(said) == is_bytes


def test_a_part_that_one_round_lacks_is_left_out_of_all():
    whole = Round(1.0, {"denoise": 0.7, "vae_decode": 0.2}, None, "")
    rounds = (whole, structs.replace(whole, phases_s={"denoise": 0.8}))
    assert [one.phases_s for one in metrics.same_phases(rounds)] == [{"denoise": 0.7}, {"denoise": 0.8}]
    assert metrics.same_phases((whole, structs.replace(whole, phases_s={})))[0].phases_s == {}
    assert metrics.same_phases(()) == ()


# ---- its log -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "backends"),
    [
        ("INFO Resolved diffusion attention backend 'SAGE_ATTN' for role='self' via x\n" * 4, ("SAGE_ATTN",)),
        ("Resolved diffusion attention backend 'A' for role='self' (role_category='b') via x", ("A",)),
        ("Defaulting to diffusion attention backend SDPA", ("TORCH_SDPA",)),
        (
            "Using diffusion attention backend 'TORCH_SDPA'\nDefaulting to diffusion attention backend SDPA",
            ("TORCH_SDPA",),
        ),
        (
            "Defaulting to diffusion attention backend TRTLLM_ATTN\n"
            "Resolved diffusion attention backend 'FLASH_ATTN' for role='self' via x\n"
            "Resolved diffusion attention backend 'TORCH_SDPA' for role='cross' via x",
            ("FLASH_ATTN", "TORCH_SDPA"),
        ),
        ("Resolved diffusion attention backend '../x' for role='self'", ()),
        ("", ()),
    ],
)
def test_the_resolved_attention_is_read_from_the_log_of_every_version(text, backends):
    assert log.resolved_backends(text) == backends


def test_attention_that_is_not_the_variants_is_an_error_of_the_variant():
    line = "Resolved diffusion attention backend '{}' for role='self' via platform default"
    assert log.check_backend(BF16, line.format("TORCH_SDPA")) == "TORCH_SDPA"
    assert log.check_backend(CATALOG.variant("bf16-sage"), line.format("SAGE_ATTN")) == "SAGE_ATTN"
    with pytest.raises(MeasurementError, match="asked for attention backend TORCH_SDPA, the server resolved"):
        log.check_backend(BF16, line.format("FLASH_ATTN"))
    with pytest.raises(MeasurementError, match="does not say which attention backend"):
        log.check_backend(BF16, "nothing of it")


def test_a_version_that_is_not_vllms_is_in_the_log():
    assert log.own_version(" --> vLLM-Omni version 0.24.0\n --> vLLM version 0.26.1") == "0.24.0"
    assert log.own_version("vLLM API server version 0.30.0") == ""


# ---- how it is started -------------------------------------------------------


def words(name: str, *flags: str) -> list[str]:
    return launch.command("vllm", "MODEL", CATALOG.variant(name), flags, 9)


def test_the_command_is_the_published_one():
    assert words("bf16") == ["vllm", "serve", "MODEL", "--omni", "--host", "127.0.0.1", "--port", "9"]
    assert words("modelopt-full") == words("bf16"), "its own configuration says how it is quantised"
    assert words("online-fp8-sage", "--x")[8:] == ["--quantization-config", '{"method":"fp8"}', "--x"]
    only = structs.replace(CATALOG.variant("online-fp8"), text_encoder_weight_dtype="default")
    assert launch.command("v", "M", only, (), 9)[8:] == [
        "--quantization-config",
        '{"transformer":{"method":"fp8"},"text_encoder":null}',
    ]


def test_a_path_to_it_is_meant_from_here():
    assert launch.command("bin/vllm", "M", BF16, (), 9)[0] == str(Path.cwd() / "bin" / "vllm")


@pytest.mark.parametrize(
    ("variant", "backend"), [("bf16", "TORCH_SDPA"), ("bf16-sage", "SAGE_ATTN"), ("modelopt-full-sage", "SAGE_ATTN")]
)
def test_attention_is_chosen_and_no_encoded_prompt_kept(variant, backend):
    assert launch.environment_of(CATALOG.variant(variant)) == {
        "DIFFUSION_ATTENTION_BACKEND": backend,
        "OMNI_DIFFUSION_PROMPT_EMBED_CACHE": "0",
    }


@pytest.mark.parametrize(
    ("variant", "flag", "says"),
    [
        ("bf16", "--port=1", "--port is set here already"),
        ("bf16", "--host", "--host is set here already"),
        ("bf16", "--quantization", "--quantization would make bf16 another variant"),
        ("online-fp8", "--diffusion-quantization-config={}", "would make online-fp8 another variant"),
        ("modelopt-full", "--quantization-config={}", ""),
        ("bf16", "--gpu-memory-utilization=0.9", ""),
    ],
)
def test_flags_that_would_make_it_something_else_are_refused(variant, flag, says):
    if not says:
        assert words(variant, flag)[-1] == flag
        return
    with pytest.raises(UnsupportedError, match=says):
        words(variant, flag)


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("nvfp4", {}, "names single files"),
        ("fp8-cast", {"repository": "a/b"}, "casts its weights to fp8_e4m3fn"),
        ("bf16", {"lora": "x.safetensors"}, "has a LoRA"),
        ("bf16", {"attention": "flex"}, "no attention backend for 'flex'"),
    ],
)
def test_a_variant_that_it_cannot_be_is_refused(name, changed, says):
    with pytest.raises(UnsupportedError, match=says):
        launch.check_variant(structs.replace(CATALOG.variant(name), **changed))


def test_all_variants_of_the_two_passes_can_be_served():
    chosen = CATALOG.select(["@pass-a", "@pass-b"])
    assert len(chosen) == 13
    for variant in chosen:
        launch.check_variant(variant)


def test_a_pipeline_in_the_model_sets_folder_comes_before_the_hub(tmp_path):
    full, attention = CATALOG.variant("modelopt-full"), CATALOG.variant("modelopt-attn-only")
    assert pipeline.model_of(BF16, "official", None) == "Tongyi-MAI/Z-Image-Turbo"
    assert pipeline.model_of(full, "official", tmp_path) == "bahadirakdemir/Z-Image-Turbo-FP8-full"
    with pytest.raises(UnsupportedError, match=f"searched {tmp_path}/Z-Image-Turbo-FP8-attn-only") as caught:
        pipeline.model_of(attention, "official", tmp_path)
    assert "DIR/Z-Image-Turbo-FP8-attn-only" in caught.value.mend
    for name in ("Z-Image-Turbo", "Z-Image-Turbo-FP8-attn-only"):
        (tmp_path / name).mkdir()
        assert pipeline.model_of(BF16, "official", tmp_path) != str(tmp_path / name), "no pipeline in it yet"
        (tmp_path / name / "model_index.json").write_text("{}")
    assert pipeline.model_of(BF16, "official", tmp_path) == str(tmp_path / "Z-Image-Turbo")
    assert pipeline.model_of(attention, "synthetic-tiny", tmp_path) == str(tmp_path / "Z-Image-Turbo-FP8-attn-only")


def test_the_hubs_weights_never_bear_the_name_of_a_synthetic_set(tmp_path):
    with pytest.raises(UnsupportedError, match="no whole pipeline of the model set 'synthetic-tiny'") as caught:
        pipeline.model_of(BF16, "synthetic-tiny", tmp_path)
    assert "--zimage-models=official" in caught.value.mend
