"""From files to modules: every weight in its place, and one clear error for each thing wrong with a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import msgspec
import pytest
import torch
from diffusers import AutoencoderKL, ZImageTransformer2DModel
from drawing import latents, relative
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3Model

from pytest_zimage.catalog import ROLE_FOLDERS, load_catalog
from pytest_zimage.checkpoints import precision, reader
from pytest_zimage.checkpoints.attention import FusedAttention
from pytest_zimage.checkpoints.header import read_header
from pytest_zimage.checkpoints.linears import FastFp8Linear, QuantisedActivationsLinear, WeightOnlyLinear
from pytest_zimage.checkpoints.loader import load_pipeline
from pytest_zimage.checkpoints.reader import TensorReader
from pytest_zimage.checkpoints.synthetic.ensure import ensure_model_set
from pytest_zimage.engines.sampler import build_scheduler
from pytest_zimage.errors import CheckpointError, MissingFileError, UnsupportedError
from pytest_zimage.options import user_cache

CPU = torch.device("cpu")
CATALOG = load_catalog()
DIMS = CATALOG.models["synthetic-tiny"]
BF16 = "z_image_turbo_bf16.safetensors"
KIJAI = "z-image-turbo_fp8_scaled_e4m3fn_KJ.safetensors"
NVFP4 = "z_image_turbo_nvfp4.safetensors"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """The tiny set, in the cache that all tests share."""
    folder = user_cache() / "synthetic-tiny"
    ensure_model_set("synthetic-tiny", DIMS, folder)
    return folder


@pytest.fixture
def load(root, tmp_path):
    """Loads a variant; `transformer`, `text_encoder` and `vae` put another file in the place of its own."""

    def _load(name: str, *, files: dict[str, Path] | None = None, tokenizer: Path | None = None, **changed):
        variant = msgspec.structs.replace(CATALOG.variant(name), **changed)
        paths = {role: root / ROLE_FOLDERS[role][0] / file for role, file in variant.files().items()}
        scheduler = build_scheduler(CATALOG.workload("turbo-tiny"))
        return load_pipeline(variant, DIMS, {**paths, **(files or {})}, tokenizer or root / "tokenizer", scheduler, CPU)

    return _load


@pytest.fixture
def altered(root, tmp_path):
    """A copy of a transformer file after `change(tensors, metadata)`."""

    def _altered(file: str, change, role: str = "transformer") -> Path:
        source = root / ROLE_FOLDERS[role][0] / file
        tensors = load_file(source)
        with safe_open(source, framework="pt") as opened:
            metadata = dict(opened.metadata() or {})
        change(tensors, metadata)
        target = tmp_path / f"altered-{file}"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, target, metadata or None)
        return target

    return _altered


# ---- what is loaded -------------------------------------------------------


def test_unquantised_weights_equal_those_of_diffusers_own_reader(load, root, tmp_path) -> None:
    """An independent reading: `from_single_file` for transformer and VAE, `load_state_dict` for the text encoder."""
    pipeline = load("bf16", kernels="plain", vae_dtype="float32").pipeline
    transformer = ZImageTransformer2DModel(**DIMS.transformer)
    transformer.save_config(tmp_path / "transformer")
    pipeline.vae.save_config(tmp_path / "vae")
    theirs = ZImageTransformer2DModel.from_single_file(
        root / "diffusion_models" / BF16, config=str(tmp_path), subfolder="transformer", torch_dtype=torch.bfloat16
    )
    vae = AutoencoderKL.from_single_file(root / "vae/ae.safetensors", config=str(tmp_path), subfolder="vae")
    encoder = Qwen3Model(Qwen3Config(**DIMS.text_encoder)).to(torch.bfloat16)
    state = load_file(root / "text_encoders/qwen_3_4b.safetensors")
    encoder.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    for ours, other in ((pipeline.transformer, theirs), (pipeline.vae, vae), (pipeline.text_encoder, encoder)):
        expected = dict(other.named_parameters())
        found = dict(ours.named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert pipeline.text_encoder.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "compute", "held"),
    [
        ("bf16", {"plain": 37, "cast": 28}, {"bfloat16"}),
        ("fp8-cast", {"plain": 8, "cast": 57}, {"bfloat16", "float8_e4m3fn"}),
        ("fp8-cast-fast", {"plain": 8, "cast": 57}, {"bfloat16", "float8_e4m3fn"}),
        ("fp8-scaled", {"plain": 8, "cast": 28, "weight-only": 29}, {"bfloat16", "float32", "float8_e4m3fn"}),
        ("nvfp4", {"plain": 25, "cast": 28, "weight-only": 12}, {"bfloat16", "nvfp4"}),
        ("nvfp4-fp8e", {"plain": 25, "cast": 7, "weight-only": 33}, {"bfloat16", "float8_e4m3fn", "nvfp4"}),
    ],
)
def test_variant_holds_and_computes_as_its_files_say(load, name, compute, held) -> None:
    loaded = load(name)
    assert loaded.compute == compute
    assert set(loaded.weight_bytes) == set(loaded.tensors) == held
    assert loaded.pipeline.transformer.dtype == torch.bfloat16
    assert set(loaded.phases_s) == {"read", "build", "to_device"}
    assert not any(tensor.is_meta for tensor in loaded.pipeline.transformer.parameters())
    assert torch.isfinite(latents(loaded)).all()
    assert any("nvfp4" in note for note in loaded.notes) == ("nvfp4" in name)


def test_bytes_held_are_those_of_the_files(load, root) -> None:
    """NVFP4: the file's bytes less input scales nobody reads on a CPU; everything else is kept as it is."""
    loaded = load("nvfp4", vae_dtype="float32")
    in_files = sum(
        tensor.nbytes
        for path in ("diffusion_models/" + NVFP4, "text_encoders/qwen_3_4b.safetensors", "vae/ae.safetensors")
        for name, tensor in read_header(root / path).tensors.items()
        if not name.endswith(".input_scale")
    )
    assert sum(loaded.weight_bytes.values()) == in_files


