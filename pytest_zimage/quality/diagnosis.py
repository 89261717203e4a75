"""What probably happened to images that differ: blank, noisy, another prompt's, another seed's.

Arithmetic on decoded pixels, for the report of a verdict that is not a pass; it decides nothing. Imports numpy and
Pillow when called, since only a failing report needs them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from pytest_zimage.engines.protocol import DrawnImage

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.float64]

_THUMB = 32
_MOST = 0.8
"""Share of the images that must show the same thing before it is called the cause."""
_GRAIN = 4.0
"""Steps of 255 by which the noise must exceed the reference's."""
_LIKE = 0.15
"""Smallest lead in correlation by which an image must be closer to another prompt's than to its own."""


class _Pair(Struct, frozen=True):
    """One image, and its reference's of the same prompt and seed."""

    prompt: str
    seed: int
    path: str
    reference: str
    fingerprint: str


def probable_causes(
    drawn: Sequence[DrawnImage], references: Sequence[DrawnImage], recorded: Mapping[str, str], reference: str
) -> list[str]:
    """Sentences for a report, the most certain first.

    `references` are of the same prompts and seeds as `drawn`, in their order, and called `reference`; `recorded` maps
    `prompt/seed` to the baseline's fingerprint.
    """
    images = [
        _Pair(one.prompt, one.seed, one.path, other.path, one.pixels_sha256)
        for one, other in zip(drawn, references, strict=True)
    ]
    if swapped := _recorded_elsewhere(images, recorded):
        found = [swapped]
    else:
        found = [_grain(images, reference), _like_another_prompt(images), _like_another_seed(images, reference)]
    return [f"probable cause: {cause}" for cause in found if cause]


def _recorded_elsewhere(images: Sequence[_Pair], recorded: Mapping[str, str]) -> str:
    """An image that is, to the bit, the one recorded for another prompt or seed."""
    owners = {fingerprint: pair for pair, fingerprint in recorded.items()}
    moved = [
        (f"{image.prompt}/{image.seed}", owners[image.fingerprint])
        for image in images
        if owners.get(image.fingerprint, f"{image.prompt}/{image.seed}") != f"{image.prompt}/{image.seed}"
    ]
    if not moved:
        return ""
    what = "the prompts are swapped" if all(a.split("/")[1] == b.split("/")[1] for a, b in moved) else "images moved"
    told = ", ".join(f"{new} is the one recorded for {old}" for new, old in moved[:3])
    return f"{what}: {len(moved)} of {len(images)} images are bit for bit another's: {told}"


def _grain(images: Sequence[_Pair], reference: str) -> str:
    from statistics import median

    # Independent noises add by their squares.
    pairs = [(_noise(_load(image.path)), _noise(_load(image.reference))) for image in images]
    extra = [math.sqrt(max(0.0, new**2 - own**2)) for new, own in pairs]
    noisy = sum(value > _GRAIN for value in extra)
    if noisy < _MOST * len(images):
        return ""
    sd = median(extra)
    return (
        f"noise lies over {noisy} of {len(images)} images: about {sd:.0f} of 255 ({sd / 255:.2f}) more than over"
        f" {reference}'s"
    )


def _noise(pixels: Pixels) -> float:
    """Standard deviation of the noise in steps of 255: J. Immerkær, Fast Noise Variance Estimation, 1996."""
    import numpy as np

    grey = pixels.mean(axis=2)
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float64)
    height, width = grey.shape
    response = sum(mask[i, j] * grey[i : height - 2 + i, j : width - 2 + j] for i in range(3) for j in range(3))
    # The mean of three channels has a third of their variance.
    return float(np.sqrt(3) * np.sqrt(np.pi / 2) / 6 * np.abs(response).mean())


def _like_another_prompt(images: Sequence[_Pair]) -> str:
    """Images that look like the reference's of another prompt with the same seed rather than of their own."""
    thumbs = {(image.prompt, image.seed): _thumb(image.reference) for image in images}
    strays: list[str] = []
    for image in images:
        new = _thumb(image.path)
        own = _correlation(new, thumbs[image.prompt, image.seed])
        others = {
            p: _correlation(new, t) for (p, seed), t in thumbs.items() if seed == image.seed and p != image.prompt
        }
        if others and (best := max(others, key=lambda name: others[name])) and others[best] - own > _LIKE:
            strays.append(f"{image.prompt}/{image.seed} looks like {best}/{image.seed}")
    if len(strays) < _MOST * len(images):
        return ""
    return f"the prompts are swapped: {len(strays)} of {len(images)} images look like another prompt's: {strays[0]}"


def _like_another_seed(images: Sequence[_Pair], reference: str) -> str:
    """Images no closer to the reference's of their seed than those of different seeds are to each other."""
    from statistics import median

    thumbs = {(image.prompt, image.seed): _thumb(image.reference) for image in images}
    own = [_correlation(_thumb(image.path), thumbs[image.prompt, image.seed]) for image in images]
    apart = [_correlation(a, b) for (p, s), a in thumbs.items() for (q, t), b in thumbs.items() if p == q and s < t]
    if not apart or median(own) > (1 + median(apart)) / 2:
        return ""
    return (
        f"the composition is another: with {reference}'s image of the same seed these correlate by"
        f" {median(own):.2f}, {reference}'s images of different seeds with each other by {median(apart):.2f};"
        " the seed, the noise generator or the latent's size has changed, not the precision"
    )


def _load(path: str) -> Pixels:
    import numpy as np
    from PIL import Image

    with Image.open(Path(path)) as image:
        return np.asarray(image.convert("RGB"), dtype=np.float64)


def _thumb(path: str) -> Pixels:
    import numpy as np
    from PIL import Image

    with Image.open(Path(path)) as image:
        small = image.convert("L").resize((_THUMB, _THUMB), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float64)


def _correlation(a: Pixels, b: Pixels) -> float:
    import numpy as np

    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0
