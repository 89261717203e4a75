"""Attention on comfy-kitchen: the same mathematics as diffusers' own, in another order of work."""

from __future__ import annotations

import pytest
import torch
from diffusers.models.transformers.transformer_z_image import RopeEmbedder, ZImageTransformerBlock
from torch.nn.utils.rnn import pad_sequence

from pytest_zimage.checkpoints import attention
from pytest_zimage.checkpoints.attention import FusedAttention, MatrixRope

DIM, HEADS, LENGTH = 384, 3, 64
AXES_DIMS, AXES_LENS = [32, 48, 48], [64, 32, 32]


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def positions(length: int = LENGTH) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randint(0, limit, (length,), generator=generator) for limit in AXES_LENS], dim=1)


def theirs_and_ours(dtype: torch.dtype) -> tuple[torch.nn.Module, FusedAttention]:
    """diffusers' attention with random weights, and the fused one with the same."""
    torch.manual_seed(0)
    theirs = ZImageTransformerBlock(0, DIM, HEADS, HEADS, 1e-5, True).attention
    for norm in (theirs.norm_q, theirs.norm_k):
        norm.weight.copy_(1 + 0.2 * torch.randn_like(norm.weight))
    ours = FusedAttention(DIM, HEADS, theirs.norm_q.eps)
    ours.qkv.weight.copy_(torch.cat([theirs.to_q.weight, theirs.to_k.weight, theirs.to_v.weight]))
    ours.to_out[0].weight.copy_(theirs.to_out[0].weight)
    ours.norm_q.weight.copy_(theirs.norm_q.weight)
    ours.norm_k.weight.copy_(theirs.norm_k.weight)
    return theirs.to(dtype), ours.to(dtype)


def compare(dtype: torch.dtype, mask: torch.Tensor | None = None) -> float:
    theirs, ours = theirs_and_ours(dtype)
    x = torch.randn(2, LENGTH, DIM).to(dtype)
    ids = positions()
    complex_ = RopeEmbedder(256.0, AXES_DIMS, AXES_LENS)(ids)[None].expand(2, -1, -1)
    matrices = MatrixRope(256.0, AXES_DIMS, AXES_LENS, torch.device("cpu"))(ids)[None].expand(2, *[-1] * 4)
    expected = theirs(x, attention_mask=mask, freqs_cis=complex_).float()
    found = ours(x, attention_mask=mask, freqs_cis=matrices).float()
    return float((found - expected).norm() / expected.norm())


def test_rotations_are_diffusers_frequencies() -> None:
    ids = positions()
    matrices = MatrixRope(256.0, AXES_DIMS, AXES_LENS, torch.device("cpu"))(ids)
    complex_ = RopeEmbedder(256.0, AXES_DIMS, AXES_LENS)(ids)
    assert matrices.shape == (LENGTH, sum(AXES_DIMS) // 2, 2, 2)
    assert matrices.dtype == torch.float32
    for row, column, part in ((0, 0, complex_.real), (0, 1, -complex_.imag), (1, 0, complex_.imag)):
        torch.testing.assert_close(matrices[..., row, column], part, rtol=0, atol=2e-7)


def test_rotations_survive_diffusers_batching() -> None:
    matrices = MatrixRope(256.0, AXES_DIMS, AXES_LENS, torch.device("cpu"))(positions())
    parts = list(matrices.split([40, 24], dim=0))
    padded = pad_sequence(parts, batch_first=True, padding_value=0.0)
    assert padded.shape == (2, 40, sum(AXES_DIMS) // 2, 2, 2)
    assert torch.equal(torch.cat([padded[0][:40], padded[1][:24]]), matrices)


def test_agrees_with_diffusers_to_rounding_in_float32() -> None:
    assert compare(torch.float32) < 2e-6


def test_agrees_with_diffusers_within_one_percent_in_bfloat16() -> None:
    assert compare(torch.bfloat16) < 1e-2


def test_mask_hides_the_same_tokens() -> None:
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, 40:] = False
    assert compare(torch.float32, mask) < 2e-6


def test_releases_without_rms_rope_compute_the_same(monkeypatch) -> None:
    with_kernel = compare(torch.float32)
    called = []
    monkeypatch.setattr(attention.ck, "rms_rope", lambda *_: called.append(1))
    monkeypatch.setattr(attention, "_HAS_RMS_ROPE", False)
    assert compare(torch.float32) == pytest.approx(with_kernel, abs=1e-6)
    assert not called


def test_comparison_notices_exchanged_norms_and_lost_rotation() -> None:
    theirs, ours = theirs_and_ours(torch.float32)
    x = torch.randn(1, LENGTH, DIM)
    ids = positions()
    rope = MatrixRope(256.0, AXES_DIMS, AXES_LENS, torch.device("cpu"))
    right = ours(x, freqs_cis=rope(ids)[None])
    assert (ours(x, freqs_cis=rope(ids * 0)[None]) - right).norm() / right.norm() > 1e-2
    ours.norm_q.weight.copy_(theirs.norm_k.weight)
    assert (ours(x, freqs_cis=rope(ids)[None]) - right).norm() / right.norm() > 1e-3


def test_norm_weights_are_cast_where_they_are_used() -> None:
    _, ours = theirs_and_ours(torch.bfloat16)
    freqs = MatrixRope(256.0, AXES_DIMS, AXES_LENS, torch.device("cpu"))(positions())[None]
    x = torch.randn(1, LENGTH, DIM).bfloat16()
    for norm in (ours.norm_q, ours.norm_k):
        norm.weight = torch.nn.Parameter(norm.weight.to(torch.float8_e4m3fn), requires_grad=False)
    stored = ours(x, freqs_cis=freqs)
    for norm in (ours.norm_q, ours.norm_k):
        norm.weight = torch.nn.Parameter(norm.weight.to(torch.bfloat16), requires_grad=False)
    assert torch.equal(stored, ours(x, freqs_cis=freqs))


def test_positions_are_required() -> None:
    _, ours = theirs_and_ours(torch.float32)
    with pytest.raises(TypeError, match="freqs_cis"):
        ours(torch.zeros(1, LENGTH, DIM))
