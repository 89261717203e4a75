"""Reads the tensors of a file or of a folder's shards, as one `TensorSource`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import Self

import torch

from pytest_zimage.checkpoints.folders import Weights
from pytest_zimage.checkpoints.header import TensorInfo
from pytest_zimage.checkpoints.reader import TensorReader
from pytest_zimage.checkpoints.staging import Staging


class ShardReader:
    """One `TensorReader` per shard, one after another; a context manager, with the errors of `TensorReader`."""

    def __init__(self, weights: Weights, device: torch.device, staging: Staging | None = None) -> None:
        if staging is None and device.type == "cuda":
            staging = Staging(device)
        self._readers = [(shard, TensorReader(shard, device, staging)) for shard in weights.shards]
        self._open = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            for _, reader in self._readers:
                stack.enter_context(reader)
            self._open = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    @property
    def read_s(self) -> float:
        return sum(reader.read_s for _, reader in self._readers)

    @property
    def to_device_s(self) -> float:
        return sum(reader.to_device_s for _, reader in self._readers)

    def read(self, tensors: Iterable[TensorInfo]) -> Iterator[tuple[TensorInfo, torch.Tensor]]:
        """Each of `tensors` once, shard by shard and forwards in each."""
        wanted = {id(tensor) for tensor in tensors}
        for shard, reader in self._readers:
            yield from reader.read([tensor for tensor in shard.tensors.values() if id(tensor) in wanted])

    def read_bytes(self, tensor: TensorInfo) -> bytes:
        """A small tensor's bytes."""
        for shard, reader in self._readers:
            if shard.tensors.get(tensor.name) is tensor:
                return reader.read_bytes(tensor)
        raise KeyError(tensor.name)
