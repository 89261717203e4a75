"""Is there a picture at all? Blank, black, saturated and half-empty images, caught whatever a scorer thinks of them.

A black frame was seen to beat healthy images on CLIPScore, so this looks at the pixels alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pytest_zimage.quality.limits import ImageLimits
from pytest_zimage.quality.protocol import Finding

Pixels = npt.NDArray[np.uint8]

_BLACK = 4


def inspect(pixels: Pixels, limits: ImageLimits) -> tuple[Finding, ...]:
    """What is wrong with `pixels`, `[H, W, 3]` uint8; empty for an image that is one."""
    found = []
    std = float(pixels.std(axis=(0, 1)).max())
    if std < limits.min_std:
        colour = ", ".join(f"{value:.0f}" for value in pixels.mean(axis=(0, 1)))
        found.append(
            Finding("uniform", f"every channel is flat around ({colour}): std {std:.2f}, at least {limits.min_std:g}")
        )
    colours = _colours(pixels)
    if colours < limits.min_colours:
        found.append(Finding("few-colours", f"{colours} distinct colours, at least {limits.min_colours}"))
    black = float((pixels.max(axis=2) <= _BLACK).mean())
    if black > limits.max_black_share:
        found.append(
            Finding(
                "black", f"{black:.1%} of the pixels are black, as NaN becomes; at most {limits.max_black_share:.0%}"
            )
        )
    saturated = float(((pixels == 0) | (pixels == 255)).mean())
    if saturated > limits.max_saturated_share:
        found.append(
            Finding(
                "saturated", f"{saturated:.1%} of the values are 0 or 255; at most {limits.max_saturated_share:.0%}"
            )
        )
    for axis, lines in ((1, "rows"), (0, "columns")):
        flat = float((np.ptp(pixels, axis=axis).max(axis=1) == 0).mean())
        if flat > limits.max_flat_lines_share:
            found.append(
                Finding(
                    f"flat-{lines}",
                    f"{flat:.1%} of the {lines} hold one colour from edge to edge; "
                    f"at most {limits.max_flat_lines_share:.0%}",
                )
            )
    return tuple(found)


def _colours(pixels: Pixels) -> int:
    wide = pixels.astype(np.uint32)
    # A flag for each colour there is: sorting a million pixels takes twenty times as long.
    seen = np.zeros(1 << 24, bool)
    seen[(wide[..., 0] << 16) | (wide[..., 1] << 8) | wide[..., 2]] = True
    return int(np.count_nonzero(seen))
