"""Scores already known, shared by the processes of one session: the same pixels under the same text score the same."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
from msgspec import structs

from pytest_zimage.quality.limits import load_limits
from pytest_zimage.quality.protocol import ImageScore, Item, Ready


class ScoreCache:
    """Files named by scorer identities, pixels, text and reference pixels. An unreadable one counts as not there."""

    def __init__(self, folder: Path, ready: Ready) -> None:
        self._folder = folder
        self._scorers = [scorer.identity for scorer in ready.scorers]
        self._limits = load_limits().image
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, item: Item) -> ImageScore | None:
        """The score of `item`, under its own names; None if unknown, or if its pixels are not named by a hash."""
        path = self._path(item)
        if path is None:
            return None
        try:
            score = msgspec.json.decode(path.read_bytes(), type=ImageScore)
        except (OSError, msgspec.MsgspecError):
            return None
        return structs.replace(score, prompt=item.prompt, seed=item.seed, path=item.path)

    def put(self, item: Item, score: ImageScore) -> None:
        """Keep `score`; nothing is kept for an item without hashes."""
        path = self._path(item)
        if path is not None:
            partial = path.with_suffix(f".{os.getpid()}.part")
            partial.write_bytes(msgspec.json.encode(score))
            os.replace(partial, path)

    def _path(self, item: Item) -> Path | None:
        if not item.pixels_sha256 or (item.reference and not item.reference_sha256):
            return None
        key = [self._scorers, self._limits, item.pixels_sha256, item.text, item.reference_sha256, item.size]
        return self._folder / f"{hashlib.sha256(msgspec.json.encode(key)).hexdigest()}.json"
