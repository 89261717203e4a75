"""The judge's work, in its own process: images in, scores out, in batches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from msgspec import structs

from pytest_zimage.errors import MeasurementError, UnsupportedError
from pytest_zimage.probes.environment import usable_cores
from pytest_zimage.quality.checks import Pixels, inspect
from pytest_zimage.quality.clip import ClipScorer
from pytest_zimage.quality.images import pixels_sha256, read_image
from pytest_zimage.quality.limits import load_limits
from pytest_zimage.quality.lpips import LpipsScorer
from pytest_zimage.quality.pixels import compare_pixels
from pytest_zimage.quality.protocol import (
    Comparison,
    ControlPrompt,
    ControlScores,
    ImageScore,
    Item,
    PathPair,
    ScoreControls,
)

Report = Callable[[str, int, int], None]
T = TypeVar("T")

_BATCH = 16
_THREADS = 8
"""Images compared at once: SSIM of 1024x1024 pixels takes some 200 MB."""
_LPIPS_PIXELS = 1 << 20
"""Pixels of one LPIPS batch: a 1024x1024 image by itself, as batching gains nothing there and costs memory."""
_LPIPS_MIN_SIDE = 35
"""Smaller images leave nothing after AlexNet's two poolings."""


@dataclass(frozen=True)
class _Image:
    path: str
    pixels: Pixels
    sha256: str