def test_cast_covers_every_parameter_of_the_transformer(load) -> None:
    transformer = load("fp8-cast").pipeline.transformer
    assert {parameter.dtype for parameter in transformer.parameters()} == {torch.float8_e4m3fn}
    assert transformer.x_pad_token.dtype == torch.float8_e4m3fn


def test_variants_really_compute_differently(load) -> None:
    base = latents(load("bf16"))
    errors = {name: relative(latents(load(name)), base) for name in ("fp8-cast", "fp8-scaled", "nvfp4")}
    assert all(0.002 < error < 0.2 for error in errors.values()), errors
    assert len({round(error, 5) for error in errors.values()}) == len(errors)
    assert torch.equal(latents(load("bf16")), base)


@pytest.mark.parametrize("name", ["bf16", "fp8-cast", "fp8-scaled", "nvfp4"])
def test_plain_and_comfy_kernels_draw_the_same_but_for_rounding(load, name) -> None:
    exact = [latents(load(name, kernels=kernels, compute_dtype="float32")) for kernels in ("comfy", "plain")]
    assert relative(*exact) < 1e-5
    rounded = [latents(load(name, kernels=kernels)) for kernels in ("comfy", "plain")]
    assert relative(*rounded) < 1e-2


def test_prefixed_names_are_read(load, altered) -> None:
    def prefix(tensors, metadata):
        for name in list(tensors):
            tensors["model.diffusion_model." + name] = tensors.pop(name)

    path = altered(BF16, prefix)
    assert torch.equal(latents(load("bf16", files={"transformer": path})), latents(load("bf16")))


def test_scales_stored_as_bytes_and_layers_named_by_strings_are_read(load, altered) -> None:
    def older(tensors, metadata):
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            tensors[name] = tensors[name].view(torch.uint8)
        document = json.loads(metadata["_quantization_metadata"])
        document["layers"] = {layer: record["format"] for layer, record in document["layers"].items()}
        metadata["_quantization_metadata"] = json.dumps(document)

    path = altered(NVFP4, older)
    assert torch.equal(latents(load("nvfp4", files={"transformer": path})), latents(load("nvfp4")))


