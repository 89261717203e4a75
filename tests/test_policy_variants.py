"""The seven FP8 policies and FP8 at load, from synthetic files through the real loader: what is FP8, and how near."""

from __future__ import annotations

import re

import msgspec
import pytest
import torch
from drawing import latents, relative

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints import online, precision
from pytest_zimage.checkpoints.folders import read_weights
from pytest_zimage.checkpoints.formats import detect
from pytest_zimage.checkpoints.linears import DynamicFp8Linear, fp8_by_maximum
from pytest_zimage.checkpoints.loader import load_pipeline
from pytest_zimage.checkpoints.modelset import open_model_set
from pytest_zimage.checkpoints.shard_reader import ShardReader
from pytest_zimage.checkpoints.synthetic import ensure_model_set, read_manifest, set_dims
from pytest_zimage.checkpoints.synthetic.build import build_model_set
from pytest_zimage.checkpoints.synthetic.plan import transformer_shapes
from pytest_zimage.checkpoints.synthetic.policies import FOLDERS, plan_folder
from pytest_zimage.checkpoints.synthetic.requested import plan_set
from pytest_zimage.checkpoints.synthetic.sink import FileSink
from pytest_zimage.checkpoints.synthetic.writer import write_files
from pytest_zimage.engines.sampler import build_scheduler
from pytest_zimage.errors import CatalogError
from pytest_zimage.options import user_cache

CPU = torch.device("cpu")
CATALOG = load_catalog()
# The modules of published/vllm_omni_fp8.json, in diffusers' naming: to_qkv is to_q, to_k and to_v, to_out is to_out.0.
_FFN, _QKV, _OUT = r"feed_forward\.w[1-3]", r"attention\.to_[qkv]", r"attention\.to_out\.0"
PUBLISHED = {
    "modelopt-full": (_FFN, _QKV, _OUT),
    "modelopt-ffn-only": (_FFN,),
    "modelopt-ffn-attn-qkv": (_FFN, _QKV),
    "modelopt-ffn-attn-out": (_FFN, _OUT),
    "modelopt-attn-only": (_QKV, _OUT),
    "modelopt-attn-qkv-only": (_QKV,),
    "modelopt-attn-out-only": (_OUT,),
}
NAMES = [*PUBLISHED, "online-fp8"]


@pytest.fixture(scope="module")
def models():
    opened = open_model_set("synthetic-tiny", CATALOG, cache=user_cache())
    opened.ensure([name for variant in CATALOG.select(["bf16", *NAMES]) for name in variant.files().values()])
    return opened


@pytest.fixture(scope="module")
def load(models):
    def _load(name: str, **changed):
        variant = msgspec.structs.replace(CATALOG.variant(name), **changed)
        files, scheduler = models.files(variant), build_scheduler(CATALOG.workload("turbo-tiny"))
        return load_pipeline(variant, models.dims, files, models.find_tokenizer(), scheduler, CPU)

    return _load


@pytest.fixture(scope="module")
def base(load):
    """What BF16 draws, computed in float32 so that distances are those of the weights."""
    return latents(load("bf16", compute_dtype="float32"), steps=8)


