"""A LoRA beside the linears it changes: `y + strength * (x @ down^T) @ up^T`, in the type computed in.

ComfyUI adds `up @ down` to the dequantised weight and quantises the sum again, or dequantises the weight in every
forward to add it. Here the weight stays as its file has it, still multiplied by its own kernel, and the change is
computed beside it: no error of a second quantisation, and two thin products a layer, measured as what they cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from pytest_zimage.checkpoints.header import read_header
from pytest_zimage.checkpoints.keymap import fused_name, is_fused_qkv, split_qkv, transformer_to_comfy
from pytest_zimage.checkpoints.keymap import transformer_to_diffusers as to_diffusers
from pytest_zimage.checkpoints.linears import Compute, LinearModule
from pytest_zimage.checkpoints.lora_file import LoraPair, dotted, lora_pairs
from pytest_zimage.checkpoints.reader import TensorReader
from pytest_zimage.checkpoints.staging import Staging
from pytest_zimage.errors import CheckpointError, UnsupportedError

_MEND = "take a LoRA of Z-Image that was made for this file"


class LowRankFactor(LinearModule):
    """One of the two thin products."""

    compute: ClassVar[Compute] = "low-rank"

    def __init__(self, factor: torch.Tensor) -> None:
        """`factor` `[out, in]` as it is multiplied with."""
        super().__init__(nn.Linear(factor.shape[1], factor.shape[0], bias=False, device="meta"))
        self.weight = nn.Parameter(factor, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight)


class LowRankLinear(nn.Module):
    """A linear of any kind with low-rank changes beside it; each fills its rows `[begin, end)` of the output."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.in_features: Any = base.in_features
        self.out_features: Any = base.out_features
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()
        self._rows: list[tuple[int, int]] = []

    def add(self, down: nn.Module, up: nn.Module, rows: tuple[int, int]) -> None:
        """Add `up(down(x))` to the columns `rows` of the output."""
        self.down.append(down)
        self.up.append(up)
        self._rows.append(rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.base(x)
        for down, up, (begin, end) in zip(self.down, self.up, self._rows, strict=True):
            change = up(down(x))
            whole = end - begin == self.out_features
            y = y + (change if whole else F.pad(change, (begin, self.out_features - end)))
        return y


def attach_lora(
    transformer: nn.Module,
    path: Path,
    strength: float,
    dtype: torch.dtype,
    device: torch.device,
    staging: Staging | None = None,
) -> tuple[float, float]:
    """Put the LoRA at `path` beside the linears of a loaded `transformer`, in `dtype`.

    Returns the seconds spent in the file and on getting it to the device. Raises `CheckpointError` naming file and
    layer for a LoRA that is damaged or another model's; `UnsupportedError` for a layer whose input is scaled before its
    quantised weight.
    """
    header = read_header(path)
    pairs = lora_pairs(header)
    targets = [_targets(transformer, path, pair) for pair in pairs]
    values: dict[str, torch.Tensor] = {}
    wanted = [tensor for pair in pairs for tensor in (pair.up, pair.down, pair.alpha) if tensor is not None]
    with TensorReader(header, device, staging) as reader:
        for info, tensor in reader.read(wanted):
            values[info.name] = tensor.float()
        times_s = reader.read_s, reader.to_device_s
    _check_finite(path, values)
    for pair, places in zip(pairs, targets, strict=True):
        up, down = values.pop(pair.up.name), values.pop(pair.down.name)
        alpha = None if pair.alpha is None else float(values[pair.alpha.name])
        # Into one factor and before rounding, so that a forward has no third product.
        up = up * (strength * (1.0 if alpha is None else alpha / pair.rank))
        first = LowRankFactor(down.to(dtype))
        for (name, rows), part in zip(places, up.chunk(len(places)), strict=True):
            _beside(transformer, name).add(first, LowRankFactor(part.to(dtype, copy=True)), rows)
    return times_s


def _targets(transformer: nn.Module, path: Path, pair: LoraPair) -> list[tuple[str, tuple[int, int]]]:
    """The linears that a pair changes, with the rows of each: one, three for a fused qkv, or a third of a fused one."""
    linears = {name: m for name, m in transformer.named_modules() if isinstance(m, nn.Linear | LinearModule)}
    known = [*linears, *(transformer_to_comfy(name) for name in linears), *_thirds(linears)]
    layer = to_diffusers(dotted(pair.layer, known)) or pair.layer
    rows, columns = pair.up.shape[0], pair.down.shape[1]
    names = [layer]
    part = fused_name(layer)
    if layer not in linears and is_fused_qkv(layer) and rows % 3 == 0:
        names = [third.name for third in split_qkv(layer, rows)]
    elif layer not in linears and part is not None and part[0] in linears:
        names = [part[0]]
    else:
        part = None
    if any(name not in linears for name in names):
        raise CheckpointError(f"{path}: the LoRA is for {pair.layer!r}" + _what(transformer, layer), mend=_MEND)
    modules = [linears[name] for name in names]
    expected = sum(m.out_features for m in modules) // (3 if part is not None else 1)
    if rows != expected or columns != modules[0].in_features:
        raise CheckpointError(
            f"{path}: the LoRA of {pair.layer!r} changes a weight [{rows}, {columns}], the transformer's is "
            f"[{expected}, {modules[0].in_features}]",
            mend=_MEND,
        )
    for module in modules:
        if getattr(module, "pre_quant_scale", None) is not None:
            raise UnsupportedError(
                f"{path}: layer {pair.layer!r} scales its input before the quantised weight (pre_quant_scale): a LoRA "
                "made for the weight does not fit that input",
                mend="take a transformer file without pre_quant_scale, or leave the LoRA away",
            )
    begin = rows * part[1] if part is not None else 0
    return [(name, (begin, begin + rows // len(names))) for name in names]


def _thirds(linears: dict[str, Any]) -> list[str]:
    return [third.name for name in linears if is_fused_qkv(name) for third in split_qkv(name, 3)]


def _what(transformer: nn.Module, layer: str) -> str:
    try:
        found = type(transformer.get_submodule(layer)).__name__
    except AttributeError:
        return ", which this transformer does not have"
    return f", which is no linear but {found}"


def _beside(transformer: nn.Module, name: str) -> LowRankLinear:
    module = transformer.get_submodule(name)
    if not isinstance(module, LowRankLinear):
        module = LowRankLinear(module)
        transformer.set_submodule(name, module)
    return module


def _check_finite(path: Path, values: dict[str, torch.Tensor]) -> None:
    names: Sequence[str] = list(values)
    flags = torch.stack([~torch.isfinite(values[name]).all() for name in names]).tolist()
    bad = [name for name, flag in zip(names, flags, strict=True) if flag]
    if bad:
        raise CheckpointError(f"{path}: tensor {bad[0]!r} holds NaN or infinite values", mend="download it again")