class Scoring:
    """The scorers of one `Open`. Every method raises `MeasurementError` for images or scores that mean nothing."""

    def __init__(self, clip: ClipScorer | None, lpips: LpipsScorer | None) -> None:
        self._clip = clip
        self._lpips = lpips
        self._limits = load_limits().image
        self._image_features: dict[str, torch.Tensor] = {}
        self._text_features: dict[str, torch.Tensor] = {}
        # numpy and scikit-image work on one core and let go of Python's lock; a 1024x1024 image keeps them for 1.4 s.
        self._pool = ThreadPoolExecutor(min(usable_cores(), _THREADS))

    def score(self, items: Sequence[Item], progress: Report) -> tuple[ImageScore, ...]:
        """One score an item, in their order."""
        scores: list[ImageScore] = []
        for batch in _batches(items, _BATCH):
            progress("scoring images", len(scores), len(items))
            images = list(self._pool.map(lambda item: _read(item.path, item.pixels_sha256, item.size), batch))
            cosines = self._cosines(images, [item.text for item in batch])
            paired = [index for index, item in enumerate(batch) if item.reference]
            references = list(
                self._pool.map(
                    lambda item: _read(item.reference, item.reference_sha256, item.size), [batch[i] for i in paired]
                )
            )
            compared = dict(zip(paired, self._compare([images[i] for i in paired], references), strict=True))
            findings = list(self._pool.map(lambda image: inspect(image.pixels, self._limits), images))
            for index, (item, image) in enumerate(zip(batch, images, strict=True)):
                scores.append(
                    ImageScore(
                        prompt=item.prompt,
                        seed=item.seed,
                        path=item.path,
                        pixels_sha256=image.sha256,
                        clip_score=cosines[index],
                        tokens_lost=self._clip.tokens_lost(item.text) if self._clip else 0,
                        against=compared.get(index),
                        findings=findings[index],
                    )
                )
        return tuple(scores)

    def compare(self, pairs: Sequence[PathPair], progress: Report) -> tuple[Comparison, ...]:
        """One comparison a pair, in their order."""
        compared: list[Comparison] = []
        for batch in _batches(pairs, _BATCH):
            progress("comparing images", len(compared), len(pairs))
            images = list(self._pool.map(lambda pair: _read(pair.path, pair.pixels_sha256), batch))
            references = list(self._pool.map(lambda pair: _read(pair.reference, pair.reference_sha256), batch))
            compared += self._compare(images, references)
        return tuple(compared)

    def controls(self, request: ScoreControls, progress: Report) -> tuple[ControlScores, ...]:
        """Per prompt: its own images, and black, noise and the next prompt's images under its text."""
        if self._clip is None:
            raise UnsupportedError("controls need CLIPScore, which was not asked for", mend="name a CLIP model")
        names = [prompt.prompt for prompt in request.prompts]
        images = [list(self._pool.map(_read, prompt.paths)) for prompt in request.prompts]
        for prompt, drawn in zip(request.prompts, images, strict=True):
            if not drawn:
                raise MeasurementError(f"controls of {prompt.prompt}: no image was given", mend="draw its images first")
        scores = []
        for index, prompt in enumerate(request.prompts):
            progress("scoring controls", index, len(names))
            following = (index + 1) % len(names)
            alone = following == index
            sizes = sorted({(image.pixels.shape[0], image.pixels.shape[1]) for image in images[index]})
            scores.append(
                ControlScores(
                    prompt=prompt.prompt,
                    real=self._text_scores(prompt, images[index]),
                    black=self._text_scores(prompt, [_black(size) for size in sizes]),
                    noise=self._text_scores(prompt, [_noise(size, request.noise_seed) for size in sizes]),
                    other=() if alone else self._text_scores(prompt, images[following]),
                    other_prompt="" if alone else names[following],
                )
            )
        return tuple(scores)

    def _text_scores(self, prompt: ControlPrompt, images: Sequence[_Image]) -> tuple[float, ...]:
        scores = self._cosines(images, [prompt.text] * len(images))
        return tuple(score for score in scores if score is not None)

    def _cosines(self, images: Sequence[_Image], texts: Sequence[str]) -> list[float | None]:
        clip = self._clip
        if clip is None:
            return [None] * len(images)
        new = {image.sha256: image for image in images if image.sha256 not in self._image_features}
        for part in _batches(list(new.values()), _BATCH):
            features = clip.image_features([image.pixels for image in part])
            self._image_features |= {image.sha256: row for image, row in zip(part, features, strict=True)}
        unseen = list(dict.fromkeys(text for text in texts if text not in self._text_features))
        if unseen:
            self._text_features |= dict(zip(unseen, clip.text_features(unseen), strict=True))
        return [
            _finite(
                float(self._image_features[image.sha256] @ self._text_features[text]), clip.scorer.identity, image.path
            )
            for image, text in zip(images, texts, strict=True)
        ]

    def _compare(self, images: Sequence[_Image], references: Sequence[_Image]) -> list[Comparison]:
        compared = list(
            self._pool.map(
                lambda image, reference: compare_pixels(image.path, image.pixels, reference.path, reference.pixels),
                images,
                references,
            )
        )
        lpips = self._lpips
        if lpips is None:
            return compared
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            by_shape.setdefault(image.pixels.shape, []).append(index)
        for shape, group in by_shape.items():
            if min(shape[:2]) < _LPIPS_MIN_SIDE:
                raise MeasurementError(
                    f"{images[group[0]].path}: {shape[1]}x{shape[0]} is too small for LPIPS",
                    mend=f"judge quality on images of at least {_LPIPS_MIN_SIDE} pixels a side",
                )
            for part in _batches(group, max(1, _LPIPS_PIXELS // (shape[0] * shape[1]))):
                distances = lpips.distances([images[i].pixels for i in part], [references[i].pixels for i in part])
                for i, distance in zip(part, distances, strict=True):
                    distance = _finite(distance, lpips.scorer.identity, images[i].path)
                    compared[i] = structs.replace(compared[i], lpips=distance)
        return compared


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[begin : begin + size] for begin in range(0, len(items), size))


def _read(path: str, sha256: str = "", size: tuple[int, int] | None = None) -> _Image:
    pixels = read_image(path, sha256=sha256, size=size)
    return _Image(path, pixels, pixels_sha256(pixels))


def _black(size: tuple[int, int]) -> _Image:
    return _control("black control", np.zeros((*size, 3), np.uint8))


def _noise(size: tuple[int, int], seed: int) -> _Image:
    """Uniform noise from numpy's legacy generator, whose stream never changes between releases."""
    values = np.random.RandomState(seed).randint(0, 256, (*size, 3), dtype=np.uint8)
    return _control("noise control", values)


def _control(name: str, pixels: Pixels) -> _Image:
    return _Image(f"{name} {pixels.shape[1]}x{pixels.shape[0]}", pixels, pixels_sha256(pixels))


def _finite(value: float, scorer: str, path: str) -> float:
    if not math.isfinite(value):
        raise MeasurementError(f"{path}: {scorer} gave {value}", mend="check the scorer's weights; it is not the image")
    return value
