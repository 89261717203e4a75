"""What the plugin's own tests share.

Two kinds of run: the real worker on the real tiny model where behaviour matters, and a scripted engine where numbers
must be exact. Both go through pytester, as a user would.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pytest_zimage.catalog import load_catalog
from pytest_zimage.checkpoints.synthetic import ensure_model_set, set_dims
from pytest_zimage.options import user_cache

HERE = Path(__file__).parent

# Read before pytester moves HOME, so that the tiny checkpoints are written once and not once per test.
CACHE = user_cache()

KEY = "diffusers-synthetic-tiny-turbo-tiny"
PORTABLE = f"baselines/portable/{KEY}"
LOCAL = f".zimage/baselines/cpu/{KEY}"

SUITE = """
def test_warm_latency(zimage):
    zimage.gate(zimage.warm_latency())
"""
TIMED = f"""{SUITE}
def test_cold_load(zimage):
    zimage.gate(zimage.cold_load())
"""


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ZIMAGE_MODELS", raising=False)
    # On a build server pytest prints its short summary in full, and counts of lines would differ; in a worker of xdist
    # pytest-benchmark turns itself off, and so would that of a session which a test starts.
    for name in ("CI", "BUILD_NUMBER", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """The test may leave no thread and no open file."""
    threads, files = set(threading.enumerate()), sorted(os.listdir("/proc/self/fd"))
    yield
    assert set(threading.enumerate()) <= threads
    assert sorted(os.listdir("/proc/self/fd")) == files


@pytest.fixture
def attention_backend_kept() -> Iterator[None]:
    """diffusers keeps the backend chosen last for the whole process, and for networks that were built before too."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Registry

    before, _ = Registry.get_active_backend()
    yield
    Registry.set_active_backend(before)


INI = """
[pytest]
zimage_cache = {cache}
zimage_device = cpu
addopts = -p no:cacheprovider --strict-markers
"""


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The folder of the tiny model set, sound, in the user's cache."""
    name = "synthetic-tiny"
    ensure_model_set(name, set_dims(name, load_catalog()), CACHE / name)
    return CACHE / name


@pytest.fixture
def project(pytester: pytest.Pytester) -> pytest.Pytester:
    """A user's project: one suite test, the shared checkpoint cache, the CPU."""
    pytester.makeini(INI.format(cache=CACHE))
    pytester.makepyfile(test_suite=SUITE)
    return pytester


class Script:
    """What the scripted engine will say: per variant a list of runs, the last one repeated.

    A run is `{"rounds": [...], "cold": s, "rss_idle": bytes, "rss_peak": bytes, "emptied": bool, ...}`; an `error`
    instead of rounds makes the run fail.
    """

    QUIET: ClassVar[list[dict[str, Any]]] = [
        {"rounds": [seconds], "cold": 10 * seconds} for seconds in (1.000, 1.004, 0.997, 1.002, 0.999)
    ]
    """Five runs that differ as those of a quiet machine do."""
    _recorded: ClassVar[dict[str, dict[str, bytes]]] = {}

    def __init__(self, project: pytest.Pytester) -> None:
        self.project = project
        self.path = project.path / "script.json"

    def record(self, names: str, runs: list[dict[str, Any]]) -> None:
        """Make `runs` the baseline of the variants `names`, by the update that a user would make.

        What came of it is kept for the next test that records the same of the same tests.
        """
        suite = (self.project.path / "test_suite.py").read_text()
        key = json.dumps([names, runs, suite])
        if key not in self._recorded:
            self(default=runs)
            done = self.project.runpytest_subprocess(
                "--zimage-config", names, "--update-baselines", "--update-reason", "first"
            )
            assert done.ret == 0, done.stdout.str()
            (self.project.path / "ran.log").unlink()
            self._recorded[key] = self.baselines
        for path, data in self._recorded[key].items():
            target = self.project.path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)

    @property
    def baselines(self) -> dict[str, bytes]:
        """Every file of the two folders of baselines, by its path."""
        root = self.project.path
        found = [path for folder in (PORTABLE, LOCAL) for path in sorted((root / folder).parent.rglob("*"))]
        return {str(path.relative_to(root)): path.read_bytes() for path in found if path.is_file()}

    def run(self, names: str, *arguments: str) -> pytest.RunResult:
        """A session of the variants `names`, as a user would start it."""
        return self.project.runpytest_subprocess("--zimage-config", names, *arguments)

    def __call__(self, **variants: list[dict[str, Any]]) -> None:
        self.path.write_text(json.dumps({name.replace("_", "-"): runs for name, runs in variants.items()}))

    @property
    def ran(self) -> list[str]:
        """`variant-index` of every run that the engine really made, in order."""
        log = self.project.path / "ran.log"
        return log.read_text().split() if log.exists() else []


@pytest.fixture
def script(project: pytest.Pytester, tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """A project whose engine is scripted; call it with the runs of each variant."""
    # A cache of its own, and so a lock of its own: nobody waits for a real measurement beside this.
    cache = project.mkdir("cache")
    (cache / "synthetic-tiny").symlink_to(tiny)
    project.makeini(INI.format(cache=cache))
    monkeypatch.syspath_prepend(str(HERE))
    monkeypatch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
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
