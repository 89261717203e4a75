"""What comfy-kitchen says in its log: which backend it selected for an operation, and what it dequantised instead.

Source: comfy_kitchen 0.2.8 and 0.2.40, registry.py (`comfy_kitchen.dispatch`, one DEBUG line a call) and tensor/*.py.
Its custom ops and its layouts all ask the registry, so that every call leaves a line; a product in FP8 is torch's own
and leaves none.
"""

from __future__ import annotations

import logging
import re
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from pytest_zimage.errors import MeasurementError

ROOT = "comfy_kitchen"
DEQUANTISED = "dequantised"
"""Stands where a backend would, for an operation that was replaced by dequantising and a plain product."""

_SELECTED = re.compile(r"Backend (\S+) selected for (\S+)")
_UNHANDLED = re.compile(r"Unhandled op (\S+) for (\S+), dequantizing")
# `NVFP4 mm failed: ..., falling back to dequantization`, `MXFP8 linear failed: ...`, and at DEBUG
# `NVFP4 linear: unsupported transpose configuration, falling back to dequantize`.
_REPLACED = re.compile(r"falling back| failed: ")
_TENSOR = f"{ROOT}.tensor."


def dequantised(record: logging.LogRecord) -> str:
    """The operation that a line says was dequantised instead: `scaled_mm_nvfp4`; "" for any other line."""
    if not record.name.startswith(_TENSOR):
        return ""
    message = record.getMessage()
    if unhandled := _UNHANDLED.match(message):
        return f"{unhandled[1]} of {unhandled[2]}"
    return f"scaled_mm_{record.name.removeprefix(_TENSOR)}" if _REPLACED.search(message) else ""


class Fallbacks(logging.Handler):
    """Hears the warnings about products that failed and were replaced; costs a call that goes well nothing."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.calls: Counter[str] = Counter()
        """By operation, since `listening` was last entered."""
        self.first = ""
        """The first of the warnings."""

    def emit(self, record: logging.LogRecord) -> None:
        if operation := dequantised(record):
            self.calls[operation] += 1
            self.first = self.first or record.getMessage()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Count anew, at the level WARNING; leaves the loggers as they were."""
        self.calls.clear()
        self.first = ""
        with _attached(self, logging.WARNING):
            yield

    def error(self, variant: str, layers: str = "") -> MeasurementError:
        """What fell back, how often in the image, where (`layers`, if that is known), and what was said first."""
        return fell_back(variant, self.calls, self.first, layers)


class Selections(logging.Handler):
    """Every selection of a backend and every dequantisation, in the order of the calls."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        """`operation: backend`, a line a call."""
        self.warned: Counter[str] = Counter()
        """Operations that fell back with a warning, which no timed image may."""
        self.first = ""

    def emit(self, record: logging.LogRecord) -> None:
        if selected := _SELECTED.match(record.getMessage()):
            self.lines.append(sys.intern(f"{selected[2]}: {selected[1]}"))
        elif operation := dequantised(record):
            self.lines.append(f"{operation}: {DEQUANTISED}")
            if record.levelno >= logging.WARNING:
                self.warned[operation] += 1
                self.first = self.first or record.getMessage()
        if record.levelno >= logging.WARNING:
            # Kept from the loggers above, which may print all they get; they still hear what concerns people.
            logging.getLogger().handle(record)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear everything down to DEBUG; leaves levels, handlers and propagation as they were."""
        root = logging.getLogger(ROOT)
        with _attached(self, logging.DEBUG):
            root.propagate = False
            yield


def fell_back(variant: str, calls: Counter[str], first: str, layers: str) -> MeasurementError:
    """The refusal of an image some of whose quantised products were computed in another way."""
    what = ", ".join(f"{number} calls of {operation}" for operation, number in sorted(calls.items()))
    return MeasurementError(
        f"{variant}: {what} fell back to dequantising in one image: {first}"
        + (f"; layers: {layers}" if layers else ""),
        mend="the numbers would be another variant's; try another comfy-kitchen or torch release",
    )


@contextmanager
def _attached(handler: logging.Handler, level: int) -> Iterator[None]:
    """`handler` on comfy-kitchen's loggers, none of them coarser than `level`."""
    root = logging.getLogger(ROOT)
    named = logging.root.manager.loggerDict
    below = [named[name] for name in named if name.startswith(f"{ROOT}.")]
    loggers = [root, *(logger for logger in below if isinstance(logger, logging.Logger))]
    before = [(logger, logger.level, logger.propagate) for logger in loggers]
    disabled = logging.root.manager.disable
    try:
        logging.disable(min(disabled, level - 1))
        for logger in loggers:
            if not logger.isEnabledFor(level):
                logger.setLevel(level)
        for logger in loggers[1:]:
            logger.propagate = True
        root.addHandler(handler)
        yield
    finally:
        root.removeHandler(handler)
        logging.disable(disabled)
        for logger, old, propagated in before:
            logger.setLevel(old)
            logger.propagate = propagated
