"""Where the session of a pytest process hangs: keys light enough for every pytest run to import."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

SESSION: pytest.StashKey[ZImageSession] = pytest.StashKey()
FOLDER: pytest.StashKey[Path] = pytest.StashKey()
COLLECTED: pytest.StashKey[Sequence[str]] = pytest.StashKey()
"""What xdist's workers collected: node ids in order, with the groups behind them."""
