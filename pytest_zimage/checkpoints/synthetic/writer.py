"""Writes planned files: each weight is made once and encoded for every file of its role that wants it.

Memory is bounded by the largest weight and the sink's buffers.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from pytest_zimage.checkpoints.synthetic.manifest import FileRecord
from pytest_zimage.checkpoints.synthetic.plan import FilePlan, Weight
from pytest_zimage.checkpoints.synthetic.sink import FileSink
from pytest_zimage.checkpoints.synthetic.storage import Stored
from pytest_zimage.checkpoints.synthetic.values import make_weight
from pytest_zimage.errors import CheckpointError

_DTYPES = {
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
    "U8": torch.uint8,
    "I8": torch.int8,
}
_SPARE_BYTES = 64 << 20
"""Free space to leave over for everything else on the disk."""
_WAIT_S = 1.0

Progress = Callable[[int], None]
"""Called now and then with the bytes written so far, in all files."""


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


def write_files(
    plans: Sequence[FilePlan], root: Path, device: torch.device, sink: FileSink, progress: Progress
) -> Iterator[tuple[str, FileRecord]]:
    """Write the files of `plans` below `root`: each one's path in the set and its record, once it is on the disk.

    Raises `CheckpointError` for a tensor that is not as planned and for a file that cannot be written.
    """
    left = len(plans)
    for role in dict.fromkeys(plan.role for plan in plans):
        files = [_File(plan, root, sink) for plan in plans if plan.role == role]
        for name, shape, wanted in _weights(files):
            # The quantised files of a role come from the same BF16 values as the BF16 file, so that variants compare;
            # the VAE exists in F32 only.
            dtype = torch.float32 if role == "vae" else torch.bfloat16
            weight = make_weight(f"{role}/{name}", shape, dtype, device)
            for file, planned in wanted:
                file.put(planned.encode(weight))
            progress(sink.written)
        for file in files:
            file.close()
    while left:
        done = sink.finished(_WAIT_S)
        progress(sink.written)
        if done is not None:
            left -= 1
            yield done[0].path.relative_to(root).as_posix(), done[1]


class _File:
    """One planned file and where it goes."""

    def __init__(self, plan: FilePlan, root: Path, sink: FileSink) -> None:
        start, self._offsets, self._size = plan.header()
        self._sink = sink
        self._target = sink.open(root / plan.path, self._size, start)
        self.weights = plan.weights
        # Markers are zeros, which is what the sink leaves where nothing is put.
        self._planned = len(start) + sum(marker.nbytes for marker in plan.markers)

    def put(self, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            stored, offset = self._offsets[name]
            _check(tensor, stored)
            self._sink.put(self._target, offset, tensor)
            self._planned += stored.nbytes

    def close(self) -> None:
        if self._planned != self._size:
            raise CheckpointError(
                f"{self._target.path}: {self._planned} of {self._size} planned bytes were written",
                mend="report this as a bug",
            )
        self._sink.close(self._target)


def _weights(files: list[_File]) -> Iterator[tuple[str, tuple[int, ...], list[tuple[_File, Weight]]]]:
    """Each weight once, with the files that want it and how they store it; by name, as they lie in the files."""
    wanted: dict[tuple[str, tuple[int, ...]], list[tuple[_File, Weight]]] = {}
    for file in files:
        for weight in file.weights:
            wanted.setdefault((weight.name, weight.shape), []).append((file, weight))
    for (name, shape), planned in sorted(wanted.items(), key=lambda item: item[0]):
        yield name, shape, planned


def _check(tensor: torch.Tensor, stored: Stored) -> None:
    if tensor.dtype != _DTYPES[stored.dtype] or tuple(tensor.shape) != stored.shape:
        raise CheckpointError(
            f"tensor {stored.name!r}: planned {stored.dtype} {list(stored.shape)}, "
            f"comfy-kitchen gave {tensor.dtype} {list(tensor.shape)}",
            mend="report this as a bug, with the version of comfy-kitchen",
        )
