"""The safetensors header: a sound file is read as safetensors reads it, and every kind of damage is named."""

from __future__ import annotations

import json
import struct

import pytest

from pytest_zimage.checkpoints.header import read_header
from pytest_zimage.errors import CheckpointError, MissingFileError


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


SOUND = {"a": entry("F32", [2, 3], 0, 24), "b": entry("BF16", [4], 24, 32)}


def file_bytes(header, data=bytes(32)):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


@pytest.fixture
def refused(tmp_path):
    """Writes the bytes and returns the message of the refusal."""

    def refuse(content):
        path = tmp_path / "x.safetensors"
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert str(path) in caught.value.message
        assert caught.value.mend
        return caught.value.message

    return refuse


def test_reads_what_safetensors_writes(tmp_path):
    numpy = pytest.importorskip("numpy")
    from safetensors.numpy import load_file, save_file

    arrays = {
        "w": numpy.arange(12, dtype=numpy.float32).reshape(3, 4),
        "scalar": numpy.array(2.5, dtype=numpy.float32),
        "empty": numpy.zeros((0, 5), dtype=numpy.float16),
        "bytes": numpy.arange(7, dtype=numpy.uint8),
    }
    path = tmp_path / "sound.safetensors"
    save_file(arrays, path, metadata={"key": "value"})
    header = read_header(path)
    raw = path.read_bytes()
    assert header.metadata == {"key": "value"}
    assert header.file_bytes == len(raw)
    assert set(header.tensors) == set(load_file(path))
    for name, array in arrays.items():
        tensor = header.tensors[name]
        assert tensor.shape == array.shape
        assert raw[tensor.begin : tensor.end] == array.tobytes()
        assert tensor.nbytes == array.nbytes


def test_offsets_are_absolute(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(SOUND))
    header = read_header(path)
    assert header.tensors["a"].begin == header.header_bytes
    assert header.tensors["b"].end == header.file_bytes


def test_missing_file(tmp_path):
    with pytest.raises(MissingFileError, match="nowhere"):
        read_header(tmp_path / "nowhere.safetensors")


def test_folder(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_header(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"abc", "3 bytes are too few"),
        (b"\x80\x02}q\x00X\x05\x00\x00\x00" + bytes(64), "a pickle"),
        (b"PK\x03\x04\x14\x00\x08\x00archive/data.pkl", "a pickle"),
        (b"<!DOCTYPE html><html>...", "an HTML page"),
        (b"\n  <html lang=en>", "an HTML page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a git-lfs pointer"),
        (b"GGUF\x03\x00\x00\x00" + bytes(64), "a GGUF file"),
        (struct.pack("<Q", 200_000_000) + b"{}", "a header of 200000000 bytes"),
        (struct.pack("<Q", 1000) + b"{}", "truncated: the header alone needs 1008 bytes, the file has 10"),
        (file_bytes(b"{nonsense"), "not JSON"),
        (file_bytes(b"\xff\xfe{}"), "not JSON"),
        (file_bytes(b"[1, 2]"), "not a JSON object"),
        (file_bytes(b'{"a": ' * 5000), "not JSON"),
    ],
)
def test_not_safetensors(refused, content, message):
    assert message in refused(content)


@pytest.mark.parametrize("low", [0x0280, 0x010280, 0x04034B50 % (1 << 17)])
def test_a_length_that_looks_like_a_pickle_is_a_length(tmp_path, low):
    text = json.dumps(SOUND).encode().ljust(low)
    path = tmp_path / "x.safetensors"
    path.write_bytes(file_bytes(text))
    assert set(read_header(path).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": entry("F7", [4], 24, 32)}, "tensor 'b': unknown dtype 'F7'"),
        ({"b": entry(None, [4], 24, 32)}, "tensor 'b': unknown dtype None"),
        ({"b": entry("BF16", [-4], 24, 32)}, "tensor 'b': shape [-4]"),
        ({"b": entry("BF16", [4.0], 24, 32)}, "tensor 'b': shape [4.0]"),
        ({"b": entry("BF16", [True, 4], 24, 32)}, "tensor 'b': shape [True, 4]"),
        ({"b": entry("BF16", 4, 24, 32)}, "tensor 'b': shape 4"),
        ({"b": entry("BF16", [4], 32, 24)}, "tensor 'b': data_offsets [32, 24]"),
        ({"b": entry("BF16", [4], -8, 0)}, "tensor 'b': data_offsets [-8, 0]"),
        ({"b": {"dtype": "BF16", "shape": [4]}}, "tensor 'b': data_offsets None"),
        ({"b": entry("BF16", [5], 24, 32)}, "tensor 'b': BF16 [5] needs 10 bytes, its offsets span 8"),
        ({"b": 7}, "tensor 'b': its header entry is not an object"),
        ({"b": entry("BF16", [4], 20, 28)}, "tensor 'b' overlaps 'a' by 4 bytes"),
        ({"a": entry("F32", [2], 0, 8)}, "16 bytes before tensor 'b' belong to no tensor"),
        ({"a": entry("F32", [2], 4, 12), "b": entry("BF16", [10], 12, 32)}, "4 bytes before tensor 'a'"),
        ({"__metadata__": {"key": 1}}, "__metadata__ is not a table of strings"),
        ({"__metadata__": "text"}, "__metadata__ is not a table of strings"),
    ],
)
def test_damaged_entry(refused, change, message):
    assert message in refused(file_bytes({**SOUND, **change}))


def test_key_given_twice(refused):
    text = json.dumps(SOUND)[:-1] + ', "a": ' + json.dumps(SOUND["a"]) + "}"
    assert "the key 'a' twice" in refused(file_bytes(text.encode()))


def test_truncated_says_how_much_is_missing_and_from_where(refused):
    message = refused(file_bytes(SOUND)[:-5])
    assert "truncated: 5 of" in message
    assert "from tensor 'b' on" in message


def test_longer_than_the_header_says(refused):
    assert "3 bytes after the last tensor belong to none" in refused(file_bytes(SOUND, bytes(35)))
