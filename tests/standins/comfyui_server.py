"""ComfyUI servers for tests: the stand-in, or a real one where the environment names it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from standins.comfyui_plan import make_plan, make_settings, silent, variant, workload

from pytest_zimage.engines.base import RunPlan
from pytest_zimage.engines.comfyui.engine import ComfyUIEngine
from pytest_zimage.engines.comfyui.launch import Launch, help_text
from pytest_zimage.engines.servers.process import ServerProcess

STANDIN = Path(__file__).with_name("comfyui")
REAL_DIR, REAL_URL = os.environ.get("ZIMAGE_COMFYUI_DIR"), os.environ.get("ZIMAGE_COMFYUI_URL")
REAL_PYTHON = os.environ.get("ZIMAGE_COMFYUI_PYTHON", sys.executable)
REAL_FLAGS = tuple(os.environ.get("ZIMAGE_COMFYUI_FLAGS", "").split())
KINDS = ["stand-in", *(["real"] if REAL_DIR or REAL_URL else [])]


@dataclass(frozen=True)
class ComfyUI:
    """A server that runs, and what a test does to it behind the engine's back."""

    url: str
    models: Path | None
    folder: Path
    process: ServerProcess | None = None

    def plan(self, name: str = "bf16", **changed: Any) -> RunPlan:
        return make_plan(self.models, self.folder, variant(name), **{"timeout_s": 60.0, **changed})

    def engine(self, **settings: Any) -> ComfyUIEngine:
        return ComfyUIEngine(make_settings(self.folder, comfyui_url=self.url, **settings))

    @contextmanager
    def attached(self, name: str = "bf16", settings: dict[str, Any] | None = None, **changed: Any) -> Iterator[Any]:
        """A session of the engine on this server, as it is."""
        with self.engine(**settings or {}).open(self.plan(name, **changed), silent) as session:
            yield session

    @contextmanager
    def cold(self, **changed: Any) -> Iterator[Any]:
        """The same, with all weights forgotten."""
        with self.attached(**changed) as session:
            session.forget()
            yield session

    @contextmanager
    def warm(self, **changed: Any) -> Iterator[Any]:
        """The same, after an image."""
        with self.attached(**changed) as session:
            session.draw(changed.get("workload", workload()), "any")
            yield session

    def post(self, path: str, body: object) -> None:
        httpx.post(f"{self.url}{path}", json=body, trust_env=False).raise_for_status()

    def get(self, path: str) -> Any:
        return httpx.get(f"{self.url}{path}", trust_env=False).json()

    def faults(self, **script: Any) -> None:
        """What goes wrong from the next prompt on; without any: nothing."""
        self.post("/standin/faults", script)

    def counts(self) -> dict[str, int]:
        """Faults that really happened."""
        return self.get("/standin")["counts"]


@contextmanager
def standin(models: Path, folder: Path, *flags: str) -> Iterator[ComfyUI]:
    """A stand-in that sees the files of `models`."""
    with _started(STANDIN, Path(sys.executable), models, folder, *flags) as server:
        yield server


@contextmanager
def real(models: Path, folder: Path) -> Iterator[ComfyUI]:
    """The real one that `ZIMAGE_COMFYUI_URL` or `ZIMAGE_COMFYUI_DIR` names."""
    if REAL_URL:
        yield ComfyUI(REAL_URL, None, folder)
        return
    with _started(Path(REAL_DIR or ""), Path(REAL_PYTHON), models, folder, *REAL_FLAGS) as server:
        yield server


@contextmanager
def _started(comfyui: Path, python: Path, models: Path, folder: Path, *flags: str) -> Iterator[ComfyUI]:
    home = folder / "home"
    home.mkdir(parents=True)
    plan = make_plan(models, folder, tokenizer=models / "tokenizer")
    launch = Launch(plan, flags, python, help_text(python, comfyui), home)
    process = ServerProcess(
        "test's ComfyUI",
        launch.command,
        cwd=comfyui,
        log=folder / "comfyui.log",
        timeout_s=120,
        progress=silent,
        gpu="",
    )
    with process:
        process.wait_ready(lambda: _answers(process.url))
        yield ComfyUI(process.url, models, folder, process)


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/system_stats", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


def script_file(folder: Path, **script: Any) -> Path:
    """A fault script for a stand-in that is started with `--fault-script`."""
    path = folder / "faults.json"
    path.write_text(json.dumps(script), encoding="utf-8")
    return path
