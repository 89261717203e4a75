"""comfy-kitchen's log: every wording of a fallback in the releases supported, and nothing left behind."""

from __future__ import annotations

import logging

import pytest

from pytest_zimage.probes.kitchen_log import Fallbacks, Selections


def say(logger: str, message: str, level: int = logging.WARNING) -> None:
    logging.getLogger(f"comfy_kitchen.{logger}").log(level, message)


@pytest.mark.parametrize(
    ("logger", "message", "operation"),
    [
        ("tensor.fp8", "FP8 _scaled_mm failed: x, falling back to dequantization", "scaled_mm_fp8"),
        ("tensor.nvfp4", "NVFP4 mm failed: x, falling back to dequantization", "scaled_mm_nvfp4"),
        ("tensor.nvfp4", "NVFP4 scaled_mm failed: x, falling back to dequantization", "scaled_mm_nvfp4"),
        ("tensor.mxfp8", "MXFP8 mm failed: x", "scaled_mm_mxfp8"),
        ("tensor.mxfp8", "MXFP8 addmm failed: x", "scaled_mm_mxfp8"),
        ("tensor.mxfp8", "MXFP8 linear failed: x", "scaled_mm_mxfp8"),
    ],
)
def test_each_warning_counts(logger, message, operation) -> None:
    heard, traced = Fallbacks(), Selections()
    with heard.listening():
        say(logger, message)
        say(logger, message)
    assert heard.calls == {operation: 2}
    error = heard.error("nvfp4", "layers.0 (2 calls)")
    assert error.message == (
        f"nvfp4: 2 calls of {operation} fell back to dequantising in one image: {message}; layers: layers.0 (2 calls)"
    )
    with traced.listening():
        say(logger, message)
    assert traced.lines == [f"{operation}: dequantised"]
    assert traced.warned == {operation: 1}
    assert traced.first == message


@pytest.mark.parametrize(
    ("logger", "message", "line"),
    [
        ("dispatch", "Backend eager selected for quantize_nvfp4", "quantize_nvfp4: eager"),
        ("dispatch", "Backend cuda selected for rms_rope (override)", "rms_rope: cuda"),
        (
            "tensor.base",
            "Unhandled op aten.addmm.default for TensorCoreNVFP4Layout, dequantizing",
            "aten.addmm.default of TensorCoreNVFP4Layout: dequantised",
        ),
        (
            "tensor.nvfp4",
            "NVFP4 linear: unsupported transpose configuration, falling back to dequantize",
            "scaled_mm_nvfp4: dequantised",
        ),
    ],
)
def test_what_is_said_at_debug_is_traced_and_refuses_nothing(logger, message, line) -> None:
    heard, traced = Fallbacks(), Selections()
    with heard.listening(), traced.listening():
        say(logger, message, logging.DEBUG)
    assert traced.lines == [line]
    assert not traced.warned
    assert not heard.calls


def test_other_lines_are_nobodys_business() -> None:
    heard, traced = Fallbacks(), Selections()
    with heard.listening(), traced.listening():
        say("tensor.fp8", "a scale was not contiguous")
        say("backends.cuda", "the build failed: no compiler")
        logging.getLogger("elsewhere").warning("FP8 mm failed: x, falling back to dequantization")
    assert not heard.calls
    assert not traced.lines


def test_each_image_counts_anew_and_between_images_nothing_listens() -> None:
    heard = Fallbacks()
    with heard.listening():
        say("tensor.mxfp8", "MXFP8 mm failed: x")
    say("tensor.mxfp8", "MXFP8 mm failed: y")
    assert heard.calls == {"scaled_mm_mxfp8": 1}
    with heard.listening():
        assert not heard.calls
        assert not heard.first
    assert heard not in logging.getLogger("comfy_kitchen").handlers


def test_a_warning_is_heard_whatever_the_levels_were() -> None:
    """A library that silences the log of another must not silence the gate."""
    heard = Fallbacks()
    logger = logging.getLogger("comfy_kitchen.tensor.fp8")
    logger.setLevel(logging.CRITICAL)
    logging.disable(logging.CRITICAL)
    try:
        with heard.listening():
            say("tensor.fp8", "FP8 mm failed: x")
        assert logger.level == logging.CRITICAL
        assert logging.root.manager.disable == logging.CRITICAL
    finally:
        logging.disable(logging.NOTSET)
        logger.setLevel(logging.NOTSET)
    assert heard.calls == {"scaled_mm_fp8": 1}
