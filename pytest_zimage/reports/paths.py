"""Paths as people type them."""

from __future__ import annotations

from pathlib import Path


def shown_from(folder: Path, path: Path) -> Path:
    """`path` from `folder` on; whole where it does not lie below that folder."""
    return path.relative_to(folder) if path.is_relative_to(folder) else path
