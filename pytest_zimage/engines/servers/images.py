"""The image that a server sends: proved to be the picture that was asked for before anything is made of it.

Engines are made when tests are collected, so numpy and Pillow are imported where they are used.
"""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import TYPE_CHECKING

from pytest_zimage.engines.png import write_png
from pytest_zimage.errors import MeasurementError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]
    """`[H, W, 3]` RGB."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_HEADER_BYTES = 29
_COLOURS = {2: "RGB", 6: "RGBA"}
"""Colour types of IHDR (PNG specification, 11.2.1) that are understood."""


def largest_bytes(width: int, height: int) -> int:
    """More than a PNG of that size can have: its pixels stored as they are, and room for what is beside them."""
    return 2 * 4 * width * height + (16 << 20)


def decoded(image: bytes, width: int, height: int) -> tuple[Pixels, str]:
    """The pixels of a PNG and the sha256 of their rows, an image's fingerprint.

    Raises `MeasurementError` unless it is a whole PNG, by its content, of exactly that size, with 8 bits a channel, in
    RGB or opaque RGBA. Nothing is unpacked before the header says so.
    """
    if len(image) < _HEADER_BYTES or not image.startswith(_SIGNATURE) or image[12:16] != b"IHDR":
        raise _bad(f"not a PNG: {image[:16]!r}")
    size = int.from_bytes(image[16:20], "big"), int.from_bytes(image[20:24], "big")
    if size != (width, height):
        raise _bad(f"{size[0]}x{size[1]} where {width}x{height} was asked for")
    # Pillow would round 16 bits down without a word.
    if image[24] != 8 or image[25] not in _COLOURS:
        raise _bad(f"{image[24]} bits a channel and colour type {image[25]}, not 8-bit RGB")
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(image), formats=["PNG"]) as opened:
            opened.load()
            pixels = np.asarray(opened)
    # Pillow reports a broken chunk as SyntaxError, a text chunk that unpacks to too much as ValueError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _bad(f"a broken PNG: {error}") from error
    if pixels.ndim != 3 or pixels.shape[:2] != (height, width) or pixels.dtype != np.uint8:
        raise _bad(f"pixels of shape {pixels.shape} and type {pixels.dtype}")
    if pixels.shape[2] == 4 and (pixels[..., 3] != 255).any():
        raise _bad("partly transparent")
    pixels = np.ascontiguousarray(pixels[..., :3])
    return pixels, digest(pixels)


def digest(pixels: Pixels) -> str:
    """sha256 of the pixels, row by row: the fingerprint that every engine reports."""
    import numpy as np

    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def save_png(pixels: Pixels, path: Path) -> None:
    """As `write_png`; raises `MeasurementError` if it cannot be written."""
    try:
        write_png(pixels, path)
    except OSError as error:
        raise MeasurementError(
            f"{path}: cannot be written: {error.strerror or error}", mend="make room, or look at who may write there"
        ) from error


def _bad(what: str) -> MeasurementError:
    return MeasurementError(f"the server's image is {what}", mend="look at what the server says in its log")
