"""Attention backends and compiled blocks: what a variant's table asks for happens, or is refused by name."""

from __future__ import annotations

import os
import shutil

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from torch import nn

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.acceleration import compile_blocks, compiling
from pytest_zimage.checkpoints.attention import FusedAttention
from pytest_zimage.checkpoints.building import build_transformer
from pytest_zimage.checkpoints.flops import transformer_flops
from pytest_zimage.checkpoints.synthetic.ensure import set_dims
from pytest_zimage.errors import UnsupportedError

pytestmark = pytest.mark.usefixtures("attention_backend_kept")

CATALOG = load_catalog()
TINY = set_dims("synthetic-tiny", CATALOG)


def built(**fields):
    import msgspec

    variant = msgspec.structs.replace(CATALOG.variant("bf16"), **fields)
    return build_transformer(TINY, variant, torch.device("cpu"))


def test_every_attention_gets_the_backend():
    backends = {m.backend for m in built(attention="_native_math").modules() if isinstance(m, FusedAttention)}
    assert backends == {AttentionBackendName._NATIVE_MATH}


def test_native_is_left_to_torch():
    backends = {m.backend for m in built().modules() if isinstance(m, FusedAttention)}
    assert backends == {None}


def test_diffusers_own_attention_gets_it_too():
    transformer = built(attention="_native_math", kernels="plain")
    backends = {block.attention.processor._attention_backend for block in transformer.layers}
    assert backends == {AttentionBackendName._NATIVE_MATH}


@pytest.mark.parametrize(
    ("name", "says"), [("flash", "flash-attn"), ("sage", "sageattention"), ("falsh", "must be one of the following")]
)
def test_a_backend_that_is_not_there_is_refused(name, says):
    with pytest.raises(UnsupportedError, match=says) as caught:
        built(attention=name)
    assert "[variants.bf16]" in caught.value.mend


class FusedBlock(nn.Module):
    """Named as the real one, and with a graph break."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return x + 1


def test_a_graph_break_is_an_error_not_a_slower_image():
    network = nn.Sequential(FusedBlock())
    compile_blocks(network)
    with pytest.raises(UnsupportedError, match="gave up on a transformer block") as caught, compiling("bf16-compile"):
        network(torch.zeros(2))
    assert "compile = false in [variants.bf16-compile]" in caught.value.mend


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler on the CPU")
def test_a_compiled_block_computes_the_same(monkeypatch, tmp_path):
    transformer = built().to(torch.float32).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in transformer.parameters():
            weight.normal_(0, 0.05)
    transformer.compute_dtype = torch.float32
    transformer.t_embedder.dtype = torch.float32
    latents, caption = [torch.randn(16, 1, 8, 8)], [torch.randn(20, TINY.text_encoder["hidden_size"])]
    inputs = (latents, torch.tensor([0.5]), caption)
    # As `compile_cache` has a worker do it.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with torch.inference_mode(), compiling("bf16-compile"):
        expected = transformer(*inputs, return_dict=False)[0][0]
        compile_blocks(transformer)
        found = transformer(*inputs, return_dict=False)[0][0]
    assert os.listdir(tmp_path), "nothing was compiled"
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_operations_of_an_image_are_what_torch_counts():
    """torch's own counter sees products; inside the CPU's fused attention only from 2.15 on, so none is fused here."""
    from torch.utils.flop_counter import FlopCounterMode

    transformer = built(kernels="plain").to(torch.bfloat16).to_empty(device="cpu")
    transformer.set_attention_backend("_native_math")
    workload = CATALOG.workload("turbo-tiny")
    latents = [torch.zeros(16, 1, workload.height // 8, workload.width // 8, dtype=torch.bfloat16)]
    caption = [torch.zeros(20, TINY.text_encoder["hidden_size"], dtype=torch.bfloat16)]
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        transformer(latents, torch.tensor([0.5]), caption)
    counted = transformer_flops(transformer.config, workload, caption_tokens=20)
    assert counted == pytest.approx(workload.steps * counter.get_total_flops(), rel=0.01)


def test_a_full_size_image_is_about_half_a_petaflop():
    """6.15e9 parameters x 4 160 tokens x 8 steps would be 0.41 PFLOP, and attention 0.07; but two refiners of 0.18e9
    see the caption alone, and the modulation of 32 blocks one vector."""
    config = built().config
    full = {**dict(config), **set_dims("synthetic-full", CATALOG).transformer}
    workload = CATALOG.workload("turbo-1024")
    assert transformer_flops(type("Config", (), full), workload, 40) == pytest.approx(0.445e15, rel=0.01)
