"""Quantised weights as comfy-kitchen holds them: from a layer's tensors to a `QuantizedTensor`, and what it weighs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

from pytest_zimage.checkpoints.formats import GGUF, Format, QuantisedLayer
from pytest_zimage.checkpoints.gguf_linear import gguf_parameter
from pytest_zimage.checkpoints.svdquant import SVDQUANT, matrix_shape, svdquant_params, svdquant_rows
from pytest_zimage.errors import CheckpointError, UnsupportedError

LAYOUTS: dict[Format, str] = {
    "float8_e4m3fn": "TensorCoreFP8Layout",
    "float8_e5m2": "TensorCoreFP8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "int8_tensorwise": "TensorWiseINT8Layout",
    SVDQUANT: "TensorCoreSVDQuantW4A4Layout",
}
"""comfy-kitchen's layout of each format."""

_TILE_ROWS = 128
"""Rows of one tile of block scales; only whole tiles can be cut apart."""
_BLOCK_SCALES: dict[Format, torch.dtype] = {"nvfp4": torch.float8_e4m3fn, "mxfp8": torch.float8_e8m0fnu}


def layout_class(format_: Format) -> Any:
    """comfy-kitchen's class for `format_`; raises `UnsupportedError` where the installed release has none."""
    from importlib.metadata import version

    try:
        return get_layout_class(LAYOUTS[format_])
    except KeyError as error:
        raise UnsupportedError(
            f"comfy-kitchen {version('comfy-kitchen')} has no layout {LAYOUTS[format_]!r} for the format {format_!r}",
            mend="install a newer comfy-kitchen, or choose a variant in another format",
        ) from error


def multiplies_natively(format_: Format, device: torch.device) -> bool:
    """Whether `device` multiplies two operands of `format_`: from compute capability 8.9 for FP8, 10.0 for NVFP4.

    SVDQuant's product is defined for quantised inputs only, and comfy-kitchen computes it so on a CPU too.
    """
    if format_ == SVDQUANT and device.type == "cpu":
        return True
    if device.type != "cuda":
        return False
    minimum: tuple[int, int] | None = layout_class(format_).MIN_SM_VERSION
    return minimum is None or torch.cuda.get_device_capability(device) >= minimum


def logical_shape(layer: QuantisedLayer) -> tuple[int, int]:
    """`[out_features, in_features]` of the weight as stored; packed formats may be padded beyond the module's shape."""
    if layer.format == SVDQUANT:
        return matrix_shape(layer.tensors["weight"])
    rows, columns = layer.tensors["weight"].shape
    if layer.format == GGUF:
        return rows, columns // layer.options["block_bytes"] * layer.options["block"]
    return rows, columns * 2 if layer.format == "nvfp4" else columns


def stored_shape(format_: Format, shape: tuple[int, int]) -> tuple[int, int]:
    """`logical_shape` that a module of `shape` must find in the file."""
    if format_ == GGUF:
        return shape
    cls = layout_class(format_)
    padded: tuple[int, int] = cls.get_padded_shape(shape) if hasattr(cls, "get_padded_shape") else shape
    return padded


def weight_tensor(
    layer: QuantisedLayer, tensors: Mapping[str, torch.Tensor], shape: tuple[int, int], dtype: torch.dtype
) -> Any:
    """The weight of `layer`, of logical `shape`, that dequantises to `dtype`; `tensors` by suffix, on their device.

    A `QuantizedTensor`, or diffusers' `GGUFParameter`.
    """
    if layer.format == GGUF:
        return gguf_parameter(tensors["weight"], layer.options["type"])
    if layer.format == SVDQUANT:
        held = svdquant_params(layout_class(SVDQUANT), layer.options, tensors, shape, dtype)
        return QuantizedTensor(tensors["weight"], LAYOUTS[SVDQUANT], held)
    scale = tensors["weight_scale"]
    more: dict[str, Any] = {}
    if layer.format in _BLOCK_SCALES:
        blocks = scale.view(_BLOCK_SCALES[layer.format])
        if layer.format == "nvfp4":
            more["block_scale"], scale = blocks, tensors["weight_scale_2"].reshape(())
        else:
            scale = blocks
    elif layer.format == "int8_tensorwise":
        # ComfyUI reads these at the top level of the record or under `params`.
        options = {**layer.options, **(layer.options.get("params") or {})}
        more = {key: options[key] for key in ("convrot", "convrot_groupsize") if key in options}
        scale = scale.reshape(()) if scale.numel() == 1 else scale
    else:
        scale = scale.reshape(())
    params = layout_class(layer.format).Params(scale=scale, orig_dtype=dtype, orig_shape=shape, **more)
    return QuantizedTensor(tensors["weight"], LAYOUTS[layer.format], params)


