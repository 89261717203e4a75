"""Mixed NVFP4, MXFP8, INT8 ConvRot and SVDQuant files: written as others write them, read, and drawn."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import torch
from comfy_kitchen.float_utils import from_blocked
from msgspec import structs
from safetensors.torch import load_file
from tiny_files import CATALOG, DIMS, altered, engine, files_of, latents, load, relative, silent

from pytest_zimage.checkpoints.quantised import LAYOUTS
from pytest_zimage.checkpoints.synthetic import set_dims
from pytest_zimage.checkpoints.synthetic.encodings import Blob, Int8ConvRot, LoraOf, Mxfp8, SvdQuant, low_rank
from pytest_zimage.checkpoints.synthetic.gguf_types import GgufBlocks
from pytest_zimage.checkpoints.synthetic.more_files import MIXED, MXFP8, mixed_format, plan_file
from pytest_zimage.checkpoints.synthetic.plan import transformer_shapes
from pytest_zimage.checkpoints.synthetic.values import make_weight
from pytest_zimage.engines.protocol import Draw
from pytest_zimage.errors import CheckpointError, UnsupportedError

# Fused projections, so 23 linears of the blocks in the tiny model, 14 outside of them and 28 in the text encoder.
DRAWN = {
    "nvfp4-mixed": ({"weight-only": 21, "plain": 16}, {"nvfp4": 11, "mxfp8": 10}, (0.04, 0.10)),
    "mxfp8": ({"weight-only": 23, "plain": 14}, {"mxfp8": 23}, (0.015, 0.04)),
    "int8-convrot": ({"weight-only": 23, "plain": 14}, {"int8": 23}, (0.005, 0.014)),
    "svdquant-w4a4": ({"quantised-activations": 10, "plain": 27}, {"svdquant_w4a4": 10}, (0.04, 0.11)),
}


@pytest.fixture(scope="module")
def drawn_bf16() -> torch.Tensor:
    return latents(load("bf16"))


@pytest.mark.parametrize("name", DRAWN)
def test_a_variant_draws_as_its_format_computes(name, drawn_bf16):
    computes, held, (nearest, farthest) = DRAWN[name]
    loaded = load(name)
    assert loaded.compute == {"cast": 28, **computes}
    assert {kind: loaded.tensors[kind] for kind in held} == held
    assert nearest < relative(latents(loaded), drawn_bf16) < farthest


@pytest.mark.parametrize("name", DRAWN)
def test_the_worker_draws_an_image_and_every_call_is_accounted_for(name):
    ready = engine(name, width=64, height=64)
    (image,) = ready.draw(Draw(1), silent).rounds
    assert image.forwards == 8
    counts = ready.trace().dispatch
    by_kind = {key.removeprefix("linear: "): number for key, number in counts.items() if key.startswith("linear: ")}
    # Eight of the plain ones are the VAE's.
    linears = {kind: number - 8 * (kind == "plain") for kind, number in DRAWN[name][0].items()}
    assert by_kind == {kind: 8 * number for kind, number in linears.items()}


@pytest.mark.parametrize("name", DRAWN)
def test_plain_modules_split_what_is_fused_and_draw_the_same(name):
    fused, split = (latents(load(name, kernels=kernels), 2) for kernels in ("comfy", "plain"))
    # Rounding turns INT4 codes of inputs over, each as large as an error of the format itself.
    assert relative(split, fused) < (DRAWN[name][2][1] if name == "svdquant-w4a4" else 0.01)


# ---- what is written --------------------------------------------------------


def test_the_mixed_file_follows_the_published_lists():
    shapes = transformer_shapes(set_dims("synthetic-full", CATALOG))
    plan = plan_file(MIXED, shapes)
    layers = json.loads(plan.metadata["_quantization_metadata"])["layers"]
    assert Counter(record["format"] for record in layers.values()) == {"nvfp4": 120, "mxfp8": 65}
    expected = {
        "layers.0.attention.out": "mxfp8",
        "layers.2.attention.out": "nvfp4",
        "layers.10.attention.qkv": "mxfp8",
        "layers.29.attention.qkv": "bf16",
        "layers.2.feed_forward.w1": "nvfp4",
        "layers.3.feed_forward.w1": "mxfp8",
        "layers.29.feed_forward.w2": "nvfp4",
        "layers.15.adaLN_modulation.0": "nvfp4",
        "layers.16.adaLN_modulation.0": "mxfp8",
        "layers.22.adaLN_modulation.0": "bf16",
        "context_refiner.1.feed_forward.w2": "bf16",
        "context_refiner.0.feed_forward.w2": "mxfp8",
        "noise_refiner.1.attention.qkv": "bf16",
        "noise_refiner.0.feed_forward.w3": "bf16",
    }
    assert {layer: mixed_format(layer) for layer in expected} == expected
    # 4.84 GB as published; which layers beyond the lists are NVFP4 is not, and makes the rest.
    assert plan.header()[2] == pytest.approx(4.84e9, rel=0.01)


def test_int8_has_the_tensors_and_bytes_of_the_official_file():
    known = CATALOG.files["z_image_turbo_int8_convrot.safetensors"]
    plan = plan_file(known.name, transformer_shapes(set_dims("synthetic-full", CATALOG)))
    _, tensors, size = plan.header()
    assert len(tensors) == known.tensors
    assert size == pytest.approx(known.bytes, rel=0.001)
    assert Counter(stored.dtype for stored, _ in tensors.values()) == {"I8": 202, "F32": 453, "U8": 202}


def blob(tensors: dict[str, torch.Tensor], layer: str) -> dict[str, object]:
    return json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))


def test_mxfp8_decodes_by_hand_to_nearly_the_bf16_values():
    source = load_file(files_of("bf16")["transformer"])
    written = load_file(files_of("mxfp8")["transformer"])
    layer = "layers.1.feed_forward.w2"
    rows, columns = source[f"{layer}.weight"].shape
    assert blob(written, layer) == {
        "format": "mxfp8",
        "group_size": 32,
        "orig_dtype": "torch.bfloat16",
        "orig_shape": [rows, columns],
    }
    exponents = from_blocked(written[f"{layer}.weight_scale"], rows, columns // 32).float() - 127
    found = written[f"{layer}.weight"].float() * exponents.exp2().repeat_interleave(32, dim=1)
    assert relative(found, source[f"{layer}.weight"]) < 0.03


def test_int8_decodes_by_hand_to_nearly_the_bf16_values():
    """The rotation is a regular Hadamard matrix, its own inverse: Kronecker powers of one of order four."""
    source = load_file(files_of("bf16")["transformer"])
    written = load_file(files_of("int8-convrot")["transformer"])
    layer = "layers.0.attention.qkv"
    record = blob(written, layer)
    assert record == {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    hadamard = torch.kron(torch.kron(four, four), four)
    codes = written[f"{layer}.weight"].float() * written[f"{layer}.weight_scale"]
    found = (codes.reshape(1152, 6, 64) @ hadamard).reshape(1152, 384)
    assert relative(found, source[f"{layer}.weight"]) < 0.015
    assert {t.dtype for name, t in written.items() if "norm" in name or name.endswith("bias")} == {torch.float32}


def test_svdquant_decodes_by_hand_to_nearly_the_bf16_values():
    source = load_file(files_of("bf16")["transformer"])
    written = load_file(files_of("svdquant-w4a4")["transformer"])
    layer = "layers.1.attention.out"
    assert blob(written, layer) == {"format": "svdquant_w4a4"}
    packed = written[f"{layer}.weight"].view(torch.uint8).int()
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).reshape(384, 384)
    codes = torch.where(codes > 7, codes - 16, codes).float()
    scaled = codes * written[f"{layer}.weight_scale"].float().t().repeat_interleave(64, dim=1)
    low_rank = written[f"{layer}.proj_up"].float() @ written[f"{layer}.proj_down"].float().t()
    found = scaled / written[f"{layer}.smooth_factor"].float() + low_rank
    assert relative(found, source[f"{layer}.weight"]) < 0.11
    assert relative(low_rank, source[f"{layer}.weight"]) < 0.95, "the low-rank part is one of the weight"


@pytest.mark.parametrize(
    "encoding",
    [
        Blob("nvfp4_blob", {"format": "nvfp4", "x": 1}),
        Mxfp8({"format": "mxfp8"}),
        Mxfp8({"format": "mxfp8", "group_size": 32}),
        Int8ConvRot(),
        SvdQuant(),
        LoraOf("TensorCoreNVFP4Layout", 8),
        GgufBlocks("Q8_0"),
        GgufBlocks("Q4_K"),
    ],
    ids=lambda encoding: type(encoding).__name__,
)
@pytest.mark.parametrize("columns", [256, 384])
def test_what_is_planned_is_what_is_encoded(encoding, columns):
    names = {"BF16": torch.bfloat16, "F32": torch.float32, "F8_E4M3": torch.float8_e4m3fn}
    names |= {"U8": torch.uint8, "I8": torch.int8}
    weight = make_weight("x", (128, columns), torch.bfloat16, torch.device("cpu"))
    planned = {t.name: (names[t.dtype], t.shape) for t in encoding.describe("x.weight", (128, columns))}
    encoded = encoding.encode("x.weight", weight)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in encoded.items()} == planned


def test_the_low_rank_part_is_nearly_the_best_there_is():
    matrix = make_weight("x", (384, 256), torch.float32, torch.device("cpu"))
    up, down = low_rank(matrix, 16, "x")
    best = torch.linalg.svdvals(matrix.double())[16:].norm()
    assert best <= (matrix - up @ down).norm() < 1.03 * best


def test_only_what_is_asked_for_is_written(tmp_path):
    from pytest_zimage.checkpoints.synthetic.ensure import ensure_model_set

    ensure_model_set("synthetic-tiny", DIMS, tmp_path / "set", [MXFP8])
    assert [path.name for path in tmp_path.glob("set/diffusion_models/*")] == [MXFP8]


# ---- SVDQuant: layouts, releases and refusals --------------------------------


def tiled(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """comfy-quants' tile-packed layout: tiles of 128 rows, 64 columns apart, four rows interleaved."""
    for name in [name for name in tensors if name.endswith(".proj_up")]:
        layer = name.removesuffix(".proj_up")
        rows, half = tensors[f"{layer}.weight"].shape
        weight = tensors[f"{layer}.weight"].reshape(rows // 128, 32, 4, half // 32, 32)
        tensors[f"{layer}.weight"] = weight.permute(0, 3, 1, 2, 4).reshape(rows // 128, half // 32, 32, 128)
        scale = tensors[f"{layer}.weight_scale"]
        tensors[f"{layer}.weight_scale"] = scale.reshape(len(scale), rows // 128, 128).permute(1, 0, 2)
        tensors[name] = tensors[name].reshape(rows // 128, 128, -1).permute(0, 2, 1)
        record(tensors, layer, layout="kitchen_tile_packed_w4a4")


def post_smoothing(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    for name in [name for name in tensors if name.endswith(".proj_down")]:
        layer = name.removesuffix(".proj_down")
        # Wide, so that folding it back loses nothing that the type could have kept.
        smooth = 2 ** tensors[f"{layer}.smooth_factor"].float().log2().round()
        tensors[f"{layer}.smooth_factor"] = smooth.bfloat16()
        tensors[name] = (tensors[name].float() * smooth[:, None]).bfloat16()
        record(tensors, layer, lowrank_branch_input_basis="post_smoothing", proj_down_smooth_folded=False)


def power_of_two_smoothing(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    for name in [name for name in tensors if name.endswith(".smooth_factor")]:
        tensors[name] = (2 ** tensors[name].float().log2().round()).bfloat16()


def record(tensors: dict[str, torch.Tensor], layer: str, **more: object) -> None:
    text = json.dumps({"format": "svdquant_w4a4", **more}).encode()
    tensors[f"{layer}.comfy_quant"] = torch.tensor(list(text), dtype=torch.uint8)


@pytest.mark.parametrize("kernels", ["comfy", "plain"])
def test_tiles_hold_the_same_weights(tmp_path, kernels):
    source = files_of("svdquant-w4a4")["transformer"]
    path = altered(source, tmp_path / "tiled.safetensors", tiled)
    natural, found = (load("svdquant-w4a4", files, kernels=kernels) for files in (None, {"transformer": path}))
    assert torch.equal(latents(found, 2), latents(natural, 2))


def test_smoothing_is_folded_into_a_low_rank_part_that_was_made_behind_it(tmp_path):
    source = files_of("svdquant-w4a4")["transformer"]
    raw = altered(source, tmp_path / "raw.safetensors", power_of_two_smoothing)
    behind = altered(source, tmp_path / "behind.safetensors", post_smoothing)
    expected, found = (latents(load("svdquant-w4a4", {"transformer": path}), 2) for path in (raw, behind))
    assert torch.equal(found, expected)


def test_a_release_without_the_layout_is_named(monkeypatch):
    monkeypatch.setitem(LAYOUTS, "svdquant_w4a4", "NoSuchLayout")
    with pytest.raises(UnsupportedError, match=r"comfy-kitchen \d\S* has no layout 'NoSuchLayout' .*'svdquant_w4a4'"):
        load("svdquant-w4a4")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop("layers.0.attention.out.smooth_factor"), r"no tensor 'layers.0.attention.out.smooth_factor'"),
        (
            lambda t: t.update({"layers.0.attention.out.proj_up": t["layers.0.attention.out.proj_up"][:, :16]}),
            r"'layers.0.attention.out.proj_up' \(svdquant_w4a4\): expected BF16 or F16 \[384, 32\]",
        ),
        (lambda t: t.pop("layers.0.attention.out.comfy_quant"), "is a scale, and no record says"),
    ],
)
def test_a_damaged_svdquant_layer_is_named(tmp_path, change, says):
    path = altered(files_of("svdquant-w4a4")["transformer"], tmp_path / "bad.safetensors", lambda t, _: change(t))
    with pytest.raises(CheckpointError, match=says):
        load("svdquant-w4a4", {"transformer": path})


def test_an_input_that_would_have_to_be_shifted_is_refused(tmp_path):
    def change(tensors, metadata):
        record(tensors, "layers.0.attention.out", act_unsigned=True)

    path = altered(files_of("svdquant-w4a4")["transformer"], tmp_path / "bad.safetensors", change)
    with pytest.raises(UnsupportedError, match=r"'layers.0.attention.out': act_unsigned"):
        load("svdquant-w4a4", {"transformer": path})


# ---- NVFP4 with the other half of a byte first --------------------------------


def compressed(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """As compressed-tensors packs: low nibble first, scales row by row, global scales to divide by."""
    metadata.clear()
    for name in [name for name in tensors if name.endswith(".weight_scale_2")]:
        layer = name.removesuffix(".weight_scale_2")
        weight, scale = tensors.pop(f"{layer}.weight"), tensors[f"{layer}.weight_scale"]
        tensors[f"{layer}.weight_packed"] = (weight >> 4) | (weight << 4)
        plain = from_blocked(scale.view(torch.uint8), len(weight), weight.shape[1] // 8)
        tensors[f"{layer}.weight_scale"] = plain.view(torch.float8_e4m3fn)
        tensors[f"{layer}.weight_global_scale"] = tensors.pop(name).reciprocal().reshape(1)
        tensors[f"{layer}.input_global_scale"] = tensors.pop(f"{layer}.input_scale").reciprocal().reshape(1)


def test_compressed_tensors_nvfp4_is_recognised_and_converted(tmp_path):
    source = files_of("nvfp4")["transformer"]
    path = altered(source, tmp_path / "packed.safetensors", compressed)
    ours, theirs = load("nvfp4"), load("nvfp4", {"transformer": path})
    name = "layers.1.feed_forward.w2"
    mine, other = (loaded.pipeline.transformer.get_submodule(name).weight for loaded in (ours, theirs))
    assert torch.equal(mine._qdata, other._qdata)
    assert torch.equal(mine._params.block_scale.view(torch.uint8), other._params.block_scale.view(torch.uint8))
    # A reciprocal of a reciprocal may be off by the last bit.
    assert relative(latents(theirs, 2), latents(ours, 2)) < 1e-3
    assert theirs.tensors == ours.tensors


def test_read_without_conversion_it_would_be_noise(tmp_path, monkeypatch):
    from pytest_zimage.checkpoints import filling

    path = altered(files_of("nvfp4")["transformer"], tmp_path / "packed.safetensors", compressed)
    real = filling.to_comfy

    def scales_only(record, tensors):
        return {**real(record, tensors), "weight": tensors["weight"]}

    monkeypatch.setattr(filling, "to_comfy", scales_only)
    assert relative(latents(load("nvfp4", {"transformer": path}), 2), latents(load("nvfp4"), 2)) > 0.3


def test_nvfp4_that_nothing_explains_is_refused_with_the_reason(tmp_path):
    source = files_of("nvfp4")["transformer"]
    path = altered(source, tmp_path / "bare.safetensors", lambda _, metadata: metadata.clear())
    with pytest.raises(CheckpointError, match=r"is a scale, and no record says|nothing in the file says how") as caught:
        load("nvfp4", {"transformer": path})
    assert caught.value.mend


def test_a_packed_weight_of_another_kind_is_refused(tmp_path):
    def change(tensors, metadata):
        compressed(tensors, metadata)
        tensors.pop("layers.0.attention.out.weight_global_scale")

    path = altered(files_of("nvfp4")["transformer"], tmp_path / "other.safetensors", change)
    with pytest.raises(CheckpointError, match=r"'layers.0.attention.out.weight_packed' is packed by compressed"):
        load("nvfp4", {"transformer": path})


def test_a_variant_of_another_set_of_keys_is_unchanged():
    """The new keys of a variant have defaults under which the six published ones are what they were."""
    for variant in CATALOG.variants.values():
        if variant.default:
            assert set(variant.files()) == {"transformer", "text_encoder", "vae"}
            assert structs.replace(variant, lora="x.safetensors").files()["lora"] == "x.safetensors"
