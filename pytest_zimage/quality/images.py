"""Image files to pixels, and nothing in between that could pass off a broken file as an image."""

from __future__ import annotations

import hashlib

import numpy as np
from PIL import Image

from pytest_zimage.errors import MeasurementError, MissingFileError
from pytest_zimage.quality.checks import Pixels

_AGAIN = "draw it again"


def read_image(path: str, *, sha256: str = "", size: tuple[int, int] | None = None) -> Pixels:
    """`[H, W, 3]` uint8 of the image at `path`.

    `sha256` is the expected hash of the pixels, `size` the expected width and height. Raises `MissingFileError`, or
    `MeasurementError` for a file that is no RGB image, is cut short, or holds other pixels than expected.
    """
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
            pixels = np.array(image)
    except FileNotFoundError as error:
        raise MissingFileError(f"{path}: the image is not there", mend=_AGAIN) from error
    # Pillow reports a broken chunk as SyntaxError and a decompression bomb as ValueError's relative.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MeasurementError(f"{path}: cannot be read as an image: {error}", mend=_AGAIN) from error
    if mode != "RGB":
        raise MeasurementError(f"{path}: its pixels are {mode}, not RGB", mend="save it as 8-bit RGB")
    seen = (pixels.shape[1], pixels.shape[0])
    if size is not None and seen != size:
        raise MeasurementError(f"{path}: it is {_print(seen)} where {_print(size)} was asked for", mend=_AGAIN)
    if sha256 and pixels_sha256(pixels) != sha256:
        raise MeasurementError(
            f"{path}: its pixels hash to {pixels_sha256(pixels)[:12]}, but {sha256[:12]} was drawn",
            mend="something changed the file after it was drawn; draw it again",
        )
    return pixels


def check_same_size(path: str, pixels: Pixels, reference_path: str, reference: Pixels) -> None:
    """Raises `MeasurementError` if the two cannot be compared pixel by pixel."""
    if pixels.shape != reference.shape:
        raise MeasurementError(
            f"{path}: it is {_print((pixels.shape[1], pixels.shape[0]))}, "
            f"its reference {reference_path} is {_print((reference.shape[1], reference.shape[0]))}",
            mend="compare images of the same workload",
        )


def pixels_sha256(pixels: Pixels) -> str:
    """Of the bytes row by row: the fingerprint that the engines report too."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def _print(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