# ---- devices that multiply natively ---------------------------------------


def test_fp8_capable_device_multiplies_in_fp8(load, monkeypatch) -> None:
    """FP8 products run on this CPU too, so that the path of an FP8-capable device can be drawn with."""
    cast = latents(load("fp8-cast-fast"))
    monkeypatch.setattr("pytest_zimage.checkpoints.loader.multiplies_natively", lambda *_: True)
    fast = load("fp8-cast-fast")
    assert fast.compute == {"plain": 8, "cast": 28, "quantised-activations": 29}
    assert not fast.notes
    assert isinstance(fast.pipeline.transformer.layers[0].attention.qkv, FastFp8Linear)
    assert fast.weight_bytes == load("fp8-cast").weight_bytes, "what is held must not depend on the device"
    assert 0.005 < relative(latents(fast), cast) < 0.2


def test_fast_without_fp8_products_says_that_it_is_a_cast(load) -> None:
    loaded = load("fp8-cast-fast")
    assert "does not multiply in FP8" in loaded.notes[0]
    assert torch.equal(latents(loaded), latents(load("fp8-cast")))


def test_native_device_quantises_activations_where_the_file_lets_it(load, altered, monkeypatch) -> None:
    weight_only = load("nvfp4-fp8e")
    monkeypatch.setattr(precision, "multiplies_natively", lambda *_: True)
    nvfp4 = load("nvfp4-fp8e")
    # The text encoder stays weight-only on any device.
    assert nvfp4.compute["quantised-activations"] == 12
    assert nvfp4.compute["weight-only"] == 21
    assert nvfp4.weight_bytes == weight_only.weight_bytes, "what is held must not depend on the device"
    linear = nvfp4.pipeline.transformer.layers[0].attention.qkv
    assert isinstance(linear, QuantisedActivationsLinear)
    kijai = load("fp8-scaled")
    assert "quantised-activations" not in kijai.compute

    def one_element_marker(tensors, metadata):
        tensors["scaled_fp8"] = tensors["scaled_fp8"].view(torch.uint8)[:1].view(torch.float8_e4m3fn)

    scaled = load("fp8-scaled", files={"transformer": altered(KIJAI, one_element_marker)})
    assert scaled.compute["quantised-activations"] == 29
    assert relative(latents(scaled), latents(kijai)) > 0.002


# ---- what is refused ------------------------------------------------------


def missing(tensors, metadata):
    del tensors["layers.0.attention.q_norm.weight"]


def extra(tensors, metadata):
    tensors["layers.9.attention.q_norm.weight"] = torch.ones(128, dtype=torch.bfloat16)


def wrong_shape(tensors, metadata):
    tensors["layers.1.feed_forward.w1.weight"] = torch.zeros(1024, 256, dtype=torch.bfloat16)


def no_weight(tensors, metadata):
    tensors["x_pad_token"] = torch.zeros(1, 384, dtype=torch.int32)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (missing, ["lacks", "layers.0.attention.norm_q.weight"]),
        (extra, ["does not", "layers.9.attention.q_norm.weight"]),
        (wrong_shape, ["layers.1.feed_forward.w1.weight", "[1024, 256]", "[1024, 384]"]),
        (no_weight, ["x_pad_token", "I32"]),
    ],
)
def test_file_that_does_not_fit_the_network(load, altered, change, says) -> None:
    path = altered(BF16, change)
    with pytest.raises(CheckpointError) as caught:
        load("bf16", files={"transformer": path})
    for word in [str(path), *says]:
        assert word in caught.value.message


