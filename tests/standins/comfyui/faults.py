"""What goes wrong on purpose: by the number of the prompt, or at random in given shares."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

_PLACES = {
    "dropped": ("drop_post", "drop_websocket", "drop_view", "drop_answer", "drop_history"),
    "500": ("500_post", "500_view", "500_history"),
    "hang": ("hang_post", "stuck", "hang_view"),
}
"""Where a share of faults of one kind goes: one place after the other."""


class Faults:
    """The script: `{"at": {"3": "error"}, "every": "cached", "shares": {"seed": 7, "dropped": 0.02}, "start": {...}}`.

    A fault is a name, or a table `{"fault": NAME, ...}` with what it needs. Prompts are counted from 0 on.
    """

    def __init__(self) -> None:
        self.set({})

    def read(self, path: Path) -> None:
        self.set(json.loads(path.read_text(encoding="utf-8")))

    def set(self, script: dict[str, Any]) -> None:
        self.script = script
        self.counts: Counter[str] = Counter()
        """Of faults that really happened, by name."""
        self._places = dict.fromkeys(_PLACES, 0)
        self._number = -1

    def count(self, name: str) -> None:
        self.counts[name] += 1

    @property
    def start(self) -> dict[str, Any]:
        found: dict[str, Any] = self.script.get("start", {})
        return found

    def next(self) -> dict[str, Any]:
        """The fault of the next prompt; empty for none."""
        self._number += 1
        script = self.script
        found = script.get("at", {}).get(str(self._number)) or script.get("every") or self._share()
        return {"fault": found} if isinstance(found, str) else dict(found)

    def _share(self) -> str | dict[str, Any]:
        shares = self.script.get("shares")
        if not shares or self._number < shares.get("after", 0):
            return {}
        drawn = random.Random(f"{shares['seed']}-{self._number}").random()
        for kind, places in _PLACES.items():
            drawn -= shares.get(kind, 0.0)
            if drawn < 0:
                self._places[kind] += 1
                return places[self._places[kind] % len(places)]
        return {}
