"""A server's image is the PNG that was asked for, or an error; only its pixels are kept."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pytest_zimage.engines.servers.images import decoded, digest, largest_bytes, save_png
from pytest_zimage.errors import MeasurementError
from pytest_zimage.quality.images import pixels_sha256, read_image

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    return data.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, rows: bytes, *, bits: int = 8, colour: int = 2, more: bytes = b"") -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    packed = chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + more + packed + chunk(b"IEND", b"")


def test_a_png_gives_its_pixels_and_their_fingerprint():
    pixels, sha256 = decoded(file_of(Image.fromarray(PIXELS)), 64, 48)
    assert np.array_equal(pixels, PIXELS)
    assert sha256 == hashlib.sha256(PIXELS.tobytes()).hexdigest() == pixels_sha256(PIXELS) == digest(PIXELS)


def test_opaque_alpha_and_metadata_change_nothing():
    notes = PngImagePlugin.PngInfo()
    notes.add_text("prompt", '{"3": {"class_type": "KSampler"}}')
    opaque = np.dstack([PIXELS, np.full((48, 64), 255, np.uint8)])
    for data in (file_of(Image.fromarray(PIXELS), pnginfo=notes), file_of(Image.fromarray(opaque))):
        assert decoded(data, 64, 48)[1] == digest(PIXELS)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "not a PNG"),
        (b"<html>no image today</html>" * 10, "not a PNG"),
        (file_of(Image.fromarray(PIXELS), "JPEG"), "not a PNG"),
        (file_of(Image.fromarray(PIXELS), "WEBP"), "not a PNG"),
        (file_of(Image.fromarray(PIXELS))[:29], "a broken PNG"),
        (file_of(Image.fromarray(PIXELS))[:-2000], "a broken PNG"),
        (file_of(Image.fromarray(PIXELS[:, :32])), "32x48 where 64x48 was asked for"),
        (file_of(Image.fromarray(PIXELS[..., 0])), "8 bits a channel and colour type 0"),
        (file_of(Image.fromarray(PIXELS).quantize(16)), "colour type 3"),
        (png(64, 48, b"\0" * (48 * (1 + 64 * 6)), bits=16), "16 bits a channel and colour type 2"),
        (file_of(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]]))), "partly transparent"),
        (png(64, 48, b"\0" * 100), "a broken PNG"),
    ],
)
def test_anything_else_is_no_image(data, says):
    with pytest.raises(MeasurementError, match=says):
        decoded(data, 64, 48)


def test_a_file_that_unpacks_to_too_much_is_not_unpacked(monkeypatch):
    """By its size the header gives it away; in a text chunk the decoder's own limit does."""
    bomb = png(60_000, 60_000, b"\0" * 1_000_000)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(MeasurementError, match="60000x60000 where 64x48"):
        decoded(bomb, 64, 48)
    monkeypatch.undo()
    text = chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 100_000_000))
    with pytest.raises(MeasurementError, match=r"a broken PNG: .*too large"):
        decoded(png(64, 48, b"\0" * (48 * (1 + 64 * 3)), more=text), 64, 48)


def test_more_rows_than_the_header_says_are_not_read():
    pixels, _ = decoded(png(64, 48, b"\0" * (48 * (1 + 64 * 3)) + b"\xff" * 10_000_000), 64, 48)
    assert not pixels.any()


def test_what_is_kept_is_what_the_judge_reads(tmp_path):
    save_png(PIXELS, tmp_path / "a.png")
    read = read_image(str(tmp_path / "a.png"), sha256=digest(PIXELS), size=(64, 48))
    assert np.array_equal(read, PIXELS)
    with Image.open(tmp_path / "a.png") as image:
        assert image.info == {}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_a_picture_that_cannot_be_kept_leaves_no_part_of_it(tmp_path, monkeypatch):
    def fill_the_disk(image, path, **options):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fill_the_disk)
    with pytest.raises(MeasurementError, match=r"a\.png: cannot be written: No space left on device"):
        save_png(PIXELS, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_every_png_of_a_size_has_room():
    noisy = file_of(Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), compress_level=0)
    assert len(noisy) < largest_bytes(64, 48)
    assert largest_bytes(1024, 1024) < 32 << 20
