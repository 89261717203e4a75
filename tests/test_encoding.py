"""Prompts are encoded by the encoder's own layers, and on a GPU replayed as a graph once they are warm."""

from __future__ import annotations

import pytest
import torch
from tiny_files import CPU, load

from pytest_zimage.engines import encoding
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


class Graph:
    """What a GPU would do with the layers, done at once."""

    made = 0

    def __init__(self, layers, ids):
        type(self).made += 1
        self.layers = layers

    def replay(self, ids):
        return self.layers(ids)[0] + 1000


@pytest.fixture
def on_gpu(text_encoder, monkeypatch):
    monkeypatch.setattr(encoding, "_Graph", Graph)
    monkeypatch.setattr(Graph, "made", 0)
    encoder = PromptEncoder(text_encoder, CPU)
    encoder._replays = True
    return encoder


def test_a_gpu_replays_prompts_of_a_length_it_has_captured(on_gpu):
    with torch.inference_mode():
        plain = on_gpu(IDS)
        on_gpu.capture(IDS)
        on_gpu.capture(IDS + 1)
        assert (Graph.made, on_gpu.how) == (1, "replayed as a graph")
        assert torch.equal(on_gpu(IDS), plain + 1000)
        assert torch.equal(on_gpu(IDS, replay=False), plain)
        assert torch.equal(on_gpu(IDS[:, :3]), on_gpu(IDS[:, :3], replay=False))


def test_a_gpu_that_refuses_to_capture_goes_on_and_says_so(on_gpu, monkeypatch):
    def refuse(layers, ids):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(encoding, "_Graph", refuse)
    with torch.inference_mode():
        plain = on_gpu(IDS)
        on_gpu.capture(IDS)
        assert torch.equal(on_gpu(IDS), plain)
    assert on_gpu.how == "kernel by kernel: operation not permitted when stream is capturing"
