"""Which tensors are quantised layers: ComfyUI's three records, their order, and everything a file may get wrong."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from pytest_zimage.checkpoints.formats import KNOWN_FORMATS, detect
from pytest_zimage.checkpoints.header import Header, TensorInfo, tensor_bytes
from pytest_zimage.errors import CheckpointError, UnsupportedError

N, K = 256, 128
FP8 = {"format": "float8_e4m3fn"}
WEIGHTS = {
    "fp8": {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("F32", ())},
    "nvfp4": {
        "weight": ("U8", (N, K // 2)),
        "weight_scale": ("F8_E4M3", (256, 8)),
        "weight_scale_2": ("F32", ()),
    },
    "mxfp8": {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("U8", (256, 4))},
    "int8": {"weight": ("I8", (N, K)), "weight_scale": ("F32", (N, 1))},
}


def layer(kind, name="x", **change):
    tensors = {suffix: value for suffix, value in {**WEIGHTS[kind], **change}.items() if value is not None}
    return {f"{name}.{suffix}": value for suffix, value in tensors.items()}


def blob(value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return ("U8", (len(text),), text)


def read_contents(tensors, layers=None, metadata=None):
    """`tensors`: name to (dtype, shape[, bytes]); `layers`: the header's record."""
    begin, infos, data = 1000, {}, {}
    for name, (dtype, shape, *content) in tensors.items():
        end = begin + tensor_bytes(dtype, shape)
        infos[name] = TensorInfo(name, dtype, tuple(shape), begin, end)
        data[name] = content[0] if content else bytes(end - begin)
        begin = end
    if layers is not None:
        metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    header = Header(Path("/models/x.safetensors"), metadata or {}, infos, 1000, begin)
    return detect(header, lambda tensor: data[tensor.name])


def refusal(tensors, layers=None, metadata=None, kind=CheckpointError):
    with pytest.raises(kind) as caught:
        read_contents(tensors, layers, metadata)
    assert "/models/x.safetensors" in caught.value.message
    assert caught.value.mend
    return caught.value


def test_plain_file():
    contents = read_contents({"a.weight": ("BF16", (4, 4)), "b": ("F32", (1,))})
    assert contents.source == "none"
    assert set(contents.plain) == {"a.weight", "b"}
    assert contents.quantised == {}


@pytest.mark.parametrize("record", [{"format": "nvfp4"}, "nvfp4"])
def test_header_record_as_table_or_bare_name(record):
    contents = read_contents({**layer("nvfp4"), "x.bias": ("BF16", (N,))}, layers={"x": record})
    assert contents.source == "header"
    assert contents.quantised["x"].format == "nvfp4"
    assert set(contents.quantised["x"].tensors) == {"weight", "weight_scale", "weight_scale_2"}
    assert set(contents.plain) == {"x.bias"}


def test_blobs_mix_formats_and_leave_no_trace():
    tensors = {
        **layer("fp8", "a"),
        "a.comfy_quant": blob({"format": "float8_e4m3fn", "full_precision_matrix_mult": True}),
        **layer("nvfp4", "b", input_scale=("F32", ()), pre_quant_scale=("BF16", (K,))),
        "b.comfy_quant": blob({"format": "nvfp4", "group_size": 16}),
        **layer("mxfp8", "c"),
        "c.comfy_quant": blob({"format": "mxfp8"}),
        **layer("int8", "d"),
        "d.comfy_quant": blob({"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": 64}),
    }
    contents = read_contents(tensors)
    assert contents.source == "blobs"
    assert contents.plain == {}
    assert [held.format for held in contents.quantised.values()] == [
        "float8_e4m3fn",
        "nvfp4",
        "mxfp8",
        "int8_tensorwise",
    ]
    assert [held.weight_only for held in contents.quantised.values()] == [True, False, False, False]
    assert {"input_scale", "pre_quant_scale"} < set(contents.quantised["b"].tensors)
    assert contents.quantised["d"].options["convrot_groupsize"] == 64


@pytest.mark.parametrize(("elements", "weight_only"), [(2, True), (1, False), (0, False)])
def test_scaled_fp8_marker(elements, weight_only):
    tensors = {
        "scaled_fp8": ("F8_E4M3", (elements,)),
        "x.weight": ("F8_E4M3", (N, K)),
        "x.scale_weight": ("F32", (1,)),
        "norm.weight": ("F32", (K,)),
    }
    contents = read_contents(tensors)
    assert contents.source == "scaled_fp8"
    assert contents.quantised["x"].weight_only is weight_only
    assert contents.quantised["x"].tensors["weight_scale"].name == "x.scale_weight"
    assert set(contents.plain) == {"norm.weight"}


