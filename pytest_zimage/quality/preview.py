"""Previews: what a failing report shows of an image that was recorded long ago."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from pytest_zimage.errors import MeasurementError
from pytest_zimage.probes.environment import usable_cores
from pytest_zimage.quality.images import read_image
from pytest_zimage.quality.protocol import Preview, PreviewJob

_FORMATS = {".webp": "WEBP", ".jpg": "JPEG", ".png": "PNG"}
_QUALITIES = (85, 70, 55, 40)
_SHRINK = 0.75
_SMALLEST = 32


def make_previews(jobs: Sequence[PreviewJob], limit_bytes: int, side: int) -> tuple[Preview, ...]:
    """One preview a job, in their order, on as many cores as may be used; raises as `make_preview` does."""
    # One of a 1024x1024 image takes 0.2 s, in which Pillow does without Python's lock.
    with ThreadPoolExecutor(usable_cores()) as pool:
        return tuple(pool.map(lambda job: make_preview(job, limit_bytes, side), jobs))


def make_preview(job: PreviewJob, limit_bytes: int, side: int) -> Preview:
    """Write `job.target` with at most `limit_bytes`, its longest side at most `side` pixels; as good as fits.

    Raises `MeasurementError` for an image that cannot be read, a target of no known format, or a limit that nothing
    recognisable fits into.
    """
    target = Path(job.target)
    file_format = _FORMATS.get(target.suffix)
    if file_format is None:
        raise MeasurementError(f"{target}: no preview format", mend=f"end it in one of {', '.join(_FORMATS)}")
    image = Image.fromarray(read_image(job.path))
    while side >= _SMALLEST:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        for quality in _QUALITIES:
            data = _encode(small, file_format, quality)
            if len(data) <= limit_bytes:
                _write(target, data)
                return Preview(job.target, small.width, small.height, len(data))
        side = int(side * _SHRINK)
    raise MeasurementError(f"{job.path}: no preview of it fits into {limit_bytes} bytes", mend="allow larger previews")


def _encode(image: Image.Image, file_format: str, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=file_format, quality=quality, method=6, optimize=True)
    return buffer.getvalue()


def _write(target: Path, data: bytes) -> None:
    partial = target.with_name(f".{target.name}.part")
    partial.write_bytes(data)
    os.replace(partial, target)
