"""The header of a GGUF file, read with the `gguf` package and told as that of any other checkpoint.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Z-Image's GGUF files keep ComfyUI's tensor names and
call the architecture `lumina2`, the family that ComfyUI counts Z-Image to.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pytest_zimage.checkpoints.header import Header, TensorInfo
from pytest_zimage.errors import CheckpointError, MissingFileError, UnsupportedError

GGUF_SUFFIX = ".gguf"
ARCHITECTURES = ("lumina2", "z_image")
"""What `general.architecture` may say of a Z-Image file."""

_PLAIN = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
_AGAIN = "download the file again"
_PIP = "pip install 'pytest-zimage[gguf]'"


def read_gguf_header(path: Path) -> Header:
    """The header of the GGUF file at `path`; its `_quantization_metadata` names the type of each quantised layer.

    A quantised weight `[N, K]` is told as its bytes, U8 `[N, K / block * bytes of a block]`. Raises `MissingFileError`
    without the file; `UnsupportedError` without the package `gguf`, for another architecture and for a quantised tensor
    that is no weight; `CheckpointError` for a file that is not sound.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path}: no such file", mend=f"put it there, or {_AGAIN}")
    reader = _reader(path)
    field = reader.get_field("general.architecture")
    architecture = field.contents() if field is not None else None
    if architecture not in ARCHITECTURES:
        found = "names no architecture" if architecture is None else f"is of the architecture {architecture!r}"
        raise UnsupportedError(
            f"{path}: the GGUF file {found}; Z-Image's is {' or '.join(map(repr, ARCHITECTURES))}",
            mend="take a GGUF file of Z-Image or Z-Image-Turbo",
        )
    tensors, layers = {}, {}
    for tensor in reader.tensors:
        info, record = _tensor(path, tensor)
        if info.name in tensors:
            raise CheckpointError(f"{path}: tensor {info.name!r} is there twice", mend=_AGAIN)
        tensors[info.name] = info
        if record is not None:
            layers[info.name.removesuffix(".weight")] = record
    file_bytes = path.stat().st_size
    end = max((info.end for info in tensors.values()), default=0)
    if not tensors or end > file_bytes:
        raise CheckpointError(
            f"{path}: truncated: its tensors need {end} bytes, the file has {file_bytes}", mend=_AGAIN
        )
    metadata = {"_quantization_metadata": json.dumps({"layers": layers})} if layers else {}
    ordered = dict(sorted(tensors.items(), key=lambda item: item[1].begin))
    return Header(path, metadata, ordered, min(info.begin for info in tensors.values()), file_bytes)


def _reader(path: Path) -> Any:
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise UnsupportedError(f"{path}: a GGUF file is read with the package 'gguf': {error}", mend=_PIP) from error
    try:
        return GGUFReader(path)
    except (ValueError, KeyError, IndexError, TypeError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path}: not a sound GGUF file: {error}", mend=_AGAIN) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}", mend="check the file's permissions") from error


def _tensor(path: Path, tensor: Any) -> tuple[TensorInfo, dict[str, Any] | None]:
    """One tensor, and the record of its layer if it is quantised."""
    from gguf import GGML_QUANT_SIZES

    kind, name = tensor.tensor_type, str(tensor.name)
    # GGUF counts from the innermost dimension outwards.
    shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
    begin = int(tensor.data_offset)
    end = begin + int(tensor.n_bytes)
    if kind.name in _PLAIN:
        return TensorInfo(name, _PLAIN[kind.name], shape, begin, end), None
    if len(shape) != 2 or not name.endswith(".weight"):
        raise UnsupportedError(
            f"{path}: tensor {name!r} is {kind.name} and no weight of a linear", mend="take another GGUF file"
        )
    block, block_bytes = GGML_QUANT_SIZES[kind]
    info = TensorInfo(name, "U8", (shape[0], shape[1] // block * block_bytes), begin, end)
    record = {
        "format": "gguf",
        "full_precision_matrix_mult": True,
        "type": kind.name,
        "block": block,
        "block_bytes": block_bytes,
    }
    return info, record
