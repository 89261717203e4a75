"""The fused transformer block: diffusers' mathematics in fewer passes, and one quantisation for two linears."""

from __future__ import annotations

import pytest
import torch
from comfy_kitchen.tensor import QuantizedTensor
from diffusers.models.transformers.transformer_z_image import RopeEmbedder, ZImageTransformerBlock
from torch import nn

from pytest_zimage.checkpoints.attention import MatrixRope
from pytest_zimage.checkpoints.blocks import FusedBlock, FusedFeedForward
from pytest_zimage.checkpoints.linears import FP8, FastFp8Linear, QuantisedActivationsLinear, WeightOnlyLinear

DIM, HEADS, HIDDEN, LENGTH, TIMESTEP = 384, 3, 1024, 64, 256
AXES_DIMS, AXES_LENS = [32, 48, 48], [64, 32, 32]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        torch.manual_seed(0)
        yield


def theirs_and_ours(modulated: bool) -> tuple[ZImageTransformerBlock, FusedBlock]:
    """diffusers' block with random weights, and the fused one with the same."""
    theirs = ZImageTransformerBlock(0, DIM, HEADS, HEADS, 1e-5, True, modulation=modulated)
    for name, weight in theirs.named_parameters():
        if weight.ndim == 1 and name.endswith("weight"):
            weight.copy_(1 + 0.2 * torch.randn_like(weight))
    modulation = theirs.adaLN_modulation if modulated else None
    ours = FusedBlock(DIM, HEADS, HIDDEN, eps=1e-5, head_eps=theirs.attention.norm_q.eps, modulation=modulation)
    weights = dict(theirs.named_parameters())
    qkv = torch.cat([weights.pop(f"attention.to_{part}.weight") for part in "qkv"])
    weights = {name.replace("attention.to_out.0", "attention.to_out.0"): value for name, value in weights.items()}
    ours.load_state_dict({**weights, "attention.qkv.weight": qkv})
    return theirs, ours


def positions() -> torch.Tensor:
    return torch.stack([torch.randint(0, limit, (LENGTH,)) for limit in AXES_LENS], dim=1)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("modulated", [True, False])
@pytest.mark.parametrize(("dtype", "within"), [(torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_is_diffusers_block_to_rounding(modulated, batch, dtype, within):
    theirs, ours = theirs_and_ours(modulated)
    theirs, ours = theirs.to(dtype), ours.to(dtype)
    ids = positions()
    x = torch.randn(batch, LENGTH, DIM).to(dtype)
    timestep = torch.randn(batch, TIMESTEP).to(dtype) if modulated else None
    complex_ = RopeEmbedder(256.0, AXES_DIMS, AXES_LENS)(ids)[None].expand(batch, -1, -1)
    matrices = MatrixRope(256.0, AXES_DIMS, AXES_LENS, torch.device("cpu"))(ids)[None].expand(batch, *[-1] * 4)
    expected = theirs(x, None, complex_, timestep).float()
    found = ours(x, None, matrices, timestep).float()
    # The change the block makes, since the residual alone would hide a block that does nothing.
    changed, meant = found - x.float(), expected - x.float()
    assert float((changed - meant).norm() / meant.norm()) < within


def test_modulation_matters():
    _, ours = theirs_and_ours(True)
    matrices = MatrixRope(256.0, AXES_DIMS, AXES_LENS, torch.device("cpu"))(positions())[None]
    x = torch.randn(1, LENGTH, DIM)
    one, other = (ours(x, None, matrices, torch.randn(1, TIMESTEP)) for _ in range(2))
    assert float((one - other).norm() / one.norm()) > 1e-2


def fast(rows: int, columns: int) -> FastFp8Linear:
    module = FastFp8Linear(nn.Linear(columns, rows, bias=False))
    module.weight = nn.Parameter(
        FastFp8Linear.pack(torch.randn(rows, columns).to(FP8), torch.bfloat16), requires_grad=False
    )
    return module


def static(rows: int, columns: int, scale: float) -> QuantisedActivationsLinear:
    module = QuantisedActivationsLinear(nn.Linear(columns, rows, bias=False))
    weight = QuantizedTensor.from_float(torch.randn(rows, columns).bfloat16(), "TensorCoreFP8Layout")
    module.weight = nn.Parameter(weight, requires_grad=False)
    module.set_input_scale(torch.tensor(scale))
    return module


@pytest.mark.parametrize(
    ("first", "second", "times"),
    [
        (lambda: fast(HIDDEN, DIM), lambda: fast(HIDDEN, DIM), 1),
        (lambda: static(HIDDEN, DIM, 0.5), lambda: static(HIDDEN, DIM, 0.5), 1),
        (lambda: static(HIDDEN, DIM, 0.5), lambda: static(HIDDEN, DIM, 0.25), 2),
        (lambda: static(HIDDEN, DIM, 1.0), lambda: fast(HIDDEN, DIM), 2),
    ],
)
def test_two_linears_that_quantise_alike_quantise_once(monkeypatch, first, second, times):
    ffn = FusedFeedForward(DIM, HIDDEN)
    ffn.w1, ffn.w2, ffn.w3 = first(), WeightOnlyLinear(nn.Linear(HIDDEN, DIM, bias=False)), second()
    ffn.w2.weight = nn.Parameter(
        QuantizedTensor.from_float(torch.randn(DIM, HIDDEN).bfloat16(), "TensorCoreFP8Layout"), requires_grad=False
    )
    x = torch.randn(1, LENGTH, DIM).bfloat16()
    flat = x.reshape(-1, DIM)
    hidden = torch.nn.functional.silu(ffn.w1(flat)) * ffn.w3(flat)
    expected = ffn.w2(hidden).reshape(x.shape)
    counted = []
    for kind in (FastFp8Linear, QuantisedActivationsLinear):
        own = kind.quantise
        monkeypatch.setattr(kind, "quantise", lambda self, x, own=own: counted.append(1) or own(self, x))
    assert torch.equal(ffn(x), expected)
    assert len(counted) == times
