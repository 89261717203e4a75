"""Where the session of a pytest process hangs: keys light enough for every pytest run to import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pytest_zimage.session import ZImageSession

SESSION: pytest.StashKey[ZImageSession] = pytest.StashKey()
FOLDER: pytest.StashKey[Path] = pytest.StashKey()
PLACES: pytest.StashKey[dict[str, int]] = pytest.StashKey()
"""Place of each test in the collection of xdist's workers, by node id."""
