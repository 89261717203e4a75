"""What a variant asks for beyond its weights: an attention backend of diffusers, and compiled transformer blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.models.attention_dispatch import AttentionBackendName

from pytest_zimage.catalog.model import Variant
from pytest_zimage.checkpoints.attention import FusedAttention
from pytest_zimage.errors import UnsupportedError

_SHAPES = 64
"""Graphs that one kind of block may be compiled to."""


def choose_attention(transformer: Any, variant: Variant) -> None:
    """Have every attention of `transformer` computed by `variant.attention`.

    Raises `UnsupportedError` for a name that diffusers does not have and for a backend that is not installed.
    """
    if variant.attention == "native":
        return
    try:
        transformer.set_attention_backend(variant.attention)
    except (ValueError, RuntimeError, ImportError, OSError) as error:
        raise UnsupportedError(
            f"attention backend {variant.attention!r} cannot be used here: {error}",
            mend=f"install what it needs, or change the key 'attention' of [variants.{variant.name}]",
        ) from error
    for module in transformer.modules():
        if isinstance(module, FusedAttention):
            module.backend = AttentionBackendName(variant.attention)


def compile_blocks(transformer: Any) -> None:
    """Have every transformer block compiled when it first runs, once for each shape, and wholly or not at all."""
    import torch._dynamo.config

    # Each length of caption is a shape of its own for two kinds of blocks; graphs that serve every length are slower.
    torch._dynamo.config.recompile_limit = _SHAPES
    for module in transformer.modules():
        if type(module).__name__ in ("FusedBlock", "ZImageTransformerBlock"):
            module.compile(fullgraph=True, dynamic=False)


@contextmanager
def compiling(variant: str) -> Iterator[None]:
    """Blocks are compiled when they first run: raises `UnsupportedError` when one cannot be."""
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        first = str(error).strip().partition("\n")[0]
        raise UnsupportedError(
            f"torch.compile gave up on a transformer block: {type(error).__name__}: {first}",
            mend=f"set compile = false in [variants.{variant}], or try another torch release",
        ) from error
