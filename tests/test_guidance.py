"""Workloads with guidance: a negative prompt, two forwards a step; and those of the published studies."""

from __future__ import annotations

import pytest
import torch
from msgspec import structs
from tiny_files import CATALOG, engine, silent

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.flops import transformer_flops
from pytest_zimage.engines.protocol import Draw, DrawImages, ImageJob
from pytest_zimage.errors import CatalogError, MeasurementError

GUIDED = """
[workloads.mine]
title = "mine"
width = 64
height = 64
steps = 2
sampler = "euler"
schedule = "simple"
shift = 3.0
guidance = 2.0
seed = 7
prompt = "a cat"
negative_prompt = "a dog"
"""


def drawn(ready):
    (image,) = ready.draw(Draw(1), silent).rounds
    return image


def test_two_forwards_a_step_are_counted_in_one_call():
    ready = engine("bf16", "base-tiny", width=64, height=64)
    image = drawn(ready)
    assert image.forwards == 8
    assert [name for name in image.phases_s if name.startswith("step_")] == [f"step_{i}" for i in range(1, 5)]


def test_the_negative_prompt_and_the_guidance_change_the_image():
    ready = engine("bf16", "base-tiny", width=64, height=64)
    first = drawn(ready)
    assert drawn(ready).pixels_sha256 == first.pixels_sha256
    for changed in ({"negative_prompt": ""}, {"negative_prompt": "a photograph"}, {"guidance": 3.0}):
        other = engine("bf16", "base-tiny", width=64, height=64, **changed)
        assert drawn(other).pixels_sha256 != first.pixels_sha256, changed


def test_what_is_drawn_is_the_formula(monkeypatch):
    """v + g (v - v_negative), of two forwards computed one by one."""
    ready = engine("bf16", "base-tiny", width=64, height=64, steps=1)
    pipeline = ready.pipeline
    seen = []
    real, uncounted = pipeline.transformer.forward, ready._loaded.forwards._forward

    def forward(latents, timestep, prompts, **named):
        results = real(latents, timestep, prompts, **named)
        alone = [uncounted([latents[i]], timestep[i : i + 1], [prompts[i]], **named)[0][0] for i in range(len(latents))]
        seen.append((results[0], alone))
        return results

    monkeypatch.setattr(pipeline.transformer, "forward", forward)
    stepped = []
    monkeypatch.setattr(pipeline.scheduler, "step", lambda v, t, x, **_: (stepped.append(v), (x,))[1])
    ready.draw(Draw(1), silent)
    (batched, alone), (velocity,) = seen[0], stepped
    for one, other in zip(batched, alone, strict=True):
        assert (one - other).norm() / other.norm() < 0.02
    expected = batched[0].float() + 4.0 * (batched[0].float() - batched[1].float())
    assert torch.allclose(-velocity[0], expected.squeeze(1), atol=1e-5)


def test_quality_images_are_drawn_with_the_negative_prompt_too(tmp_path):
    """Another prompt takes the place of the workload's; what it is led away from stays."""
    digests = set()
    for number, negative in enumerate(("a dog", "")):
        ready = engine("bf16", "base-tiny", negative_prompt=negative)
        job = ImageJob("cat", "a cat", 3, str(tmp_path / f"{number}.png"))
        (image,) = ready.draw_images(DrawImages((job,), 64, 64), silent).images
        digests.add(image.pixels_sha256)
    assert len(digests) == 2


def test_another_number_of_forwards_is_no_measurement():
    ready = engine("bf16", "base-tiny", width=64, height=64)
    forwards = ready._loaded.forwards
    ready.pipeline.transformer.register_forward_pre_hook(lambda *_: setattr(forwards, "count", forwards.count + 2))
    with pytest.raises(MeasurementError, match="bf16: 16 transformer forwards for 4 steps of 2"):
        ready.draw(Draw(1), silent)


