"""How the linears of a network really compute, seen in torch's dispatcher while an image is drawn.

Each call of a linear reads its weight exactly once: it multiplies with it, casts it or dequantises it. Which of these
it was is told by the operation that got the weight's memory, so that nothing has to be known of the modules' methods.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from comfy_kitchen.tensor import QuantizedTensor
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pytest_zimage.checkpoints.linears import LinearModule
from pytest_zimage.checkpoints.quantised import held_tensors

QUANTISED = "quantised-activations"
LOW_RANK = "low-rank"
WEIGHT_ONLY = "weight-only"

_Use = Literal["product", "native", "cast", "dequantise"]
_USES: dict[str, _Use] = {
    **dict.fromkeys(("aten::linear", "aten::mm", "aten::addmm", "aten::matmul", "aten::bmm"), "product"),
    **dict.fromkeys(("aten::_scaled_mm", "aten::_scaled_mm_v2", "aten::_int_mm"), "native"),
    **dict.fromkeys(("aten::to", "aten::_to_copy"), "cast"),
}
UNLOGGED = {
    "aten::_scaled_mm": "scaled_mm_fp8",
    "aten::_scaled_mm_v2": "scaled_mm_fp8",
    "aten::_int_mm": "int_mm",
    "pytest_zimage::dequantize_gguf": "dequantize_gguf",
}
"""What torch computes without comfy-kitchen's log saying so, by a name like its own."""


class LinearCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the calls of the linears of `network` by how they computed, while entered.

    comfy-kitchen's tensor subclass is run inside the mode, since torch otherwise hides what it calls. What its custom
    ops call in turn stays hidden: those are its backends, and its log names them. `said` is that log so far; what a
    call that raised had added is taken back, because it did not serve it.
    """

    def __init__(self, network: nn.Module, said: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: Counter[tuple[str, str]] = Counter()
        """By module and by how it computed: `plain`, `cast`, `weight-only`, `quantised-activations`, `dequantised`."""
        self.declared = {name: module for name, module in network.named_modules() if _is_linear(module)}
        self._said = said
        self._at = {held_tensors(module.weight)[0].data_ptr(): name for name, module in self.declared.items()}

    @property
    def unobserved(self) -> list[str]:
        """Modules whose weight nothing known has read."""
        seen = {name for name, _ in self.calls}
        return [name for name in self._at.values() if name not in seen]

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        named = dict(kwargs or {})
        if any(issubclass(kind, QuantizedTensor) for kind in types):
            with self:
                return QuantizedTensor.__torch_dispatch__(func, types, args, named)
        before = len(self._said)
        try:
            result = func(*args, **named)
        except Exception:
            del self._said[before:]
            raise
        name = func._schema.name
        if use := _use(name):
            if name in UNLOGGED:
                self._said.append(f"{UNLOGGED[name]}: torch")
            self._note(use, [*args, *named.values()], result)
        return result

    def _note(self, use: _Use, operands: Sequence[Any], result: Any) -> None:
        for operand in operands:
            module = self._at.get(operand.data_ptr()) if isinstance(operand, torch.Tensor) else None
            # `to` of the type that it has already gives back the weight itself.
            if module is not None and not (use == "cast" and result.dtype == operand.dtype):
                self.calls[module, self._computed(use, module)] += 1

    def _computed(self, use: _Use, module: str) -> str:
        declared = compute_of(self.declared[module])
        if use == "dequantise":
            return "dequantised" if declared == QUANTISED else WEIGHT_ONLY
        if use == "cast" and declared == WEIGHT_ONLY:
            # How FP8 with scales per channel or block is dequantised, for which comfy-kitchen has no operation.
            return WEIGHT_ONLY
        if use == "product" and declared == LOW_RANK:
            return LOW_RANK
        return {"product": "plain", "native": QUANTISED, "cast": "cast"}[use]


def compute_of(module: nn.Module) -> str:
    """How a linear says it computes."""
    return module.compute if isinstance(module, LinearModule) else "plain"


def compiled_modules(network: nn.Module) -> int:
    """Number of modules of `network` that torch.compile has taken over; a mode sees nothing of what they call."""
    return sum(_is_compiled(module) for module in network.modules())


def _is_compiled(module: nn.Module) -> bool:
    wrapped: Callable[[], Iterator[Any]] | None = getattr(module, "_compiled_call_impl", None)
    return wrapped is not None or isinstance(module, torch._dynamo.eval_frame.OptimizedModule)


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | LinearModule)


def _use(name: str) -> _Use | None:
    """What an operation that gets a weight does with it; None: nothing that computes, such as a view."""
    namespace, _, operation = name.partition("::")
    if namespace not in ("comfy_kitchen", "pytest_zimage"):
        return _USES.get(name)
    if operation.startswith("dequantize"):
        return "dequantise"
    return "native" if operation.startswith("scaled_mm") or operation.endswith("linear") else None
