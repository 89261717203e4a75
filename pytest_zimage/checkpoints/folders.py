"""A transformer as a folder in diffusers' layout: its config, its index and its shards, read without torch.

    NAME/[transformer/]config.json
    NAME/[transformer/]diffusion_pytorch_model.safetensors
    or ...-00001-of-00002.safetensors, ... with diffusion_pytorch_model.safetensors.index.json

A single file is the same thing with one shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pytest_zimage.checkpoints.gguf_header import GGUF_SUFFIX, read_gguf_header
from pytest_zimage.checkpoints.header import Header, read_header
from pytest_zimage.checkpoints.modelopt import CONFIG_KEY, OLD_CONFIG_KEY
from pytest_zimage.errors import CheckpointError, MissingFileError

CONFIG = "config.json"
_OLD_CONFIG = "hf_quant_config.json"
_INDEX_SUFFIX = ".safetensors.index.json"
_COMPONENT = "transformer"
_AGAIN = "fetch the folder again"


@dataclass(frozen=True, slots=True)
class Weights:
    """The checked headers of a file or of a folder's shards, and all of them as one."""

    shards: tuple[Header, ...]
    header: Header
    """Every tensor by name; `begin` and `end` are offsets in the tensor's own shard."""


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files that loading `path` reads: itself, or a folder's shards with the JSON beside them.

    Raises `MissingFileError` and `CheckpointError` for a folder that is not in diffusers' layout.
    """
    if not path.is_dir():
        return (path,)
    folder = _component(path)
    beside = [folder / name for name in (CONFIG, _OLD_CONFIG) if (folder / name).is_file()]
    return (*beside, *folder.glob(f"*{_INDEX_SUFFIX}"), *_shards(folder))


def bytes_on_disk(path: Path) -> int:
    """Bytes on disk of what loading `path` reads; raises as `weight_files` does."""
    return sum(file.stat().st_size for file in weight_files(path))


def read_weights(path: Path) -> Weights:
    """Read and check every header behind `path`.

    Raises `MissingFileError` for a shard that the index names and is not there, `CheckpointError` naming index and
    tensor where they disagree, and whatever `read_header` raises.
    """
    if not path.is_dir():
        header = read_gguf_header(path) if path.suffix == GGUF_SUFFIX else read_header(path)
        return Weights((header,), header)
    folder = _component(path)
    shards = tuple(read_header(shard) for shard in _shards(folder))
    tensors = {name: tensor for shard in shards for name, tensor in shard.tensors.items()}
    index = _index(folder)
    if index is not None:
        _check_index(index, _weight_map(index), shards)
    metadata = {key: value for shard in shards for key, value in shard.metadata.items()}
    metadata |= _quantisation(folder)
    header_bytes, file_bytes = sum(h.header_bytes for h in shards), sum(h.file_bytes for h in shards)
    return Weights(shards, Header(path, metadata, tensors, header_bytes, file_bytes))


def _component(path: Path) -> Path:
    """The transformer's own folder; a whole pipeline's has it below."""
    below = path / _COMPONENT
    return below if not (path / CONFIG).is_file() and below.is_dir() else path


def _shards(folder: Path) -> list[Path]:
    index = _index(folder)
    if index is not None:
        shards = [folder / name for name in sorted(set(_weight_map(index).values()))]
        for shard in shards:
            if not shard.is_file():
                raise MissingFileError(f"{shard}: no such file, and {index.name} names it as a shard", mend=_AGAIN)
        return shards
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise MissingFileError(f"{folder}: no .safetensors file in it", mend=_AGAIN)
    if len(found) > 1:
        raise CheckpointError(
            f"{folder}: {len(found)} .safetensors files and no *{_INDEX_SUFFIX} that says which tensors are where",
            mend=_AGAIN,
        )
    return found


def _index(folder: Path) -> Path | None:
    found = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: more than one index: {', '.join(p.name for p in found)}", mend="keep one")
    return found[0] if found else None


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = _document(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no table 'weight_map'", mend=_AGAIN)
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(f"{index}: tensor {name!r}: {shard!r} is not a shard's name", mend=_AGAIN)
    return weight_map


def _check_index(index: Path, weight_map: dict[str, str], shards: tuple[Header, ...]) -> None:
    found = {(name, shard.path.name) for shard in shards for name in shard.tensors}
    for name, shard in sorted(set(weight_map.items()) - found):
        raise CheckpointError(f"{index}: tensor {name!r} is not in {shard}, where the index has it", mend=_AGAIN)
    for name, shard in sorted(found - set(weight_map.items())):
        raise CheckpointError(f"{index.with_name(shard)}: tensor {name!r} is not in the index", mend=_AGAIN)


def _quantisation(folder: Path) -> dict[str, str]:
    """What the folder's JSON says of quantisation, as a single file's header would say it."""
    said = {}
    if (folder / CONFIG).is_file():
        config = _document(folder / CONFIG).get(CONFIG_KEY)
        if config is not None:
            said[CONFIG_KEY] = json.dumps(config)
    if (folder / _OLD_CONFIG).is_file():
        said[OLD_CONFIG_KEY] = json.dumps(_document(folder / _OLD_CONFIG))
    return said


def _document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}", mend="check its permissions") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON: {error}", mend=_AGAIN) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: not a JSON table", mend=_AGAIN)
    return document
