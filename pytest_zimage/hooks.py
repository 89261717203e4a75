"""Hooks of this plugin, for conftest files and other plugins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_zimage.engines.base import EngineFactory


@pytest.hookspec
def pytest_zimage_engines(config: pytest.Config) -> Mapping[str, EngineFactory]:
    """Engines to offer under `--zimage-engine`, by name; a factory makes one engine per pytest process."""
    raise NotImplementedError
