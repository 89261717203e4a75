"""What is warm is replayed as a graph on a GPU: the same images come out, and what counts kernels launches them."""

from __future__ import annotations

import logging

import pytest
import torch
from tiny_files import CATALOG, engine, silent

from pytest_zimage.engines import replay
from pytest_zimage.engines.protocol import Draw, DrawImages, ImageJob
from pytest_zimage.engines.replay import Replays
from pytest_zimage.errors import MeasurementError

INPUT = torch.tensor([[1.0, 5.0, 9.0]])


class Graph:
    """What a GPU would do with the captured kernels, done at once."""

    def __init__(self, made, function, inputs):
        self.function, self.replayed = function, 0
        made.append(self)
        function(*inputs)

    def replay(self, inputs):
        self.replayed += 1
        return [tensor.clone() for tensor in self.function(*inputs)]


@pytest.fixture
def graphs(monkeypatch):
    """Every graph captured, in order."""
    made = []
    monkeypatch.setattr(replay, "Graph", lambda function, inputs: Graph(made, function, inputs))
    return made


@pytest.fixture
def drawn_on_gpu(graphs):
    """A tiny variant whose forwards are replayed as on a device class that says so."""

    def _make(name="bf16", workload="turbo-tiny", **changed):
        ready = engine(name, workload, width=64, height=64, **changed)
        ready._loaded.forwards._replays._able = True
        return ready

    return _make


# ---- any function ---------------------------------------------------------


def test_inputs_of_captured_shapes_are_replayed(graphs):
    doubled = Replays(lambda x: (x * 2,), able=True)
    assert doubled.how == "kernel by kernel"
    doubled(INPUT)
    doubled.capture(INPUT)
    doubled.capture(INPUT + 1)
    assert (len(graphs), doubled.how) == (1, "replayed as a graph")
    assert torch.equal(doubled(INPUT + 3)[0], INPUT * 2 + 6)
    assert graphs[0].replayed == 1
    doubled(INPUT, replay=False)
    doubled(INPUT[:, :2])
    assert graphs[0].replayed == 1


def test_nothing_is_captured_where_that_was_not_asked_for(graphs):
    plain = Replays(lambda x: (x,), able=False)
    plain(INPUT)
    plain.capture(INPUT)
    assert (graphs, plain.how) == ([], "kernel by kernel")


def test_what_refuses_to_be_captured_goes_on_and_says_so(monkeypatch):
    def refuse(function, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    monkeypatch.setattr(replay, "Graph", refuse)
    doubled = Replays(lambda x: (x * 2,), able=True)
    doubled.capture(INPUT)
    assert torch.equal(doubled(INPUT)[0], INPUT * 2)
    assert doubled.how == "kernel by kernel: operation not permitted when stream is capturing"


# ---- prompts --------------------------------------------------------------


def test_prompts_of_a_captured_length_are_replayed(graphs):
    encoder = engine("bf16", width=64, height=64)._loaded.encoder
    encoder._layers._able = True
    ids = torch.tensor([[1, 5, 9, 2, 7, 3]])
    with torch.inference_mode():
        plain = encoder(ids)
        encoder.capture(ids)
        encoder.capture(ids + 1)
        assert (len(graphs), encoder.how) == (1, "replayed as a graph")
        assert torch.equal(encoder(ids), plain)
        assert graphs[0].replayed == 1
        assert torch.equal(encoder(ids, replay=False), plain)
        assert torch.equal(encoder(ids[:, :3]), encoder(ids[:, :3], replay=False))
        assert graphs[0].replayed == 1


# ---- the transformer ------------------------------------------------------


@pytest.mark.parametrize("workload", ["turbo-tiny", "base-tiny"])
def test_warm_images_are_replayed_and_the_same(drawn_on_gpu, graphs, workload):
    ready = drawn_on_gpu(workload=workload)
    steps = CATALOG.workload(workload).steps
    first = ready.draw(Draw(1, first=True), silent).rounds[0]
    traced = ready.trace()
    assert traced.transformer_forwards == "replayed as a graph"
    assert [graph.replayed for graph in graphs] == [0]
    warm = ready.draw(Draw(2), silent).rounds
    assert graphs[0].replayed == 2 * steps
    assert {image.pixels_sha256 for image in warm} == {first.pixels_sha256}
    assert {image.forwards for image in warm} == {first.forwards}


def test_what_counts_kernels_launches_them(drawn_on_gpu, graphs):
    ready = drawn_on_gpu()
    ready.draw(Draw(1, first=True), silent)
    once = ready.trace()
    assert ready.trace().dispatch == once.dispatch
    assert [graph.replayed for graph in graphs] == [0]


def test_another_prompt_is_drawn_as_if_nothing_had_been_captured(drawn_on_gpu, graphs, tmp_path):
    """One as long as the workload's is replayed on its own embeddings, one of another length is launched."""
    prompts = ("zq", "qz", "a much longer one")
    jobs = tuple(ImageJob(text, text, 3, str(tmp_path / f"{i}.png")) for i, text in enumerate(prompts))
    request = DrawImages(jobs, 64, 64)
    fresh = engine("bf16", width=64, height=64)
    wanted = [image.pixels_sha256 for image in fresh.draw_images(request, silent).images]
    assert len(set(wanted)) == 3
    ready = drawn_on_gpu(prompt="zq")
    ready.draw(Draw(1, first=True), silent)
    ready.trace()
    assert [image.pixels_sha256 for image in ready.draw_images(request, silent).images] == wanted
    assert graphs[0].replayed == 2 * 8


def test_a_cpu_goes_kernel_by_kernel(graphs):
    ready = engine("bf16", width=64, height=64)
    ready.draw(Draw(1, first=True), silent)
    traced = ready.trace()
    assert (traced.transformer_forwards, traced.text_encoding) == ("kernel by kernel",) * 2
    assert graphs == []


def test_a_kernel_that_falls_back_while_it_is_captured_is_no_measurement(drawn_on_gpu, monkeypatch):
    """What was captured is what all rounds would replay, without a word."""
    ready = drawn_on_gpu()
    ready.draw(Draw(1, first=True), silent)
    logger = logging.getLogger("comfy_kitchen.tensor.nvfp4")

    def falls_back(function, inputs):
        logger.warning("NVFP4 scaled_mm failed: not while capturing, falling back to dequantization")
        return Graph([], function, inputs)

    monkeypatch.setattr(replay, "Graph", falls_back)
    with pytest.raises(MeasurementError, match=r"bf16: 1 calls of scaled_mm_nvfp4 .*: not while capturing"):
        ready.trace()
