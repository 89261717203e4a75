"""The log of a ComfyUI beside one run: what it had said before, and what it says since."""

from __future__ import annotations

from collections.abc import Callable

from pytest_zimage.engines.comfyui.log import facts, said_since


class RunLog:
    """A server keeps the end of its log only, so it is looked at whenever there may be something to know."""

    def __init__(self, read: Callable[[], str], known: dict[str, str] | None = None) -> None:
        """`read` gives what there is of the log, empty where it is not told; the run begins now.

        `known` are facts of its start that have left the log.
        """
        self._read, self._known = read, known or {}
        self.start = self._seen = read()
        self.since = ""

    def look(self) -> str:
        """What it has said since the run began, as far as it was looked at before it was lost."""
        if text := self._read():
            self.since += said_since(self._seen, text)
            self._seen = text
        return self.since

    def facts(self) -> dict[str, str]:
        """For the environment; of what was looked at."""
        return self._known | facts(self.start, self.since)