def test_operations_count_every_forward_at_the_longer_caption():
    ready = engine("bf16", "base-tiny", width=64, height=64)
    plain = engine("bf16", "base-tiny", width=64, height=64, guidance=0.0, negative_prompt="")
    long = engine("bf16", "base-tiny", width=64, height=64, negative_prompt="dog " * 400)
    flops = [each._loaded.flops_per_image() for each in (plain, ready, long)]
    assert flops[1] == 2 * flops[0]
    assert flops[2] > 2 * flops[1]
    config = plain.pipeline.transformer.config
    workload = CATALOG.workload("base-1024")
    once = structs.replace(workload, guidance=0.0)
    assert transformer_flops(config, workload, 64) == 2 * transformer_flops(config, once, 64)


# ---- catalogue -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GUIDED.replace("guidance = 2.0", "guidance = 0.0"), r"\[workloads.mine\]: key 'negative_prompt': without"),
        (GUIDED.replace("guidance = 2.0", "guidance = -1.0"), "key 'guidance': -1.0 is not a finite number"),
        (GUIDED.replace("guidance = 2.0", "guidance = inf"), "key 'guidance': inf is not a finite number"),
        (GUIDED.replace("guidance = 2.0", "guidance = nan"), "key 'guidance': nan is not a finite number"),
    ],
)
def test_a_negative_prompt_on_turbo_is_refused(tmp_path, text, says):
    (tmp_path / "mine.toml").write_text(text)
    with pytest.raises(CatalogError, match=says):
        load_catalog([tmp_path / "mine.toml"])


def test_guidance_without_a_negative_prompt_is_led_away_from_nothing(tmp_path):
    (tmp_path / "mine.toml").write_text(GUIDED.replace('negative_prompt = "a dog"\n', ""))
    workload = load_catalog([tmp_path / "mine.toml"]).workload("mine")
    assert (workload.negative_prompt, workload.forwards_per_step) == ("", 2)


@pytest.mark.parametrize(
    ("lora", "says"),
    [
        ("lora_strength = 0.5", "key 'lora_strength': there is no key 'lora'"),
        ('lora = "x.safetensors"\nlora_strength = inf', "key 'lora_strength': inf is not finite"),
        ('lora = "../x.safetensors"', "key 'lora': '../x.safetensors' is not the plain name"),
        ('lora = "x.pt"', "key 'lora': 'x.pt' is not the plain name of a .safetensors file"),
    ],
)
def test_a_loras_keys_are_checked(tmp_path, lora, says):
    table = f'[variants.x]\ntitle = "x"\ntransformer = "a.safetensors"\ntext_encoder = "b.safetensors"\n{lora}\n'
    (tmp_path / "mine.toml").write_text(table)
    with pytest.raises(CatalogError, match=says):
        load_catalog([tmp_path / "mine.toml"])


def test_the_published_workloads():
    """published/vllm_omni_fp8.json and nvfp4_mixed.json; the base model's as its model card draws."""
    table = {
        name: (w.width, w.height, w.steps, w.sampler, w.guidance, w.seed, w.forwards_per_step)
        for name, w in CATALOG.workloads.items()
    }
    assert table["turbo-1024x512"] == (1024, 512, 8, "euler", 0.0, 1235, 1)
    assert table["mixed-demo"] == (1024, 1536, 9, "euler", 0.0, 920698660737993, 1)
    assert table["base-1024"] == (1024, 1024, 28, "euler", 4.0, 42, 2)
    own = CATALOG.prompt_set("vllm-3x1")
    assert CATALOG.workload("turbo-1024x512").prompt == own.prompts[0].text
    assert (own.width, own.height) == (1024, 512)


@pytest.mark.parametrize(("name", "steps"), [("turbo-tiny-wide", 8), ("mixed-tiny", 9), ("base-tiny", 4)])
def test_each_tiny_twin_draws(name, steps):
    workload = CATALOG.workload(name)
    twin = {"turbo-tiny-wide": "turbo-1024x512", "mixed-tiny": "mixed-demo", "base-tiny": "base-1024"}[name]
    large = CATALOG.workload(twin)
    same = ("sampler", "schedule", "shift", "guidance", "seed", "prompt", "negative_prompt")
    assert [getattr(workload, key) for key in same] == [getattr(large, key) for key in same]
    assert workload.width * large.height == workload.height * large.width
    assert drawn(engine("bf16", name)).forwards == steps * workload.forwards_per_step
