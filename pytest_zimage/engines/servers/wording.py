"""What a server writes, as text for a person: no colours, every state of a progress bar on a line of its own."""

from __future__ import annotations

import re

_CODES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
"""Of a terminal: colours, cursor, titles (ECMA-48)."""
_LAST_LINES = 15


def plain(text: str) -> str:
    """`text` without a terminal's codes, and with every state of a progress bar on a line of its own."""
    return _CODES.sub("", text).replace("\r", "\n")


def last_words(text: str) -> str:
    """The last lines of a log, indented under a heading; empty if there are none."""
    lines = [line.rstrip() for line in plain(text).splitlines() if line.strip()][-_LAST_LINES:]
    return "\nlast lines of its log:\n" + "\n".join(f"    {line}" for line in lines) if lines else ""
