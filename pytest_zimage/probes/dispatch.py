"""The dispatch map: which backend served each operation of one untimed image, and how each linear computed.

Keys are `operation: backend` (`dequantize_nvfp4: cuda`, `scaled_mm_fp8: torch`, `scaled_mm_nvfp4: dequantised`) with
calls as values, and `linear: precision` with calls of the transformer's linears.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from torch import nn
from torch.profiler import ProfilerActivity, profile

from pytest_zimage.engines.protocol import Traced
from pytest_zimage.probes.kitchen_log import DEQUANTISED, Selections, fell_back
from pytest_zimage.probes.linear_calls import QUANTISED, UNLOGGED, LinearCalls, compiled_modules

_LAYERS_NAMED = 5


class DispatchTrace:
    """Listens while an image is drawn; never to be entered around a timed one.

    A transformer that torch.compile has taken over, wholly or in part, is not watched call by call: a dispatch mode
    would make it run uncompiled, perhaps for good. Its map has `compiled: modules` and `linear: compiled`, how many
    linears there are. Products that leave no line in the log are counted by torch's profiler, where a linear quantises
    its input: after it has run once, every launch of the process is slower (text encoding on an H200: 43 ms for 34).
    """

    def __init__(self, transformer: nn.Module) -> None:
        self._compiled = compiled_modules(transformer)
        self._log = Selections()
        self._linears = LinearCalls(transformer, self._log.lines)
        quantising = any(getattr(module, "compute", "") == QUANTISED for module in self._linears.declared.values())
        self._profile = profile(activities=[ProfilerActivity.CPU]) if self._compiled and quantising else None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        self._open.enter_context(self._log.listening())
        if self._profile is not None:
            self._open.enter_context(self._profile)
        if not self._compiled:
            self._open.enter_context(self._linears)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open.__exit__(kind, error, trace)

    def traced(self) -> Traced:
        counts = Counter(self._log.lines)
        if self._compiled:
            counts["compiled: modules"] = self._compiled
            counts["linear: compiled"] = len(self._linears.declared)
            for event in self._profile.key_averages() if self._profile is not None else ():
                if product := UNLOGGED.get(event.key):
                    counts[f"{product}: torch"] += event.count
        else:
            for (_, computed), number in self._linears.calls.items():
                counts[f"linear: {computed}"] += number
            if unobserved := self._linears.unobserved:
                counts["linear: not observed"] = len(unobserved)
        return Traced(dict(sorted(counts.items())), self._dequantised())

    def refuse_fallbacks(self, variant: str) -> None:
        """Raises `MeasurementError` naming operations, calls and layers, if comfy-kitchen warned of any."""
        if self._log.warned:
            raise fell_back(variant, self._log.warned, self._log.first, named(self._dequantised()))

    def _dequantised(self) -> dict[str, int]:
        return {name: calls for (name, how), calls in self._linears.calls.items() if how == DEQUANTISED}


def named(layers: dict[str, int]) -> str:
    """`layers.0.attention.qkv (8 calls), ... and 230 more`; "" for none."""
    told = [f"{name} ({calls} calls)" for name, calls in list(layers.items())[:_LAYERS_NAMED]]
    more = len(layers) - len(told)
    return ", ".join(told) + (f" and {more} more" if more else "")
