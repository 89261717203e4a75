"""A LoRA beside quantised linears: what it adds, what it weighs, in whose naming it may come, and what is refused."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_files import altered, engine, files_of, latents, load, relative, silent
from torch import nn
from torch.nn import functional as F

from pytest_zimage.checkpoints.linears import WeightOnlyLinear
from pytest_zimage.checkpoints.lora import LowRankLinear, attach_lora
from pytest_zimage.engines.protocol import Draw
from pytest_zimage.errors import CheckpointError, UnsupportedError

NAME = "nvfp4-mixed-lora"
LAYER = "layers.0.attention.qkv"


@pytest.fixture(scope="module")
def lora():
    return files_of(NAME)["lora"]


@pytest.fixture(scope="module")
def drawn_bf16() -> torch.Tensor:
    return latents(load("bf16"))


# ---- what it does -----------------------------------------------------------


def test_it_takes_part_of_the_quantisation_error_away(lora, drawn_bf16):
    """In each weight, by the low-rank part of the error that it is; and so in the image."""
    weights, factors = load_file(files_of("bf16")["transformer"]), load_file(lora)
    transformer = load("nvfp4-mixed", kernels="comfy").pipeline.transformer
    for layer in ("layers.1.feed_forward.w2", "noise_refiner.0.attention.qkv"):
        weight = weights[f"{layer}.weight"].float()
        error = weight - transformer.get_submodule(layer).weight.dequantize().float()
        stem = f"diffusion_model.{layer}"
        rest = error - factors[f"{stem}.lora_up.weight"] @ factors[f"{stem}.lora_down.weight"]
        assert factors[f"{stem}.lora_down.weight"].shape == (32, weight.shape[1])
        assert 0.5 < rest.norm() / error.norm() < 0.95, layer
    without, repaired = (relative(latents(load(name)), drawn_bf16) for name in ("nvfp4-mixed", NAME))
    assert repaired < 0.96 * without


@pytest.mark.parametrize("strength", [0.0, 1.0, -0.5])
def test_the_product_stands_beside_the_quantised_one(lora, strength):
    loaded = load(NAME, lora_strength=strength)
    module = loaded.pipeline.transformer.get_submodule(LAYER)
    assert isinstance(module, LowRankLinear)
    assert isinstance(module.base, WeightOnlyLinear)
    factors = load_file(lora)
    up, down = (factors[f"diffusion_model.{LAYER}.lora_{part}.weight"] for part in ("up", "down"))
    x = torch.randn(5, 384, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.inference_mode():
        found, base = module(x).double(), module.base(x).double()
        expected = strength * (x.double() @ down.double().t()) @ up.double().t()
    if strength == 0:
        assert torch.equal(found, base)
    else:
        # The sum is rounded to bfloat16, of which the base is the larger part.
        assert (found - base - expected).abs().max() < 0.02 * base.abs().max()
        assert relative(found - base, expected) < 0.15


def test_strength_zero_draws_the_image_without_it():
    assert torch.equal(latents(load(NAME, lora_strength=0.0), 2), latents(load("nvfp4-mixed"), 2))


def test_it_is_counted_as_what_it_is(lora):
    without, loaded = load("nvfp4-mixed"), load(NAME)
    assert loaded.compute == {**without.compute, "low-rank": 42}
    assert loaded.tensors["bfloat16"] == without.tensors["bfloat16"] + 42
    elements = sum(tensor.numel() for tensor in load_file(lora).values())
    assert loaded.weight_bytes["bfloat16"] == without.weight_bytes["bfloat16"] + 2 * elements
    assert loaded.weight_bytes["nvfp4"] == without.weight_bytes["nvfp4"], "the quantised weights stay as they are"


def test_the_worker_draws_with_it_and_the_trace_shows_its_products():
    ready = engine(NAME, width=64, height=64)
    assert ready.draw(Draw(1), silent).rounds[0].forwards == 8
    counts = ready.trace().dispatch
    assert counts["linear: low-rank"] == 8 * 42
    assert counts["linear: weight-only"] == 8 * 21
    assert "linear: not observed" not in counts


# ---- namings ------------------------------------------------------------------


def written(tmp_path, tensors):
    path = tmp_path / "lora.safetensors"
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
    return path


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / 10


OUT, QKV = (random(384, 4, seed=1), random(4, 384, seed=2)), (random(1152, 4, seed=3), random(4, 384, seed=4))


def changed(path, kernels="comfy"):
    return latents(load("nvfp4-mixed", {"lora": path}, kernels=kernels), 2)


def comfy(tmp_path, out=OUT, qkv=QKV):
    pairs = {"layers.0.attention.out": out, "layers.1.attention.qkv": qkv}
    factors = {"up": 0, "down": 1}
    return written(
        tmp_path,
        {f"diffusion_model.{n}.lora_{f}.weight": pair[i] for n, pair in pairs.items() for f, i in factors.items()},
    )


def test_a_fused_pair_changes_separate_projections_alike(tmp_path):
    path = comfy(tmp_path)
    fused, separate = changed(path), changed(path, kernels="plain")
    assert relative(fused, latents(load("nvfp4-mixed"), 2)) > 0.02
    assert relative(separate, fused) < 0.01


def test_kohyas_names_and_alpha(tmp_path):
    expected = changed(comfy(tmp_path))
    tensors = {}
    for name, (up, down) in {"layers_0_attention_out": OUT, "layers_1_attention_qkv": QKV}.items():
        tensors[f"lora_unet_{name}.lora_up.weight"] = 2 * up
        tensors[f"lora_unet_{name}.lora_down.weight"] = down
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(2.0)
    assert torch.equal(changed(written(tmp_path, tensors)), expected), "alpha over rank is a half"


@pytest.mark.parametrize("prefix", ["transformer.", "base_model.model."])
@pytest.mark.parametrize("kernels", ["comfy", "plain"])
def test_diffusers_names_and_three_pairs_for_one_projection(tmp_path, prefix, kernels):
    expected = changed(comfy(tmp_path), kernels)
    tensors = {
        f"{prefix}layers.0.attention.to_out.0.lora_B.weight": OUT[0],
        f"{prefix}layers.0.attention.to_out.0.lora_A.weight": OUT[1],
    }
    for part, rows in zip("qkv", QKV[0].chunk(3), strict=True):
        tensors[f"{prefix}layers.1.attention.to_{part}.lora_B.default.weight"] = rows
        tensors[f"{prefix}layers.1.attention.to_{part}.lora_A.default.weight"] = QKV[1]
    assert torch.equal(changed(written(tmp_path, tensors), kernels), expected)


# ---- refusals -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda t: t.pop(f"diffusion_model.{LAYER}.lora_down.weight"),
            rf"'diffusion_model.{LAYER}.lora_up.weight' has no partner: the LoRA lacks the down factor of '{LAYER}'",
        ),
        (lambda t: t.pop(f"diffusion_model.{LAYER}.lora_up.weight"), "lacks the up factor"),
        (
            lambda t: t.update({"diffusion_model.layers.9.attention.out.alpha": torch.tensor(1.0)}),
            "lacks the up factor of 'layers.9.attention.out'",
        ),
        (
            lambda t: (
                t.update({f"diffusion_model.layers.7.attention.qkv.lora_{f}.weight": QKV[0] for f in ("up",)})
                or t.update({"diffusion_model.layers.7.attention.qkv.lora_down.weight": QKV[1]})
            ),
            "the LoRA is for 'layers.7.attention.qkv', which this transformer does not have",
        ),
        (
            lambda t: t.update({f"diffusion_model.{LAYER}.lora_down.weight": random(32, 512)}),
            rf"LoRA of '{LAYER}' changes a weight \[1152, 512\], the transformer's is \[1152, 384\]",
        ),
        (
            lambda t: t.update({f"diffusion_model.{LAYER}.lora_down.weight": random(16, 384)}),
            r"\[1152, 32\] and .*\[16, 384\] do not multiply",
        ),
        (
            lambda t: (
                t.update({"diffusion_model.layers.0.attention_norm1.lora_up.weight": random(384, 4)})
                or t.update({"diffusion_model.layers.0.attention_norm1.lora_down.weight": random(4, 384)})
            ),
            "'layers.0.attention_norm1', which is no linear but NormWeight",
        ),
        (lambda t: t.update({"x.weight": random(2, 2)}), "tensor 'x.weight' is none that a LoRA has"),
        (
            lambda t: t.update({f"diffusion_model.{LAYER}.lora_up.weight": torch.full((1152, 32), float("nan"))}),
            "holds NaN or infinite values",
        ),
        (
            lambda t: t.update({f"diffusion_model.{LAYER}.lora_up.weight": torch.ones(1152, 32, dtype=torch.int8)}),
            r"expected a matrix of F32, F16, BF16, found I8 \[1152, 32\]",
        ),
        (lambda t: [t.pop(name) for name in list(t)], "has no tensors"),
    ],
)
def test_a_lora_that_does_not_fit_is_named(tmp_path, lora, change, says):
    path = altered(lora, tmp_path / "bad.safetensors", lambda tensors, _: change(tensors))
    with pytest.raises(CheckpointError, match=says) as caught:
        load("nvfp4-mixed", {"lora": path})
    assert str(path) in caught.value.message
    assert caught.value.mend


def test_a_layer_that_scales_its_input_first_is_refused(tmp_path):
    network = nn.Module()
    network.layer = WeightOnlyLinear(nn.Linear(8, 8, bias=False))
    network.layer.pre_quant_scale = torch.ones(8)
    path = written(tmp_path, {"layer.lora_up.weight": random(8, 2), "layer.lora_down.weight": random(2, 8)})
    with pytest.raises(UnsupportedError, match=r"'layer' scales its input .*pre_quant_scale"):
        attach_lora(network, path, 1.0, torch.float32, torch.device("cpu"))
    network.layer.pre_quant_scale = None
    attach_lora(network, path, 1.0, torch.float32, torch.device("cpu"))
    x = random(3, 8, seed=5)
    assert isinstance(network.layer, LowRankLinear)
    # A plain weight has no `dequantize` of its own that changes it.
    network.layer.base = nn.Linear(8, 8, bias=False)
    expected = F.linear(x, network.layer.base.weight + random(8, 2) @ random(2, 8))
    assert torch.allclose(network.layer(x), expected, atol=1e-6)
