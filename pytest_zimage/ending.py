"""SIGTERM, as a CI runner, `timeout` or a scheduler sends it: the session ends as on Ctrl-C and keeps what it measured.

The default action would end the process at once, and hours of measuring with it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

_ONE_WISH_S = 2.0
"""Signals that are closer together are one wish to end: `timeout` signals the process and then its whole group, and the
controller of a group of xdist's workers passes on what they have got too."""


class Terminated(KeyboardInterrupt):
    """What SIGTERM raises: an interruption, since every part of a session is ready for Ctrl-C."""


class Ending:
    """How this process answers SIGTERM: the first one has the session close in good order, a later one ends it at once.

    Whoever answers SIGTERM already, or ignores it, is left alone.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_s: float | None = None
        self.closing = False
        """Whether the session is being closed anyway: the first SIGTERM then lets it."""
        self.terminated = False
        """Whether SIGTERM broke the session off."""

    def listen(self) -> None:
        """Answer SIGTERM from now on. Does nothing outside of the main thread, where Python allows no handler."""
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._answer)

    def restore(self) -> None:
        """Leave SIGTERM to its default action again, unless somebody else has taken it meanwhile."""
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) == self._answer:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _answer(self, number: int, frame: FrameType | None) -> None:
        now_s = self._clock()
        if self._first_s is None:
            self._first_s = now_s
            if not self.closing:
                self.terminated = True
                raise Terminated("ended by SIGTERM")
        elif now_s - self._first_s > _ONE_WISH_S:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
