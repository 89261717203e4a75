"""Prompts are encoded by the encoder's own layers."""

from __future__ import annotations

import pytest
import torch
from tiny_files import CPU, load

from pytest_zimage.engines.encoding import PromptEncoder

IDS = torch.tensor([[1, 5, 9, 2, 7, 3]])


@pytest.fixture(scope="module")
def text_encoder(tiny):
    return load("bf16").pipeline.text_encoder


def test_it_is_the_last_hidden_state_but_one(text_encoder):
    with torch.inference_mode():
        theirs = text_encoder(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states[-2][0]
        assert torch.equal(PromptEncoder(text_encoder, CPU)(IDS), theirs)


def test_each_token_sees_only_those_before_it(text_encoder):
    """No mask is passed; were attention not causal without one, a later token would change the earlier ones."""
    encoder = PromptEncoder(text_encoder, CPU)
    with torch.inference_mode():
        whole, start = encoder(IDS), encoder(IDS[:, :4])
    assert torch.allclose(whole[:4], start, atol=1e-5)
    assert not torch.allclose(whole[4], whole[5], atol=1e-3)


def test_a_cpu_goes_kernel_by_kernel(text_encoder):
    encoder = PromptEncoder(text_encoder, CPU)
    encoder.capture(IDS)
    assert encoder.how == "kernel by kernel"
