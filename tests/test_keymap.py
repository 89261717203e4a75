"""Names of the same tensor on both sides, checked at the real dimensions against the real classes on meta."""

from __future__ import annotations

import math

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints import keymap
from pytest_zimage.checkpoints.networks import network_shapes
from pytest_zimage.errors import CheckpointError


@pytest.fixture(scope="module")
def dims():
    return load_catalog().models["official"]


def parameters(shapes):
    return sum(math.prod(shape) for shape in shapes.values())


def test_transformer_at_real_dims(dims):
    shapes = network_shapes("transformer", dims)
    assert len(shapes) == 521
    assert 2 * parameters(shapes) == 12_309_817_472

    comfy, parts = {}, {}
    for name, shape in shapes.items():
        fused = keymap.fused_name(name)
        if fused is None:
            ours = keymap.transformer_to_comfy(name)
            assert keymap.transformer_to_diffusers(ours) == name
            comfy[ours] = shape
        else:
            parts.setdefault(fused[0], {})[fused[1]] = (name, shape)
        assert keymap.transformer_to_diffusers(name) == name, "diffusers' own names pass through"
    for fused, three in parts.items():
        rows = sum(shape[0] for _, shape in three.values())
        comfy[fused] = (rows, 3840)
        assert [part.name for part in keymap.split_qkv(fused, rows)] == [three[i][0] for i in range(3)]
        assert keymap.transformer_to_diffusers(fused) == fused, "the fused projection keeps its name"
    assert len(comfy) == 453
    assert 2 * parameters(comfy) == 12_309_817_472
    assert keymap.is_diffusers_transformer(shapes)
    assert not keymap.is_diffusers_transformer(comfy)


@pytest.mark.parametrize(
    ("comfy", "diffusers"),
    [
        ("x_embedder.weight", "all_x_embedder.2-1.weight"),
        ("final_layer.linear.bias", "all_final_layer.2-1.linear.bias"),
        ("final_layer.adaLN_modulation.1.weight", "all_final_layer.2-1.adaLN_modulation.1.weight"),
        ("layers.29.attention.out.weight", "layers.29.attention.to_out.0.weight"),
        ("layers.29.attention.out", "layers.29.attention.to_out.0"),
        ("context_refiner.1.attention.q_norm.weight", "context_refiner.1.attention.norm_q.weight"),
        ("noise_refiner.0.attention.k_norm.weight", "noise_refiner.0.attention.norm_k.weight"),
        ("t_embedder.mlp.0.weight", "t_embedder.mlp.0.weight"),
        ("layers.0.adaLN_modulation.0.bias", "layers.0.adaLN_modulation.0.bias"),
        ("cap_pad_token", "cap_pad_token"),
    ],
)
def test_transformer_names(comfy, diffusers):
    assert keymap.transformer_to_diffusers(comfy) == diffusers
    assert keymap.transformer_to_comfy(diffusers) == comfy


def test_tensors_that_the_modules_do_not_have():
    assert keymap.transformer_to_diffusers("norm_final.weight") is None
    assert keymap.text_encoder_to_transformers("lm_head.weight") is None


def test_split_of_the_fused_projection():
    q, k, v = keymap.split_qkv("layers.3.attention.qkv.weight", 11520)
    assert q == ("layers.3.attention.to_q.weight", 0, 3840)
    assert k == ("layers.3.attention.to_k.weight", 3840, 7680)
    assert v == ("layers.3.attention.to_v.weight", 7680, 11520)
    assert keymap.split_qkv("layers.3.attention.qkv", 3)[2] == ("layers.3.attention.to_v", 2, 3)
    assert keymap.fused_name("layers.3.attention.to_v.weight") == ("layers.3.attention.qkv.weight", 2)
    assert keymap.is_fused_qkv("layers.3.attention.qkv")
    assert not keymap.is_fused_qkv("layers.3.attention.out")


@pytest.mark.parametrize(
    ("name", "rows"), [("layers.3.attention.qkv", 100), ("layers.3.attention.qkv", 0), ("a.out", 3)]
)
def test_what_does_not_split(name, rows):
    with pytest.raises(CheckpointError, match=name):
        keymap.split_qkv(name, rows)


def test_text_encoder_at_real_dims(dims):
    shapes = network_shapes("text_encoder", dims)
    assert len(shapes) == 398
    assert parameters(shapes) == 4_022_468_096
    for name in shapes:
        assert keymap.text_encoder_to_transformers(keymap.text_encoder_to_comfy(name)) == name
    assert keymap.text_encoder_to_comfy("layers.0.mlp.up_proj.weight") == "model.layers.0.mlp.up_proj.weight"


def test_vae_at_real_dims(dims):
    shapes = network_shapes("vae", dims)
    assert len(shapes) == 244
    assert parameters(shapes) == 83_819_683
    ldm = {}
    for name, shape in shapes.items():
        there = keymap.vae_to_ldm(name, 4)
        assert keymap.vae_to_diffusers(there.name, 4) == (name, there.pointwise)
        assert there.pointwise == (".attentions." in name and len(shape) == 2)
        assert keymap.vae_to_diffusers(name, 4) == (name, False), "diffusers' own names pass through"
        ldm[there.name] = shape
    assert len(ldm) == 244
    assert not [name for name in ldm if "_blocks." in name or "resnets" in name or "attentions" in name]


@pytest.mark.parametrize(
    ("ldm", "diffusers", "pointwise"),
    [
        ("encoder.conv_in.weight", "encoder.conv_in.weight", False),
        ("encoder.down.1.block.0.nin_shortcut.weight", "encoder.down_blocks.1.resnets.0.conv_shortcut.weight", False),
        ("encoder.down.2.downsample.conv.bias", "encoder.down_blocks.2.downsamplers.0.conv.bias", False),
        ("decoder.up.0.block.2.conv1.weight", "decoder.up_blocks.3.resnets.2.conv1.weight", False),
        ("decoder.up.3.upsample.conv.weight", "decoder.up_blocks.0.upsamplers.0.conv.weight", False),
        ("decoder.mid.attn_1.q.weight", "decoder.mid_block.attentions.0.to_q.weight", True),
        ("decoder.mid.attn_1.proj_out.weight", "decoder.mid_block.attentions.0.to_out.0.weight", True),
        ("decoder.mid.attn_1.q.bias", "decoder.mid_block.attentions.0.to_q.bias", False),
        ("encoder.mid.attn_1.norm.weight", "encoder.mid_block.attentions.0.group_norm.weight", False),
        ("encoder.mid.block_2.norm1.weight", "encoder.mid_block.resnets.1.norm1.weight", False),
        ("decoder.norm_out.bias", "decoder.conv_norm_out.bias", False),
    ],
)
def test_vae_names(ldm, diffusers, pointwise):
    assert keymap.vae_to_diffusers(ldm, 4) == (diffusers, pointwise)
    assert keymap.vae_to_ldm(diffusers, 4) == (ldm, pointwise)


def test_unknown_names_come_back_unchanged():
    for name in ("layers.0.attention.odd.weight", "decoder.upper.1.x", "encoder.down.x.block", "quant_conv.weight"):
        assert keymap.transformer_to_diffusers(name) == name
        assert keymap.vae_to_diffusers(name, 4) == (name, False)