def test_the_variants_are_there_and_wait_to_be_asked_for():
    assert [variant.name for variant in CATALOG.select(["@policy"])] == NAMES
    assert not any(variant.default for variant in CATALOG.select(["@vllm-omni"]))
    assert sorted(CATALOG.variant(name).transformer for name in PUBLISHED) == sorted(FOLDERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_quantised_is_exactly_the_policys(models, name):
    weights = read_weights(models.find("transformer", CATALOG.variant(name).transformer))
    with ShardReader(weights, CPU) as reader:
        found = detect(weights.header, reader.read_bytes)
    wanted = re.compile(rf"(layers|noise_refiner|context_refiner)\.\d+\.({'|'.join(PUBLISHED[name])})")
    linears = [tensor for tensor in found.plain if tensor.endswith(".weight") and len(found.plain[tensor].shape) == 2]
    assert not [tensor for tensor in linears if wanted.fullmatch(tensor.removesuffix(".weight"))]
    per_block = sum({_FFN: 3, _QKV: 3, _OUT: 1}[kind] for kind in PUBLISHED[name])
    assert len(found.quantised) == 4 * per_block
    assert all(wanted.fullmatch(layer) for layer in found.quantised)
    assert all({*layer.tensors} == {"weight", "weight_scale", "input_scale"} for layer in found.quantised.values())


def test_the_values_are_those_of_the_bf16_file(load):
    """FP8 of formats.md 3.d: 0.026 of a weight's norm; whatever is not quantised is equal."""
    fused = dict(load("bf16").pipeline.transformer.named_parameters())
    apart = load("modelopt-ffn-attn-qkv").pipeline.transformer
    for name, parameter in apart.named_parameters():
        part = re.fullmatch(r"(.*\.attention)\.to_([qkv])\.weight", name)
        expected = fused[f"{part[1]}.qkv.weight"].chunk(3)["qkv".index(part[2])] if part else fused[name]
        if hasattr(parameter, "dequantize") and hasattr(parameter, "_qdata"):
            assert relative(parameter.dequantize().float(), expected.float()) == pytest.approx(0.026, abs=0.002), name
        else:
            assert torch.equal(parameter, expected), name


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_nearer_to_bf16_than_the_file_with_every_linear_in_fp8(load, base, name, request):
    loaded = load(name, compute_dtype="float32")
    drawn = latents(loaded, steps=8)
    assert torch.isfinite(drawn).all()
    assert 0.004 < relative(drawn, base) < 0.05
    assert "does not multiply float8_e4m3fn: its layers are dequantised" in loaded.notes[0]


@pytest.mark.parametrize("name", ["modelopt-full", "modelopt-attn-out-only", "online-fp8"])
def test_quantised_inputs_add_what_formats_measured(load, name, monkeypatch):
    """formats.md 2.2: products of both operands in FP8 are 1.15 times as far from BF16 as dequantised weights."""
    exact = latents(load("bf16"), steps=4)
    weight_only = relative(latents(load(name), steps=4), exact)
    for module in (precision, online):
        monkeypatch.setattr(module, "multiplies_natively", lambda *_: True)
    loaded = load(name)
    assert "weight-only" not in loaded.compute
    assert not loaded.notes
    assert 1.0 < relative(latents(loaded, steps=4), exact) / weight_only < 1.6


# ---- FP8 at load -------------------------------------------------------------


def test_at_load_the_blocks_linears_of_both_networks_are_quantised_and_nothing_else(load, monkeypatch):
    monkeypatch.setattr(online, "multiplies_natively", lambda *_: True)
    loaded = load("online-fp8")
    for network, blocks, per_block in ((loaded.pipeline.transformer, 4, 5), (loaded.pipeline.text_encoder, 4, 7)):
        quantised = {name for name, module in network.named_modules() if isinstance(module, DynamicFp8Linear)}
        assert len(quantised) == blocks * per_block
        assert all(re.search(r"\.\d+\.(attention|feed_forward|self_attn|mlp)\.", name) for name in quantised)
    assert loaded.pipeline.transformer.t_embedder.mlp[0].weight.dtype == torch.bfloat16
    assert (
        loaded.weight_bytes["float8_e4m3fn"]
        == load("online-fp8", kernels="plain").weight_bytes["float8_e4m3fn"] - 4 * 4 * 2
    ), "plain kernels have three scales where qkv has one"


def test_one_scale_of_the_largest_value(load):
    weight = load("bf16").pipeline.transformer.layers[0].feed_forward.w2.weight
    held = load("online-fp8").pipeline.transformer.layers[0].feed_forward.w2.weight
    assert float(held._params.scale) == pytest.approx(float(weight.abs().max()) / 448, rel=1e-6)
    assert float(held._qdata.float().abs().max()) == 448


def test_an_input_is_scaled_by_its_own_largest_value_and_zeros_stay_zeros():
    x = torch.tensor([[3.0, -7.0, 0.5, 0.0]], dtype=torch.bfloat16)
    quantised = fp8_by_maximum(x)
    assert float(quantised._params.scale) == pytest.approx(7 / 448, rel=1e-6)
    assert relative(quantised.dequantize().float(), x.float()) < 0.05
    assert torch.equal(fp8_by_maximum(torch.zeros(2, 4)).dequantize(), torch.zeros(2, 4))


def test_a_quantised_file_is_not_quantised_again(load):
    from pytest_zimage.errors import UnsupportedError

    with pytest.raises(UnsupportedError, match="quantised already"):
        load("modelopt-full", weight_dtype="fp8_online")


# ---- the writer ----------------------------------------------------------------


def test_the_default_set_has_no_policy_and_a_policy_is_written_alone(tmp_path):
    dims = set_dims("synthetic-tiny", CATALOG)
    folder = FOLDERS[6]
    ensure_model_set("synthetic-tiny", dims, tmp_path / "set", [folder])
    written = {path for path in read_manifest(tmp_path / "set").files if not path.startswith("tokenizer/")}
    assert written == {
        f"diffusion_models/{folder}{name}" for name in ("config.json", "diffusion_pytorch_model.safetensors")
    }
    assert not [plan for plan in plan_set(dims, None) if "FP8-" in plan.path]
    with pytest.raises(CatalogError, match="no file 'Z-Image-Turbo-FP8-most/'"):
        plan_set(dims, ["Z-Image-Turbo-FP8-most/"])


def test_a_damaged_shard_is_written_again_and_nothing_else(tmp_path, monkeypatch):
    from pytest_zimage.checkpoints.synthetic import ensure

    dims, root, folder = set_dims("synthetic-tiny", CATALOG), tmp_path / "set", FOLDERS[6]
    calls = []

    def write(name, dims, root, names, device, say):
        calls.append(names)
        build_model_set(name, dims, root, names, device=torch.device(device), say=say)

    monkeypatch.setattr(ensure, "_write", write)
    ensure_model_set("synthetic-tiny", dims, root, [folder, "ae.safetensors"])
    shard = root / "diffusion_models" / folder / "diffusion_pytorch_model.safetensors"
    before = shard.read_bytes()
    shard.write_bytes(before[:-4] + b"\1\2\3\4")
    notes = ensure_model_set("synthetic-tiny", dims, root, [folder, "ae.safetensors"])
    assert calls == [[folder, "ae.safetensors"], [folder]]
    assert f"{folder}diffusion_pytorch_model.safetensors written anew: its hash" in notes[0]
    assert shard.read_bytes() == before
    assert ensure_model_set("synthetic-tiny", dims, root, [folder]) == []


def test_a_large_policy_is_written_in_shards_that_read_as_one(models, load, tmp_path):
    folder = FOLDERS[0]
    whole = models.find("transformer", folder)
    plans = plan_folder(folder, transformer_shapes(models.dims), models.dims, shard_bytes=4_000_000)
    assert len(plans) == 3
    assert [bool(plan.beside) for plan in plans] == [False, False, True]
    with FileSink(CPU) as sink:
        assert len(list(write_files(plans, tmp_path, CPU, sink, lambda written: None))) == 3
    for path, text in plans[-1].beside.items():
        (tmp_path / path).write_text(text)
    sharded = read_weights(tmp_path / "diffusion_models" / folder)
    assert all(shard.file_bytes < 4_100_000 for shard in sharded.shards)
    one = read_weights(whole)
    assert sharded.header.tensors.keys() == one.header.tensors.keys()
    with ShardReader(sharded, CPU) as first, ShardReader(one, CPU) as second:
        theirs = {info.name: tensor for info, tensor in second.read(one.header.tensors.values())}
        for info, tensor in first.read(sharded.header.tensors.values()):
            assert torch.equal(tensor.float(), theirs[info.name].float()), info.name


def test_real_dims_save_what_the_published_peaks_of_memory_say():
    """published/vllm_omni_fp8.json, GiB against bf16_base; the engine's own workspace leaves a few per cent."""
    dims = set_dims("synthetic-full", CATALOG)
    shapes = transformer_shapes(dims)

    def size(names):
        return sum(plan.header()[2] for plan in names)

    bf16 = size(plan for plan in plan_set(dims, ["z_image_turbo_bf16.safetensors"]))
    peaks = {"full": 16.02, "ffn-attn-qkv": 16.48, "ffn-attn-out": 17.41, "ffn-only": 17.88, "attn-only": 19.74}
    peaks |= {"attn-qkv-only": 20.21, "attn-out-only": 21.18}
    for policy, peak in peaks.items():
        plans = plan_folder(f"Z-Image-Turbo-FP8-{policy}/", shapes, dims)
        saved = (bf16 - size(plans)) / 2**30
        assert saved == pytest.approx(21.66 - peak, rel=0.05), policy
        assert len(plans) == (2 if policy.startswith("attn") else 1)
