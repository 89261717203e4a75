"""What every child process does first: keep its standard output for the protocol, and never outlive its parent."""

from __future__ import annotations

import os
import signal
import sys
from typing import BinaryIO

_PR_SET_PDEATHSIG = 1


def take_stdout() -> BinaryIO:
    """The real standard output for replies; whatever else prints goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb", buffering=0)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return replies


def die_with_parent() -> None:
    """Ask the kernel to end this process when the one that started it is gone, even while a kernel call hangs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        import ctypes

        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit(1)