def split_rows(path: Path, layer: QuantisedLayer, weight: Any, parts: int) -> list[Any]:
    """`weight` cut into `parts` of equal rows; exact, since tiles of block scales lie row block after row block.

    Raises `UnsupportedError` where a part is no whole number of tiles.
    """
    rows = weight.shape[0] // parts
    if layer.format == GGUF:
        return list(weight.chunk(parts))
    if layer.format in _BLOCK_SCALES and rows % _TILE_ROWS:
        raise UnsupportedError(
            f"{path}: layer {layer.name!r}: {rows} rows of {layer.format} do not split along tiles of {_TILE_ROWS}",
            mend='keep the projections fused: kernels = "comfy"',
        )
    return [_rows(weight, i * rows, (i + 1) * rows) for i in range(parts)]


def split_scales(path: Path, layer: QuantisedLayer, scales: torch.Tensor, parts: int) -> list[torch.Tensor]:
    """The scales of a finely scaled FP8 weight as `[N/rows, 1, K/columns, 1]`, cut for `parts` of equal rows of it.

    Raises `UnsupportedError` where a block lies in two parts.
    """
    assert layer.scale_blocks is not None
    rows, block_rows = logical_shape(layer)[0], layer.scale_blocks[0]
    if rows // parts % block_rows:
        raise UnsupportedError(
            f"{path}: layer {layer.name!r}: blocks of {block_rows} rows do not end where its {parts} parts of "
            f"{rows // parts} rows do",
            mend='keep the projections fused: kernels = "comfy"',
        )
    return list(scales.reshape(rows // block_rows, 1, -1, 1).chunk(parts))


def _rows(weight: QuantizedTensor, begin: int, end: int) -> QuantizedTensor:
    if weight._layout_cls == LAYOUTS[SVDQUANT]:
        where, held = svdquant_rows(weight._params, begin, end)
        return QuantizedTensor(weight._qdata[where], weight._layout_cls, held)
    changed: dict[str, Any] = {"orig_shape": (end - begin, weight.shape[1])}
    for name in ("scale", "block_scale"):
        value = getattr(weight._params, name, None)
        if isinstance(value, torch.Tensor) and value.ndim:
            changed[name] = value[begin:end]
    params = dataclasses.replace(weight._params, **changed)
    return QuantizedTensor(weight._qdata[begin:end], weight._layout_cls, params)


def held_tensors(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The plain tensors behind `tensor`: its storage and its scales, or itself."""
    if not isinstance(tensor, QuantizedTensor):
        return [tensor]
    fields = (getattr(tensor._params, field.name) for field in dataclasses.fields(tensor._params))
    return [tensor._qdata, *(value for value in fields if isinstance(value, torch.Tensor))]


def storage_type(tensor: torch.Tensor) -> str:
    """`nvfp4`, `mxfp8`, `svdquant_w4a4`, `gguf_q8_0`, or torch's name of the type the values are stored in."""
    if hasattr(tensor, "quant_type"):
        return f"gguf_{tensor.quant_type.name.lower()}"
    if isinstance(tensor, QuantizedTensor):
        named = {LAYOUTS[format_]: format_ for format_ in ("nvfp4", "mxfp8", SVDQUANT)}
        return named.get(tensor._layout_cls) or str(tensor._qdata.dtype).removeprefix("torch.")
    return str(tensor.dtype).removeprefix("torch.")


class ScaleCheck:
    """Looks for scales that cannot be right; asks the device once, at the end, instead of once per layer."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._names: list[str] = []
        self._bad: list[torch.Tensor] = []

    def add(self, layer: QuantisedLayer, suffix: str, scale: torch.Tensor) -> None:
        """Scalars must be finite and above zero. A block scale may be zero, as that of a block of zeros or padding."""
        if suffix == "weight_scale" and layer.format in _BLOCK_SCALES:
            values = scale.view(_BLOCK_SCALES[layer.format])
            codes = values.view(torch.uint8)
            # E4M3: sign bit set, or NaN (0x7F). E8M0 has no sign, and 0xFF for NaN.
            bad = codes >= 0x7F if layer.format == "nvfp4" else codes == 0xFF
        elif suffix in ("proj_down", "proj_up"):
            bad = ~torch.isfinite(scale.float())
        else:
            values = scale.float()
            bad = ~(torch.isfinite(values) & (values > 0 if suffix != "pre_quant_scale" else values != 0))
        self._names.append(f"{layer.name}.{suffix}")
        self._bad.append(bad.any())

    def finish(self) -> None:
        """Raises `CheckpointError` naming file and tensors of every scale that is NaN, infinite, negative or zero."""
        wrong = list(_where(self._names, self._bad))
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CheckpointError(
                f"{self._path}: scale that is NaN, infinite, negative or zero: {', '.join(map(repr, wrong[:3]))}{more}",
                mend="download the file again, or have it written anew",
            )


def _where(names: Sequence[str], flags: Sequence[torch.Tensor]) -> Iterator[str]:
    if flags:
        yield from (name for name, bad in zip(names, torch.stack(list(flags)).tolist(), strict=True) if bad)
