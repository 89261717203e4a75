"""Faults put into images on purpose, to prove that the quality gate can fail: `--zimage-inject quality=...`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from msgspec import structs

from pytest_zimage.engines.protocol import ImageJob

if TYPE_CHECKING:
    import torch


def misdirected(jobs: Sequence[ImageJob], fault: str) -> list[ImageJob]:
    """What is really drawn for each job: the next prompt's text, or another seed, if `fault` says so."""
    if fault == "wrong-seed":
        return [structs.replace(job, seed=job.seed + 1) for job in jobs]
    if fault == "swap-prompts":
        texts = {job.prompt: job.text for job in jobs}
        names = list(texts)
        following = dict(zip(names, [*names[1:], names[0]], strict=True))
        return [structs.replace(job, text=texts[following[job.prompt]]) for job in jobs]
    return list(jobs)


def damaged(pixels: torch.Tensor, fault: str, seed: int) -> torch.Tensor:
    """`pixels`, uint8 `[H, W, 3]`, as `fault` leaves them: black, or with noise of that standard deviation (of 1)."""
    import torch

    if fault == "black":
        return torch.zeros_like(pixels)
    kind, _, amount = fault.partition(":")
    if kind == "noise":
        generator = torch.Generator("cpu").manual_seed(seed)
        noise = torch.randn(pixels.shape, generator=generator) * float(amount) * 255
        return (pixels.float() + noise).round().clamp(0, 255).to(torch.uint8)
    return pixels
