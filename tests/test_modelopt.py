"""ModelOpt's files in diffusers' layout: shards, config and ignore list against tensors, scales of every shape."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import torch
from comfy_kitchen.float_utils import from_blocked
from comfy_kitchen.tensor import QuantizedTensor
from drawing import latents, relative
from safetensors.torch import load_file, save_file

from pytest_zimage.catalog import ROLE_FOLDERS, load_catalog
from pytest_zimage.checkpoints import precision
from pytest_zimage.checkpoints.folders import read_weights, weight_files
from pytest_zimage.checkpoints.formats import detect
from pytest_zimage.checkpoints.linears import FinelyScaledFp8Linear, QuantisedActivationsLinear
from pytest_zimage.checkpoints.loader import load_pipeline
from pytest_zimage.checkpoints.modelset import OFFICIAL, ModelSet, file_fingerprint
from pytest_zimage.checkpoints.shard_reader import ShardReader
from pytest_zimage.checkpoints.synthetic import ensure_model_set
from pytest_zimage.engines.sampler import build_scheduler
from pytest_zimage.errors import CheckpointError, MissingFileError, UnsupportedError
from pytest_zimage.options import user_cache

CPU = torch.device("cpu")
CATALOG = load_catalog()
DIMS = CATALOG.models["synthetic-tiny"]
FULL = CATALOG.variant("modelopt-full")
STEM = "diffusion_pytorch_model"
W1 = "layers.0.feed_forward.w1"


@pytest.fixture(scope="module")
def root() -> Path:
    folder = user_cache() / "synthetic-tiny"
    files = [*FULL.files().values(), *CATALOG.variant("bf16").files().values()]
    ensure_model_set("synthetic-tiny", DIMS, folder, files)
    return folder


@pytest.fixture
def folder(root, tmp_path):
    """A copy of the full policy's folder after `change(tensors, config)`, in so many `shards`."""

    def _folder(change=lambda tensors, config: None, shards: int = 1) -> Path:
        source = root / "diffusion_models" / FULL.transformer
        tensors = load_file(source / f"{STEM}.safetensors")
        config = json.loads((source / "config.json").read_text())
        change(tensors, config)
        target = tmp_path / "policy"
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        names = sorted(tensors)
        parts = [names[index::shards] for index in range(shards)]
        files = [f"{STEM}{f'-{n + 1:05}-of-{shards:05}' * (shards > 1)}.safetensors" for n in range(shards)]
        for file, part in zip(files, parts, strict=True):
            save_file({name: tensors[name].contiguous() for name in part}, target / file)
        if shards > 1:
            weight_map = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            (target / f"{STEM}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return target

    return _folder


@pytest.fixture
def load(root):
    def _load(path: Path | None = None, **changed):
        variant = msgspec.structs.replace(FULL, **changed)
        files = {role: root / ROLE_FOLDERS[role][0] / file for role, file in variant.files().items()}
        if path is not None:
            files["transformer"] = path
        scheduler = build_scheduler(CATALOG.workload("turbo-tiny"))
        return load_pipeline(variant, DIMS, files, root / "tokenizer", scheduler, CPU)

    return _load


def contents(path: Path):
    weights = read_weights(path)
    with ShardReader(weights, CPU) as reader:
        return detect(weights.header, reader.read_bytes)


def index_of(folder: Path) -> Path:
    return folder / f"{STEM}.safetensors.index.json"


# ---- shards and places -----------------------------------------------------


def test_shards_hold_what_one_file_holds(load, folder):
    whole = load()
    sharded = load(folder(shards=3))
    assert (sharded.compute, sharded.weight_bytes, sharded.tensors) == (
        whole.compute, whole.weight_bytes, whole.tensors,
    )  # fmt: skip
    assert torch.equal(latents(sharded), latents(whole))


def test_a_whole_pipelines_folder_and_a_single_file_with_its_config_in_the_header(root, load, folder, tmp_path):
    path = folder()
    pipeline = tmp_path / "pipeline"
    pipeline.mkdir()
    path.rename(pipeline / "transformer")
    below = pipeline / "transformer"
    assert {file.parent for file in weight_files(pipeline)} == {below}
    config = json.loads((below / "config.json").read_text())["quantization_config"]
    single = tmp_path / "single.safetensors"
    save_file(load_file(below / f"{STEM}.safetensors"), single, {"quantization_config": json.dumps(config)})
    for place in (pipeline, single):
        found = contents(place)
        assert (found.source, len(found.quantised)) == ("modelopt", 28)
    assert torch.equal(latents(load(pipeline)), latents(load(single)))


def test_the_config_of_language_models_serves_too(folder):
    path = folder()
    config = json.loads((path / "config.json").read_text()).pop("quantization_config")
    (path / "config.json").write_text("{}")
    old = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "exclude_modules": config["ignore"]}}
    (path / "hf_quant_config.json").write_text(json.dumps(old))
    assert len(contents(path).quantised) == 28


