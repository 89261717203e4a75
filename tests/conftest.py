"""What the plugin's own tests share.

Two kinds of run: the real worker on the real tiny model where behaviour matters, and a scripted engine where numbers must
be exact. Both go through pytester, as a user would.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pytest_zimage.options import user_cache

HERE = Path(__file__).parent

# Read before pytester moves HOME, so that the tiny checkpoints are written once and not once per test.
CACHE = user_cache()

SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ZIMAGE_MODELS", raising=False)


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A user's project: one suite test, the shared checkpoint cache, the CPU."""
    pytester.makeini(
        f"[pytest]\nzimage_cache = {CACHE}\nzimage_device = cpu\naddopts = -p no:cacheprovider --strict-markers\n"
    )
    pytester.makepyfile(test_suite=SUITE)
    return pytester


class Script:
    """What the scripted engine will say: per variant a list of runs, the last one repeated.

    A run is `{"rounds": [...], "cold": s, "rss_idle": bytes, "rss_peak": bytes, "emptied": bool, ...}`; an `error` instead
    of rounds makes the run fail.
    """

    def __init__(self, project: pytest.Pytester) -> None:
        self.project = project
        self.path = project.path / "script.json"

    def __call__(self, **variants: list[dict[str, Any]]) -> None:
        self.path.write_text(json.dumps({name.replace("_", "-"): runs for name, runs in variants.items()}))

    @property
    def ran(self) -> list[str]:
        """`variant-index` of every run that the engine really made, in order."""
        log = self.project.path / "ran.log"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def script(project: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A project whose engine is scripted; call it with the runs of each variant."""
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE))
    project.makeconftest(
        """
        from scripted import ScriptedEngine

        def pytest_zimage_engines(config):
            return {"diffusers": lambda: ScriptedEngine(config.rootpath)}
        """
    )
    return Script(project)


@pytest.fixture
def results(project: pytest.Pytester) -> Callable[[], dict[str, Any]]:
    """The newest results file of the project."""

    def read() -> dict[str, Any]:
        files = sorted((project.path / ".zimage" / "results").glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        assert files, "no results file was written"
        data: dict[str, Any] = json.loads(files[-1].read_text(encoding="utf-8"))
        return data

    return read


@pytest.fixture
def python() -> str:
    return sys.executable
