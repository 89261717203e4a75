"""What each quantised format stores beside a layer's weight: the dtypes and shapes a sound file has.

Shapes are those of comfy-kitchen's layouts: block scales lie in cuBLAS' tiles of 128 rows by 4 columns, so both sides
are padded up to whole tiles.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pytest_zimage.checkpoints.header import TensorInfo
from pytest_zimage.errors import CheckpointError

_ANEW = "have the file written anew, or take the official one"
_WEIGHT_DTYPE = {
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "nvfp4": "U8",
    "mxfp8": "F8_E4M3",
    "int8_tensorwise": "I8",
}
_FP8 = ("float8_e4m3fn", "float8_e5m2")
_NEEDED = {"nvfp4": ("weight", "weight_scale", "weight_scale_2")}
_BLOCKS = {"nvfp4": (16, ("F8_E4M3", "U8")), "mxfp8": (32, ("F8_E8M0", "U8"))}
"""Elements of K per block scale, and the dtypes the scales may have on disk."""


def block_scale_shape(rows: int, columns: int, block: int) -> tuple[int, int]:
    """Shape of the tiled block scales of a `[rows, columns]` weight with one scale per `block` columns."""
    return _round_up(rows, 128), _round_up(_round_up(columns, block) // block, 4)


def _round_up(value: int, multiple: int) -> int:
    return (value + multiple - 1) // multiple * multiple


def scale_blocks(format_: str, tensors: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """Rows and columns that share a scale of an FP8 weight with several; None for one scale and for other formats.

    Scales are `[N]` or `[N, 1]` per channel, `[N/rows, K/columns]` or `[N/rows, 1, K/columns, 1]` per block.
    """
    if format_ not in _FP8 or tensors["weight_scale"].elements == 1:
        return None
    (rows, columns), shape = tensors["weight"].shape, tensors["weight_scale"].shape
    if len(shape) == 4 and shape[1] == shape[3] == 1:
        shape = (shape[0], shape[2])
    elif shape == (rows,):
        shape = (rows, 1)
    if len(shape) != 2 or 0 in shape or rows % shape[0] or columns % shape[1]:
        raise ValueError("no division of the weight")
    return rows // shape[0], columns // shape[1]


def check_layer(path: Path, name: str, format_: str, tensors: Mapping[str, TensorInfo], *, tiled: bool = True) -> None:
    """Check the tensors of layer `name`, by suffix, against what `format_` needs.

    `tiled`: block scales lie in tiles; else row by row, as ModelOpt writes them. Raises `CheckpointError` naming file
    and tensor.
    """
    for suffix in _NEEDED.get(format_, ("weight", "weight_scale")):
        if suffix not in tensors:
            raise CheckpointError(f"{path}: layer {name!r} ({format_}) has no tensor '{name}.{suffix}'", mend=_ANEW)
    weight = tensors["weight"]
    if weight.dtype != _WEIGHT_DTYPE[format_]:
        raise _wrong(path, weight, format_, f"dtype {_WEIGHT_DTYPE[format_]}")
    if len(weight.shape) != 2 or 0 in weight.shape:
        raise _wrong(path, weight, format_, "a matrix")
    rows, columns = weight.shape[0], weight.shape[1] * (2 if format_ == "nvfp4" else 1)
    if format_ in _BLOCKS:
        block, dtypes = _BLOCKS[format_]
        shape = block_scale_shape(rows, columns, block) if tiled else (rows, columns // block)
        _expect(path, tensors["weight_scale"], format_, shape, dtypes)
    elif format_ in _FP8:
        _check_fp8_scales(path, format_, tensors)
    else:
        _check_tensor_scale(path, tensors["weight_scale"], format_, rows)
    for suffix in ("weight_scale_2", "input_scale"):
        if suffix in tensors:
            _expect_scalar(path, tensors[suffix], format_)
    if "pre_quant_scale" in tensors:
        _expect(path, tensors["pre_quant_scale"], format_, (columns,), ("F32", "F16", "BF16"))


def _check_fp8_scales(path: Path, format_: str, tensors: Mapping[str, TensorInfo]) -> None:
    scale = tensors["weight_scale"]
    try:
        several = scale_blocks(format_, tensors) is not None
    except ValueError:
        raise _wrong(path, scale, format_, "one number, one for each row, or one for each block") from None
    if several:
        _expect(path, scale, format_, scale.shape, ("F32",))
    else:
        _expect_scalar(path, scale, format_)


def _check_tensor_scale(path: Path, scale: TensorInfo, format_: str, rows: int) -> None:
    if scale.shape in ((), (1,)):
        _expect_scalar(path, scale, format_)
    elif format_ == "int8_tensorwise" and scale.shape in ((rows, 1), (1, 1)):
        _expect(path, scale, format_, scale.shape, ("F32",))
    else:
        raise _wrong(path, scale, format_, "one number, [] or [1]")


def _expect_scalar(path: Path, scale: TensorInfo, format_: str) -> None:
    if scale.shape not in ((), (1,)) or scale.dtype != "F32":
        raise _wrong(path, scale, format_, "one F32 number, [] or [1]")


def _expect(path: Path, tensor: TensorInfo, format_: str, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        raise _wrong(path, tensor, format_, f"{' or '.join(dtypes)} {list(shape)}")


def _wrong(path: Path, tensor: TensorInfo, format_: str, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: tensor {tensor.name!r} ({format_}): expected {expected}, found {tensor.dtype} {list(tensor.shape)}",
        mend=_ANEW,
    )