def wrong_packed_shape(tensors, metadata):
    tensors["layers.0.attention.out.weight"] = torch.zeros(256, 192, dtype=torch.uint8)
    tensors["layers.0.attention.out.weight_scale"] = torch.ones(256, 24, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("file", "variant", "change", "says"),
    [
        (NVFP4, "nvfp4", wrong_packed_shape, ["layers.0.attention.out.weight", "[256, 384]", "[384, 384]"]),
        (
            NVFP4,
            "nvfp4",
            lambda tensors, _: tensors["layers.1.attention.qkv.weight_scale_2"].fill_(float("nan")),
            ["layers.1.attention.qkv.weight_scale_2", "NaN"],
        ),
        (
            KIJAI,
            "fp8-scaled",
            lambda tensors, _: tensors["layers.1.feed_forward.w2.scale_weight"].fill_(-1),
            ["layers.1.feed_forward.w2", "negative"],
        ),
        (
            NVFP4,
            "nvfp4",
            lambda tensors, _: tensors["layers.0.attention.out.weight_scale"].view(torch.uint8)[0, 0].fill_(0x7F),
            ["layers.0.attention.out.weight_scale"],
        ),
    ],
)
def test_quantised_file_that_cannot_be_right(load, altered, file, variant, change, says) -> None:
    path = altered(file, change)
    with pytest.raises(CheckpointError) as caught:
        load(variant, files={"transformer": path})
    for word in [str(path), *says]:
        assert word in caught.value.message


def test_another_networks_file_is_refused_before_it_is_read(load, root, monkeypatch) -> None:
    monkeypatch.setattr(TensorReader, "read", lambda *_: pytest.fail("tensor data was read"))
    with pytest.raises(CheckpointError, match="has tensors that the network does not"):
        load("bf16", files={"transformer": root / "text_encoders/qwen_3_4b.safetensors"})


def test_casting_a_quantised_file_is_refused(load, root) -> None:
    with pytest.raises(UnsupportedError, match="quantised already"):
        load("fp8-cast", files={"transformer": root / "diffusion_models" / NVFP4})


@pytest.mark.parametrize("kernels", ["comfy", "plain"])
def test_plain_projections_of_their_own_are_read_as_the_fused_one(load, altered, kernels) -> None:
    def split(tensors, metadata):
        for name in [name for name in tensors if ".attention.qkv." in name]:
            for part, rows in zip("qkv", tensors.pop(name).chunk(3), strict=True):
                tensors[name.replace(".qkv.", f".to_{part}.")] = rows.clone()

    path = altered(BF16, split)
    loaded, fused = load("bf16", files={"transformer": path}, kernels=kernels), load("bf16", kernels=kernels)
    assert (loaded.compute, loaded.weight_bytes) == (fused.compute, fused.weight_bytes)
    assert torch.equal(latents(loaded), latents(fused))


def test_file_cut_short_after_its_header_was_checked(root, tmp_path) -> None:
    source = root / "vae/ae.safetensors"
    header = read_header(source)
    short = tmp_path / "short.safetensors"
    short.write_bytes(source.read_bytes()[:-4096])
    stale = dataclasses.replace(header, path=short)
    with TensorReader(stale, CPU) as opened, pytest.raises(CheckpointError, match="ends within"):
        list(opened.read(header.tensors.values()))


def test_reader_gives_the_bytes_of_the_file_whatever_the_piece(root, monkeypatch) -> None:
    monkeypatch.setattr(reader, "_READ_AT_MOST", 1000)
    path = root / "text_encoders/qwen_3_4b_fp8_mixed.safetensors"
    expected = load_file(path)
    header = read_header(path)
    with TensorReader(header, CPU) as opened:
        found = {info.name: tensor for info, tensor in opened.read(header.tensors.values())}
        assert opened.read_s > 0
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tokenizer_that_is_not_there(load, tmp_path) -> None:
    with pytest.raises(MissingFileError, match="nowhere"):
        load("bf16", tokenizer=tmp_path / "nowhere")


def test_tokenizer_without_a_chat_template(load, root, tmp_path) -> None:
    folder = tmp_path / "bare"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((root / "tokenizer/tokenizer.json").read_bytes())
    config = json.loads((root / "tokenizer/tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="chat template"):
        load("bf16", tokenizer=folder)


def test_each_block_has_one_fused_projection(load) -> None:
    transformer = load("nvfp4").pipeline.transformer
    blocks = [*transformer.layers, *transformer.noise_refiner, *transformer.context_refiner]
    assert all(isinstance(block.attention, FusedAttention) for block in blocks)
    assert isinstance(transformer.layers[0].attention.qkv, WeightOnlyLinear)