@pytest.mark.parametrize(("scale", "kept"), [(1.0, False), (0.5, True)])
def test_scale_input_of_one_is_dropped(scale, kept):
    tensors = {
        "scaled_fp8": ("F8_E4M3", (0,)),
        "x.weight": ("F8_E4M3", (N, K)),
        "x.scale_weight": ("F32", ()),
        "x.scale_input": ("F32", (), struct.pack("<f", scale)),
    }
    contents = read_contents(tensors)
    assert ("input_scale" in contents.quantised["x"].tensors) is kept
    assert contents.plain == {}


def test_header_wins_over_blob_and_blob_over_marker():
    tensors = {**layer("fp8"), "x.comfy_quant": blob({"format": "nvfp4"})}
    assert read_contents(tensors, layers={"x": "float8_e4m3fn"}).quantised["x"].format == "float8_e4m3fn"

    tensors = {
        "scaled_fp8": ("F8_E4M3", (2,)),
        "x.weight": ("F8_E4M3", (N, K)),
        "x.scale_weight": ("F32", ()),
        "x.comfy_quant": blob({"format": "float8_e4m3fn"}),
    }
    contents = read_contents(tensors)
    assert contents.source == "blobs"
    assert contents.quantised["x"].weight_only is False


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model."])
def test_prefix_is_removed_from_tensors_and_records(prefix):
    tensors = {f"{prefix}{name}": value for name, value in {**layer("fp8"), "n.weight": ("BF16", (K,))}.items()}
    for layers in ({f"{prefix}x": "float8_e4m3fn"}, {"x": "float8_e4m3fn"}):
        contents = read_contents(tensors, layers=layers)
        assert contents.prefix == prefix
        assert set(contents.plain) == {"n.weight"}
        assert contents.quantised["x"].tensors["weight"].name == f"{prefix}x.weight"


def test_prefixed_marker():
    prefix = "model.diffusion_model."
    tensors = {"scaled_fp8": ("F8_E4M3", (2,)), "x.weight": ("F8_E4M3", (N, K)), "x.scale_weight": ("F32", (1,))}
    contents = read_contents({f"{prefix}{name}": value for name, value in tensors.items()})
    assert contents.quantised["x"].weight_only is True


def test_text_encoder_names_keep_their_model():
    contents = read_contents({"model.layers.0.mlp.up_proj.weight": ("BF16", (4, 4))})
    assert contents.prefix == ""
    assert set(contents.plain) == {"model.layers.0.mlp.up_proj.weight"}


@pytest.mark.parametrize(
    ("kind", "format_", "dtype"),
    [("mxfp8", "mxfp8", "U8"), ("mxfp8", "mxfp8", "F8_E8M0"), ("nvfp4", "nvfp4", "U8"), ("nvfp4", "nvfp4", "F8_E4M3")],
)
def test_block_scales_may_be_bytes(kind, format_, dtype):
    shape = WEIGHTS[kind]["weight_scale"][1]
    contents = read_contents(layer(kind, weight_scale=(dtype, shape)), layers={"x": format_})
    assert contents.quantised["x"].tensors["weight_scale"].dtype == dtype


@pytest.mark.parametrize(
    ("rows", "packed", "scales"),
    [(16, 8, (128, 4)), (128, 32, (128, 4)), (144, 40, (256, 8)), (11520, 1920, (11520, 240))],
)
def test_nvfp4_scale_tiles_are_padded(rows, packed, scales):
    tensors = layer("nvfp4", weight=("U8", (rows, packed)), weight_scale=("F8_E4M3", scales))
    assert read_contents(tensors, layers={"x": "nvfp4"}).quantised["x"].tensors["weight_scale"].shape == scales


def test_unknown_format_names_file_layer_format_and_the_known_ones():
    error = refusal(layer("fp8"), layers={"x": "fp3_odd"})
    assert "layer 'x': unknown quantisation format 'fp3_odd'" in error.message
    assert all(known in error.mend for known in KNOWN_FORMATS)


def test_format_that_only_comfyui_reads():
    error = refusal(layer("fp8"), layers={"x": "awq_w4a16"}, kind=UnsupportedError)
    assert "'awq_w4a16' is not served" in error.message