def test_a_model_set_finds_a_folder_and_knows_it_by_all_its_files(root, folder, tmp_path):
    path = folder(shards=2)
    models = tmp_path / "models"
    (models / "diffusion_models/below").mkdir(parents=True)
    found_at = path.rename(models / "diffusion_models/below/Z-Image-Turbo-FP8-full")
    model_set = ModelSet(OFFICIAL, models, DIMS)
    assert model_set.find("transformer", FULL.transformer) == found_at
    before = file_fingerprint(found_at)
    shard = found_at / f"{STEM}-00002-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\x01")
    assert file_fingerprint(found_at) != before
    shard.unlink()
    with pytest.raises(MissingFileError, match=rf"{shard.name}: no such file, and {STEM}.*names it"):
        model_set.find("transformer", FULL.transformer)


def drop_from_shard(path: Path) -> None:
    shard = path / f"{STEM}-00001-of-00002.safetensors"
    tensors = load_file(shard)
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, shard)


def drop_from_index(path: Path) -> None:
    index = json.loads(index_of(path).read_text())
    index["weight_map"].pop(f"{W1}.weight")
    index_of(path).write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop_from_shard, r"index.json: tensor '\S+' is not in \S+-00001-of-00002.safetensors"),
        (drop_from_index, rf"tensor '{W1}.weight' is not in the index"),
        (lambda path: index_of(path).write_text("{"), "index.json: not JSON"),
        (lambda path: index_of(path).write_text("{}"), "no table 'weight_map'"),
        (lambda path: index_of(path).write_text('{"weight_map": {"x": "../y.safetensors"}}'), "not a shard's name"),
        (lambda path: index_of(path).unlink(), "2 .safetensors files and no "),
        (lambda path: (path / "config.json").write_text("[]"), "config.json: not a JSON table"),
    ],
)
def test_a_folder_whose_parts_do_not_fit(folder, damage, says):
    path = folder(shards=2)
    damage(path)
    with pytest.raises(CheckpointError, match=says) as caught:
        contents(path)
    assert caught.value.mend


def test_an_empty_folder(tmp_path):
    with pytest.raises(MissingFileError, match=r"no \.safetensors file"):
        read_weights(tmp_path)


# ---- config and ignore list ------------------------------------------------


def quantisation(**changes):
    def change(_, config):
        config["quantization_config"] |= changes

    return change


def without_config(_, config):
    del config["quantization_config"]


def dequantised(tensors, _):
    for suffix in ("weight_scale", "input_scale"):
        del tensors[f"{W1}.{suffix}"]
    tensors[f"{W1}.weight"] = tensors[f"{W1}.weight"].bfloat16()


