"""Kernels taken away on purpose, to prove that the dispatch map tells: `--zimage-inject dispatch=...`.

Both faults hold for the rest of the process, which is the worker's and draws one variant only.
"""

from __future__ import annotations

from typing import Any, NoReturn

import comfy_kitchen as ck
from comfy_kitchen.tensor import fp8
from torch import nn

from pytest_zimage.errors import UnsupportedError
from pytest_zimage.probes.linear_calls import QUANTISED, compute_of

_REFERENCE = "eager"
_PRODUCTS: dict[str, tuple[Any, str]] = {
    "TensorCoreFP8Layout": (fp8, "_fp8_scaled_mm"),
    "TensorCoreNVFP4Layout": (ck, "scaled_mm_nvfp4"),
    "TensorCoreMXFP8Layout": (ck, "scaled_mm_mxfp8"),
}
"""By layout, what its handlers in comfy_kitchen/tensor call to multiply; when it fails, they dequantise."""


def break_dispatch(fault: str, transformer: nn.Module) -> None:
    """`fallback`: every operation goes to comfy-kitchen's slowest backend. `dequantise`: quantised products fail.

    Raises `UnsupportedError` where the fault would change nothing, since that would prove nothing.
    """
    if fault == "fallback":
        _only_reference()
    elif fault == "dequantise":
        _fail_products(transformer)


def _only_reference() -> None:
    faster = [name for name, state in ck.list_backends().items() if state["available"] and not state["disabled"]]
    faster.remove(_REFERENCE)
    if not faster:
        raise UnsupportedError(
            f"dispatch=fallback: comfy-kitchen has no backend here but {_REFERENCE!r}, so nothing can fall back to it",
            mend="inject it on a device for which comfy-kitchen has kernels",
        )
    for name in faster:
        ck.disable_backend(name)


def _fail_products(transformer: nn.Module) -> None:
    quantised: list[Any] = [module for module in transformer.modules() if compute_of(module) == QUANTISED]
    layouts: set[str] = {module.weight._layout_cls for module in quantised}
    if not layouts <= _PRODUCTS.keys() or not layouts:
        what = ", ".join(sorted(layouts)) or "no layer of the transformer"
        raise UnsupportedError(
            f"dispatch=dequantise: {what} multiplies quantised here and dequantises when that fails",
            mend="inject it into a variant whose FP8, NVFP4 or MXFP8 layers this device multiplies, "
            "for example fp8-cast-fast from compute capability 8.9 on",
        )
    for layout in sorted(layouts):
        module, name = _PRODUCTS[layout]
        setattr(module, name, _failing(name))


def _failing(name: str) -> Any:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"{name} fails on purpose (dispatch=dequantise)")

    return fail
