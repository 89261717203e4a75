"""GGUF files: block types written by hand, read through the `gguf` package and dequantised by diffusers."""

from __future__ import annotations

import builtins
import struct

import pytest
import torch
from safetensors.torch import load_file
from tiny_files import CATALOG, engine, files_of, latents, load, relative, silent

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.gguf_header import read_gguf_header
from pytest_zimage.checkpoints.synthetic.gguf_types import BLOCKS, GgufBlocks
from pytest_zimage.engines.protocol import Draw
from pytest_zimage.errors import CatalogError, CheckpointError, MissingFileError, UnsupportedError

VARIANTS = ("gguf-q8_0", "gguf-q4_k")


@pytest.fixture
def gguf():
    return pytest.importorskip("gguf", reason="the package gguf is not installed: pip install 'pytest-zimage[gguf]'")


@pytest.fixture(scope="module")
def q8_0():
    return files_of("gguf-q8_0")["transformer"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


# ---- blocks ---------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "error"), [("Q8_0", 0.006), ("Q5_0", 0.05), ("Q4_K", 0.09)])
def test_blocks_are_what_two_other_readers_take_them_for(gguf, kind, error):
    """`gguf`'s own dequantisation in numpy and diffusers' in torch agree, and with the values."""
    from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor
    from gguf.quants import dequantize

    from pytest_zimage.checkpoints.gguf_linear import gguf_parameter

    weight = random(8, 512)
    weight[0] = 0
    data = GgufBlocks(kind).encode("x.weight", weight)["x.weight"]
    assert data.shape == (8, 512 // BLOCKS[kind][0] * BLOCKS[kind][1])
    theirs = torch.from_numpy(dequantize(data.numpy(), gguf.GGMLQuantizationType[kind]))
    ours = dequantize_gguf_tensor(gguf_parameter(data, kind)).float()
    assert relative(ours, theirs) < 1e-3
    assert relative(theirs, weight) < error
    assert not theirs[0].any(), "a row of zeros stays zeros"


def test_columns_that_no_large_block_divides_fall_back():
    assert GgufBlocks("Q4_K").type_of((8, 384)) == "Q5_0"
    assert GgufBlocks("Q4_K").type_of((8, 3840)) == "Q4_K"


# ---- files -------------------------------------------------------------------------


def test_the_header_is_told_as_that_of_any_checkpoint(gguf, q8_0):
    header = read_gguf_header(q8_0)
    plain = load_file(files_of("bf16")["transformer"])
    assert set(header.tensors) == set(plain)
    layer = header.tensors["layers.0.attention.qkv.weight"]
    assert (layer.dtype, layer.shape) == ("U8", (1152, 384 // 32 * 34))
    assert header.tensors["x_embedder.weight"].dtype == "BF16"
    assert header.tensors["x_embedder.bias"].dtype == "F32"
    assert max(tensor.end for tensor in header.tensors.values()) == header.file_bytes == q8_0.stat().st_size


@pytest.mark.parametrize(
    ("name", "kinds", "nearest", "farthest"),
    [("gguf-q8_0", {"gguf_q8_0": 23}, 0.003, 0.012), ("gguf-q4_k", {"gguf_q4_k": 7, "gguf_q5_0": 16}, 0.03, 0.08)],
)
def test_a_gguf_variant_draws(gguf, name, kinds, nearest, farthest):
    loaded = load(name)
    assert {kind: loaded.tensors[kind] for kind in kinds} == kinds
    assert loaded.compute == {"cast": 28, "plain": 14, "weight-only": 23}
    assert loaded.notes == ()
    assert nearest < relative(latents(loaded), latents(load("bf16"))) < farthest


def test_separate_projections_are_rows_of_the_fused_one(gguf):
    fused, split = (load("gguf-q4_k", kernels=kernels).pipeline.transformer for kernels in ("comfy", "plain"))
    parts = [split.get_submodule(f"layers.0.attention.to_{part}").weight for part in "qkv"]
    whole = fused.get_submodule("layers.0.attention.qkv").weight
    assert {part.quant_type for part in parts} == {whole.quant_type}
    assert torch.equal(torch.cat([part.as_tensor() for part in parts]), whole.as_tensor())


def test_the_worker_draws_and_each_dequantisation_is_counted(gguf):
    ready = engine("gguf-q8_0", width=64, height=64)
    assert ready.draw(Draw(1), silent).rounds[0].forwards == 8
    counts = ready.trace().dispatch
    assert counts["dequantize_gguf: torch"] == counts["linear: weight-only"] == 8 * 23
    assert "linear: not observed" not in counts


# ---- refusals ------------------------------------------------------------------------


def test_without_the_package_it_says_what_to_install(q8_0, monkeypatch):
    real = builtins.__import__

    def missing(name, *rest):
        if name == "gguf":
            raise ImportError("No module named 'gguf'")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UnsupportedError, match="read with the package 'gguf'") as caught:
        load("gguf-q8_0")
    assert caught.value.mend == "pip install 'pytest-zimage[gguf]'"


def rewritten(source, target, old: bytes, new: bytes):
    data = source.read_bytes()
    assert data.count(old) >= 1
    assert len(old) == len(new)
    target.write_bytes(data.replace(old, new, 1))
    return target


def test_another_architecture_is_refused_by_name(gguf, q8_0, tmp_path):
    path = rewritten(q8_0, tmp_path / "other.gguf", b"lumina2", b"hunyuan")
    with pytest.raises(UnsupportedError, match=r"other\.gguf: .* architecture 'hunyuan'; Z-Image's is 'lumina2'"):
        load("gguf-q8_0", {"transformer": path})


def test_a_file_that_names_no_architecture_is_refused(gguf, q8_0, tmp_path):
    path = rewritten(q8_0, tmp_path / "none.gguf", b"general.architecture", b"general.archaeology_")
    with pytest.raises(UnsupportedError, match="names no architecture"):
        load("gguf-q8_0", {"transformer": path})


def test_tensors_of_another_network_under_the_right_architecture_are_named(gguf, q8_0, tmp_path):
    path = rewritten(q8_0, tmp_path / "odd.gguf", b"layers.0.attention.out.weight", b"blocks.0.attention.out.weight")
    with pytest.raises(CheckpointError, match=r"has tensors that the network does not: 'blocks.0.attention.out'"):
        load("gguf-q8_0", {"transformer": path})


def test_a_type_that_diffusers_does_not_dequantise_is_named(gguf, q8_0, tmp_path):
    name = b"layers.0.attention.out.weight"
    data = bytearray(q8_0.read_bytes())
    at = data.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", data, at) == (8,)
    # Q8_1, whose blocks are longer: what follows is out of step by then, but the type is refused first.
    struct.pack_into("<I", data, at, int(gguf.GGMLQuantizationType.TQ1_0))
    path = tmp_path / "rare.gguf"
    path.write_bytes(data)
    with pytest.raises((UnsupportedError, CheckpointError)) as caught:
        load("gguf-q8_0", {"transformer": path})
    assert caught.value.mend


@pytest.mark.parametrize("share", [0.9, 0.0005])
def test_a_truncated_file_is_refused(gguf, q8_0, tmp_path, share):
    path = tmp_path / "short.gguf"
    data = q8_0.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(CheckpointError, match=r"short\.gguf: (truncated|not a sound GGUF file)"):
        load("gguf-q8_0", {"transformer": path})


def test_something_else_under_the_name_is_refused(gguf, tmp_path):
    path = tmp_path / "text.gguf"
    path.write_text("this is no model at all, only some text that is long enough")
    with pytest.raises(CheckpointError, match="not a sound GGUF file"):
        load("gguf-q8_0", {"transformer": path})


def test_a_missing_file_is_missing(tmp_path):
    with pytest.raises(MissingFileError, match=r"away\.gguf: no such file"):
        load("gguf-q8_0", {"transformer": tmp_path / "away.gguf"})


def test_only_a_transformer_may_be_a_gguf_file(tmp_path):
    assert {CATALOG.variant(name).transformer.rpartition(".")[2] for name in VARIANTS} == {"gguf"}
    table = '[variants.x]\ntitle = "x"\ntransformer = "a.safetensors"\ntext_encoder = "b.gguf"\n'
    (tmp_path / "mine.toml").write_text(table)
    with pytest.raises(CatalogError, match=r"'text_encoder': 'b.gguf' is not the plain name of a .safetensors"):
        load_catalog([tmp_path / "mine.toml"])


def test_a_safetensors_file_cannot_claim_to_hold_gguf(tmp_path):
    from tiny_files import altered

    def change(tensors, metadata):
        metadata["_quantization_metadata"] = '{"layers": {"layers.0.attention.out": {"format": "gguf"}}}'

    path = altered(files_of("bf16")["transformer"], tmp_path / "claims.safetensors", change)
    with pytest.raises(CheckpointError, match="unknown quantisation format 'gguf'"):
        load("bf16", {"transformer": path})
