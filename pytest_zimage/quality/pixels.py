"""PSNR and SSIM by scikit-image, as the published FP8 table has them, and how many pixels changed at all."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import numpy as np

from pytest_zimage.errors import MeasurementError
from pytest_zimage.quality.checks import Pixels
from pytest_zimage.quality.images import check_same_size
from pytest_zimage.quality.protocol import Comparison, Scorer

SSIM_WINDOW = 11
"""Side of the window in pixels; with `channel_axis=-1` and a uniform window, the settings of the published table."""


def pixel_scorers() -> tuple[Scorer, ...]:
    """Their identities: the formulas have no weights, so the settings are the name."""
    library = f"scikit-image {version('scikit-image')}"
    return (
        Scorer("psnr_db", "scikit-image/psnr/data_range=255", library),
        Scorer("ssim", f"scikit-image/ssim/win_size={SSIM_WINDOW},channel_axis=-1,data_range=255", library),
    )


def compare_pixels(path: str, pixels: Pixels, reference_path: str, reference: Pixels) -> Comparison:
    """Everything but LPIPS. Both are `[H, W, 3]` uint8.

    Raises `MeasurementError` for images of different sizes, or too small for SSIM's window.
    """
    from skimage import metrics

    untyped: Any = metrics

    check_same_size(path, pixels, reference_path, reference)
    if min(pixels.shape[:2]) < SSIM_WINDOW:
        raise MeasurementError(
            f"{path}: {pixels.shape[1]}x{pixels.shape[0]} is smaller than SSIM's window of {SSIM_WINDOW}",
            mend="judge quality on a larger workload",
        )
    steps = np.abs(pixels.astype(np.int16) - reference.astype(np.int16))
    identical = not steps.any()
    return Comparison(
        identical=identical,
        lpips=None,
        psnr_db=None if identical else float(untyped.peak_signal_noise_ratio(reference, pixels, data_range=255)),
        ssim=float(
            untyped.structural_similarity(reference, pixels, win_size=SSIM_WINDOW, channel_axis=-1, data_range=255)
        ),
        changed_share=float(steps.any(axis=2).mean()),
        largest_step=int(steps.max()),
    )
