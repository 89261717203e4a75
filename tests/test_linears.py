"""Linear layers: each kind computes exactly what ComfyUI's of that kind does, and never quietly something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn
from torch.nn import functional as F

from pytest_zimage.checkpoints.formats import QuantisedLayer
from pytest_zimage.checkpoints.header import TensorInfo
from pytest_zimage.checkpoints.linears import (
    CastLinear,
    FastFp8Linear,
    Int8Linear,
    QuantisedActivationsLinear,
    WeightOnlyLinear,
)
from pytest_zimage.checkpoints.quantised import (
    LAYOUTS,
    ScaleCheck,
    held_tensors,
    logical_shape,
    multiplies_natively,
    split_rows,
    storage_type,
    weight_tensor,
)
from pytest_zimage.errors import CheckpointError, UnsupportedError

FP8 = torch.float8_e4m3fn
FILE = Path("some.safetensors")
ROWS, COLUMNS = 384, 128


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear(bias: bool = True) -> nn.Linear:
    module = nn.Linear(COLUMNS, ROWS, bias=bias, device="meta")
    if bias:
        module.bias = nn.Parameter(random(ROWS, seed=9), requires_grad=False)
    return module


def fill(module: nn.Module, weight: torch.Tensor) -> nn.Module:
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def layer(format_: str, **shapes: tuple[int, ...]) -> QuantisedLayer:
    tensors = {suffix: TensorInfo(f"x.{suffix}", "U8", shape, 0, 0) for suffix, shape in shapes.items()}
    return QuantisedLayer("x", format_, False, tensors)


def quantised(format_: str, dtype: torch.dtype = torch.bfloat16) -> QuantizedTensor:
    return QuantizedTensor.from_float(random(ROWS, COLUMNS, seed=3, dtype=dtype) / 10, LAYOUTS[format_])


# ---- cast -----------------------------------------------------------------


def test_cast_stores_fp8_and_computes_in_the_inputs_type() -> None:
    module = CastLinear(linear())
    fill(module, random(ROWS, COLUMNS).to(FP8))
    module.bias = nn.Parameter(random(ROWS, seed=9).to(FP8), requires_grad=False)
    x = random(2, 5, COLUMNS, seed=1)
    expected = F.linear(x, module.weight.to(torch.bfloat16), module.bias.to(torch.bfloat16))
    assert torch.equal(module(x), expected)
    assert module.weight.dtype == FP8
    assert module(x.float()).dtype == torch.float32


# ---- fast FP8 -------------------------------------------------------------


def fast() -> FastFp8Linear:
    return fill(FastFp8Linear(linear()), FastFp8Linear.pack(random(ROWS, COLUMNS).to(FP8), torch.bfloat16))


def emulated_fast(module: FastFp8Linear, x: torch.Tensor) -> torch.Tensor:
    codes = x.float().clamp(-448, 448).to(FP8).float()
    return F.linear(codes, module.weight.dequantize().float(), module.bias.float())


@pytest.mark.parametrize("shape", [(7, COLUMNS), (2, 5, COLUMNS)])
def test_fast_multiplies_clamped_fp8_without_scales(shape: tuple[int, ...]) -> None:
    module, x = fast(), random(*shape, seed=1) * 300
    assert x.abs().max() > 448
    kept = x.clone()
    y = module(x)
    assert torch.equal(x, kept), "the caller's tensor was clamped in place"
    assert y.dtype == torch.bfloat16
    assert y.shape == (*shape[:-1], ROWS)
    torch.testing.assert_close(y.float(), emulated_fast(module, x), rtol=1e-2, atol=1e-1)
    # Far from what the cast alone gives, so that the check above means something.
    cast = F.linear(x, module.weight.dequantize(), module.bias).float()
    assert (cast - y.float()).norm() / cast.norm() > 0.02


@pytest.mark.parametrize("shape", [(COLUMNS,), (2, 3, 5, COLUMNS)])
def test_fast_casts_inputs_of_other_ranks(shape: tuple[int, ...]) -> None:
    module, x = fast(), random(*shape, seed=1)
    assert torch.equal(module(x), F.linear(x, module.weight.dequantize(), module.bias))


def test_packed_weight_keeps_its_codes() -> None:
    codes = random(ROWS, COLUMNS).to(FP8)
    packed = FastFp8Linear.pack(codes, torch.bfloat16)
    assert torch.equal(packed.dequantize(), codes.to(torch.bfloat16))
    assert packed.dtype == torch.bfloat16
    assert storage_type(packed) == "float8_e4m3fn"


# ---- weight-only ----------------------------------------------------------


@pytest.mark.parametrize("format_", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weight_only_leaves_activations_alone(format_: str, dtype: torch.dtype) -> None:
    module = fill(WeightOnlyLinear(linear()), quantised(format_, dtype))
    x = random(2, 5, COLUMNS, seed=1, dtype=dtype)
    expected = F.linear(x, module.weight.dequantize().to(dtype), module.bias.to(dtype))
    assert torch.equal(module(x), expected)


def test_pre_quant_scale_multiplies_the_input() -> None:
    module = fill(WeightOnlyLinear(linear(bias=False)), quantised("float8_e4m3fn"))
    x = random(3, COLUMNS, seed=1)
    plain = module(x)
    module.pre_quant_scale = torch.full((COLUMNS,), 2.0)
    assert torch.equal(module(x), plain * 2)


# ---- quantised activations ------------------------------------------------


def test_fp8_activations_are_scaled_by_one_unless_the_file_says_else() -> None:
    module = fill(QuantisedActivationsLinear(linear()), quantised("float8_e4m3fn"))
    x = random(2, 5, COLUMNS, seed=1)
    weight = module.weight.dequantize().float()

    def emulated(scale: float) -> torch.Tensor:
        codes = (x.float() / scale).clamp(-448, 448).to(FP8).float() * scale
        return F.linear(codes, weight, module.bias.float())

    module.set_input_scale(None)
    torch.testing.assert_close(module(x).float(), emulated(1.0), rtol=1e-2, atol=2e-2)
    module.set_input_scale(torch.tensor([0.25]))
    static = module(x).float()
    torch.testing.assert_close(static, emulated(0.25), rtol=1e-2, atol=2e-2)


def test_nvfp4_activations_without_a_kernel_fail_loudly() -> None:
    """A CPU has no such kernel. A layer that was built for one must not compute in another way instead."""
    module = fill(QuantisedActivationsLinear(linear()), quantised("nvfp4"))
    module.set_input_scale(None)
    with pytest.raises(ValueError, match="swizzle"):
        module(random(32, COLUMNS, seed=1))


def test_int8_quantises_rows_itself() -> None:
    weight = QuantizedTensor.from_float(random(ROWS, COLUMNS, seed=3) / 10, LAYOUTS["int8_tensorwise"])
    module = fill(Int8Linear(linear()), weight)
    x = random(2, 5, COLUMNS, seed=1)
    exact = F.linear(x.float(), weight.dequantize().float(), module.bias.float())
    error = (module(x).float() - exact).norm() / exact.norm()
    assert 1e-4 < error < 2e-2


def test_only_what_is_defined_so_multiplies_natively_on_a_cpu() -> None:
    assert [f for f in LAYOUTS if multiplies_natively(f, torch.device("cpu"))] == ["svdquant_w4a4"]


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((8, 6), []),
        ((8, 9), ["float8_e4m3fn"]),
        ((9, 0), ["float8_e4m3fn"]),
        ((12, 1), ["float8_e4m3fn", "nvfp4", "mxfp8"]),
    ],
)
def test_native_formats_follow_the_compute_capability(monkeypatch, capability, native) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    device = torch.device("cuda", 0)
    assert [f for f in ("float8_e4m3fn", "nvfp4", "mxfp8") if multiplies_natively(f, device)] == native


def test_release_without_the_layout_is_named(monkeypatch) -> None:
    monkeypatch.setitem(LAYOUTS, "mxfp8", "NoSuchLayout")
    with pytest.raises(UnsupportedError, match=r"comfy-kitchen .* 'NoSuchLayout' .* 'mxfp8'"):
        multiplies_natively("mxfp8", torch.device("cuda", 0))


# ---- weights --------------------------------------------------------------


def stored(weight: QuantizedTensor) -> dict[str, torch.Tensor]:
    return {f"weight{suffix}": tensor for suffix, tensor in weight.state_dict().items()}


@pytest.mark.parametrize("format_", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_weight_is_built_from_its_stored_tensors(format_: str, as_bytes: bool) -> None:
    weight = quantised(format_)
    tensors = stored(weight)
    if as_bytes and tensors["weight_scale"].element_size() == 1:
        tensors["weight_scale"] = tensors["weight_scale"].view(torch.uint8)
    info = layer(format_, **{suffix: tuple(tensor.shape) for suffix, tensor in tensors.items()})
    built = weight_tensor(info, tensors, (ROWS, COLUMNS), torch.bfloat16)
    assert torch.equal(built.dequantize(), weight.dequantize())
    assert logical_shape(info) == (ROWS, COLUMNS)


@pytest.mark.parametrize("format_", ["float8_e4m3fn", "nvfp4", "mxfp8", "int8_tensorwise"])
def test_splitting_rows_is_exact(format_: str) -> None:
    weight = quantised(format_)
    parts = split_rows(FILE, layer(format_, weight=(ROWS, COLUMNS)), weight, 3)
    assert [part.shape[0] for part in parts] == [128] * 3
    assert torch.equal(torch.cat([part.dequantize() for part in parts]), weight.dequantize())


def test_splitting_across_a_tile_is_refused() -> None:
    weight = QuantizedTensor.from_float(random(192, COLUMNS), LAYOUTS["nvfp4"])
    with pytest.raises(UnsupportedError, match=r"some\.safetensors.*'x'.*64 rows"):
        split_rows(FILE, layer("nvfp4", weight=(192, COLUMNS // 2)), weight, 3)


def test_bytes_are_those_held() -> None:
    weight = quantised("nvfp4")
    assert storage_type(weight) == "nvfp4"
    assert sum(part.nbytes for part in held_tensors(weight)) == ROWS * COLUMNS // 2 + ROWS * COLUMNS // 16 + 4


# ---- scales ---------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0, 0.0])
def test_impossible_scalar_scale_is_refused_by_name(value: float) -> None:
    check = ScaleCheck(FILE)
    check.add(layer("float8_e4m3fn"), "weight_scale", torch.tensor([value]))
    with pytest.raises(CheckpointError, match=r"some\.safetensors.*'x\.weight_scale'"):
        check.finish()


@pytest.mark.parametrize(("format_", "code"), [("nvfp4", 0x7F), ("nvfp4", 0xFF), ("nvfp4", 0xB8), ("mxfp8", 0xFF)])
def test_impossible_block_scale_is_refused(format_: str, code: int) -> None:
    scale = torch.zeros(128, 8, dtype=torch.uint8)
    check = ScaleCheck(FILE)
    check.add(layer(format_), "weight_scale", scale)
    check.finish()
    scale[3, 2] = code
    check.add(layer(format_), "weight_scale", scale)
    with pytest.raises(CheckpointError, match="weight_scale"):
        check.finish()


def test_sound_scales_pass() -> None:
    check = ScaleCheck(FILE)
    check.finish()
    check.add(layer("nvfp4"), "weight_scale", stored(quantised("nvfp4"))["weight_scale"])
    check.add(layer("nvfp4"), "weight_scale_2", torch.tensor(0.01))
    check.finish()