def ignored(*patterns):
    def change(_, config):
        config["quantization_config"]["ignore"] += patterns

    return change


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (dequantised, CheckpointError, f"'{W1}': not on the ignore list and not quantised"),
        (ignored(W1), CheckpointError, f"'{W1}': on the ignore list and quantised all the same"),
        (ignored("layers.1"), CheckpointError, r"'layers.1.attention.to_k', .* and 4 more: on the ignore list"),
        (ignored("transformer.layers.0.attention.to_qkv"), CheckpointError, "'layers.0.attention.to_k', .*to_q"),
        (ignored("re:.*attention.to_out.*"), CheckpointError, r"'context_refiner.0.attention.to_out.0'"),
        (ignored("re:("), CheckpointError, r"'re:\(' is not a regular expression"),
        (quantisation(ignore="layers"), CheckpointError, "the ignore list is not a list"),
        (quantisation(ignore=[]), CheckpointError, "adaLN_modulation.*: not on the ignore list and not quantised"),
        (quantisation(quant_algo=None), CheckpointError, "names no quant_algo"),
        (quantisation(quant_algo="MIXED_PRECISION"), UnsupportedError, "'MIXED_PRECISION' is not served"),
        (quantisation(quant_method="gptq"), UnsupportedError, "the method 'gptq', not 'modelopt'"),
        (quantisation(config_groups={"g": {"targets": ["Conv2d"]}}), UnsupportedError, r"\['Conv2d'\] in 'g'"),
        (quantisation(config_groups={"g": 3}), CheckpointError, "no table 'g'"),
        (without_config, CheckpointError, "nothing in the file says how it was quantised|no record says"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_cannot_be_followed(folder, change, kind, says):
    path = folder(change)
    with pytest.raises(kind, match=says) as caught:
        contents(path)
    assert str(path) in caught.value.message
    assert caught.value.mend


def test_a_missing_scale_names_the_layer(folder):
    def without_scale(tensors, _):
        del tensors[f"{W1}.weight_scale"]

    with pytest.raises(CheckpointError, match=rf"layer '{W1}' .* has no tensor '{W1}.weight_scale'"):
        contents(folder(without_scale))


# ---- scales that are not one number ----------------------------------------


def rescaled(shape, suffix="weight_scale"):
    """Every FP8 weight in the same values under scales of `shape(rows, columns)`, each twice the one before it."""

    def change(tensors, config):
        config["quantization_config"]["quant_algo"] = "FP8_PER_CHANNEL_PER_TOKEN"
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            weight, scale = tensors[name.removesuffix("_scale")], tensors.pop(name)
            tensors[name.removesuffix("weight_scale") + suffix] = scale.expand(shape(*weight.shape)).clone()

    return change


@pytest.mark.parametrize(
    ("shape", "suffix"),
    [
        (lambda rows, columns: (rows,), "weight_scale"),
        (lambda rows, columns: (rows, 1), "weight_scale"),
        (lambda rows, columns: (rows // 128, 1, columns // 128, 1), "weight_scale"),
        (lambda rows, columns: (rows // 128, columns // 128), "weight_scale_inv"),
    ],
)
@pytest.mark.parametrize("native", [False, True])
def test_fine_scales_are_dequantised_and_it_is_said(load, folder, monkeypatch, shape, suffix, native):
    expected = latents(load(compute_dtype="float32"))
    monkeypatch.setattr(precision, "multiplies_natively", lambda *_: native)
    loaded = load(folder(rescaled(shape, suffix)), compute_dtype="float32")
    assert loaded.compute["weight-only"] == 28
    assert "quantised-activations" not in loaded.compute
    assert "policy: 28 FP8 layers have scales per channel or per block" in loaded.notes[-1]
    assert relative(latents(loaded), expected) < 1e-5


def test_each_scale_counts_for_its_own_block():
    linear = FinelyScaledFp8Linear(torch.nn.Linear(4, 4, bias=False))
    linear.weight = torch.nn.Parameter(torch.ones(4, 4).to(torch.float8_e4m3fn), requires_grad=False)
    linear.weight_scale = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).reshape(2, 1, 2, 1)
    expected = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]).float()
    assert torch.equal(linear(torch.eye(4)).T, expected)


def test_fine_scales_are_split_with_a_fused_projection(root, load, tmp_path):
    """The same in ComfyUI's naming, where plain kernels cut qkv in three."""
    source = load_file(root / "diffusion_models/z_image_turbo_bf16.safetensors")
    name = "layers.0.attention.qkv"
    weight = source.pop(f"{name}.weight").float()
    scale = weight.abs().amax(dim=1) / 448
    source[f"{name}.weight"] = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    source[f"{name}.weight_scale"] = scale
    record = {"_quantization_metadata": json.dumps({"layers": {name: {"format": "float8_e4m3fn"}}})}
    save_file(source, tmp_path / "fused.safetensors", record)
    both = [
        load(tmp_path / "fused.safetensors", kernels=kernels, compute_dtype="float32") for kernels in ("comfy", "plain")
    ]
    assert [loaded.compute["weight-only"] for loaded in both] == [1, 3]
    assert both[0].weight_bytes == both[1].weight_bytes
    assert relative(*map(latents, both)) < 1e-5


@pytest.mark.parametrize(("scale", "says"), [(float("nan"), "NaN"), (0.0, "zero"), (-1.0, "negative")])
def test_a_fine_scale_that_cannot_be_right(load, folder, scale, says):
    def change(tensors, config):
        rescaled(lambda rows, _: (rows,))(tensors, config)
        tensors[f"{W1}.weight_scale"][5] = scale

    with pytest.raises(CheckpointError, match=rf"{says}.*'{W1}.weight_scale'"):
        load(folder(change))


# ---- NVFP4 as ModelOpt lays it out -----------------------------------------


def test_lo_first_nvfp4_is_converted(load, folder):
    """Nibbles swapped and scales untiled on the way to the file; read back as comfy-kitchen's own."""
    expected = {}

    def to_modelopt(tensors, config):
        config["quantization_config"]["quant_algo"] = "NVFP4"
        for name in [name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")]:
            dense = tensors[f"{name}.weight"].bfloat16() * tensors[f"{name}.weight_scale"].bfloat16()
            held = QuantizedTensor.from_float(dense, "TensorCoreNVFP4Layout")
            expected[name] = held.dequantize()
            rows, columns = dense.shape
            tensors[f"{name}.weight"] = (held._qdata << 4) | (held._qdata >> 4)
            tiled = held._params.block_scale.view(torch.uint8)
            tensors[f"{name}.weight_scale"] = from_blocked(tiled, rows, columns // 16).view(torch.float8_e4m3fn)
            tensors[f"{name}.weight_scale_2"] = held._params.scale.reshape(())

    transformer = load(folder(to_modelopt)).pipeline.transformer
    assert len(expected) == 28
    for name, dense in expected.items():
        assert torch.equal(transformer.get_submodule(name).weight.dequantize(), dense), name


# ---- computing --------------------------------------------------------------


def test_projections_of_their_own_scales_stay_three_and_share_one_quantised_input(load, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_natively", lambda *_: True)
    loaded = load()
    attention = loaded.pipeline.transformer.layers[0].attention
    assert attention.qkv is None
    assert all(isinstance(p, QuantisedActivationsLinear) for p in (attention.to_q, attention.to_k, attention.to_v))
    assert len({float(p.weight._params.scale) for p in (attention.to_q, attention.to_k, attention.to_v)}) > 1
    quantised = []
    real = QuantisedActivationsLinear.quantise
    monkeypatch.setattr(QuantisedActivationsLinear, "quantise", lambda self, x: quantised.append(self) or real(self, x))
    latents(loaded, steps=1)
    inputs = [linear for linear in quantised if linear in (attention.to_q, attention.to_k, attention.to_v)]
    assert inputs == [attention.to_q]


def test_the_files_static_input_scale_is_the_one_used(load, monkeypatch):
    monkeypatch.setattr(precision, "multiplies_natively", lambda *_: True)
    linear = load().pipeline.transformer.get_submodule(W1)
    codes = linear.quantise(torch.full((1, 384), 4.0, dtype=torch.bfloat16))
    assert float(codes._params.scale) == pytest.approx(32 / 448)
    assert codes._qdata.float().unique().tolist() == [56.0]
