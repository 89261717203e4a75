"""Signs of life during long work: one live line on a terminal, a heartbeat line now and then elsewhere.

No thread: whoever reads the worker's answers calls `update` with what it says and `tick` while it says nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable

HEARTBEAT_S = 30.0
"""Least time between two lines where there is no terminal."""
_REDRAW_S = 0.1


class Progress:
    """What is being done, and since when."""

    def __init__(
        self,
        write: Callable[[str], None],
        is_tty: bool,
        clock: Callable[[], float] = time.monotonic,
        *,
        width: Callable[[], int] = lambda: 80,
    ) -> None:
        """`write` must flush; `width` is the terminal's in columns, asked at each redraw."""
        self._write, self._is_tty, self._clock, self._width = write, is_tty, clock, width
        self._what: tuple[str, int, str] | None = None
        self._done = self._total = 0
        self._since_s = 0.0
        self._last_s: float | None = None
        self._drawn = ""

    def update(self, variant: str, run: int, stage: str, done: int = 0, total: int = 0) -> None:
        """A worker's sign of life. A change of stage starts its clock anew."""
        now_s = self._clock()
        changed = (variant, run, stage) != self._what
        if changed:
            self._what, self._since_s = (variant, run, stage), now_s
        if self._last_s is None:
            # The first heartbeat comes after a whole interval: short work stays silent.
            self._last_s = now_s
        self._done, self._total = done, total
        self._show(now_s, at_once=changed)

    def tick(self) -> None:
        """Time has passed and nothing was heard."""
        if self._what is not None:
            self._show(self._clock(), at_once=False)

    def clear(self) -> None:
        """Takes the live line away, so that other output starts on an empty one."""
        if self._drawn:
            self._write("\r" + " " * len(self._drawn) + "\r")
            self._drawn = ""

    def finish(self) -> None:
        """The work is over; `update` may begin another. The heartbeat keeps its rhythm across."""
        self.clear()
        self._what = None

    def line(self) -> str:
        """`nvfp4, run 2: drawing 3/10, 12 s`"""
        assert self._what is not None
        variant, run, stage = self._what
        counted = f" {self._done}/{self._total}" if self._total else ""
        return f"{variant}, run {run}: {stage}{counted}, {self._clock() - self._since_s:.0f} s"

    def _show(self, now_s: float, *, at_once: bool) -> None:
        last_s = now_s if self._last_s is None else self._last_s
        if not self._is_tty:
            if now_s - last_s >= HEARTBEAT_S:
                self._last_s = now_s
                self._write(f"zimage: {self.line()}\n")
            return
        if self._drawn and not at_once and now_s - last_s < _REDRAW_S:
            return
        # One column stays free: a full line would wrap, and the carriage return would not reach its start.
        text = self.line()[: max(self._width() - 1, 1)]
        if text != self._drawn:
            self._write("\r" + text.ljust(len(self._drawn)))
            self._drawn = text
        self._last_s = now_s
