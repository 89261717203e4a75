"""Writes planned files: weight by weight, so that memory is bounded by the largest one."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

import torch

from pytest_zimage.checkpoints.synthetic.plan import FilePlan, Weight
from pytest_zimage.checkpoints.synthetic.storage import Stored, encode
from pytest_zimage.checkpoints.synthetic.values import make_weight
from pytest_zimage.errors import CheckpointError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
}
_SPARE_BYTES = 64 << 20
"""Free space to leave over for everything else on the disk."""

Progress = Callable[[str, int, int], None]
"""Called with the file's path, the bytes written so far and the file's size."""


def check_space(folder: Path, plans: Sequence[FilePlan]) -> int:
    """Bytes the files will take; raises `CheckpointError` with both numbers if the disk has less."""
    needed = sum(plan.header()[2] for plan in plans)
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise CheckpointError(
            f"{folder}: the synthetic files need {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB left",
            mend="free some space, or put the cache on another disk",
        )
    return needed


def write_file(plan: FilePlan, root: Path, device: torch.device, progress: Progress) -> Path:
    """Write one file below `root` and flush it to the disk."""
    start, offsets, size = plan.header()
    path = root / plan.path
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(start)
        # Markers are zeros, and whatever is not written reads as zeros.
        file.truncate(size)
        written = len(start)
        for weight in plan.weights:
            for name, tensor in _tensors(plan, weight, device).items():
                written += _put(file, tensor, *offsets[name])
            progress(plan.path, written, size)
        file.flush()
        os.fsync(file.fileno())
    if written + sum(marker.nbytes for marker in plan.markers) != size:
        raise CheckpointError(f"{path}: {written} of {size} planned bytes were written", mend="report this as a bug")
    return path


def _tensors(plan: FilePlan, weight: Weight, device: torch.device) -> dict[str, torch.Tensor]:
    # The quantised files of a role come from the same BF16 values as the BF16 file, so that variants compare; the VAE
    # exists in F32 only.
    dtype = torch.float32 if plan.role == "vae" else torch.bfloat16
    return encode(weight.storage, weight.name, make_weight(f"{plan.role}/{weight.name}", weight.shape, dtype, device))


def _put(file: BinaryIO, tensor: torch.Tensor, stored: Stored, offset: int) -> int:
    if tensor.dtype != _DTYPES[stored.dtype] or tuple(tensor.shape) != stored.shape:
        raise CheckpointError(
            f"tensor {stored.name!r}: planned {stored.dtype} {list(stored.shape)}, "
            f"comfy-kitchen gave {tensor.dtype} {list(tensor.shape)}",
            mend="report this as a bug, with the version of comfy-kitchen",
        )
    file.seek(offset)
    return file.write(tensor.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().data)