@pytest.mark.parametrize(
    ("tensors", "format_", "message"),
    [
        (layer("fp8", weight=None), "float8_e4m3fn", "layer 'x' (float8_e4m3fn) has no tensor 'x.weight'"),
        (layer("fp8", weight_scale=None), "float8_e4m3fn", "has no tensor 'x.weight_scale'"),
        (layer("nvfp4", weight_scale_2=None), "nvfp4", "has no tensor 'x.weight_scale_2'"),
        (layer("fp8", weight=("BF16", (N, K))), "float8_e4m3fn", "'x.weight' (float8_e4m3fn): expected dtype F8_E4M3"),
        (layer("fp8", weight=("F8_E4M3", (K,))), "float8_e4m3fn", "expected a matrix"),
        (
            layer("fp8", weight_scale=("F32", (2,))),
            "float8_e4m3fn",
            "'x.weight_scale' (float8_e4m3fn): expected one number",
        ),
        (layer("fp8", weight_scale=("BF16", ())), "float8_e4m3fn", "expected one F32 number"),
        (layer("fp8", input_scale=("F32", (N,))), "float8_e4m3fn", "'x.input_scale'"),
        (
            layer("nvfp4", weight_scale=("F8_E4M3", (128, 8))),
            "nvfp4",
            "expected F8_E4M3 or U8 [256, 8], found F8_E4M3 [128, 8]",
        ),
        (layer("nvfp4", weight_scale=("F32", (256, 8))), "nvfp4", "found F32 [256, 8]"),
        (layer("nvfp4", weight_scale_2=("F32", (N,))), "nvfp4", "'x.weight_scale_2'"),
        (layer("nvfp4", pre_quant_scale=("BF16", (N,))), "nvfp4", "'x.pre_quant_scale' (nvfp4)"),
        (layer("mxfp8", weight_scale=("U8", (256, 8))), "mxfp8", "expected F8_E8M0 or U8 [256, 4]"),
        (layer("int8", weight_scale=("F32", (K,))), "int8_tensorwise", "'x.weight_scale' (int8_tensorwise)"),
    ],
)
def test_incomplete_or_misshapen_layer(tensors, format_, message):
    assert message in refusal(tensors, layers={"x": format_}).message


@pytest.mark.parametrize(
    ("shape", "blocks"),
    [((N,), (1, K)), ((N, 1), (1, K)), ((2, 1), (N // 2, K)), ((2, 1, 4, 1), (N // 2, K // 4)), ((), None)],
)
def test_fp8_scales_finer_than_a_tensor(shape, blocks):
    found = read_contents(layer("fp8", weight_scale=("F32", shape)), layers={"x": "float8_e4m3fn"})
    assert found.quantised["x"].scale_blocks == blocks


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3,), "F32"), ((K,), "F32"), ((2, 1, 1), "F32"), ((7, 1), "F32"), ((N,), "BF16")]
)
def test_fp8_scales_that_divide_nothing(shape, dtype):
    tensors = layer("fp8", weight_scale=(dtype, shape))
    assert "'x.weight_scale' (float8_e4m3fn)" in refusal(tensors, layers={"x": "float8_e4m3fn"}).message


def test_inverse_block_scales():
    tensors = {"x.weight": ("F8_E4M3", (N, K)), "x.weight_scale_inv": ("F32", (2, 1))}
    error = refusal(tensors, kind=UnsupportedError)
    assert "'x.weight_scale_inv': FP8 block scales" in error.message


@pytest.mark.parametrize(
    "suffix", ["weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "scale_weight", "scale_input"]
)
def test_scale_without_a_layer(suffix):
    error = refusal({"x.weight": ("BF16", (N, K)), f"x.{suffix}": ("F32", ())})
    assert f"'x.{suffix}' is a scale" in error.message


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "U8", "I8"])
def test_packed_weight_that_nothing_explains(dtype):
    error = refusal({"x.weight": (dtype, (N, K))})
    assert f"'x.weight' is {dtype}, and nothing in the file says how" in error.message


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"_quantization_metadata": "{"}, "is not JSON"),
        ({"_quantization_metadata": "[]"}, "no table 'layers'"),
        ({"_quantization_metadata": '{"layers": []}'}, "no table 'layers'"),
        ({"_quantization_metadata": '{"layers": {"x": 4}}'}, "names no format"),
        ({"_quantization_metadata": '{"layers": {"x": {"format": 4}}}'}, "names no format"),
        (
            {"_quantization_metadata": json.dumps({"layers": {"x": {**FP8, "full_precision_matrix_mult": 1}}})},
            "full_precision_matrix_mult is 1",
        ),
    ],
)
def test_damaged_header_record(metadata, message):
    assert message in refusal(layer("fp8"), metadata=metadata).message


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (blob(b"{oops"), "not JSON"),
        (blob(b"\xff\xff"), "not JSON"),
        (("F32", (4,)), "short U8 vector"),
        (("U8", (70000,)), "short U8"),
    ],
)
def test_damaged_blob(tensor, message):
    error = refusal({**layer("fp8"), "x.comfy_quant": tensor})
    assert "'x.comfy_quant'" in error.message
    assert message in error.message


def test_name_with_and_without_prefix():
    error = refusal({"a": ("BF16", (1,)), "diffusion_model.a": ("BF16", (1,))})
    assert "with and without" in error.message


def test_old_and_new_scale_of_one_layer():
    error = refusal({**layer("fp8"), "scaled_fp8": ("F8_E4M3", (2,)), "x.scale_weight": ("F32", ())})
    assert "both 'x.scale_weight' and 'x.weight_scale'" in error.message


def test_marker_record_of_a_layer_without_weight():
    error = refusal({"scaled_fp8": ("F8_E4M3", (2,)), "x.scale_weight": ("F32", ())})
    assert "has no tensor 'x.weight'" in error.message
