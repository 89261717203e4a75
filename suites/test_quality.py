"""Whether the variant's images are still as good: per prompt and seed, against its own baseline."""

import pytest

pytestmark = pytest.mark.zimage_images


def test_images(zimage):
    """Every image is one: not blank, not uniform, not saturated, whatever a scorer thinks of it."""
    zimage.gate(zimage.sound_images())


def test_clip_score(zimage):
    """The images show what the prompts say, no worse than recorded."""
    zimage.gate(zimage.clip_score())


def test_lpips(zimage):
    """The images are no further from bf16's of the same prompts and seeds than recorded, and are the recorded ones."""
    zimage.gate(zimage.lpips(), zimage.lpips_to_recorded())


def test_pixels(zimage):
    """PSNR and SSIM against the same bf16 images, as the published FP8 tables have them."""
    zimage.gate(zimage.psnr(), zimage.ssim())
