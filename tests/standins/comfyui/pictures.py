"""The stand-in's pictures: noise that follows from what was asked for, so that a test knows every pixel beforehand."""

from __future__ import annotations

import hashlib
import json
import struct
import zlib
from typing import Any

_UNSEEN = {"filename_prefix", "batch_size"}


def picture(graph: dict[str, dict[str, Any]], *, plain_cast: bool = True) -> tuple[bytes, int, int]:
    """Pixels `[H, W, 3]` uint8, width and height of what `graph` asks for.

    `plain_cast`: it multiplies nothing in FP8, as on a CPU, and says nothing of that.
    """
    values = {"fp8_e4m3fn_fast": "fp8_e4m3fn"} if plain_cast else {}
    latent = next(node["inputs"] for node in graph.values() if "width" in node["inputs"])
    asked = [
        (node["class_type"], name, values.get(value, value) if isinstance(value, str) else value)
        for node in graph.values()
        for name, value in sorted(node["inputs"].items())
        if not isinstance(value, list) and name not in _UNSEEN
    ]
    width, height = latent["width"], latent["height"]
    return hashlib.shake_128(json.dumps(asked).encode()).digest(3 * width * height), width, height


def png(rgb: bytes, width: int, height: int) -> bytes:
    """A PNG of 8-bit rows without filters (PNG specification, chapters 5 and 9)."""
    row = 3 * width
    raw = b"".join(b"\0" + rgb[y * row : (y + 1) * row] for y in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    # Noise does not shrink, and level 0 is quick.
    return (
        b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(raw, 0)) + _chunk(b"IEND", b"")
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
