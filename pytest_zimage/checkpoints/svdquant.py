"""SVDQuant W4A4: INT4 weights in groups of 64 beside a low-rank part, inputs smoothed and quantised by the kernel.

    y = int4(x / smooth) @ int4(W)^T + (x @ proj_down) @ proj_up^T

On disk as Comfy-Org's comfy-quants writes it (its docs/formats, `svdquant_w4a4`), in the natural layout or in tiles of
128 rows (`kitchen_tile_packed_w4a4`). comfy-kitchen has `TensorCoreSVDQuantW4A4Layout` from 0.2.40 on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from pytest_zimage.checkpoints.header import TensorInfo
from pytest_zimage.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    import torch

SVDQUANT: Final = "svdquant_w4a4"
SUFFIXES = ("weight_scale", "smooth_factor", "proj_down", "proj_up")
"""Tensors beside a layer's `weight`."""

_GROUP, _TILE = 64, 128
_FLOATS = ("BF16", "F16")
_POST_SMOOTHING = "post_smoothing"
_ANEW = "have the file written anew, or take another"


def check_svdquant(path: Path, name: str, tensors: Mapping[str, TensorInfo], record: Mapping[str, Any]) -> None:
    """Check dtypes and shapes of layer `name`. Raises `CheckpointError` naming file and tensor; `UnsupportedError` for
    a layer whose input is shifted (`act_unsigned`), which no layer of Z-Image has."""
    for suffix in ("weight", *SUFFIXES):
        if suffix not in tensors:
            raise CheckpointError(f"{path}: layer {name!r} ({SVDQUANT}) has no tensor '{name}.{suffix}'", mend=_ANEW)
    if record.get("act_unsigned"):
        raise UnsupportedError(
            f"{path}: layer {name!r}: act_unsigned is for inputs of GELU, and Z-Image has none", mend=_ANEW
        )
    rows, columns = matrix_shape(tensors["weight"])
    rank = tensors["proj_down"].shape[-1] if tensors["proj_down"].shape else 0
    expected: dict[str, tuple[int, ...]] = {
        "weight": (rows, columns // 2),
        "weight_scale": (columns // _GROUP, rows),
        "smooth_factor": (columns,),
        "proj_down": (columns, rank),
        "proj_up": (rows, rank),
    }
    if len(tensors["weight"].shape) == 4:
        tiles = rows // _TILE
        expected |= {
            "weight": (tiles, columns // _GROUP, 32, _TILE),
            "weight_scale": (tiles, columns // _GROUP, _TILE),
            "proj_up": (tiles, rank, _TILE),
        }
    for suffix, shape in expected.items():
        tensor, dtypes = tensors[suffix], ("I8",) if suffix == "weight" else _FLOATS
        if tensor.shape != shape or tensor.dtype not in dtypes or 0 in shape or columns % _GROUP:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} ({SVDQUANT}): expected {' or '.join(dtypes)} {list(shape)}, "
                f"found {tensor.dtype} {list(tensor.shape)}",
                mend=_ANEW,
            )


def matrix_shape(weight: TensorInfo) -> tuple[int, int]:
    """`[out_features, in_features]` behind the stored INT4 weight; zeros for a shape of neither layout."""
    shape = weight.shape
    if len(shape) == 4:
        return shape[0] * _TILE, shape[1] * _GROUP
    return (shape[0], shape[1] * 2) if len(shape) == 2 else (0, 0)


def svdquant_params(
    layout: Any,
    record: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor],
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Any:
    """comfy-kitchen's parameters of a layer; everything beside the codes in `dtype`, which is also that of the result.

    The kernel takes the low-rank input unsmoothed; a file that says otherwise has the smoothing folded in here.
    """
    down = tensors["proj_down"]
    if record.get("lowrank_branch_input_basis") == _POST_SMOOTHING and not record.get("proj_down_smooth_folded"):
        down = down.float() / tensors["smooth_factor"].float()[:, None]
    return layout.Params(
        scale=tensors["weight_scale"].to(dtype),
        orig_dtype=dtype,
        orig_shape=shape,
        proj_down=down.to(dtype),
        proj_up=tensors["proj_up"].to(dtype),
        smooth_factor=tensors["smooth_factor"].to(dtype),
    )


def svdquant_rows(params: Any, begin: int, end: int) -> tuple[slice, Any]:
    """Rows `[begin, end)` of a weight: where they lie in its codes, and their parameters.

    Raises `ValueError` for rows of a tiled weight that are no whole tiles.
    """
    tiled = params.scale.ndim == 3
    if tiled and (begin % _TILE or end % _TILE):
        raise ValueError("no whole tiles")
    where = slice(begin // _TILE, end // _TILE) if tiled else slice(begin, end)
    return where, dataclasses.replace(
        params,
        orig_shape=(end - begin, params.orig_shape[1]),
        scale=params.scale[where] if tiled else params.scale[:, where].contiguous(),
        proj_up=params.proj_up[where],
    )
