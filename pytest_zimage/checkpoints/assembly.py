"""Plans how the tensors of one file come into one network that was built without storage.

Everything that can be told from names and shapes is settled before a byte of tensor data is read: what is missing,
unexpected or of the wrong shape, and which module computes each layer. `filling` then takes the values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from pytest_zimage.checkpoints.filling import Filling
from pytest_zimage.checkpoints.formats import Contents, QuantisedLayer
from pytest_zimage.checkpoints.header import TensorInfo
from pytest_zimage.checkpoints.keymap import Rename, fused_name, is_fused_qkv, split_qkv
from pytest_zimage.checkpoints.online import install_online, quantises_at_load
from pytest_zimage.checkpoints.precision import Precision, install_casts, install_quantised
from pytest_zimage.checkpoints.projections import separate_where_needed
from pytest_zimage.checkpoints.quantised import logical_shape, stored_shape
from pytest_zimage.checkpoints.reader import TORCH_DTYPES
from pytest_zimage.errors import CheckpointError

_MEND = "check that the file is this network's and complete, or take the official one"


class Assembly:
    """The plan for one network: which tensors to read (`wanted`), and where each goes (`accept`).

    `rename` turns a name of the file into the network's; None drops the tensor. Raises `CheckpointError` naming file
    and tensor for anything missing, unexpected or wrongly shaped, and `UnsupportedError` for what cannot be combined.
    """

    def __init__(
        self,
        network: nn.Module,
        path: Path,
        contents: Contents,
        rename: Rename,
        precision: Precision,
        device: torch.device,
    ) -> None:
        self._network = network
        self._path = path
        self._precision = precision
        self._device = device
        separate_where_needed(network, contents, rename)
        self._shapes = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
        self._filled: set[str] = set()
        self._accept: dict[str, Callable[[torch.Tensor], None]] = {}
        self._values = Filling(network, path, precision)
        self.wanted: list[TensorInfo] = []
        self.dequantised: set[str] = set()
        """Formats computed weight-only because the device cannot multiply them."""
        self.finely_scaled = 0
        """FP8 layers computed weight-only because they have several scales."""
        self._parts: dict[str, dict[int, torch.Tensor]] = {}
        unexpected = []
        for name, tensor in contents.plain.items():
            target = rename(name)
            if target is not None and not self._plan_plain(target, tensor, bool(contents.quantised)):
                unexpected.append(name)
        for layer in contents.quantised.values():
            target = rename(f"{layer.name}.weight")
            if target is not None and not self._plan_layer(target, layer):
                unexpected.append(layer.name)
        self._refuse("has tensors that the network does not", unexpected)
        self._refuse("lacks tensors of the network", [name for name in self._shapes if name not in self._filled])
        install_casts(network, self._values.held, precision)

    def accept(self, info: TensorInfo, tensor: torch.Tensor) -> None:
        """Take one of `wanted`, on the device and in the file's type."""
        self._accept[info.name](tensor)

    def finish(self) -> None:
        """Raises `CheckpointError` for a scale that cannot be right and for a parameter that nothing filled."""
        self._values.finish()
        named = [*self._network.named_parameters(), *self._network.named_buffers()]
        self._refuse("left tensors of the network empty", [name for name, tensor in named if tensor.is_meta])

    def _plan_plain(self, target: str, info: TensorInfo, mixed_file: bool) -> bool:
        """Whether the network has a place for it."""
        dtype = TORCH_DTYPES.get(info.dtype)
        if dtype is None or not dtype.is_floating_point:
            raise CheckpointError(f"{self._path}: tensor {info.name!r}: {info.dtype} is no weight", mend=_MEND)
        fused = fused_name(target)
        if fused is not None and fused[0] in self._shapes:
            self._plan_part(fused[0], fused[1], info, mixed_file)
            return True
        targets = self._targets(target, info.shape[0] if info.shape else 0)
        if not targets:
            return False
        expected = self._expected_shape(targets)
        # The VAE's attention is 1x1 convolutions in LDM files and linears in diffusers.
        if info.shape != expected and info.shape != (*expected, 1, 1):
            raise self._wrong_shape(info.name, info.shape, expected)
        for name in targets:
            self._claim(name, info)
            self._hold(name, dtype, mixed_file)
        self._want(info, partial(self._values.plain, targets))
        return True

    def _plan_part(self, fused: str, part: int, info: TensorInfo, mixed_file: bool) -> None:
        """One of three plain projections that are rows of a fused weight."""
        rows, columns = self._shapes[fused]
        if info.shape != (rows // 3, columns):
            raise self._wrong_shape(info.name, info.shape, (rows // 3, columns))
        if fused not in self._parts:
            self._claim(fused, info)
            self._hold(fused, TORCH_DTYPES[info.dtype], mixed_file)
        arrived = self._parts.setdefault(fused, {})
        self._want(info, partial(self._values.third, fused, part, arrived))

    def _hold(self, name: str, dtype: torch.dtype, mixed_file: bool) -> None:
        path = name.rpartition(".")[0]
        if not (self._precision.online_fp8 and quantises_at_load(self._network, path)):
            held = self._precision.held_as(self._network.get_submodule(path), dtype, mixed_file)
            self._values.hold(name, held, online=False)
            return
        self._values.hold(name, self._precision.compute, online=True)
        if install_online(self._network, path, self._device):
            self.dequantised.add("float8_e4m3fn")

    def _plan_layer(self, target: str, layer: QuantisedLayer) -> bool:
        targets = self._targets(target, logical_shape(layer)[0])
        if not targets:
            return False
        rows, columns = self._expected_shape(targets)
        expected = stored_shape(layer.format, (rows, columns))
        if logical_shape(layer) != expected:
            raise self._wrong_shape(layer.tensors["weight"].name, logical_shape(layer), expected)
        for name in targets:
            self._claim(name, layer.tensors["weight"])
            path = name.removesuffix(".weight")
            if install_quantised(self._network, path, layer, self._path, self._precision, self._device):
                self.dequantised.add(layer.format)
        self.finely_scaled += layer.scale_blocks is not None
        arrived: dict[str, torch.Tensor] = {}
        for suffix, info in layer.tensors.items():
            self._want(info, partial(self._values.part, targets, layer, (rows, columns), arrived, suffix))
        return True

    def _targets(self, target: str, rows: int) -> list[str]:
        """The parameters behind a name: itself, three projections for a fused one, or none."""
        if target in self._shapes:
            return [target]
        if is_fused_qkv(target):
            names = [part.name for part in split_qkv(target, rows)]
            return names if all(name in self._shapes for name in names) else []
        return []

    def _expected_shape(self, targets: list[str]) -> tuple[int, ...]:
        shape = self._shapes[targets[0]]
        return (shape[0] * len(targets), *shape[1:])

    def _claim(self, name: str, info: TensorInfo) -> None:
        if name in self._filled:
            raise CheckpointError(f"{self._path}: tensor {info.name!r} is there under two names", mend=_MEND)
        self._filled.add(name)

    def _want(self, info: TensorInfo, accept: Callable[[torch.Tensor], None]) -> None:
        self.wanted.append(info)
        self._accept[info.name] = accept

    def _refuse(self, what: str, names: list[str]) -> None:
        if names:
            shown = ", ".join(map(repr, sorted(names)[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"{self._path}: {what}: {shown}", mend=_MEND)

    def _wrong_shape(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: tensor {name!r} has the shape {list(found)}, the network needs {list(expected)}", mend=_MEND
        )
